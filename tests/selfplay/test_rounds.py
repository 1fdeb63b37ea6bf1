"""Rounds of sampling and training: killed in each phase and gone on with, they leave what an unbroken loop leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import guesses
import pytest

from elm_mlx.errors import ElmError, InputError
from elm_mlx.problems.pass_rates import pass_rate
from elm_mlx.selfplay.answer_sampling import Sampling, SamplingSettings
from elm_mlx.selfplay.rounds import RoundResult, Rounds

TRAINING = {"iters": 6, "batch_size": 2, "learning_rate": 2e-4, "max_seq_length": 64, "save_every": 2}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> SamplingSettings:
    model, task = guesses.write(tmp_path_factory.mktemp("guesses"), tiny_tokenizer_file)
    return SamplingSettings(model, str(task), answers=4, max_tokens=4, difficulty="1")


def loop(asked: SamplingSettings, out: Path, rounds: int = 2, **training: Any) -> list[RoundResult]:
    with Rounds(Sampling(asked), 128, 20, out, {**TRAINING, **training}) as made:
        return list(made.run(rounds))


def left(out: Path) -> dict[str, bytes]:
    """What a loop leaves, but for the times in its runs' records."""
    kept = ("*.json", "*.answers", "*/data.jsonl*", "*/*.answers", "*/adapter/adapters.safetensors")
    return {str(path.relative_to(out)): path.read_bytes() for each in kept for path in out.glob(each)}


@pytest.fixture(scope="module")
def whole(asked: SamplingSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RoundResult]]:
    out = tmp_path_factory.mktemp("whole") / "loop"
    return out, loop(asked, out)


def test_each_round_samples_trains_and_measures(whole: tuple[Path, list[RoundResult]]) -> None:
    out, results = whole
    assert [each.number for each in results] == [0, 1, 2]
    assert {len(each.held_out) for each in results} == {20}
    assert [[problem.prompt for problem in each.held_out] for each in results] == 3 * [
        [problem.prompt for problem in results[0].held_out]
    ]
    one, two = ([problem.number for problem in each.sampled] for each in results[1:])
    assert [*one, *two] == [*range(64)]
    lines = [json.loads(line) for number in (1, 2) for line in (out / f"round-{number}/data.jsonl").open()]
    assert len(lines) == results[2].examples > results[1].examples > 0
    assert len({(line["prompt"], line["completion"]) for line in lines}) == len(lines)
    adapters = {line["source"].get("adapter") for line in lines}
    assert len(adapters) == 2 and None in adapters  # the first round samples without one
    assert {line["source"]["round"] for line in lines} == {1, 2}
    trained = [(out / f"round-{number}/adapter/adapters.safetensors").read_bytes() for number in (1, 2)]
    assert trained[0] != trained[1]
    assert results[0].held_out not in (results[1].held_out, results[2].held_out)


def test_it_learns(asked: SamplingSettings, tmp_path: Path) -> None:
    """Of the verdicts of this task, the model can learn to end after one guess."""
    results = loop(asked, tmp_path / "loop", 1, iters=60)
    before, after = (
        sum(len(answer.text) == 1 for problem in each.held_out for answer in problem.answers) for each in results
    )
    assert after > before


@pytest.mark.parametrize("full", [False, True])
def test_it_begins_with_an_adapter_and_goes_on_training_what_that_trained(
    asked: SamplingSettings, tmp_path: Path, full: bool
) -> None:
    rate = 2e-5 if full else 2e-4
    first = loop(asked, tmp_path / "first", 1, full=full, learning_rate=rate)
    warm = tmp_path / "first" / "round-1" / "adapter"
    begun = replace(asked, adapter=warm, seed=1)
    results = loop(begun, tmp_path / "second", 1, learning_rate=rate)
    settings = json.loads((tmp_path / "second" / "round-1" / "adapter" / "run.json").read_text())["settings"]
    assert settings["full"] == full and settings["from_adapter"] == str(warm)
    assert first[1].held_out != results[0].held_out  # of the same adapter, by another seed
    assert {line["source"]["seed"] for line in map(json.loads, (tmp_path / "second/round-1/data.jsonl").open())} == {1}


def test_a_loop_that_has_ended_is_gone_on_with(asked: SamplingSettings, tmp_path: Path, whole: Any) -> None:
    out = tmp_path / "loop"
    assert loop(asked, out, 1) == whole[1][:2]
    assert loop(asked, out, 2) == whole[1]
    assert left(out) == left(whole[0])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert loop(asked, out, 2) == whole[1]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def write_program(path: Path, asked: SamplingSettings) -> None:
    path.write_text(f"""
import sys, time
from pathlib import Path
import elm_mlx
from elm_mlx.callbacks import TrainingCallback
from elm_mlx.selfplay.rounds import Rounds
from elm_mlx.selfplay.answer_sampling import Sampling, SamplingSettings

class Slow(TrainingCallback):
    def report(self, report):
        time.sleep(0.05)

asked = SamplingSettings(Path({str(asked.model)!r}), {asked.task!r}, answers=4, max_tokens=4, difficulty="1")
with Rounds(Sampling(asked), 128, 20, Path(sys.argv[1]), {TRAINING!r}) as made:
    for result in made.run(2, lambda run: run.train(Slow()), lambda *state: time.sleep(0.01)):
        pass
""")


def lines_of(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


PHASES: list[Callable[[Path], bool]] = [
    lambda out: lines_of(out / "start.answers") > 5,
    lambda out: lines_of(out / "round-1/data.jsonl.answers") > 9,
    lambda out: lines_of(out / "round-1/adapter/metrics.jsonl") > 2,
    lambda out: lines_of(out / "round-1/held-out.answers") > 3,
    lambda out: lines_of(out / "round-2/data.jsonl.answers") > 20,
    lambda out: lines_of(out / "round-2/adapter/metrics.jsonl") > 4,
]


def test_killed_in_each_phase(asked: SamplingSettings, tmp_path: Path, whole: Any) -> None:
    out, program = tmp_path / "loop", tmp_path / "program.py"
    write_program(program, asked)
    command = [sys.executable, str(program), str(out)]
    for reached in PHASES:
        with subprocess.Popen(command) as process:
            deadline = time.monotonic() + 60
            while not reached(out):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
    subprocess.run(command, check=True, timeout=120)
    assert left(out) == left(whole[0])


def test_what_was_asked_for_cannot_change(asked: SamplingSettings, tmp_path: Path) -> None:
    out = tmp_path / "loop"
    Rounds(Sampling(asked), 128, 20, out, TRAINING).__exit__()
    for samples, measured, training, said in (
        (256, 20, TRAINING, "--samples = 128, not 256"), (128, 21, TRAINING, "--measure = 20, not 21"),
        (128, 20, TRAINING | {"iters": 7}, "--config = "),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            Rounds(Sampling(asked), samples, measured, out, training)


def test_a_directory_of_something_else_is_refused(asked: SamplingSettings, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else than a loop"):
        Rounds(Sampling(asked), 128, 20, tmp_path, TRAINING)
    with pytest.raises(InputError, match="is a file"):
        Rounds(Sampling(asked), 128, 20, tmp_path / "notes.txt", TRAINING)
    for name, value in (("data", ("x",)), ("template", "none")):
        with pytest.raises(InputError, match=f"{name}: is decided by the loop"):
            Rounds(Sampling(asked), 128, 20, tmp_path / "new", {name: value})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_two_processes_do_not_share_a_loop(asked: SamplingSettings, tmp_path: Path) -> None:
    with Rounds(Sampling(asked), 128, 20, tmp_path / "loop", TRAINING), pytest.raises(ElmError, match="is writing to"):
        Rounds(Sampling(asked), 128, 20, tmp_path / "loop", TRAINING)


def test_pass_rates_of_the_rounds_are_those_of_their_records(whole: tuple[Path, list[RoundResult]]) -> None:
    for result, path in zip(
        whole[1], ("start.answers", "round-1/held-out.answers", "round-2/held-out.answers"), strict=True
    ):
        lines = [json.loads(line) for line in (whole[0] / path).read_text().splitlines()[1:]]
        counts = [(sum(each["verdict"] == "right" for each in line["answers"]), 4) for line in lines]
        assert pass_rate([each.count for each in result.held_out], 4) == pass_rate(counts, 4)
