"""Models to measure: a directory as it is, or a preset with seeded weights, which are written once and then removed.

Speed does not depend on the values of weights, so nothing has to be downloaded.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx

from elm_mlx import blas, device, reading, safetensors_file
from elm_mlx.bench.sides import Unavailable
from elm_mlx.bench.suites import Case
from elm_mlx.errors import InputError
from elm_mlx.inference.rows import PREFILL_STEP
from elm_mlx.model.config import PRESETS, ModelConfig, read_config
from elm_mlx.store.loading import pending, pending_packed

GROUP_SIZE = 64  # of quantized weights, as mlx-lm's default
_BLOCK = 1 << 20  # values that are drawn
_ROOM = 1.15  # of a model's bytes, while it is loaded
OURS = ("ours", "naive", "prompt-lookup", "kvp")  # sides that are this package
_KEPT = 0.9  # of the free memory, or disk, may be taken
_PROCESS = 300_000_000  # Python, MLX and buffers


def check(model: str) -> None:
    """Raises InputError where `model` is neither a preset nor a model directory."""
    if model in PRESETS:
        return
    if not reading.expanded(model).is_dir():
        raise InputError(f"{model}: neither a model directory nor one of {', '.join(PRESETS)}")
    read_config(model)


def write_seeded(config: ModelConfig, directory: Path, precision: str = "bfloat16") -> Path:
    """Writes a model directory with random weights, the same ones each time; norms' weights are 1.

    Args:
        precision: a float type, or `Nbit` for affine quantization in groups of 64 with bfloat16 scales.
    """
    how = {"group_size": GROUP_SIZE, "bits": int(precision.removesuffix("bit"))} if precision.endswith("bit") else None
    dtype = mx.bfloat16 if how else device.DTYPES[precision]
    tensors = []
    for number, (name, shape) in enumerate(config.shapes().items()):
        draw = partial(_drawn, shape, dtype, number)
        if how is None or len(shape) == 1:
            tensors.append(pending(name, dtype, shape, draw))
        else:
            tensors += pending_packed(name, shape, how | {"mode": "affine"}, dtype, draw)
    directory.mkdir(parents=True, exist_ok=True)
    values = config.to_dict() | ({"quantization": how} if how else {})
    (directory / "config.json").write_text(json.dumps(values))
    safetensors_file.write_shards(directory, tensors)
    return directory


def _drawn(shape: tuple[int, ...], dtype: mx.Dtype, number: int) -> mx.array:
    if len(shape) == 1:
        return mx.ones(shape, dtype)
    values = mx.tile(mx.roll(_some_normals(), 9973 * number), -(-math.prod(shape) // _BLOCK))
    return (values[: math.prod(shape)].reshape(shape) * shape[-1] ** -0.5).astype(dtype)


@functools.cache
def _some_normals() -> mx.array:
    """Repeated, for drawing three billion would take minutes."""
    return mx.random.normal((_BLOCK,), key=mx.random.key(0))


def stored_bytes(config: ModelConfig, precision: str) -> int:
    """The bytes of a preset's weights on disk."""
    if precision.endswith("bit"):
        return round(config.parameters * (int(precision.removesuffix("bit")) + 32 / GROUP_SIZE) / 8)
    return config.parameters * int(device.DTYPES[precision].size)


def prepare(model: str, precision: str, scratch: Path) -> Path:
    """Returns the directory of a model; a preset's is made in `scratch`.

    Raises:
        InputError: a directory is to be measured in another precision than its own.
        Unavailable: there is no room for it on the disk.
    """
    if model not in PRESETS:
        if precision != "stored":
            raise InputError(f"{model}: is measured as it is stored; --precision is for presets")
        return reading.expanded(model)
    config = ModelConfig.preset(model)
    needed, free = stored_bytes(config, precision), shutil.disk_usage(scratch).free
    if needed > _KEPT * free:
        raise Unavailable(f"seeded weights take {needed / 1e9:.1f} GB of disk, but {free / 1e9:.1f} GB are free")
    return write_seeded(config, scratch / f"{model}-{precision}", precision)


def config_of(path: Path) -> ModelConfig | None:
    """The config of an OpenELM; None for another family."""
    try:
        return ModelConfig.load(path / "config.json")
    except InputError:
        return None


def memory_needed(
    config: ModelConfig | None, stored: int, dtype: str | None, cases: Sequence[Case], side: str = "ours"
) -> int:
    """Estimates the bytes that one side takes at its worst moment, with a model of `stored` bytes.

    Weights are counted as they are stored where the side reads them so, else in the type that is computed in, on a CPU
    by default float32; the cache twice, as it grows by copying.
    """
    if config is None:
        return round(_ROOM * stored) + _PROCESS
    wide = dtype or (None if device.on_gpu() else "float32")
    size = 2 if wide is None else int(device.DTYPES[wide].size)
    as_stored = wide is None or side == "llama.cpp" or (side in OURS and blas.reads_stored() and dtype != "float32")
    weights = stored if as_stored else config.parameters * size
    positions = max(case.prompt + case.new for case in cases)
    batch, read = max(case.batch for case in cases), min(PREFILL_STEP, max(case.prompt for case in cases))
    cache = batch * config.kv_bytes_per_token(size) * positions
    values = read * (3 * max(config.ffn_dims) + 8 * config.model_dim) * size + 4 * batch * config.vocab_size
    return round(_ROOM * weights) + 2 * cache + values + _PROCESS


def check_memory(needed: int) -> None:
    """Raises Unavailable where so much is not free."""
    free = device.available_memory()
    if free is not None and needed > _KEPT * free:
        raise Unavailable(f"would take about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free")
