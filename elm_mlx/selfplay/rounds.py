"""Expert iteration: a model answers problems, is trained on its right answers, and begins again with what it learned.

Each round samples with the adapter of the round before, and trains a new one on the right answers of all rounds so
far, each once. It begins where the first round began, with the model and perhaps an adapter (as in STaR, arXiv
2203.14465, and ReST-EM, arXiv 2312.06585): what is learned does not drift away over rounds. The problems of a round
are others than those before; held-out ones are the same after each.

A directory holds all of it, and is gone on with after a kill at any instant:

    loop.json             what the loop was asked for, and the training that is done
    start.answers         answers of the model at the start to held-out problems
    round-1/data.jsonl    right answers; data.jsonl.answers is the record of all
    round-1/adapter/      a run of `lora`
    round-1/held-out.answers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elm_mlx import files, reading
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.directories import checkpoints_of
from elm_mlx.errors import InputError
from elm_mlx.selfplay.answer_record import AnswerRecord, RecordedProblem
from elm_mlx.selfplay.answer_sampling import Sampling
from elm_mlx.selfplay.chosen_answers import ChosenAnswers
from elm_mlx.selfplay.synthesis import record_of
from elm_mlx.train.finetuning import Finetuning
from elm_mlx.train.run import Result
from elm_mlx.train.setting_fields import made
from elm_mlx.train.settings import LoraSettings

_STATE = "loop.json"
_OWN = frozenset({"model", "data", "out", "from_adapter", "template"})  # settings of training that the loop decides


@dataclass(frozen=True)
class RoundResult:
    """A round that is done; round 0 is the start.

    Attributes:
        sampled: the problems that were answered to train on, of this round.
        examples: that were trained on, of this round and all before.
        held_out: the answers to held-out problems after it.
    """

    number: int
    sampled: list[RecordedProblem]
    examples: int
    held_out: list[RecordedProblem]


class Rounds:
    """A loop in a directory, held by this process until it is closed: a context manager.

    Args:
        sampling: the model at the start.
        samples: answers to sample in a round.
        measured: held-out problems to measure by.
        training: settings of `lora` by name, but for those that the loop decides.

    Raises:
        InputError: `out` holds something else, or a loop of other settings, which are named.
        ElmError: another process writes to `out`.
    """

    def __init__(self, sampling: Sampling, samples: int, measured: int, out: Path, training: Mapping[str, Any]) -> None:
        theirs = next((name for name in training if name in _OWN), None)
        if theirs is not None:
            raise InputError(f"{theirs}: is decided by the loop, round by round: leave it out")
        self._sampling, self._samples, self._measured, self.out = sampling, samples, measured, out
        self._training = dict(training)
        self._problems = -(-samples // sampling.asked.answers)
        self._lora(1)  # says what is wrong with the settings
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: is a file; with --loop, --out names the directory of the rounds")
        if out.is_dir() and any(entry.name != files.LOCK for entry in out.iterdir()) and not (out / _STATE).exists():
            raise InputError(f"{out}: holds something else than a loop; choose another --out")
        with ExitStack() as held:
            held.enter_context(files.hold(out))
            self._trained = self._begin()
            self._held = held.pop_all()

    def __enter__(self) -> Rounds:
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.close()

    def run(
        self,
        rounds: int,
        train: Callable[[Finetuning], Result] = lambda run: run.train(),
        progress: OnProgress = no_progress,
        on_sampled: Callable[[int, list[RecordedProblem], int], None] = lambda number, problems, examples: None,
    ) -> Iterator[RoundResult]:
        """Yields the start and each round as soon as it is measured; what was done before is not done again.

        Args:
            train: trains a round's run.
            on_sampled: called before that with the round's number, its problems, and how many examples it trains on.

        Raises:
            ElmError: no answer is right; training failed.
            KeyboardInterrupt: training was stopped, and goes on when the loop does.
        """
        chosen = ChosenAnswers()
        sampling = self._sampling
        yield RoundResult(0, [], 0, self._measure(sampling, self.out / "start.answers", progress))
        for number in range(1, rounds + 1):
            data = self._data(number)
            data.parent.mkdir(exist_ok=True)
            first = (number - 1) * self._problems
            identity = {**sampling.identity, "first problem": first}
            with AnswerRecord(record_of(data), identity, first) as record:
                sampled = sampling.sample(record, self._problems, progress, first)
            before = len(chosen.examples)
            chosen.add(sampled, {**sampling.source, "round": number})
            if not data.exists():
                files.write_json_lines(data, chosen.examples[before:])
            on_sampled(number, sampled, len(chosen.examples))
            sampling.release()
            if number > self._trained:
                self._train(number, train)
            sampling = self._sampling.with_adapter(self._adapter(number))
            held_out = self._measure(sampling, data.with_name("held-out.answers"), progress)
            yield RoundResult(number, sampled, len(chosen.examples), held_out)

    def _begin(self) -> int:
        """Returns how many rounds are trained, of a loop with the same settings."""
        asked = {
            **self._sampling.identity, "--samples": self._samples, "--measure": self._measured,
            "--config": {name: str(value) for name, value in sorted(self._training.items())},
        }  # fmt: skip
        path = self.out / _STATE
        if not path.exists():
            files.write_json(path, {"asked": asked, "trained": 0})
            return 0
        state = reading.json_object(path)
        known, trained = state.get("asked"), state.get("trained")
        if not isinstance(known, dict) or not isinstance(trained, int):
            raise InputError(f"{path}: is no record of a loop; choose another --out")
        reading.check_made_with(self.out, "a loop", known, asked, "leave it as it was, or choose another --out")
        return trained

    def _train(self, number: int, train: Callable[[Finetuning], Result]) -> None:
        """Trains a round's adapter, or goes on with it, and notes that it is done."""
        asked = self._lora(number)
        with Finetuning(asked, resume=bool(checkpoints_of(asked.out))) as run:
            result = train(run)
        if result.interrupted:
            raise KeyboardInterrupt
        state = reading.json_object(self.out / _STATE)
        files.write_json(self.out / _STATE, {**state, "trained": number})
        self._trained = number

    def _lora(self, number: int) -> LoraSettings:
        data = [self._data(each) for each in range(1, number + 1)]
        asked = self._sampling.asked
        own = {
            "model": asked.model, "data": tuple(str(path) for path in data if number == 1 or path.stat().st_size),
            "out": self._adapter(number), "from_adapter": asked.adapter, "template": asked.template,
        }  # fmt: skip
        given = {"seed": asked.seed, "compute_dtype": asked.compute_dtype, "full": self._sampling.trains_all}
        return made(LoraSettings, {**given, **self._training, **own})

    def _measure(self, sampling: Sampling, path: Path, progress: OnProgress) -> list[RecordedProblem]:
        with AnswerRecord(path, sampling.measured_identity) as record:
            return sampling.measure(record, self._measured, progress)

    def _data(self, number: int) -> Path:
        return self.out / f"round-{number}" / "data.jsonl"

    def _adapter(self, number: int) -> Path:
        return self.out / f"round-{number}" / "adapter"
