"""Reinforcement learning: from a model directory and a task that checks answers to a run's directory with an adapter.

Each update begins with answers that the model gives to problems; the rest is a `Finetuning` as any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from elm_mlx.callbacks import SILENT, TrainingCallback
from elm_mlx.errors import InputError
from elm_mlx.inference.rollouts import prompt_ids
from elm_mlx.model.network import Model
from elm_mlx.problems.built_in import TASKS, difficulties, load_task
from elm_mlx.problems.drawn_problems import held_out_problems, training_problem
from elm_mlx.reading import expanded
from elm_mlx.store.adapters import Adapter
from elm_mlx.text import chat_template
from elm_mlx.text.tokenizer import read_vocabulary
from elm_mlx.train.checkpoint import Identity
from elm_mlx.train.finetuning import Finetuning
from elm_mlx.train.policy import Policy
from elm_mlx.train.policy_gradient import PolicyGradient
from elm_mlx.train.rollout_batches import HeldOut, RolloutBatches
from elm_mlx.train.run import Result, Run
from elm_mlx.train.settings import GrpoSettings

_HASHED = 32  # problems


class Reinforcement(Finetuning):
    """A `Finetuning` on the answers that the model gives to a task's problems, by how right they are.

    Attributes:
        task: makes the problems, and judges.
        difficulties: of the problems.
        held_out: problems that validations ask.

    Raises:
        InputError: as `Finetuning`; or the task or its difficulties are not as they must be, or there are several
            processes.
    """

    command, unit = "grpo", "problem"
    asked: GrpoSettings

    def _prepare(self) -> None:
        asked = self.asked.examples
        if self.world > 1:
            raise InputError("grpo trains in one process, and several were started")
        self.task = load_task(asked.task)
        self.difficulties = difficulties(asked.difficulty, self.task)
        self.held_out = held_out_problems(self.task, self.difficulties, asked.eval_problems)
        tokenizer = read_vocabulary(self.path, self.config).tokenizer
        if tokenizer is None:
            raise InputError(f"{self.path}: has no tokenizer")
        self._tokenizer = tokenizer
        self._template = chat_template.choose(self.path, tokenizer, asked.template, self._taught_by)
        self._draw = partial(training_problem, self.task, self.difficulties, self.asked.computation.seed)
        self._draw(0)  # says where there is none
        prompts = [prompt_ids(tokenizer, self._template, each.problem.prompt) for each in self.held_out]
        self.row_length = min(max(map(len, prompts)) + asked.max_tokens, self.config.max_context_length)
        self.splits, self._packed, self._test = {}, False, None

    @property
    def validates(self) -> bool:
        return True

    @property
    def notes(self) -> list[str]:
        return []

    def train(self, callback: TrainingCallback = SILENT) -> Result:
        """Trains as `Finetuning.train`. The result has no first loss: later ones are not to be compared with it."""
        result = super().train(callback)
        return replace(result, progress=replace(result.progress, first_loss=None))

    def _steps(self) -> int:
        assert self.asked.optimizer.iters is not None
        return self.asked.optimizer.iters

    def _adapter(self) -> Adapter:
        return replace(super()._adapter(), dropout=0.0)  # or what answers would not be what is trained

    def _run(
        self, model: Model, dtype: mx.Dtype | None, callback: TrainingCallback, about: dict[str, Any],
        export: Callable[[Path], None] | None,
    ) -> Run:  # fmt: skip
        asked = self.asked.examples
        policy = Policy(
            model, self._tokenizer, self._template, self.task, dtype, asked.answers, asked.max_tokens,
            self.asked.computation.seed, callback.progress,
        )  # fmt: skip
        batches = RolloutBatches(
            policy,
            self._draw,
            asked.problems,
            self.batch_size,
            asked.updates_per_batch,
            asked.advantage == "std",
            self.config.positions,
        )
        return Run(
            model, batches, HeldOut(policy, self.held_out), self.settings, self.out, self._identity(), self.resumed,
            dtype, PolicyGradient(asked.updates_per_batch > 1), callback=callback, about=about, export=export,
        )  # fmt: skip

    def _identity(self) -> Identity:
        identity, asked = super()._identity(), self.asked.examples
        source, _ = chat_template.source_of(self.path, asked.template, self._taught_by)
        template = chat_template.NONE if source is None else hashlib.sha256(source.encode()).hexdigest()[:8]
        config = {name: value for name, value in identity.config.items() if name not in ("row length", "packing")}
        own = {
            "task": self.task.name, "difficulties": list(self.difficulties), "problems": asked.problems,
            "answers": asked.answers, "max tokens": asked.max_tokens, "updates per batch": asked.updates_per_batch,
            "advantage": asked.advantage, "template": template, "problems of a validation": asked.eval_problems,
        }  # fmt: skip
        return replace(identity, config=config | own)

    def _data_sha256(self) -> str:
        """Returns a hash of the task: of its held-out problems, and of a user's file as it stands."""
        shown = [each.problem.prompt for each in held_out_problems(self.task, self.difficulties, _HASHED)]
        found = hashlib.sha256(json.dumps(shown).encode())
        if self.asked.examples.task not in TASKS:
            found.update(expanded(self.asked.examples.task).read_bytes())
        return found.hexdigest()
