"""Make the model of this folder from raw text: `python examples/classics/run.py --books train.jsonl.gz`.

Every step but cutting books and the last measuring is a command of elm-mlx's, which is printed before it runs. Loss
is measured here, in the plainest way there is, and not by the code that trains. Run again, it goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import math
import os
import random
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import elm_mlx  # before MLX, for its BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn

from elm_mlx.model import Model
from elm_mlx.tokenizer import Tokenizer

HERE = Path(os.path.relpath(Path(__file__).parent))
LEAST, MOST = 1_500, 6_000  # characters of a document
WATCHED = 200  # one document in so many is for the curve, and not trained on
WINDOWS, LENGTH = 16, 512  # of a held-out book: how many pieces are read, and their tokens
ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "\u00a0": " "})


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the small model of this folder from raw text.")
    parser.add_argument("--books", type=Path, default=HERE / "extract.jsonl.gz", help='{"text": …} a line, a book each')
    parser.add_argument("--out", type=Path, default=Path("build/remake"), help="where everything is written")
    parser.add_argument("--steps", type=int, help="updates, for a shorter run")
    parser.add_argument("--against", type=Path, help="another checkpoint to measure, with its tokenizer beside it")
    arguments = parser.parse_args()
    data, tokenizer, run, mean, exported, again, other = (
        arguments.out / name
        for name in ("data", "tokenizer.model", "run", "average", "exported", "exported-converted", "other")
    )

    documents = cut_all(arguments.books)
    write(data / "watched.jsonl", documents[::WATCHED])
    write(data / "train.jsonl", [text for i, text in enumerate(documents) if i % WATCHED])
    vocabulary = ["--vocab-size", 4096, "--character-coverage", 0.9995, "--overwrite"]
    elm("train-tokenizer", data / "train.jsonl", "--out", tokenizer, *vocabulary)
    fields = {
        "tokenizer": tokenizer,
        "data.validation": data / "watched.jsonl",
        "data.sources": f'[{{path = "{data / "train.jsonl"}"}}]',
    }
    if arguments.steps is not None:
        steps = arguments.steps
        fields |= {"optimizer.steps": steps, "optimizer.warmup": steps // 20, "data.validation_rows": 8}
        fields |= {"run.save_every": max(1, steps // 75)}
    sets = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    resume = ["--resume"] if (run / "checkpoints").exists() else []
    elm("pretrain", HERE / "recipe.toml", "--out", run, *sets, *resume)
    picture = ["--png", arguments.out / "curves.png"] if importlib.util.find_spec("matplotlib") else []
    elm("report", run, *picture)
    elm("average", run, "--last", 5, "--out", mean, "--overwrite")
    elm("export", mean, exported, "--dtype", "bfloat16", "--overwrite")
    elm("convert", exported, again, "--verify", "--overwrite")
    models = {"last checkpoint": run, "mean of the last five": mean, "the same, exported in bfloat16": again}
    if arguments.against is not None:
        elm("convert", arguments.against, other, "--dtype", "float32", "--overwrite")
        models = {str(arguments.against): other} | models
    compare(models)


def compare(models: dict[str, Path]) -> None:
    """A table: each model's loss on the held-out books."""
    with gzip.open(HERE / "held-out.jsonl.gz", "rt", encoding="utf-8") as lines:
        books = [json.loads(line) for line in lines]
    titles = " | ".join(book["title"] for book in books)
    print(f"\nnats a token, bits a byte\n\n| | {titles} |\n| --- |{' ---: |' * len(books)}")
    for name, path in models.items():
        model, tokenizer = elm_mlx.load(path, compute_dtype="float32")
        assert tokenizer is not None
        losses = [held_out_loss(model, tokenizer, book["text"]) for book in books]
        cells = " | ".join(f"{nats:.4f}, {bits:.4f}" for nats, bits in losses)
        print(f"| {name} | {cells} |", flush=True)


def held_out_loss(model: Model, tokenizer: Tokenizer, text: str) -> tuple[float, float]:
    """Nats a token, and bits a byte, of the book's beginning: BOS and text in windows that do not overlap.

    A token's loss depends on how much text a token stands for, which is another with each vocabulary. A byte's does
    not.
    """
    ids = tokenizer.encode(text, add_bos=True)[: WINDOWS * LENGTH + 1]
    total = 0.0
    for start in range(0, len(ids) - 1, LENGTH):
        piece = mx.array(ids[start : start + LENGTH + 1])[None]
        total += nn.losses.cross_entropy(model(piece[:, :-1]), piece[:, 1:], reduction="sum").item()
    return total / (len(ids) - 1), total / math.log(2) / len(tokenizer.decode(ids[1:]).encode())


def cut_all(books: Path) -> list[str]:
    """The documents of all books, in an order that is the same every time."""
    draw, documents = random.Random(0), []
    with gzip.open(books, "rt", encoding="utf-8") if books.suffix == ".gz" else books.open(encoding="utf-8") as lines:
        for line in lines:
            documents.extend(cut(plain(json.loads(line)["text"]), draw))
    draw.shuffle(documents)
    return documents


def plain(text: str) -> str:
    """Normal form C, with a typewriter's quotes and dashes: a small vocabulary has better uses."""
    return unicodedata.normalize("NFC", text).translate(ASCII)


def cut(text: str, draw: random.Random) -> Iterator[str]:
    """Whole paragraphs, as many as reach a length that is drawn between LEAST and MOST characters."""
    paragraphs, length, wanted = [], 0, draw.randint(LEAST, MOST)
    for paragraph in text.split("\n"):
        paragraphs.append(paragraph)
        length += len(paragraph) + 1
        if length >= wanted:
            yield "\n".join(paragraphs)
            paragraphs, length, wanted = [], 0, draw.randint(LEAST, MOST)
    if length >= LEAST // 2:
        yield "\n".join(paragraphs)


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")


def elm(*arguments: object) -> None:
    """Run a command of elm-mlx's; end as it does where it fails."""
    words = [str(argument) for argument in arguments]
    print("\n$ elm-mlx", shlex.join(words), flush=True)
    code = subprocess.run([sys.executable, "-m", "elm_mlx", *words]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
