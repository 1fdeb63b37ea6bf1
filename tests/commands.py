"""What tests of the command line share: the type of the fixture `run`, and a command's modules."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]

_PROGRAM = """
import sys
sys.argv = ["elm-mlx", *sys.argv[1:]]
from elm_mlx.cli import main
try: main()
except SystemExit as end: print(end.code, *sys.modules, file=sys.stderr)
"""


def modules_of(*arguments: object) -> tuple[str, int, set[str]]:
    """Runs `elm-mlx` in a process of its own. Returns its stdout, its exit code and the modules it imported."""
    command = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    code, *modules = done.stderr.splitlines()[-1].split()
    return done.stdout, int(code), {*modules}


def packages(modules: set[str]) -> set[str]:
    """Returns the top-level packages of modules."""
    return {name.partition(".")[0] for name in modules}
