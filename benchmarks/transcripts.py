"""Make the transcripts in docs/ again: `python benchmarks/transcripts.py [PAGE…]`, all pages by default.

A block that begins with ```console is run, command by command, and what is printed takes its output's place. Each page
has a directory of its own to run in, where `examples` is the project's and `build/classics` its small model; what else
a page needs is made by the shell commands in its comment `<!-- made by: … -->`, which a reader of the source finds too.
A page whose needs are not there (`../shared`, where they name $SHARED) is left as it is, and said. Blocks without
`console` are samples: a conversation, a run of hours. A line of dots in a transcript stands for lines that are left
out; as many as were kept before it and after it are kept again.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.S | re.M)
COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.M)  # and what it printed
MADE_BY = re.compile(r"^<!-- made by:\n(.*?)^-->$", re.S | re.M)
DOTS = re.compile(r"^(?:\.\.\.|…)\n", re.M)
_FIRST = "elm-mlx convert examples/classics/checkpoint_average.pt build/classics\n"  # before every page
_TERMINAL = "python3 -c 'import pty, sys; pty.spawn(sys.argv[1:])' "  # what follows believes that it writes to one
_ON_TERMINAL = "elm-mlx report "  # prints its table nowhere else
_SECONDS = 1800  # that a command may take
_WIDTH = 140  # columns, as wide as these pages are


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the transcripts in docs/ again.")
    parser.add_argument("pages", type=Path, nargs="*", help="of docs/; all of them by default")
    pages = parser.parse_args().pages or sorted((ROOT / "docs").glob("*.md"))
    for page in pages:
        text = page.read_text("utf-8")
        if not BLOCK.search(text):
            continue
        with tempfile.TemporaryDirectory() as directory:
            made = remade(text, Path(directory))
        if made is None:
            print(f"{page.name}: left as it is", flush=True)
        else:
            page.write_text(made, "utf-8")
            print(f"{page.name}: {'changed' if made != text else 'the same'}", flush=True)


def remade(page: str, directory: Path, shared: Path = ROOT.parent / "shared") -> str | None:
    """The page with what its commands print now; None where what it needs is not there.

    Args:
        directory: an empty one, to run in.
    """
    (directory / "examples").symlink_to(ROOT / "examples")
    own = MADE_BY.search(page)
    commands = f"set -e\nexport SHARED={shlex.quote(str(shared / 'data'))}\n{_FIRST}{own[1] if own else ''}"
    if own and "$SHARED" in own[1] and not shared.exists():
        return None
    done = _shell(commands, directory)
    if done.returncode:
        sys.exit(f"what the page needs cannot be made:\n{done.stdout}")
    return BLOCK.sub(lambda block: f"```console\n{_transcript(block[1], directory)}```", page)


def _transcript(block: str, directory: Path) -> str:
    """The commands of a block, each with what it prints."""
    made = ""
    for command, printed in COMMAND.findall(block):
        new = _shell(f"{_TERMINAL if command.startswith(_ON_TERMINAL) else ''}{command}", directory).stdout
        if "Traceback (most" in new:
            sys.exit(f"$ {command}\n{new}")
        new = re.sub(r"[ \t]+$", "", new, flags=re.M)
        made += f"$ {command}\n" + (shortened(new, printed) if DOTS.search(printed) else new)
    return made


def shortened(new: str, old: str) -> str:
    """Returns as many of the first and last lines as `old` keeps around its dots."""
    first, last = (part.count("\n") for part in DOTS.split(old, maxsplit=1))
    lines = new.splitlines(keepends=True)
    if len(lines) <= first + last:
        return new
    return "".join([*lines[:first], "…\n", *lines[len(lines) - last :]])


def _shell(commands: str, directory: Path) -> subprocess.CompletedProcess[str]:
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(Path.home())}
    own |= {"LANG": "C.UTF-8", "COLUMNS": str(_WIDTH), "TERM": "dumb", "NO_COLOR": "1"}
    return subprocess.run(
        ["bash", "-c", commands], cwd=directory, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, text=True, timeout=_SECONDS, check=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
