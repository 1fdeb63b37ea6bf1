"""Raw text to pretrain on, made by code, and what batches of it must hold."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from elm_mlx.data import records as data_records
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.data.batches import Batch
from elm_mlx.data.columns import parsed
from elm_mlx.data.filters import Filters
from elm_mlx.data.records import Record
from elm_mlx.data.stream import Reading, TextBatches
from elm_mlx.data.text_sources import TextSource

WORDS = "the quick brown fox jumps over lazy dogs while an old king told stories of cafés"
EVERYTHING = Filters(min_chars=0, min_tokens=0, max_repetition=None, max_symbols=None)


def texts(count: int, seed: int = 0, words: tuple[int, int] = (1, 60)) -> list[str]:
    """All different."""
    draw = random.Random(seed)
    return [
        f"{seed}.{number} " + " ".join(draw.choices(WORDS.split(), k=draw.randint(*words))) for number in range(count)
    ]


def write(path: Path, values: Sequence[Any]) -> Path:
    """JSON lines, of texts or of whole records."""
    records = [{"text": value} if isinstance(value, str) else value for value in values]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def made(
    sources: Sequence[TextSource | Path], tokenizer: Path, filters: Filters = EVERYTHING, *,
    rank: int = 0, world: int = 1, **reading: Any,
) -> TextBatches:  # fmt: skip
    """Batches encoded in this process, small ones, unless told otherwise."""
    found = [source if isinstance(source, TextSource) else TextSource(str(source)) for source in sources]
    options = Reading(**{"rows": 2, "length": 16, "window": 256, "workers": 0, "max_bad": 0} | reading)
    return TextBatches(found, tokenizer, filters, options, rank=rank, world=world)


def encoded(tokenizer: Path, text: str) -> list[int]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return [1, *processor.encode(text), 2]


def equal(first: Batch, second: Batch) -> bool:
    names = ("inputs", "targets", "trained", "segments", "tokens")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


def rows_of(batches: Sequence[Batch]) -> list[tuple[int, ...]]:
    """Each row's inputs, and its last target."""
    found = []
    for batch in batches:
        ends = batch.targets[:, -1]
        found += [(*row.tolist(), int(end)) for row, end in zip(batch.inputs, ends, strict=True)]
    return found


@dataclass
class ReadSplit:
    """A split whose records are read, bad ones apart."""

    records: list[Record]
    bad: list[str]
    ignored: Counter[str]
    missing: str | None
    columns: Counter[str]


def records(
    path: Path, format: str | None = None, *, paired: bool = False, columns: Sequence[str] = ()
) -> dict[str, ReadSplit]:
    """A file's or directory's splits, all of them read."""
    splits = {}
    for name, split in data_records.read(path, format, paired=paired, columns=parsed(columns)).items():
        found = list(split.records)
        bad = [str(record) for record in found if isinstance(record, BadRecord)]
        whole = [record for record in found if not isinstance(record, BadRecord)]
        splits[name] = ReadSplit(whole, bad, split.ignored, split.missing, split.columns)
    return splits
