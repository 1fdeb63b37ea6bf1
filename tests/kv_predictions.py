"""KV Predictions made by code, and CoreNet's formulas for them in NumPy and float64, with `reference`'s parts.

Knows nothing of how the product computes them: a head is a slice, and each model is a loop over its layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import reference
import texts
import tiny
from mlx.utils import tree_flatten, tree_map

from elm_mlx.data.filters import Filters
from elm_mlx.data.text_sources import TextSource
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.kv_prediction import KVPrediction, layer_map
from elm_mlx.model.network import Model
from elm_mlx.store import kvp_directory
from elm_mlx.train.kvp_recipe import KVPRecipe
from elm_mlx.train.pretraining_recipe import Data, Optimizer, RunSettings

Array = np.ndarray
Weights = Mapping[str, Array]


def prediction_of(base: Model, seed: int = 1, **fields: object) -> KVPrediction:
    """A prediction of random weights for `base`, by an auxiliary of two narrower layers."""
    config = tiny.scaled_config(base.config.vocab_size, **{"num_layers": 2, "model_dim": 48, "head_dim": 8} | fields)
    auxiliary = tiny.random_model(config, seed)
    made = KVPrediction(base, auxiliary, layer_map(len(base.layers), len(auxiliary.layers)))
    keys = iter(mx.random.split(mx.random.key(seed), 8 * len(made.maps)))
    made.update({"maps": tree_map(lambda value: 0.3 * mx.random.normal(value.shape, key=next(keys)), made.maps)})
    return made


def identity_of(base: Model, auxiliary: Model) -> KVPrediction:
    """A prediction by a model of the base's own shape, whose maps change nothing."""
    made = KVPrediction(base, auxiliary, range(len(base.layers)))
    for each in made.maps:
        for linear in (each.to_keys, each.to_values):
            linear.weight, linear.bias = mx.eye(len(linear.weight)), mx.zeros_like(linear.bias)
    return made


def write_prediction(path: Path, directory: Path, base: Model, seed: int = 1) -> Path:
    """The directory of `prediction_of`, for the base in `directory`."""
    path.mkdir(parents=True, exist_ok=True)
    kvp_directory.save(path, prediction_of(base, seed), directory, {"tokens": 0})
    return path


def recipe_of(path: Path, **fields: Any) -> KVPRecipe:
    """A recipe of 6 updates on texts that it writes into a directory: how often a word comes says what comes next."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"]
    for name, count in (("texts", 60), ("valid", 6)):
        rows = (" ".join(words[(i + j * (i % 3 + 1)) % 8] for j in range(80)) for i in range(count))
        texts.write(path / f"{name}.jsonl", [f"{number}. {row}" for number, row in enumerate(rows)])
    data = Data(
        (TextSource(str(path / "texts.jsonl")),), sequence_length=32, window=2048, workers=0,
        validation=str(path / "valid.jsonl"), validation_rows=8,
    )  # fmt: skip
    run = RunSettings(batch_size=4, accumulate=2, eval_every=3, save_every=2, keep=3)
    filters = Filters(min_tokens=10, max_repetition=1.0)
    return replace(KVPRecipe(data, Optimizer(2e-3, steps=6, warmup=2), filters=filters, run=run), **fields)


def weights_of(model: Model) -> dict[str, Array]:
    return {name: np.array(value.astype(mx.float32), np.float64) for name, value in tree_flatten(model.parameters())}


def projections(config: ModelConfig, weights: Weights, ids: Sequence[int]) -> list[tuple[Array, Array]]:
    """Keys and values `(length, kv_heads * head_dim)` of each layer, as it projects them of `ids`."""
    found, x = [], weights["transformer.token_embeddings.weight"][np.asarray(ids)]
    for layer in range(config.num_layers):
        own = _own(weights, layer)
        normed = reference.rms_norm(x, own["attn_norm.weight"], config.rms_norm_eps)
        projected = normed @ own["attn.qkv_proj.weight"].T
        width = config.num_kv_heads[layer] * config.head_dim
        found.append((projected[:, -2 * width : -width], projected[:, -width:]))
        x = x + reference.attention(config, own, normed, layer)
        x = x + reference.feed_forward(config, own, reference.rms_norm(x, own["ffn_norm.weight"], config.rms_norm_eps))
    return found


def predicted(prediction: KVPrediction, ids: Sequence[int]) -> list[tuple[Array, Array]]:
    """Keys by the base's norm, and values, `(length, kv_heads, head_dim)`, for each of the base's layers."""
    known = projections(prediction.auxiliary.config, weights_of(prediction.auxiliary), ids)
    maps = {name: np.array(value, np.float64) for name, value in tree_flatten(prediction.maps)}
    mapped = []
    for layer, place in enumerate(prediction.places):
        pairs = zip(known[place], (f"{layer}.to_keys", f"{layer}.to_values"), strict=True)
        mapped.append([each @ maps[f"{name}.weight"].T + maps[f"{name}.bias"] for each, name in pairs])
    return _in_heads(prediction.base, mapped)


def true(base: Model, ids: Sequence[int]) -> list[tuple[Array, Array]]:
    """What the base's own keys and values are, as `predicted` has them."""
    return _in_heads(base, projections(base.config, weights_of(base), ids))


def logits(base: Model, ids: Sequence[int], given: Sequence[tuple[Array, Array]], own_last: bool) -> Array:
    """Logits `(length, vocab_size)` of the base whose keys and values are `given`, of the first `len(given[0][0])` ids.

    With `own_last` only the last of the ids is the base's to read, with a key and value of its own behind the given.
    """
    config, weights, size = base.config, weights_of(base), base.config.head_dim
    first = len(given[0][0]) if own_last else 0
    positions = np.arange(first, len(ids))
    x = weights["transformer.token_embeddings.weight"][np.asarray(ids)[first:]]
    for layer, (keys, values) in enumerate(given):
        own, heads, kv_heads = _own(weights, layer), config.num_query_heads[layer], config.num_kv_heads[layer]
        normed = reference.rms_norm(x, own["attn_norm.weight"], config.rms_norm_eps)
        projected = (normed @ own["attn.qkv_proj.weight"].T).reshape(len(x), -1, size)
        queries = _normed(config, own, "q_norm", projected[:, :heads])
        if own_last:
            keys = np.concatenate([keys, _normed(config, own, "k_norm", projected[:, heads : heads + kv_heads])])
            values = np.concatenate([values, projected[:, heads + kv_heads :]])
        outputs = []
        for head in range(heads):
            group, theta = head // (heads // kv_heads), config.rope_freq_constant
            turned = reference.rope(keys[:, group], np.arange(len(keys)), theta)
            scores = reference.rope(queries[:, head], positions, theta) @ turned.T / np.sqrt(size)
            hidden = np.arange(len(keys))[None, :] > positions[:, None]
            outputs.append(reference.softmax(np.where(hidden, -np.inf, scores)) @ values[:, group])
        x = x + np.concatenate(outputs, axis=-1) @ own["attn.out_proj.weight"].T
        x = x + reference.feed_forward(config, own, reference.rms_norm(x, own["ffn_norm.weight"], config.rms_norm_eps))
    x = reference.rms_norm(x, weights["transformer.norm.weight"], config.rms_norm_eps)
    output = "transformer.token_embeddings.weight" if config.share_input_output_layers else "lm_head.weight"
    return x @ weights[output].T


def _own(weights: Weights, layer: int) -> dict[str, Array]:
    prefix = f"transformer.layers.{layer}."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _normed(config: ModelConfig, own: Weights, norm: str, x: Array) -> Array:
    if not config.normalize_qk_projections:
        return x
    return reference.rms_norm(x, own[f"attn.{norm}.weight"], config.rms_norm_eps)


def _in_heads(base: Model, merged: Sequence[Sequence[Array]]) -> list[tuple[Array, Array]]:
    config, weights, size = base.config, weights_of(base), base.config.head_dim
    found = []
    for layer, (keys, values) in enumerate(merged):
        keys, values = (each.reshape(len(each), -1, size) for each in (keys, values))
        found.append((_normed(config, _own(weights, layer), "k_norm", keys), values))
    return found
