"""Scores: metrics of log-probabilities, their means with standard errors, and tables of them beside the paper's.

The formulas are LM Evaluation Harness': `acc` takes the likeliest choice, `acc_norm` the likeliest by character,
`mc2` the share of probability that right choices have (Lin et al., 2022).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.evaluate import tasks
from elm_mlx.evaluate.questions import Question
from elm_mlx.model.config import PRESETS, ModelConfig

Values = npt.NDArray[np.float64]

SHARES = ("acc", "acc_norm", "mc2", "pct_stereotype")  # between 0 and 1, shown in per cent
LOWER_IS_BETTER = ("perplexity", "likelihood_diff", "pct_stereotype", "bits_per_byte")


@dataclass(frozen=True)
class Score:
    """A mean over questions, and its standard error; None where there is one question alone."""

    value: float
    stderr: float | None
    count: int


def of_question(
    question: Question, logprobs: Sequence[float], greedy: Sequence[bool], metrics: Sequence[str]
) -> dict[str, float]:
    """Returns each metric of one question. `perplexity` is its log-probability here, of which a mean is taken."""
    return {metric: _VALUES[metric](question, np.asarray(logprobs), greedy) for metric in metrics}


def mean(metric: str, values: Sequence[float]) -> Score:
    """The mean over questions. The standard error of `perplexity` is to first order, the harness' a bootstrap's."""
    found = np.asarray(values, np.float64)
    count = len(found)
    middle = float(found.mean())
    stderr = float(found.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    if metric != "perplexity":
        return Score(middle, stderr, count)
    value = math.exp(min(-middle, 700.0))
    return Score(value, None if stderr is None else value * stderr, count)


def pool(parts: Sequence[Score]) -> Score:
    """The mean over the questions of several tasks, as the harness joins MMLU's subjects."""
    count = sum(part.count for part in parts)
    value = sum(part.value * part.count for part in parts) / count
    if any(part.stderr is None for part in parts):
        return Score(value, None, count)
    spread = sum((part.count - 1) * (part.stderr or 0.0) ** 2 * part.count for part in parts)
    return Score(value, math.sqrt(spread / (count - len(parts)) / count), count)


def average(parts: Sequence[Score]) -> Score:
    """The mean over tasks, each of which counts the same; their errors are independent."""
    stderrs = [part.stderr for part in parts if part.stderr is not None]
    stderr = math.sqrt(sum(each**2 for each in stderrs)) / len(parts) if len(stderrs) == len(parts) else None
    return Score(sum(part.value for part in parts) / len(parts), stderr, sum(part.count for part in parts))


def format_score(metric: str, score: Score) -> str:
    """`45.08 ± 1.02`, shares in per cent."""
    factor = 100.0 if metric in SHARES else 1.0
    places = 4 if metric == "bits_per_byte" else 2
    value = f"{factor * score.value:,.{places}f}"
    return value if score.stderr is None else f"{value} ± {factor * score.stderr:,.{places}f}"


def _acc(question: Question, logprobs: Values, greedy: Sequence[bool]) -> float:
    return float(greedy[0] if len(logprobs) == 1 else np.argmax(logprobs) in question.right)


def _acc_norm(question: Question, logprobs: Values, greedy: Sequence[bool]) -> float:
    if len(logprobs) == 1:  # nothing to choose among, in a file that has choices too
        return _acc(question, logprobs, greedy)
    with np.errstate(divide="ignore"):  # a choice of no characters is the least likely, as in the harness
        return float(np.argmax(logprobs / np.asarray(question.lengths, np.float64)) in question.right)


def _mc2(question: Question, logprobs: Values, greedy: Sequence[bool]) -> float:
    shares = np.exp(logprobs - logprobs.max())
    return float(shares[list(question.right)].sum() / shares.sum())


_VALUES: Mapping[str, Callable[[Question, Values, Sequence[bool]], float]] = {
    "acc": _acc,
    "acc_norm": _acc_norm,
    "mc2": _mc2,
    "perplexity": lambda question, logprobs, greedy: float(logprobs[0]),
    "likelihood_diff": lambda question, logprobs, greedy: float(abs(logprobs[0] - logprobs[1])),
    "pct_stereotype": lambda question, logprobs, greedy: float(logprobs[0] > logprobs[1]),
}


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
    names = tasks.report_names([(each.task, each.group, each.shots) for each in results])
    for name, result in zip(names, results, strict=True):
        grouped.setdefault((name, result.shots), []).append(result)
    table = []
    for (name, shots), members in grouped.items():
        for number, metric in enumerate(members[0].metrics):
            parts = [member.metrics[metric] for member in members]
            score = parts[0] if len(parts) == 1 else pool(parts)
            main = number == 0
            table.append(ScoreRow(name, shots, metric, score, main, known.get((name, shots)) if main else None))
    return table


def mean_of_suite(table: Sequence[ScoreRow], suite: str) -> Score | None:
    """The mean over a suite's tasks; None where one of them is missing."""
    found = {(row.name, row.shots): row.score for row in table if row.main}
    if not tasks.SUITES[suite].items() <= found.keys():
        return None
    return average([found[each] for each in tasks.SUITES[suite].items()])


def merge(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to the results `now` those that `before`, of the same model, has of other tasks."""
    if before is None:
        return dict(now)
    asked = {(each["task"], each["shots"]) for each in (*now["scores"], *now["tasks"].values())}
    for key, entry in now["tasks"].items():
        if key in before["tasks"] and before["tasks"][key]["questions"] != entry["questions"]:
            asked.add((entry["group"], entry["shots"]))  # the group's score would be of other questions
    old = [line for line in before["scores"] if (line["task"], line["shots"]) not in asked]
    kept = {key: entry for key, entry in before["tasks"].items() if (entry["task"], entry["shots"]) not in asked}
    cut = {key: counts for key, counts in before.get("cut", {}).items() if key in kept}
    suite = {} if now["suite"] is not None else {key: before[key] for key in ("suite", "mean", "missing")}
    return {**now, **suite, "scores": old + now["scores"], "tasks": kept | now["tasks"], "cut": cut | now["cut"]}


def published_model(config: Any, directory: Path) -> str | None:
    """The published model that has this shape, such as `OpenELM-270M-Instruct`; None where there is none.

    An instruction-tuned one is known by its name. Weights are not looked at, so who trains a model of a published shape
    sees the published model's scores beside his own.
    """
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
    """Returns the paper's scores of a model in per cent, by task and number of few-shot examples."""
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
