"""Commands of elm-mlx, shown before they run.

Shared by the examples. A script in a folder beside this file finds it by
`sys.path.append(str(Path(__file__).parent.parent))`.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence


def elm(*arguments: object, accept: Sequence[int] = (0,)) -> int:
    """Run `elm-mlx` with these arguments. Returns its exit code, or ends with it where it is none of `accept`."""
    words = [str(argument) for argument in arguments]
    print("\n$ elm-mlx", shlex.join(words), flush=True)
    code = subprocess.run([sys.executable, "-m", "elm_mlx", *words]).returncode
    if code not in accept:
        sys.exit(code)
    return code
