"""An update against independent references: NumPy's cross-entropy and AdamW, and finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import runs
from mlx.utils import tree_flatten, tree_map

from elm_mlx.data.batches import Batch
from elm_mlx.train.optimizer import AdamW, global_norm, make_optimizer
from elm_mlx.train.step import Step, recompute_blocks

BETAS, EPS = (0.9, 0.95), 1e-8


def flat(tree: Any) -> dict[str, npt.NDArray[np.float64]]:
    return {name: np.array(value).astype(np.float64) for name, value in tree_flatten(tree)}


def cross_entropy(model: Any, batch: Batch) -> float:
    """The summed loss of the trained tokens, from the logits of rows that hold one example each, in float64."""
    logits = np.array(model(mx.array(batch.inputs))).astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -float(np.take_along_axis(logs, batch.targets[..., None], -1)[..., 0][batch.trained].sum())


def test_the_loss_is_the_cross_entropy_of_trained_tokens() -> None:
    model, batch = runs.model(), next(runs.batches(packed=False, size=4))
    step = Step(model, make_optimizer("adamw", 0.0))
    expected = cross_entropy(model, batch)
    sums, _, count = step.gradients(batch)
    assert count == batch.trained.sum() and sums.shape == (1,)
    assert sums.item() == pytest.approx(expected, rel=1e-5)
    assert step.loss(batch)[0].item() == pytest.approx(expected, rel=1e-5)
    nothing = replace(batch, trained=np.zeros_like(batch.trained))
    assert (step.loss(nothing)[0].item(), step.loss(nothing)[1]) == (0.0, 0)


@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_finite_differences(again: bool) -> None:
    """Along a random direction in each weight: (L(w + hd) - L(w - hd)) / 2h = g·d."""
    model, batch = runs.model(), next(runs.batches(packed=False, size=4))
    if again:
        recompute_blocks(model)
    model.train()
    step = Step(model, make_optimizer("adamw", 0.0))
    _, gradients, _ = step.gradients(batch)
    found, before = flat(gradients), dict(tree_flatten(model.trainable_parameters()))
    assert found.keys() == before.keys()
    draw = np.random.default_rng(0)
    for name, value in before.items():
        direction = draw.standard_normal(value.shape)
        # Half along the gradient, so that the slope is no difference of large numbers; short enough to be straight.
        direction = direction / np.linalg.norm(direction) + found[name] / np.linalg.norm(found[name])
        h = 3e-3 * float(mx.linalg.norm(value).item()) / np.linalg.norm(direction)
        ends = []
        for sign in (1, -1):
            model.load_weights([(name, value + mx.array((sign * h * direction).astype(np.float32)))], strict=False)
            ends.append(cross_entropy(model, batch))
        model.load_weights([(name, value)], strict=False)
        slope = (found[name] * direction).sum()
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=0.02), name


@pytest.mark.parametrize("limit", [0.5, None])
def test_updates_are_adamws_of_clipped_means(limit: float | None) -> None:
    """Three of them, in NumPy: of the sums' mean, scaled to the limit, with decay on matrices alone."""
    model = runs.model()
    decay, rate = 0.1, 2e-3
    step = Step(model, AdamW(decay, BETAS, EPS), clip=limit)
    expected = flat(model.trainable_parameters())
    first = {name: np.zeros_like(value) for name, value in expected.items()}
    second = {name: np.zeros_like(value) for name, value in expected.items()}
    source = runs.batches()
    for number in range(1, 4):
        _, sums, count = step.gradients(next(source))
        means = {name: grad / count for name, grad in flat(sums).items()}
        length = np.sqrt(sum((grad**2).sum() for grad in means.values()))
        norm = global_norm(sums) / count
        assert norm.item() == pytest.approx(length, rel=1e-5)
        assert limit is None or length > limit, "the limit is to be met"
        step.apply(sums, norm, count, rate)
        for name, grad in means.items():
            grad = grad if limit is None else grad * limit / (length + 1e-6)
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * grad
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * grad**2
            mean, square = first[name] / (1 - BETAS[0] ** number), second[name] / (1 - BETAS[1] ** number)
            value = expected[name] * (1 - rate * decay if expected[name].ndim > 1 else 1)
            expected[name] = value - rate * mean / (np.sqrt(square) + EPS)
    for name, value in flat(model.trainable_parameters()).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=2e-5, err_msg=name)


def test_gradients_of_a_batch_are_those_of_its_rows_summed() -> None:
    model, batch = runs.model(), next(runs.batches(packed=False, size=4))
    step = Step(model, make_optimizer("adamw", 0.0))
    _, whole, _ = step.gradients(batch)
    parts = [step.gradients(batch.rows(slice(row, row + 1)))[1] for row in range(4)]
    summed = parts[0]
    for part in parts[1:]:
        summed = tree_map(mx.add, summed, part)
    for name, value in flat(whole).items():
        np.testing.assert_allclose(flat(summed)[name], value, atol=1e-4 * np.abs(value).max(), err_msg=name)
