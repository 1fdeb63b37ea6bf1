"""Outcomes as `results.json` has them, and as rows of a table.

Knows which outcomes belong together; nothing of how they came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from elm_mlx.evaluate import published, scores, tasks
from elm_mlx.evaluate.evaluation_run import Outcome
from elm_mlx.evaluate.scores import Score


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
    known = published.scores(model) if model is not None else {}
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
