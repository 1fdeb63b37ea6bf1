"""The batches of reinforcement learning: answers that the policy gave to drawn problems, judged and weighed.

Also a validation by the same means, on held-out problems.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from threading import Event
from typing import Any

import numpy as np

from elm_mlx.callbacks import Sample
from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.solving import SolvedProblem
from elm_mlx.problems.checked_task import Verdict
from elm_mlx.problems.drawn_problems import DrawnProblem
from elm_mlx.problems.pass_rates import pass_rate
from elm_mlx.train.policy import Policy
from elm_mlx.train.policy_gradient import AnswerBatch, WeighedAnswer, batches_of, group_advantages

_MOST_ROUNDS = 8  # of an update's problems, all without anything to learn from, before the run ends
_SHOWN = 3  # samples of a validation


class RolloutBatches:
    """Samples answers for each update, or for several, and gives them as batches.

    A group whose answers are all right or all wrong says nothing of which are better, and is left out, and so is an
    answer that was cut off. Where nothing is left of an update's problems, as many more are drawn.

    Args:
        policy: gives the answers.
        draw: returns the problem of a number.
        problems: of an update.
        rows: answers in a batch.
        repeats: updates that are made by the same answers.
        by_deviation: as of `group_advantages`.
        together: as of `batches_of`.

    Attributes:
        measures: of the last answers: the mean reward, pass@k, tokens of an answer, shares of answers that were cut off
            and of groups left out, nats of entropy a token, and the seconds that sampling took.
    """

    def __init__(
        self, policy: Policy, draw: Callable[[int], DrawnProblem], problems: int, rows: int,
        repeats: int = 1, by_deviation: bool = False, together: bool = True,
    ) -> None:  # fmt: skip
        self._policy, self._draw, self._problems, self._rows = policy, draw, problems, rows
        self._repeats, self._by_deviation, self._together = repeats, by_deviation, together
        self._next = self._left = 0  # the next problem's number, and updates that the answers still serve
        self._answers: list[WeighedAnswer] = []
        self.measures: dict[str, float] = {}

    def update(self, stop: Event) -> list[AnswerBatch]:
        """Returns the batches of the next update; none once `stop` is set, and the next call makes the same ones.

        Raises ElmError where there is nothing to learn from.
        """
        if self._left:
            self.measures["sampling_seconds"] = 0.0
        elif self._sample(stop):
            self._left = self._repeats
        else:
            return []
        self._left -= 1
        return batches_of(self._answers, self._rows, self._together)

    def state(self) -> dict[str, Any]:
        """Returns the position as JSON's types, which `resume` takes; with answers that serve another update."""
        kept = [asdict(answer) for answer in self._answers] if self._left else []
        return {"problem": self._next, "left": self._left, "answers": kept, "measures": dict(self.measures)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Moves to where `state` was taken. Raises InputError where it is damaged."""
        try:
            self._next, self._left, self.measures = state["problem"], state["left"], {**state["measures"]}
            self._answers = [
                WeighedAnswer(tuple(each["prompt"]), tuple(each["tokens"]), tuple(each["logprobs"]), each["advantage"])
                for each in state["answers"]
            ]
            if self._next < 0 or not 0 <= self._left < self._repeats or bool(self._left) != bool(self._answers):
                raise ValueError(state)
        except (KeyError, TypeError, ValueError):
            raise InputError("cannot resume: the position in the problems is damaged") from None

    def _sample(self, stop: Event) -> bool:
        """Samples what is to be learnt; returns False, as if nothing had been, once `stop` is set."""
        started, solved, answers = time.perf_counter(), list[SolvedProblem](), list[WeighedAnswer]()
        while not answers and len(solved) < _MOST_ROUNDS * self._problems:
            first = self._next + len(solved)
            found = self._policy.solve(
                [self._draw(number) for number in range(first, first + self._problems)], "sampling answers", stop
            )
            if not found:
                return False
            solved += found
            answers = [answer for each in found for answer in self._weighed(each)]
        self.measures = measured(solved) | {"sampling_seconds": time.perf_counter() - started}
        if not answers:
            raise ElmError(_nothing_to_learn(self.measures, len(solved)))
        self._next, self._answers = self._next + len(solved), answers
        return True

    def _weighed(self, solved: SolvedProblem) -> list[WeighedAnswer]:
        """Returns what is to be learnt from the answers to a problem."""
        rewards = np.array([answer.verdict is Verdict.RIGHT for answer in solved.answers], np.float64)
        if rewards.min() == rewards.max():
            return []
        prompt, advantages = self._policy.prompt(solved.drawn), group_advantages(rewards, self._by_deviation).tolist()
        return [
            WeighedAnswer(prompt, answer.rollout.tokens, answer.rollout.logprobs, advantage)
            for answer, advantage in zip(solved.answers, advantages, strict=True) if answer.ended
        ]  # fmt: skip


def measured(solved: Sequence[SolvedProblem]) -> dict[str, float]:
    """Returns the measures of answers, as `RolloutBatches` has them, but for the time."""
    answers = [answer for each in solved for answer in each.answers]
    logprobs = [logprob for answer in answers for logprob in answer.rollout.logprobs]
    groups = [each.count for each in solved]
    most = groups[0][1]
    return {
        "reward": sum(right for right, _ in groups) / len(answers),
        f"pass@{most}": sum(right > 0 for right, _ in groups) / len(groups),
        "length": len(logprobs) / len(answers),
        "truncated": sum(not answer.ended for answer in answers) / len(answers),
        "entropy": -sum(logprobs) / len(logprobs),
        "skipped_groups": sum(right in (0, of) for right, of in groups) / len(groups),
    }


@dataclass(frozen=True)
class HeldOut:
    """A validation: the policy's answers to held-out problems, the same at each, drawn by the same luck.

    Its loss is the share of wrong answers, 1 - pass@1.
    """

    policy: Policy
    problems: Sequence[DrawnProblem]

    def examine(self, stop: Event) -> tuple[float, dict[str, float], list[Sample]]:
        """Returns the loss, measures, and samples: the first answers to a few of the problems.

        Once `stop` is set, it asks no more, and the loss is not a number.
        """
        solved = self.policy.solve(self.problems, "validating", stop)
        if not solved:
            return math.nan, {}, []
        found, counts = measured(solved), [each.count for each in solved]
        rates = {k: pass_rate(counts, k).rate for k in (1, counts[0][1])}
        measures = {f"pass@{k}": rate for k, rate in rates.items()}
        measures |= {name: found[name] for name in ("length", "truncated", "entropy")}
        samples = [
            Sample(each.drawn.problem.prompt, each.answers[0].rollout.text, each.answers[0].verdict.value)
            for each in solved[:_SHOWN]
        ]
        return 1 - rates[1], measures, samples


def _nothing_to_learn(measures: Mapping[str, float], problems: int) -> str:
    """Says why no answer to so many problems can be learnt from, and what helps."""
    if measures["truncated"] > 0.5:
        return (
            f"{measures['truncated']:.0%} of the answers to {problems} problems were cut off by --max-tokens, and are "
            "not learnt from: allow more, or teach the model to end by `elm-mlx lora` first"
        )
    what = "wrong: choose a lower --difficulty, or teach the model by `elm-mlx lora` first"
    if measures["reward"] > 0.5:
        what = "right: choose a higher --difficulty"
    return f"all answers to each of {problems} problems were alike, most of them {what}"
