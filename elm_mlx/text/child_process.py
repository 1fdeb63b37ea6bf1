"""Child processes that read what may come from anywhere, from outside: their start, their memory and their end.

Templates, PDFs, grammars and code may each exceed any limit, so that a process of its own reads them; what it may take
is said in the worker's own file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from elm_mlx.errors import ElmError

KERNEL_LIMITS_MEMORY = sys.platform == "linux"


def start(
    command: Sequence[str], what: str, cwd: str | None = None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a program with pipes to and from it, in a session where Ctrl-C in the terminal does not reach it.

    Raises ElmError where it does not start; `what` says what "the process that" would do.
    """
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True, cwd=cwd, env=env
        )
    except OSError as error:
        raise ElmError(f"the process that {what} does not start: {error.strerror}") from None


def footprint(process: int) -> int:
    """Returns the bytes of memory that a process has filled; 0 of one that has ended."""
    if sys.platform == "darwin":
        import ctypes

        # libproc.h: RUSAGE_INFO_V0 is a UUID and ten figures, of which the eighth is ri_phys_footprint.
        figures = (ctypes.c_uint64 * 12)()
        return figures[9] if ctypes.CDLL(None).proc_pid_rusage(process, 0, ctypes.byref(figures)) == 0 else 0
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{process}/statm").read_text().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGESIZE")


def end(process: subprocess.Popen[Any]) -> None:
    """Kills a process, if it has not ended, and closes its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # of what was left to be written
                pipe.close()
