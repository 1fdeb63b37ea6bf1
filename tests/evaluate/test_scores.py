"""Scores worked by hand, and standard errors against resampling."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from elm_mlx.evaluate import scores
from elm_mlx.evaluate.questions import choices, continuation
from elm_mlx.evaluate.scores import Score
from elm_mlx.evaluate.tasks import SUITES
from elm_mlx.model.config import ModelConfig


def test_the_likeliest_choice_and_the_likeliest_by_character() -> None:
    question = choices("Q:", ["no", "certainly"], 1)
    found = scores.of_question(question, [-4.0, -9.0], [False, False], ("acc", "acc_norm"))
    assert found == {"acc": 0.0, "acc_norm": 1.0}  # -2 and -1 a character


def test_characters_are_counted_and_not_bytes() -> None:
    question = choices("Q:", ["ééé", "abcd"], 0)
    # By bytes -6/6 against -6/4 would be the first; by character -6/3 against -6/4 is the second.
    assert scores.of_question(question, [-6.0, -6.0], [False, False], ("acc_norm",)) == {"acc_norm": 0.0}


def test_of_equals_the_first_is_taken() -> None:
    question = choices("Q:", ["a", "b"], 1)
    assert scores.of_question(question, [-1.0, -1.0], [False, False], ("acc", "acc_norm")) == {"acc": 0, "acc_norm": 0}


def test_a_choice_without_characters_is_never_the_likeliest_by_character() -> None:
    question = choices("Q:", ["", "b"], 0)
    assert scores.of_question(question, [-1.0, -9.0], [False, False], ("acc", "acc_norm")) == {"acc": 1, "acc_norm": 0}


def test_lambada_counts_what_the_model_would_say() -> None:
    question = continuation("Once upon a", "time")
    assert scores.of_question(question, [-0.5], [True], ("acc", "perplexity")) == {"acc": 1.0, "perplexity": -0.5}
    assert scores.of_question(question, [-0.5], [False], ("acc",)) == {"acc": 0.0}


def test_of_one_continuation_both_count_what_the_model_would_say() -> None:
    """In a file of questions that has choices too, which are measured by the likeliest."""
    question = continuation("Once upon a", "time")
    for said in (True, False):
        assert scores.of_question(question, [-0.5], [said], ("acc_norm", "acc")) == {"acc_norm": said, "acc": said}


def test_mc2_is_the_share_of_the_right_even_where_probabilities_are_too_small_for_floats() -> None:
    question = choices("Q:", ["a", "b", "c"], [0, 2])
    logs = [math.log(0.1), math.log(0.2), math.log(0.1)]
    assert scores.of_question(question, logs, [False] * 3, ("mc2",))["mc2"] == pytest.approx(0.5)
    far = [value - 2000 for value in logs]
    assert scores.of_question(question, far, [False] * 3, ("mc2",))["mc2"] == pytest.approx(0.5)


def test_crows_pairs_counts_where_the_stereotype_is_likelier() -> None:
    question = choices("", ["more", "less"], 0, space="")
    found = scores.of_question(question, [-3.0, -5.0], [False, False], ("pct_stereotype", "likelihood_diff"))
    assert found == {"pct_stereotype": 1.0, "likelihood_diff": 2.0}


def test_the_standard_error_of_a_mean_is_the_samples() -> None:
    found = scores.mean("acc", [1.0, 0.0, 1.0, 1.0])
    assert found.value == 0.75
    assert found.stderr == pytest.approx(math.sqrt(0.25 / 4))  # variance 1/4 with 3 degrees of freedom
    assert scores.mean("acc", [1.0]) == Score(1.0, None, 1)


def test_a_perplexitys_standard_error_is_that_of_resampling() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(-3, 1, 400)
    found = scores.mean("perplexity", values.tolist())
    assert found.value == pytest.approx(math.exp(-values.mean()))
    resampled = [math.exp(-draw.choice(values, len(values)).mean()) for _ in range(4000)]
    assert found.stderr == pytest.approx(np.std(resampled), rel=0.05)


def test_tasks_of_a_group_are_pooled_over_their_questions() -> None:
    draw = np.random.default_rng(1)
    samples = [(draw.random(size) < 0.4).astype(float).tolist() for size in (50, 200, 120)]
    found = scores.pool([scores.mean("acc", each) for each in samples])
    whole = scores.mean("acc", [value for each in samples for value in each])
    assert (found.value, found.count) == (pytest.approx(whole.value), 370)
    assert found.stderr == pytest.approx(whole.stderr, rel=0.02)


def test_in_a_suite_each_task_counts_the_same() -> None:
    found = scores.average([Score(0.2, 0.03, 10), Score(0.4, 0.04, 1000)])
    assert (found.value, found.stderr) == (pytest.approx(0.3), pytest.approx(0.025))


def test_shares_are_shown_in_per_cent() -> None:
    assert scores.format_score("acc", Score(0.4508, 0.0102, 9)) == "45.08 ± 1.02"
    assert scores.format_score("perplexity", Score(1234.5, None, 9)) == "1,234.50"
    assert scores.format_score("bits_per_byte", Score(1.23456, 0.01, 9)) == "1.2346 ± 0.0100"


MODELS = [
    size + kind for size in ("OpenELM-270M", "OpenELM-450M", "OpenELM-1_1B", "OpenELM-3B") for kind in ("", "-Instruct")
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("suite", SUITES)
def test_means_are_those_of_the_tasks(name: str, suite: str) -> None:
    found = scores.published()["models"][name][suite]
    tasks = {task: value for task, value in found.items() if task != "mean"}
    assert set(tasks) == set(SUITES[suite])
    # The paper's own means are off by a hundredth in places.
    assert found["mean"] == pytest.approx(sum(tasks.values()) / len(tasks), abs=0.0101)


def test_scores_are_found_by_task_and_examples() -> None:
    found = scores.published_scores("OpenELM-270M")
    assert (found["arc_challenge", 0], found["arc_challenge", 25]) == (26.45, 27.65)
    assert found["piqa", 0] == 69.75
    assert ("arc_easy", 25) not in found
    assert "2404.14619" in scores.published()["source"]


def test_models_are_known_by_shape_and_instruct_by_name(tmp_path: Path) -> None:
    config = ModelConfig.preset("OpenELM-450M")
    assert scores.published_model(config, tmp_path / "mine") == "OpenELM-450M"
    assert scores.published_model(config, tmp_path / "OpenELM-450M-Instruct-4bit") == "OpenELM-450M-Instruct"
    made = tmp_path / "made"
    made.mkdir()
    (made / "conversion.json").write_text(json.dumps({"source": {"name": "apple/OpenELM-450M-Instruct"}}))
    assert scores.published_model(config, made) == "OpenELM-450M-Instruct"
    quantized = ModelConfig.from_dict(config.to_dict() | {"quantization": {"bits": 4, "group_size": 64}})
    assert scores.published_model(quantized, tmp_path) == "OpenELM-450M"
    assert scores.published_model(ModelConfig.preset("OpenELM-450M", vocab_size=1000), tmp_path) is None
    assert scores.published_model(object(), tmp_path) is None
