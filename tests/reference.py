"""OpenELM in NumPy and float64, from its formulas alone: what the model is compared with.

Knows no MLX. Heads are a loop, RoPE is a product of complex numbers, and widths are read off the weights
rather than the config, so that it shares no mistake with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from elm_mlx.model.config import ModelConfig

Array = np.ndarray


def logits(config: ModelConfig, weights: Mapping[str, Array], ids: Sequence[int]) -> Array:
    """`(length, vocab_size)`, for weights by canonical name."""
    w = {name: np.asarray(values, np.float64) for name, values in weights.items()}
    x = w["transformer.token_embeddings.weight"][np.asarray(ids)]
    for layer in range(config.num_layers):
        own = {name.split(".", 3)[3]: values for name, values in w.items() if f".layers.{layer}." in name}
        x = x + attention(config, own, rms_norm(x, own["attn_norm.weight"], config.rms_norm_eps), layer)
        x = x + feed_forward(config, own, rms_norm(x, own["ffn_norm.weight"], config.rms_norm_eps))
    x = rms_norm(x, w["transformer.norm.weight"], config.rms_norm_eps)
    return x @ w["transformer.token_embeddings.weight" if config.share_input_output_layers else "lm_head.weight"].T


def attention(config: ModelConfig, w: Mapping[str, Array], x: Array, layer: int) -> Array:
    length, size = len(x), config.head_dim
    query_heads, kv_heads = config.num_query_heads[layer], config.num_kv_heads[layer]
    projected = (x @ w["attn.qkv_proj.weight"].T).reshape(length, -1, size)
    assert projected.shape[1] == query_heads + 2 * kv_heads
    future = np.arange(length)[None, :] > np.arange(length)[:, None]
    outputs = []
    for head in range(query_heads):
        group = head // (query_heads // kv_heads)
        q, k = projected[:, head], projected[:, query_heads + group]
        v = projected[:, query_heads + kv_heads + group]
        if config.normalize_qk_projections:
            q = rms_norm(q, w["attn.q_norm.weight"], config.rms_norm_eps)
            k = rms_norm(k, w["attn.k_norm.weight"], config.rms_norm_eps)
        q, k = (rope(part, np.arange(length), config.rope_freq_constant) for part in (q, k))
        scores = np.where(future, -np.inf, q @ k.T / np.sqrt(size))
        outputs.append(softmax(scores) @ v)
    return np.concatenate(outputs, axis=-1) @ w["attn.out_proj.weight"].T


def feed_forward(config: ModelConfig, w: Mapping[str, Array], x: Array) -> Array:
    inner, outer = w["ffn.proj_1.weight"], w["ffn.proj_2.weight"]
    if not config.ffn_with_glu:
        return silu(x @ inner.T) @ outer.T
    width = len(inner) // 2
    return (silu(x @ inner[:width].T) * (x @ inner[width:].T)) @ outer.T


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def rope(x: Array, positions: Array, base: float) -> Array:
    """`(..., length, head_dim)`: entry i with entry i + head_dim / 2 is one complex number, turned by its position."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.outer(positions, float(base) ** -(np.arange(half) / half)))
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
