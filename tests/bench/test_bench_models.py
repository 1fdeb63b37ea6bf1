"""Seeded models: the same each time, whole for ours and for mlx-lm, and not made where there is no room."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import mlx.core as mx
import pytest
import tiny

from elm_mlx import blas, device
from elm_mlx.bench import measured_models
from elm_mlx.bench.sides import Unavailable
from elm_mlx.bench.suites import Case
from elm_mlx.errors import InputError
from elm_mlx.model.config import ModelConfig
from elm_mlx.store.loading import open_model

CONFIG = tiny.scaled_config(320, head_dim=32, ffn_dim_divisor=64)  # widths that groups of 64 fit


@pytest.mark.parametrize("precision", ["bfloat16", "float32", "8bit", "4bit"])
def test_a_seeded_model_is_a_model_directory_as_large_as_was_said(tmp_path: Path, precision: str) -> None:
    path = measured_models.write_seeded(CONFIG, tmp_path / "a", precision)
    loaded = open_model(path, "float32")
    assert loaded.stored == ({"8bit": "8-bit, group 64", "4bit": "4-bit, group 64"}.get(precision, precision))
    logits = loaded.model(mx.array([[1, 5, 9]]))
    assert mx.isfinite(logits).all() and float(logits.std()) > 0.1
    size = (path / "model.safetensors").stat().st_size
    assert size == pytest.approx(measured_models.stored_bytes(CONFIG, precision), rel=0.1)
    measured_models.write_seeded(CONFIG, tmp_path / "b", precision)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_mlx_lm_opens_it_and_computes_the_same(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    path = measured_models.write_seeded(CONFIG, tmp_path, "4bit")
    theirs, _ = load_model(path)
    ids = mx.array([[1, 5, 9]])
    ours = open_model(path, "float32").model(ids)
    apart = theirs(ids).astype(mx.float32) - ours  # theirs in bfloat16
    assert float(apart.std()) < 0.05 * float(ours.std())


def test_presets_are_made_and_directories_taken_as_they_are(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert measured_models.prepare(str(tiny_model_dir), "stored", tmp_path) == tiny_model_dir
    with pytest.raises(InputError, match="measured as it is stored"):
        measured_models.prepare(str(tiny_model_dir), "4bit", tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_disk_without_room_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10**8))
    with pytest.raises(Unavailable, match=r"take 0\.5 GB of disk, but 0\.1 GB are free"):
        measured_models.prepare("OpenELM-270M", "bfloat16", tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    measured_models.check("OpenELM-3B")
    with pytest.raises(InputError, match="neither a model directory nor one of OpenELM-270M"):
        measured_models.check("OpenELM-4B")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        measured_models.check(str(tmp_path))


def test_memory_is_weights_as_they_are_held_and_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case("OpenELM-1_1B", "bfloat16", 128, 128)]
    config = ModelConfig.preset("OpenELM-1_1B")

    def needed(precision: str, dtype: str | None, cases: list[Case], side: str = "ours") -> int:
        return measured_models.memory_needed(
            config, measured_models.stored_bytes(config, precision), dtype, cases, side
        )

    monkeypatch.setattr(blas, "reads_stored", lambda: True)
    for side in ("ours", "naive", "llama.cpp"):
        assert 0.5 * config.parameters < needed("4bit", None, cases, side) < 1.4 * config.parameters
    for side, dtype in (("mlx-lm", None), ("pytorch", None), ("ours", "float32")):
        assert 4 * config.parameters < needed("4bit", dtype, cases, side) < 5.5 * config.parameters
    monkeypatch.setattr(blas, "reads_stored", lambda: False)
    wide = needed("bfloat16", None, cases)
    assert 4 * config.parameters < wide < 5.5 * config.parameters
    assert 2 * config.parameters < needed("bfloat16", "bfloat16", cases) < 0.6 * wide
    longer = needed("bfloat16", None, [Case("OpenELM-1_1B", "bfloat16", 128, 1128)])
    assert longer - wide == 2 * 1000 * config.kv_bytes_per_token(4)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    assert 0.5 * config.parameters < needed("4bit", None, cases) < 1.2 * config.parameters


def test_what_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda: 10**9)
    measured_models.check_memory(8 * 10**8)
    with pytest.raises(Unavailable, match=r"would take about 2\.0 GB, but 1\.0 GB are free"):
        measured_models.check_memory(2 * 10**9)
    monkeypatch.setattr(device, "available_memory", lambda: None)
    measured_models.check_memory(10**12)  # a system that doesn't say


def test_another_familys_directory_is_as_large_as_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(bytes(10**6))
    assert measured_models.config_of(tmp_path) is None
    assert 10**6 < measured_models.memory_needed(None, 10**6, None, [Case("x", "stored", 1, 1)]) < 10**9
