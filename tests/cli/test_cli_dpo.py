"""`elm-mlx dpo`: that it learns what is preferred, asks the model as it was once, and goes on where it was stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from commands import Run
from safetensors.numpy import load_file
from training_runs import free_port

from elm_mlx import files
from elm_mlx.cli.dpo import RECIPES
from elm_mlx.data.examples import load as load_examples
from elm_mlx.store.loading import load, load_model
from elm_mlx.text.chat_template import choose
from elm_mlx.train import alignment

QUICK = ("--iters", 8, "--steps-per-eval", 4, "--batch-size", 2, "--max-seq-length", 128, "--learning-rate", 0.01)


@pytest.fixture
def run(run: Run) -> Run:
    """`elm-mlx dpo`."""
    return partial(run, "dpo")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """24 pairs to train on, 4 to validate: `fox` is preferred to `king`."""
    path = tmp_path / "data"
    path.mkdir()
    for name, count in (("train", 24), ("valid", 4)):
        rows = (
            {"prompt": "the quick " * (i % 4 + 1), "chosen": f"brown fox {i}", "rejected": f"old king told {i}"}
            for i in range(count)
        )
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "orpo"])
def test_it_learns_what_is_preferred(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path, loss: str) -> None:
    out = tmp_path / "out"
    code, text, err = run(tiny_model_dir, "--data", data, "--out", out, *QUICK, "--loss", loss, "--beta", 0.3)
    assert code == 0, err
    assert "data      24 pairs, " in text and "4 to validate" in text
    lines = metrics(out)
    first, last = lines[0], lines[-1]
    assert first["step"] == 0 and last["step"] == 8 and last["valid_loss"] < first["valid_loss"]
    assert last["valid_margin"] > first["valid_margin"] and last["valid_accuracy"] == 1.0
    assert last["valid_chosen_reward"] - last["valid_rejected_reward"] == pytest.approx(last["valid_margin"], abs=1e-5)
    assert {"loss", "chosen_reward", "rejected_reward", "margin", "accuracy", "grad_norm"} <= lines[1].keys()
    start = {"sigmoid": np.log(2), "hinge": 1.0, "ipo": (1 / 0.6) ** 2}
    if loss in start:  # where the policy is the reference still
        assert first["valid_loss"] == pytest.approx(start[loss], abs=1e-4)
        assert lines[1]["loss"] == pytest.approx(start[loss], abs=1e-4) and abs(first["valid_margin"]) < 1e-4
    assert (out / alignment.FILE).exists() == (loss != "orpo")
    assert "accuracy 1" in text
    assert f"best      validation loss {min(x.get('valid_loss', 9e9) for x in lines[1:]):.4f}" in text


def test_the_reference_is_the_base_and_the_adapter_has_left_it(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(tiny_model_dir, "--data", data, "--out", out, *QUICK)[0] == 0
    base, tokenizer = load(tiny_model_dir, "float32")
    tuned = load_model(tiny_model_dir, "float32", adapter_path=out)
    prepared = load_examples(data, tokenizer, choose(tiny_model_dir, tokenizer), 128, paired=True)
    margins = []
    for split, found in load_file(out / alignment.FILE).items():
        examples = prepared[split].examples
        sums = {id(model): [] for model in (base, tuned)}  # type: ignore[var-annotated]
        for model in (base, tuned):
            for example in examples:
                nats = nn.losses.cross_entropy(model(mx.array([example.ids[:-1]]))[0], mx.array(example.ids[1:]))
                sums[id(model)].append(-(nats * mx.array(example.trained[1:])).sum().item())
        was, now = (np.array(sums[id(model)]).reshape(-1, 2) for model in (base, tuned))
        np.testing.assert_allclose(found, was, rtol=1e-4, atol=1e-3)
        if split == "valid":
            margins = (now - was) @ [0.1, -0.1]
    assert np.mean(margins) == pytest.approx(metrics(out)[-1]["valid_margin"], rel=1e-3)


@pytest.mark.parametrize("more", [(), ("--full",)], ids=["lora", "full"])
def test_resuming_has_the_same_losses_and_computes_no_reference(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    options = (tiny_model_dir, "--data", data, *QUICK, "--save-every", 2, "--keep", 9, *more)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*options, "--out", whole)[0] == 0
    shutil.copytree(whole, out)
    for name in ("step-00000006", "step-00000008"):
        shutil.rmtree(out / "checkpoints" / name)

    def none(*arguments: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(alignment, "compute", none)
    code, _, err = run("--out", out, "--resume")
    assert code == 0, err
    keys = ("step", "loss", "valid_loss", "margin", "valid_margin", "accuracy", "grad_norm")
    bare = [[{key: line.get(key) for key in keys} for line in metrics(path)] for path in (whole, out)]
    assert bare[0] == bare[1]


def test_a_test_of_pairs_is_by_the_same_reference(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(data / "valid.jsonl", data / "test.jsonl")
    out = tmp_path / "out"
    code, text, err = run(tiny_model_dir, "--data", data, "--out", out, *QUICK)
    assert code == 0, err
    assert "reference of pairs" not in text, "what is soon done is not said, once for each file"
    *lines, tested = metrics(out)
    best = min((line for line in lines if "valid_loss" in line), key=lambda line: line["valid_loss"])
    for name in ("loss", "margin", "accuracy"):
        assert tested[f"test_{name}"] == pytest.approx(best[f"valid_{name}"], abs=1e-6)
    assert re.search(rf"test      loss {tested['test_loss']:.4f}, .*accuracy", text)
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    (out / alignment.TEST_FILE).unlink()  # of a run that began without
    code, text, err = run("--out", out, "--resume")
    assert code == 0 and "\ntest " not in text, err


def test_ctrl_c_while_the_reference_is_computed_ends_as_elsewhere(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, nothing kept, and the same command can begin again."""
    compute, tables = alignment.compute, list[Any]()

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        tables.append(compute(*arguments))
        return tables[-1]

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(alignment, "compute", interrupted)
    code, text, err = run(tiny_model_dir, "--data", data, "--out", tmp_path / "out", *QUICK)
    assert code == 130 and "stopping, with nothing to save yet; Ctrl-C again ends at once" in text
    assert "Traceback" not in err and signal.getsignal(signal.SIGINT) == before
    assert not (tmp_path / "out").exists()
    assert len(tables) == 1 and (tables[0]["train"] == 0).all(axis=1).sum() > 12, "most pairs are left"


def test_a_reference_of_something_else_is_not_taken(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = (tiny_model_dir, "--data", data, "--out", out, *QUICK)
    assert run(*options)[0] == 0
    assert f"{out}: holds a run already" in run(*options)[2]
    path = out / alignment.FILE
    before = path.read_bytes()
    (data / "valid.jsonl").write_text('{"prompt": "the", "chosen": "fox", "rejected": "dogs"}\n')
    code, _, err = run("--out", out, "--resume")
    assert code == 2 and f"{path}: is of another model, other data or another --compute-dtype" in err
    assert path.read_bytes() == before
    path.write_bytes(before[:100])
    code, _, err = run("--out", out, "--resume")
    assert code == 2 and f"{path}: damaged" in err


def test_the_reference_is_what_the_run_began_with(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Its log-probabilities are those that an adapter gives, and the first margin is none."""
    first, out = tmp_path / "first", tmp_path / "out"
    assert run(tiny_model_dir, "--data", data, "--out", first, *QUICK)[0] == 0
    code, _, err = run(tiny_model_dir, "--data", data, "--out", out, *QUICK, "--from", first)
    assert code == 0, err
    before, now = (load_file(path / alignment.FILE)["valid"] for path in (first, out))
    assert (now[:, 0] - now[:, 1]).mean() > (before[:, 0] - before[:, 1]).mean() + 0.1, "chosen answers are likelier"
    start = next(line for line in metrics(out) if line["step"] == 0)
    assert start["valid_margin"] == pytest.approx(0, abs=1e-5) and start["valid_loss"] == pytest.approx(np.log(2))


def test_another_loss_is_refused_by_name(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(tiny_model_dir, "--data", data, "--out", out, *QUICK)[0] == 0
    code, _, err = run("--out", out, "--resume", "--beta", 0.2, "--iters", 9)
    assert code == 2 and "beta" in err


def test_what_is_wrong_is_said_before_the_model_is_read(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    start = (tiny_model_dir, "--data", data, "--out", out)
    assert "--loss dpo: is not one of sigmoid, hinge, ipo, orpo" in run(*start, "--loss", "dpo")[2]
    assert "--beta 0: a number above 0 is needed" in run(*start, "--beta", 0)[2]
    assert "--recipe openelm: is not one of openelm-270M, openelm-450M" in run(*start, "--recipe", "openelm")[2]
    long = "--max-seq-length 1024: the model reads 512 tokens at most, its context; give no more"
    assert long in run(*start, "--recipe", "openelm-270M")[2]
    (data / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    code, _, err = run(*start)
    reason = "`chosen` is missing; a pair has `prompt`, `chosen` and `rejected`"
    assert code == 2 and err.splitlines()[:2] == [
        f"{data / 'train.jsonl'}, line 1: {reason}; `elm-mlx lora` trains on such records",
        f"{data / 'train.jsonl'}, line 2: {reason}",
    ]
    assert not out.exists()


def test_an_adapter_that_is_worse_than_none_is_not_recommended(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    """What is preferred in validation is the other answer."""
    rows = map(json.loads, (data / "train.jsonl").read_text().splitlines())
    swapped = ({**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows)
    (data / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    code, text, err = run(tiny_model_dir, "--data", data, "--out", tmp_path / "out", *QUICK)
    assert code == 0 and "no validation loss was below the 0.6931 before training" in err
    assert "best" not in text and "try:" not in text


def test_two_runs_do_not_write_to_one_directory(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    with files.hold(tmp_path / "out"):
        code, _, err = run(tiny_model_dir, "--data", data, "--out", tmp_path / "out", *QUICK)
    assert code == 1 and f"process {os.getpid()} is writing to it" in err


def test_recipes_are_the_papers(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = ("--iters", 1, "--batch-size", 2, "--max-seq-length", 64)
    code, _, err = run(tiny_model_dir, "--data", data, "--out", out, "--recipe", "openelm-1_1B", *few)
    assert code == 0, err
    used = json.loads((out / "run.json").read_text())
    assert used["command"] == "dpo"
    wanted = {"loss": "sigmoid", "beta": 0.01, "learning_rate": 5e-5, "epochs": 5.0, "max_seq_length": 64}
    assert wanted.items() <= used["settings"].items()
    values = [tuple(recipe.values()) for recipe in RECIPES.values()]
    assert values == [
        (0.01, 1024, "hinge", 2e-5, 5.0), (0.01, 1024, "hinge", 3e-5, 8.0),
        (0.01, 1024, "sigmoid", 5e-5, 5.0), (0.01, 1024, "hinge", 1e-4, 10.0),
    ]  # fmt: skip


def test_two_processes_are_one_with_twice_the_batch(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Over MLX's ring: each computes the reference of its own pairs, and both have all of it."""
    command = [sys.executable, "-m", "elm_mlx", "dpo", str(tiny_model_dir), "--data", str(data), *map(str, QUICK[:4])]
    more = ["--max-seq-length", "64", "--learning-rate", "0.01"]
    one = [*command, *more, "--out", str(tmp_path / "one"), "--batch-size", "4"]
    subprocess.run(one, check=True, capture_output=True)
    two = [*command, *more, "--out", str(tmp_path / "two"), "--batch-size", "2"]
    launch = [Path(sys.executable).with_name("mlx.launch"), "--backend", "ring", "-n", "2", "--cwd", Path.cwd()]
    subprocess.run([*launch, "-p", str(free_port()), "--", *two], check=True, capture_output=True, timeout=120)
    tables = [load_file(tmp_path / name / alignment.FILE) for name in ("one", "two")]
    for split, table in tables[0].items():
        np.testing.assert_allclose(tables[1][split], table, rtol=1e-5, atol=1e-4)
    for alone, shared in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in {"loss", "valid_loss", "margin", "valid_margin", "accuracy", "tokens", "grad_norm"} & alone.keys():
            assert shared[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-4), key
