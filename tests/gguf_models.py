"""Model directories as GGUF files, by the `gguf` package's writer and quantizers: what `convert` is to read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from elm_mlx.model.config import read_config
from elm_mlx.text import sentencepiece_file
from elm_mlx_convert import gguf_names
from elm_mlx_convert.gguf_file import TYPES

# Where float16 numbers stand in a block of what the package can read and not make.
HALVES = {
    "IQ4_NL": [0], "IQ4_XS": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "MXFP4": [], "Q2_K": [80, 82], "Q3_K": [108],
    "Q6_K": [208],
}  # fmt: skip


def random_blocks(kind: str, count: int, seed: int = 0) -> Any:
    """Blocks of random bytes `(count, bytes)` with finite scales, some of them subnormal."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (count, TYPES[kind].nbytes), np.uint8)
    for at in HALVES[kind]:
        scales = (random.standard_normal(count) * 10.0 ** random.integers(-5, -1, count)).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = random.integers(100, 130, count)
    return blocks


def write(directory: Path, path: Path, kind: str | Sequence[str] = "F32", **changes: Any) -> dict[str, Any]:
    """Writes a directory's model, its matrices in the GGML type `kind`, or in several in turn.

    Args:
        changes: of metadata, `tokenizer__ggml__pre="x"` for `tokenizer.ggml.pre`; None leaves a key out.

    Returns:
        Every weight as the file has it, in float32 and by its name in the directory.
    """
    config = read_config(directory)
    metadata: dict[str, Any] = gguf_names.metadata(config) | vocabulary(directory)
    metadata |= {name.replace("__", "."): value for name, value in changes.items()}
    writer = gguf.GGUFWriter(path, str(metadata.pop("general.architecture")))
    for key, value in metadata.items():
        if value is not None:
            _add(writer, key, value)
    for name, divisors in gguf_names.rope_divisors(config).items():
        writer.add_tensor(name, divisors)
    found: dict[str, list[Any]] = {}
    kinds = cycle([kind] if isinstance(kind, str) else kind)
    for name, weight in mx.load(str(directory / "model.safetensors")).items():
        values = np.array(weight.astype(mx.float32))
        for number, part in enumerate(gguf_names.parts(name, len(values), config)):
            rows = values[part.start : part.stop]
            if part.heads:  # llama.cpp's converter for Llama: (head, half, pair) to (head, pair, half)
                rows = rows.reshape(part.heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
            rows = rows + part.more
            own = next(kinds) if rows.ndim > 1 else "F32"
            data = _encoded(own, rows, len(found) + number)
            stored = data if own == "F32" else gguf.dequantize(data, gguf.GGMLQuantizationType[own])
            writer.add_tensor(part.name, data, raw_dtype=gguf.GGMLQuantizationType[own])
            if part.heads:
                stored = stored.reshape(part.heads, -1, 2, *stored.shape[1:]).swapaxes(1, 2).reshape(stored.shape)
            found.setdefault(name, []).append(stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: np.concatenate(rows) for name, rows in found.items()}


def _encoded(kind: str, rows: Any, seed: int) -> Any:
    if kind == "F32":
        return rows
    if kind in HALVES:
        count = rows.size // TYPES[kind].block
        return random_blocks(kind, count, seed).reshape(len(rows), -1)
    return gguf.quantize(rows, gguf.GGMLQuantizationType[kind])


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, (list, np.ndarray)):
        writer.add_array(key, [each.item() if hasattr(each, "item") else each for each in value])
    else:
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
        getattr(writer, f"add_{kind}")(key, value)


def vocabulary(directory: Path) -> dict[str, Any]:
    """Returns a directory's tokenizer as a file's metadata, by llama.cpp's keys."""
    prefix = "tokenizer.ggml."
    if (directory / "tokenizer.model").exists():
        pieces = sentencepiece_file.read(directory / "tokenizer.model").pieces()
        return {
            f"{prefix}model": "llama", f"{prefix}pre": "default",
            f"{prefix}tokens": [piece.text for piece in pieces],
            f"{prefix}scores": [piece.score for piece in pieces],
            f"{prefix}token_type": [piece.type for piece in pieces],
            f"{prefix}bos_token_id": 1, f"{prefix}eos_token_id": 2, f"{prefix}unknown_token_id": 0,
        }  # fmt: skip
    if not (directory / "tokenizer.json").exists():
        return {}
    read = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    settings = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    added = {entry["content"]: entry["id"] for entry in read["added_tokens"]}
    ids = {token: text for text, token in (read["model"]["vocab"] | added).items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in read["model"]["merges"]]
    return {
        f"{prefix}model": "gpt2", f"{prefix}pre": "dbrx", f"{prefix}tokens": [ids[token] for token in sorted(ids)],
        f"{prefix}token_type": [3 if ids[token] in added else 1 for token in sorted(ids)], f"{prefix}merges": merges,
        f"{prefix}bos_token_id": added[settings["bos_token"]], f"{prefix}eos_token_id": added[settings["eos_token"]],
        f"{prefix}add_bos_token": read["post_processor"] is not None,
        "tokenizer.chat_template": settings["chat_template"],
    }  # fmt: skip
