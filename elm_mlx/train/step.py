"""One update: the backward pass of one or several batches, and the optimizer's step. Compiled.

An update's gradient is that of the mean over its trained tokens, or pairs, however they are spread over batches and
processes: sums are added up, and divided once. The optimizers are MLX's. Weight decay falls on matrices alone: what has
one dimension (norms' weights, DoRA's magnitudes) scales, and is not to be pulled to 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from elm_mlx import device
from elm_mlx.data.batches import Batch
from elm_mlx.model.attention import Segments
from elm_mlx.model.compiled import Compiled
from elm_mlx.train.loop_settings import Settings
from elm_mlx.train.loss import Objective, Parameters, TokenLoss


class Step:
    """Turns batches into updates of `model`'s trainable parameters, which it changes in place.

    With parameters in float32 and `compute_dtype` bfloat16, the parameters are rounded where they are used,
    and updated unrounded: small updates are not lost.

    Args:
        settings: says which optimizer, its decay and its limit on the gradients' norm, and whether blocks are computed
            again in the backward pass.
        compute_dtype: what trainable parameters are cast to for the forward pass; None for what they are.
        objective: what to minimize; None for trained tokens' cross-entropy.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        compute_dtype: mx.Dtype | None = None,
        objective: Objective | None = None,
    ):
        self.model, self.optimizer = model, make_optimizer(settings)
        self._clip, self._decay, self._dtype = settings.clip, settings.weight_decay, compute_dtype
        self.objective = objective or TokenLoss(settings.z_loss)
        if settings.grad_checkpoint:
            recompute_blocks(model)
        model.train()
        trained = model.trainable_parameters()
        self.optimizer.init(trained)
        mx.eval(model.parameters())
        self.cut_into(device.most_parts(sum(parameter.nbytes for _, parameter in tree_flatten(trained))))
        random = mx.random.state
        gradients = mx.value_and_grad(functools.partial(self._sums, True))
        self._gradients = Compiled(gradients, inputs=random, outputs=random)
        self._evaluate = Compiled(functools.partial(self._sums, False))
        self._apply = Compiled(self._applied)

    @property
    def parts(self) -> int:
        """The number of parts that a batch is cut into, at most; what dropout drops depends on it."""
        return self._parts.most

    def cut_into(self, parts: int) -> None:
        """Sets the number of parts that batches are cut into from now on."""
        self._parts = device.Parts(parts)

    def gradients(self, batch: Batch) -> tuple[mx.array, Any, int]:
        """Returns a batch's summed loss and measures, `(1 + measures,)`; the loss's gradients; the batch's count.

        Perhaps not yet computed.
        """
        ((_, sums), grads), *others = self._computed(self._gradients, batch)
        for (_, other_sums), other in others:
            sums, grads = sums + other_sums, tree_map(mx.add, grads, other)
        return sums, grads, self.objective.count(batch)

    def apply(self, gradients: Any, norm: mx.array, tokens: float, learning_rate: float) -> None:
        """Updates parameters and optimizer by summed `gradients`, whose mean's norm is `norm`. Not yet computed."""
        parameters, self.optimizer.state = self._apply(
            self.model.trainable_parameters(),
            self.optimizer.state | {"learning_rate": mx.array(learning_rate)},
            gradients,
            norm,
            mx.array(tokens, mx.float32),
        )
        self.model.update(parameters)

    def loss(self, batch: Batch) -> tuple[mx.array, int]:
        """Returns the sums of a batch without dropout, as `gradients` does, and its count."""
        self.model.eval()
        try:
            parts = self._computed(self._evaluate, batch)
            return mx.stack([sums for _, sums in parts]).sum(axis=0), self.objective.count(batch)
        finally:
            self.model.train()

    def state(self) -> list[Any]:
        """Returns all that an update changes, to be evaluated."""
        return [self.model.trainable_parameters(), self.optimizer.state]

    def _computed(self, function: Callable[..., Any], batch: Batch) -> list[Any]:
        """Returns what a compiled function returns for each part of a batch."""
        parameters, parts, graphs = self.model.trainable_parameters(), batch.split(self.parts), []
        for part, stream in zip(parts, self._parts.streams(len(parts), parameters), strict=True):
            with stream:
                graphs.append(function(parameters, *self._arrays(part)))
        self._parts.evaluate(graphs)
        return graphs

    def _arrays(self, batch: Batch) -> tuple[Any, ...]:
        """Returns a batch as the compiled functions take it."""
        positions = None if batch.positions is None else mx.array(batch.positions)
        segments = None if batch.segments is None else (mx.array(batch.segments), batch.reach(), positions)
        return mx.array(batch.inputs), segments, self.objective.arrays(batch)

    def _sums(
        self,
        gradients: bool,
        parameters: Parameters,
        inputs: mx.array,
        segments: tuple[mx.array, int | None, mx.array | None] | None,
        at: tuple[mx.array, ...],
    ) -> tuple[mx.array, mx.array]:
        """Returns the loss under `parameters` in place of the model's own, alone and again with the measures."""
        model, kept = self.model, self.model.trainable_parameters()
        try:
            model.update(tree_map(self._cast, parameters))
            apart = None if segments is None else Segments(*segments)
            total, measures = self.objective.forward(gradients, model, inputs, apart, at)
            return total, mx.concatenate([total[None], measures])
        finally:
            model.update(kept)

    def _cast(self, parameter: mx.array) -> mx.array:
        return parameter if self._dtype is None else parameter.astype(self._dtype)

    def _applied(
        self, parameters: Parameters, state: dict[str, Any], gradients: Any, norm: mx.array, tokens: mx.array
    ) -> tuple[Parameters, dict[str, Any]]:
        gradients = tree_map(lambda grad: grad / tokens, gradients)
        if self._clip is not None:
            gradients = clipped(gradients, norm, self._clip)
        optimizer = self.optimizer
        optimizer.state = state
        if self._decay:
            parameters = decayed(parameters, optimizer.learning_rate * self._decay)
        return optimizer.apply_gradients(gradients, parameters), optimizer.state


def make_optimizer(settings: Settings) -> optim.Optimizer:
    """Returns MLX's optimizer without a learning rate, which is given at each step, and without decay."""
    if settings.optimizer == "adafactor":
        return optim.Adafactor(learning_rate=0.0, relative_step=False, scale_parameter=False)
    return optim.Adam(learning_rate=0.0, betas=list(settings.betas), eps=settings.eps, bias_correction=True)


def global_norm(gradients: Any) -> mx.array:
    """Returns the gradient norm: the length of all gradients taken as one vector, a float32 scalar."""
    squares = [grad.astype(mx.float32).square().sum() for _, grad in tree_flatten(gradients)]
    return mx.sqrt(mx.stack(squares).sum())


def clipped(gradients: Any, norm: mx.array, limit: float) -> Any:
    """Gradient clipping: returns `gradients` scaled down to the length `limit`, where `norm` is above it."""
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return tree_map(lambda grad: (grad * scale).astype(grad.dtype), gradients)


def decayed(parameters: Parameters, share: mx.array) -> Parameters:
    """Weight decay: returns `parameters` with that share taken from each matrix."""
    return tree_map(lambda value: value * (1 - share).astype(value.dtype) if value.ndim > 1 else value, parameters)


def recompute_blocks(model: nn.Module) -> None:
    """Gradient checkpointing: keeps what enters each block, and computes the rest again in the backward pass.

    A block's own activations are most of a step's memory; this costs a third more arithmetic.
    """
    for layer in model.layers:
        kind: Any = type(layer)
        layer.__class__ = _recomputed(kind)


@functools.cache
def _recomputed(block: Any) -> Any:
    """Makes a subclass of `block` that keeps only its inputs."""
    if block.__name__ == "Recomputed":
        return block

    class Recomputed(block):
        def __call__(self, x: mx.array, *others: Any, **named: Any) -> mx.array:
            if not self.training:
                return super().__call__(x, *others, **named)

            def inner(parameters: Parameters, x: mx.array) -> mx.array:  # called again in the backward pass
                kept = self.trainable_parameters()
                try:
                    self.update(parameters)
                    return block.__call__(self, x, *others, **named)
                finally:
                    self.update(kept)

            return mx.checkpoint(inner)(self.trainable_parameters(), x)

    return Recomputed
