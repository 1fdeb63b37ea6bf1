"""The policy gradient: worked by hand, by PyTorch's numbers, and by finite differences of a network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import runs

from elm_mlx.data.batches import Batch
from elm_mlx.train.loss import Head
from elm_mlx.train.policy_gradient import (
    AnswerBatch,
    PolicyGradient,
    WeighedAnswer,
    batches_of,
    group_advantages,
)  # fmt: skip
from elm_mlx.train.step import Step

DATA = Path(__file__).parents[1] / "fixtures" / "policy_gradient.json"


def computed(
    batch: AnswerBatch, weight: mx.array, hidden: mx.array, repeated: bool
) -> tuple[mx.array, mx.array, tuple[mx.array, mx.array]]:
    """The loss and measures, summed, and the loss's gradients by `weight` and `hidden`."""
    objective = PolicyGradient(repeated)
    at = objective.arrays(batch)

    def loss(weight: mx.array, hidden: mx.array) -> tuple[mx.array, mx.array]:
        head = Head(lambda parameters, rows: rows @ parameters["weight"].T, weight.shape[0], {"weight": weight})
        return objective.sums(True, head, hidden, at)

    (total, measures), gradients = mx.value_and_grad(loss, argnums=(0, 1))(weight, hidden)
    return total, measures, gradients


def test_by_hand() -> None:
    """Two answers of one token each, of two tokens alike likely: the right one is made likelier."""
    batch = AnswerBatch.of(
        [WeighedAnswer((5,), (0,), (math.log(0.5),), 0.5), WeighedAnswer((5,), (1,), (math.log(0.5),), -0.5)], rows=2
    )
    hidden = mx.zeros((2, 8, 1)).at[:, 0].add(1.0)
    total, _, (by_weight, _) = computed(batch, mx.zeros((2, 1)), hidden, repeated=False)
    # d log p(token) / d logits is 1 - 1/2 for the token and -1/2 for the other one; -A times that, of both answers.
    np.testing.assert_allclose(np.array(by_weight)[:, 0], [-0.5 * 0.5 - 0.5 * 0.5, 0.5], atol=1e-6)
    assert total.item() == 0  # of ratios of 1, the advantages' sum


@pytest.mark.parametrize(
    ("advantage", "before", "clipped"),
    [(1.0, 0.5 / 1.3, True), (1.0, 0.5 / 1.27, False), (-1.0, 0.5 / 1.3, False),
     (-1.0, 0.5 / 0.79, True), (-1.0, 0.5 / 0.81, False), (1.0, 0.5 / 0.79, False)],
)  # fmt: skip
def test_a_gradient_ends_where_the_ratio_has_moved_far(advantage: float, before: float, clipped: bool) -> None:
    """A probability of a half, that was drawn with another one."""
    batch = AnswerBatch.of([WeighedAnswer((5,), (0,), (math.log(before),), advantage)], rows=1)
    hidden = mx.zeros((1, 8, 1)).at[:, 0].add(1.0)
    total, measures, (by_weight, _) = computed(batch, mx.zeros((2, 1)), hidden, repeated=True)
    ratio = 0.5 / before
    limited = min(max(ratio, 0.8), 1.28)
    assert total.item() == pytest.approx(-min(ratio * advantage, limited * advantage), rel=1e-5)
    assert measures.tolist() == [float(clipped)]
    np.testing.assert_allclose(np.array(by_weight)[0, 0], 0 if clipped else -ratio * advantage * 0.5, atol=1e-5)


@pytest.mark.parametrize("number", range(4))
def test_by_pytorch(number: int) -> None:
    """`benchmarks/policy_gradient.py` has made the numbers."""
    data = json.loads(DATA.read_text())
    case, hidden = data["cases"][number], np.array(data["hidden"], np.float32)
    rewards = np.array(data["rewards"])
    advantages = np.stack([group_advantages(group, case["by_deviation"]) for group in rewards])
    np.testing.assert_allclose(advantages, case["advantages"], atol=1e-9)
    targets, trained = np.array(data["targets"], np.int32), np.array(data["trained"])
    batch = AnswerBatch(
        np.zeros_like(targets), targets, trained, None, 0, advantages.reshape(-1).astype(np.float32),
        np.array(data["before"], np.float32),
    )  # fmt: skip
    total, measures, gradients = computed(
        batch, mx.array(np.array(data["weight"], np.float32)), mx.array(hidden), case["repeated"]
    )
    count = int(trained.sum())
    assert total.item() / count == pytest.approx(case["loss"], abs=1e-5)
    for found, expected in zip(gradients, (case["weight_gradient"], case["hidden_gradient"]), strict=True):
        np.testing.assert_allclose(np.array(found) / count, expected, atol=1e-5)
    assert not case["repeated"] or measures.item() / count == pytest.approx(case["clipped"])


def answers(count: int, seed: int = 0) -> list[WeighedAnswer]:
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        size = int(draw.integers(1, 30))
        prompt, tokens = (tuple(draw.integers(3, 60, each).tolist()) for each in (int(draw.integers(1, 9)), size))
        logprobs = tuple(np.float32(draw.uniform(-5, -0.1, size)).tolist())
        made.append(WeighedAnswer(prompt, tokens, logprobs, float(draw.normal()) + number % 2))
    return made


@pytest.mark.parametrize("repeated", [False, True])
def test_the_gradient_of_a_network_is_that_of_differences(repeated: bool) -> None:
    """Along a random direction, of what is minimized: without ratios, of the weighted log-probabilities."""
    model = runs.model()
    model.unfreeze()
    step = Step(model, runs.settings(), None, PolicyGradient(repeated))
    (batch,) = batches_of(answers(6), 6)
    if repeated:  # near what they are now, so that few are clipped
        near = np.where(batch.trained, measured_logprobs(model, batch) + 0.02 * batch.logprobs, 0).astype(np.float32)
        batch = AnswerBatch(**{**vars(batch), "logprobs": near})
    _, gradients, _ = step.gradients(batch)
    weight = model.transformer.layers[1].ffn.proj_2.weight
    direction = mx.random.normal(weight.shape, key=mx.random.key(3))
    expected = (gradients["transformer"]["layers"][1]["ffn"]["proj_2"]["weight"] * direction).sum().item()

    def value(far: float) -> float:
        model.transformer.layers[1].ffn.proj_2.weight = weight + far * direction
        now = measured_logprobs(model, batch)
        each = batch.advantages[:, None]
        if not repeated:
            return float(-(now * each * batch.trained).sum())
        ratio = np.exp(now - batch.logprobs)
        return float(-(np.minimum(ratio * each, np.clip(ratio, 0.8, 1.28) * each) * batch.trained).sum())

    far = 1e-3
    assert (value(far) - value(-far)) / (2 * far) == pytest.approx(expected, rel=0.02, abs=0.02)
    assert abs(expected) > 0.1


def measured_logprobs(model: Any, batch: Batch) -> Any:
    logits = np.array(model(mx.array(batch.inputs)), np.float64)
    chosen = np.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    return chosen - np.log(np.exp(logits).sum(axis=-1))


def test_an_updates_batches_have_every_answer_once() -> None:
    made = answers(23)
    found = batches_of(made, 5)
    assert [len(batch.inputs) for batch in found] == [5] * 5
    assert sum(PolicyGradient().count(batch) for batch in found) == sum(len(answer.tokens) for answer in made)
    assert sum(batch.tokens for batch in found) == sum(len(each.prompt) + len(each.tokens) - 1 for each in made)
    rows = {}
    for batch in found:
        for row in range(5):
            own = np.flatnonzero(batch.trained[row])
            if own.size:
                prompt = (*batch.inputs[row, : own[0]].tolist(), int(batch.inputs[row, own[0]]))
                key = (prompt, tuple(batch.targets[row, own].tolist()))
                rows[key] = (tuple(batch.logprobs[row, own].tolist()), float(batch.advantages[row]))
    for answer in made:
        logprobs, advantage = rows[answer.prompt, answer.tokens]
        assert logprobs == answer.logprobs and advantage == pytest.approx(answer.advantage)


def test_cut_into_batches_an_update_is_the_same() -> None:
    model, made = runs.model(), answers(12)
    model.unfreeze()
    step = Step(model, runs.settings(), None, PolicyGradient())
    norms = []
    for rows in (12, 5, 1):
        total = None
        for batch in batches_of(made, rows):
            _, gradients, _ = step.gradients(batch)
            weight = gradients["transformer"]["layers"][0]["attn"]["qkv_proj"]["weight"]
            total = weight if total is None else total + weight
        norms.append(np.array(total))
    for other in norms[1:]:
        np.testing.assert_allclose(other, norms[0], atol=1e-4 * np.abs(norms[0]).max())


def test_advantages() -> None:
    assert group_advantages(np.array([1.0, 0, 0, 0])).tolist() == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(np.array([1.0, 1, 0, 0]), by_deviation=True) == pytest.approx(
        [0.8659, 0.8659, -0.8659, -0.8659], abs=1e-3
    )
