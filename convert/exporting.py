"""A model directory back into a PyTorch file: what `torch.load` and CoreNet read, written without PyTorch.

Knows the zip layout of `torch.save`, the few opcodes of a state dict's pickle, and CoreNet's YAML. Reading the
model is `plan`'s.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from elm_mlx.directories import EXPORT, check_destination
from elm_mlx.errors import ElmError
from elm_mlx.files import expanded, new_directory, write_text
from elm_mlx.model.config import ModelConfig
from elm_mlx.text import chat_template, end_tokens
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx_convert.destination import check_room
from elm_mlx_convert.infer import preset_name
from elm_mlx_convert.names import listed, to_corenet
from elm_mlx_convert.plan import Plan, make_plan
from elm_mlx_convert.tensors import ITEM_SIZES, LazyTensor
from elm_mlx_convert.writer import cast_blocks

CHECKPOINT, SETTINGS, TOKENIZER = "checkpoint.pt", "config.yaml", "tokenizer.model"

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
_ALIGNMENT = 64  # bytes: where torch.save puts a storage, so that it can be mapped into memory
_HEADER = 30 + 4  # bytes of a record's header without its name, and of the extra field's own
_PADDING = 0x4246  # torch.save's id of the extra field that pads


def export(model: str | Path, destination: str | Path, *, dtype: str | None = None, overwrite: bool = False) -> Plan:
    """Writes a state dict in CoreNet's names, with CoreNet's YAML and the tokenizer, as a directory.

    Chat template and generation settings lie beside them, where `convert` finds them again; CoreNet knows neither.

    Args:
        model: a model directory, or anything else that `convert` reads.
        destination: the directory to make. It appears complete or not at all.
        dtype: float32, float16 or bfloat16; by default the model's own.
        overwrite: replace such a directory that is there.

    Raises:
        InputError: the model cannot be read, or `destination` is taken; a value overflows `dtype`.
        ElmError: it cannot be written. `destination` is as it was, here and there.
    """
    path = expanded(destination)
    try:
        check_destination(path, EXPORT, overwrite)
        plan = make_plan(model, dtype=dtype)
        if dtype is None and plan.source_dtype in _STORAGES:
            plan = replace(plan, dtype=plan.source_dtype)
        check_destination(path, EXPORT, overwrite, plan.source.files)
        check_room(path, plan.nbytes)
        with new_directory(path, replace=overwrite) as directory:
            broken = write_state_dict(directory / CHECKPOINT, plan.tensors, plan.dtype)
            (directory / SETTINGS).write_text(corenet_yaml(plan.config), encoding="utf-8")
            if plan.tokenizer is not None:
                (directory / TOKENIZER).write_bytes(plan.tokenizer.read_bytes())
            if plan.chat_template is not None:
                write_text(directory / chat_template.FILE_NAME, plan.chat_template)
            if (generation := _generation(plan)) is not None:
                write_text(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    except OSError as error:
        raise ElmError(f"{path}: was not made: {error.filename or 'input or output'}: {error.strerror}") from None
    said = f"values that are no numbers, or infinite, in {listed(broken)}" if broken else None
    return replace(plan, warnings=(*plan.warnings, *([said] if said else [])))


def _generation(plan: Plan) -> dict[str, Any] | None:
    """The source's `generation_config.json`, with the end tokens that its other files name.

    An export has neither `config.json` nor `tokenizer_config.json`; what the tokenizer itself says needs no word.
    """
    if plan.tokenizer is None:
        return plan.generation
    ids = end_tokens.read(plan.tokenizer.parent, plan.config).end_ids
    if ids == Tokenizer.load(plan.tokenizer).eos_ids:
        return plan.generation
    return {**(plan.generation or {}), "eos_token_id": list(ids)}


def write_state_dict(path: Path, tensors: Sequence[LazyTensor], dtype: str) -> list[str]:
    """Tensors by canonical names as a PyTorch file; returns the names of those that hold NaN or infinite values.

    Equal tensors give equal bytes. Memory is bounded by a block of rows.

    Raises:
        InputError: a value overflows `dtype`.
        OSError: the file cannot be written.
    """
    broken: list[str] = []
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        put = partial(_put, file, archive)
        put("data.pkl", [_pickled(tensors, dtype)])
        put("byteorder", [b"little"])
        for number, tensor in enumerate(tensors):
            put(f"data/{number}", _blocks(tensor, dtype, broken), tensor.size * ITEM_SIZES[dtype])
        put("version", [b"3\n"])
    return broken


def corenet_yaml(config: ModelConfig) -> str:
    """The options by which CoreNet, or `convert`, knows the model; of one that is no preset, shapes tell the rest."""
    import yaml

    words = {
        "model_name": preset_name(config) or "custom",
        "vocab_size": config.vocab_size,
        "max_context_length": config.max_context_length,
        "padding_index": None,
    }
    model = {
        "language_modeling": {"name": "general_gpt", "general_gpt": words},
        "normalization": {"name": "rms_norm"},
        "activation": {"name": "swish"},
    }
    return yaml.safe_dump({"model": model}, sort_keys=False)


def _blocks(tensor: LazyTensor, dtype: str, broken: list[str]) -> Iterator[memoryview]:
    for block in cast_blocks([tensor], dtype, broken):
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data


def _put(
    file: BinaryIO, archive: zipfile.ZipFile, name: str, blocks: Iterable[bytes | memoryview], size: int = 0
) -> None:
    """A stored record whose data begin at a multiple of _ALIGNMENT, dated as long ago as zip files can be.

    Args:
        size: bytes, where a record may be of 2 GB and more.
    """
    info = zipfile.ZipInfo(f"checkpoint/{name}")
    info.file_size = size
    padding = -(file.tell() + _HEADER + len(info.filename)) % _ALIGNMENT
    info.extra = _PADDING.to_bytes(2, "little") + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w") as record:
        for block in blocks:
            record.write(block)


def _pickled(tensors: Sequence[LazyTensor], dtype: str) -> bytes:
    """The pickle of a dict of tensors, as a reader of torch's sees it: each a view of a storage of its own."""
    items = b"".join(
        _plain(to_corenet(tensor.name)) + _tensor(tensor, str(number), dtype) for number, tensor in enumerate(tensors)
    )
    return pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _tensor(tensor: LazyTensor, key: str, dtype: str) -> bytes:
    """`torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`."""
    strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
    storage = _tuple(
        _plain("storage"), _global("torch", _STORAGES[dtype]), _plain(key), _plain("cpu"), _plain(tensor.size)
    )
    arguments = _tuple(
        storage + pickle.BINPERSID, _plain(0), _plain(tensor.shape), _plain(strides), _plain(False),
        _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    )  # fmt: skip
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _plain(value: Any) -> bytes:
    """The opcodes that leave `value`, a number, string or tuple of numbers."""
    head, end = 2, len(pickle.STOP)  # protocol and its number, and what ends a pickle
    return pickle.dumps(value, protocol=2)[head:-end]
