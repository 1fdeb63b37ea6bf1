"""The errors that a user can meet.

The command line prints their text on one line and exits with `exit_code`; any other exception is a defect of ours.
"""


class ElmError(Exception):
    """Something failed: the text says what, where, and what to do."""

    exit_code = 1


class LossError(ElmError):
    """Training has come apart: its loss is no number, or a spike."""


class InputError(ElmError):
    """The input is at fault: a file, a flag, a value. Nothing was written."""

    exit_code = 2
