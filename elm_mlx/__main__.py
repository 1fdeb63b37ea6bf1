"""`python -m elm_mlx` is the `elm-mlx` command, and this is where both begin.

Until the command line is there to say something better, and after it has said its last, Ctrl-C ends the process without
a word: not in a traceback of threads that are waited for.
"""

import os
import signal
from types import FrameType

signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Run the command line."""
    from elm_mlx import cli

    signal.signal(signal.SIGINT, _interrupt)
    try:
        cli.main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; while an extension is imported, which may abort at one, the process ends instead."""
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "ExtensionFileLoader":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
