"""`elm-mlx synthesize`: data of a model's right answers, what is printed of them, and rounds of training."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import guesses
import pytest
from commands import Run, modules_of, packages

QUICK = ("--answers", 4, "--max-tokens", 4)


@pytest.fixture
def run(run: Run) -> Run:
    """`elm-mlx synthesize`."""
    return partial(run, "synthesize")


@pytest.fixture(scope="module")
def guessing(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> tuple[Path, Path]:
    return guesses.write(tmp_path_factory.mktemp("guesses"), tiny_tokenizer_file)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_right_answers_and_pairs_are_written_and_said(run: Run, guessing: tuple[Path, Path], tmp_path: Path) -> None:
    model, task = guessing
    out, pairs = tmp_path / "data.jsonl", tmp_path / "pairs.jsonl"
    code, text, err = run(model, "--task", task, "--samples", 320, "--out", out, "--pairs", pairs, *QUICK)
    assert code == 0, err
    assert f"wrote       {out}: {len(read(out))} right answers; try: elm-mlx lora {model} --data {out}" in text
    assert f"wrote       {pairs}: {len(read(pairs))} pairs; try: elm-mlx dpo {model} --data {pairs}" in text
    rows = [line.split() for line in text.splitlines()]
    table = rows[rows.index(["difficulty", "problems", "pass@1", "pass@4", "answers"]) + 1 :][:2]
    assert table[0][0] == "1" and 20 < float(table[0][2].rstrip("%")) < 45
    assert table[1][0] == "2" and table[1][2] == "0.0%" and int(table[0][1]) + int(table[1][1]) == 80
    assert "right       Which of three is number " in text and "unreadable  Which of three" in text
    assert "sampled     320 answers, " in text and " tokens/s" in text
    assert "problems drawn and passed over" in text and "duplicates of right answers" in text
    again = run(model, "--task", task, "--samples", 320, "--out", out, *QUICK)
    assert again[0] == 0 and "sampled     nothing: all answers were in the record" in again[1]


def test_what_it_writes_goes_straight_into_lora_and_dpo(
    run: Run, guessing: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = guessing
    out, pairs = tmp_path / "data.jsonl", tmp_path / "pairs.jsonl"
    assert run(model, "--task", task, "--samples", 160, "--out", out, "--pairs", pairs, *QUICK)[0] == 0
    main: Run = run.func  # type: ignore[attr-defined]
    common = ("--iters", 2, "--batch-size", 2, "--max-seq-length", 64)
    code, text, err = main("lora", model, "--data", out, "--out", tmp_path / "lora", *common)
    assert code == 0, err
    assert f"{len(read(out))} examples" in text and "keys without meaning here: `source`" in text
    code, text, err = main("dpo", model, "--data", pairs, "--out", tmp_path / "dpo", *common)
    assert code == 0, err
    assert f"{len(read(pairs))} pairs" in text
    learnt = tmp_path / "lora"
    code, text, _ = run(
        model, "--adapter", learnt, "--task", task, "--samples", 160, "--out", tmp_path / "next", *QUICK
    )
    assert code == 0 and f"try: elm-mlx lora {model} --from {learnt} --data {tmp_path / 'next'} --out DIR" in text


def test_killed_and_called_again_it_writes_the_same_bytes(guessing: tuple[Path, Path], tmp_path: Path) -> None:
    model, task = guessing
    command = [sys.executable, "-m", "elm_mlx", "synthesize", str(model), "--task", str(task), "--samples", "4000"]
    command += [*map(str, QUICK), "--out"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    record = tmp_path / "out.jsonl.answers"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    for size in (1, 30_000):
        with subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while not (record.exists() and record.stat().st_size > size):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert not out.exists()
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert out.read_bytes() == whole.read_bytes()
    assert record.read_bytes() == (tmp_path / "whole.jsonl.answers").read_bytes()


def test_ctrl_c_is_answered_by_how_to_go_on(guessing: tuple[Path, Path], tmp_path: Path) -> None:
    model, task = guessing
    command = [sys.executable, "-m", "elm_mlx", "synthesize", str(model), "--task", str(task), "--samples", "4000000"]
    record = tmp_path / "out.jsonl.answers"
    with subprocess.Popen([*command, *map(str, QUICK), "--out", str(tmp_path / "out.jsonl")], stderr=-1) as process:
        while not (record.exists() and record.stat().st_size > 3000):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert f"stopped; the same command goes on from what is in {record}" in process.stderr.read().decode()
    assert process.returncode == 130


def test_other_settings_are_refused_until_it_begins_anew(run: Run, guessing: tuple[Path, Path], tmp_path: Path) -> None:
    model, task = guessing
    common = (model, "--task", task, "--samples", 160, "--out", tmp_path / "data.jsonl", *QUICK)
    assert run(*common)[0] == 0
    code, _, err = run(*common, "--seed", 1)
    assert code == 2 and "holds answers with --seed = 0, not 1; leave it as it was" in err
    assert run(*common, "--seed", 1, "--overwrite")[0] == 0
    assert read(tmp_path / "data.jsonl")[0]["source"]["seed"] == 1


def test_solutions_need_no_model_and_no_mlx(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "solutions.jsonl"
    arguments = ("synthesize", "--task", "arithmetic", "--solutions", "--samples", 50, "--out", out)
    text, code, modules = modules_of(*arguments)
    assert code == 0 and "50 solutions; try: elm-mlx lora MODEL --data" in text
    assert not packages(modules) & {"mlx", "numpy", "transformers", "rich"}
    assert len(read(out)) == 50
    code, _, err = run(*arguments[1:])
    assert code == 2 and "exists already; pass --overwrite" in err
    assert run(*arguments[1:], "--overwrite")[0] == 0


def test_a_small_tasks_solutions_are_as_many_as_there_are(
    run: Run, guessing: tuple[Path, Path], tmp_path: Path
) -> None:
    common = ("--task", guessing[1], "--solutions", "--samples", 20_000, "--out", tmp_path / "all.jsonl")
    code, _, err = run(*common, "--difficulty", 1)
    count = len(read(tmp_path / "all.jsonl"))
    assert code == 0 and 7400 < count < 8200  # seven of eight of 9,000
    assert f"no more than {count:,} problems to train on" in err


def test_pass_rates_of_held_out_problems(run: Run, guessing: tuple[Path, Path], tmp_path: Path) -> None:
    model, task = guessing
    code, text, err = run(model, "--task", task, "--difficulty", 1, "--measure", 40, *QUICK)
    assert code == 0, err
    one, four = (line for line in text.splitlines() if line.startswith("measured"))
    assert "pass@1 " in one and "pass@4 " in four and "of 40 held-out problems" in four
    assert 15 < float(one.split()[2].rstrip("%")) < 45 < float(four.split()[2].rstrip("%")) < 100
    assert not list(tmp_path.iterdir())


def test_a_measurement_is_gone_on_with_and_read_by_programs(
    run: Run, guessing: tuple[Path, Path], tmp_path: Path
) -> None:
    """Killed amid it, the same command answers the rest; a larger one adds to what is there."""
    model, task = guessing
    common = [str(model), "--task", str(task), *map(str, QUICK)]
    command = [sys.executable, "-m", "elm_mlx", "synthesize", *common, "--measure", "2000", "--out"]
    record = tmp_path / "measured"
    with subprocess.Popen([*command, str(record)], stdout=subprocess.DEVNULL) as process:
        while not (record.exists() and record.stat().st_size > 5000):
            assert process.poll() is None
        process.kill()
    code, text, err = run(*common, "--measure", 40, "--out", record, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["problems"] == 40 and sum(found["answers"].values()) == 160
    assert 0 < found["pass@1"]["low"] < found["pass@1"]["rate"] < found["pass@1"]["high"] < 1
    assert found["pass@1"]["rate"] < found["pass@4"]["rate"] and found["of"]["--task"] == task.stem
    assert [each["difficulty"] for each in found["by difficulty"]] == [1, 2]
    assert sum(each["answers"].get("right", 0) for each in found["by difficulty"]) == found["answers"]["right"]
    assert json.loads(run(*common, "--measure", 40, "--json")[1]) == found
    kept = record.read_bytes()
    code, _, err = run(*common, "--measure", 40, "--out", record, "--seed", 1)
    assert code == 2 and "holds answers with --seed = 0, not 1" in err and record.read_bytes() == kept
    assert run(*common, "--measure", 5, "--out", record, "--seed", 1, "--overwrite")[0] == 0
    assert len(read(record)) == 1 + 5


def test_rounds_end_in_a_table(run: Run, guessing: tuple[Path, Path], tmp_path: Path) -> None:
    model, task = guessing
    config = tmp_path / "lora.yaml"
    config.write_text("iters: 2\nbatch-size: 2\nmax-seq-length: 64\n")
    common = (model, "--task", task, "--difficulty", 1, "--samples", 64, "--measure", 10, "--out", tmp_path / "loop")
    code, text, err = run(*common, *QUICK, "--loop", 2, "--config", config)
    assert code == 0, err
    lines = text.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("round  right of sampled"))
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["start", "1", "2"]
    assert lines[-1].endswith(f"--adapter {tmp_path / 'loop' / 'round-2' / 'adapter'} --prompt …")
    assert sum(line.startswith("held out") for line in lines) == 4
    again = run(*common, *QUICK, "--loop", 2, "--config", config)
    assert again[1].splitlines()[-5:] == lines[-5:]
    code, _, err = run(*common, *QUICK, "--loop", 2)
    assert code == 2 and "holds a loop with --config = " in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("M", "--samples", 8, "--out", "o"), "--task is missing: arithmetic"),
        (("M", "--task", "arithmetic", "--out", "o"), "--samples is missing"),
        (("M", "--task", "arithmetic", "--samples", 8), "--out is missing"),
        (("--task", "arithmetic", "--samples", 8, "--out", "o"), "MODEL: is missing; --solutions alone needs none"),
        (("M", "--task", "arithmetic", "--solutions", "--samples", 8, "--out", "o"), "MODEL: --solutions writes"),
        (("M", "--task", "arithmetic", "--samples", 8, "--out", "o", "--config", "c"), "--config: has options"),
        (("M", "--task", "arithmetic", "--samples", 8, "--out", "o", "--measure", 5), "--measure: measures by itself"),
        (("M", "--task", "arithmetic", "--samples", 8, "--out", "o", "--loop", 2, "--pairs", "p"), "--pairs: rounds"),
        (
            ("M", "--task", "arithmetic", "--samples", 8, "--out", "o", "--loop", 2, "--overwrite"),
            "--overwrite: a loop",
        ),
        (("M", "--task", "arithmetic", "--measure", 5, "--pairs", "p"), "--pairs: --measure writes no data"),
        (("M", "--task", "arithmetic", "--loop", 2, "--out", "o"), "--samples is missing"),
        (("M", "--task", "arithmetic", "--samples", 8, "--out", "o", "--json"), "--json: is for --measure by itself"),
        (("M", "--task", "arithmetic", "--samples", 8, "--out", "o", "--temp", 0), "--temp 0: answers are drawn"),
        (("M", "--task", "arithmetic", "--samples", 8, "--out", "o", "--held-out", "no.jsonl"), "no.jsonl"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    run: Run, guessing: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*(guessing[0] if each == "M" else each for each in arguments))
    assert code == 2 and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_task_that_fails_names_its_file(run: Run, guessing: tuple[Path, Path], tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(
        "def problem(difficulty, seed):\n    return 1 / 0\n\ndef judge(problem, answer):\n    return True\n"
    )
    code, _, err = run(guessing[0], "--task", task, "--samples", 8, "--out", tmp_path / "data.jsonl", *QUICK)
    assert code == 2 and f"{task}: problem(1, 0) fails: ZeroDivisionError" in err
