"""The errors that a user can meet.

Knows nothing of what raises them. The command line prints their text on one
line and exits with `exit_code`; anything else that escapes is a defect of ours.
"""


class ElmError(Exception):
    """Something failed that the user should read about: what, where, what to do."""

    exit_code = 1


class InputError(ElmError):
    """The input is at fault: a file, a flag, a value. Nothing was written."""

    exit_code = 2


def counted(count: int, noun: str) -> str:
    """How many of what, as a message says it: 1 process, 2 processes, 1,000 entries."""
    if count == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{count:,} {plural}"
