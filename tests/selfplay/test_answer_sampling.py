"""Sampling into a record: cut anywhere and gone on with, it has the bytes of an unbroken run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import guesses
import mlx.core as mx
import pytest

from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.solving import solve
from elm_mlx.problems.drawn_problems import is_held_out, training_problem
from elm_mlx.selfplay.answer_record import AnswerRecord, recorded
from elm_mlx.selfplay.answer_sampling import Sampling, SamplingSettings
from elm_mlx.store import adapters
from elm_mlx.store.loading import load, load_model


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> SamplingSettings:
    model, task = guesses.write(tmp_path_factory.mktemp("guesses"), tiny_tokenizer_file)
    return SamplingSettings(model, str(task), answers=4, max_tokens=4)


def sample(asked: SamplingSettings, path: Path, count: int, first: int = 0) -> bytes:
    sampling = Sampling(asked)
    with AnswerRecord(path, sampling.identity, first) as record:
        assert len(sampling.sample(record, count, first=first)) == count
    return path.read_bytes()


def test_a_record_that_was_cut_becomes_the_same_bytes(asked: SamplingSettings, tmp_path: Path) -> None:
    whole = sample(asked, tmp_path / "whole", 70)
    for lines in (0, 1, 20, 33, 64, 70):
        (tmp_path / "cut").write_bytes(b"".join(whole.splitlines(keepends=True)[: 1 + lines]) + b'{"number"')
        assert sample(asked, tmp_path / "cut", 70) == whole
    fewer = sample(asked, tmp_path / "fewer", 40)
    assert whole.startswith(fewer)  # so that more may be asked for later
    assert sample(asked, tmp_path / "fewer", 70) == whole


def test_problems_are_of_what_is_solved_sometimes_and_none_is_held_out(asked: SamplingSettings, tmp_path: Path) -> None:
    sampling = Sampling(asked)
    with AnswerRecord(tmp_path / "a", sampling.identity) as record:
        problems = sampling.sample(record, 160)
    assert [each.number for each in problems] == [*range(160)]
    assert [each.difficulty for each in problems[:4]] == [1, 2, 1, 2]
    hard = sum(each.difficulty == 2 for each in problems[32:])  # never solved
    assert 4 <= hard <= 28  # a ninth of 128
    assert not any(is_held_out(each.prompt) for each in problems)
    assert 5 <= sum(each.held_out for each in problems) <= 50  # a seventh of 160


@pytest.mark.parametrize("dora", [False, True])
def test_it_samples_what_an_adapter_beside_the_model_answers(
    asked: SamplingSettings, tmp_path: Path, dora: bool
) -> None:
    model = load_model(asked.model, "float32")
    adapter = adapters.plan(model.config, rank=4, dora=dora)
    adapters.attach(model, adapter)
    for number, (_, module) in enumerate(model.named_modules()):
        if "lora_b" in module:
            module.lora_b = 0.3 * mx.random.normal(module.lora_b.shape, key=mx.random.key(number))
    adapters.save(tmp_path / "adapter", model, adapter)
    adapted = Sampling(replace(asked, adapter=tmp_path / "adapter"))
    problems = [training_problem(adapted.task, [1], 0, number) for number in range(20)]
    beside, tokenizer = load(asked.model, adapter_path=tmp_path / "adapter")
    expected = solve(
        beside, tokenizer, None, adapted.task, problems, asked.answers, max_tokens=asked.max_tokens, seed=asked.seed
    )
    assert [*adapted.solve(problems)] == [recorded(each) for each in expected]
    alone = [*Sampling(asked).solve(problems)]
    assert dora or alone != [*adapted.solve(problems)]  # DoRA leaves the length of weights, which decides here


def test_rounds_have_other_problems(asked: SamplingSettings, tmp_path: Path) -> None:
    first, second = sample(asked, tmp_path / "a", 8), sample(asked, tmp_path / "b", 8, first=8)
    prompts = [json.loads(line)["prompt"] for part in (first, second) for line in part.splitlines()[1:]]
    assert len({*prompts}) == 16


def test_held_out_files_are_left_out(asked: SamplingSettings, tmp_path: Path) -> None:
    drawn = [json.loads(line)["prompt"] for line in sample(asked, tmp_path / "a", 8).splitlines()[1:]]
    lines = [json.dumps({"prompt": prompt.upper(), "completion": "1"}) + "\n" for prompt in drawn]
    (tmp_path / "held.jsonl").write_text("".join(lines))
    others = replace(asked, held_out=(str(tmp_path / "held.jsonl"),))
    now = [json.loads(line)["prompt"] for line in sample(others, tmp_path / "b", 8).splitlines()[1:]]
    assert not {*now} & {*drawn}


def test_measured_problems_are_all_held_out_and_the_same_for_every_seed(
    asked: SamplingSettings, tmp_path: Path
) -> None:
    found = []
    for seed in (0, 1):
        sampling = Sampling(replace(asked, seed=seed))
        with AnswerRecord(tmp_path / f"{seed}", sampling.identity) as record:
            found.append(sampling.measure(record, 30))
            assert sampling.measure(record, 20) == found[-1][:20]
    assert [each.prompt for each in found[0]] == [each.prompt for each in found[1]]
    assert all(is_held_out(each.prompt) for each in found[0])
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "--seed = 0, not 1"), ({"temp": 0.5}, "--temp = 1.0, not 0.5"),
        ({"answers": 5}, "--answers = 4, not 5"), ({"max_tokens": 9}, "--max-tokens = 4, not 9"),
        ({"difficulty": "1"}, "--difficulty = 1-2, not 1-1"), ({"template": "openelm-instruct"}, "the chat template"),
    ],
)  # fmt: skip
def test_a_record_of_other_settings_is_refused(
    asked: SamplingSettings, tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    AnswerRecord(tmp_path / "a", Sampling(asked).identity).__exit__(None, None, None)
    with pytest.raises(InputError, match=name):
        AnswerRecord(tmp_path / "a", Sampling(replace(asked, **change)).identity)


def test_a_record_of_another_model_or_task_file_is_refused(
    asked: SamplingSettings, tmp_path: Path, tiny_tokenizer_file: Path, tiny_model_dir: Path
) -> None:
    AnswerRecord(tmp_path / "a", Sampling(asked).identity).__exit__(None, None, None)
    with pytest.raises(InputError, match="with MODEL = "):
        AnswerRecord(tmp_path / "a", Sampling(replace(asked, model=tiny_model_dir)).identity)
    _, task = guesses.write(tmp_path / "other", tiny_tokenizer_file)
    task.write_text(task.read_text() + "\n# changed\n")
    with pytest.raises(InputError, match="the task's file"):
        AnswerRecord(tmp_path / "a", Sampling(replace(asked, task=str(task))).identity)


def test_nothing_solved_ends_early_and_says_what_helps(asked: SamplingSettings, tmp_path: Path) -> None:
    sampling = Sampling(replace(asked, difficulty="2"))
    with AnswerRecord(tmp_path / "a", sampling.identity) as record:
        with pytest.raises(ElmError, match=r"none of 256 answers is right \(\d+ wrong, \d+ unreadable, .*--solutions"):
            sampling.sample(record, 1000)
        assert len(record.problems) == 64
        with pytest.raises(ElmError, match="none of 256 answers is right"):
            sampling.sample(record, 1000)


def test_answers_that_never_end_are_said(asked: SamplingSettings, tmp_path: Path) -> None:
    sampling = Sampling(replace(asked, max_tokens=1))
    with (
        AnswerRecord(tmp_path / "a", sampling.identity) as record,
        pytest.raises(ElmError, match="none of 16 answers came to an end within --max-tokens 1,"),
    ):
        sampling.sample(record, 4)


def test_a_judge_that_fails_is_named_with_its_file(asked: SamplingSettings, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    text = guesses.TASK.replace(
        "    if len(answer) != 1:", "    if answer == '3':\n        raise ValueError('three')\n    if len(answer) != 1:"
    )
    broken.write_text(text)
    sampling = Sampling(replace(asked, task=str(broken)))
    with (
        AnswerRecord(tmp_path / "a", sampling.identity) as record,
        pytest.raises(ElmError, match=r"broken.py: judge fails on '3': ValueError: three"),
    ):
        sampling.sample(record, 40)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": 0}, "--answers 0"), ({"temp": 0.0}, "--temp 0: answers are drawn"),
        ({"temp": float("nan")}, "--temp nan"), ({"max_tokens": 0}, "max_tokens"), ({"seed": -1}, "seed is -1"),
        ({"task": "knitting"}, "knitting: no such task"), ({"difficulty": "7"}, "has 1 to 2"),
        ({"model": Path("nowhere")}, "nowhere: no such directory"),
        ({"adapter": Path("nowhere")}, "nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_read(
    asked: SamplingSettings, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        Sampling(replace(asked, **change))
