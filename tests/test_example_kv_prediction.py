"""What examples/kv-prediction measures, against the scorer of `eval` and a prediction that is exact."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import kv_predictions
import mlx.core as mx
import pytest

from elm_mlx import load
from elm_mlx.evaluate.scoring import Scorer
from elm_mlx.evaluate.tokens import Scored

EXAMPLE = Path(__file__).parents[1] / "examples" / "kv-prediction"
LENGTHS = (128, 512, 2048)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    for name in ("books", "command", "page", "pages"):  # of which every example has its own, or finds it by its path
        monkeypatch.delitem(sys.modules, name, raising=False)
    return runpy.run_path(str(EXAMPLE / "run.py"))


def test_the_base_and_what_predicts_exactly_are_scored_as_eval_does(
    example: dict[str, Any], classics_dir: Path
) -> None:
    base, tokenizer = load(classics_dir)
    held_out = list(example["passages"](tokenizer, 1))

    def likeliest(length: int) -> list[mx.array]:
        prompts = [[1, *before[len(before) - length + 1 :], *after[:-1]] for before, after in held_out]
        return [mx.argmax(base(mx.array([each]))[0, length - 1 :], axis=-1) for each in prompts]

    exact = kv_predictions.identity_of(base, base)
    whole, predicted, cut = (
        example["scores"](likeliest, variant, held_out, tokenizer)
        for variant in ((base, None, 1.0), (base, exact, 1.0), (base, None, 1 / 16))
    )
    for length in LENGTHS:
        items = [[Scored([1, *before[len(before) - length + 1 :], *after], length)] for before, after in held_out]
        expected = [-each.logprobs[0] for each in Scorer(base, 2112).score(items)]
        assert whole[str(length)]["nats"] == pytest.approx(expected, abs=1e-2)
        assert predicted[str(length)]["nats"] == pytest.approx(expected, abs=1e-2)
        assert whole[str(length)]["first"] == predicted[str(length)]["first"] == whole[str(length)]["each"] == 1
        assert cut[str(length)]["each"] < 1
        if length <= base.config.max_context_length:  # what is before is of use
            assert sum(cut[str(length)]["nats"]) > sum(expected)
    assert example["right_guesses"](base, base, held_out, tokenizer) == 1
    found = example["times"]({"base/1": (base, None, 1.0), "kvp/1": (base, exact, 1.0)}, held_out[0][0], [32, 128], 1)
    assert {length: {name: len(each) for name, each in own.items()} for length, own in found.items()} == {
        "32": {"base/1": 2, "kvp/1": 2}, "128": {"base/1": 1, "kvp/1": 1},
    }  # fmt: skip


def test_a_training_that_was_stopped_has_not_ended(example: dict[str, Any], tmp_path: Path) -> None:
    assert example["updates"](tmp_path) == 0
    (tmp_path / "kvp.json").write_text('{"format": 1, "trained": {"updates": 7}}')
    assert example["updates"](tmp_path) == 7


def test_the_study_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    soon = ["--auxiliaries", "small", "--seeds", "1", "--steps", "1", "--passages", "1", "--repeats", "1"]
    fields = ["--set", "optimizer.steps=1", "optimizer.warmup=0", "data.validation_rows=1", "data.window=4096"]
    command = [sys.executable, str(EXAMPLE / "run.py"), "--out", str(tmp_path / "out"), *soon, *fields]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert first.stdout.count("$ elm-mlx kvp") == 3 and first.stdout.count("training ") == 2
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert results["quality"].keys() == {
        "base", "fit", "fit, answer kept", "kvp", "kvp, answer kept", "alone", "drafts", "own"
    }  # fmt: skip
    assert all(0 < sum(found["2048"]["nats"]) < 64 * 2 * 9 for found in results["quality"]["kvp"]["small"].values())
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "$ elm-mlx" not in again.stdout and "training " not in again.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text("utf-8")) == results
