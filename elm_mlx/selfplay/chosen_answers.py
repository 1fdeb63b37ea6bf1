"""What becomes training data of a record: right answers, each once, and pairs of a right and a wrong answer.

Two answers to a prompt are the same where they differ in white space alone. A right answer that was there before, in
this record or in others that are trained on together with it, is dropped. No answer is in two pairs, and none that was
cut off is in any: its end is not the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from elm_mlx.problems.checked_task import Verdict
from elm_mlx.selfplay.answer_record import RecordedAnswer, RecordedProblem

SOURCE = "source"  # the key of a record under which stands how it came about; training makes nothing of it


@dataclass
class ChosenAnswers:
    """Lines for `lora` and `dpo`.

    Attributes:
        examples: right answers, with `prompt`, `completion` and `source`.
        pairs: with `prompt`, `chosen`, `rejected` and `source`.
        duplicates: right answers that were dropped.
        seen: prompts and answers that were kept, as they are compared.
    """

    examples: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0
    seen: set[tuple[str, str]] = field(default_factory=set)

    def add(self, problems: Iterable[RecordedProblem], source: Mapping[str, Any]) -> None:
        """Adds the lines of problems.

        Args:
            source: of all of them; each line has its difficulty, the problem's number and the answer's with it.
        """
        for problem in problems:
            about = {**source, "difficulty": problem.difficulty, "problem": problem.number}
            right, wrong, unreadable = (
                [*_different(problem, verdict)] for verdict in (Verdict.RIGHT, Verdict.WRONG, Verdict.UNREADABLE)
            )
            self.duplicates += len(problem.of(Verdict.RIGHT)) - len(right)
            fresh = []
            for sample, answer in right:
                key = problem.prompt, _bare(answer)
                if key in self.seen:
                    self.duplicates += 1
                    continue
                self.seen.add(key)
                fresh.append((sample, answer))
                self.examples.append({
                    "prompt": problem.prompt, "completion": answer.text,
                    SOURCE: {**about, "sample": sample, "verdict": answer.verdict.value},
                })  # fmt: skip
            for (good, chosen), (bad, rejected) in zip(fresh, [*wrong, *unreadable], strict=False):
                self.pairs.append({
                    "prompt": problem.prompt, "chosen": chosen.text, "rejected": rejected.text,
                    SOURCE: {**about, "samples": [good, bad], "verdicts": ["right", rejected.verdict.value]},
                })  # fmt: skip


def _different(problem: RecordedProblem, verdict: Verdict) -> Iterator[tuple[int, RecordedAnswer]]:
    """Yields the answers of a verdict that came to their end and have text, each once, with their numbers."""
    seen = set[str]()
    for sample, answer in enumerate(problem.answers):
        text = _bare(answer)
        if answer.verdict is verdict and answer.ended and text and text not in seen:
            seen.add(text)
            yield sample, answer


def _bare(answer: RecordedAnswer) -> str:
    return " ".join(answer.text.split())
