"""Runs that an earlier version left part-way go on to the losses that it would have come to itself.

What is in tests/fixtures/runs was made by the version at commit bd89d40, in that directory and with one BLAS thread
(how many there are decides what dropout drops). `model` is `tiny.random_model`, two layers of width 32; the data are
like those of the other tests. The commands below, with `--out lora`, `--out dpo` and `--out pretrain`, were killed
outright after the seventh update: the last checkpoints are those of the fifth, and the metrics go further. `eval` was
made by the command below with `--limit 8`. uninterrupted.json has the losses of the same commands left alone, and what
`generate` said under the adapters of the fifth update. Paths in run.json were made relative.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from commands import Run
from training_runs import updates

OLD = Path(__file__).parents[1] / "fixtures" / "runs"
KILLED_AT, SAVED_AT, STEPS = 7, 5, 16
ALIKE = (
    *("--iters", STEPS, "--learning-rate", 0.01, "--batch-size", 2, "--max-seq-length", 64, "--steps-per-eval", 4),
    *("--save-every", 5, "--keep", 1, "--compute-dtype", "float32"),
)
COMMANDS: dict[str, tuple[object, ...]] = {
    "lora": ("lora", "model", "--data", "examples", "--rank", 4, "--dropout", 0.1, "--weight-decay", 0.01, *ALIKE),
    "dpo": ("dpo", "model", "--data", "pairs", "--rank", 2, "--dora", "--target", "qkv_proj", "--beta", 0.3, *ALIKE),
    "pretrain": ("pretrain", "recipe.toml"),
}
EVAL = (
    *("eval", "model", "--tasks", "questions.jsonl", "--text", "texts/held-out.jsonl", "--window", 64),
    *("--compute-dtype", "float32"),
)


@pytest.fixture(autouse=True)
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old runs, in another place, which is the working directory."""
    path = tmp_path / "moved"
    shutil.copytree(OLD, path)
    monkeypatch.chdir(path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def uninterrupted(command: str) -> Any:
    return json.loads((OLD / "uninterrupted.json").read_text())[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_it_goes_on_to_the_same_losses(run: Run, old: Path, command: str) -> None:
    metrics = old / command / "metrics.jsonl"
    before = metrics.read_text().splitlines()
    kept = [line for line in before if json.loads(line)["step"] <= SAVED_AT]
    assert json.loads(before[-1])["step"] == KILLED_AT
    code, _, err = run(*COMMANDS[command], "--out", command, "--resume")
    assert code == 0, err
    after = metrics.read_text().splitlines()
    assert after[: len(kept)] == kept and after[len(kept)] != before[len(kept)]
    losses = uninterrupted(command)["losses"]
    assert [step for step, _ in updates(old / command)] == [step for step, _ in losses]
    assert [loss for _, loss in updates(old / command)] == pytest.approx([loss for _, loss in losses], rel=1e-4)
    model = (command,) if command == "pretrain" else ("model", "--adapter", command)
    assert run("generate", *model, "--prompt", "the quick", "--max-tokens", 2)[0] == 0


@pytest.mark.parametrize("command", ["lora", "dpo"])
def test_an_old_adapter_says_what_it_said(run: Run, command: str) -> None:
    adapter = f"{command}/checkpoints/step-{SAVED_AT:08d}"
    options = ("--prompt", "the quick ", "--max-tokens", 8, "--temp", 0, "--compute-dtype", "float32")
    code, text, err = run("generate", "model", "--adapter", adapter, *options)
    assert code == 0, err
    assert text == uninterrupted(command)["says"]
    assert run("generate", "model", *options)[1] != text


def test_another_setting_is_still_noticed(run: Run) -> None:
    code, _, err = run(*COMMANDS["lora"], "--out", "lora", "--resume", "--seed", 1)
    assert code == 2 and "seed" in err
    code, _, err = run(*COMMANDS["pretrain"], "--out", "pretrain", "--resume", "--set", "optimizer.lr=0.02")
    assert code == 2 and "optimizer.lr" in err


def test_old_runs_are_reported(run: Run, old: Path) -> None:
    code, _, err = run("report", *COMMANDS, "--out", "page.html")
    assert code == 0, err
    page = (old / "page.html").read_text()
    assert all(command in page for command in COMMANDS) and "valid_margin" in page


@pytest.mark.skipif(mx.default_device().type == mx.gpu, reason="scores of a CPU are not gone on with on a GPU")
def test_an_evaluation_goes_on_from_its_items(run: Run, old: Path) -> None:
    items = (old / "eval" / "items.jsonl").read_text()
    assert run(*EVAL, "--limit", 8, "--out", "again")[0] == 0
    code, text, err = run("eval", "--compare", "eval", "again")
    assert code == 0, err
    assert text.count("+0.00") >= 2, "acc and acc_norm"
    code, _, err = run(*EVAL, "--out", "eval")
    assert code == 0, err
    grown = (old / "eval" / "items.jsonl").read_text()
    assert grown.startswith(items) and grown.count("\n") == items.count("\n") + 4
