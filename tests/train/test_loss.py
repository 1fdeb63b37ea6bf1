"""The loss in chunks against the plain one, and both against finite differences, for every kind of head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from elm_mlx import device
from elm_mlx.train import loss
from elm_mlx.train.loss import Head, Positions, padded_size, summed_loss, summed_loss_only

DIM, VOCAB, BATCH, LENGTH = 32, 257, 3, 150


class Adapted(nn.Module):
    """A frozen linear and a product of two thin trained ones."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.lora_a, self.lora_b = mx.random.normal((DIM, 4)) * 0.2, mx.random.normal((4, VOCAB)) * 0.2
        self.base.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return self.base(x) + 2.0 * ((x @ self.lora_a) @ self.lora_b)


def heads() -> dict[str, nn.Module]:
    mx.random.seed(3)
    tied = nn.Embedding(VOCAB, DIM)
    quantized = nn.QuantizedLinear.from_linear(nn.Linear(DIM, VOCAB, bias=False), group_size=32, bits=4)
    quantized.freeze()
    return {
        "tied": tied,
        "linear": nn.Linear(DIM, VOCAB, bias=True),
        "adapted": Adapted(nn.Linear(DIM, VOCAB, bias=False)),
        "quantized": quantized,
        "adapted on quantized": Adapted(nn.QuantizedLinear.from_linear(nn.Linear(DIM, VOCAB, bias=False), 32, 4)),
        "frozen": nn.Linear(DIM, VOCAB, bias=False).freeze(),
    }


HEADS = list(heads())


def logits_of(module: nn.Module) -> Callable[[Any, mx.array], mx.array]:
    def head(parameters: Any, rows: mx.array) -> mx.array:
        module.update(parameters)
        return module.as_linear(rows) if isinstance(module, nn.Embedding) else module(rows)

    return head


def problem(share: float = 0.4) -> tuple[mx.array, np.ndarray, np.ndarray]:
    """Hidden states, targets, and which of them are trained."""
    draw = np.random.default_rng(0)
    hidden = mx.array(draw.normal(size=(BATCH, LENGTH, DIM)).astype(np.float32) * 2)
    return hidden, draw.integers(0, VOCAB, (BATCH, LENGTH), np.int32), draw.random((BATCH, LENGTH)) < share


def arrays(at: Positions) -> tuple[mx.array, ...]:
    return at.where, at.targets, at.weights


def plain(head: Any, parameters: Any, hidden: mx.array, targets: np.ndarray, trained: np.ndarray) -> mx.array:
    losses = nn.losses.cross_entropy(head(parameters, hidden).astype(mx.float32), mx.array(targets))
    return (losses * mx.array(trained)).sum()


@pytest.fixture(params=[128, VOCAB * 64, 1 << 20], ids=["smallest chunks", "64 rows", "one chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_the_plain_ones(name: str, compiled: bool) -> None:
    module = heads()[name]
    head, parameters = logits_of(module), module.trainable_parameters()
    hidden, targets, trained = problem()
    at = arrays(Positions.of(targets, trained))

    def ours(parameters: Any, hidden: mx.array) -> mx.array:
        return summed_loss(Head(head, VOCAB, parameters), hidden, at) * 0.5

    def theirs(parameters: Any, hidden: mx.array) -> mx.array:
        return plain(head, parameters, hidden, targets, trained) * 0.5

    grad = mx.value_and_grad(ours, argnums=(0, 1))
    value, grads = (mx.compile(grad) if compiled else grad)(parameters, hidden)
    expected, truth = mx.value_and_grad(theirs, argnums=(0, 1))(parameters, hidden)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert summed_loss_only(Head(head, VOCAB, parameters), hidden, at).item() == pytest.approx(
        2 * expected.item(), rel=1e-5
    )
    mine, reference = dict(tree_flatten(grads)), dict(tree_flatten(truth))
    assert mine.keys() == reference.keys()
    for key, value in reference.items():
        np.testing.assert_allclose(mine[key], value, atol=3e-5 * max(1.0, float(mx.abs(value).max())))


def test_gradients_are_finite_differences() -> None:
    module = heads()["adapted"]
    head, parameters = logits_of(module), module.trainable_parameters()
    hidden, targets, trained = problem(0.2)
    at = arrays(Positions.of(targets, trained))
    grads = dict(
        tree_flatten(mx.grad(lambda p, h: summed_loss(Head(head, VOCAB, p), h, at), argnums=(0, 1))(parameters, hidden))
    )

    def loss64(parts: dict[str, np.ndarray]) -> float:
        weight = np.array(module.base.weight, np.float64)
        rows = parts["1"].reshape(-1, DIM)[trained.reshape(-1)]
        logits = rows @ weight.T + 2 * (rows @ parts["0.lora_a"]) @ parts["0.lora_b"]
        largest = logits.max(-1, keepdims=True)
        sums = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
        return float((sums - logits[np.arange(len(rows)), targets[trained]]).sum())

    parts = {"1": np.array(hidden, np.float64)}
    parts |= {f"0.{name}": np.array(value, np.float64) for name, value in tree_flatten(parameters)}
    assert loss64(parts) == pytest.approx(summed_loss_only(Head(head, VOCAB, parameters), hidden, at).item(), rel=1e-5)
    for name, grad in grads.items():
        for seed in range(3):
            direction = np.random.default_rng(seed).normal(size=grad.shape)
            step = 1e-5
            up, down = (loss64(parts | {name: parts[name] + sign * step * direction}) for sign in (1, -1))
            slope = float((np.array(grad, np.float64) * direction).sum())
            assert slope == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("gpu", [False, True])
def test_both_devices_agree_and_extreme_logits_stay_finite(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: gpu)
    hidden, targets, trained = problem(1.0)
    module = nn.Linear(DIM, VOCAB, bias=False)
    module.weight = heads()["linear"].weight * 300
    head, parameters, at = logits_of(module), module.trainable_parameters(), arrays(Positions.of(targets, trained))
    value, grad = mx.value_and_grad(lambda h: summed_loss(Head(head, VOCAB, parameters), h, at))(hidden)
    expected = plain(head, parameters, hidden, targets, trained)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert mx.isfinite(grad).all().item()


def test_the_head_never_sees_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", VOCAB * 64)
    hidden, targets, trained = problem()
    module, seen = heads()["linear"], []

    def head(parameters: Any, rows: mx.array) -> mx.array:
        seen.append(rows.shape[0])
        return logits_of(module)(parameters, rows)

    at = Positions.of(targets, trained)
    mx.grad(lambda h: summed_loss(Head(head, VOCAB, module.trainable_parameters()), h, arrays(at)))(hidden)
    assert max(seen) == 64 and sum(seen) == padded_size(at.count) < BATCH * LENGTH


def test_16_bits_give_a_float32_loss_and_gradients_of_their_own_type() -> None:
    hidden, targets, trained = problem()
    module = heads()["linear"]
    module.set_dtype(mx.bfloat16)
    head, parameters, at = logits_of(module), module.trainable_parameters(), arrays(Positions.of(targets, trained))
    value, (grads, grad) = mx.value_and_grad(lambda p, h: summed_loss(Head(head, VOCAB, p), h, at), argnums=(0, 1))(
        parameters, hidden.astype(mx.bfloat16)
    )
    assert value.dtype == mx.float32 and grad.dtype == grads["weight"].dtype == mx.bfloat16
    assert value.item() == pytest.approx(plain(head, parameters, hidden, targets, trained).item(), rel=1e-2)


def test_no_trained_position_is_no_loss_and_no_gradient() -> None:
    hidden, targets, _ = problem()
    at = Positions.of(targets, np.zeros((BATCH, LENGTH), bool))
    module = heads()["linear"]
    head, parameters = logits_of(module), module.trainable_parameters()
    value, grad = mx.value_and_grad(lambda h: summed_loss(Head(head, VOCAB, parameters), h, arrays(at)))(hidden)
    assert at.count == 0 and value.item() == 0 and mx.abs(grad).max().item() == 0


def test_positions_are_found_and_padded() -> None:
    targets = np.arange(200, dtype=np.int32).reshape(2, 100)
    trained = targets % 3 == 0
    at = Positions.of(targets, trained)
    assert at.count == 67 and at.where.shape == (128,)
    np.testing.assert_array_equal(at.targets[:67], targets[trained])
    np.testing.assert_array_equal(at.where[:67], np.flatnonzero(trained))
    assert at.weights.sum().item() == 67 and mx.abs(at.weights[67:]).max().item() == 0


def test_few_sizes_and_little_padding() -> None:
    sizes = {padded_size(count) for count in range(1, 20_001)}
    assert len(sizes) < 70
    for count in range(1, 20_001):
        assert count <= padded_size(count) <= count * 1.13 + 64


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("name", ["tied", "adapted"])
def test_z_loss_is_in_the_gradients_alone(name: str) -> None:
    """Against the plain formula, cross-entropy plus z (log Z)², by MLX's own derivatives."""
    module = heads()[name]
    head, parameters = logits_of(module), module.trainable_parameters()
    hidden, targets, trained = problem()
    at = arrays(Positions.of(targets, trained))

    def ours(parameters: Any, hidden: mx.array) -> mx.array:
        return summed_loss(Head(head, VOCAB, parameters), hidden, at, 0.03)

    def theirs(parameters: Any, hidden: mx.array) -> mx.array:
        partitions = mx.logsumexp(head(parameters, hidden), axis=-1)
        drift = (partitions.square() * mx.array(trained)).sum()
        return plain(head, parameters, hidden, targets, trained) + 0.03 * drift

    value, grads = mx.value_and_grad(ours, argnums=(0, 1))(parameters, hidden)
    _, expected = mx.value_and_grad(theirs, argnums=(0, 1))(parameters, hidden)
    assert value.item() == pytest.approx(plain(head, parameters, hidden, targets, trained).item(), rel=1e-5)
    for (path, found), (_, wanted) in zip(tree_flatten(grads), tree_flatten(expected), strict=True):
        assert mx.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(mx.abs(wanted).max())).item(), path
