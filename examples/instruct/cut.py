"""Cut the data of this example out of books: `python examples/instruct/cut.py ../shared/data/classics/train.jsonl.gz`.

`data/` is what this makes of 125 children's classics. It is here so that it can be checked, and made of other books.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
import task  # noqa: E402

HELD_OUT, PRACTICE, VALID, TRAIN = 50, 200, 30, 1200  # of each kind and length
OFTEN = 10  # lessons that ask the same

Pair = tuple[str, task.Wish]  # a sentence, and the question that it answers


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut sentences out of books, as answers to instructions.")
    parser.add_argument("books", type=Path, help="JSON lines, gzipped or not, each with a book's `text`")
    parser.add_argument("--out", type=Path, default=HERE / "data")
    arguments = parser.parse_args()
    for name, records in split(book["text"] for book in texts.read(arguments.books)).items():
        write(arguments.out / f"{name}.jsonl.gz", records)
        print(f"{name}: {len(records):,}")


def split(books: Iterable[str]) -> dict[str, list[dict[str, object]]]:
    """Records by name: lessons to learn from and to validate, questions to practise and to measure by.

    No question of `held-out` is asked elsewhere; `new` says whether its beginning isn't either, of any kind or length.
    """
    draw = random.Random(0)
    pairs = sorted((s, asked) for s in {s for book in books for s in sentences(book)} if (asked := task.wishes(s)))
    draw.shuffle(pairs)
    held_out, rest = take(pairs, HELD_OUT, often=1)
    measured = {asked for _, asked in held_out}
    practice, rest = take([pair for pair in rest if pair[1] not in measured], PRACTICE, often=1)
    valid, rest = take(rest, VALID, OFTEN)
    train, _ = take(rest, TRAIN, OFTEN)
    old = {asked.beginning for _, asked in [*practice, *valid, *train]}
    for part in (held_out, practice, valid, train):
        draw.shuffle(part)
    return {
        "train": [{"prompt": asked.prompt(), "completion": sentence} for sentence, asked in train],
        "valid": [{"prompt": asked.prompt(), "completion": sentence} for sentence, asked in valid],
        "practice": [{"prompt": asked.prompt()} for _, asked in practice],
        "held-out": [{"prompt": asked.prompt(), "new": asked.beginning not in old} for _, asked in held_out],
    }


def take(pairs: Iterable[Pair], each: int, often: int) -> tuple[list[Pair], list[Pair]]:
    """The first `each` of every kind and length, of which at most `often` ask the same; and what is left."""
    kinds, questions = Counter[tuple[str, ...]](), Counter[task.Wish]()
    taken, left = list[Pair](), list[Pair]()
    for pair in pairs:
        asked = pair[1]
        if kinds[asked[:2]] == each or questions[asked] == often:
            left.append(pair)
        else:
            kinds[asked[:2]] += 1
            questions[asked] += 1
            taken.append(pair)
    return taken, left


def sentences(book: str) -> Iterator[str]:
    """Yields the text between two ends of sentences, or in quotation marks. Most of it is sentences."""
    for paragraph in book.split("\n"):
        for piece in re.split(r'(?<=[.!?])\s+(?=[A-Z])|"', paragraph):
            yield piece.strip()


def write(path: Path, records: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
