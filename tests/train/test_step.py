"""An update against independent references: NumPy's cross-entropy and AdamW, MLX's Adafactor, finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt
import pytest
import runs
from mlx.utils import tree_flatten, tree_map

from elm_mlx.data.batches import Batch
from elm_mlx.train.step import Step, clipped, decayed, global_norm, make_optimizer

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
    step = Step(model, runs.settings())
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
    step = Step(model, runs.settings(grad_checkpoint=again))
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
    step = Step(model, runs.settings(weight_decay=decay, betas=BETAS, eps=EPS, clip=limit))
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
    step = Step(model, runs.settings())
    _, whole, _ = step.gradients(batch)
    parts = [step.gradients(batch.rows(slice(row, row + 1)))[1] for row in range(4)]
    summed = parts[0]
    for part in parts[1:]:
        summed = tree_map(mx.add, summed, part)
    for name, value in flat(whole).items():
        np.testing.assert_allclose(flat(summed)[name], value, atol=1e-4 * np.abs(value).max(), err_msg=name)


def test_adamw_is_its_formula_with_decay_of_matrices_alone() -> None:
    draw = np.random.default_rng(0)
    start = {"matrix": draw.normal(size=(5, 7)), "norm": draw.normal(size=(7,))}
    ours = {name: mx.array(value.astype(np.float32)) for name, value in start.items()}
    optimizer = make_optimizer(runs.settings())
    optimizer.init(ours)
    m, v = ({name: np.zeros_like(value) for name, value in start.items()} for _ in range(2))
    for step in range(1, 6):
        rate = 0.01 * step
        grads = {name: draw.normal(size=value.shape) for name, value in start.items()}
        optimizer.state["learning_rate"] = mx.array(rate)
        ours = decayed(ours, mx.array(rate * 0.1))
        ours = optimizer.apply_gradients({n: mx.array(g.astype(np.float32)) for n, g in grads.items()}, ours)
        for name, grad in grads.items():
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.95 * v[name] + 0.05 * grad**2
            if name == "matrix":
                start[name] = start[name] * (1 - rate * 0.1)
            start[name] -= rate * (m[name] / (1 - 0.9**step)) / (np.sqrt(v[name] / (1 - 0.95**step)) + 1e-8)
    for name, value in start.items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-4, atol=1e-6)


def test_adafactor_is_mlxs_at_a_given_rate_with_decay_of_matrices_alone() -> None:
    draw = np.random.default_rng(1)
    start = {"matrix": mx.array(draw.normal(size=(5, 7))), "norm": mx.array(draw.normal(size=(7,)))}
    grads = {name: mx.array(draw.normal(size=value.shape)) for name, value in start.items()}
    ours = make_optimizer(runs.settings(optimizer="adafactor"))
    theirs = optim.Adafactor(0.01, relative_step=False, scale_parameter=False)
    ours.init(start)
    ours.state["learning_rate"] = mx.array(0.01)
    mine = ours.apply_gradients(grads, decayed(start, mx.array(0.01 * 0.5)))
    reference = theirs.apply_gradients(grads, start)
    np.testing.assert_allclose(mine["norm"], reference["norm"], rtol=1e-5)
    np.testing.assert_allclose(mine["matrix"], reference["matrix"] - start["matrix"] * 0.01 * 0.5, rtol=1e-4, atol=1e-6)


def test_clipping_scales_all_by_one_number() -> None:
    grads = {"a": mx.array([3.0]), "b": [mx.array([[4.0]])]}
    norm = global_norm(grads)
    assert norm.item() == pytest.approx(5.0)
    cut = clipped(grads, norm, 1.0)
    assert cut["a"].item() == pytest.approx(0.6, rel=1e-5) and cut["b"][0].item() == pytest.approx(0.8, rel=1e-5)
    assert clipped(grads, norm, 6.0)["a"].item() == 3.0


def test_the_norm_of_16_bit_gradients_does_not_overflow() -> None:
    assert global_norm({"a": mx.full((4,), 300.0, mx.float16)}).item() == pytest.approx(600.0)
