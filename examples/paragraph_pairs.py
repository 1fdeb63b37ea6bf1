"""Pairs of answers for `elm-mlx dpo`, out of the demo model's books: `python examples/paragraph_pairs.py DIR`.

Half a paragraph is the prompt, its other half is chosen, another paragraph's is rejected.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from books import read

_LENGTHS = range(120, 360)  # characters of a paragraph
_VALID = 40  # pairs that are not trained on


def main(directory: Path) -> None:
    books = read(Path(__file__).parent / "classics" / "extract.jsonl.gz")
    halves = [_cut(line) for book in books for line in book["text"].split("\n") if len(line) in _LENGTHS]
    random.Random(0).shuffle(halves)
    others = [*halves[1:], halves[0]]
    pairs = [
        json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n"
        for (prompt, chosen), (_, rejected) in zip(halves, others, strict=True)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "valid.jsonl").write_text("".join(pairs[:_VALID]), "utf-8")
    (directory / "train.jsonl").write_text("".join(pairs[_VALID:]), "utf-8")


def _cut(paragraph: str) -> tuple[str, str]:
    """Its halves, the second one with the space in front."""
    at = paragraph.rindex(" ", 0, len(paragraph) // 2 + 1)
    return paragraph[:at], paragraph[at:]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/paragraph_pairs.py DIR")
    main(Path(sys.argv[1]))
