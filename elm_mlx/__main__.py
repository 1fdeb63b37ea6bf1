"""`python -m elm_mlx` is the `elm-mlx` command."""

from elm_mlx.cli import main

if __name__ == "__main__":
    main()
