"""The loss of KV Prediction (arXiv 2410.08391, section 3.3): of the base, the auxiliary, and between their caches."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from elm_mlx.data.batches import Batch
from elm_mlx.model.attention import Segments
from elm_mlx.model.kv_prediction import KeysValues, KVPrediction
from elm_mlx.train.kvp_recipe import LossWeights
from elm_mlx.train.loss import Head, TokenLoss


class KVLoss:
    """The objective of KV Prediction. Its units are trained tokens.

    The distance of a layer's keys, or of its values, is the mean of absolute differences: of keys by the base's norm
    and before RoPE.

    Args:
        layers: of the base.
        z_loss: as of `TokenLoss`, for both cross-entropies.
        recompute: compute the base's layers again in the backward pass, rather than keep their activations.
    """

    measures = ("base_loss", "auxiliary_loss", "kv_distance")

    def __init__(self, weights: LossWeights, layers: int, z_loss: float = 0.0, recompute: bool = False) -> None:
        self._weights, self._recompute = weights, recompute
        self._kv = 1 / layers if weights.kv is None else weights.kv
        self._of_tokens = TokenLoss(z_loss)

    def count(self, batch: Batch) -> int:
        return self._of_tokens.count(batch)

    def arrays(self, batch: Batch) -> tuple[mx.array, ...]:
        """Returns `where`, `targets` and `weights` as `Positions`, and 1 or 0 for each position, `(batch, length)`."""
        return *self._of_tokens.arrays(batch), mx.array(batch.trained.astype(np.float32))

    def forward(
        self, gradients: bool, model: KVPrediction, inputs: mx.array, segments: Segments | None,
        at: tuple[mx.array, ...],
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        """Returns the summed loss, and the sums of its three parts before they are weighted, `(3,)`."""
        *positions, trained = at
        own, predicted = model.predict(inputs, segments)
        hidden = model.hidden(inputs, predicted, segments, self._recompute)
        parts = [
            self._of_tokens.sums(gradients, Head.of(each), states, tuple(positions))[0]
            for each, states in ((model.base, hidden), (model.auxiliary, own))
        ]
        parts.append(distance(predicted, model.true(inputs, segments), trained))
        weights = (self._weights.base, self._weights.auxiliary, self._kv)
        # A part without weight is measured, but not differentiated.
        weighted = [weight * part for weight, part in zip(weights, parts, strict=True) if weight]
        return mx.stack(weighted).sum(), mx.stack(parts)


def distance(predicted: Sequence[KeysValues], true: Sequence[KeysValues], trained: mx.array) -> mx.array:
    """Returns mean absolute differences of keys and of values, summed over layers and positions, a float32 scalar.

    Args:
        predicted, true: of each layer `(batch, kv_heads, length, head_dim)`.
        trained: `(batch, length)`: 1 for a position that counts, or 0.
    """
    total = mx.zeros(trained.shape)
    for found, wanted in zip(predicted, true, strict=True):
        for one, other in zip(found, wanted, strict=True):
            total = total + mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).mean(axis=(1, 3))
    return (total * trained).sum()
