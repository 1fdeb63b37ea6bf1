"""Layer-wise against uniform scaling, with as many parameters and tokens: `python examples/layerwise/run.py`.

Each shape is trained with a few learning rates, and then with its own best from three other seeds. What these lose
(../measure.py) on two books that none has seen is the result. Every training is a command of elm-mlx's, which is
printed before it runs. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
import compare  # noqa: E402
from command import elm  # noqa: E402
from measure import held_out_loss  # noqa: E402

import elm_mlx  # noqa: E402
from elm_mlx.model.config import ModelConfig  # noqa: E402
from elm_mlx.train import sections  # noqa: E402
from elm_mlx.train.pretraining_recipe import Recipe  # noqa: E402

CLASSICS = HERE.parent / "classics"
RECIPE = HERE / "recipe.toml"
# Multipliers of the heads' and of the FFNs' widths. The uniform ones are the means of the others.
SHAPES = {"layer-wise": ("[0.5, 1.0]", "[0.5, 4.0]"), "uniform": ("0.75", "2.25")}
RATES = (0.003, 0.006, 0.012)  # and beyond, while the best of them is the first or the last
MOST_RATES = 7
BROKE_OFF = 1  # what pretrain ends with where the loss is no number or jumps: the rate is too high
SEEDS = (1, 2, 3)  # rates are tried with seed 0, which has no part in the result
TRIAL = ["optimizer.steps=250", "run.eval_every=250", "run.save_every=250"]  # a rate is tried in half the updates
QUICK = ["optimizer.steps=4", "optimizer.warmup=1", "run.batch_size=2", "data.validation_rows=4", "data.window=2048"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare layer-wise with uniform scaling.")
    parser.add_argument("--books", type=Path, default=CLASSICS / "extract.jsonl.gz", help="what is trained on")
    parser.add_argument("--held-out", type=Path, default=CLASSICS / "held-out.jsonl.gz", help="what is measured on")
    parser.add_argument("--out", type=Path, default=Path("build/layerwise"), help="where everything is written")
    parser.add_argument("--quick", action="store_true", help="four updates, two rates, two seeds: only to see it run")
    arguments = parser.parse_args()
    out, quick = arguments.out, arguments.quick
    rates, most, seeds, windows = (RATES[:2], 2, SEEDS[:2], 16) if quick else (RATES, MOST_RATES, SEEDS, None)
    common = prepare(arguments.books, out)
    fields = {
        shape: [*common, f"model.qkv_multipliers={heads}", f"model.ffn_multipliers={ffn}", *(QUICK if quick else [])]
        for shape, (heads, ffn) in SHAPES.items()
    }
    trial = [] if quick else TRIAL
    tuning = {shape: tune(partial(train, out / shape, [*fields[shape], *trial]), rates, most) for shape in SHAPES}
    best = {shape: min(losses, key=losses.__getitem__) for shape, losses in tuning.items()}
    runs: dict[str, list[Path]] = {shape: [] for shape in SHAPES}
    for seed in seeds:
        for shape, made in runs.items():
            made.append(train(out / shape, fields[shape], best[shape], seed))

    results = compare.Results(
        parameters={shape: ModelConfig.load(made[0] / "config.json").parameters for shape, made in runs.items()},
        speed={shape: speed(made) for shape, made in runs.items()},
        tuning=tuning,
        losses={shape: [held_out(path, arguments.held_out, windows) for path in made] for shape, made in runs.items()},
    )
    (out / "results.json").write_text(json.dumps(asdict(results), indent=1) + "\n", "utf-8")
    print("\n" + compare.tables(results))
    if importlib.util.find_spec("matplotlib"):
        compare.draw(results, out / "losses.png")


def prepare(books: Path, out: Path) -> list[str]:
    """Documents and a vocabulary in `out`, unless they are there; and the recipe's fields that say so."""
    data, tokenizer = out / "data", out / "tokenizer.model"
    if not tokenizer.exists():
        texts.write_documents(books, data)
        vocabulary = ["--vocab-size", 1024, "--character-coverage", 0.9995]
        elm("train-tokenizer", data / "train.jsonl", "--out", tokenizer, *vocabulary)
    source = f'[{{path = "{data / "train.jsonl"}"}}]'
    return [f"tokenizer={tokenizer}", f"data.validation={data / 'watched.jsonl'}", f"data.sources={source}"]


def train(out: Path, common: list[str], rate: float, seed: int) -> Path:
    """The directory of a run of the recipe with these fields, which is made unless it is there."""
    directory = out / f"lr-{rate:g}-seed-{seed}"
    fields = [*common, f"optimizer.lr={rate:g}", f"run.seed={seed}"]
    if not finished(directory, sections.read(RECIPE, Recipe, fields)):
        sets = [word for field in fields for word in ("--set", field)]
        resume = ["--resume"] if (directory / "checkpoints").exists() else []
        elm("pretrain", RECIPE, "--out", directory, *sets, *resume, accept=(0, BROKE_OFF))
    return directory


def finished(directory: Path, recipe: Recipe) -> bool:
    """Returns whether the run that is there had the same settings, and has made all its updates."""
    if not (directory / "model.safetensors").exists():
        return False
    about = json.loads((directory / "run.json").read_text("utf-8"))
    same = about["settings"] == json.loads(json.dumps(asdict(recipe)))
    return same and metrics(directory)[-1]["step"] == recipe.optimizer.steps


def tune(run: Callable[[float, int], Path], rates: Sequence[float], most: int) -> dict[float, float]:
    """The loss by learning rate: rates are halved or doubled until the best lies between two that are worse."""
    tried = {rate: watched_loss(run(rate, 0)) for rate in rates}
    while len(tried) < most:
        best = min(tried, key=tried.__getitem__)
        if best not in (min(tried), max(tried)):
            break
        rate = best / 2 if best == min(tried) else best * 2
        tried[rate] = watched_loss(run(rate, 0))
    return dict(sorted(tried.items()))


def watched_loss(directory: Path) -> float:
    """Nats a token at the end, on documents that are not trained on; infinite where the run broke off."""
    return metrics(directory)[-1].get("valid_loss", math.inf)


def held_out(directory: Path, path: Path, windows: int | None) -> dict[str, tuple[float, float]]:
    """Nats a token and bits a byte of each held-out book: so many windows of it, or all."""
    model, tokenizer = elm_mlx.load(directory, compute_dtype="float32")
    assert tokenizer is not None
    length = model.config.max_context_length
    return {book["title"]: held_out_loss(model, tokenizer, book["text"], windows, length) for book in texts.read(path)}


def speed(directories: list[Path]) -> float:
    """Tokens a second, the median of all updates."""
    rates = sorted(
        line["tokens_per_second"] for path in directories for line in metrics(path) if "tokens_per_second" in line
    )
    return rates[len(rates) // 2]


def metrics(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]


if __name__ == "__main__":
    main()
