"""The loss: cross-entropy on the positions that are trained, without their logits ever existing at once.

What an ordinary loss costs is mostly logits: `(tokens, vocab_size)` several times over, of which the prompt's and the
padding's are computed to be multiplied by 0. Here the hidden states of trained positions are gathered before the
output head, and go through it in chunks; each chunk's gradients are taken at once, while its logits are still there.
So nothing is computed twice, and what stays in memory is one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_map

from elm_mlx.data.batches import Batch
from elm_mlx.model import ops
from elm_mlx.model.attention import Segments
from elm_mlx.model.network import Model

Parameters = dict[str, Any]  # a tree of arrays, as nn.Module has it

_CHUNK_LOGITS = 1 << 20  # logits computed at once


@dataclass(frozen=True)
class Head:
    """A model's output head as a function of its parameters.

    Attributes:
        logits: of its trained parameters and `(positions, model_dim)`; `(positions, vocab_size)`. Need not be linear,
            only differentiable: tied, quantized, adapted, whatever it is.
        parameters: what of the head is trained, as a tree of arrays; may be empty.
    """

    logits: Callable[[Parameters, mx.array], mx.array]
    vocab_size: int
    parameters: Parameters

    @classmethod
    def of(cls, model: Model) -> Head:
        owner = model.head_module()

        def logits(parameters: Parameters, rows: mx.array) -> mx.array:
            owner.update(parameters)
            return model.head(rows)

        return cls(logits, model.config.vocab_size, owner.trainable_parameters())

    def chunks(self, positions: int) -> list[slice]:
        """Cuts positions into those that go through the head at once."""
        size = min(positions, max(64, _CHUNK_LOGITS // self.vocab_size // 64 * 64))
        return [slice(start, start + size) for start in range(0, positions, size)]


@dataclass(frozen=True)
class Positions:
    """The positions of a batch that are trained, padded so that few different sizes occur.

    Attributes:
        where: `(n,)` int32, into the batch's rows laid end to end; padding points to 0.
        targets: `(n,)` int32, the token to predict at each.
        weights: `(n,)` float32, 1, or 0 for padding.
        count: how many are not padding.
    """

    where: mx.array
    targets: mx.array
    weights: mx.array
    count: int

    @classmethod
    def of(cls, targets: npt.NDArray[np.int32], trained: npt.NDArray[np.bool_]) -> Positions:
        """Returns the positions of `(batch, length)` targets that `trained` marks."""
        found, tokens = np.flatnonzero(trained), targets.reshape(-1)
        padding = padded_size(len(found)) - len(found)
        where = np.pad(found, (0, padding)).astype(np.int32)
        weights = np.pad(np.ones(len(found), np.float32), (0, padding))
        return cls(mx.array(where), mx.array(tokens[where]), mx.array(weights), len(found))


class Objective(Protocol):
    """The objective, which updates minimize: a loss summed over a batch's units. A batch may be cut by its rows.

    Attributes:
        measures: names of what else is summed on the way, for reports.
    """

    @property
    def measures(self) -> tuple[str, ...]: ...

    def count(self, batch: Batch) -> int:
        """Counts the batch's units; sums over all an update's batches are divided by theirs."""

    def arrays(self, batch: Batch) -> tuple[mx.array, ...]:
        """Returns the batch's targets and their places, which `forward` takes as `at`."""

    def forward(
        self, gradients: bool, model: Any, inputs: mx.array, segments: Segments | None, at: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        """Returns the loss summed over the units, and the sums of the measures, `(measures,)`.

        Args:
            gradients: whether the loss is to be differentiated in the model's trainable parameters.
            inputs: `(batch, length)` ids.
        """


class HeadObjective:
    """An objective that the hidden states and the output head of one model decide."""

    def forward(
        self, gradients: bool, model: Model, inputs: mx.array, segments: Segments | None, at: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        """Returns the loss summed over the units, and the sums of the measures, as `Objective.forward`."""
        return self.sums(gradients, Head.of(model), model.transformer(inputs, None, segments), at)

    def sums(
        self, gradients: bool, head: Head, hidden: mx.array, at: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        """Returns the same of hidden states `(batch, length, model_dim)`."""
        raise NotImplementedError


class TokenLoss(HeadObjective):
    """The objective of every training but that of pairs: trained tokens' cross-entropies.

    `z_loss` is the weight of their squared log-partitions in what gradients minimize (PaLM, section 5).
    """

    measures: tuple[str, ...] = ()

    def __init__(self, z_loss: float = 0.0) -> None:
        self._z_loss = z_loss

    def count(self, batch: Batch) -> int:
        return int(batch.trained.sum())

    def arrays(self, batch: Batch) -> tuple[mx.array, ...]:
        at = Positions.of(batch.targets, batch.trained)
        return at.where, at.targets, at.weights

    def sums(
        self, gradients: bool, head: Head, hidden: mx.array, at: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        loss = summed_loss(head, hidden, at, self._z_loss) if gradients else summed_loss_only(head, hidden, at)
        return loss, mx.zeros(0)


def padded_size(count: int) -> int:
    """Returns the next of eight sizes between powers of two, from 64: few steps to trace, an eighth wasted at most."""
    grain = max(64, 1 << max(0, (count - 1).bit_length() - 4))
    return max(1, -(-count // grain)) * grain


def summed_loss(head: Head, hidden: mx.array, at: tuple[mx.array, ...], z_loss: float = 0.0) -> mx.array:
    """Returns the loss summed over trained tokens, in nats, a float32 scalar.

    Differentiable in `head.parameters` and `hidden`. Gradients are made in the forward pass; where none are wanted,
    `summed_loss_only` is cheaper.

    Args:
        hidden: `(batch, length, model_dim)`.
        at: `where`, `targets` and `weights` of `Positions`.
        z_loss: adds so many times the squared log-partition to what the gradients are of, and not to the value.
    """
    where, targets, weights = at
    rows = hidden.reshape(-1, hidden.shape[-1])[where]

    def chunk_loss(
        parameters: Parameters, rows: mx.array, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array]:
        nats, log_partition, _, _ = _cross_entropy_parts(head.logits(parameters, rows), targets)
        shown = (nats * weights).sum()
        return (shown + z_loss * (log_partition.square() * weights).sum() if z_loss else shown), shown

    @mx.custom_function
    def total(parameters: Parameters, rows: mx.array) -> tuple[mx.array, Parameters, mx.array]:
        losses: list[mx.array] = []
        row_grads: list[mx.array] = []
        grads: Parameters = {}
        gradient = mx.value_and_grad(chunk_loss, argnums=(0, 1))
        for part in head.chunks(rows.shape[0]):
            chunk = rows[part]
            if row_grads:  # or all chunks' logits would be computed first, and wait in memory for their gradients
                chunk = mx.depends([chunk], [row_grads[-1], *(grad for _, grad in tree_flatten(grads))])[0]
            (_, loss), (new, row_grad) = gradient(parameters, chunk, targets[part], weights[part])
            grads = tree_map(mx.add, grads, new) if losses else new
            losses.append(loss)
            row_grads.append(row_grad)
        return mx.stack(losses).sum(), grads, mx.concatenate(row_grads)

    @total.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[Parameters, mx.array]:
        _, grads, row_grads = outputs
        scale = cotangents[0]
        scaled = tree_map(lambda grad: (grad * scale).astype(grad.dtype), grads)
        return scaled, (row_grads * scale).astype(row_grads.dtype)

    return total(head.parameters, rows)[0]


def summed_loss_only(head: Head, hidden: mx.array, at: tuple[mx.array, ...]) -> mx.array:
    """Returns `summed_loss` without its gradients."""
    where, targets, weights = at
    rows = hidden.reshape(-1, hidden.shape[-1])[where]
    total = mx.array(0.0)
    for part in head.chunks(rows.shape[0]):
        chunk = mx.depends([rows[part]], [total])[0]
        nats = _cross_entropy_parts(head.logits(head.parameters, chunk), targets[part])[0]
        total = total + (nats * weights[part]).sum()
    return total


def losses_only(head: Head, hidden: mx.array, at: tuple[mx.array, ...]) -> mx.array:
    """Returns each trained token's loss, `(n,)`, padding's too, without a gradient; `at` as `summed_loss` has it."""
    where, targets, *_ = at
    rows = mx.stop_gradient(hidden).reshape(-1, hidden.shape[-1])[where]
    losses: list[mx.array] = []
    for part in head.chunks(rows.shape[0]):
        chunk = mx.depends([rows[part]], losses[-1:])[0] if losses else rows[part]
        logits = mx.stop_gradient(head.logits(head.parameters, chunk)).astype(mx.float32)
        losses.append(nn.losses.cross_entropy(logits, targets[part]))
    return mx.concatenate(losses)


@mx.custom_function
def _cross_entropy_parts(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Nats and log-partitions `(rows,)`; and what their derivatives are made of."""
    wide = logits.astype(mx.float32)
    largest = wide.max(axis=-1, keepdims=True)
    powers = ops.exp(wide - largest)
    sums = powers.sum(axis=-1, keepdims=True)
    chosen = mx.take_along_axis(wide, targets[:, None], axis=-1)
    log_partition = mx.log(sums) + largest
    return (log_partition - chosen)[:, 0], log_partition[:, 0], powers, sums


@_cross_entropy_parts.vjp
def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    """Softmax, minus one at the target."""
    logits, targets = primals
    _, _, powers, sums = outputs
    grad = powers * ((cotangents[0] + cotangents[1])[:, None] / sums)
    grad = grad.at[mx.arange(targets.shape[0]), targets].add(-cotangents[0])
    return grad.astype(logits.dtype), mx.zeros_like(targets)
