"""Adapters merged: equal to the arithmetic that CoreNet runs with the adapter beside its base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from elm_mlx.errors import InputError
from elm_mlx_convert.lora_files import has_adapter, merge
from elm_mlx_convert.source_config import Scaling
from elm_mlx_convert.tensors import LazyTensor

Arrays = dict[str, np.ndarray]

ROWS, COLUMNS, RANK, VOCABULARY = 700, 600, 4, 900


def lazy(name: str, array: np.ndarray) -> LazyTensor:
    return LazyTensor(name, array.shape, array.dtype.name, lambda start, stop: array[start:stop])


def parts(kind: str, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    if kind == "embedding":
        return {
            "token_embeddings.base_layer.weight": values(VOCABULARY, COLUMNS),
            "token_embeddings.lora_embedding_A.lora": values(RANK, VOCABULARY),
            "token_embeddings.lora_embedding_B.lora": values(COLUMNS, RANK),
        }
    made = {
        "layers.0.attn.qkv_proj.base_layer.weight": values(ROWS, COLUMNS),
        "layers.0.attn.qkv_proj.lora_A.lora.weight": values(RANK, COLUMNS),
        "layers.0.attn.qkv_proj.lora_B.lora.weight": values(ROWS, RANK),
    }
    if kind == "dora":
        made["layers.0.attn.qkv_proj.lora_magnitude_vector.lora"] = np.abs(values(ROWS))
    return made


def merged(arrays: Arrays, scaling: Scaling) -> dict[str, LazyTensor]:
    return merge({name: lazy(name, array) for name, array in arrays.items()}, scaling, "x.pt")


@pytest.mark.parametrize("by_root", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_linear_gives_what_base_and_adapter_give(kind: str, by_root: bool) -> None:
    """On inputs, as the forward pass of CoreNet's layer computes it: base(x) plus the adapter's own term."""
    arrays = parts(kind)
    alpha = 6.0
    weight = merged(arrays, Scaling(alpha, by_root))["layers.0.attn.qkv_proj.weight"]
    assert (weight.shape, weight.dtype) == ((ROWS, COLUMNS), "float32")
    base, a, b = (array.astype(np.float64) for array in list(arrays.values())[:3])
    scale = alpha / (RANK**0.5 if by_root else RANK)
    x = np.random.default_rng(1).standard_normal((5, COLUMNS))
    expected = x @ base.T
    if kind == "lora":
        expected += x @ a.T @ b.T * scale
    else:
        length = np.sqrt(((base + scale * b @ a) ** 2).sum(axis=1))  # of each output, over its inputs
        ratio = (arrays["layers.0.attn.qkv_proj.lora_magnitude_vector.lora"] / length).reshape(1, -1)
        expected += (ratio - 1) * expected + ratio * (x @ a.T @ b.T) * scale
    whole = np.concatenate(list(weight.blocks()))
    np.testing.assert_allclose(x @ whole.T, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(whole, weight.read())
    if kind == "dora":
        magnitude = arrays["layers.0.attn.qkv_proj.lora_magnitude_vector.lora"]
        np.testing.assert_allclose(np.linalg.norm(whole, axis=1), magnitude, rtol=1e-5)


def test_embedding_and_the_head_that_reads_its_base() -> None:
    arrays = parts("embedding")
    found = merged(arrays, Scaling(2))
    base, a, b = arrays.values()
    tokens = [0, 17, VOCABULARY - 1]
    expected = base[tokens] + (a.T[tokens] @ b.T) * (2 / RANK)
    np.testing.assert_allclose(found["token_embeddings.weight"].read()[tokens], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["lm_head.weight"].read(), base)


@pytest.mark.parametrize("head", ["classifier.weight", "lm_head.weight", "classifier.base_layer.weight"])
def test_a_head_of_its_own_stays(head: str) -> None:
    own = np.ones((VOCABULARY, COLUMNS), np.float32)
    found = merged(parts("embedding") | {head: own}, Scaling(2))
    name = head.replace("base_layer.", "")
    assert found.keys() == {"token_embeddings.weight", name}
    np.testing.assert_array_equal(found[name].read(), own)


def test_an_embedding_without_an_adapter_stays_tied() -> None:
    arrays = parts("lora") | {"token_embeddings.weight": np.ones((3, 2), np.float32)}
    assert "lm_head.weight" not in merged(arrays, Scaling(1))


def test_base_of_16_bits() -> None:
    arrays = {name: array.astype(np.float16) for name, array in parts("lora").items()}
    found = merged(arrays, Scaling(RANK))["layers.0.attn.qkv_proj.weight"]
    base, a, b = (array.astype(np.float32) for array in arrays.values())
    assert found.dtype == "float32"
    np.testing.assert_allclose(found.read(), base + b @ a, rtol=1e-5, atol=1e-5)


def test_detection() -> None:
    assert has_adapter(parts("lora")) and has_adapter(parts("embedding")) and has_adapter(["x.base_layer.weight"])
    assert not has_adapter(["layers.0.attn.qkv_proj.weight", "lora_A"])


Q = "layers.0.attn.qkv_proj."


def dropping(name: str) -> Callable[[Arrays], Any]:
    return lambda arrays: arrays.pop(name)


def setting(name: str, *shape: int, dtype: str = "float32") -> Callable[[Arrays], Any]:
    return lambda arrays: arrays.update({name: np.zeros(shape, dtype)})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("lora", dropping(Q + "base_layer.weight"), "base_layer.weight is missing: the file holds an adapter without"),
        ("lora", dropping(Q + "lora_A.lora.weight"), "qkv_proj.lora_A is missing"),
        ("dora", dropping(Q + "lora_B.lora.weight"), "qkv_proj.lora_B is missing"),
        ("embedding", dropping("token_embeddings.lora_embedding_B.lora"), "lora_embedding_B is missing"),
        ("lora", setting(Q + "lora_A.lora.weight", RANK, 5), r"lora_A has the shape \(4, 5\).*needs \(4, 600\)"),
        ("lora", setting(Q + "lora_B.lora.weight", 5, RANK), r"lora_B has the shape \(5, 4\).*needs \(700, 4\)"),
        ("lora", setting(Q + "lora_A.lora.weight", 0, COLUMNS), "lora_A of shape .* is no matrix of a rank"),
        ("lora", setting(Q + "lora_A.lora.weight", COLUMNS), "lora_A of shape .* is no matrix of a rank"),
        ("lora", setting(Q + "base_layer.weight", ROWS), "no matrix that an adapter fits"),
        ("dora", setting(Q + "lora_magnitude_vector.lora", 1, ROWS), r"\(1, 700\).*needs \(700,\)"),
        ("lora", setting(Q + "lora_A.other.weight", RANK, COLUMNS), "holds the adapters lora, other"),
        ("lora", setting(Q + "lora_B.lora.weight", ROWS, RANK, dtype="int8"), "lora_B is int8"),
        (
            "embedding",
            setting("token_embeddings.lora_magnitude_vector.lora", 9),
            "an unexpected lora_magnitude_vector",
        ),
    ],
)
def test_what_does_not_fit_is_named(kind: str, change: Callable[[Arrays], Any], message: str) -> None:
    arrays = parts(kind)
    change(arrays)
    with pytest.raises(InputError, match=message):
        merged(arrays, Scaling(1))
