"""`python -m elm_mlx` is the `elm-mlx` command, and this is where both begin.

Until the command line is there to say something better, and after it has said its last, Ctrl-C ends the process without
a word: not in a traceback of threads that are waited for.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Run the command line."""
    from elm_mlx import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cli.main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
