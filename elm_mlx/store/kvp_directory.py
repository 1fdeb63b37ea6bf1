"""The directory of a KV Prediction: the auxiliary model, the maps, and which base they belong to.

    DIR/kvp.json           the base, the auxiliary's layer for each of its layers, and how it was trained
        auxiliary/         a model directory, in float32
        maps.safetensors   LAYER.to_keys.weight and .bias, LAYER.to_values.weight and .bias, of each layer of the base

A base is told from others by its weights, the figures that its keys depend on beside them, and its tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from elm_mlx import device, files, reading
from elm_mlx.directories import PREDICTION, carry, checkpoints_of
from elm_mlx.errors import InputError
from elm_mlx.model.config import Config, ModelConfig, read_config
from elm_mlx.model.families import FamilyConfig
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.model.network import Model
from elm_mlx.safetensors_file import fingerprint, write_arrays
from elm_mlx.store.loading import load_arrays, open_model
from elm_mlx.text.tokenizer import Tokenizer

FORMAT = 1
AUXILIARY, MAPS = "auxiliary", "maps.safetensors"
CONTENTS = (
    PREDICTION,
    f"{AUXILIARY}/config.json",
    f"{AUXILIARY}/model.safetensors",
    MAPS,
)  # what a prediction depends on


@dataclass(frozen=True)
class Base:
    """The identity of a base.

    Attributes:
        name: its directory, for a person.
        model: a hash of its weights' `fingerprint`, and of what else its keys depend on.
        tokenizer: a hash of the tokenizer's file.
    """

    name: str
    model: str
    tokenizer: str


def base_of(directory: Path) -> Base:
    """Returns the identity of a model directory.

    Raises:
        InputError: a file is missing or damaged, or the model is no OpenELM.
    """
    config = openelm_config(directory)
    figures = [fingerprint(directory), config.rope_freq_constant, config.rms_norm_eps, config.normalize_qk_projections]
    tokenizer = reading.content(Tokenizer.load(directory).path, reading.CORPUS_BYTES)
    hashes = (hashlib.sha256(data).hexdigest() for data in (json.dumps(figures).encode(), tokenizer))
    return Base(str(directory), *hashes)


def openelm_config(directory: Path) -> ModelConfig:
    """Returns the config of a directory with a tokenizer, which must be of an OpenELM. Raises InputError."""
    config: Config = read_config(directory, with_tokenizer=True)
    if isinstance(config, FamilyConfig):
        raise InputError(f"{directory}: is a {config.family.name}, and KV Prediction is for OpenELM: give one of these")
    return config


def check_auxiliary(path: Path, auxiliary: ModelConfig, base: ModelConfig) -> None:
    """Raises InputError unless the model at `path` can read all that its base can."""
    if auxiliary.vocab_size != base.vocab_size:
        raise InputError(
            f"{path}: has {auxiliary.vocab_size:,} tokens and the base {base.vocab_size:,}: an auxiliary model needs "
            "the base's vocabulary"
        )
    if auxiliary.max_context_length < base.max_context_length:
        raise InputError(
            f"{path}: reads {auxiliary.max_context_length:,} tokens and the base {base.max_context_length:,}: an "
            "auxiliary model needs a context as long"
        )


def save(path: Path, prediction: KVPrediction, base: Path, trained: Mapping[str, Any]) -> None:
    """Writes a prediction into a directory that is there, in place of one that is in it.

    `kvp.json` goes first and comes last, so that no part of another prediction is ever read with this one's.

    Args:
        base: the base's directory, whose tokenizer the auxiliary gets too.
        trained: how it was trained, as JSON has it.

    Raises:
        ElmError: it cannot be written.
    """
    (path / PREDICTION).unlink(missing_ok=True)
    with files.new_directory(path / AUXILIARY, replace=True) as made:
        files.write_json(made / "config.json", prediction.auxiliary.config.to_dict())
        with (made / "model.safetensors").open("wb") as file:
            write_arrays(file, dict(tree_flatten(prediction.auxiliary.parameters())))
        carry(base, made)
    with files.new_file(path / MAPS) as file:
        write_arrays(file, dict(tree_flatten(prediction.maps)))
    record = {"format": FORMAT, "base": asdict(base_of(base)), "layers": list(prediction.places), "trained": trained}
    files.write_json(path / PREDICTION, record)


def load(path: Path | str, directory: Path, base: Model) -> KVPrediction:
    """Loads a prediction for `base`, of a model directory, in the type that it computes in.

    Raises:
        InputError: there is none, or it is damaged, or belongs to another base.
    """
    path = reading.expanded(path)
    if not (path / PREDICTION).exists():
        raise InputError(f"{path}: {_no_prediction(path)}")
    record = reading.json_object(path / PREDICTION)
    if record.get("format") != FORMAT:
        raise InputError(
            f"{path / PREDICTION}: has format {reading.short(record.get('format'))}; this version reads {FORMAT}"
        )
    _check_base(path, record.get("base"), base_of(directory))
    dtype = base.transformer.norm.weight.dtype
    name = next(name for name, each in device.DTYPES.items() if each == dtype)
    config = openelm_config(path / AUXILIARY)
    check_auxiliary(path / AUXILIARY, config, base.config)
    auxiliary = open_model(path / AUXILIARY, name, config=config).model
    places, last = record.get("layers"), len(auxiliary.layers) - 1
    if not isinstance(places, list) or any(type(place) is not int or not 0 <= place <= last for place in places):
        raise InputError(f"{path / PREDICTION}: damaged: layers are numbers of the auxiliary's layers, up to {last}")
    if len(places) != len(base.layers):
        raise InputError(
            f"{path / PREDICTION}: damaged: {len(places)} layers are given for the base's {len(base.layers)}"
        )
    prediction = KVPrediction(base, auxiliary, places)
    weights = load_arrays(path / MAPS)
    expected = {name: value.shape for name, value in tree_flatten(prediction.maps)}
    different = expected.items() ^ {name: value.shape for name, value in weights.items()}.items()
    if different:
        raise InputError(f"{path / MAPS}: damaged: {min(name for name, _ in different)} does not fit both models")
    prediction.load_weights([(f"maps.{name}", value.astype(dtype)) for name, value in weights.items()], strict=False)
    prediction.freeze()
    prediction.eval()
    mx.eval(prediction.maps)
    return prediction


def _check_base(path: Path, found: Any, now: Base) -> None:
    """Raises InputError unless `found` is the record of the base that is there `now`."""
    try:
        known = Base(**found)
    except TypeError:
        raise InputError(f"{path / PREDICTION}: damaged: it does not say which base it belongs to") from None
    for kind in ("model", "tokenizer"):
        if getattr(known, kind) != getattr(now, kind):
            what = "another model" if kind == "model" else "another tokenizer"
            raise InputError(
                f"{path}: belongs to {what}, of {reading.short(known.name)}, and not to {now.name}; `elm-mlx kvp` "
                "makes one for it"
            )


def _no_prediction(path: Path) -> str:
    """Returns what a directory without `kvp.json` is, and what to do."""
    if not path.is_dir():
        return "no such directory; `elm-mlx kvp MODEL … --out DIR` makes one"
    if checkpoints_of(path):
        return "a training run that has left no KV Prediction; one of `elm-mlx kvp` goes on with --resume"
    return f"holds no {PREDICTION}, so it is no KV Prediction; `elm-mlx kvp MODEL … --out DIR` makes one"
