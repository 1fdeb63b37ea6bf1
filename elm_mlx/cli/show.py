"""How the command line shows what is not its own: names of files, numbers of bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from elm_mlx.errors import InputError

_NAMED = 50  # bad records that are named one by one: a file of another kind has as many as it has lines


def printable(text: object) -> str:
    """`text` on one line, without what moves a terminal's cursor: a file's name may hold anything."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def name_bad(reasons: Iterable[str]) -> None:
    """Each bad record on a line of stderr; of very many the first ones, and how many there are besides."""
    reasons = list(reasons)
    for reason in reasons[:_NAMED]:
        print(reason, file=sys.stderr)
    if len(reasons) > _NAMED:
        print(f"… and {len(reasons) - _NAMED:,} more", file=sys.stderr)


@contextmanager
def bad_records_named(path: Path) -> Iterator[None]:
    """All of them, and not the first alone, before the error that ends the command."""
    from elm_mlx.train.examples import BadRecords

    try:
        yield
    except BadRecords as error:
        name_bad(error.reasons)
        count = counted(len(error.reasons), "bad record")
        raise InputError(f"{path}: {count}; mend them, or --skip-bad leaves them out") from None
