"""Are models trained on many tokens for their size more easily hurt by quantizing? `python examples/fragility/run.py`.

The same network is trained on few and on many tokens, each from several seeds; each of them is quantized to fewer and
fewer bits, and a LoRA adapter trained on top. Every step but the measuring (../measure.py), on two books that nothing
is trained on, is a command of elm-mlx's, which is printed before it runs. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
from command import elm  # noqa: E402
from measure import held_out_loss  # noqa: E402

import elm_mlx  # noqa: E402

CLASSICS = HERE.parent / "classics"
HELD_OUT = CLASSICS / "held-out.jsonl.gz"
FULL = 16  # bits of what is not quantized
ROW_TOKENS = 8 * 256  # of an update, as in recipe.toml
Measured = dict[str, float]  # "before" and "after" the adapter


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize models trained on few and many tokens, and repair them.")
    parser.add_argument(
        "--books", type=Path, default=CLASSICS / "extract.jsonl.gz", help='{"text": …} a line, a book each'
    )
    parser.add_argument("--out", type=Path, default=Path("build/fragility"), help="where everything is written")
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 600], help="updates of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--iters", type=int, default=30, help="updates of each adapter")
    arguments = parser.parse_args()

    if not (arguments.out / "data" / "train.jsonl").exists():
        write_data(arguments.books, arguments.out / "data")
    if not (arguments.out / "tokenizer.model").exists():
        source = arguments.out / "data" / "repair.jsonl"
        elm("train-tokenizer", source, "--out", arguments.out / "tokenizer.model", "--vocab-size", 1024)
    found: dict[str, Measured] = {}
    for seed in arguments.seeds:
        for steps in arguments.steps:
            model = train(arguments.out, steps, seed)
            for bits in [FULL, *arguments.bits]:
                found[f"{steps}/{seed}/{bits}"] = repair(model, bits, arguments.iters, arguments.out)
    (arguments.out / "losses.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    print(table(found))
    if importlib.util.find_spec("matplotlib"):
        plot(found, arguments.out / "fragility.png")


def train(out: Path, steps: int, seed: int) -> Path:
    """The model of so many updates; not again where it is there."""
    model = out / f"steps-{steps}-seed-{seed}"
    fields = {
        "tokenizer": out / "tokenizer.model",
        "data.validation": out / "data" / "watched.jsonl",
        "data.sources": f'[{{path = "{out / "data" / "train.jsonl"}"}}]',
        "optimizer.steps": steps,
        "optimizer.warmup": min(25, steps // 2),
        "run.seed": seed,
    }
    if not (model / "model.safetensors").exists():
        sets = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
        elm("pretrain", HERE / "recipe.toml", "--out", model, *sets, *resume(model))
    return model


def repair(model: Path, bits: int, iters: int, out: Path) -> Measured:
    """Losses of `model` in `bits`, and of the same with an adapter trained on top; kept, and not measured again."""
    record = model.with_name(f"{model.name}-{bits}.json")
    if not record.exists():
        quantized = model if bits == FULL else model.with_name(f"{model.name}-{bits}-bit")
        if bits != FULL:
            elm("quantize", model, quantized, "--bits", bits, "--group-size", 32, "--overwrite")
        adapter = model.with_name(f"{model.name}-{bits}-lora")
        options = {"--iters": iters, "--batch-size": 8, "--learning-rate": 2e-3, "--rank": 8, "--seed": 1}
        words = [word for pair in options.items() for word in pair]
        elm("lora", quantized, "--data", out / "data" / "repair.jsonl", "--out", adapter, *words, *resume(adapter))
        losses = [loss(quantized, path) for path in (None, adapter)]
        record.write_text(json.dumps(dict(zip(("before", "after"), losses, strict=True))), "utf-8")
    measured: Measured = json.loads(record.read_text("utf-8"))
    return measured


def resume(run: Path) -> list[str]:
    return ["--resume"] if (run / "checkpoints").exists() else []


def loss(path: Path, adapter: Path | None) -> float:
    """Nats a token of the beginnings of two books that nothing is trained on, their mean."""
    model, tokenizer = elm_mlx.load(path, compute_dtype="float32", adapter_path=adapter)
    assert tokenizer is not None
    length = model.config.max_context_length
    return statistics.mean(
        held_out_loss(model, tokenizer, book["text"], windows=32, length=length).nats for book in texts.read(HELD_OUT)
    )


def table(found: dict[str, Measured]) -> str:
    """A row for each training and width: means over seeds, with their standard deviation."""
    lines = [
        "| tokens a parameter | bits | loss | added by quantizing | with LoRA | added, both with LoRA | came back |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for steps, bits, losses in grouped(found):
        full = [found[f"{steps}/{seed}/{FULL}"] for seed in losses]
        each = list(losses.values())
        added = [one["before"] - whole["before"] for one, whole in zip(each, full, strict=True)]
        left = [one["after"] - whole["after"] for one, whole in zip(each, full, strict=True)]
        noise = statistics.mean(added) < 1e-3  # too little for a share of it to mean anything
        back = ["–"] if noise else [f"{1 - statistics.mean(left) / statistics.mean(added):.0%}"]
        cells = [cell([one["before"] for one in each]), cell(added), cell([one["after"] for one in each]), cell(left)]
        lines.append(f"| {steps * ROW_TOKENS / PARAMETERS:.2g} | {bits} | {' | '.join([*cells, *back])} |")
    return "\n" + "\n".join(lines)


PARAMETERS = 225_984


def grouped(found: dict[str, Measured]) -> Iterator[tuple[int, int, dict[int, Measured]]]:
    """Steps, bits, and the losses by seed."""
    groups: dict[tuple[int, int], dict[int, Measured]] = {}
    for name, measured in found.items():
        steps, seed, bits = map(int, name.split("/"))
        groups.setdefault((steps, bits), {})[seed] = measured
    for (steps, bits), losses in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])):
        yield steps, bits, losses


def cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def plot(found: dict[str, Measured], path: Path) -> None:
    """Plots what quantizing adds to the loss, by bits, before and after LoRA; a line a training, a point a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, steps in enumerate(sorted({steps for steps, _, _ in grouped(found)})):
        for part, style, what in (("before", "-", "quantized"), ("after", "--", "and LoRA on both")):
            points = [
                (bits, losses[seed][part] - found[f"{steps}/{seed}/{FULL}"][part])
                for of_steps, bits, losses in grouped(found)
                if of_steps == steps and bits != FULL
                for seed in losses
            ]
            widths = sorted({bits for bits, _ in points})
            means = [statistics.mean(added for bits, added in points if bits == width) for width in widths]
            label = f"{steps * ROW_TOKENS / PARAMETERS:.2g} tokens a parameter, {what}"
            axes.plot(widths, means, style, color=f"C{i}", label=label)
            axes.plot(*zip(*points, strict=True), ".", color=f"C{i}", alpha=0.5)
    axes.set(xlabel="bits a value, in groups of 32", ylabel="loss added, nats a token", yscale="symlog")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.invert_xaxis()
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def write_data(books: Path, folder: Path) -> None:
    """Documents to train on; the first 150 of them are what adapters are trained on too."""
    texts.write_documents(books, folder)
    documents = (folder / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "repair.jsonl").write_text("".join(documents[:150]), "utf-8")


if __name__ == "__main__":
    main()
