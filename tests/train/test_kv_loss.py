"""The loss of KV Prediction: CoreNet's formulas in NumPy, their derivatives by differences, and what is trained."""

from __future__ import annotations

import kv_predictions
import mlx.core as mx
import numpy as np
import pytest
import reference
import tiny
from mlx.utils import tree_flatten, tree_map

from elm_mlx.data.batches import Batch
from elm_mlx.errors import InputError
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.train.kv_loss import KVLoss
from elm_mlx.train.kvp_recipe import LossWeights
from elm_mlx.train.loop_settings import Schedule, Settings
from elm_mlx.train.step import Step

IDS = np.array([[3, 17, 5, 9, 250, 31, 8, 8, 100], [19, 7, 42, 100, 8, 8, 31, 250, 9]], np.int32)


def made(**fields: object) -> KVPrediction:
    """A base of two layers, and an auxiliary with heads of another size."""
    base = tiny.random_model(tiny.scaled_config(320, **{"num_layers": 2} | fields))
    return kv_predictions.prediction_of(base)


def batch() -> Batch:
    """Two rows, of which the last one's last three positions are not trained."""
    trained = np.ones((2, 8), np.bool_)
    trained[1, 5:] = False
    return Batch(IDS[:, :-1], IDS[:, 1:], trained, None, int(trained.sum()))


def parts(prediction: KVPrediction, z_loss: float = 0.0) -> list[float]:
    """By the formulas: summed cross-entropies of base and auxiliary, with their z-losses, and the summed distance."""
    found, given = np.zeros(3), batch()
    weights, config = kv_predictions.weights_of(prediction.auxiliary), prediction.auxiliary.config
    for inputs, targets, trained in zip(given.inputs, given.targets, given.trained, strict=True):
        predicted, true = kv_predictions.predicted(prediction, inputs), kv_predictions.true(prediction.base, inputs)
        both = (
            kv_predictions.logits(prediction.base, inputs, predicted, own_last=False),
            reference.logits(config, weights, inputs),
        )
        for number, logits in enumerate(both):
            partition = np.log(np.exp(logits).sum(axis=-1))
            losses = partition - logits[np.arange(len(targets)), targets] + z_loss * partition**2
            found[number] += losses[trained].sum()
        for one, other in zip(predicted, true, strict=True):
            found[2] += sum(np.abs(a - b)[trained].mean(axis=(1, 2)).sum() for a, b in zip(one, other, strict=True))
    return list(found)


def step_of(prediction: KVPrediction, objective: KVLoss) -> Step:
    return Step(prediction, Settings(Schedule(0.01, 4)), objective=objective)


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(2.0, 0.5, 3.0), LossWeights(0.0, 1.0, 0.0)])
def test_the_formulas(weights: LossWeights) -> None:
    prediction = made()
    step = step_of(prediction, KVLoss(weights, 2, z_loss=0.1))
    expected, given = parts(prediction), batch()
    factors = (weights.base, weights.auxiliary, 0.5 if weights.kv is None else weights.kv)
    total = float(np.dot(expected, factors))
    sums, _, count = step.gradients(given)
    np.testing.assert_allclose(sums, [total, *expected], rtol=2e-5)
    np.testing.assert_allclose(step.loss(given)[0], [total, *expected], rtol=2e-5)
    assert count == 13


@pytest.mark.parametrize("recompute", [False, True])
def test_derivatives_are_the_differences_of_the_formulas(recompute: bool) -> None:
    prediction, z_loss, size = made(), 0.05, 5e-5
    settings = Settings(Schedule(0.01, 4), grad_checkpoint=recompute)
    objective = KVLoss(LossWeights(), 2, z_loss, recompute)
    _, gradients, _ = Step(prediction, settings, objective=objective).gradients(batch())
    kept, keys = prediction.trainable_parameters(), iter(mx.random.split(mx.random.key(5), 64))
    for part in ("auxiliary", "maps"):
        direction = tree_map(lambda value: mx.random.normal(value.shape, key=next(keys)), kept[part])
        slope = sum(
            float((one * other).sum())
            for (_, one), (_, other) in zip(tree_flatten(gradients[part]), tree_flatten(direction), strict=True)
        )
        values = []
        for sign in (1, -1):
            moved = tree_map(lambda value, way, sign=sign: value + sign * size * way, kept[part], direction)
            prediction.update({part: moved})
            values.append(np.dot(parts(prediction, z_loss), (1, 1, 0.5)))
        prediction.update(kept)
        assert slope == pytest.approx((values[0] - values[1]) / (2 * size), rel=2e-3)


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(1.0, 0.0, 0.0), LossWeights(0.0, 0.0, 1.0)])
def test_gradients_reach_auxiliary_and_maps_and_never_the_base(weights: LossWeights) -> None:
    prediction = made()
    before = {name: np.array(value) for name, value in tree_flatten(prediction.base.parameters())}
    step = step_of(prediction, KVLoss(weights, 2))
    _, gradients, count = step.gradients(batch())
    found = dict(tree_flatten(gradients))
    assert {name.partition(".")[0] for name in found} == {"auxiliary", "maps"}
    still = {name for name, value in found.items() if not float(mx.abs(value).max())}
    # Nothing reads what the auxiliary's last layer makes of its keys and values but its own loss.
    behind = (
        () if weights.auxiliary else ("layers.1.attn.out_proj", "layers.1.ffn", "q_norm", "k_norm", "transformer.norm")
    )
    assert all(any(part in name for part in behind) for name in still), still
    norm = mx.array(1.0)
    step.apply(gradients, norm, count, 0.01)
    mx.eval(step.state())
    for name, value in tree_flatten(prediction.base.parameters()):
        np.testing.assert_array_equal(before[name], value, err_msg=name)


def test_a_base_that_predicts_itself_has_its_own_loss() -> None:
    base, twin = (tiny.random_model(tiny.scaled_config(320)) for _ in range(2))
    step = step_of(kv_predictions.identity_of(base, twin), KVLoss(LossWeights(), 3))
    (_, own, auxiliary, distance), *_ = step.gradients(batch())
    expected = 0.0
    for inputs, targets, trained in zip(batch().inputs, batch().targets, batch().trained, strict=True):
        found = reference.log_softmax(reference.logits(base.config, kv_predictions.weights_of(base), inputs))
        expected -= found[np.arange(8), targets][trained].sum()
    assert float(own) == pytest.approx(expected, rel=1e-5) == float(auxiliary) and float(distance) < 1e-4


@pytest.mark.parametrize("weights", [(-1.0, 1.0, None), (0.0, 0.0, 0.0), (float("nan"), 1.0, 1.0)])
def test_weights_that_make_no_loss(weights: tuple[float, float, float | None]) -> None:
    with pytest.raises(InputError, match="the weights of losses are numbers from 0, and not all 0"):
        LossWeights(*weights)
