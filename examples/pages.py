"""An example's page: the records that it is made of, and the part of it that is made by program.

Shared by the examples. A script in a folder beside this file finds it by
`sys.path.append(str(Path(__file__).parent.parent))`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MADE = re.compile(r"(<!-- made by [^>]*-->\n).*?(<!-- end -->\n)", re.S)


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def recorded(own: Path, read: Callable[[Path], Any] = _json) -> Any:
    """Returns what `read` makes of the file that the command line names, which then takes the place of an example's
    `own`; of that where none is named."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else own
    found = read(path)
    if path.resolve() != own.resolve():
        shutil.copyfile(path, own)
    return found


def fill(page: Path, *parts: str) -> None:
    """Writes Markdown between a page's lines `<!-- made by … -->` and `<!-- end -->`, in their order."""
    text = page.read_text("utf-8")
    rest = iter(parts)
    filled, count = _MADE.subn(lambda match: f"{match[1]}{next(rest).strip()}\n{match[2]}", text, len(parts))
    if count < len(parts):
        raise ValueError(f"{page}: has {count} places to fill, and not {len(parts)}")
    page.write_text(filled, "utf-8")
