"""Formats and budgets against MLX, brute force and arithmetic."""

from __future__ import annotations

import itertools
import random

import mlx.core as mx
import numpy as np
import pytest

from elm_mlx.errors import InputError
from elm_mlx.model.config import BITS, FLOATS, GROUPS
from elm_mlx.quantize import recipe
from elm_mlx.quantize.bit_plan import Weights, allocate, mix
from elm_mlx.quantize.recipe import Format, choose_format
from elm_mlx.store.loading import pack

ALL = [Format(bits, group) for bits in BITS for group in GROUPS] + [Format(*FLOATS[mode], mode) for mode in FLOATS]


@pytest.mark.parametrize("how", ALL, ids=str)
def test_a_packed_weight_is_mlxs_own_and_takes_what_is_said(how: Format) -> None:
    weight = mx.random.normal((8, 256), key=mx.random.key(3)).astype(mx.bfloat16)
    parts = pack(weight, how.packing(), mx.bfloat16)
    for found, expected in zip(parts.values(), mx.quantize(weight, **how.packing()), strict=True):
        assert found.dtype == expected.dtype and mx.array_equal(found, expected)
    assert sum(part.nbytes for part in parts.values()) == how.nbytes(weight.size, mx.bfloat16)
    error = np.abs(np.array(how.round_trip(weight, mx.bfloat16)) - np.array(weight.astype(mx.float32)))
    if how.mode == "affine":  # half a step, and what 16 bits do to scale and bias
        groups = np.array(weight.astype(mx.float32)).reshape(-1, how.group_size)
        step = (groups.max(1) - groups.min(1)) / (2**how.bits - 1)
        assert (error.reshape(-1, how.group_size) <= (1.01 * step + 0.02)[:, None]).all()
    else:
        assert error.max() < 1.0


@pytest.mark.parametrize("bits", BITS)
def test_an_affine_weight_is_the_formula_of_its_numbers(bits: int) -> None:
    """MLX's packing read bit by bit, in NumPy: values of `bits` lie end to end, lowest first."""
    how = Format(bits, 32)
    weight = mx.random.normal((4, 64), key=mx.random.key(5))
    parts = pack(weight, how.packing(), mx.float16)
    stream = np.unpackbits(np.array(parts["weight"]).view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(4, 64, bits) @ (1 << np.arange(bits))
    scales, biases = (np.repeat(np.array(parts[name], np.float64), 32, axis=1) for name in ("scales", "biases"))
    np.testing.assert_allclose(
        np.array(how.round_trip(weight, mx.float16)), codes * scales + biases, rtol=1e-5, atol=1e-5
    )


def test_smaller_groups_where_rows_want_them() -> None:
    assert Format(4, 128).fit(192) == Format(4, 64)
    assert Format(3, 64).fit(96) == Format(3, 32)
    assert Format(4, 64).fit(40) is None and Format(4, 16, "nvfp4").fit(48) is None
    assert Format(8, 32, "mxfp8").fit(48) is None


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"bits": 7}, "7 bits: MLX packs weights in 2, 3"),
        ({"group_size": 48}, "group size of 48"),
        ({"mode": "mxfp4", "bits": 8}, "mxfp4 has 4 bits and groups of 32"),
        ({"mode": "int4"}, "mode 'int4' is not one of"),
        ({"bits": 4, "bpw": 4.5}, "leave --bits out"),
        ({"bpw": 4.5, "mode": "nvfp4"}, "leave out --mode nvfp4"),
        ({"bpw": -1.0}, "must be above 0"),
        ({"bpw": 4.5, "method": "awq"}, "leave out --bpw"),
        ({"method": "gguf"}, "method 'gguf' is not one of"),
        ({"method": "gptq", "bits": 3}, "packs in 2, 4, 8 bits, not 3"),
        ({"method": "awq", "mode": "mxfp4"}, "for affine weights, not mxfp4"),
        ({"method": "dwq", "bits": 8}, "fewer than 8"),
        ({"method": "awq", "rate": 1e-4}, "--learning-rate is for --method dwq"),
        ({"dtype": "int8"}, "--dtype int8: is not one of float32"),
    ],
)
def test_wishes_that_cannot_be(wish: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.choose(**wish)  # type: ignore[arg-type]


def test_a_recipe_of_one_word() -> None:
    assert recipe.parse("4") == recipe.choose() and recipe.parse("mxfp8").how == choose_format(None, None, "mxfp8")
    assert recipe.parse("4.5").bpw == 4.5 and recipe.parse("6").how.bits == 6
    for word in ("four", "9", "-1.5"):
        with pytest.raises(InputError):
            recipe.parse(word)


def test_the_allocation_is_brute_forces_best() -> None:
    draw = random.Random(0)
    for _ in range(40):
        costs = [sorted(draw.sample(range(1, 60), 4)) for _ in range(5)]
        losses = [sorted((draw.expovariate(1) for _ in range(4)), reverse=True) for _ in range(5)]
        budget = draw.randint(30, 200)
        every = [
            (sum(losses[i][c] for i, c in enumerate(chosen)), sum(costs[i][c] for i, c in enumerate(chosen)))
            for chosen in itertools.product(range(4), repeat=5)
        ]
        fitting = [lost for lost, cost in every if cost <= budget]
        found = allocate(costs, losses, budget)
        if not fitting:
            assert found is None
            continue
        assert found is not None and sum(costs[i][c] for i, c in enumerate(found)) <= budget
        assert sum(losses[i][c] for i, c in enumerate(found)) == pytest.approx(min(fitting))


def test_a_weight_that_is_kept_wide_is_counted_so() -> None:
    """As a float32 head among bfloat16: packed, it gives back four bytes a value."""
    names = ("a", "b", "head")
    tensors = {f"{name}.weight": mx.zeros((1000, 256), mx.bfloat16) for name in names}
    tensors |= {"head.weight": mx.zeros((1000, 256), mx.float32), "norm.weight": mx.zeros((256,), mx.bfloat16)}
    shapes = dict.fromkeys(names, (1000, 256))
    weights = Weights(tensors, shapes, mx.bfloat16, sum(each.size for each in tensors.values()))
    losses = {name: {bits: 4.0**-bits for bits in (2, 3, 4, 5, 6, 8)} for name in names}
    for bpw in (3.0, 4.5, 8.0, 12.0):
        plan = mix(weights, 64, bpw, losses)
        assert 0.75 * bpw < plan.bits_per_weight <= bpw


def test_a_large_budget_is_met_almost_to_the_byte() -> None:
    draw = random.Random(1)
    sizes = [draw.randint(10**6, 10**8) for _ in range(150)]
    costs = [[size * bits // 8 for bits in (2, 3, 4, 5, 6, 8)] for size in sizes]
    losses = [[4.0**-bits * draw.expovariate(1) for bits in (2, 3, 4, 5, 6, 8)] for _ in sizes]
    budget = int(sum(sizes) * 4.5 / 8)
    found = allocate(costs, losses, budget)
    assert found is not None
    assert 0.995 * budget < sum(costs[i][c] for i, c in enumerate(found)) <= budget
