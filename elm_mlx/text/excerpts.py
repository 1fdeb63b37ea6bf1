"""Texts to calibrate and compare models on: two built-in ones, excerpts of books in the public domain, or a file.

A loss measured on the text that was learned from would flatter, so there is one for each purpose.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from elm_mlx import reading

_FOLDER = Path(__file__).parent / "excerpts"


@dataclass(frozen=True)
class Excerpt:
    """A text and what it is called in records."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def calibration(path: Path | None) -> Excerpt:
    """Returns the text to plan and learn by: of `path`, or by default of eight books. Raises InputError."""
    return _read(path, "calibration.txt", "built-in: excerpts of eight books")


def held_out(path: Path | None) -> Excerpt:
    """Returns the text to measure losses on: of `path`, or by default of two other books. Raises InputError."""
    return _read(path, "held_out.txt", "built-in: excerpts of two other books")


def _read(path: Path | None, built_in: str, name: str) -> Excerpt:
    if path is None:
        return Excerpt(name, (_FOLDER / built_in).read_text(encoding="utf-8"))
    return Excerpt(path.name, reading.text(path, reading.CORPUS_BYTES))
