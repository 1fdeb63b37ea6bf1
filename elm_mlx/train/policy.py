"""The policy: the model that is trained, as it answers.

Answers come from the parameters as they are now, rounded as the training step rounds them, without dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event

import mlx.core as mx
from mlx.utils import tree_map

from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.inference.rollouts import prompt_ids
from elm_mlx.inference.solving import SolvedProblem, solve
from elm_mlx.model.network import Model
from elm_mlx.problems.checked_task import CheckedTask
from elm_mlx.problems.drawn_problems import DrawnProblem
from elm_mlx.text.chat_template import Template
from elm_mlx.text.tokenizer import Tokenizer


class _Stopped(Exception):
    """Someone wants no more answers."""


class Policy:
    """Answers a task's problems by `model`, whatever its parameters are by then.

    Args:
        template: None where the model continues the prompt.
        dtype: what trainable parameters are rounded to, as in training; None for what they are.
        samples: answers to a problem.
        max_tokens: of an answer, at most.
        seed: of the answers' tokens; they depend on it, the problem's number and their own.
        on_progress: called with the answers that there are.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, template: Template | None, task: CheckedTask,
        dtype: mx.Dtype | None, samples: int, max_tokens: int, seed: int, on_progress: OnProgress = no_progress,
    ) -> None:  # fmt: skip
        self._model, self._tokenizer, self._template, self._task = model, tokenizer, template, task
        self._dtype, self._samples, self._max_tokens, self._seed = dtype, samples, max_tokens, seed
        self._on_progress = on_progress

    def solve(self, problems: Sequence[DrawnProblem], what: str, stop: Event) -> list[SolvedProblem]:
        """Returns the problems with their answers; none, once `stop` is set.

        Args:
            what: is done by it, as `on_progress` is told.

        Raises:
            ElmError: the judge fails.
            InputError: as `rollouts`.
        """
        total = len(problems) * self._samples

        def on_answer(done: int) -> None:
            self._on_progress(what, done, total)
            if stop.is_set():
                raise _Stopped

        with suppress(_Stopped), _as_it_answers(self._model, self._dtype):
            on_answer(0)
            return list(solve(
                self._model, self._tokenizer, self._template, self._task, problems, self._samples,
                max_tokens=self._max_tokens, seed=self._seed, on_answer=on_answer,
            ))  # fmt: skip
        return []

    def prompt(self, drawn: DrawnProblem) -> tuple[int, ...]:
        """Returns the ids that a problem was put to the model in."""
        return tuple(prompt_ids(self._tokenizer, self._template, drawn.problem.prompt))


@contextmanager
def _as_it_answers(model: Model, dtype: mx.Dtype | None) -> Iterator[None]:
    """Makes a model that is trained what its answers come from, and what it was at the end."""
    kept, training = model.trainable_parameters(), model.training
    try:
        model.eval()
        if dtype is not None:
            model.update(tree_map(lambda parameter: parameter.astype(dtype), kept))
        yield
    finally:
        model.update(kept)
        model.train(training)
