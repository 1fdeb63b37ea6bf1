"""How much each weight of a model minds being packed in fewer bits, measured on a text.

Knows a model and its log-probabilities. One weight at a time is replaced by what it would be, and the divergence of
what the model says then is taken. Few bits are measured. For more, the divergence follows from them: close to its
minimum it is quadratic in the weight's error, so it falls as the square of the error does (Hassibi & Stork, 1993).
Knows nothing of what is done with the figures. They add up to that of a whole plan only roughly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from elm_mlx.model.packing import BITS
from elm_mlx.quantize.formats import Format, rounded
from elm_mlx.quantize.losses import Advance, Reference, Row, divergences, log_softmax

MEASURED = (2, 3, 4)
WINDOW = 128
TOKENS = 1024  # a few windows from all over the text


def spread(rows: Sequence[Row], tokens: int = TOKENS) -> list[Row]:
    """Windows of the whole text, evenly apart, that hold about so many tokens."""
    full = [row for row in rows if len(row.inputs) == len(rows[0].inputs)]
    wanted = max(1, tokens // len(full[0].inputs))
    if len(full) <= wanted:
        return list(rows)
    return [full[i * len(full) // wanted] for i in range(wanted)]


def passes(modules: int) -> int:
    """Over the text, for so many modules."""
    return modules * len(MEASURED)


def measure(
    model: nn.Module,
    before: Reference,
    shapes: Mapping[str, tuple[int, ...]],
    group_size: int,
    dtype: mx.Dtype,
    advance: Advance = lambda count: None,
) -> dict[str, dict[int, float]]:
    """Module -> bits -> mean divergence in nats a token, where that module alone is packed in so many bits.

    Modules whose rows divide into no group are left out. `model` is as before when this returns.

    Args:
        before: of `model` as it is.
        dtype: of scales and biases.
        advance: told of each pass over the text.
    """
    leaves = dict(model.named_modules())
    found: dict[str, dict[int, float]] = {}
    for name, shape in shapes.items():
        if Format(BITS[0], group_size).fitted(shape[-1]) is not None:
            found[name] = _of_module(model, leaves[name], before, group_size, dtype, advance)
    return found


def _of_module(
    model: nn.Module, module: nn.Module, before: Reference, group_size: int, dtype: mx.Dtype, advance: Advance
) -> dict[int, float]:
    weight, lost, error = module.weight, {}, 0.0
    try:
        for bits in BITS:
            how = Format(bits, group_size).fitted(weight.shape[-1])
            assert how is not None
            packed = rounded(weight, how, dtype)
            own = float(mx.square(packed - weight.astype(mx.float32)).sum().item())
            if bits in MEASURED:
                module.weight = packed.astype(weight.dtype)
                lost[bits], error = _divergence(model, before), own
                advance(1)
            else:
                lost[bits] = lost[MEASURED[-1]] * (own / error if error else 0.0)
    finally:
        module.weight = weight
    return lost


def _divergence(model: nn.Module, before: Reference) -> float:
    total = sum(float(divergences(old, log_softmax(model, row)).sum().item()) for row, old in before)
    return total / sum(len(row.inputs) for row in before.rows)
