"""Are models trained on many tokens for their size more easily hurt by quantizing? `python examples/fragility/run.py`.

The same network is trained on ever more tokens, each time from several seeds; each of them is rounded to fewer and
fewer bits. A LoRA adapter is trained on top of that, and apart from it, groups' scales and biases are trained (DWQ).
Every step but the measuring (../measure.py), on two books that nothing is trained on, is a command of elm-mlx's, which
is printed before it runs. page.py makes table and plot of the losses. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
from command import elm  # noqa: E402
from measure import held_out_loss  # noqa: E402
from page import FULL, WAYS  # noqa: E402

import elm_mlx  # noqa: E402

CLASSICS = HERE.parent / "classics"
HELD_OUT = CLASSICS / "held-out.jsonl.gz"
DWQ_RATES = {4: 3e-4, 3: 1e-3, 2: 1e-3}  # by bits, where there is something to repair; tried on one model
_CALIBRATION = 40_000  # characters that DWQ learns from


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize models trained on few and many tokens, and repair them.")
    parser.add_argument(
        "--books", type=Path, default=CLASSICS / "extract.jsonl.gz", help='{"text": …} a line, a book each'
    )
    parser.add_argument("--out", type=Path, default=Path("build/fragility"), help="where everything is written")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[17, 50, 150, 450, 1350], help="updates of each training"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--iters", type=int, default=30, help="updates of each adapter")
    arguments = parser.parse_args()
    out = arguments.out
    write_data(arguments.books, out)
    models = [train(out, steps, seed) for seed in arguments.seeds for steps in arguments.steps]
    widths = [(model, bits) for model in models for bits in (FULL, *arguments.bits)]
    for way in WAYS:
        for model, bits in widths:
            if way == "rounded" or bits in DWQ_RATES or (way, bits) == ("adapter", FULL):
                record(model, bits, way, arguments.iters, out)
    names = sorted(out.glob("steps-*-seed-*-bits-*.json"))
    found = {name.stem: json.loads(name.read_text("utf-8")) for name in names}
    (out / "losses.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(f"\n{len(found)} models measured; python {HERE / 'page.py'} {out / 'losses.json'} makes the page of them")


def write_data(books: Path, out: Path) -> None:
    """Documents to train on, the first of which adapters and DWQ learn from too, and a vocabulary; unless there."""
    data = out / "data"
    if not (data / "calibration.txt").exists():
        texts.write_documents(books, data)
        documents = (data / "train.jsonl").read_text("utf-8").splitlines(keepends=True)[:150]
        (data / "repair.jsonl").write_text("".join(documents), "utf-8")
        text = "\n".join(json.loads(document)["text"] for document in documents)
        (data / "calibration.txt").write_text(text[:_CALIBRATION], "utf-8")
    if not (out / "tokenizer.model").exists():
        elm("train-tokenizer", data / "repair.jsonl", "--out", out / "tokenizer.model", "--vocab-size", 1024)


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
    if not (model / "model.safetensors").exists() or steps_of(model) < steps:
        sets = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
        elm("pretrain", HERE / "recipe.toml", "--out", model, *sets, *resume(model))
    return model


def steps_of(model: Path) -> int:
    """The updates that a run has made: one that was stopped has a model, too."""
    return json.loads((model / "metrics.jsonl").read_text("utf-8").splitlines()[-1])["step"]


def record(model: Path, bits: int, way: str, iters: int, out: Path) -> None:
    """Measures the model's loss in so many bits and keeps it beside the model, unless it is there."""
    path = model.with_name(f"{model.name}-bits-{bits}.json")
    losses = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if way in losses:
        return
    if way == "rounded":
        losses[way] = loss(rounded(model, bits))
    elif way == "adapter":
        losses[way] = loss(rounded(model, bits), adapted(model, bits, iters, out))
    else:
        losses[way] = loss(learned(model, bits, out))
    path.write_text(json.dumps(losses) + "\n", "utf-8")


def rounded(model: Path, bits: int) -> Path:
    """The model in so many bits; not again where it is there."""
    quantized = model if bits == FULL else model.with_name(f"{model.name}-{bits}-bit")
    if not (quantized / "config.json").exists():
        elm("quantize", model, quantized, "--bits", bits, "--group-size", 32)
    return quantized


def adapted(model: Path, bits: int, iters: int, out: Path) -> Path:
    """An adapter that is trained on top of the model in so many bits."""
    adapter = model.with_name(f"{model.name}-{bits}-lora")
    options = {"--iters": iters, "--batch-size": 8, "--learning-rate": 2e-3, "--rank": 4, "--seed": 1}
    words = [word for pair in options.items() for word in pair]
    source = out / "data" / "repair.jsonl"
    elm("lora", rounded(model, bits), "--data", source, "--out", adapter, *words, *resume(adapter))
    return adapter


def learned(model: Path, bits: int, out: Path) -> Path:
    """The model in so many bits, the groups' scales and biases trained to give its outputs."""
    quantized = model.with_name(f"{model.name}-{bits}-bit-dwq")
    text = out / "data" / "calibration.txt"
    method = ["--method", "dwq", "--learning-rate", DWQ_RATES[bits], "--calibration", text]
    elm("quantize", model, quantized, "--bits", bits, "--group-size", 32, *method, "--overwrite")
    return quantized


def resume(run: Path) -> list[str]:
    return ["--resume"] if (run / "checkpoints").exists() else []


def loss(path: Path, adapter: Path | None = None) -> float:
    """Nats a token of the beginnings of two books that nothing is trained on, their mean."""
    model, tokenizer = elm_mlx.load(path, compute_dtype="float32", adapter_path=adapter)
    assert tokenizer is not None
    length = model.config.max_context_length
    return statistics.mean(
        held_out_loss(model, tokenizer, book["text"], windows=32, length=length).nats for book in texts.read(HELD_OUT)
    )


if __name__ == "__main__":
    main()
