"""The two texts of a quantization: one to plan and learn by, another to measure what was lost.

Knows the built-in ones, excerpts of books in the public domain, and files in their place. A loss measured on the text
that was learned from would flatter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.quantize import losses
from elm_mlx.quantize.losses import Row
from elm_mlx.store.loading import Loaded

_FOLDER = Path(__file__).parent / "texts"
_MADE_UP = 128  # ids where there is no tokenizer


@dataclass(frozen=True)
class Text:
    """A text and what it is called in records."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def calibration(path: Path | None) -> Text:
    """To plan and learn by: of `path`, or by default of eight books. Raises InputError."""
    return _read(path, "calibration.txt", "built-in: excerpts of eight books")


def held_out(path: Path | None) -> Text:
    """To measure losses on: of `path`, or by default of two other books. Raises InputError."""
    return _read(path, "held_out.txt", "built-in: excerpts of two other books")


def ids(text: Text, loaded: Loaded) -> list[int]:
    """Without BOS. Raises InputError where the model has no tokenizer, or there is nothing to learn from."""
    if loaded.tokenizer is None:
        raise InputError("without a tokenizer there is no text to measure or learn by: only --bits, --mode and --dtype")
    found = loaded.tokenizer.encode(text.content, add_bos=False)
    if len(found) < 2:
        raise InputError(f"{text.name}: holds no text")
    return found


def rows(text: Text, loaded: Loaded, window: int, most: int = losses.MOST_TOKENS) -> list[Row]:
    """`text` as a model reads it, at most `most` tokens of it; made-up ids where there is no tokenizer."""
    config = loaded.model.config
    window = min(window, config.max_context_length)
    if loaded.tokenizer is None:
        made_up: Sequence[int] = [(i * 7919) % config.vocab_size for i in range(_MADE_UP)]
        return losses.rows(made_up, None, window)
    return losses.rows(ids(text, loaded), loaded.tokenizer.bos_id, window, most)


def _read(path: Path | None, built_in: str, name: str) -> Text:
    if path is None:
        return Text(name, (_FOLDER / built_in).read_text(encoding="utf-8"))
    return Text(path.name, reading.text(path, reading.CORPUS_BYTES))
