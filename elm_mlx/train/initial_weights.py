"""The weights that training starts from, drawn by a seed.

Knows CoreNet's rule: normal, with standard deviation 1/sqrt(inputs), for the embedding 1/sqrt(width); what adds to the
residual stream is drawn 1/sqrt(2 * layers) smaller (arXiv 2205.01068), and norms are 1.
"""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from elm_mlx.model.network import Model

_ADDING = ("out_proj.weight", "ffn.proj_2.weight")


def draw(model: Model, seed: int) -> None:
    """Replace `model`'s weights, in float32. Each has a key of its own, so that a layer more changes no other."""
    width, depth = model.config.model_dim, len(model.layers)
    drawn = []
    for number, (name, weight) in enumerate(tree_flatten(model.parameters())):
        if weight.ndim == 1:
            drawn.append((name, mx.ones(weight.shape)))
            continue
        deviation = (width * 2 * depth) ** -0.5 if name.endswith(_ADDING) else weight.shape[1] ** -0.5
        key = mx.random.key((seed << 20) + number)
        drawn.append((name, deviation * mx.random.normal(weight.shape, key=key)))
    model.update(tree_unflatten(drawn))
    mx.eval(model.parameters())
