"""What is learnt from answers: groups that differ, answers that ended; and a position that can be kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from threading import Event
from typing import Any

import numpy as np
import pytest

from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.rollouts import Rollout
from elm_mlx.inference.solving import JudgedAnswer, SolvedProblem
from elm_mlx.problems.checked_task import Problem, Verdict
from elm_mlx.problems.drawn_problems import DrawnProblem
from elm_mlx.train.rollout_batches import HeldOut, RolloutBatches

Answers = list[tuple[bool, bool]]  # of each whether it is right, and whether it ended


class Scripted:
    """A policy whose answers to each problem are known."""

    def __init__(self, answers: Sequence[Answers]) -> None:
        self.answers, self.asked = answers, list[int]()

    def prompt(self, drawn: DrawnProblem) -> tuple[int, ...]:
        return (1, 10 + drawn.number)

    def solve(self, problems: Sequence[DrawnProblem], _: str, stop: Event) -> list[SolvedProblem]:
        self.asked += [drawn.number for drawn in problems]
        if stop.is_set():
            return []
        return [self._solved(drawn) for drawn in problems]

    def _solved(self, drawn: DrawnProblem) -> SolvedProblem:
        found = []
        for sample, (right, ended) in enumerate(self.answers[drawn.number % len(self.answers)]):
            length = 1 + sample
            tokens, logprobs = tuple(range(20, 20 + length)), (-0.5,) * length
            rollout = Rollout(0, sample, tokens, logprobs, f"{sample}", "stop" if ended else "length")
            verdict = Verdict.RIGHT if right else Verdict.WRONG if ended else Verdict.UNREADABLE
            found.append(JudgedAnswer(rollout, verdict, ended))
        return SolvedProblem(drawn, tuple(found))


def drawn(number: int) -> DrawnProblem:
    return DrawnProblem(number, 1, Problem(f"problem {number}", "x"))


RIGHT, WRONG, CUT = (True, True), (False, True), (False, False)
MIXED: list[Answers] = [[RIGHT, WRONG, WRONG, CUT], [WRONG] * 4, [RIGHT] * 4, [RIGHT, RIGHT, WRONG, RIGHT]]


def batches(answers: Sequence[Answers], problems: int = 4, **options: Any) -> tuple[RolloutBatches, Scripted]:
    policy: Any = Scripted(answers)
    return RolloutBatches(policy, drawn, problems, 3, **options), policy


def test_groups_that_agree_and_answers_that_were_cut_off_are_left_out() -> None:
    source, policy = batches(MIXED)
    made = source.update(Event())
    assert policy.asked == [0, 1, 2, 3] and [len(batch.inputs) for batch in made] == [3, 3, 3]
    rows = {
        (int(batch.inputs[row, 1]), int(batch.trained[row].sum())): float(batch.advantages[row].sum())
        / batch.trained[row].sum()
        for batch in made
        for row in range(3)
        if batch.trained[row].any()
    }
    # By problem and tokens. The answer that was cut off is of no worth to its group's mean too.
    first = {(10, 1): 0.75, (10, 2): -0.25, (10, 3): -0.25}
    assert rows == first | {(13, 1): 0.25, (13, 2): 0.25, (13, 3): -0.75, (13, 4): 0.25}
    measures = dict(source.measures)
    assert measures.pop("sampling_seconds") >= 0
    assert measures == {
        "reward": 8 / 16, "pass@4": 0.75, "length": 2.5, "truncated": 1 / 16, "entropy": 0.5, "skipped_groups": 0.5,
    }  # fmt: skip


def test_where_nothing_is_left_more_are_drawn() -> None:
    source, policy = batches([[WRONG, WRONG], [RIGHT, RIGHT], [WRONG, WRONG], [RIGHT, WRONG]], problems=2)
    assert len(source.update(Event())) == 1 and policy.asked == [0, 1, 2, 3]
    assert source.measures["skipped_groups"] == 0.75


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([WRONG, WRONG], "alike, most of them wrong: choose a lower --difficulty"),
        ([RIGHT, RIGHT], "alike, most of them right: choose a higher --difficulty"),
        ([CUT, CUT], "100% of the answers to 16 problems were cut off by --max-tokens"),
    ],
)
def test_a_task_that_teaches_nothing_ends_the_run(answers: Answers, message: str) -> None:
    source, policy = batches([answers], problems=2)
    with pytest.raises(ElmError, match=message):
        source.update(Event())
    assert policy.asked == list(range(16))


def test_answers_serve_several_updates() -> None:
    source, policy = batches(MIXED, repeats=3)
    first, second, third = (source.update(Event()) for _ in range(3))
    assert policy.asked == [0, 1, 2, 3]
    for batch, again, once_more in zip(first, second, third, strict=True):
        np.testing.assert_array_equal(batch.logprobs, again.logprobs)
        np.testing.assert_array_equal(batch.targets, once_more.targets)
    source.update(Event())
    assert policy.asked == list(range(8))


def test_what_is_stopped_is_made_again() -> None:
    """Whether answers were missing to the first problems of an update, or to more that were drawn in their place."""
    stop = Event()
    stop.set()
    source, policy = batches([[WRONG, WRONG], [RIGHT, RIGHT], [WRONG, WRONG], [RIGHT, WRONG]], problems=2)
    before = source.state()
    assert source.update(stop) == [] and source.state() == before
    expected = batches([[WRONG, WRONG], [RIGHT, RIGHT], [WRONG, WRONG], [RIGHT, WRONG]], problems=2)[0].update(Event())
    for batch, other in zip(source.update(Event()), expected, strict=True):
        np.testing.assert_array_equal(batch.targets, other.targets)
    assert policy.asked == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize("updates", [1, 2, 3, 4])
def test_it_goes_on_where_it_stood(updates: int) -> None:
    lived, _ = batches(MIXED, repeats=3)
    for _ in range(updates):
        lived.update(Event())
    state = json.loads(json.dumps(lived.state()))
    resumed, policy = batches(MIXED, repeats=3)
    resumed.resume(state)
    assert {**resumed.measures} == {**lived.measures}
    for _ in range(4):
        for batch, expected in zip(resumed.update(Event()), lived.update(Event()), strict=True):
            for name, value in vars(expected).items():
                np.testing.assert_array_equal(getattr(batch, name), value)
    assert min(policy.asked) == 4 if updates <= 3 else 8


@pytest.mark.parametrize(
    "damage", [{"left": 9}, {"left": 1}, {"problem": -1}, {"answers": [{}]}, {"problem": "x"}, {"measures": None}]
)
def test_a_damaged_position_is_refused(damage: dict[str, Any]) -> None:
    source, _ = batches(MIXED)
    source.update(Event())
    with pytest.raises(InputError, match="position in the problems is damaged"):
        source.resume(source.state() | damage)


def test_a_validation_counts_what_is_wrong() -> None:
    policy: Any = Scripted(MIXED)
    loss, measures, samples = HeldOut(policy, [drawn(number) for number in range(4)]).examine(Event())
    assert loss == pytest.approx(0.5)
    assert measures == {
        "pass@1": pytest.approx(0.5), "pass@4": 0.75, "length": 2.5, "truncated": 1 / 16, "entropy": 0.5,
    }  # fmt: skip
    assert [(sample.prompt, sample.answer, sample.verdict) for sample in samples] == [
        ("problem 0", "0", "right"), ("problem 1", "0", "wrong"), ("problem 2", "0", "right"),
    ]  # fmt: skip
