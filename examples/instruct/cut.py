"""Cut the data of this example out of books: `python examples/instruct/cut.py ../shared/data/classics/train.jsonl.gz`.

`data/` is what this makes of 125 children's classics. It is here so that it can be checked, and made of other books.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import task

DATA = Path(__file__).parent / "data"
COMMONEST, RAREST, SHORTEST = 200, 60, 4  # words of the books that lessons may ask for: see `vocabulary_of`
OFTEN = 100  # lessons with the same word
VALID = 200  # lessons to choose the best checkpoint by


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut sentences out of books, as answers to instructions.")
    parser.add_argument("books", type=Path, help="JSON lines, gzipped, each with a book's `text`")
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--each", type=int, default=1600, help="lessons of each kind and length")
    arguments = parser.parse_args()
    words = json.loads((DATA / "words.json").read_text("utf-8"))
    with gzip.open(arguments.books, "rt", encoding="utf-8") as file:
        books = [json.loads(line)["text"] for line in file]
    found = lessons(books, words, arguments.each)
    write(arguments.out / "train.jsonl.gz", found[VALID:])
    write(arguments.out / "valid.jsonl.gz", found[:VALID])
    print(f"wrote {len(found) - VALID:,} lessons to learn from and {VALID} to validate, to {arguments.out}")


def lessons(books: Sequence[str], words: Mapping[str, Sequence[str]], each: int) -> list[dict[str, str]]:
    """Questions whose answer is a sentence of the books; none of them is one to measure by. Shuffled."""
    draw, taken, result = random.Random(0), Counter[str](), list[dict[str, str]]()
    others, tests = vocabulary_of(books) - set(words["new"]), set(task.questions(words).test)
    everything = sorted({sentence for book in books for sentence in sentences(book)})
    draw.shuffle(everything)
    candidates = list(with_words(everything, set(words["old"]), others, draw))
    for length, kind in itertools.product(task.LENGTHS, task.KINDS):
        count = 0
        for sentence, word in candidates:
            asked = task.Wish(length, kind, word)
            if count == each or taken[word] == OFTEN or asked.prompt() in tests:
                continue
            if task.check(sentence, asked).passes:
                result.append({"prompt": asked.prompt(), "completion": sentence})
                count, taken[word] = count + 1, taken[word] + 1
    draw.shuffle(result)
    return result


def vocabulary_of(books: Sequence[str]) -> set[str]:
    """Words of the books that are neither small nor rare nor the commonest: the, said, very, …"""
    counts = Counter(word for book in books for word in task.words(book))
    common = {word for word, _ in counts.most_common(COMMONEST)}
    return {word for word, n in counts.items() if n >= RAREST and len(word) >= SHORTEST} - common


def sentences(book: str) -> Iterator[str]:
    """What stands between two ends of sentences, or in quotation marks. Most of it is plain sentences."""
    for paragraph in book.split("\n"):
        for piece in re.split(r'(?<=[.!?])\s+(?=[A-Z])|"', paragraph):
            yield piece.strip()


def with_words(
    sentences: Sequence[str], first: set[str], others: set[str], draw: random.Random
) -> Iterator[tuple[str, str]]:
    """Each sentence with a word that stands in it in lower case: those with `first` ones, then `others`."""
    later = []
    for sentence in sentences:
        there = set(task.WORD.findall(sentence))
        if there & first:
            yield sentence, draw.choice(sorted(there & first))
        elif there & others:
            later.append((sentence, draw.choice(sorted(there & others))))
    yield from later


def write(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
