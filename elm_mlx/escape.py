"""Text from outside made safe to show: what a terminal would obey becomes visible, or goes.

Knows characters: names of files, configs, data and what a model says may hold any of them. A terminal obeys control
characters (C0 and C1: they move its cursor, set its title, write its clipboard), and line separators and bidirectional
overrides make it show something else than what is there (CVE-2021-42574). Each is dealt with by itself, so that a
sequence that comes in pieces is harmless too.
"""

from __future__ import annotations

import re

_MOST = 500  # characters of a value that is shown: a config's may have millions
_OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_OBEYED_IN_TEXT = re.compile(_OBEYED.pattern.replace(r"\x00-\x1f", r"\x00-\x08\x0b-\x1f"))


def printable(value: object) -> str:
    """`value` on one line of at most `_MOST` characters, both ends of a longer one."""
    return _cut(_OBEYED.sub(_code, _cut(str(value))))


def visible(text: str) -> str:
    """`text` whole, with its lines and tabs."""
    return _OBEYED_IN_TEXT.sub(_code, text)


def stripped(text: str) -> str:
    """`text` with its lines and tabs, without what is not for readers."""
    return _OBEYED_IN_TEXT.sub("", text)


def _code(found: re.Match[str]) -> str:
    code = ord(found[0])
    return {9: "\\t", 10: "\\n"}.get(code) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def _cut(text: str) -> str:
    return text if len(text) <= _MOST else f"{text[: 2 * _MOST // 3]} … {text[3 - _MOST // 3 :]}"
