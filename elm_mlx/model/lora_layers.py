"""Low-rank adapters as modules: a linear or an embedding, and two thin matrices beside it.

LoRA (Hu et al., 2021) adds `scale * B A` to a weight; DoRA (Liu et al., 2024) then brings each row to a learnt length.
Parameters are named and laid out as in mlx-lm: `lora_a` (inputs, rank), `lora_b` (rank, outputs), `m` (outputs,); of an
embedding a token is an input, and `m` has one length a token. The base may be quantized. A linear's bias is added after
DoRA's scaling.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

PARAMETERS = ["lora_a", "lora_b", "m"]
_TINY = 1e-12  # a row of zeros has no direction, and stays one


class LoRALinear(nn.Module):
    """`linear(x) + scale * dropout(x) lora_a lora_b`. A new one computes what `linear` does: `lora_b` is 0."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float, key: mx.array):
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        rows, columns = dense_shape(linear)
        self.lora_a = _uniform((columns, rank), key)
        self.lora_b = mx.zeros((rank, rows))

    def __call__(self, x: mx.array) -> mx.array:
        """`(..., inputs)` to `(..., outputs)`, in x's type."""
        low = self.scale * (self.dropout(x) @ self.lora_a)
        return self.linear(x) + (low @ self.lora_b).astype(x.dtype)


class LoRAEmbedding(nn.Module):
    """`embedding(ids) + scale * lora_a[ids] lora_b`.

    As a tied head it is the base embedding, or with `adapted_head` the adapted one.
    """

    def __init__(
        self, embedding: nn.Module, rank: int, scale: float, dropout: float, key: mx.array, adapted_head: bool
    ):
        super().__init__()
        self.embedding = embedding
        self.scale = scale
        self.adapted_head = adapted_head
        self.dropout = nn.Dropout(dropout)
        rows, columns = dense_shape(embedding)
        self.lora_a = _uniform((rows, rank), key)
        self.lora_b = mx.zeros((rank, columns))

    def __call__(self, ids: mx.array) -> mx.array:
        """Ids `(...)` to `(..., model_dim)`, in the embedding's type."""
        base = self.embedding(ids)
        return base + self._added(ids).astype(base.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """`(..., model_dim)` to logits `(..., vocab_size)`."""
        base = self.embedding.as_linear(x)
        if not self.adapted_head:
            return base
        low = self.scale * (self.dropout(x) @ self.lora_b.T)
        return base + (low @ self.lora_a.T).astype(x.dtype)

    def _added(self, ids: mx.array) -> mx.array:
        return self.dropout((self.scale * self.lora_a[ids]) @ self.lora_b)


class _DoRA:
    """Mixed into LoRA's modules: the length `m` of each row of the adapted weight, and its ratio to the present one.

    The present length counts as a constant for gradients (DoRA, section 4.3).
    """

    adapted_head = True  # an embedding that is no adapted head has no fixed rows to measure
    scale: float
    m: mx.array

    def __init__(self, base: nn.Module, *arguments: Any) -> None:
        """Takes the arguments of the class that it is mixed into."""
        super().__init__(base, *arguments)  # type: ignore[call-arg]
        self._squares = mx.square(dense_weight(base)).sum(axis=1)
        self.m = mx.sqrt(self._squares)
        self._settled: mx.array | None = None
        mx.eval(self._squares, self.m)  # or the dense weight would live on in the graph

    def settle(self) -> None:
        """Computes the lengths once; until training, the parameters are taken for constants."""
        if self.adapted_head:
            self._settled = self._computed_ratio()
            mx.eval(self._settled)

    def _set_training_mode(self, mode: bool) -> None:
        super()._set_training_mode(mode)  # type: ignore[misc]
        if mode:
            self._settled = None

    def ratio(self) -> mx.array:
        """Returns what each output is multiplied by, `(outputs,)`: `m` over the length of its row."""
        return self._computed_ratio() if self._settled is None else self._settled

    def _computed_ratio(self) -> mx.array:
        """`m` over the length of each row of `W + scale * left right`.

        The square of the length is expanded into the squares of W's rows, W rightᵀ and right rightᵀ, because the sum
        itself is as large as W, and would be made at every step.
        """
        left, right, cross = self._factors()
        low = (left @ (right @ right.T)) * left
        square = self._squares + (2 * self.scale) * (cross * left).sum(axis=1) + self.scale**2 * low.sum(axis=1)
        return self.m / mx.stop_gradient(mx.maximum(mx.sqrt(mx.maximum(square, 0)), _TINY))

    def _factors(self) -> tuple[mx.array, mx.array, mx.array]:
        """`left`, `right`, and W rightᵀ, by the module itself, whatever W is packed in."""
        raise NotImplementedError


class DoRALinear(_DoRA, LoRALinear):
    """LoRA's output, each of its values times `m` over the length of its row of the adapted weight."""

    def __call__(self, x: mx.array) -> mx.array:
        out, ratio, bias = super().__call__(x), self.ratio().astype(x.dtype), self.linear.get("bias")
        return out * ratio if bias is None else (out - bias) * ratio + bias

    def _factors(self) -> tuple[mx.array, mx.array, mx.array]:
        cross = self.linear(self.lora_a.T).T
        if "bias" in self.linear:
            cross = cross - self.linear.bias[:, None]
        return self.lora_b.T, self.lora_a.T, cross


class DoRAEmbedding(_DoRA, LoRAEmbedding):
    """LoRA's embedding, each token's vector brought to the length `m` of that token."""

    def __call__(self, ids: mx.array) -> mx.array:
        base = self.embedding(ids)
        adapted = base + (self.scale * self.lora_a[ids]) @ self.lora_b
        length = mx.stop_gradient(mx.sqrt(mx.square(adapted.astype(mx.float32)).sum(axis=-1)))
        ratio = self.m[ids] / mx.maximum(length, _TINY)
        return ((base + self._added(ids)) * ratio[..., None]).astype(base.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        logits = super().as_linear(x)
        return logits * self.ratio().astype(x.dtype) if self.adapted_head else logits

    def _factors(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.lora_a, self.lora_b, self.embedding.as_linear(self.lora_b).T


def wrap(
    module: nn.Module, rank: int, scale: float, dropout: float, key: mx.array, *, dora: bool, adapted_head: bool
) -> nn.Module:
    """Returns `module`, a linear or an embedding, with a new adapter around it."""
    if hasattr(module, "as_linear"):
        embedding = DoRAEmbedding if dora else LoRAEmbedding
        return embedding(module, rank, scale, dropout, key, adapted_head)
    return (DoRALinear if dora else LoRALinear)(module, rank, scale, dropout, key)


def merge(weight: mx.array, delta: mx.array, m: mx.array | None) -> mx.array:
    """Returns the weight `(rows, columns)` that base and adapter make; `delta` is the scaled product."""
    weight = weight + delta
    if m is None:
        return weight
    length = mx.sqrt(mx.square(weight).sum(axis=1))
    return weight * (m / mx.maximum(length, _TINY))[:, None]


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear, (tokens, width) of an embedding; quantized or not."""
    rows, columns = module.weight.shape
    return rows, columns * 32 // module.bits if hasattr(module, "bits") else columns


def dense_weight(module: nn.Module) -> mx.array:
    """Returns a module's weight in float32, dequantized where it is quantized."""
    if not hasattr(module, "bits"):
        return module.weight.astype(mx.float32)
    return dequantize(
        module.weight, module.scales, module.get("biases"),
        group_size=module.group_size, bits=module.bits, mode=module.mode,
    )  # fmt: skip


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array | None, *, group_size: int, bits: int, mode: str
) -> mx.array:
    """Dequantizes in float32: scales are widened first, or products would be rounded to 16 bits, as in no kernel."""
    if scales.dtype != mx.uint8:
        scales = scales.astype(mx.float32)
    if biases is not None:
        biases = biases.astype(mx.float32)
    wide = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    return wide.astype(mx.float32)


def _uniform(shape: tuple[int, int], key: mx.array) -> mx.array:
    bound = shape[0] ** -0.5
    return mx.random.uniform(-bound, bound, shape, key=key)
