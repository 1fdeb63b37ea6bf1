"""What was converted, opened by plain mlx-lm and by elm-mlx: the logits of the source's own weights.

The reference is the network written out in numpy, in float64, on the arrays that went into the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import elm_mlx  # before whatever imports MLX, for the sake of its BLAS

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch_files
from checkpoints import VARIANTS, corenet, reference_logits, save_pt, save_tokenizer, tensors, tiny, weights

from elm_mlx.model.config import ModelConfig
from elm_mlx_convert import convert

IDS = [1, 5, 299, 17, 17, 2, 60, 123, 9]


def logits(directory: Path) -> np.ndarray:
    """mlx-lm's."""
    from mlx_lm import load

    model, tokenizer = load(str(directory))
    assert tokenizer.encode("the fox")[0] == 1
    return np.array(model(mx.array([IDS]))[0].astype(mx.float32))


def own_logits(directory: Path) -> np.ndarray:
    model, tokenizer = elm_mlx.load(directory)
    assert tokenizer is not None and tokenizer.encode("the fox")[0] == 1
    return np.array(model(mx.array([IDS]))[0].astype(mx.float32))


def check(found: np.ndarray, config: ModelConfig, made: dict[str, np.ndarray]) -> None:
    expected = reference_logits(config, made, IDS)[:, : found.shape[1]]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-3 * expected.std()


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tmp_path: Path, variant: str) -> None:
    config = tiny(**VARIANTS[variant])
    made = weights(config)
    path = save_pt(tmp_path / "a.pt", made)
    head_dim = None if config.normalize_qk_projections else 8
    tokenizer = save_tokenizer(tmp_path)
    convert(path, tmp_path / "out", tokenizer=tokenizer, dtype="float32", head_dim=head_dim)
    check(own_logits(tmp_path / "out"), config, made)
    if config.ffn_with_glu:
        check(logits(tmp_path / "out"), config, made)
    else:
        with pytest.raises(ValueError, match="shape"):
            logits(tmp_path / "out")


@pytest.mark.parametrize("dora", [False, True])
def test_adapters(tmp_path: Path, dora: bool) -> None:
    """The reference runs base and adapter side by side, and its head reads the base embedding, as CoreNet's does."""
    config = tiny()
    random = np.random.default_rng(5)
    base = weights(config)
    stored: dict[str, np.ndarray] = {}
    effective = dict(base) | {"lm_head.weight": base["transformer.token_embeddings.weight"]}
    for name, values in base.items():
        module = next(iter(corenet({name: values}))).removesuffix(".weight")
        if "norm" in name:
            stored[f"{module}.weight"] = values
            continue
        embedding = "embed" in name
        inputs, outputs = values.shape if embedding else values.shape[::-1]
        a = random.standard_normal((4, inputs)).astype(np.float32) * np.float32(0.3)
        b = random.standard_normal((outputs, 4)).astype(np.float32) * np.float32(0.1)
        stored[f"{module}.base_layer.weight"] = values
        kind = "lora_embedding_%s.lora" if embedding else "lora_%s.lora.weight"
        stored |= {f"{module}.{kind % 'A'}": a, f"{module}.{kind % 'B'}": b}
        delta = (b.astype(np.float64) @ a) * (8 / 4)
        effective[name] = values + (delta.T if embedding else delta)
        if dora and not embedding:
            magnitude = np.abs(random.standard_normal(outputs)).astype(np.float32) + np.float32(0.5)
            stored[f"{module}.lora_magnitude_vector.lora"] = magnitude
            length = np.sqrt((effective[name] ** 2).sum(axis=1))
            effective[name] = effective[name] * (magnitude / length)[:, None]
    path = torch_files.save(tmp_path / "a.pt", tensors(stored))
    convert(path, tmp_path / "out", tokenizer=save_tokenizer(tmp_path), dtype="float32", lora_alpha=8)
    check(logits(tmp_path / "out"), config, effective)
    check(own_logits(tmp_path / "out"), config, effective)


def test_shards_and_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from elm_mlx_convert import conversion, destination

    def in_shards(*arguments: Any, **options: Any) -> list[str]:
        return destination.write_weights(*arguments, **options, shard_bytes=40_000)

    monkeypatch.setattr(conversion, "write_weights", in_shards)
    config = tiny()
    made = weights(config)
    convert(save_pt(tmp_path / "a.pt", made), tmp_path / "out", tokenizer=save_tokenizer(tmp_path), verify=True)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    rounded = {name: np.array(mx.array(v).astype(mx.bfloat16).astype(mx.float32)) for name, v in made.items()}
    expected = reference_logits(config, rounded, IDS)[:, :300]
    for found in (logits(tmp_path / "out"), own_logits(tmp_path / "out")):
        assert np.abs(found - expected).max() < 0.1 * expected.std()
