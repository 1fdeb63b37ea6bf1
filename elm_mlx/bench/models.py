"""Models to measure: a directory as it is, or a preset with seeded weights, which are written once and then removed.

Speed does not depend on what weights say, so nothing has to be downloaded. Knows what a model will take before it is
there. Knows nothing of what is measured.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx

from elm_mlx import device, reading, safetensors_file
from elm_mlx.bench.sides import Unavailable
from elm_mlx.bench.suites import Case
from elm_mlx.errors import InputError
from elm_mlx.inference.generation import PREFILL_STEP
from elm_mlx.model.config import PRESETS, ModelConfig
from elm_mlx.safetensors_file import Pending
from elm_mlx.store.describe import check_directory
from elm_mlx.store.loading import pending

GROUP_SIZE = 64  # of quantized weights, as mlx-lm's default
_BLOCK = 1 << 20  # values that are drawn
_ROOM = 1.15  # of a model's bytes, while it is loaded
_KEPT = 0.9  # of the free memory may be taken
_PROCESS = 300_000_000  # Python, MLX and buffers


def check(model: str) -> None:
    """Raises InputError where `model` is neither a preset nor a model directory."""
    if model not in PRESETS and not reading.expanded(model).is_dir():
        raise InputError(f"{model}: neither a model directory nor one of {', '.join(PRESETS)}")
    if model not in PRESETS:
        check_directory(Path(model))


def write_seeded(config: ModelConfig, directory: Path, precision: str = "bfloat16") -> Path:
    """A model directory with random weights, the same ones each time; norms' weights are 1.

    Args:
        precision: a float type, or `Nbit` for affine quantization in groups of 64 with bfloat16 scales.
    """
    quantized = precision.endswith("bit")
    how = {"group_size": GROUP_SIZE, "bits": int(precision.removesuffix("bit"))} if quantized else None
    dtype = mx.bfloat16 if quantized else device.DTYPES[precision]
    tensors = []
    for number, (name, shape) in enumerate(config.shapes().items()):
        draw = partial(_drawn, shape, dtype, number)
        if how is None or len(shape) == 1:
            tensors.append(pending(name, dtype, shape, draw))
        else:
            tensors += _packed(name, shape, draw, how)
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
    """Repeated, or drawing three billion would take minutes."""
    return mx.random.normal((_BLOCK,), key=mx.random.key(0))


def _packed(name: str, shape: tuple[int, ...], draw: Callable[[], mx.array], how: dict[str, int]) -> list[Pending]:
    """A weight's three tensors, which are made together and written one after the other."""
    rows, columns = shape
    groups = (rows, columns // how["group_size"])
    waiting: list[mx.array] = []

    def part() -> mx.array:
        if not waiting:
            waiting.extend(mx.quantize(draw(), **how))
        return waiting.pop(0)

    stem = name.removesuffix("weight")
    return [
        pending(name, mx.uint32, (rows, columns * how["bits"] // 32), part),
        pending(f"{stem}scales", mx.bfloat16, groups, part),
        pending(f"{stem}biases", mx.bfloat16, groups, part),
    ]


def stored_bytes(config: ModelConfig, precision: str) -> int:
    """Of a model's weights on disk."""
    if precision.endswith("bit"):
        return round(config.parameters * (int(precision.removesuffix("bit")) + 32 / GROUP_SIZE) / 8)
    return config.parameters * int(device.DTYPES[precision].size)


def prepare(model: str, precision: str, scratch: Path) -> Path:
    """The directory of a model; a preset's is made in `scratch`.

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
    if needed > 0.9 * free:
        raise Unavailable(f"seeded weights take {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free")
    return write_seeded(config, scratch / f"{model}-{precision}", precision)


def config_of(path: Path) -> ModelConfig | None:
    """Of an OpenELM; None for another family, which says for itself what it is."""
    try:
        return ModelConfig.load(path / "config.json")
    except InputError:
        return None


def memory_needed(path: Path, config: ModelConfig | None, dtype: str | None, cases: Sequence[Case]) -> int:
    """Bytes that one side takes with the model in `path`: about so many, at its worst moment."""
    stored = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
    return round(_ROOM * stored) + _PROCESS if config is None else _needed(config, stored, dtype, cases)


def preset_memory(model: str, precision: str, dtype: str | None, cases: Sequence[Case]) -> int:
    """The same of a preset's model, before it is there."""
    config = ModelConfig.preset(model)
    return _needed(config, stored_bytes(config, precision), dtype, cases)


def _needed(config: ModelConfig, stored: int, dtype: str | None, cases: Sequence[Case]) -> int:
    """Weights as they are computed with, on a CPU in float32 unless told; the cache, twice where it grows; a prompt's
    values."""
    wide = dtype or (None if device.on_gpu() else "float32")
    size = 2 if wide is None else int(device.DTYPES[wide].size)
    weights = stored if wide is None else config.parameters * size
    positions = max(case.prompt + case.new for case in cases)
    batch, read = max(case.batch for case in cases), min(PREFILL_STEP, max(case.prompt for case in cases))
    cache = batch * config.kv_bytes_per_token(size) * positions
    values = read * (3 * max(config.ffn_dims) + 8 * config.model_dim) * size + 4 * batch * config.vocab_size
    return round(_ROOM * weights) + 2 * cache + values + _PROCESS


def check_memory(needed: int) -> None:
    """Raises Unavailable where so much is not free."""
    free = device.available_memory()
    if free is not None and needed > _KEPT * free:
        raise Unavailable(f"would take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
