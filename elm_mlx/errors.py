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
