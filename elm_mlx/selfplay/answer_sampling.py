"""A model's answers to a task's problems, sampled and judged into a record: to train on, or to measure pass@k by.

All that can be wrong with what is asked for is found before the weights are read, and they are read when an answer is
missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from elm_mlx import reading
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.generation import check_steps
from elm_mlx.inference.solving import solve
from elm_mlx.model.config import read_config
from elm_mlx.problems.built_in import TASKS, difficulties, load_task
from elm_mlx.problems.checked_task import Verdict
from elm_mlx.problems.drawn_problems import DrawnProblem, held_out_problems, training_problem
from elm_mlx.safetensors_file import fingerprint
from elm_mlx.selfplay.answer_record import AnswerRecord, RecordedProblem, recorded
from elm_mlx.selfplay.difficulty_balance import BATCH, chosen_difficulties
from elm_mlx.selfplay.held_out_files import prompts_in
from elm_mlx.store import adapters
from elm_mlx.store.loading import Loaded, open_model
from elm_mlx.store.model_names import directory_of
from elm_mlx.text import chat_template
from elm_mlx.text.chat_template import Template

_HOPELESS = 2 * BATCH  # problems, of which one should have a right answer


@dataclass(frozen=True)
class SamplingSettings:
    """What answers are sampled of, and how.

    Attributes:
        model: a model directory, or a repository's name.
        task: as `load_task` takes it.
        difficulty: as `difficulties` takes it; None for all.
        answers: to each problem.
        temp: the temperature.
        max_tokens: of an answer, at most.
        template: as `chat_template.choose` takes it.
        held_out: data files with prompts that are not to be trained on.
    """

    model: Path
    task: str
    adapter: Path | None = None
    difficulty: str | None = None
    answers: int = 8
    seed: int = 0
    temp: float = 1.0
    max_tokens: int = 128
    template: str | None = None
    held_out: tuple[str, ...] = ()
    compute_dtype: str | None = None


class Sampling:
    """A model that answers the problems of a task.

    Attributes:
        task, difficulties: what is asked.
        trains_all: whether the adapter is of all the model's weights.

    Raises:
        InputError: the model, the task, a file or a number is not as it must be.
    """

    def __init__(self, asked: SamplingSettings, on_notes: Callable[[str], None] = lambda text: None) -> None:
        check_steps(asked.max_tokens, 1)
        reading.check_seed(asked.seed)
        if asked.answers < 1:
            raise InputError(f"--answers {asked.answers}: a problem needs at least one answer")
        if not 0 < asked.temp < float("inf"):
            raise InputError(f"--temp {asked.temp:g}: answers are drawn, so it must be a number above 0")
        self.asked, self._on_notes = asked, on_notes
        self.task = load_task(asked.task)
        self.difficulties = difficulties(asked.difficulty, self.task)
        self._path = directory_of(asked.model)
        self._config = read_config(self._path, with_tokenizer=True)
        self._template_source, _ = chat_template.source_of(self._path, asked.template, asked.adapter)
        self._model_hash = fingerprint(self._path)
        self._adapter_hash, self.trains_all = None, False
        if asked.adapter is not None:
            adapter = adapters.read(asked.adapter, self._config, self._path)
            self.trains_all = adapter.kind == "full"
            self._adapter_hash = hashlib.sha256(adapters.weights_file(asked.adapter).read_bytes()).hexdigest()
        self._left_out = prompts_in(asked.held_out)

    def with_adapter(self, adapter: Path) -> Sampling:
        """Returns the same with an adapter in the model, in place of the one that was there."""
        return Sampling(replace(self.asked, adapter=adapter), self._on_notes)

    def release(self) -> None:
        """Lets go of the model in memory; it is read again when it is needed."""
        self.__dict__.pop("_opened", None)
        mx.clear_cache()

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers depend on, as a record of them has it."""
        asked = self.asked
        own = None if asked.task in TASKS else _digest(reading.text(reading.expanded(asked.task)))
        return {
            "MODEL": self._model_hash, "--adapter": self._adapter_hash, "--task": self.task.name,
            "the task's file": own, "--difficulty": f"{self.difficulties[0]}-{self.difficulties[-1]}",
            "--answers": asked.answers, "--seed": asked.seed, "--temp": asked.temp, "--max-tokens": asked.max_tokens,
            "the chat template": None if self._template_source is None else _digest(self._template_source),
            "--held-out": _digest(json.dumps(sorted(self._left_out))) if self._left_out else None,
            "--compute-dtype": asked.compute_dtype,
        }  # fmt: skip

    @property
    def measured_identity(self) -> dict[str, Any]:
        """What the answers to held-out problems depend on."""
        return {**self.identity, "problems": "held out"}

    @property
    def source(self) -> dict[str, Any]:
        """What every example that is made of the answers says of how it came about."""
        found = {"task": self.task.name, "model": self._model_hash, "adapter": self._adapter_hash}
        return {name: value for name, value in found.items() if value is not None} | {"seed": self.asked.seed}

    def sample(
        self, record: AnswerRecord, count: int, progress: OnProgress = no_progress, first: int = 0
    ) -> list[RecordedProblem]:
        """Returns the answers to `count` problems to train on, `first` and those after it; missing ones are sampled.

        Raises:
            ElmError: no answer of the first 64 problems is right; the task's judge fails; a record cannot be written.
        """
        while (done := len(record.problems)) < count:
            self._check_hope(record.problems)
            batch = done // BATCH * BATCH
            chosen = chosen_difficulties(
                self.difficulties, record.problems[:batch], self.asked.seed, first + batch
            )[done - batch : count - batch]  # fmt: skip
            problems = [
                training_problem(self.task, [difficulty], self.asked.seed, first + done + place, self._left_out)
                for place, difficulty in enumerate(chosen)
            ]
            self._answer(record, problems, count, "sample", progress)
        self._check_hope(record.problems, at_end=True)
        return record.problems[:count]

    def held_out(self, count: int) -> list[DrawnProblem]:
        """Returns so many held-out problems, or as many as there are. Raises InputError where there are none."""
        return held_out_problems(self.task, self.difficulties, count)

    def measure(self, record: AnswerRecord, count: int, progress: OnProgress = no_progress) -> list[RecordedProblem]:
        """Returns the answers to `count` held-out problems, or as many as there are. Raises as `sample`."""
        problems = self.held_out(count)
        if len(record.problems) < len(problems):
            self._answer(record, problems[len(record.problems) :], len(problems), "measure", progress)
        return record.problems[: len(problems)]

    def solve(
        self, problems: Sequence[DrawnProblem], progress: OnProgress = no_progress, what: str = "measure",
        before: int = 0, total: int | None = None,
    ) -> Iterator[RecordedProblem]:  # fmt: skip
        """Yields each problem with its answers. Raises ElmError where the judge fails.

        Args:
            before, total: problems that are done, and all, for `progress`, which counts answers.
        """
        if "_opened" not in vars(self):
            progress("reading the model")
        (loaded, template), each = self._opened, self.asked.answers
        assert loaded.tokenizer is not None
        all_ = (len(problems) if total is None else total) * each

        def on_answer(done: int) -> None:
            progress(what, before * each + done, all_)

        on_answer(0)
        for solved in solve(
            loaded.model, loaded.tokenizer, template, self.task, problems, each, max_tokens=self.asked.max_tokens,
            seed=self.asked.seed, temp=self.asked.temp, on_answer=on_answer,
        ):  # fmt: skip
            yield recorded(solved)

    def _answer(
        self, record: AnswerRecord, problems: Sequence[DrawnProblem], total: int, what: str, progress: OnProgress
    ) -> None:
        for problem in self.solve(problems, progress, what, len(record.problems), total):
            record.append(problem)

    def _check_hope(self, problems: Sequence[RecordedProblem], at_end: bool = False) -> None:
        """Raises ElmError where nothing is right of what should have been enough."""
        if any(problem.count[0] for problem in problems) or not (at_end or len(problems) >= _HOPELESS):
            return
        answers = [answer for problem in problems for answer in problem.answers]
        wrong = sum(answer.verdict is Verdict.WRONG for answer in answers)
        cut = sum(not answer.ended for answer in answers)
        found = f"{wrong:,} wrong, {len(answers) - wrong - cut:,} unreadable, {cut:,} without an end"
        what = f"none of {reading.counted(len(answers), 'answer')} is right ({found})"
        if answers and cut == len(answers):
            what = (
                f"none of {reading.counted(cut, 'answer')} came to an end within --max-tokens {self.asked.max_tokens}"
            )
        which = "" if self.asked.difficulty is None else f" --difficulty {self.asked.difficulty}"
        task, model = map(reading.quoted, (self.asked.task, self.asked.model))
        raise ElmError(
            f"task {self.task.name}: {what}, so there is nothing to learn from; choose easier ones by --difficulty, or "
            f"teach it the task first: `elm-mlx synthesize --task {task}{which} --solutions --samples 2000 "
            f"--out solutions.jsonl` writes data for `elm-mlx lora {model}`, whose adapter --adapter takes"
        )

    @cached_property
    def _opened(self) -> tuple[Loaded, Template | None]:
        asked = self.asked
        loaded = open_model(self._path, asked.compute_dtype, asked.adapter, self._config)
        for note in loaded.notes:
            self._on_notes(note)
        assert loaded.tokenizer is not None
        return loaded, chat_template.choose(self._path, loaded.tokenizer, asked.template, asked.adapter)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
