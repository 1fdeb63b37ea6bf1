"""Books as documents to train a small model on.

Shared by the examples. A script in a folder beside this file finds it by
`sys.path.append(str(Path(__file__).parent.parent))`.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

LENGTHS = 1_500, 6_000  # characters of a document, from and to
_WATCHED = 200  # one document in so many is for choosing by, and not trained on
_ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "\u00a0": " "})


def read(path: Path) -> list[dict[str, str]]:
    """The books of a file with `{"title": …, "text": …}` on each line, gzipped or not."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except OSError as error:
        sys.exit(f"{path}: cannot be read: {error.strerror or error}")


def write_documents(books: Path, directory: Path, lengths: tuple[int, int] = LENGTHS) -> None:
    """`train.jsonl` and `watched.jsonl`: all the books, cut and mixed, the same way every time."""
    draw, documents = random.Random(0), []
    for book in read(books):
        documents.extend(cut(book["text"], draw, lengths))
    draw.shuffle(documents)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "watched.jsonl", documents[::_WATCHED])
    _write(directory / "train.jsonl", [text for i, text in enumerate(documents) if i % _WATCHED])


def cut(text: str, draw: random.Random, lengths: tuple[int, int] = LENGTHS) -> Iterator[str]:
    """A book's documents: whole paragraphs, as many as reach a number of characters drawn between `lengths`.

    In normal form C, with a typewriter's quotes and dashes: a small vocabulary has better uses.
    """
    text = unicodedata.normalize("NFC", text).translate(_ASCII)
    paragraphs, length, wanted = [], 0, draw.randint(*lengths)
    for paragraph in text.split("\n"):
        paragraphs.append(paragraph)
        length += len(paragraph) + 1
        if length >= wanted:
            yield "\n".join(paragraphs)
            paragraphs, length, wanted = [], 0, draw.randint(*lengths)
    if length >= lengths[0] // 2:
        yield "\n".join(paragraphs)


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
