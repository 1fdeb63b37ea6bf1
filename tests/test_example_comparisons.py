"""The examples that compare, layer-wise with uniform scaling and means with last checkpoints, on little."""

from __future__ import annotations

import gzip
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from elm_mlx.model.network import Model
from elm_mlx.store.loading import load
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx.train import sections
from elm_mlx.train.pretraining_recipe import Recipe

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LAYERWISE, AVERAGING, CLASSICS = (EXAMPLES / name for name in ("layerwise", "averaging", "classics"))


def imported(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> ModuleType:
    """A module of an example, as its own script would find it."""
    import importlib

    for found in ("run", "compare", "command", "books", "measure"):
        monkeypatch.delitem(sys.modules, found, raising=False)
    monkeypatch.setattr(sys, "path", [str(folder), str(EXAMPLES), *sys.path])
    return importlib.import_module(name)


def plain(model: Model, tokenizer: Tokenizer, text: str, length: int) -> tuple[float, float]:
    """Nats a token and bits a byte, window by window, the softmax taken in float64."""
    ids, nats = np.array(tokenizer.encode(text, add_bos=True)), []
    for start in range(0, len(ids) - 1, length):
        inputs, targets = ids[start : start + length], ids[start + 1 : start + length + 1]
        logits = np.array(model(mx.array(inputs[: len(targets)])[None])[0], np.float64)
        logprobs = logits - logits.max(-1, keepdims=True)
        logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
        nats.extend(-logprobs[np.arange(len(targets)), targets])
    return float(np.mean(nats)), sum(nats) / math.log(2) / len(tokenizer.decode(ids[1:]).encode())


def example(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginnings of the held-out books: some 500 and 800 tokens."""
    path = tmp_path_factory.mktemp("held-out") / "books.jsonl"
    books = gzip.decompress((CLASSICS / "held-out.jsonl.gz").read_bytes()).decode().splitlines()
    with path.open("w", encoding="utf-8") as file:
        for book, length in zip(map(json.loads, books), (1200, 2000), strict=True):
            file.write(json.dumps(book | {"text": book["text"][:length]}) + "\n")
    return path


@pytest.fixture(scope="module")
def layerwise(tmp_path_factory: pytest.TempPathFactory, held_out: Path) -> tuple[Path, str]:
    """The comparison in its quick form: what it wrote, and what it printed."""
    out = tmp_path_factory.mktemp("layerwise") / "out"
    done = example(LAYERWISE, "--quick", "--held-out", held_out, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_both_shapes_have_as_many_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    run = imported(monkeypatch, LAYERWISE, "run")
    configs = []
    for heads, ffn in run.SHAPES.values():
        fields = [f"model.qkv_multipliers={heads}", f"model.ffn_multipliers={ffn}"]
        configs.append(sections.read(LAYERWISE / "recipe.toml", Recipe, fields).model.config(1024, 1, 2))
    scaled, uniform = configs
    assert scaled.parameters == uniform.parameters == 1_411_456
    assert sum(scaled.num_query_heads) == sum(uniform.num_query_heads)
    assert sum(scaled.ffn_dims) == sum(uniform.ffn_dims)
    assert len({*uniform.ffn_dims}) == 1 and list(scaled.ffn_dims) == sorted({*scaled.ffn_dims})


def test_what_is_compared_are_the_losses_of_what_was_trained(layerwise: tuple[Path, str], held_out: Path) -> None:
    out, printed = layerwise
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert list(results["losses"]) == ["layer-wise", "uniform"]
    for shape, tuned in results["tuning"].items():
        best = min(tuned, key=tuned.__getitem__)
        assert f"| {shape} | 1,411,456 | {results['speed'][shape]:,.0f} | {best} |" in printed
        for seed, measured in enumerate(results["losses"][shape], 1):
            model, tokenizer = load(out / shape / f"lr-{best}-seed-{seed}", compute_dtype="float32")
            assert tokenizer is not None
            for book in map(json.loads, held_out.read_text("utf-8").splitlines()):
                assert measured[book["title"]] == pytest.approx(plain(model, tokenizer, book["text"], 256), abs=2e-5)


def test_the_comparison_of_rates_is_that_of_their_runs(layerwise: tuple[Path, str]) -> None:
    out, printed = layerwise
    results = json.loads((out / "results.json").read_text("utf-8"))
    for shape, tuned in results["tuning"].items():
        assert list(tuned) == ["0.003", "0.006"]
        for rate, loss in tuned.items():
            lines = (out / shape / f"lr-{rate}-seed-0" / "metrics.jsonl").read_text("utf-8").splitlines()
            assert loss == json.loads(lines[-1])["valid_loss"] < json.loads(lines[0])["valid_loss"]
            about = json.loads((out / shape / f"lr-{rate}-seed-0" / "run.json").read_text("utf-8"))
            assert about["settings"]["optimizer"]["lr"] == float(rate)
        assert f"| {shape} | {tuned['0.003']:.4f} | {tuned['0.006']:.4f} |" in printed


def test_the_comparison_leaves_alone_what_is_finished(layerwise: tuple[Path, str], held_out: Path) -> None:
    out, printed = layerwise
    assert len(re.findall(r"^\$ elm-mlx pretrain", printed, re.M)) == 2 * (2 + 2)
    unfinished = out / "uniform" / "lr-0.003-seed-0"
    (unfinished / "model.safetensors").unlink()
    again = example(LAYERWISE, "--quick", "--held-out", held_out, "--out", out)
    assert again.returncode == 0, again.stderr
    (command,) = re.findall(r"^\$ elm-mlx .*$", again.stdout, re.M)
    assert str(unfinished) in command and command.endswith("--resume")
    assert printed.endswith(again.stdout[again.stdout.index("| | parameters") :])
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("optimum", "tried"),
    [
        (0.006, [0.003, 0.006, 0.012]),
        (0.002, [0.00075, 0.0015, 0.003, 0.006, 0.012]),
        (1.0, [0.003, 0.006, 0.012, 0.024, 0.048]),
    ],
)
def test_rates_are_tried_until_the_best_has_a_worse_one_on_either_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, optimum: float, tried: list[float]
) -> None:
    example_run = imported(monkeypatch, LAYERWISE, "run")

    def run(rate: float, seed: int) -> Path:
        directory = tmp_path / f"{rate:g}"
        directory.mkdir()
        (directory / "metrics.jsonl").write_text(json.dumps({"valid_loss": abs(math.log(rate / optimum))}) + "\n")
        return directory

    assert list(example_run.tune(run, example_run.RATES, 5)) == pytest.approx(tried)


def test_a_rate_that_broke_off_is_the_worst(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "valid_loss": 7.0}\n{"step": 3, "loss": 9.0}\n')
    assert imported(monkeypatch, LAYERWISE, "run").watched_loss(tmp_path) == math.inf


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_interval_is_students(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """95 % of Student's density lie within it: the density by its formula, the area by the trapezoid rule."""
    values, freedom = [0.1 * i * i for i in range(count)], count - 1
    mean, reach = imported(monkeypatch, LAYERWISE, "compare").interval(values)
    assert mean == pytest.approx(statistics.fmean(values))
    t = reach / (statistics.stdev(values) / math.sqrt(count))
    x = np.linspace(-t, t, 200_001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert ((density[1:] + density[:-1]) / 2).sum() * (x[1] - x[0]) == pytest.approx(0.95, abs=5e-5)


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory, layerwise: tuple[Path, str]) -> Path:
    """A run of seven updates with as many checkpoints, of a model that hardly deserves the name."""
    out, data = tmp_path_factory.mktemp("settled") / "run", layerwise[0]
    fields = {
        "tokenizer": data / "tokenizer.model", "data.sources": f'[{{path = "{data / "data" / "train.jsonl"}"}}]',
        "data.validation": data / "data" / "watched.jsonl", "data.validation_rows": 2, "data.window": 2048,
        "data.sequence_length": 64, "model.num_layers": 2, "model.model_dim": 32, "optimizer.steps": 7,
        "optimizer.warmup": 1, "run.save_every": 1, "run.keep": 7,
    }  # fmt: skip
    sets = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "elm_mlx", "pretrain", str(LAYERWISE / "recipe.toml"), "--out", str(out), *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out


def test_means_are_of_the_checkpoints_that_are_named(settled: Path, held_out: Path, tmp_path: Path) -> None:
    done = example(AVERAGING, settled, "--held-out", held_out, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    steps = [each["steps"] for each in results]
    assert steps == [
        [7],
        [6, 7],
        [5, 6, 7],
        [4, 5, 6, 7],
        [3, 4, 5, 6, 7],
        [5, 7],
        [3, 5, 7],
        [1, 3, 5, 7],
        [*range(1, 8)],
    ]
    model, tokenizer = load(settled, compute_dtype="float32")
    assert tokenizer is not None
    for each in (results[0], results[4], results[6]):
        files = [
            mx.load(str(settled / "checkpoints" / f"step-{step:08}" / "parameters.safetensors"))
            for step in each["steps"]
        ]
        mean = {name: mx.array(np.mean([np.array(file[name], np.float64) for file in files], 0)) for name in files[0]}
        model.load_weights([(name, value.astype(mx.float32)) for name, value in mean.items()])
        for book in map(json.loads, held_out.read_text("utf-8").splitlines()):
            expected = plain(model, tokenizer, book["text"], 512)
            assert each["start"][book["title"]] == pytest.approx(expected, abs=2e-5)  # shorter than 16 windows
            assert each["whole"][book["title"]] == pytest.approx(expected, abs=2e-5)
    last, *means = re.findall(r"^\| the last .*$", done.stdout, re.M)
    assert last.startswith("| the last alone |") and len(means) == 8
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("elsewhere", [(100,), (750,), (300, 450)])
def test_means_are_of_the_last_in_a_row_and_not_of_the_best_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: tuple[int, ...]
) -> None:
    run = imported(monkeypatch, AVERAGING, "run")
    for step in (700, 800, 900, 940, *elsewhere):
        (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    assert run.last_in_a_row(tmp_path, 100) == [700, 800, 900, 940]


def test_means_are_of_two_to_five_and_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = imported(monkeypatch, AVERAGING, "run").choices
    assert choices([7, 8, 9]) == [(1, [9]), (1, [8, 9]), (1, [7, 8, 9]), (2, [7, 9])]
    made = choices([1, 2, 3, 4, 5, 6])
    assert [steps for apart, steps in made if apart == 1][4:] == [[2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]
    assert [steps for apart, steps in made if apart == 2] == [[4, 6], [2, 4, 6]]


def test_a_run_with_one_checkpoint_has_no_mean(layerwise: tuple[Path, str], tmp_path: Path) -> None:
    run = layerwise[0] / "uniform" / "lr-0.006-seed-1"
    done = example(AVERAGING, run, "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == f"{run}: needs two checkpoints in a row, and has 1"
    done = example(AVERAGING, tmp_path, "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == f"{tmp_path}: is no run of `elm-mlx pretrain`"


def test_the_measure_begins_with_bos_and_ends_after_its_windows(
    monkeypatch: pytest.MonkeyPatch, settled: Path, held_out: Path
) -> None:
    measure = imported(monkeypatch, LAYERWISE, "measure")
    model, tokenizer = load(settled, compute_dtype="float32")
    assert tokenizer is not None
    text = json.loads(held_out.read_text("utf-8").splitlines()[0])["text"]
    ids = tokenizer.encode(text, add_bos=True)
    assert ids[0] == tokenizer.bos_id
    logits = np.array(model(mx.array(ids[:128]).reshape(2, 64)), np.float64).reshape(128, -1)
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(128), ids[1:129]]
    found = measure.held_out_loss(model, tokenizer, text, windows=2, length=64)
    assert found.nats == pytest.approx(nats.mean(), abs=1e-5)
    assert found.bits == pytest.approx(nats.sum() / math.log(2) / len(tokenizer.decode(ids[1:129]).encode()), abs=1e-5)
