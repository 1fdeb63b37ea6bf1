"""Models of other families: the same scores as text by text, and a state is read whole."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import family_cases
import mlx.core as mx
import numpy as np
import pytest

from elm_mlx.evaluate.evaluation import Evaluation, EvaluationRequest
from elm_mlx.evaluate.scoring import Scorer
from elm_mlx.evaluate.tokens import Scored
from elm_mlx.store.loading import load_model

NAMES = ("llama", "mistral", "phi3", "olmo2", "olmo3", "mamba")


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_each_text_by_itself(name: str, family_dirs: dict[str, Path]) -> None:
    model = load_model(family_dirs[name])
    draw = random.Random(0)
    about = [draw.randrange(10, 300) for _ in range(20)]  # past OLMo 3's window, of 16 in the tiny one
    items = []
    for _ in range(6):
        context = about + [draw.randrange(10, 300) for _ in range(draw.randrange(1, 12))]
        ends = [[draw.randrange(10, 300) for _ in range(draw.randrange(1, 5))] for _ in range(3)]
        items.append([Scored(context + end, len(context)) for end in ends])
    scorer = Scorer(model, 128)
    assert scorer.sharing == (name != "mamba")
    check(model, scorer, items)


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("name", ["llama, longrope", "phi3, longrope, partial, tied"])
def test_longrope_reads_each_text_by_its_own_length(name: str, length: int, tmp_path: Path) -> None:
    """Texts on both sides of the 16 tokens where its factors change."""
    model, draw = load_model(family_cases.write(tmp_path / "model", name)), random.Random(0)
    about = [draw.randrange(3, 64) for _ in range(9)]
    items = []
    for _ in range(12):
        context = about + [draw.randrange(3, 64) for _ in range(draw.randrange(1, length - 9))]
        ends = [[draw.randrange(3, 64) for _ in range(draw.randrange(1, 6))] for _ in range(draw.choice([1, 3]))]
        items.append([Scored(context + end, len(context)) for end in ends])
    for tokens in (64, 4096):
        check(model, Scorer(model, tokens), items)


def check(model: Any, scorer: Scorer, items: list[list[Scored]]) -> None:
    """Against each text by itself, read whole."""
    for item, result in zip(items, scorer.score(items), strict=True):
        for each, found in zip(item, result.logprobs, strict=True):
            logits = np.array(model(mx.array([each.ids[:-1]]))[0], np.float64)
            logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            expected = sum(logs[at - 1, each.ids[at]] for at in range(each.start, len(each.ids)))
            assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_task_and_a_text_are_measured(name: str, family_dirs: dict[str, Path], tmp_path: Path) -> None:
    own, tale = tmp_path / "own.jsonl", tmp_path / "tale.txt"
    records = [{"query": f"The crow {n}", "choices": ["drank", "was thirsty"], "gold": n % 2} for n in range(5)]
    own.write_text("".join(json.dumps(record) + "\n" for record in records))
    tale.write_text("The crow was half dead with thirst. " * 9)
    done = Evaluation(family_dirs[name], EvaluationRequest(tasks=[str(own)], texts=[tale], window=64), tmp_path / "out")
    done.run()
    assert [row.metric for row in done.rows] == ["acc_norm", "acc", "bits_per_byte", "perplexity"]
    assert done.published is None
