"""Outcomes as `results.json` has them, and as rows of a table.

Knows which outcomes belong together; nothing of how they came about.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.evaluate import scores, tasks, tokens
from elm_mlx.evaluate.perplexity import Text
from elm_mlx.evaluate.questions import Question
from elm_mlx.evaluate.scores import Score
from elm_mlx.evaluate.tasks import SUITES
from elm_mlx.evaluate.tokens import Scored
from elm_mlx.model.config import PRESETS, ModelConfig


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
class Row:
    """One line of the table.

    Attributes:
        main: whether it is the metric that the paper reports.
        published: the paper's, in per cent; None where there is none.
    """

    name: str
    shots: int
    metric: str
    score: Score
    main: bool
    published: float | None


def rows(outcomes: Sequence[Outcome], model: str | None) -> list[Row]:
    """Each task's metrics, parts of a group as one; beside the main ones what `model` has in the paper."""
    known = published_scores(model) if model is not None else {}
    table = []
    for (name, shots), members in _grouped(outcomes).items():
        for number, metric in enumerate(members[0].work.metrics):
            parts = [member.scores[metric] for member in members]
            joined = parts[0] if len(parts) == 1 else scores.pooled(parts)
            main = number == 0
            table.append(Row(name, shots, metric, joined, main, known.get((name, shots)) if main else None))
    return table


def mean_of_suite(table: Sequence[Row], suite: str) -> Score | None:
    """The mean over a suite's tasks; None where one of them is missing."""
    found = {(row.name, row.shots): row.score for row in table if row.main}
    wanted = list(tasks.SUITES[suite].items())
    if any(each not in found for each in wanted):
        return None
    return scores.average([found[each] for each in wanted])


def to_dict(
    outcomes: Sequence[Outcome], table: Sequence[Row], missing: Mapping[str, str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """All there is to keep: `tasks` by key, with each question's values; `scores`, the table; `missing`, why."""
    kept = {
        outcome.work.key: {
            "task": outcome.work.name,
            "shots": outcome.work.shots,
            "group": outcome.work.group,
            "where": outcome.work.where,
            "questions": outcome.work.asked,
            "metrics": {metric: asdict(score) for metric, score in outcome.scores.items()},
            "values": outcome.values,
            "logprobs": outcome.logprobs,
        }
        for outcome in outcomes
    }
    lines = [
        {"task": row.name, "shots": row.shots, "metric": row.metric, **asdict(row.score), "published": row.published}
        for row in table
    ]
    return {**about, "scores": lines, "missing": dict(missing), "tasks": kept}


def merged(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """`now`, with what `before` has of tasks that were not asked this time. Both are of the same model."""
    if before is None:
        return dict(now)
    asked = {(line["task"], line["shots"]) for line in now["scores"]}
    asked |= {(entry["task"], entry["shots"]) for entry in now["tasks"].values()}
    changed = [
        entry
        for key, entry in now["tasks"].items()
        if key in before["tasks"] and before["tasks"][key]["questions"] != entry["questions"]
    ]
    asked |= {(entry["group"], entry["shots"]) for entry in changed}  # a group's score would be of questions past
    old = [line for line in before["scores"] if (line["task"], line["shots"]) not in asked]
    kept = {key: entry for key, entry in before["tasks"].items() if (entry["task"], entry["shots"]) not in asked}
    suite = {} if now["suite"] is not None else {key: before[key] for key in ("suite", "mean", "missing")}
    return {**now, **suite, "scores": old + now["scores"], "tasks": kept | now["tasks"]}


def _grouped(outcomes: Sequence[Outcome]) -> dict[tuple[str, int], list[Outcome]]:
    """By name and shots; the parts of a group are one where all are there."""
    names = tasks.shown_as([(outcome.work.name, outcome.work.group, outcome.work.shots) for outcome in outcomes])
    found: dict[tuple[str, int], list[Outcome]] = {}
    for name, outcome in zip(names, outcomes, strict=True):
        found.setdefault((name, outcome.work.shots), []).append(outcome)
    return found


_FILE = Path(__file__).with_name("published.json")


def published_model(config: Any, directory: Path) -> str | None:
    """The published model that has this shape, `OpenELM-270M-Instruct` for one; None where there is none."""
    if not isinstance(config, ModelConfig):
        return None
    for name in PRESETS:
        preset = ModelConfig.preset(name)
        alike = replace(
            preset, quantization=config.quantization, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
        )
        if config.shapes() == preset.shapes() and config == alike:
            return f"{name}-Instruct" if "instruct" in _names(directory) else name
    return None


def published_scores(name: str) -> dict[tuple[str, int], float]:
    """In per cent, by task and number of examples."""
    found = _read()["models"][name]
    return {
        (task, shots): found[suite][task]
        for suite, tasks in SUITES.items()
        for task, shots in tasks.items()
        if task in found[suite]
    }


def published_mean(name: str, suite: str) -> float:
    """Of a suite, in per cent."""
    return float(_read()["models"][name][suite]["mean"])


def published_source() -> str:
    return str(_read()["source"])


def _names(directory: Path) -> str:
    """What a model directory is called, and what it was made of."""
    try:
        made = reading.json_object(directory / "conversion.json")["source"]["name"]
    except (InputError, KeyError, TypeError):
        made = ""
    return f"{directory.resolve().name} {made}".lower()


@functools.cache
def _read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found
