"""Comparisons: McNemar's test by hand, the bootstrap against the normal approximation."""

from __future__ import annotations

import math
from collections import ChainMap
from typing import Any

import numpy as np
import pytest

from elm_mlx.errors import InputError
from elm_mlx.evaluate import comparison
from elm_mlx.evaluate.tasks import GROUPS


def results(values: dict[str, list[float]], **entry: Any) -> dict[str, Any]:
    known = {"task": "t", "shots": 0, "group": None, "questions": "x", "values": values} | entry
    return {"tasks": {f"{known['task']}@{known['shots']}": known}}


def test_mcnemar_is_the_binomial_test_of_the_disagreements() -> None:
    first = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 1.0])
    second = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0, 1.0])
    # 1 against 5: twice (C(6,0) + C(6,1)) / 2**6
    assert comparison.mcnemar(first, second) == pytest.approx(2 * (1 + 6) / 64)
    assert comparison.mcnemar(first, first) == 1.0


def test_mcnemar_holds_for_many_disagreements() -> None:
    first = np.array([1.0] * 700 + [0.0] * 800)
    second = 1 - first
    z = (800 - 700 - 1) / math.sqrt(1500)  # with the correction for continuity
    assert comparison.mcnemar(first, second) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_resampled_limits_are_those_of_the_normal_for_many_questions() -> None:
    draw = np.random.default_rng(0)
    differences = draw.normal(0.1, 1.0, 900)
    low, high, p = comparison.bootstrap(differences)
    error = differences.std(ddof=1) / 30
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.05 * error * 4)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.05 * error * 4)
    assert p == pytest.approx(math.erfc(abs(differences.mean()) / error / math.sqrt(2)), abs=0.03)


def test_a_run_against_itself_differs_in_nothing() -> None:
    run = results({"acc": [0.0, 1.0, 1.0]})
    (found,) = comparison.compare(run, run)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_which_is_better_depends_on_the_metric() -> None:
    one = results({"acc": [0.0] * 12, "likelihood_diff": [2.0, 2.5] * 6, "perplexity": [-3.0, -4.0] * 6})
    other = results({"acc": [1.0] * 12, "likelihood_diff": [1.0, 1.5] * 6, "perplexity": [-2.0, -2.5] * 6})
    found = {each.metric: each for each in comparison.compare(one, other)}
    assert set(found) == {"acc", "likelihood_diff", "log-likelihood"}
    assert all(each.better for each in found.values())
    assert found["acc"].p == pytest.approx(2 / 2**12)


def test_parts_of_a_group_are_one() -> None:
    def run(values: list[float], names: list[str]) -> dict[str, Any]:
        parts = (results({"acc": values}, task=name, group="mmlu", shots=5)["tasks"] for name in names)
        return {"tasks": dict(ChainMap(*parts))}

    subjects = GROUPS["mmlu"]
    (found,) = comparison.compare(run([0.0, 1.0], subjects), run([1.0, 1.0], subjects))
    assert (found.task, found.count, found.value) == ("mmlu", 2 * len(subjects), 0.5)
    some = comparison.compare(run([0.0, 1.0], subjects), run([1.0, 1.0], subjects[:2]))
    assert [(each.task, each.count) for each in some] == [(name, 2) for name in subjects[:2]]


def test_texts_are_compared_document_by_document() -> None:
    one, other = (results({"bits_per_byte": values}, task="a.jsonl") for values in ([1.0, 2.0] * 9, [0.9, 1.8] * 9))
    (found,) = comparison.compare(one, other)
    assert found.better and found.p < 0.01 and found.value == pytest.approx(-0.15)
    with pytest.raises(InputError, match="nor a text of several documents"):
        comparison.compare(results({}, task="a.txt"), results({}, task="a.txt"))


def test_runs_that_do_not_go_together_are_refused() -> None:
    one = results({"acc": [1.0]})
    with pytest.raises(InputError, match="no task in common"):
        comparison.compare(one, results({"acc": [1.0]}, task="u"))
    with pytest.raises(InputError, match="not the same questions"):
        comparison.compare(one, results({"acc": [1.0]}, questions="y"))
