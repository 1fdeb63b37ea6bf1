"""Weights to start from, against CoreNet's rule."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
import tiny
from mlx.utils import tree_flatten

from elm_mlx.model.network import Model, initialize


def drawn(seed: int) -> Model:
    made = Model(tiny.scaled_config(512, num_layers=4, model_dim=128))
    initialize(made, seed)
    return made


def test_deviations_are_corenets() -> None:
    for name, weight in tree_flatten(drawn(1).parameters()):
        if weight.ndim == 1:
            assert bool((weight == 1).all())
            continue
        if name.endswith(("out_proj.weight", "proj_2.weight")):
            expected = 128**-0.5 * 8**-0.5
        else:
            expected = weight.shape[1] ** -0.5  # of the embedding, its width
        # the deviation of a sample's deviation is 1/sqrt(2n) of it
        assert float(mx.std(weight)) == pytest.approx(expected, rel=5 / math.sqrt(2 * weight.size)), name
        assert abs(float(mx.mean(weight))) < 5 * expected / math.sqrt(weight.size), name


def test_a_seed_decides() -> None:
    first, again, other = (dict(tree_flatten(drawn(seed).parameters())) for seed in (1, 1, 2))
    for name, weight in first.items():
        assert bool(mx.array_equal(weight, again[name]))
        assert weight.ndim == 1 or not bool(mx.array_equal(weight, other[name]))
    weights = [weight for weight in first.values() if weight.ndim == 2 and weight.shape == (128, 128)]
    assert len(weights) < 2 or not bool(mx.array_equal(weights[0], weights[1]))
