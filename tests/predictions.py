"""KV predictions made by code: one that predicts what the base would compute, and one that is wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import mlx.core as mx
import tiny

from elm_mlx.model.config import ModelConfig
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.model.network import Model
from elm_mlx.store import kvp_directory


def write(path: Path, prediction: KVPrediction, base: Path) -> Path:
    """The directory of a prediction for the model in `base`."""
    path.mkdir(parents=True)
    kvp_directory.save(path, prediction, base, {})
    return path


def identity(base: Model) -> KVPrediction:
    """The base itself as the auxiliary model, and maps that change nothing."""
    made = KVPrediction(base, copy.deepcopy(base), range(len(base.layers)))
    for maps in made.maps:
        for each in (maps.to_keys, maps.to_values):
            each.weight, each.bias = mx.eye(each.weight.shape[0]), mx.zeros(each.bias.shape)
    mx.eval(made.parameters())
    return made


def wrong(base: Model, seed: int = 3) -> KVPrediction:
    """An auxiliary model of two layers with random weights, and random maps: another text than the base's."""
    fields = {name: getattr(base.config, name) for name in ("vocab_size", "max_context_length")}
    config: ModelConfig = tiny.scaled_config(**fields, num_layers=2, rope_max_length=2 * base.config.max_context_length)
    made = KVPrediction(base, tiny.random_model(config, seed), [min(1, layer) for layer in range(len(base.layers))])
    mx.random.seed(seed)
    for maps in made.maps:
        for each in (maps.to_keys, maps.to_values):
            each.weight = mx.random.normal(each.weight.shape)
    mx.eval(made.parameters())
    return made
