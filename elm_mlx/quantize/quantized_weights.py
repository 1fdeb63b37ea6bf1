"""A plan carried out: the tensors of a quantized model directory, and its config.

Knows how packed weights and `config.json` lie on disk for mlx-lm and us. Tensors are made one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from elm_mlx import directories, files
from elm_mlx.errors import ElmError
from elm_mlx.model.packing import AFFINE
from elm_mlx.quantize.bit_plan import Tensors, main_dtype
from elm_mlx.quantize.formats import Format, pack
from elm_mlx.store import shards
from elm_mlx.store.describe import config_values
from elm_mlx.store.shards import Pending

_OTHER_BYTES = 16 << 20  # tokenizer, config and records


def write(
    source: Path,
    directory: Path,
    tensors: Tensors,
    formats: Mapping[str, Format],
    dtype: mx.Dtype,
    packed: bool = False,
) -> None:
    """Weights, config and all that comes along from `source`, into `directory`. `tensors` is emptied on the way.

    Args:
        dtype: of scales, biases, and what stays as it is.
        packed: whether `tensors` have the weights in their formats already.

    Raises:
        ElmError: there is no room.
        OSError: it cannot be written.
    """
    own = main_dtype(tensors, dtype)
    pending: list[Pending] = []
    for name in tensors:
        how = None if packed else formats.get(name.removesuffix(".weight"))
        pending += [_kept(tensors, name, own, dtype)] if how is None else _packed(tensors, name, how, dtype)
    needed, free = sum(tensor.nbytes for tensor in pending) + _OTHER_BYTES, files.free_bytes(directory)
    if needed > free:
        raise ElmError(f"{directory}: needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there")
    shards.write(directory, pending)
    write_json(directory / "config.json", config_values(source) | _entries(formats))
    directories.carry(source, directory)
    if (source / "conversion.json").is_file():  # where the model comes from is still true
        shutil.copyfile(directories.own_file(source / "conversion.json"), directory / "conversion.json")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _kept(tensors: Tensors, name: str, own: mx.Dtype, dtype: mx.Dtype) -> Pending:
    """What is of the model's own type is cast; what is not, such as a state that wants float32, has its reasons."""
    tensor = tensors[name]
    cast = dtype if tensor.dtype == own and mx.issubdtype(own, mx.floating) else tensor.dtype
    return Pending(name, cast, tensor.shape, lambda: tensors.pop(name).astype(cast))


def _packed(tensors: Tensors, name: str, how: Format, dtype: mx.Dtype) -> list[Pending]:
    *rows, columns = tensors[name].shape
    groups = (*rows, columns // how.group_size)
    shapes: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {"weight": (mx.uint32, (*rows, columns * how.bits // 32))}
    if how.mode == AFFINE:
        shapes |= {"scales": (dtype, groups), "biases": (dtype, groups)}
    else:
        shapes |= {"scales": (mx.uint8, groups)}
    made: dict[str, mx.array] = {}

    def make(part: str) -> mx.array:
        """The first call makes all parts; each is handed out once."""
        if not made:
            made.update(pack(tensors.pop(name), how, dtype))
        return made.pop(part)

    stem = name.removesuffix("weight")
    return [Pending(stem + part, kind, shape, partial(make, part)) for part, (kind, shape) in shapes.items()]


def _entries(formats: Mapping[str, Format]) -> dict[str, Any]:
    """The commonest format, and by name what has another; under both names that mlx-lm and the hub look for."""
    common = Counter(formats.values()).most_common(1)[0][0]
    others = {name: how.packing() for name, how in formats.items() if how != common}
    entry = common.packing() | others
    return {"quantization": entry, "quantization_config": entry}
