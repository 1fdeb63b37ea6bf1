"""A model's answers to the problems of a task, judged: several to each problem, the number of right ones for pass@k."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from elm_mlx.inference.rollouts import Rollout, prompt_ids, rollouts
from elm_mlx.model.network import Model
from elm_mlx.problems.checked_task import CheckedTask, Verdict
from elm_mlx.problems.drawn_problems import DrawnProblem
from elm_mlx.problems.pass_rates import Count
from elm_mlx.text.chat_template import Template
from elm_mlx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer and its verdict; one that has not `ended`, but was cut off, is not judged and UNREADABLE."""

    rollout: Rollout
    verdict: Verdict
    ended: bool


@dataclass(frozen=True)
class SolvedProblem:
    """A problem, and its answers by their numbers."""

    drawn: DrawnProblem
    answers: tuple[JudgedAnswer, ...]

    @property
    def count(self) -> Count:
        """The right answers, and all, as `pass_rate` takes them."""
        return sum(answer.verdict is Verdict.RIGHT for answer in self.answers), len(self.answers)


def solve(
    model: Model,
    tokenizer: Tokenizer,
    template: Template | None,
    task: CheckedTask,
    problems: Sequence[DrawnProblem],
    samples: int,
    *,
    max_tokens: int,
    seed: int,
    temp: float = 1.0,
    on_answer: Callable[[int], None] = lambda done: None,
) -> Iterator[SolvedProblem]:
    """Yields the problems in order, each with `samples` answers, as soon as those and all before are there.

    An answer depends on `seed`, the problem's number and its own, as `rollouts` says: not on which others are solved
    together with it.

    Args:
        template: None where the model continues the prompt.
        max_tokens: of an answer, at most.
        on_answer: called after each answer with how many there are.

    Raises:
        InputError: as `rollouts`.
        ElmError: the task's judge fails.
    """
    prompts = [prompt_ids(tokenizer, template, drawn.problem.prompt) for drawn in problems]
    numbers = [drawn.number for drawn in problems]
    waiting: list[list[JudgedAnswer]] = [[] for _ in problems]
    verdicts: list[dict[str, Verdict]] = [{} for _ in problems]  # a model that knows an answer gives it many times
    first = 0
    sampled = rollouts(
        model, tokenizer, prompts, samples, max_tokens=max_tokens, seed=seed, temp=temp, numbers=numbers,
        template=template,
    )  # fmt: skip
    for done, rollout in enumerate(sampled, start=1):
        known, ended = verdicts[rollout.problem], rollout.finish_reason == "stop"
        if ended and rollout.text not in known:
            known[rollout.text] = task.judge(problems[rollout.problem].problem, rollout.text)
        verdict = known[rollout.text] if ended else Verdict.UNREADABLE
        waiting[rollout.problem].append(JudgedAnswer(rollout, verdict, ended))
        on_answer(done)
        while first < len(problems) and len(waiting[first]) == samples:
            answers = sorted(waiting[first], key=lambda answer: answer.rollout.sample)
            yield SolvedProblem(problems[first], tuple(answers))
            waiting[first].clear()
            first += 1
