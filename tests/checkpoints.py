"""Makes small OpenELMs by code: seeded weights, in the files and under the names that checkpoints have.

`reference_logits` is the network once more, in numpy and float64, as CoreNet describes it: what a converted
model is compared with.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch_files
from safetensors.numpy import save_file

from elm_mlx.model.config import ModelConfig
from elm_mlx_convert.names import to_corenet
from elm_mlx_convert.tensors import read_safetensors

Weights = dict[str, np.ndarray]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"share_input_output_layers": False},
    "no QK norm": {"normalize_qk_projections": False},
    "no GLU": {"ffn_with_glu": False},
    "uniform": {"qkv_multipliers": 1.0, "ffn_multipliers": 2.0},
    "no GQA": {"num_gqa_groups": 1},
}


def tiny(vocab_size: int = 320, **fields: Any) -> ModelConfig:
    """A layer-wise scaled OpenELM of three layers, some 40,000 parameters."""
    fields = {"num_gqa_groups": 2, "ffn_dim_divisor": 16, **fields}
    return ModelConfig.scaled(vocab_size=vocab_size, num_layers=3, model_dim=48, head_dim=8, **fields)


def weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Seeded float32 weights by canonical name; norms near one."""
    random = np.random.default_rng(seed)
    made = {}
    for name, shape in config.shapes().items():
        values = random.standard_normal(shape).astype(np.float32)
        made[name] = 1 + values * 0.1 if name.endswith("norm.weight") else values * np.float32(shape[-1] ** -0.5)
    return made


def corenet(weights: Weights) -> Weights:
    return {to_corenet(name): values for name, values in weights.items()}


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns, by MLX's rounding and not by ours."""
    import mlx.core as mx

    return np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))


def tensors(weights: Weights, dtype: str = "float32") -> dict[str, torch_files.Tensor]:
    """For torch_files."""
    if dtype == "bfloat16":
        return {name: torch_files.tensor(bfloat16(values), "bfloat16") for name, values in weights.items()}
    return {name: torch_files.tensor(values.astype(dtype)) for name, values in weights.items()}


def save_pt(path: Path, weights: Weights, dtype: str = "float32", *, legacy: bool = False) -> Path:
    """A CoreNet checkpoint, of canonically named weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return torch_files.save(path, tensors(corenet(weights), dtype), legacy=legacy)


def save_hub(directory: Path, config: ModelConfig, weights: Weights) -> Path:
    """A directory of the hub, float32."""
    directory.mkdir(parents=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    return directory


def save_yaml(path: Path, name: str, vocab_size: int, context: int = 512, more: str = "") -> Path:
    path.write_text(
        "model:\n  language_modeling:\n    name: general_gpt\n    general_gpt:\n"
        f"      model_name: {name}\n      vocab_size: {vocab_size}\n      max_context_length: {context}\n"
        f"      padding_index: null\n{more}"
    )
    return path


@lru_cache
def tokenizer_model(pieces: int = 300) -> bytes:
    """A SentencePiece model with byte fallback, trained on a few words."""
    import sentencepiece

    text = ("the quick brown fox jumps over the lazy dog, and the dog sleeps on; " * 20).split(";")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 3),
        model_writer=out,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def save_tokenizer(directory: Path, pieces: int = 300) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(tokenizer_model(pieces))
    return directory / "tokenizer.model"


def read(directory: Path) -> Weights:
    """What was written, as it lies there: bfloat16 as bit patterns."""
    return {name: tensor.read() for name, tensor in read_safetensors(directory / "model.safetensors").items()}


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file under it."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def reference_logits(config: ModelConfig, weights: Mapping[str, np.ndarray], ids: Sequence[int]) -> np.ndarray:
    """(length, vocabulary), float64."""
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    x = w["transformer.token_embeddings.weight"][list(ids)]
    for layer, heads in enumerate(config.num_query_heads):
        p = f"transformer.layers.{layer}"
        h = _norm(x, w[f"{p}.attn_norm.weight"], config) @ w[f"{p}.attn.qkv_proj.weight"].T
        groups = config.num_kv_heads[layer]
        h = h.reshape(len(ids), heads + 2 * groups, config.head_dim).transpose(1, 0, 2)
        q, k, v = h[:heads], h[heads : heads + groups], h[heads + groups :]
        if config.normalize_qk_projections:
            q, k = (_norm(a, w[f"{p}.attn.{n}_norm.weight"], config) for a, n in ((q, "q"), (k, "k")))
        q, k = _rope(q, config), _rope(k, config)
        k, v = (np.repeat(a, heads // groups, axis=0) for a in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(config.head_dim)
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        h = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + h.transpose(1, 0, 2).reshape(len(ids), -1) @ w[f"{p}.attn.out_proj.weight"].T
        h = _norm(x, w[f"{p}.ffn_norm.weight"], config) @ w[f"{p}.ffn.proj_1.weight"].T
        if config.ffn_with_glu:
            gate, up = np.split(h, 2, axis=-1)
            h = gate / (1 + np.exp(-gate)) * up
        else:
            h = h / (1 + np.exp(-h))
        x = x + h @ w[f"{p}.ffn.proj_2.weight"].T
    head = w.get("lm_head.weight", w["transformer.token_embeddings.weight"])
    return _norm(x, w["transformer.norm.weight"], config) @ head.T


def _norm(x: np.ndarray, weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weight


def _rope(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    half = config.head_dim // 2
    angles = np.arange(x.shape[1])[:, None] * config.rope_freq_constant ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)), axis=-1)
