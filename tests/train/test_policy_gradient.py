"""The policy gradient: worked by hand, by PyTorch's numbers, and by finite differences of a network."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
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
    made = [WeighedAnswer((5,), (0,), (math.log(0.5),), 0.5), WeighedAnswer((5,), (1,), (math.log(0.5),), -0.5)]
    (batch,) = batches_of(made, 2)
    hidden = mx.ones((1, 8, 1))
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
    (batch,) = batches_of([WeighedAnswer((5,), (0,), (math.log(before),), advantage)], 1)
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
        np.zeros_like(targets), targets, trained, None, 0, (advantages.reshape(-1, 1) * trained).astype(np.float32),
        np.array(data["before"], np.float32), trained.astype(np.float32),
    )  # fmt: skip
    total, measures, gradients = computed(
        batch, mx.array(np.array(data["weight"], np.float32)), mx.array(hidden), case["repeated"]
    )
    count = int(trained.sum())
    assert total.item() / count == pytest.approx(case["loss"], abs=1e-5)
    for found, expected in zip(gradients, (case["weight_gradient"], case["hidden_gradient"]), strict=True):
        np.testing.assert_allclose(np.array(found) / count, expected, atol=1e-5)
    assert not case["repeated"] or measures.item() / count == pytest.approx(case["clipped"])


def answers(count: int, seed: int = 0, of_a_prompt: int = 1, longest: int = 30) -> list[WeighedAnswer]:
    """So many answers, as many of one prompt each; every fourth is drawn twice."""
    draw = np.random.default_rng(seed)
    made = list[WeighedAnswer]()
    for number in range(count):
        size = int(draw.integers(1, longest))
        prompt, tokens = (tuple(draw.integers(3, 60, each).tolist()) for each in (int(draw.integers(9, 20)), size))
        logprobs = tuple(np.float32(draw.uniform(-5, -0.1, size)).tolist())
        if number % of_a_prompt:
            prompt = made[-1].prompt
        made.append(WeighedAnswer(prompt, tokens, logprobs, float(draw.normal()) + number % 2))
        if number % 4 == 3 and of_a_prompt > 1:
            made.append(made[-1])
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
        each = batch.advantages
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


@pytest.mark.parametrize(("longest", "shared"), [(9, True), (60, False)])
def test_an_updates_batches_have_every_answer_once(longest: int, shared: bool) -> None:
    """Answers to a prompt stand in a row with it, where that is longer than they are; those that are the same, once."""
    made = answers(24, of_a_prompt=4, longest=longest)
    found = batches_of(made, 8)
    assert sum(PolicyGradient().count(batch) for batch in found) == sum(len(answer.tokens) for answer in made)
    assert len({batch.inputs.shape[0] for batch in found}) == 1
    rows = Counter[WeighedAnswer]()
    for batch in found:
        numbers = np.ones_like(batch.inputs) if batch.segments is None else batch.segments
        assert shared == (batch.segments is not None)
        for row, number in sorted({(row, numbers[row, at]) for row, at in zip(*batch.trained.nonzero(), strict=True)}):
            own = np.flatnonzero(batch.trained[row] & (numbers[row] == number))
            first = np.flatnonzero(batch.trained[row])[0]
            prompt = (*batch.inputs[row, :first].tolist(), int(batch.inputs[row, own[0]]))
            if batch.positions is not None:
                assert batch.positions[row, own].tolist() == [*range(first, first + len(own))]
            tokens = tuple(batch.targets[row, own].tolist())
            assert batch.inputs[row, own[1:]].tolist() == [*tokens[:-1]]
            (advantage,), (copies,) = ({*each[row, own].tolist()} for each in (batch.advantages, batch.copies))
            rows[WeighedAnswer(prompt, tokens, tuple(batch.logprobs[row, own].tolist()), advantage)] += copies
    assert rows == Counter(replace(answer, advantage=float(np.float32(answer.advantage))) for answer in made)
    assert shared == (sum(batch.tokens for batch in found) < sum(len(each.prompt) for each in {*made}))


@pytest.mark.parametrize("repeated", [False, True])
def test_cut_into_batches_an_update_is_the_same(repeated: bool) -> None:
    """Whatever rows answers are in, and on how many processors."""
    model, made = runs.model(), answers(16, of_a_prompt=4, longest=12)
    model.unfreeze()
    step = Step(model, runs.settings(), None, PolicyGradient(repeated))
    found = []
    for most, together, parts in ((64, False, 1), (64, True, 1), (64, True, 2), (5, True, 1), (2, True, 1)):
        step.cut_into(parts)
        total, sums, count = mx.zeros(()), mx.zeros(()), 0
        for batch in batches_of(made, most, together):
            new, gradients, units = step.gradients(batch)
            weights = [layer["attn"]["qkv_proj"]["weight"] for layer in gradients["transformer"]["layers"]]
            total, sums, count = total + mx.stack(weights[:1]), sums + new, count + units
        found.append((np.array(total), np.array(sums), count))
    for weight, sums, count in found[1:]:
        np.testing.assert_allclose(weight, found[0][0], atol=1e-4 * np.abs(found[0][0]).max())
        np.testing.assert_allclose(sums, found[0][1], rtol=1e-4)
        assert count == found[0][2] == sum(len(answer.tokens) for answer in made)


def test_advantages() -> None:
    assert group_advantages(np.array([1.0, 0, 0, 0])).tolist() == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(np.array([1.0, 1, 0, 0]), by_deviation=True) == pytest.approx(
        [0.8659, 0.8659, -0.8659, -0.8659], abs=1e-3
    )
