"""What answers are worth: how many pass the check, and what else became of them.

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
    """What `elm-mlx generate --json` printed."""
    records = map(json.loads, path.read_text("utf-8").splitlines())
    return [Answer(record["prompt"], record["text"].strip()) for record in records]


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


def passing(answers: Mapping[tuple[str, int], Sequence[Answer]], old: set[str]) -> Iterator[str]:
    """A table in Markdown, by name and temperature: the share that passes, of `old` questions and of others."""
    yield "| passes, % (95% interval) | greedy | temperature 1 | new words, greedy | new words, temperature 1 |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name in dict.fromkeys(name for name, _ in answers):
        cells = [
            share([answer.verdict.passes for answer in answers[name, temperature] if (answer.question in old) == seen])
            for seen in (True, False)
            for temperature in (0, 1)
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def parts(answers: Mapping[tuple[str, int], Sequence[Answer]]) -> Iterator[str]:
    """A table: what of the check the drawn answers pass, of all questions."""
    yield f"| of the check, % | {' | '.join(task.Verdict._fields)} |"
    yield "| --- |" + " ---: |" * len(task.Verdict._fields)
    for (name, temperature), given in answers.items():
        if temperature:
            columns = zip(*(answer.verdict for answer in given), strict=True)
            yield f"| {name} | {' | '.join(f'{100 * mean(column):.1f}' for column in columns)} |"


def nature(texts: Mapping[str, Sequence[str]], judge: Path, book: set[str]) -> Iterator[str]:
    """A table of `texts` by name: whether they are still sentences, and different ones.

    `judge` is the model that says how natural they are, `book` the sentences that were learnt from.
    """
    yield "| the texts themselves | nats a token | different, % | different beginnings, % | from the lessons, % |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, given in texts.items():
        beginnings = {tuple(task.words(text)[:2]) for text in given}
        figures = (len(set(given)) / len(given), len(beginnings) / len(given), mean(text in book for text in given))
        shares = " | ".join(f"{100 * figure:.1f}" for figure in figures)
        yield f"| {name} | {surprise(judge, given):.2f} | {shares} |"
