"""`elm-mlx grpo`: a tiny model learns what a program rewards, and goes on after any end as if there had been none."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from training_tasks import write_task

from elm_mlx.callbacks import Report, TrainingCallback
from elm_mlx.store.loading import load_model
from elm_mlx.train.reinforcement import Reinforcement
from elm_mlx.train.setting_fields import made
from elm_mlx.train.settings import GrpoSettings

QUICK = ("--difficulty", 1, "--max-tokens", 6, "--problems", 4, "--answers", 4, "--eval-problems", 8, "--lr", 0.02)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "letters.py")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose answers end at one token in five."""
    path = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(tiny_model_dir, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, *range(3, 60)]}))
    return path


@pytest.fixture
def grpo(run: Run, model: Path, task: Path) -> Any:
    return partial(run, "grpo", model, "--task", task, *QUICK)


def lines(out: Path) -> list[dict[str, Any]]:
    """The metrics, without what depends on the clock."""
    clock = {"seconds", "tokens_per_second", "memory", "sampling_seconds", "training_seconds"}
    found = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clock} for line in found]


@pytest.mark.parametrize("method", [(), ("--dora",), ("--full",), ("--updates-per-batch", 2, "--advantage", "std")])
def test_what_is_rewarded_comes_more_often(grpo: Any, model: Path, tmp_path: Path, method: Any) -> None:
    out = tmp_path / "out"
    code, said, err = grpo("--out", out, "--iters", 24, "--steps-per-eval", 12, *method)
    assert code == 0, err
    found = lines(out)
    validations = [line for line in found if "valid_loss" in line]
    rates = [line["valid_pass@1"] for line in validations]
    assert rates[-1] > rates[0] + 0.15 and all(line["valid_loss"] == 1 - line["valid_pass@1"] for line in validations)
    assert all(line["valid_pass@4"] >= line["valid_pass@1"] for line in validations)
    updates = [line for line in found if "loss" in line]
    assert len(updates) == 24 and updates[-1]["learning_rate"] == 0
    for name in ("reward", "pass@4", "length", "truncated", "entropy", "skipped_groups"):
        assert all(name in line for line in updates)
    assert ("clipped" in updates[0]) == ("--updates-per-batch" in method)
    assert re.search(r"step 0: held-out problems: pass@1 [\d.]+, pass@4 [\d.]+, entropy [\d.]+", said)
    assert re.search(r"  (right|wrong): [a-z ]+ → \S", said) and re.search(
        r", \d+% sampling \(\d+\.\d s\), \d+% training \(\d+\.\d s\), ", said
    )
    assert re.search(r"best      [\d.]+% of the answers to held-out problems right, after (12|24) updates", said)
    assert load_model(model, adapter_path=out) is not None


def test_a_quantized_base_learns_by_an_adapter(run: Run, model: Path, task: Path, tmp_path: Path) -> None:
    packed, out = tmp_path / "packed", tmp_path / "out"
    assert run("quantize", model, packed, "--bits", 4, "--group-size", 32)[0] == 0
    code, _, err = run("grpo", packed, "--task", task, *QUICK, "--out", out, "--iters", 24)
    assert code == 0, err
    rates = [line["valid_pass@1"] for line in lines(out) if "valid_loss" in line]
    assert rates[-1] > rates[0] + 0.1
    code, _, err = run("grpo", packed, "--task", task, *QUICK, "--out", tmp_path / "full", "--full")
    assert code == 2 and "quantized" in err


def test_a_run_that_has_only_harmed_says_so(grpo: Any, tmp_path: Path) -> None:
    """A rate that breaks the model: what is rewarded comes no more often, and patience ends the run."""
    out = tmp_path / "out"
    broken = ("--lr", 30, "--warmup", 0, "--steps-per-eval", 1, "--patience", 1)
    code, said, err = grpo("--out", out, "--iters", 9, *broken)
    losses = [line["valid_loss"] for line in lines(out) if "valid_loss" in line]
    assert code == 0 and len(losses) == 2 and losses[1] >= losses[0]
    before, after = (f"{1 - loss:.1%}" for loss in losses)
    assert f"no validation had more right answers than the {before} before training" in err
    assert f"and the last one had {after}" in err
    assert f"{out}: what the last update left, no better than the model without it" in said
    assert "early, after 1 update: 1 validation in a row without more right answers" in said


def test_a_run_that_is_stopped_before_a_validation_has_not_harmed(model: Path, task: Path, tmp_path: Path) -> None:
    """Losses of weighed answers are near 0 and rise by chance."""

    class Stopping(TrainingCallback):
        def report(self, report: Report) -> None:
            if report.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    values = {"model": model, "task": str(task), "out": tmp_path / "out", "max_tokens": 6, "problems": 4, "answers": 4}
    with Reinforcement(made(GrpoSettings, values | {"difficulty": "1", "eval_problems": 8})) as run:
        result = run.train(Stopping())
    assert result.interrupted and result.progress.step == 3
    assert replace(result, progress=replace(result.progress, loss_mean=9.0)).harm is None


@pytest.mark.parametrize(("stopped_at", "saved"), [("sampling answers", 2), ("validating", 5)])
def test_stopped_amid_answers_and_resumed(model: Path, task: Path, tmp_path: Path, stopped_at: str, saved: int) -> None:
    """Ctrl-C waits for no further answer; what was sampled is sampled again, to the bit."""

    class Stopping(TrainingCallback):
        def __init__(self) -> None:
            self.step, self.answers = 0, 0

        def report(self, report: Report) -> None:
            self.step = report.step

        def progress(self, what: str, done: int = 0, total: int = 0, /) -> None:
            if self.step == saved and what == stopped_at and done:
                self.answers += 1
                if done == 3:
                    os.kill(os.getpid(), signal.SIGINT)

    values = {
        "model": model, "task": str(task), "out": tmp_path / "out", "max_tokens": 6, "problems": 4, "answers": 4,
        "difficulty": "1", "eval_problems": 8, "iters": 8, "steps_per_eval": 5, "learning_rate": 0.02,
    }  # fmt: skip
    callback = Stopping()
    with Reinforcement(made(GrpoSettings, values)) as run:
        result = run.train(callback)
    assert result.interrupted and result.progress.step == saved and callback.answers == 3
    with Reinforcement(made(GrpoSettings, values), resume=True) as run:
        assert not run.train().interrupted
    with Reinforcement(made(GrpoSettings, values | {"out": tmp_path / "whole"})) as run:
        run.train()
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")


def test_a_run_says_what_it_is_going_to_do(grpo: Any, tmp_path: Path) -> None:
    said = grpo("--out", tmp_path / "out", "--iters", 1)[1]
    assert "task      letters, difficulty 1; 8 held-out problems to validate\n" in said
    assert "answers   4 problems at a time, 4 answers to each, of 6 tokens at most; 32 in a batch\n" in said


@pytest.mark.parametrize("repeats", [1, 3])
def test_killed_and_resumed(model: Path, task: Path, tmp_path: Path, repeats: int) -> None:
    """Twice killed without warning, a run's losses, measures and samples are those of one that lived, to the bit."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-m", "elm_mlx", "grpo", str(model), "--task", str(task), *map(str, QUICK)]
    options = ["--iters", "24", "--steps-per-eval", "5", "--save-every", "2", "--updates-per-batch", str(repeats)]
    subprocess.run([*command, "--out", str(whole), *options], check=True, capture_output=True)
    for after, resume in ((4, []), (13, ["--resume"])):
        with subprocess.Popen([*command, "--out", str(out), *options, *resume], stdout=subprocess.DEVNULL) as process:
            while not ((out / "metrics.jsonl").exists() and f'"step": {after},' in (out / "metrics.jsonl").read_text()):
                assert process.poll() is None
            process.kill()
    subprocess.run([*command[:4], "--out", str(out), "--resume"], check=True, capture_output=True)
    assert lines(out) == lines(whole)
    assert any("samples" in line for line in lines(out))


def test_what_would_change_a_resumed_run_is_refused(grpo: Any, run: Run, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert grpo("--out", out, "--iters", 2)[0] == 0
    for option, value in (("--answers", 5), ("--problems", 3), ("--max-tokens", 7), ("--advantage", "std"),
                          ("--eval-problems", 3)):  # fmt: skip
        code, _, err = grpo("--out", out, "--iters", 2, "--resume", option, value)
        assert code == 2 and f"was trained with {option}" in err
    code, _, err = grpo("--out", out, "--iters", 2, "--resume", "--difficulty", "1-2")
    assert code == 2 and "was trained on other data" in err
    task.write_text(task.read_text().replace('"aeiou"', '"xyz e"'))
    code, _, err = grpo("--out", out, "--iters", 2, "--resume")
    assert code == 2 and "was trained on other data" in err


def test_what_cannot_be_is_refused(run: Run, tiny_model_dir: Path, task: Path, tmp_path: Path) -> None:
    def refused(message: str, *arguments: object) -> None:
        code, _, err = run("grpo", tiny_model_dir, "--out", tmp_path / "out", *arguments)
        assert code == 2 and message in err

    refused("--task is missing: give it on the command line")
    refused("no such task", "--task", "poetry")
    refused("--difficulty 3: the task letters has 1 to 2", "--task", task, "--difficulty", 3)
    refused("--answers 1: a whole number from 2, for answers are compared, is needed", "--task", task, "--answers", 1)
    refused("--max-tokens 0: a whole number from 1 is needed", "--task", task, "--max-tokens", 0)


def test_it_begins_with_an_adapter(grpo: Any, tmp_path: Path) -> None:
    """What one run has left is what the next one's first validation finds."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert grpo("--out", first, "--iters", 12, "--steps-per-eval", 12)[0] == 0
    assert grpo("--out", second, "--iters", 1, "--from", first)[0] == 0
    left, found = ([line for line in lines(out) if "valid_loss" in line] for out in (first, second))
    assert found[0]["valid_pass@1"] == pytest.approx(left[-1]["valid_pass@1"], abs=0.05)


def test_the_template_of_the_adapter_that_it_begins_with_stays(
    grpo: Any, run: Run, model: Path, tmp_path: Path
) -> None:
    """Prompts are asked by it, again after a resume, and it goes with what the run leaves."""
    first, second = tmp_path / "first", tmp_path / "second"
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "the quick fox", "completion": "e"}\n' * 4)
    lora = ("lora", model, "--data", data, "--out", first, "--iters", 1, "--template", "openelm-instruct")
    assert run(*lora)[0] == 0
    assert grpo("--out", second, "--iters", 3, "--from", first, "--answers", 8)[0] == 0
    assert "<|system|>" in (first / "chat_template.jinja").read_text()
    assert (second / "chat_template.jinja").read_text() == (first / "chat_template.jinja").read_text()
    code, _, err = grpo("--out", second, "--iters", 3, "--resume", "--answers", 8, "--template", "none")
    assert code == 2 and "was trained with --template" in err
