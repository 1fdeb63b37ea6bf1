"""The loss of a model on a text that it has never seen, measured in the plainest way there is.

Shared by the examples; uses none of the code that trains. A script in a folder beside this file finds it by
`sys.path.append(str(Path(__file__).parent.parent))`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import elm_mlx  # noqa: F401  (before MLX, for its BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn

from elm_mlx.model.network import Model
from elm_mlx.text.tokenizer import Tokenizer


class HeldOut(NamedTuple):
    """The loss of a model on a text.

    Attributes:
        nats: a token. How much text a token stands for is another with each vocabulary.
        bits: a byte of the text that was predicted, which any two models can be compared by.
    """

    nats: float
    bits: float


def held_out_loss(
    model: Model, tokenizer: Tokenizer, text: str, windows: int | None = 16, length: int = 512
) -> HeldOut:
    """The text's beginning, or all of it where `windows` is None: BOS and its tokens, each predicted once.

    A window is `length` tokens, does not overlap the one before, knows nothing of it, and has no BOS of its own. The
    model's weights should be float32.
    """
    ids = tokenizer.encode(text, add_bos=True)
    if windows is not None:
        ids = ids[: windows * length + 1]
    total = 0.0
    for start in range(0, len(ids) - 1, length):
        piece = mx.array(ids[start : start + length + 1])[None]
        total += nn.losses.cross_entropy(model(piece[:, :-1]), piece[:, 1:], reduction="sum").item()
    predicted = tokenizer.decode(ids[1:]).encode()
    return HeldOut(total / (len(ids) - 1), total / math.log(2) / len(predicted))
