"""Each kind of adapter against the weight that it stands for, computed in NumPy; and what is trained of it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from elm_mlx.model import lora_layers

OUT, IN, VOCAB, RANK, SCALE = 96, 64, 64, 5, 1.7
KEY = mx.random.key(3)

QUANTIZED: list[dict[str, Any]] = [
    {"group_size": 32, "bits": 4}, {"group_size": 32, "bits": 3}, {"group_size": 64, "bits": 8},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
]  # fmt: skip
BASES = [None, *QUANTIZED]
NAMES = ["dense", *("-".join(map(str, how.values())) for how in QUANTIZED)]


def base(kind: str, how: dict[str, Any] | None) -> nn.Module:
    module = nn.Linear(IN, OUT, bias=False) if kind == "linear" else nn.Embedding(VOCAB, IN)
    module.weight = mx.random.normal(module.weight.shape, key=mx.random.key(1)) * 0.3
    return module if how is None else module.to_quantized(**how)


def wrapped(
    kind: str, how: dict[str, Any] | None, dora: bool, dropout: float = 0.0, adapted_head: bool = False
) -> nn.Module:
    module = lora_layers.wrap(base(kind, how), RANK, SCALE, dropout, KEY, dora=dora, adapted_head=adapted_head)
    module.freeze()
    module.unfreeze(recurse=False, keys=lora_layers.PARAMETERS)
    return module


def trained(module: nn.Module) -> nn.Module:
    """Values that are no longer those of the start."""
    module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(7)) * 0.2
    if "m" in module:
        module.m = module.m * (1 + 0.3 * mx.random.uniform(shape=module.m.shape, key=mx.random.key(8)))
    return module


def own(module: nn.Module) -> dict[str, mx.array]:
    return {name: module[name] for name in lora_layers.PARAMETERS if name in module}


def dense(module: nn.Module) -> np.ndarray:
    inner = module.linear if "linear" in module else module.embedding
    return np.array(lora_layers.dense_weight(inner), np.float64)


def merged(module: nn.Module) -> np.ndarray:
    """The weight that base and adapter amount to, from the papers' formulas."""
    product = np.array(module.lora_a, np.float64) @ np.array(module.lora_b, np.float64)
    weight = dense(module) + SCALE * (product.T if "linear" in module else product)
    if "m" in module:
        weight *= (np.array(module.m) / np.linalg.norm(weight, axis=1))[:, None]
    return weight


def values(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(5))


@pytest.mark.parametrize("how", BASES, ids=NAMES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_linear_computes_what_its_merged_weight_does(dora: bool, how: dict[str, Any] | None) -> None:
    module = wrapped("linear", how, dora)
    x = values(2, 7, IN)
    np.testing.assert_allclose(module(x), module.linear(x), rtol=1e-5, atol=1e-5)  # a new one changes nothing
    trained(module)
    np.testing.assert_allclose(np.array(module(x)), np.array(x) @ merged(module).T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", BASES, ids=NAMES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_embedding_computes_what_its_merged_weight_does(dora: bool, how: dict[str, Any] | None) -> None:
    ids, x = mx.array([[0, 9, VOCAB - 1], [9, 9, 2]]), values(2, 3, IN)
    for adapted_head in (False, True):
        module = wrapped("embedding", how, dora, adapted_head=adapted_head)
        tolerance = 1e-4 if module(ids).dtype == mx.float32 else 1e-2  # the "mx" modes give bfloat16
        assert mx.allclose(module(ids), module.embedding(ids), rtol=tolerance, atol=1e-5)
        assert mx.allclose(module.as_linear(x), module.embedding.as_linear(x), rtol=tolerance, atol=1e-4)
        trained(module)
        found = np.array(module(ids).astype(mx.float32))
        np.testing.assert_allclose(found, merged(module)[np.array(ids)], rtol=10 * tolerance, atol=10 * tolerance)
        head = merged(module) if adapted_head else dense(module)
        np.testing.assert_allclose(np.array(module.as_linear(x)), np.array(x) @ head.T, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merge_gives_the_same_weight(dora: bool) -> None:
    module = trained(wrapped("linear", None, dora))
    weight = lora_layers.merge(
        lora_layers.dense_weight(module.linear), SCALE * (module.lora_a @ module.lora_b).T, module.get("m")
    )
    np.testing.assert_allclose(weight, merged(module), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_only_the_adapter_is_trained(kind: str, dora: bool) -> None:
    module = wrapped(kind, QUANTIZED[0], dora)
    names = {name for name, _ in tree_flatten(module.trainable_parameters())}
    assert names == {"lora_a", "lora_b"} | ({"m"} if dora else set())


def test_gradients_are_those_of_the_formula_written_out() -> None:
    """With the row's length taken for a constant, as the paper says."""
    module, x = trained(wrapped("linear", None, True)), values(4, IN)

    def ours(parameters: dict[str, mx.array]) -> mx.array:
        module.update(parameters)
        return mx.sin(module(x)).sum()

    def plain(parameters: dict[str, mx.array]) -> mx.array:
        weight = module.linear.weight + SCALE * (parameters["lora_a"] @ parameters["lora_b"]).T
        length = mx.stop_gradient(mx.linalg.norm(weight, axis=1))
        return mx.sin(x @ ((parameters["m"] / length)[:, None] * weight).T).sum()

    parameters = own(module)
    expected = mx.grad(plain)(parameters)
    for name, gradient in mx.grad(ours)(parameters).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_gradients_are_finite_differences(kind: str) -> None:
    module = trained(wrapped(kind, None, False))
    x = values(4, IN) if kind == "linear" else mx.array([[3, 1, 3]])

    def loss(parameters: dict[str, mx.array]) -> mx.array:
        module.update(parameters)
        return mx.tanh(module(x)).sum()

    parameters = own(module)
    gradients = mx.grad(loss)(parameters)
    for name, value in parameters.items():
        direction = mx.random.normal(value.shape, key=mx.random.key(2))
        step = 1e-2
        up = loss({**parameters, name: value + step * direction}).item()
        down = loss({**parameters, name: value - step * direction}).item()
        assert (up - down) / (2 * step) == pytest.approx((gradients[name] * direction).sum().item(), rel=2e-2)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_what_is_settled_is_forgotten_in_training(kind: str) -> None:
    module = trained(wrapped(kind, None, True, adapted_head=True))
    x = values(3, IN)
    call = module if kind == "linear" else module.as_linear
    before = call(x)
    module.eval()
    module.settle()
    assert mx.allclose(call(x), before, rtol=1e-6)
    module.lora_b = module.lora_b * 3
    module.train()
    head = np.array(x) @ merged(module).T
    np.testing.assert_allclose(np.array(call(x)), head, rtol=1e-3, atol=2e-3)


def test_dropout_is_for_training_alone() -> None:
    module, x = trained(wrapped("linear", None, False, dropout=0.5)), values(4, IN)
    module.train()
    assert not mx.allclose(module(x), module(x))
    module.eval()
    np.testing.assert_allclose(np.array(module(x)), np.array(x) @ merged(module).T, rtol=1e-3, atol=1e-3)


def test_a_row_of_zeros_stays_one() -> None:
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight = linear.weight * (mx.arange(OUT) > 0)[:, None]
    module = lora_layers.wrap(linear, RANK, SCALE, 0.0, KEY, dora=True, adapted_head=False)
    out = module(values(2, IN))
    assert mx.isfinite(out).all() and (out[:, 0] == 0).all()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_16_bits_stay_16_bits(dora: bool) -> None:
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight = linear.weight.astype(mx.bfloat16)
    module = lora_layers.wrap(linear, RANK, SCALE, 0.0, KEY, dora=dora, adapted_head=False)
    assert module(values(2, IN).astype(mx.bfloat16)).dtype == mx.bfloat16
    assert module.lora_a.dtype == mx.float32  # what is trained keeps its precision


def test_a_key_draws_the_same_adapter() -> None:
    first, again = wrapped("linear", None, False), wrapped("linear", None, False)
    assert mx.array_equal(first.lora_a, again.lora_a)
    bound = IN**-0.5
    assert first.lora_a.min() >= -bound and first.lora_a.max() <= bound and mx.std(first.lora_a) > bound / 3
