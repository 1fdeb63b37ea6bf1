"""The paper's scores, and whose they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elm_mlx.evaluate import task_results
from elm_mlx.evaluate.tasks import SUITES
from elm_mlx.model.config import ModelConfig

MODELS = [
    size + kind for size in ("OpenELM-270M", "OpenELM-450M", "OpenELM-1_1B", "OpenELM-3B") for kind in ("", "-Instruct")
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("suite", SUITES)
def test_means_are_those_of_the_tasks(name: str, suite: str) -> None:
    found = task_results.published()["models"][name][suite]
    tasks = {task: value for task, value in found.items() if task != "mean"}
    assert set(tasks) == set(SUITES[suite])
    # The paper's own means are off by a hundredth in places.
    assert found["mean"] == pytest.approx(sum(tasks.values()) / len(tasks), abs=0.0101)


def test_scores_are_found_by_task_and_examples() -> None:
    found = task_results.published_scores("OpenELM-270M")
    assert (found["arc_challenge", 0], found["arc_challenge", 25]) == (26.45, 27.65)
    assert found["piqa", 0] == 69.75
    assert ("arc_easy", 25) not in found
    assert "2404.14619" in task_results.published()["source"]


def test_models_are_known_by_shape_and_instruct_by_name(tmp_path: Path) -> None:
    config = ModelConfig.preset("OpenELM-450M")
    assert task_results.published_model(config, tmp_path / "mine") == "OpenELM-450M"
    assert task_results.published_model(config, tmp_path / "OpenELM-450M-Instruct-4bit") == "OpenELM-450M-Instruct"
    made = tmp_path / "made"
    made.mkdir()
    (made / "conversion.json").write_text(json.dumps({"source": {"name": "apple/OpenELM-450M-Instruct"}}))
    assert task_results.published_model(config, made) == "OpenELM-450M-Instruct"
    quantized = ModelConfig.from_dict(config.to_dict() | {"quantization": {"bits": 4, "group_size": 64}})
    assert task_results.published_model(quantized, tmp_path) == "OpenELM-450M"
    assert task_results.published_model(ModelConfig.preset("OpenELM-450M", vocab_size=1000), tmp_path) is None
    assert task_results.published_model(object(), tmp_path) is None
