"""The part of an example's page that is made by program.

Shared by the examples. A script in a folder beside this file finds it by
`sys.path.append(str(Path(__file__).parent.parent))`.
"""

from __future__ import annotations

import re
from pathlib import Path

_MADE = re.compile(r"(<!-- made by [^>]*-->\n).*?(<!-- end -->\n)", re.S)


def fill(page: Path, *parts: str) -> None:
    """Writes Markdown between a page's lines `<!-- made by … -->` and `<!-- end -->`, in their order."""
    text = page.read_text("utf-8")
    rest = iter(parts)
    filled, count = _MADE.subn(lambda match: f"{match[1]}{next(rest).strip()}\n{match[2]}", text, len(parts))
    if count < len(parts):
        raise ValueError(f"{page}: has {count} places to fill, and not {len(parts)}")
    page.write_text(filled, "utf-8")
