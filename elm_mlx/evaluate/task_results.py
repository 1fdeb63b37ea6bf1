"""Results of tasks: as results.json keeps them, as rows of a table, and beside the paper's scores.

A published model is known by its shape, and an instruction-tuned one by its name: weights are not looked at, so who
trains a model of a published shape sees the published model's scores beside his own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.evaluate import scores, tasks
from elm_mlx.evaluate.scores import Score
from elm_mlx.model.config import PRESETS, ModelConfig


@dataclass(frozen=True)
class TaskResult:
    """One entry of the `tasks` in results.json: a task, or a text.

    Attributes:
        where: the file or repository that was read.
        questions: a hash of the questions, or of the text, whatever the tokenizer.
        metrics: a score by metric; the first is the one that a mean is taken of.
        values: by metric, each question's; of a text, each document's, where there are several.
        logprobs: each question's, one for each choice.
    """

    task: str
    shots: int
    group: str | None
    where: str
    questions: str
    metrics: dict[str, Score]
    values: dict[str, list[float]]
    logprobs: list[list[float]]


@dataclass(frozen=True)
class ScoreRow:
    """One row of the table, of a task or a group.

    Attributes:
        main: true for the metric that the paper reports.
        published: the paper's score, in per cent; None where there is none.
    """

    name: str
    shots: int
    metric: str
    score: Score
    main: bool
    published: float | None

    def to_dict(self) -> dict[str, Any]:
        found = {"task": self.name, "shots": self.shots, "metric": self.metric}
        return {**found, **asdict(self.score), "published": self.published}


def rows(results: Sequence[TaskResult], model: str | None) -> list[ScoreRow]:
    """Each task's metrics, a group's tasks as one where all are there; `model` is the published one to compare with."""
    known = published_scores(model) if model is not None else {}
    grouped: dict[tuple[str, int], list[TaskResult]] = {}
    names = tasks.shown_as([(each.task, each.group, each.shots) for each in results])
    for name, result in zip(names, results, strict=True):
        grouped.setdefault((name, result.shots), []).append(result)
    table = []
    for (name, shots), members in grouped.items():
        for number, metric in enumerate(members[0].metrics):
            parts = [member.metrics[metric] for member in members]
            score = parts[0] if len(parts) == 1 else scores.pooled(parts)
            main = number == 0
            table.append(ScoreRow(name, shots, metric, score, main, known.get((name, shots)) if main else None))
    return table


def mean_of_suite(table: Sequence[ScoreRow], suite: str) -> Score | None:
    """The mean over a suite's tasks; None where one of them is missing."""
    found = {(row.name, row.shots): row.score for row in table if row.main}
    if not tasks.SUITES[suite].items() <= found.keys():
        return None
    return scores.average([found[each] for each in tasks.SUITES[suite].items()])


def merged(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to the results `now` those that `before`, of the same model, has of other tasks."""
    if before is None:
        return dict(now)
    asked = {(each["task"], each["shots"]) for each in (*now["scores"], *now["tasks"].values())}
    for key, entry in now["tasks"].items():
        if key in before["tasks"] and before["tasks"][key]["questions"] != entry["questions"]:
            asked.add((entry["group"], entry["shots"]))  # the group's score would be of other questions
    old = [line for line in before["scores"] if (line["task"], line["shots"]) not in asked]
    kept = {key: entry for key, entry in before["tasks"].items() if (entry["task"], entry["shots"]) not in asked}
    suite = {} if now["suite"] is not None else {key: before[key] for key in ("suite", "mean", "missing")}
    return {**now, **suite, "scores": old + now["scores"], "tasks": kept | now["tasks"]}


def published_model(config: Any, directory: Path) -> str | None:
    """The published model that has this shape, such as `OpenELM-270M-Instruct`; None where there is none."""
    if not isinstance(config, ModelConfig):
        return None
    own = {key: getattr(config, key) for key in ("quantization", "bos_token_id", "eos_token_id")}
    try:
        converted = reading.json_object(directory / "conversion.json")["source"]["name"]
    except (InputError, KeyError, TypeError):
        converted = ""
    kind = "-Instruct" if "instruct" in f"{directory.resolve().name} {converted}".lower() else ""
    for name in PRESETS:
        preset = ModelConfig.preset(name)
        if config.shapes() == preset.shapes() and config == replace(preset, **own):
            return name + kind
    return None


def published_scores(name: str) -> dict[tuple[str, int], float]:
    """In per cent, by task and number of few-shot examples."""
    found = published()["models"][name]
    return {
        (task, shots): found[suite][task]
        for suite, shots_of in tasks.SUITES.items()
        for task, shots in shots_of.items()
        if task in found[suite]
    }


@functools.cache
def published() -> dict[str, Any]:
    """The paper's scores: `models` -> model -> suite -> task, in per cent, or "mean"; and their `source`."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return found
