"""Commands of elm-mlx, shown before they run.

Shared by the examples. A script in a folder beside this file finds it by
`sys.path.append(str(Path(__file__).parent.parent))`.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def elm(*arguments: object, accept: Sequence[int] = (0,), to: Path | None = None) -> int:
    """Run `elm-mlx` with these arguments. Returns its exit code, or ends with it where it is none of `accept`.

    What it prints goes to the file `to`, if there is one, which appears when the command has done its work.
    """
    words = [str(argument) for argument in arguments]
    print("\n$ elm-mlx", shlex.join(words), *(["  >", to] if to else []), flush=True)
    command = [sys.executable, "-m", "elm_mlx", *words]
    if to is None:
        code = subprocess.run(command).returncode
    else:
        unfinished = to.with_name(f"{to.name}.unfinished")
        with unfinished.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file).returncode
    if code not in accept:
        sys.exit(code)
    if to is not None:
        unfinished.replace(to)
    return code
