"""Layers by `sublayers.c`, against the same network layer by layer in MLX."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import family_cases
import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny

from elm_mlx import blas, device
from elm_mlx.inference.rows import Rows, prefill
from elm_mlx.model import lora_layers, network, other_networks, stored_layers, sublayers
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.lora_layers import LoRALinear
from elm_mlx.model.sublayers import MOST_ROWS
from elm_mlx.store import adapters, loading

pytestmark = pytest.mark.skipif(
    blas.own("elm_mlx_retire") is None, reason="cblas.c is not compiled here, so every layer is MLX's"
)
PROMPTS = blas.computes_many_rows()  # else more than MOST_ROWS are as many times few
CLOSE = 1e-5  # of the logits' spread
FAMILIES = [
    "llama, biases", "llama, head_dim", "llama, longrope", "mistral, window", "phi3, partial", "olmo", "olmo2", "olmo3",
    "qwen2", "qwen3", "smollm3, its layers",
]  # fmt: skip
OPENELMS: dict[str, dict[str, Any]] = {
    "openelm": {}, "openelm, no gate": {"ffn_with_glu": False},
    "openelm, heads not normed": {"normalize_qk_projections": False},
}  # fmt: skip


def openelm(**fields: Any) -> network.Model:
    return tiny.random_model(tiny.scaled_config(320, **fields))


@pytest.fixture
def model() -> network.Model:
    return openelm()


def adapted(model: Any, kind: str, some: bool = False) -> Any:
    """Returns the model with a "lora" or a "dora" in it as after a training: on all linears of the layers, of one rank;
    or on some, of another rank in each layer."""
    config = model.config
    rank = [1 + 13 * layer for layer in range(config.num_layers)] if some else 5
    targets = config.linears[::2] if some else None
    adapters.attach(model, adapters.plan(config, rank=rank, dora=kind == "dora", targets=targets))
    for at, module in enumerate(model.modules()):
        if isinstance(module, LoRALinear):
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(at)) * 0.2
            if "m" in module:
                module.m = module.m * (1 + 0.3 * mx.random.uniform(shape=module.m.shape, key=mx.random.key(at)))
    model.freeze()
    return model.eval()


def layers_of(model: network.Model, rows: int = 1) -> sublayers.LayersInC | None:
    body = model.transformer
    return body.in_c(rows)


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (network, other_networks):
        monkeypatch.setattr(module, "layers_in_c", lambda *_: None)


def logits(model: Any, rows: int) -> mx.array:
    """Of short prompts, which are few rows too, of steps of as many texts, and of a longer prompt in two pieces."""
    found, together = [], Rows(model)
    for row in range(rows):
        ids = [(3 + row + 5 * at) % 60 for at in range(2 + row)]
        caches = make_prompt_cache(model)
        found.append(prefill(model, ids, caches))
        together.join(caches, ids)
    found += [together.step(mx.array([(7 * row + step) % 60 for row in range(rows)])) for step in range(12)]
    found.append(prefill(model, [(5 * at) % 60 for at in range(57)], make_prompt_cache(model), 33))
    return mx.concatenate(found)


def compare_with_mlx(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {rows: logits(model, rows) for rows in (1, 3)}
    mx.eval(found)
    own = isinstance(model, network.Model)
    assert isinstance(getattr(model.transformer if own else model, "_layers_in_c", None), sublayers.LayersInC)
    with monkeypatch.context() as patch:
        without(patch)
        for rows, ours in found.items():
            expected = logits(model, rows)
            assert not mx.array_equal(ours, expected), "both sides are the same code"
            assert mx.abs(ours - expected).max().item() < CLOSE * (expected.max() - expected.min()).item()


def named_model(name: str, tmp_path: Path) -> Any:
    if name in OPENELMS:
        return openelm(**OPENELMS[name])
    return loading.load_model(family_cases.write(tmp_path / "m", name))


@pytest.mark.parametrize("name", [*FAMILIES, *OPENELMS])
def test_logits_are_those_of_mlx(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_with_mlx(named_model(name, tmp_path), monkeypatch)


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama, biases", "phi3, partial", "olmo2", "qwen3", *OPENELMS])
@pytest.mark.usefixtures("two_threads")
def test_adapters_are_computed_as_by_mlx(
    name: str, kind: str, some: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_with_mlx(adapted(named_model(name, tmp_path), kind, some), monkeypatch)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [4, 16])
def test_adapters_beside_stored_weights(bits: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = openelm(ffn_dim_divisor=32)  # whole groups
    if bits == 16:
        model.set_dtype(mx.bfloat16)
    else:
        nn.quantize(model, 32, bits)
    for _, layer in list(stored_layers.candidates(model)):
        assert stored_layers.read_as_stored(layer)
    for module in model.modules():  # norms
        if set(module.parameters()) == {"weight"} and not isinstance(module, stored_layers.StoredLayer):
            module.set_dtype(mx.float32)
    compare_with_mlx(adapted(model, kind), monkeypatch)


def test_an_adapter_that_changes_is_seen(model: network.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is trained, with a dropout, is MLX's."""
    adapted(model, "dora")
    mx.eval(logits(model, 2))
    module = model.transformer.layers[1].ffn.proj_2
    for name in lora_layers.PARAMETERS:
        module[name] = module[name] * 3
        compare_with_mlx(model, monkeypatch)
    model.train()
    assert layers_of(model) is None
    model.eval()
    assert layers_of(model) is not None


def products(model: network.Model) -> list[tuple[Callable[[mx.array], mx.array], int]]:
    """Each sublayer of the first layer as a function of rows, and how long its rows are."""
    few = layers_of(model)
    assert few is not None
    layer = few.layers[0]
    config, width = model.config, model.config.model_dim
    return [
        (lambda x: x @ layer._read, width + 2 * config.head_dim),
        (
            lambda x: mx.addmm(mx.ones((x.shape[0], width)), x, layer._write),
            config.num_query_heads[0] * config.head_dim,
        ),
        (lambda x: x @ layer._feed, width),
    ]


@pytest.mark.parametrize("kind", ["alone", "lora", "dora"])
@pytest.mark.usefixtures("two_threads")
def test_a_row_has_the_same_bits_in_any_company_and_by_any_number_of_threads(kind: str) -> None:
    model = openelm(model_dim=512, head_dim=64, num_gqa_groups=1)
    if kind != "alone":
        adapted(model, kind)
    for compute, length in products(model):
        x = mx.random.normal((600, length), key=mx.random.key(length))  # as many are computed some at a time
        with blas.one_thread():
            alone = [compute(row[None]) for row in x[:MOST_ROWS]]
            prompt = compute(x) if PROMPTS else mx.concatenate([compute(row[None]) for row in x])
            mx.eval(alone, prompt)
        for rows in range(1, MOST_ROWS + 1):
            assert mx.array_equal(compute(x[:rows]), mx.concatenate(alone[:rows])), rows
        for rows in (17, 18, 31, 100, 511, 600):
            assert mx.array_equal(compute(x[:rows]), prompt[:rows]), rows
        assert mx.allclose(prompt[:MOST_ROWS], mx.concatenate(alone), rtol=1e-5, atol=1e-5).item()


@pytest.mark.usefixtures("two_threads")
def test_threads_that_compute_at_once_do_not_disturb_each_other() -> None:
    model = openelm(model_dim=512, head_dim=64, num_gqa_groups=1)
    for compute, length in products(model):
        inputs = [mx.random.normal((3, length), key=mx.random.key(at)) for at in range(16)]
        alone = [compute(x) for x in inputs]
        mx.eval(inputs, alone)

        def again(at: int, compute: Any = compute, inputs: Any = inputs, alone: Any = alone) -> bool:
            with mx.stream(mx.new_stream(mx.cpu)):
                outputs = [compute(inputs[at]) for _ in range(20)]
                return all(mx.array_equal(each, alone[at]).item() for each in outputs)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(again, range(16)))


@pytest.mark.parametrize("gate", [0.0, 1e-30, 20.0, -20.0, 88.0, -88.0, 1e30, -1e30, math.inf, math.nan])
def test_gates_of_any_size_are_silus(model: network.Model, gate: float) -> None:
    layer, width = model.transformer.layers[0], model.config.model_dim
    weight = mx.zeros_like(layer.ffn.proj_1.weight)
    weight[0, 0], weight[weight.shape[0] // 2, 0] = gate, 1.0
    layer.ffn.proj_1.weight = weight
    few = layers_of(model)
    assert few is not None
    x = mx.where(mx.arange(width) % 2 == 0, 1.0, -1.0)[None]  # its norm is itself
    expected = x + layer.ffn(layer.ffn_norm(x))
    assert mx.allclose(x @ few.layers[0]._feed, expected, rtol=1e-5, atol=1e-6, equal_nan=True).item()


def test_weights_that_are_replaced_are_seen(model: network.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before = logits(model, 2)
    mx.eval(before)
    ffn = model.transformer.layers[1].ffn
    ffn.proj_2.weight = ffn.proj_2.weight * 2
    after = logits(model, 2)
    mx.eval(after)
    assert not mx.allclose(before, after).item()
    without(monkeypatch)
    assert mx.allclose(after, logits(model, 2), rtol=1e-4, atol=1e-4).item()


def test_a_copy_of_a_model_outlives_it(model: network.Model) -> None:
    expected = logits(model, 1)
    mx.eval(expected)
    copied = copy.deepcopy(model)
    del model
    junk = [mx.random.normal((1 << 16,)) for _ in range(50)]  # where the weights were
    mx.eval(junk)
    assert mx.array_equal(logits(copied, 1), expected).item()


def test_what_it_does_not_know_is_mlxs(model: network.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(device, "on_gpu", lambda: True)
        assert layers_of(model) is None
    with monkeypatch.context() as patch:
        patch.setattr(blas, "_opened", [])
        assert layers_of(model) is None
    assert layers_of(model) is not None and (layers_of(model, MOST_ROWS + 1) is not None) == PROMPTS
    layer = model.transformer.layers[0].ffn
    kept, layer.proj_1 = layer.proj_1, nn.QuantizedLinear.from_linear(layer.proj_1)
    assert layers_of(model) is None
    layer.proj_1 = kept
    assert layers_of(model) is not None
    kept.weight = kept.weight.astype(mx.bfloat16)
    assert layers_of(model) is None
    assert logits(model, 1).dtype == mx.float32


def test_a_norm_that_is_written_out_to_be_measured_stays_mlxs(model: network.Model) -> None:
    model.transformer.norm.__class__ = network.NaiveRMSNorm
    assert layers_of(model) is not None  # it is in no layer
    other = openelm()
    other.transformer.layers[1].ffn_norm.__class__ = network.NaiveRMSNorm
    assert layers_of(other) is None


def test_what_is_computed_later_has_the_weights_of_when_it_was_asked_for() -> None:
    """As of MLX's own products: the model may have changed, or gone."""
    model, ids = openelm(), mx.array([[3, 8, 13, 18, 23]])
    expected = model(ids, make_prompt_cache(model))
    mx.eval(expected)
    before = model(ids, make_prompt_cache(model))
    model.transformer.norm.weight = 2.0 * model.transformer.norm.weight
    after = model(ids, make_prompt_cache(model))
    mx.eval(before, after)
    assert mx.array_equal(before, expected) and not mx.isnan(after).any()
    other = openelm()
    later = other(ids, make_prompt_cache(other))
    del other
    gc.collect()
    assert not mx.isnan(later).any()


def test_a_derivative_through_layers_in_c_is_none_and_harms_nothing() -> None:
    """It had overwritten memory: a product with the same marked matrix, of other widths."""
    model, ids = openelm(), mx.array([[3, 8, 13, 18, 23]])

    def loss(model: Any) -> mx.array:
        return model(ids, make_prompt_cache(model)).sum()

    _, gradients = nn.value_and_grad(model, loss)(model)
    assert mx.isnan(gradients["transformer"]["token_embeddings"]["weight"]).any()
    for _ in range(20):
        mx.eval(model(ids, make_prompt_cache(model)))
