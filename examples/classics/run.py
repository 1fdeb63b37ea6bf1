"""Make the model of this folder from raw text: `python examples/classics/run.py --books train.jsonl.gz`.

Every step but cutting books (../books.py) and the last measuring (../measure.py) is a command of elm-mlx's, which is
printed before it runs. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
from command import elm  # noqa: E402
from measure import held_out_loss  # noqa: E402
from page import table  # noqa: E402

import elm_mlx  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the small model of this folder from raw text.")
    parser.add_argument("--books", type=Path, default=HERE / "extract.jsonl.gz", help='{"text": …} a line, a book each')
    parser.add_argument("--out", type=Path, default=Path("build/remake"), help="where everything is written")
    parser.add_argument("--steps", type=int, help="updates, for a shorter run")
    parser.add_argument("--held-out", type=Path, default=HERE / "held-out.jsonl.gz", help="what is measured on")
    parser.add_argument("--against", type=Path, help="another checkpoint to measure, with its tokenizer beside it")
    arguments = parser.parse_args()
    data, tokenizer, run, mean, exported, again, other = (
        arguments.out / name
        for name in ("data", "tokenizer.model", "run", "average", "exported", "exported-converted", "other")
    )

    texts.write_documents(arguments.books, data)
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
    elm("report", run, *picture, "--overwrite")
    elm("average", run, "--last", 5, "--out", mean, "--overwrite")
    elm("export", mean, exported, "--dtype", "bfloat16", "--overwrite")
    elm("convert", exported, again, "--verify", "--overwrite")
    models = {"last checkpoint": run, "mean of the last five": mean, "the same, exported in bfloat16": again}
    if arguments.against is not None:
        elm("convert", arguments.against, other, "--dtype", "float32", "--overwrite")
        models = {str(arguments.against): other} | models
    books = texts.read(arguments.held_out)
    results = {name: measured(path, books) for name, path in models.items()}
    path = arguments.out / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(f"\nnats a token, bits a byte\n\n{table(results)}\n\npython {HERE / 'page.py'} {path} makes the page of it")


def measured(path: Path, books: list[dict[str, str]]) -> dict[str, tuple[float, float]]:
    """A model's loss on each of the held-out books: nats a token, bits a byte."""
    model, tokenizer = elm_mlx.load(path, compute_dtype="float32")
    assert tokenizer is not None
    return {book["title"]: held_out_loss(model, tokenizer, book["text"]) for book in books}


if __name__ == "__main__":
    main()
