"""The record of sampled answers: a file with a line a problem, right and wrong answers alike, that is gone on with.

Its first line says what it is a record of. The others are appended in the order of the problems' numbers, so that a
run that was killed leaves the beginning of what an unbroken one writes, and perhaps a torn line, which is cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from elm_mlx import directories, files, reading
from elm_mlx.errors import InputError
from elm_mlx.inference.solving import SolvedProblem
from elm_mlx.problems.checked_task import Verdict
from elm_mlx.problems.pass_rates import Count


@dataclass(frozen=True)
class RecordedAnswer:
    """An answer.

    Attributes:
        tokens: how many, the one that ended it included.
        ended: whether it came to its own end.
    """

    text: str
    verdict: Verdict
    tokens: int
    ended: bool


@dataclass(frozen=True)
class RecordedProblem:
    """A problem and its answers. `held_out`: how many problems drawn before it were passed over as held out."""

    number: int
    difficulty: int
    prompt: str
    held_out: int
    answers: tuple[RecordedAnswer, ...]

    @property
    def count(self) -> Count:
        """The right answers, and all, as `pass_rate` takes them."""
        return sum(answer.verdict is Verdict.RIGHT for answer in self.answers), len(self.answers)

    def of(self, verdict: Verdict) -> list[RecordedAnswer]:
        """The answers of a verdict that came to their own end."""
        return [answer for answer in self.answers if answer.verdict is verdict and answer.ended]


def recorded(solved: SolvedProblem) -> RecordedProblem:
    """Returns a problem as the record has it."""
    drawn = solved.drawn
    answers = tuple(
        RecordedAnswer(each.rollout.text, each.verdict, len(each.rollout.tokens), each.ended) for each in solved.answers
    )
    return RecordedProblem(drawn.number, drawn.difficulty, drawn.problem.prompt, drawn.passed_over, answers)


class AnswerRecord:
    """A record of answers, open and locked between `with` and its end.

    Args:
        identity: what the answers depend on, by the names that a message may use; `--answers` is how many each
            problem has.
        first: the number of its first problem.
        anew: forget what is there.

    Attributes:
        problems: those that are there, in order.

    Raises:
        InputError: the file is no such record, or one of other settings, which are named.
        ElmError: another process writes to it, or nobody can.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], first: int = 0, *, anew: bool = False) -> None:
        directories.check_file(path, overwrite=True)  # a directory, a pipe
        self.path = path
        self.problems: list[RecordedProblem] = []
        with ExitStack() as held:
            held.enter_context(files.hold(path, beside=True))
            self._file = held.enter_context(files.JsonLinesFile(path))
            if anew:
                self._file.cut(0)
            self._recall(identity, first)
            self._held = held.pop_all()

    def __enter__(self) -> AnswerRecord:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.__exit__(kind, error, at)

    def append(self, problem: RecordedProblem) -> None:
        """Keeps the next problem. Raises ElmError where it cannot be written."""
        self.problems.append(problem)
        self._file.append(_as_json(problem))

    def _recall(self, identity: Mapping[str, Any], first: int) -> None:
        """Reads what is there, and cuts off what is torn or damaged and all after it."""
        lines = self._file.read(reading.TEXT_BYTES)
        head = next(lines, b"")
        if not head.endswith(b"\n"):  # nothing yet, or killed while it was written
            if head and not head.startswith(b'{"record of"'[: len(head)]):
                raise self._other()
            self._file.cut(0)
            self._file.append({"record of": dict(identity)})
            return
        self._check_same(head, identity)
        whole = len(head)
        for line in lines:
            problem = _of_json(line)
            wanted = first + len(self.problems), identity["--answers"]
            if problem is None or (problem.number, len(problem.answers)) != wanted:
                break
            self.problems.append(problem)
            whole += len(line)
        self._file.cut(whole)

    def _check_same(self, head: bytes, identity: Mapping[str, Any]) -> None:
        try:
            known = _loaded(head)["record of"]
        except (ValueError, KeyError, TypeError):
            known = None
        if not isinstance(known, dict):
            raise self._other()
        advice = "leave it as it was, choose another --out, or begin anew by --overwrite"
        reading.check_made_with(self.path, "answers", known, identity, advice)

    def _other(self) -> InputError:
        return InputError(f"{self.path}: is no record of `elm-mlx synthesize`; choose another --out")


def _as_json(problem: RecordedProblem) -> dict[str, Any]:
    answers = [
        {"text": each.text, "verdict": each.verdict.value, "tokens": each.tokens, "ended": each.ended}
        for each in problem.answers
    ]
    return {**vars(problem), "answers": answers}


def _of_json(line: bytes) -> RecordedProblem | None:
    """Returns the problem of a line; None where it is torn or damaged."""
    try:
        values = _loaded(line)
        answers = [
            RecordedAnswer(each["text"], Verdict(each["verdict"]), each["tokens"], each["ended"])
            for each in values["answers"]
        ]
        problem = RecordedProblem(
            values["number"], values["difficulty"], values["prompt"], values["held_out"], tuple(answers)
        )
    except (ValueError, KeyError, TypeError):
        return None
    texts = [problem.prompt, *(each.text for each in answers)]
    counts = [problem.number, problem.difficulty, problem.held_out, *(each.tokens for each in answers)]
    sound = all(isinstance(each, str) for each in texts) and all(type(each) is int for each in counts)
    return problem if sound and all(type(each.ended) is bool for each in answers) else None


def _loaded(line: bytes) -> Any:
    """Returns the value of a whole line of JSON. Raises ValueError."""
    if not line.endswith(b"\n"):
        raise ValueError("torn")
    return reading.load_json(line.decode())
