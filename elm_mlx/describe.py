"""What a model directory holds, without loading it.

Knows `config.json` and the headers of the weights; imports no MLX.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elm_mlx import headers
from elm_mlx.config import ModelConfig
from elm_mlx.errors import InputError


@dataclass(frozen=True)
class Layer:
    """One layer's widths and parameters."""

    query_heads: int
    kv_heads: int
    ffn_dim: int
    parameters: int


@dataclass(frozen=True)
class Description:
    """A model in figures. Sizes are in bytes; `memory` is per type that it can be computed in."""

    path: str
    parameters: int
    embedding_parameters: int
    dtype: str
    file_bytes: int
    memory: dict[str, int]
    kv_bytes_per_token: dict[str, int]
    vocab_size: int
    model_dim: int
    head_dim: int
    context: int
    glu: bool
    qk_norm: bool
    tied_head: bool
    tokenizer: bool
    layers: tuple[Layer, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(path: Path) -> Description:
    """Read `path`'s config and headers. Raises InputError where they cannot be read."""
    config = ModelConfig.load(path / "config.json")
    sizes = {name: math.prod(shape) for name, shape in config.shapes().items()}
    parameters = sum(sizes.values())
    layers = tuple(
        Layer(query, kv, ffn, sum(n for name, n in sizes.items() if name.startswith(f"transformer.layers.{i}.")))
        for i, (query, kv, ffn) in enumerate(
            zip(config.num_query_heads, config.num_kv_heads, config.ffn_dims, strict=True)
        )
    )
    dtype, file_bytes = _stored(path, config)
    return Description(
        path=str(path),
        parameters=parameters,
        embedding_parameters=sizes["transformer.token_embeddings.weight"],
        dtype=dtype,
        file_bytes=file_bytes,
        memory={"float32": 4 * parameters, "16 bits": 2 * parameters},
        kv_bytes_per_token={"float32": config.kv_bytes_per_token(4), "16 bits": config.kv_bytes_per_token(2)},
        vocab_size=config.vocab_size,
        model_dim=config.model_dim,
        head_dim=config.head_dim,
        context=config.max_context_length,
        glu=config.ffn_with_glu,
        qk_norm=config.normalize_qk_projections,
        tied_head=config.share_input_output_layers,
        tokenizer=(path / "tokenizer.model").exists(),
        layers=layers,
    )


def check_directory(path: Path, with_tokenizer: bool = False) -> Path:
    """`path`, if it looks like a model directory; else an InputError that says what to do."""
    path = path.expanduser()
    if not path.exists():
        raise InputError(
            f"{path}: no such directory; `elm-mlx convert SRC DST` makes one of a checkpoint or repository"
        )
    if not path.is_dir():
        raise InputError(
            f"{path}: a file, not a model directory; `elm-mlx convert {path} DST` makes one of a checkpoint"
        )
    if not (path / "config.json").exists():
        raise InputError(f"{path}: holds no config.json, so it is no model directory")
    if with_tokenizer and not (path / "tokenizer.model").exists():
        raise InputError(
            f"{path}: holds no tokenizer.model, so it reads and writes no text: copy the one of the model that it was "
            "made from into it, or convert that again with --tokenizer"
        )
    return path


def weight_files(path: Path) -> list[Path]:
    """The files of `path`'s weights: those that the index names, where there is one; else all that look like it.

    Raises:
        InputError: there is none, or one is missing.
    """
    files = sorted(path.glob("model*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            named = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{index}: holds no weight_map") from None
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise InputError(f"{path}: {missing[0]} is missing, which {index.name} names")
        files = [file for file in files if file.name in named]
    if not files:
        raise InputError(f"{path}: holds no model.safetensors")
    return files


def _stored(path: Path, config: ModelConfig) -> tuple[str, int]:
    """The weights' type, by their headers, and their size on disk."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    files = weight_files(path)
    entries = {entry.name: entry for file in files for entry in headers.read(file)}
    for name, shape in config.shapes().items() if config.quantization is None else ():
        if name not in entries:
            raise InputError(f"{path}: tensor {name} is missing")
        if entries[name].shape != shape:
            raise InputError(f"{path}: tensor {name} is {entries[name].shape}, and config.json implies {shape}")
    types = {entry.dtype for entry in entries.values()}
    floats = " and ".join(sorted(names.get(kind, kind) for kind in types - {"U32"}))
    if config.quantization is not None:
        bits, group = config.quantization.get("bits"), config.quantization.get("group_size")
        floats = f"{bits}-bit, group {group}, scales {floats}"
    return floats, sum(file.stat().st_size for file in files)
