"""Scores of answers: how many pass the check, and what else became of them.

Knows answers, the check and, to judge how natural they are, a model. Doesn't know where they come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import elm_mlx  # before MLX, for its BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import task

Z = 1.96  # of a normal distribution: 95%


@dataclass(frozen=True)
class Answer:
    """A question, what was answered, and the verdict."""

    prompt: str
    text: str

    @property
    def question(self) -> str:
        """The prompt's last line, which examples may stand before."""
        return task.wish(self.prompt).prompt()

    def __str__(self) -> str:
        return f"{self.text} {'✓' if self.verdict.passes else '✗'}"

    @property
    def verdict(self) -> task.Verdict:
        return task.check(self.text, task.wish(self.prompt))


def read(path: Path) -> list[Answer]:
    """Reads what `elm-mlx generate --json` printed. An answer is the first line: a model as it was writes on and on."""
    records = map(json.loads, path.read_text("utf-8").splitlines())
    return [Answer(record["prompt"], record["text"].strip().partition("\n")[0]) for record in records]


def share(passed: Sequence[bool]) -> str:
    """`61.2 (56.8 to 65.5)`: the percentage that holds, with Wilson's interval."""
    low, high = wilson(sum(passed), len(passed))
    return f"{100 * mean(passed):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def wilson(passed: int, trials: int) -> tuple[float, float]:
    """The shares that so many of so many are compatible with, at 95% (Wilson, 1927)."""
    middle = (passed + Z**2 / 2) / (trials + Z**2)
    half = Z * math.sqrt(passed * (trials - passed) / trials + Z**2 / 4) / (trials + Z**2)
    return max(0.0, middle - half), min(1.0, middle + half)


def surprise(model_path: Path, texts: Sequence[str]) -> float:
    """Nats a token of `texts` as that model sees them, each by itself, without a question before it.

    Every token but BOS counts, over all texts, in float32.
    """
    model, tokenizer = elm_mlx.load(model_path, compute_dtype="float32")
    assert tokenizer is not None
    total, tokens = 0.0, 0
    for text in filter(None, texts):
        ids = mx.array(tokenizer.encode(text))[None]
        total += nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return total / tokens


def passing(answers: Mapping[tuple[str, float], Sequence[Answer]], new: set[str]) -> Iterator[str]:
    """A table in Markdown: what share passes, of all questions and of those in `new`.

    `answers` are by name and temperature, in the order of the rows and of the columns.
    """
    temperatures = list(dict.fromkeys(temperature for _, temperature in answers))
    heads = [f"{which}, {_drawn(temperature)}" for which in ("all", "new") for temperature in temperatures]
    yield f"| passes, % (95% interval) | {' | '.join(heads)} |"
    yield "| --- |" + " ---: |" * len(heads)
    for name in dict.fromkeys(name for name, _ in answers):
        cells = [
            share([answer.verdict.passes for answer in answers[name, temperature] if every or answer.question in new])
            for every in (True, False)
            for temperature in temperatures
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def parts(answers: Mapping[tuple[str, float], Sequence[Answer]]) -> Iterator[str]:
    """A table: what share of the answers gets each part of the check right."""
    yield f"| right, % | {' | '.join(task.Verdict._fields)} |"
    yield "| --- |" + " ---: |" * len(task.Verdict._fields)
    for (name, temperature), given in answers.items():
        columns = zip(*(answer.verdict for answer in given), strict=True)
        shares = " | ".join(f"{100 * mean(column):.1f}" for column in columns)
        yield f"| {name}, {_drawn(temperature)} | {shares} |"


def nature(texts: Mapping[str, Sequence[str]], judge: Path, lessons: set[str]) -> Iterator[str]:
    """A table of `texts` by name: whether they are still sentences, and different ones.

    `judge` is the model that says how natural they are, `lessons` the sentences that were learnt from.
    """
    yield "| the texts | nats a token | words | different, % | different last two words, % | in the lessons, % |"
    yield "| --- |" + " ---: |" * 5
    for name, given in texts.items():
        ends = {tuple(task.words(text)[-2:]) for text in given}
        different, endings = len(set(given)) / len(given), len(ends) / len(given)
        known = mean(text in lessons for text in given)
        count = mean(len(task.words(text)) for text in given)
        figures = f"{surprise(judge, given):.2f} | {count:.1f}"
        yield f"| {name} | {figures} | {100 * different:.1f} | {100 * endings:.1f} | {100 * known:.1f} |"


def _drawn(temperature: float) -> str:
    return f"temperature {temperature}" if temperature else "greedy"
