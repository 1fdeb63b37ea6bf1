"""lm_eval's side of the table, played by a few lines: what it asks of a model, and what it is told."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from elm_mlx.errors import InputError
from elm_mlx.evaluate import harness, tokens
from elm_mlx.evaluate.evaluation import HARNESS, Evaluation, EvaluationRequest
from elm_mlx.evaluate.scoring import Scorer
from elm_mlx.inference.generation import generate
from elm_mlx.store.loading import load


@dataclass
class Request:
    args: tuple[Any, ...]
    task_name: str = "t"
    doc_id: int | None = 0


class LM:
    """As lm_eval's: abstract, and without arguments."""


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A harness of two tasks that keeps what it was called with."""
    called: dict[str, Any] = {}

    def simple_evaluate(model: Any, **options: Any) -> dict[str, Any]:
        called.update(options)
        found = model.loglikelihood([Request(("the quick", " brown")), Request(("the quick", " fox"))])
        return {"results": {"t": {"acc,none": found[0][0] > found[1][0]}}, "odd": {1, 2}}

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            called["include_path"] = include_path

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name in ("t", "u")]

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.utils": {"make_table": lambda found: f"a table of {', '.join(found['results'])}"},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return called


def test_choices_of_a_question_are_scored_together_and_told_in_order(
    tiny_model_dir: Path, lm_eval: dict[str, Any]
) -> None:
    model, tokenizer = load(tiny_model_dir)
    pairs = [("the quick", " brown fox"), ("", "an old king"), ("the quick", " dogs"), ("lazy ", "dogs")]
    documents = [0, 1, 0, None]
    asked = [Request(pair, doc_id=document) for pair, document in zip(pairs, documents, strict=True)]
    told: list[tuple[int, int]] = []
    found = harness.language_model(
        model, tokenizer, lambda what, done=0, total=0: told.append((done, total))
    ).loglikelihood(asked)
    assert tokenizer is not None
    expected = [Scorer(model).score([tokens.encode([pair], tokenizer, 512)])[0] for pair in pairs]
    assert [value for value, _ in found] == pytest.approx([each.logprobs[0] for each in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [each.greedy[0] for each in expected]
    assert told[-1][0] == told[-1][1]


def test_whole_texts_and_generated_ones(tiny_model_dir: Path, lm_eval: dict[str, Any]) -> None:
    model, tokenizer = load(tiny_model_dir)
    assert tokenizer is not None
    ours = harness.language_model(model, tokenizer)
    text = "the quick brown fox jumps " * 150
    windows = list(tokens.slide(tokenizer.encode(text), 512, 512))
    assert len(windows) > 1
    expected = sum(Scorer(model).score([windows])[0].logprobs)
    assert ours.loglikelihood_rolling([Request((text,))]) == pytest.approx([expected], rel=1e-5)
    options = {"until": ["\n", ""], "max_gen_toks": 4, "do_sample": False, "temperature": 0.7}
    said = generate(model, tokenizer, "an old king", max_tokens=4, stop=["\n"])
    assert ours.generate_until([Request(("an old king", options))]) == [said]
    with pytest.raises(InputError, match=r"wants 512 tokens \(max_gen_toks\), and the model's context is 512"):
        ours.generate_until([Request((text, {"until": ".", "max_gen_toks": 512}))])
    # Cut to what leaves room for an answer.
    assert len(ours.generate_until([Request((text, {"until": ".", "max_gen_toks": 3}))])) == 1


def test_the_harness_results_are_kept(tiny_model_dir: Path, tmp_path: Path, lm_eval: dict[str, Any]) -> None:
    wanted = EvaluationRequest(tasks=["t,u"], data=tmp_path, shots=3, limit=7)
    done = Evaluation(tiny_model_dir, wanted, tmp_path / "out")
    assert done.run_harness() == "a table of t"
    assert lm_eval["tasks"] == ["t", "u"]
    assert (lm_eval["num_fewshot"], lm_eval["limit"], lm_eval["include_path"]) == (3, 7, str(tmp_path))
    assert "t" in json.loads((tmp_path / "out" / HARNESS).read_text())["results"]
    with pytest.raises(InputError, match="lm_eval knows no task v"):
        Evaluation(tiny_model_dir, EvaluationRequest(tasks=["t", "v"]), tmp_path / "out").run_harness()
