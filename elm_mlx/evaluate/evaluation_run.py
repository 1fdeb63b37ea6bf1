"""From tasks to results: read them, score what is not scored yet, measure.

Knows the order of things. `sources`, `examples` and `tokens` make items of tasks, `scoring` scores them, `record`
keeps them, `scores` measures.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elm_mlx.errors import ElmError, InputError
from elm_mlx.evaluate import few_shot, perplexity, scores, task_sources, tokens
from elm_mlx.evaluate.perplexity import Text
from elm_mlx.evaluate.questions import Question
from elm_mlx.evaluate.score_record import Record
from elm_mlx.evaluate.scores import Score
from elm_mlx.evaluate.scoring import Scorer
from elm_mlx.evaluate.task_sources import Missing
from elm_mlx.evaluate.tasks import Chosen
from elm_mlx.evaluate.tokens import Encoder, Scored

Advance = Callable[[str, int, int, int], None]  # key, items done of it now, cost done, cost of all


@dataclass(frozen=True)
class Work:
    """A task, or a text, as items to score.

    Attributes:
        key: what its lines in the record are found by.
        name, shots, group: of the task; a text's name is its file's.
        where: what was read.
        metrics: the first is the one that a mean is taken of.
        items: what each question is scored by; `ids` tells each from others.
        questions: of a task; `text` of a text.
    """

    key: str
    name: str
    where: str
    metrics: tuple[str, ...]
    items: list[list[Scored]]
    shots: int = 0
    group: str | None = None
    questions: list[Question] = field(default_factory=list)
    text: Text | None = None

    @property
    def ids(self) -> list[str]:
        return [tokens.digest(item) for item in self.items]

    @property
    def asked(self) -> str:
        """What tells these questions from others, whatever the tokenizer."""
        if self.text is not None:
            return self.text.digest
        state = hashlib.blake2b(digest_size=8)
        for question in self.questions:
            state.update(repr((question.requests(), question.right)).encode())
        return state.hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What a task came to.

    Attributes:
        scores: by metric.
        values: by metric, each question's; of a text, each document's, where there are several.
        logprobs: each question's.
    """

    work: Work
    scores: dict[str, Score]
    values: dict[str, list[float]]
    logprobs: list[list[float]]


@dataclass(frozen=True)
class Pace:
    """How fast it went: items that were scored now, not found in the record, and their seconds."""

    items: int
    seconds: float


def prepare(
    chosen: Sequence[Chosen], tokenizer: Encoder, context: int, data: Path | None = None, limit: int | None = None
) -> tuple[list[Work], dict[str, str]]:
    """Tasks as items, and for each task or group whose data are not here, how to get them.

    Args:
        context: tokens that the model reads at once.
        limit: take each task's first questions only.

    Raises:
        InputError: a file is damaged, or a question cannot be scored.
    """
    works: list[Work] = []
    missing: dict[str, str] = {}
    for each in chosen:
        try:
            source = task_sources.load(each, data)
        except Missing as reason:
            missing.setdefault(each.key if each.task.group is None else each.task.group, str(reason))
            continue
        questions = source.questions[:limit]
        texts = few_shot.before(each, questions, source.examples)
        items = []
        for number, (question, before) in enumerate(zip(questions, texts, strict=True), 1):
            try:
                items.append(tokens.encode(question.requests(before), tokenizer, context))
            except InputError as error:
                raise InputError(f"{source.where}, question {number}: {error}") from None
        task = each.task
        metrics = task.metrics or task_sources.metrics_of(questions)
        works.append(
            Work(each.key, task.name, source.where, metrics, items, each.shots, task.group, questions=questions)
        )
    return works, missing


def prepare_text(path: Path, tokenizer: Encoder, window: int, stride: int) -> Work:
    """A file of text as windows. Raises InputError."""
    text = perplexity.read(path, tokenizer, window, stride)
    key = f"{path.name}, window {window}, stride {stride}"
    items = [[window] for window in text.windows]
    return Work(key, path.name, str(path), ("bits_per_byte", "perplexity"), items, text=text)


def score(works: Sequence[Work], model: Any, record: Record, advance: Advance | None = None) -> Pace:
    """Score what `record` does not hold yet, and put it there.

    Raises:
        ElmError: the record cannot be written, or the model's log-probabilities are no numbers.
    """
    scorer = Scorer(model)
    started = time.perf_counter()
    left = []
    for work in works:
        known = [record.done.get((work.key, number), {}).get("id") for number in range(len(work.items))]
        ids = work.ids
        numbers = [number for number, (old, new) in enumerate(zip(known, ids, strict=True)) if old != new]
        left.append((work, ids, numbers, scorer.plan([work.items[number] for number in numbers])))
    total = sum(batch.cost for *_, planned in left for batch in planned.batches)
    spent = items = 0
    for work, ids, numbers, planned in left:
        for results, cost in scorer.run(planned):
            for result in results:
                number = numbers[result.item]
                if any(map(math.isnan, result.logprobs)):
                    raise ElmError(
                        f"{work.key}, item {number + 1}: the model's log-probabilities are no numbers: its weights are "
                        "damaged, or overflow the type that they are computed in"
                    )
                record.done[work.key, number] = {
                    "task": work.key, "item": number, "id": ids[number], "logprobs": result.logprobs,
                    "greedy": result.greedy,
                }  # fmt: skip
            record.append(record.done[work.key, numbers[result.item]] for result in results)
            spent, items = spent + cost, items + len(results)
            if advance is not None:
                advance(work.key, len(results), spent, total)
    return Pace(items, time.perf_counter() - started)


def measure(works: Sequence[Work], record: Record) -> list[Outcome]:
    """What was scored, as scores. All of it must be in `record`."""
    return [_measure(work, record) for work in works]


def _measure(work: Work, record: Record) -> Outcome:
    lines = [record.done[work.key, number] for number in range(len(work.items))]
    logprobs = [line["logprobs"] for line in lines]
    if work.text is not None:
        sums = [values[0] for values in logprobs]
        found = {
            "bits_per_byte": perplexity.bits_per_byte(work.text, sums),
            "perplexity": perplexity.perplexity(work.text, sums),
        }
        shares = perplexity.shares(work.text, sums)
        return Outcome(work, found, {"bits_per_byte": shares} if shares else {}, logprobs)
    each = [
        scores.of_question(question, line["logprobs"], line["greedy"], work.metrics)
        for question, line in zip(work.questions, lines, strict=True)
    ]
    by_metric = {metric: [one[metric] for one in each] for metric in work.metrics}
    means = {metric: scores.mean(metric, values) for metric, values in by_metric.items()}
    return Outcome(work, means, by_metric, logprobs)
