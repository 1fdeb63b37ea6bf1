"""The examples that compare, layer-wise with uniform scaling and means with last checkpoints, on little."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from held_out_books import plain_loss, write_beginnings
from mlx.utils import tree_flatten

from elm_mlx.model.config import ModelConfig
from elm_mlx.model.network import Model, initialize
from elm_mlx.model.roofline import Cost, causal
from elm_mlx.store.loading import load
from elm_mlx.train import sections
from elm_mlx.train.pretraining_recipe import Recipe

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LAYERWISE, AVERAGING, CLASSICS = (EXAMPLES / name for name in ("layerwise", "averaging", "classics"))


def imported(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> ModuleType:
    """A module of an example, as its own script would find it."""
    import importlib

    for found in ("run", "page", "pages", "study", "training", "command", "books", "measure"):
        monkeypatch.delitem(sys.modules, found, raising=False)
    monkeypatch.setattr(sys, "path", [str(folder), str(EXAMPLES), *sys.path])
    return importlib.import_module(name)


def example(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 500 and 800 tokens."""
    return write_beginnings(tmp_path_factory.mktemp("held-out") / "books.jsonl", 1200, 2000)


@pytest.fixture(scope="module")
def layerwise(tmp_path_factory: pytest.TempPathFactory, held_out: Path) -> tuple[Path, str]:
    """The comparison in its quick form: what it wrote, and what it printed."""
    out = tmp_path_factory.mktemp("layerwise") / "out"
    done = example(LAYERWISE, "--quick", "--held-out", held_out, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def records_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text("utf-8").splitlines()]


def test_shapes_of_a_size_have_equal_parameters_and_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    study = imported(monkeypatch, LAYERWISE, "study")
    for name, size in study.SIZES.items():
        configs = {}
        for shape in study.SHAPES:
            fields = study.Training(name, shape, study.CORENET, study.LONG, 0.004, 1).fields()
            recipe = sections.read(LAYERWISE / "recipe.toml", Recipe, fields)
            configs[shape] = recipe.model.config(1024, 1, 2)
            assert recipe.optimizer.steps * recipe.tokens_per_update() >= study.LONG * size.parameters
        scaled, uniform = configs[study.LAYERWISE], configs[study.UNIFORM]
        for config in configs.values():
            assert config.parameters == size.parameters
            assert sum(config.num_kv_heads) == sum(config.num_query_heads) == sum(uniform.num_query_heads)
            assert sum(config.ffn_dims) == sum(uniform.ffn_dims)
            assert Cost.of(config).forward(128, causal(128), 128) == Cost.of(uniform).forward(128, causal(128), 128)
        assert len({*uniform.ffn_dims}) == 1 and list(scaled.ffn_dims) == sorted({*scaled.ffn_dims})


def test_weights_by_fan_in_add_alike_in_wide_and_narrow_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    training = imported(monkeypatch, LAYERWISE, "training")
    config = ModelConfig.scaled(
        vocab_size=64, num_layers=4, model_dim=128, head_dim=16, num_gqa_groups=1, qkv_multipliers=(0.5, 1.0),
        ffn_multipliers=(0.5, 4.0), ffn_dim_divisor=8, max_context_length=64, rope_max_length=128,
    )  # fmt: skip
    drawn, corenets = Model(config), Model(config)
    training.by_fan_in(drawn, 3)
    initialize(corenets, 3)
    others = dict(tree_flatten(corenets.parameters()))
    for name, weight in tree_flatten(drawn.parameters()):
        if name.endswith(("out_proj.weight", "proj_2.weight")):
            expected = (2 * 4 * weight.shape[1]) ** -0.5
            assert float(mx.std(weight)) == pytest.approx(expected, rel=5 / math.sqrt(2 * weight.size)), name
        else:
            assert bool(mx.array_equal(weight, others[name])), name


def test_what_is_recorded_are_the_losses_of_what_was_trained(layerwise: tuple[Path, str], held_out: Path) -> None:
    out, _ = layerwise
    records = records_of(out)
    finals = [record for record in records if record["seed"]]
    assert sorted((each["shape"], each["seed"]) for each in finals) == [
        ("layer-wise", 1), ("layer-wise", 2), ("uniform", 1), ("uniform", 2)
    ]  # fmt: skip
    for record in finals:
        tried = {
            each["rate"]: each["validation"][-1][1]
            for each in records
            if each["shape"] == record["shape"] and not each["seed"]
        }
        assert sorted(tried) == [0.008, 0.016] and record["rate"] == min(tried, key=tried.__getitem__)
        name = f"0.23M-{record['shape']}-CoreNet-5-lr-{record['rate']}-seed-{record['seed']}"
        lines = (out / "runs" / name / "metrics.jsonl").read_text("utf-8").splitlines()
        first, last = (json.loads(line)["valid_loss"] for line in (lines[0], lines[-1]))
        assert record["validation"] == [[0, pytest.approx(first, abs=1e-5)], [4, pytest.approx(last, abs=1e-5)]]
        model, tokenizer = load(out / "runs" / name, compute_dtype="float32")
        assert tokenizer is not None
        for book in map(json.loads, held_out.read_text("utf-8").splitlines()):
            expected = plain_loss(model, tokenizer, book["text"], 128)
            assert record["held_out"][book["title"]] == pytest.approx(expected, abs=3e-5)


def test_the_comparison_is_stopped_and_goes_on_with_what_is_not_finished(
    layerwise: tuple[Path, str], held_out: Path
) -> None:
    out, printed = layerwise
    assert len(re.findall(r"tokens/s$", printed, re.M)) == 2 * (2 + 2)
    path, records = out / "records.jsonl", records_of(out)
    lost = records.pop()
    name = f"0.23M-{lost['shape']}-CoreNet-5-lr-{lost['rate']}-seed-{lost['seed']}"
    shutil.rmtree(out / "runs" / name)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    arguments = ["--quick", "--held-out", str(held_out), "--out", str(out)]
    begun = subprocess.Popen([sys.executable, str(LAYERWISE / "run.py"), *arguments], cwd=ROOT, stderr=subprocess.PIPE)
    while not any((out / "runs" / name).glob("*")) and begun.poll() is None:  # written by what trains, once it can stop
        time.sleep(0.01)
    begun.send_signal(signal.SIGTERM)
    assert (begun.communicate(timeout=100)[1], begun.returncode) == (b"", 130)
    assert records_of(out) == records
    again = example(LAYERWISE, *arguments)
    assert again.returncode == 0, again.stderr
    (line,) = again.stdout.splitlines()
    assert line.startswith(f"{name}: ")
    made = records_of(out)[-1]
    assert made | {"tokens_per_second": 0} == lost | {"tokens_per_second": 0}


def test_other_initial_weights_are_what_training_begins_with(layerwise: tuple[Path, str]) -> None:
    out, _ = layerwise
    begun = next(record for record in records_of(out) if record["seed"] == 1)
    kind = {name: begun[name] for name in ("size", "shape", "initial", "budget", "rate", "seed")}
    data = out / "data"
    fields = [
        f"tokenizer={out / 'tokenizer.model'}", f"data.validation={data / 'watched.jsonl'}", "data.validation_rows=4",
        f'data.sources=[{{path = "{data / "train.jsonl"}"}}]', "optimizer.steps=1", "optimizer.warmup=1",
        "run.batch_size=2", "data.window=2048",
    ]  # fmt: skip
    asked = {"training": kind | {"initial": "fan-in"}, "out": str(out / "other"), "fields": fields, "held_out": None}
    command = [sys.executable, str(LAYERWISE / "training.py"), json.dumps(asked | {"windows": None})]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    made = json.loads((out / "other" / "record.json").read_text("utf-8"))
    assert made["initial"] == "fan-in" and made["held_out"] == {}
    assert made["validation"][0][1] != pytest.approx(begun["validation"][0][1], abs=1e-4)


@pytest.mark.parametrize(
    ("optimum", "tried"),
    [
        (0.009, [0.004, 0.008, 0.016]),
        (0.014, [0.008, 0.016, 0.032]),
        (0.003, [0.002, 0.004, 0.008, 0.016]),
        (1.0, [0.008, 0.016, 0.032, 0.064, 0.128]),
    ],
)
def test_rates_are_tried_until_the_best_has_a_worse_one_on_either_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, optimum: float, tried: list[float]
) -> None:
    example_run = imported(monkeypatch, LAYERWISE, "run")

    def loss(rate: float) -> float:
        return abs(math.log(rate / optimum))

    assert list(example_run.tune(loss, example_run.RATES, 5)) == pytest.approx(tried)


def test_a_rate_that_broke_off_is_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    page = imported(monkeypatch, LAYERWISE, "page")
    assert page.last_loss({"validation": [[0, 7.4], [9, None]]}) == math.inf


def test_differences_are_paired_by_seed_and_of_the_best_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    page = imported(monkeypatch, LAYERWISE, "page")
    study, records = sys.modules["study"], {}
    best = {"uniform": 0.008, "layer-wise": 0.004}
    losses = {"uniform": (3.0, 3.1, 3.3), "layer-wise": (3.2, 3.2, 3.5)}
    for shape, rate in best.items():
        for tried in (0.004, 0.008):
            one = study.Training("0.23M", shape, "CoreNet", study.TRIAL, tried, 0)
            records[one] = {"validation": [[0, 7.0], [9, 4.0 if tried == rate else None]], "held_out": {}}
            for seed, loss in enumerate(losses[shape], 1):
                shown = loss if tried == rate else 9.0
                one = study.Training("0.23M", shape, "CoreNet", study.LONG, tried, seed)
                records[one] = {
                    "validation": [[0, 7.0], [9, shown]], "tokens_per_second": 100 * rate, "flops": 500_096,
                    "parameters": 225_984, "held_out": {"A": [shown, 2.0], "B": [shown + 1, 4.0]},
                }  # fmt: skip
    results = page.Results(records)
    cell = study.Cell("0.23M", "layer-wise")
    assert results.differences(cell) == pytest.approx([0.2, 0.1, 0.2])
    mean, reach = page.interval([0.2, 0.1, 0.2])
    shown = page.tables(results)
    assert f"| 0.23M | 20 | CoreNet | layer-wise | {mean:+.4f} ± {reach:.4f} | +0.200, +0.100, +0.200 |" in shown
    assert (
        "| 0.23M, 20 a parameter, CoreNet, uniform | 3 | 3.1333 (0.1528) | 4.1333 (0.1528) | 3.6333 (0.1528) |" in shown
    )
    assert "| 0.23M, 5 a parameter, CoreNet, layer-wise | **4.0000** | broke off |" in shown
    assert "| 0.23M (225,984 in each) | 0.500 | 1 | 0 | 0.50 |" in shown
    assert "| 0.23M, 20 a parameter: uniform, layer-wise; CoreNet | 6 of 6 |" in shown
    assert "| 1.4M, 20 a parameter: uniform, layer-wise; CoreNet | 0 of 6 | 3.3 h |" in shown


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_interval_is_students(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """95 % of Student's density lie within it: the density by its formula, the area by the trapezoid rule."""
    values, freedom = [0.1 * i * i for i in range(count)], count - 1
    mean, reach = imported(monkeypatch, LAYERWISE, "page").interval(values)
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
            expected = plain_loss(model, tokenizer, book["text"], 512)
            assert each["start"][book["title"]] == pytest.approx(expected[0], abs=2e-5)  # shorter than 16 windows
            assert each["whole"][book["title"]] == pytest.approx(expected[0], abs=2e-5)
    last, *means = re.findall(r"^\| the last .*$", done.stdout, re.M)
    assert last.startswith("| the last alone |") and len(means) == 8


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
    (run,) = (layerwise[0] / "runs").glob("*-uniform-*-seed-1")
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
