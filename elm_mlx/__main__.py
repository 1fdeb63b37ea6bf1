"""`python -m elm_mlx` is the `elm-mlx` command, and this is where both begin.

Until the command line is there to say something better, Ctrl-C ends the process without a word.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Run the command line."""
    from elm_mlx import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
