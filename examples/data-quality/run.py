"""The same model and number of tokens on clean, chosen and noisy text: `python examples/data-quality/run.py`.

Every training is a command of elm-mlx's, which is printed before it runs. What it loses (../measure.py) on two books
that none has seen is recorded, and of what the first seed's tokens were; page.py makes table and plot of that. Run
again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
import noise  # noqa: E402
from command import elm  # noqa: E402
from measure import held_out_loss  # noqa: E402

import elm_mlx  # noqa: E402
from elm_mlx.data.filters import repetition, symbols  # noqa: E402
from elm_mlx.data.stream import TextBatches  # noqa: E402
from elm_mlx.text.tokenizer import Tokenizer  # noqa: E402
from elm_mlx.train import sections  # noqa: E402
from elm_mlx.train.pretraining_recipe import Recipe  # noqa: E402

CLASSICS = HERE.parent / "classics"
RECIPE = HERE / "recipe.toml"
TRUSTED = ("L. Frank Baum", "Lewis Carroll")  # the held-out books are theirs, too
PART = 1 / 3  # of the documents, where some are chosen
NOISE = (25, 50)  # percent of the characters
OFF = ("filters.duplicates=false", "filters.max_repetition=1.0", "filters.max_symbols=1.0")


@dataclass(frozen=True)
class Arm:
    """A training: what it is called, the file it reads, and how that is filtered."""

    name: str
    source: str
    filters: Sequence[str]

    def fields(self, folder: Path, seed: int, more: Sequence[str] = ()) -> list[str]:
        """What the recipe's fields are for this seed."""
        source = f'data.sources=[{{path = "{folder / self.source}.jsonl"}}]'
        return [f"tokenizer={folder.parent / 'tokenizer.model'}", source, f"run.seed={seed}", *self.filters, *more]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare clean, chosen and noisy text to train on.")
    parser.add_argument(
        "--books", type=Path, default=CLASSICS / "extract.jsonl.gz", help='{"author": …, "text": …} a line, a book each'
    )
    parser.add_argument("--held-out", type=Path, default=CLASSICS / "held-out.jsonl.gz", help="what is measured on")
    parser.add_argument("--out", type=Path, default=Path("build/data-quality"), help="where everything is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="some of them, such as 'noise-50, like' (default: all)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of the recipe, for a shorter run")
    arguments = parser.parse_args()
    out = arguments.out
    prepare(arguments.books, out, arguments.seeds)
    for seed in arguments.seeds:
        folder = out / f"seed-{seed}"
        for arm in arms(folder, out / "trusted.jsonl"):
            if arguments.arms and arm.name not in arguments.arms:
                continue
            fields = arm.fields(folder, seed, arguments.set)
            if not (folder / f"{arm.name}.json").exists():
                train(folder, arm.name, fields, arguments.held_out)
            made_of = folder / f"{arm.name}, made of.json"
            if seed == arguments.seeds[0] and not made_of.exists():
                made_of.write_text(json.dumps(composition(folder / f"{arm.source}.jsonl", fields)) + "\n", "utf-8")
    (out / "results.json").write_text(json.dumps(collected(out), indent=1) + "\n", "utf-8")
    print(f"\nrecorded; python {HERE / 'page.py'} {out / 'results.json'} makes the page of it")


def arms(folder: Path, trusted: Path) -> Iterator[Arm]:
    """The classics as they are and chosen from, and each amount of noise."""
    like = [f"filters.like={trusted}", f"filters.like_share={PART:.4f}"]
    yield Arm("classics", "classics", OFF)
    yield Arm("classics, strict", "classics", strict(folder / "classics.jsonl"))
    yield Arm("classics, like", "classics", [*OFF, *like])
    for percent in NOISE:
        source = f"noise-{percent}"
        yield Arm(source, source, OFF)
        yield Arm(f"{source}, filters", source, [])
        yield Arm(f"{source}, like", source, like)


def prepare(books: Path, out: Path, seeds: Sequence[int]) -> None:
    """Writes a vocabulary, trusted documents, and each seed's corpora, where they are not there yet."""
    if all((out / f"seed-{seed}" / "classics.jsonl").exists() for seed in seeds):
        return
    draw, trusted, others = random.Random(0), list[str](), list[str]()
    for book in texts.read(books):
        (trusted if book["author"] in TRUSTED else others).extend(texts.cut(book["text"], draw))
    write(out / "trusted.jsonl", [("clean", text) for text in trusted])
    if not (out / "tokenizer.model").exists():
        write(out / "vocabulary.jsonl", [("clean", text) for text in draw.sample(others, min(300, len(others)))])
        elm("train-tokenizer", out / "vocabulary.jsonl", "--out", out / "tokenizer.model", "--vocab-size", 1024)
    for seed in seeds:
        folder = out / f"seed-{seed}"
        clean = random.Random(seed).sample(others, (len(others) + 1) // 2)
        for percent in NOISE:
            write(folder / f"noise-{percent}.jsonl", noise.with_noise(clean, percent / 100, seed))
        write(folder / "classics.jsonl", [("clean", text) for text in clean])


def write(path: Path, documents: Sequence[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"kind": kind, "text": text}, ensure_ascii=False) + "\n" for kind, text in documents)
    path.write_text("".join(lines), "utf-8")


def strict(path: Path) -> list[str]:
    """Limits on repetition and symbols that as many documents pass each, and PART of all pass both."""
    found = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    measured = [(repetition(text), symbols(text)) for text in found]
    by_filter = [sorted(values) for values in zip(*measured, strict=True)]
    for place in range(len(found)):
        limits = [values[place] for values in by_filter]
        if sum(a <= limits[0] and b <= limits[1] for a, b in measured) >= PART * len(found):
            break
    return [f"filters.max_{name}={limit!r}" for name, limit in zip(("repetition", "symbols"), limits, strict=True)]


def train(folder: Path, name: str, fields: Sequence[str], held_out: Path) -> None:
    """Trains, measures and records an arm."""
    model = folder / name.replace(", ", "-")
    resume = ["--resume"] if (model / "checkpoints").exists() else []
    elm("pretrain", RECIPE, "--out", model, *[word for field in fields for word in ("--set", field)], *resume)
    network, tokenizer = elm_mlx.load(model, compute_dtype="float32")
    assert tokenizer is not None
    length = network.config.max_context_length
    losses = {
        book["title"]: held_out_loss(network, tokenizer, book["text"], windows=None, length=length)
        for book in texts.read(held_out)
    }
    (folder / f"{name}.json").write_text(json.dumps(losses) + "\n", "utf-8")


def composition(path: Path, fields: Sequence[str]) -> dict[str, int]:
    """Tokens by the kind of their documents, of all that a training reads: what the filters let through."""
    recipe = sections.read(RECIPE, Recipe, fields)
    tokenizer = Tokenizer.load(Path(recipe.tokenizer))
    wanted = recipe.optimizer.steps * recipe.tokens_per_update()
    reading = replace(recipe.reading(), rows=1, window=1)  # one row after the other, in their order
    stream: list[int] = []
    with TextBatches(recipe.data.sources, tokenizer.path, recipe.filters, reading) as batches:
        while len(stream) < wanted:
            stream += next(batches).inputs[0].tolist()
    counts: Counter[str] = Counter()
    place, length = 0, 0
    while place < wanted:  # a corpus that is shorter is read again
        for line in path.read_text("utf-8").splitlines():
            document = json.loads(line)
            ids = [*tokenizer.encode(document["text"]), tokenizer.eos_id]
            length = min(len(ids), wanted - place)
            if length > 0 and stream[place : place + length] == ids[:length]:
                counts[document["kind"]] += length
                place += length
    return dict(counts)


def collected(out: Path) -> dict[str, dict[str, dict[str, object]]]:
    """Every record that is there: losses by arm and seed, and what the tokens were of by arm."""
    found: dict[str, dict[str, dict[str, object]]] = {"losses": {}, "made of": {}}
    for path in sorted(out.glob("seed-*/*.json")):
        record, seed = json.loads(path.read_text("utf-8")), path.parent.name.removeprefix("seed-")
        name = path.stem.removesuffix(", made of")
        if name == path.stem:
            found["losses"].setdefault(name, {})[seed] = record
        else:
            found["made of"][name] = record
    return found


if __name__ == "__main__":
    main()
