"""The network (paper, section 2), its norms and its initial weights: token ids to logits.

It has mlx-lm's model protocol, so that its tools can drive it: `model(ids, cache=...)`, `.layers`, and caches that are
anything with `update_and_fetch`, `offset` and `make_mask`, and give arrays (mlx-lm's quantized ones do not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from elm_mlx.model import ops
from elm_mlx.model.attention import Mask, Segments, attention
from elm_mlx.model.cache import KVCache, StepCache
from elm_mlx.model.config import MODEL_TYPE, ModelConfig
from elm_mlx.model.rope import Rope, Rotate
from elm_mlx.model.sublayers import LayerParts, LayersInC, layers_in_c

Cache: TypeAlias = KVCache | StepCache

_ADDING = ("out_proj.weight", "ffn.proj_2.weight")  # to the residual stream


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last axis, as one `mx.fast.rms_norm`.

    On a GPU that is one kernel. The paper's model called one small kernel for each step of the formula, 113 times a
    token in the 1.1B, and ran at half the speed of a LayerNorm model for it (paper, section 5).
    """

    def __init__(self, dims: int, eps: float = 1e-6):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """`(..., dims)` to the same shape and type."""
        return mx.fast.rms_norm(x, self.weight, self.eps)


class NaiveRMSNorm(RMSNorm):
    """The same function written out as CoreNet writes it: normalised in float32, cast back, then weighted."""

    written_out = True  # so a layer of `sublayers.c`, with a norm of its own, must not take its place

    def __call__(self, x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        normed = wide * mx.rsqrt(mx.mean(mx.square(wide), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal self-attention where `num_query_heads / num_kv_heads` queries share a key and value (GQA)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = config.num_query_heads[layer]
        self.num_kv_heads = config.num_kv_heads[layer]
        all_heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(config.model_dim, all_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, config.model_dim, bias=False)
        self.normalize_qk = config.normalize_qk_projections
        if self.normalize_qk:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Mask, rotate: Rotate, cache: Cache | None) -> mx.array:
        """`(batch, length, model_dim)` to the same; keys and values join `cache`."""
        batch, length, _ = x.shape
        qkv = self.qkv_proj(x).reshape(batch, length, -1, self.head_dim).swapaxes(1, 2)
        queries, keys, values = mx.split(qkv, [self.num_heads, self.num_heads + self.num_kv_heads], axis=1)
        if self.normalize_qk:  # before RoPE
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = rotate(queries), rotate(keys)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = attention(queries, keys, values, self.head_dim**-0.5, mask)
        return self.out_proj(out.swapaxes(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU: `proj_2(silu(gate) * up)`, gate and up being the halves of `proj_1`; or without the gate."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        width = config.ffn_dims[layer]
        self.with_glu = config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, 2 * width if self.with_glu else width, bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.proj_1(x)
        if not self.with_glu:
            return self.proj_2(ops.silu(x))
        gate, up = mx.split(x, 2, axis=-1)
        return self.proj_2(ops.swiglu(gate, up))


class Block(nn.Module):
    """One pre-norm layer: attention and FFN, each added to what came in."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.attn = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.ffn = FeedForward(config, layer)

    def __call__(self, x: mx.array, mask: Mask, rotate: Rotate, cache: Cache | None) -> mx.array:
        x = x + self.attn(self.attn_norm(x), mask, rotate, cache)
        return x + self.ffn(self.ffn_norm(x))

    def parts(self, rope: Rope) -> LayerParts:
        """Returns the modules by what they are for."""
        own, ffn = self.attn, self.ffn
        return LayerParts(
            [own.qkv_proj], own.out_proj, [ffn.proj_1], ffn.proj_2, own.num_heads, own.num_kv_heads, own.head_dim, rope,
            ffn.with_glu, before=self.attn_norm, ffn_before=self.ffn_norm,
            query_norm=own.q_norm if own.normalize_qk else None, key_norm=own.k_norm if own.normalize_qk else None,
        )  # fmt: skip


class Transformer(nn.Module):
    """Embedding, layers and the last norm: everything but the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = [Block(config, layer) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.rope = Rope(config.head_dim, config.rope_freq_constant)

    def __call__(
        self,
        ids: mx.array,
        cache: Sequence[Cache] | None,
        segments: Segments | None = None,
        last: int | None = None,
        on_layer: Callable[[mx.array], None] | None = None,
    ) -> mx.array:
        """Ids `(batch, length)` to hidden states `(batch, length, model_dim)`.

        `last` of one text's positions may be all that are wanted, `(1, last, model_dim)`. `on_layer` is called with
        what enters each layer, `(batch, length, model_dim)`.
        """
        x = self.token_embeddings(ids)
        if cache is not None:
            in_c = self.in_c(ids.size)
            if in_c is not None:
                return self.norm(in_c(x, cache, last, on_layer))
        caches = [None] * len(self.layers) if cache is None else cache
        mask = causal_mask(ids.shape[1], caches[0]) if segments is None else segments
        at = None if segments is None else segments.positions
        offset = 0 if caches[0] is None else caches[0].offset
        if not isinstance(offset, int):
            offset = mx.array(offset)  # a cache may count on in the array itself, before later layers have rotated
        rotate = self.rope(ids.shape[1], offset) if at is None else self.rope.at(at)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            if on_layer is not None:
                on_layer(x)
            x = layer(x, mask, rotate, layer_cache)
        return self.norm(x if last is None else x[:, -last:])

    def in_c(self, rows: int) -> LayersInC | None:
        """Returns the layers for so many rows, where C computes them."""
        return layers_in_c(self, rows, lambda: [layer.parts(self.rope) for layer in self.layers], self.norm)


class Model(nn.Module):
    """An OpenELM with its head. Until weights are loaded or drawn it has MLX's."""

    model_type = MODEL_TYPE

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        if not config.share_input_output_layers:
            self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)

    def __call__(
        self, ids: mx.array, cache: Sequence[Cache] | None = None, segments: Segments | None = None
    ) -> mx.array:
        """Ids `(batch, length)` to logits `(batch, length, vocab_size)`.

        `segments` separates texts that share a row. Not together with a cache.
        """
        return self.head(self.transformer(ids, cache, segments))

    def in_c(self, rows: int) -> LayersInC | None:
        """Returns the layers for so many rows, where C computes them."""
        return self.transformer.in_c(rows)

    def embed(self, ids: mx.array) -> mx.array:
        """Ids `(...)` to what the first layer reads, `(..., model_dim)`."""
        return self.transformer.token_embeddings(ids)

    def head_module(self) -> nn.Module:
        """Returns the module whose parameters turn hidden states into logits."""
        return self.transformer.token_embeddings if self.config.share_input_output_layers else self.lm_head

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states `(..., model_dim)` to logits `(..., vocab_size)`."""
        if self.config.share_input_output_layers:
            return self.transformer.token_embeddings.as_linear(hidden)
        return self.lm_head(hidden)

    def layer_ropes(self) -> list[Rope]:
        """Returns the rotation of each layer's queries and keys."""
        return [self.transformer.rope] * len(self.layers)

    @property
    def layers(self) -> list[Block]:
        return self.transformer.layers


def causal_mask(length: int, cache: Cache | None) -> Mask:
    """Returns the mask of `length` new positions: the cache's, or without one none for a single token."""
    if cache is not None:
        return cache.make_mask(length, return_array=False, window_size=None)
    return "causal" if length > 1 else None


def initialize(model: Model, seed: int) -> None:
    """Draws `model`'s weights, in float32, by CoreNet's rule; each has a key of its own.

    Norms are 1. The others are normal, with standard deviation 1/sqrt(inputs), the embedding's 1/sqrt(width); that of
    the projections added to the residual stream is 1/sqrt(2 * layers) smaller (arXiv 2205.01068).
    """
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
