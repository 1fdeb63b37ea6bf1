"""Metrics of log-probabilities, question by question, and their means with standard errors.

The formulas are LM Evaluation Harness': `acc` takes the likeliest choice, `acc_norm` the likeliest by character,
`mc2` the share of probability that right choices have (Lin et al., 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elm_mlx.evaluate.questions import Question

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


def pooled(parts: Sequence[Score]) -> Score:
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


def shown(metric: str, score: Score) -> str:
    """`45.08 ± 1.02`, shares in per cent."""
    factor = 100.0 if metric in SHARES else 1.0
    places = 4 if metric == "bits_per_byte" else 2
    value = f"{factor * score.value:,.{places}f}"
    return value if score.stderr is None else f"{value} ± {factor * score.stderr:,.{places}f}"


def _acc(question: Question, logprobs: Values, greedy: Sequence[bool]) -> float:
    return float(greedy[0] if len(logprobs) == 1 else np.argmax(logprobs) in question.right)


def _acc_norm(question: Question, logprobs: Values, greedy: Sequence[bool]) -> float:
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
