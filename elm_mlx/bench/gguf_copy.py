"""A model directory as GGUF, for llama.cpp beside it: the same weights to the bit, and no tokenizer.

    PYTHON gguf_copy.py MODEL FILE

Takes OpenELMs and Llamas in float types, affine 4 bits in groups of 32 or a multiple, and 8 bits that were Q8_0 before.
PYTHON has the package gguf, in an environment of its own: this project doesn't need it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32}
BLOCK = 32  # weights that have a scale in common in GGML
Stored = tuple[str, Any]  # a type's name in safetensors, and an array of `DTYPES`; GGML's name, and an array to write


class Refused(Exception):
    """A model that llama.cpp cannot have with the same weights; the text is the reason."""


def read(path: Path) -> dict[str, Stored]:
    """Returns every tensor of a directory's safetensors files."""
    tensors = {}
    for file in sorted(path.glob("model*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        for name, entry in json.loads(data[8:start].tobytes()).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                values = data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
                tensors[name] = (entry["dtype"], values)
    return tensors


def widened(dtype: str, values: Any) -> Any:
    """Returns floats as float32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values.astype(np.float32)


def halved(dtype: str, values: Any) -> Any:
    """Returns scales or biases as float16, as GGML's blocks have them. Raises Refused where that would round."""
    wide = widened(dtype, values)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    if not np.array_equal(narrow, wide):
        raise Refused("its scales are not float16 numbers, which llama.cpp's are")
    return narrow


def blocks(packed: Any, scales: Any, biases: Any, bits: int, group: int) -> Stored:
    """Returns an affine quantized matrix in GGML's blocks, `(rows, bytes)`.

    Args:
        packed: MLX's `(rows, columns * bits / 32)`, of 32 bits.
        scales, biases: float16, `(rows, columns / group)`.

    Raises:
        Refused: GGML has no type that holds the same weights.
    """
    scales, biases = (np.repeat(each, group // BLOCK, axis=1)[..., None] for each in (scales, biases))
    codes = np.ascontiguousarray(packed).view(np.uint8).reshape(len(packed), -1, BLOCK * bits // 8)
    if bits == 4:  # a byte holds two neighbours in MLX, and two that are 16 apart in GGML
        each = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(packed), -1, BLOCK)
        kind, parts = "Q4_1", [scales.view(np.uint8), biases.view(np.uint8), each[..., :16] | each[..., 16:] << 4]
    elif bits == 8 and np.array_equal(biases.astype(np.float32), -128 * scales.astype(np.float32)):
        kind, parts = "Q8_0", [scales.view(np.uint8), codes ^ 128]  # 0 … 255 above the bias, to -128 … 127
    else:
        raise Refused(f"llama.cpp has no type for the same {bits}-bit weights")
    return kind, np.concatenate(parts, axis=-1).reshape(len(packed), -1)


def weights(path: Path, config: dict[str, Any]) -> Iterator[tuple[str, Stored]]:
    """Yields each weight: a matrix as the bytes of its rows, a vector in float32. Raises Refused."""
    tensors = read(path)
    for name, (dtype, values) in tensors.items():
        layer, _, last = name.rpartition(".")
        if last in ("scales", "biases"):
            continue
        if dtype == "U32":
            own = config["quantization"].get(layer) or config["quantization"]
            if own.get("mode", "affine") != "affine" or own["group_size"] % BLOCK:
                raise Refused("llama.cpp has no type for the way in which it is quantized")
            scales, biases = (halved(*tensors[f"{layer}.{each}"]) for each in ("scales", "biases"))
            yield name, blocks(values, scales, biases, own["bits"], own["group_size"])
        elif values.ndim == 1:
            yield name, ("F32", widened(dtype, values))
        else:
            yield name, (dtype, np.ascontiguousarray(values).view(np.uint8))


def interleaved(rows: Any, heads: int) -> Any:
    """Returns rows of queries or keys, whose RoPE turns the halves of a head, for one that turns neighbours."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write_openelm(writer: Any, path: Path, config: dict[str, Any], names: Any) -> None:
    hidden = {}
    for name, (kind, rows) in weights(path, config):
        if name.endswith(".ffn.proj_1.weight"):  # gate and up projection, one below the other
            layer = int(name.split(".")[2])
            hidden[layer] = len(rows) // 2
            for part, half in zip(("gate", "up"), np.split(rows, 2), strict=True):
                add(writer, f"blk.{layer}.ffn_{part}.weight", kind, half)
        else:
            add(writer, names.get_name(name, try_suffixes=(".weight",)) or name, kind, rows)
    writer.add_context_length(config["max_context_length"])
    writer.add_embedding_length(config["model_dim"])
    writer.add_feed_forward_length([hidden[layer] for layer in sorted(hidden)])
    writer.add_head_count(config["num_query_heads"])
    writer.add_head_count_kv(config["num_kv_heads"])
    writer.add_rope_freq_base(config["rope_freq_constant"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    add_head_size(writer, config["head_dim"])


def write_llama(writer: Any, path: Path, config: dict[str, Any], names: Any) -> None:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, (kind, rows) in weights(path, config):
        turned = heads.get(name.split(".")[-2]) if rows.ndim > 1 else None
        rows = interleaved(rows, turned) if turned else rows
        add(writer, names.get_name(name, try_suffixes=(".weight",)) or name, kind, rows)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_head_size(writer, config.get("head_dim") or config["hidden_size"] // heads["q_proj"])


def add(writer: Any, name: str, kind: str, rows: Any) -> None:
    from gguf import GGMLQuantizationType

    writer.add_tensor(name, rows, raw_dtype=None if rows.dtype == np.float32 else GGMLQuantizationType[kind])


def add_head_size(writer: Any, size: int) -> None:
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)


def write(path: Path, to: Path) -> None:
    """Writes a model directory as GGUF. Raises Refused."""
    import gguf

    config = json.loads((path / "config.json").read_text("utf-8"))
    kind = config["model_type"]
    if kind not in ("openelm", "llama") or config.get("rope_scaling"):
        raise Refused("GGUF is written of OpenELMs, and of Llamas without scaled RoPE")
    layers = config["num_transformer_layers" if kind == "openelm" else "num_hidden_layers"]
    arch = gguf.MODEL_ARCH.OPENELM if kind == "openelm" else gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(to, kind)
    writer.add_block_count(layers)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    (write_openelm if kind == "openelm" else write_llama)(writer, path, config, gguf.get_tensor_name_map(arch, layers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    try:
        write(Path(sys.argv[1]), Path(sys.argv[2]))
    except Refused as error:
        sys.exit(str(error))
