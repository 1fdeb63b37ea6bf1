"""The directory of a KV Prediction: read as it was written, by its own base alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kv_predictions
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from elm_mlx.errors import InputError
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.config import ModelConfig
from elm_mlx.store import kvp_directory
from elm_mlx.store.loading import load, load_model

IDS = mx.array([[5, 9, 33, 2, 71, 8, 8, 300]])


@pytest.fixture
def made(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return kv_predictions.write_prediction(tmp_path / "kvp", tiny_model_dir, load_model(tiny_model_dir))


def test_what_was_saved_is_loaded(made: Path, tiny_model_dir: Path) -> None:
    base = load_model(tiny_model_dir)
    before, after = kv_predictions.prediction_of(base), kvp_directory.load(made, tiny_model_dir, base)
    for (name, kept), (other, found) in zip(
        tree_flatten([before.auxiliary.parameters(), before.maps]),
        tree_flatten([after.auxiliary.parameters(), after.maps]), strict=True,
    ):  # fmt: skip
        assert name == other and mx.array_equal(kept, found)
    caches = [make_prompt_cache(base), make_prompt_cache(base)]
    for prediction, own in zip((before, after), caches, strict=True):
        prediction.read(IDS, make_prompt_cache(prediction.auxiliary), own)
    for one, other in zip(*caches, strict=True):
        np.testing.assert_array_equal(one.state[0], other.state[0])
    assert not tree_flatten(after.trainable_parameters())


def test_the_auxiliary_is_a_model_directory(made: Path) -> None:
    model, tokenizer = load(made / kvp_directory.AUXILIARY)
    assert len(model.layers) == 2 and tokenizer.encode("the")


def test_it_computes_in_the_bases_type(made: Path, tiny_model_dir: Path) -> None:
    base = load_model(tiny_model_dir, "float16")
    prediction, caches = kvp_directory.load(made, tiny_model_dir, base), make_prompt_cache(base)
    prediction.read(IDS, make_prompt_cache(prediction.auxiliary), caches)
    assert {array.dtype for array in caches[0].state if array is not None} == {mx.float16}


def other_weights(base: Path, config: ModelConfig) -> Path:
    tiny.write_directory(base, tiny.random_model(config, seed=9), None)
    return base


def other_rope(base: Path, config: ModelConfig) -> Path:
    values = config.to_dict() | {"rope_freq_constant": 500_000.0}
    (base / "config.json").write_text(json.dumps(values))
    return base


def other_tokenizer(base: Path, config: ModelConfig) -> Path:
    (base / "tokenizer.model").write_bytes(tiny.train_tokenizer(character_coverage=0.99))
    return base


def quantized(base: Path, config: ModelConfig) -> Path:
    return tiny.write_quantized(base, tiny.random_model(config), None)


@pytest.mark.parametrize(("change", "what"), [
    (other_weights, "another model"), (other_rope, "another model"), (other_tokenizer, "another tokenizer"),
    (quantized, "another model"),
])  # fmt: skip
def test_another_base_is_refused(
    made: Path, tiny_model_dir: Path, tmp_path: Path, tiny_config: ModelConfig,
    change: Callable[[Path, ModelConfig], Path], what: str,
) -> None:  # fmt: skip
    other = change(Path(shutil.copytree(tiny_model_dir, tmp_path / "other")), tiny_config)
    with pytest.raises(InputError, match=f"belongs to {what}, of .*, and not to {other}; `elm-mlx kvp`"):
        kvp_directory.load(made, other, load_model(other))


def test_another_family_is_refused(made: Path, family_dirs: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"llama: is a Llama, and KV Prediction is for OpenELM"):
        kvp_directory.load(made, family_dirs["llama"], load_model(family_dirs["llama"]))


def without(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def record(**values: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        before = json.loads((path / "kvp.json").read_text())
        (path / "kvp.json").write_text(json.dumps(before | values))

    return change


def cut(path: Path) -> None:
    maps = path / "maps.safetensors"
    maps.write_bytes(maps.read_bytes()[:-5])


def another_auxiliary(**fields: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = tiny.scaled_config(**{"vocab_size": 320, "num_layers": 2, "model_dim": 48, "head_dim": 8} | fields)
        pieces = tiny.train_tokenizer(vocab_size=config.vocab_size)
        tiny.write_directory(path / kvp_directory.AUXILIARY, tiny.random_model(config), pieces)

    return change


def less(path: Path) -> None:
    values = dict(mx.load(str(path / "maps.safetensors")))
    values.pop("1.to_keys.bias")
    mx.save_safetensors(str(path / "maps.safetensors"), values)


@pytest.mark.parametrize(("damage", "message"), [
    (without("kvp.json"), "holds no kvp.json, so it is no KV Prediction; `elm-mlx kvp MODEL … --out DIR` makes one"),
    (record(format=2), "has format 2; this version reads 1"),
    (record(base="x"), "damaged: it does not say which base"),
    (record(layers=[0, 1, 7]), "layers are numbers of the auxiliary's layers, up to 1"),
    (record(layers=[0, 1]), "2 layers are given for the base's 3"),
    (without("maps.safetensors"), "maps.safetensors"),
    (without("auxiliary/model.safetensors"), "auxiliary: holds no model.safetensors"),
    (cut, "maps.safetensors: its tensors take"),
    (less, "1.to_keys.bias does not fit both models"),
    (another_auxiliary(vocab_size=300), "auxiliary: has 300 tokens and the base 320: .* needs the base's vocabulary"),
    (another_auxiliary(max_context_length=64), "auxiliary: reads 64 tokens and the base [0-9,]+: .* a context as long"),
])  # fmt: skip
def test_damage_is_named(made: Path, tiny_model_dir: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(made)
    with pytest.raises(InputError, match=message) as raised:
        kvp_directory.load(made, tiny_model_dir, load_model(tiny_model_dir))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("stopped_at", ["maps.safetensors", "kvp.json"])
def test_what_was_written_in_part_is_not_read_with_what_was_there_before(
    made: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: str
) -> None:
    base, replacing = load_model(tiny_model_dir), os.replace

    def stopping(source: Path, target: Path, **rest: Any) -> None:
        if Path(target).name == stopped_at:
            raise KeyboardInterrupt
        replacing(source, target, **rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", stopping)
        kv_predictions.write_prediction(made, tiny_model_dir, base, seed=2)
    with pytest.raises(InputError, match=r"holds no kvp\.json"):
        kvp_directory.load(made, tiny_model_dir, base)
    kv_predictions.write_prediction(made, tiny_model_dir, base, seed=2)
    kvp_directory.load(made, tiny_model_dir, base)


def test_where_there_is_none(tmp_path: Path, tiny_model_dir: Path) -> None:
    base = load_model(tiny_model_dir)
    with pytest.raises(InputError, match="no such directory; `elm-mlx kvp MODEL … --out DIR` makes one"):
        kvp_directory.load(tmp_path / "nowhere", tiny_model_dir, base)
    (tmp_path / "run" / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(InputError, match="goes on with --resume"):
        kvp_directory.load(tmp_path / "run", tiny_model_dir, base)
