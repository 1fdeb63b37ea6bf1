"""How the command line shows what is not its own: names of files, numbers of bytes."""

from __future__ import annotations


def printable(text: object) -> str:
    """`text` on one line, without what moves a terminal's cursor: a file's name may hold anything."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
