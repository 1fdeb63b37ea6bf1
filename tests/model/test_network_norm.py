"""Both norms against the formula in float64, and what the fused one saves in a whole forward pass."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map

from elm_mlx import device
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.network import Model, NaiveRMSNorm, RMSNorm


def norms(dims: int, eps: float = 1e-6, seed: int = 0) -> tuple[RMSNorm, NaiveRMSNorm]:
    fused, naive = RMSNorm(dims, eps), NaiveRMSNorm(dims, eps)
    fused.weight = naive.weight = mx.random.normal((dims,), key=mx.random.key(seed))
    return fused, naive


@settings(max_examples=60)
@given(
    st.sampled_from([(1, 2), (3, 8), (2, 5, 64), (1, 4, 7, 16), (2, 1280)]),
    st.floats(1e-6, 1e6),
    st.sampled_from([1e-6, 1e-5, 0.0]),
    st.integers(0, 99),
)
def test_both_are_the_formula(shape: tuple[int, ...], scale: float, eps: float, seed: int) -> None:
    x = mx.random.normal(shape, key=mx.random.key(seed)) * scale
    for norm in norms(shape[-1], eps, seed):
        expected = reference.rms_norm(np.array(x, np.float64), np.array(norm.weight, np.float64), eps)
        np.testing.assert_allclose(np.array(norm(x)), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_16_bit_values_are_normalised_in_float32(dtype: mx.Dtype) -> None:
    """The square of 1000 overflows float16, and the sum of 4096 small squares stops growing in bfloat16."""
    for norm in norms(4096):
        norm.weight = norm.weight.astype(dtype)
        for scale in (1000.0, 1e-3):
            x = (mx.random.normal((2, 4096), key=mx.random.key(1)) * scale).astype(dtype)
            result = norm(x)
            assert result.dtype == dtype
            wide, weight = np.array(x.astype(mx.float32)), np.array(norm.weight.astype(mx.float32))
            expected = reference.rms_norm(wide, weight, norm.eps)
            tolerance = 2**-7 if dtype == mx.bfloat16 else 2**-10
            np.testing.assert_allclose(np.array(result.astype(mx.float32)), expected, rtol=tolerance, atol=1e-4)


def test_the_naive_one_rounds_where_corenet_does() -> None:
    """Back to 16 bits first, then times the weight: two roundings."""
    _, naive = norms(64)
    naive.weight = naive.weight.astype(mx.bfloat16)
    x = mx.random.normal((8, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    normed = reference.rms_norm(np.array(x.astype(mx.float32), np.float64), np.ones(64), naive.eps)
    expected = mx.array(normed.astype(np.float32)).astype(mx.bfloat16) * naive.weight
    differ = np.array(naive(x).astype(mx.float32)) != np.array(expected.astype(mx.float32))
    assert differ.mean() < 0.01  # but for ties that float32 decides otherwise than float64


def test_zeros_stay_zeros() -> None:
    for norm in norms(8):
        assert not np.array(norm(mx.zeros((2, 8)))).any()


def primitives(result: mx.array, path: Path) -> int:
    """How many the graph of `result` has, what is evaluated already being its leaves."""
    mx.export_to_dot(str(path), result)
    return len(re.findall(r"label ?= ?\"[^\"]+\", shape=rectangle", path.read_text()))


def weightless(config: ModelConfig) -> Model:
    """A model of any size in no memory: every weight is one number, broadcast."""
    model = Model(config)
    model.update(tree_map(lambda weight: mx.broadcast_to(mx.array(1.0), weight.shape), model.parameters()))
    mx.eval(model.parameters())
    return model


def test_a_forward_pass_calls_one_fused_norm_for_each_norm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = weightless(ModelConfig.preset("OpenELM-270M"))
    ids = mx.array([[1, 2, 3]])
    mx.eval(ids)
    fused = primitives(model(ids), tmp_path / "fused.dot")

    calls = []
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: (calls.append((weight.shape, eps)), x)[1])
    rest = primitives(model(ids), tmp_path / "rest.dot")
    assert len(calls) == 65
    assert sum(shape == (1280,) for shape, _ in calls) == 33 and sum(shape == (64,) for shape, _ in calls) == 32
    assert {eps for _, eps in calls} == {1e-6}

    one = NaiveRMSNorm(8)
    mx.eval(one.parameters())
    naive_norm = primitives(one(mx.array([[1.0] * 8] * 3)), tmp_path / "norm.dot")
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.__class__ = NaiveRMSNorm
    naive = primitives(model(ids), tmp_path / "naive.dot")
    assert len(calls) == 65  # the naive norm calls no fused one
    assert naive == rest + 65 * naive_norm
    with capsys.disabled():
        print(
            f"\nprimitives in one forward pass of the 270M: {naive} with naive norms, {rest + 65} with each norm one "
            f"kernel, as on a GPU; here, on {mx.default_device()}, the fused norms come to {fused}"
        )
    if device.on_gpu():
        assert fused == rest + 65
    else:  # MLX itself writes the fused norm out where there is no kernel
        assert rest + 65 < fused <= naive
