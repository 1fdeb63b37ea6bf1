"""Linears and embeddings whose weights products read as they are stored: in 16 bits, or quantized.

On a CPU `stored.c` multiplies rows of float32 by such weights. Each lies in a buffer of its own, which begins with a
description of it. MLX is given a *handle*: an array that begins there too and claims to be the weight in float32.
Products alone may use it, which find the description at its address; whatever else read it would read past its end. So
none but the layers here has one. Their parameters are those of MLX's layers, in the types that are stored, as views of
the same buffer.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from elm_mlx.model import described, lora_layers

_TYPES = (
    "float32", "bfloat16", "float16", "affine 2", "affine 3", "affine 4", "affine 5", "affine 6", "affine 8", "mxfp4 4",
)  # fmt: skip
_NARROWEST, _WIDEST = 8, 1 << 15  # columns
_MOST_BYTES = (1 << 31) - (1 << 16)  # of a layer: an array of MLX has no dimension above
_LINE = 64  # bytes: what the description and the parts behind it are aligned to


class _Description(ctypes.Structure):
    _fields_ = (
        ("mark", ctypes.c_ubyte * described.MARK), ("kind", ctypes.c_int), ("columns", ctypes.c_int),
        ("type", ctypes.c_int), ("scale_type", ctypes.c_int), ("group", ctypes.c_int), ("rounding", ctypes.c_int),
        ("rows_at", ctypes.c_int64), ("row_bytes", ctypes.c_int64), ("scales_at", ctypes.c_int64),
        ("biases_at", ctypes.c_int64),
    )  # fmt: skip


class StoredLayer(nn.Module):
    """Mixed into MLX's layers. Where its weight has been replaced, a layer computes what MLX's does.

    Attributes:
        rounds: many rows are rounded to the weight's bfloat16 where they are multiplied.
    """

    rounds: bool
    _handle: tuple[mx.array, mx.array, int]  # the weight that it is of, the handle, and its address

    def handle(self) -> mx.array | None:
        """Returns the handle, `(outputs, inputs)`; None where the weight has been replaced."""
        weight, handle, _ = self._handle
        return handle if weight is self.weight else None

    @property
    def address(self) -> int:
        """The address of the description, where the handle begins."""
        return self._handle[2]


class _LinearByHandle(StoredLayer):
    def __call__(self, x: mx.array) -> mx.array:
        """`(..., inputs)` to `(..., outputs)`."""
        handle = self.handle()
        if handle is None:
            return super().__call__(x)
        return mx.addmm(self.bias, x, handle.T) if "bias" in self else x @ handle.T


class _EmbeddingByHandle(StoredLayer):
    def __call__(self, ids: mx.array) -> mx.array:
        """Ids `(...)` to `(..., width)`, in float32."""
        if not hasattr(self, "bits"):
            return self.weight[ids].astype(mx.float32)
        biases = self.get("biases")
        return lora_layers.dequantize(
            self.weight[ids], self.scales[ids], None if biases is None else biases[ids],
            group_size=self.group_size, bits=self.bits, mode=self.mode,
        )  # fmt: skip

    def as_linear(self, x: mx.array) -> mx.array:
        """`(..., width)` to logits `(..., tokens)`."""
        handle = self.handle()
        return super().as_linear(x) if handle is None else x @ handle.T


class StoredLinear(_LinearByHandle, nn.Linear):
    """A linear with a weight of 16 bits."""


class StoredQuantizedLinear(_LinearByHandle, nn.QuantizedLinear):
    """A linear with a quantized weight."""


class StoredEmbedding(_EmbeddingByHandle, nn.Embedding):
    """An embedding with a weight of 16 bits."""


class StoredQuantizedEmbedding(_EmbeddingByHandle, nn.QuantizedEmbedding):
    """An embedding with a quantized weight."""


_LAYERS: dict[type, type] = {
    nn.Linear: StoredLinear, nn.QuantizedLinear: StoredQuantizedLinear,
    nn.Embedding: StoredEmbedding, nn.QuantizedEmbedding: StoredQuantizedEmbedding,
}  # fmt: skip


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Gives the layers of a model that `read_as_stored` may take, by name."""
    return ((name, module) for name, module in model.named_modules() if type(module) in _LAYERS)


def is_readable(mode: str, bits: int) -> bool:
    """Returns whether products read weights that are quantized so."""
    return f"{mode} {bits}" in _TYPES


def read_as_stored(layer: nn.Module, rounds: bool = False) -> bool:
    """Turns one of MLX's layers into one whose products read its weight as it is; returns False where that cannot be.

    The weight, its scales and its biases are copied into a buffer of their own. `rounds` is for weights in bfloat16:
    many rows are rounded to it, where the processor multiplies it.
    """
    kind = _type(layer)
    if kind is None or described.library() is None:
        return False
    rows, columns = lora_layers.dense_shape(layer)
    if rows < 2 or not _NARROWEST <= columns <= _WIDEST:
        return False
    parts = {name: layer[name] for name in ("weight", "scales", "biases") if name in layer}
    if sum(part.nbytes for part in parts.values()) > _MOST_BYTES:
        return False
    buffer, start, places = _laid_out(list(parts.values()))
    description = _Description(
        described.mark(), described.STORED, columns, _TYPES.index(kind), rounding=rounds,
        row_bytes=parts["weight"].nbytes // rows, rows_at=places[0],
        scales_at=places[min(1, len(places) - 1)], biases_at=places[-1],
    )  # fmt: skip
    if len(parts) > 1:
        description.group = layer.group_size
        description.scale_type = 0 if kind == "mxfp4 4" else _TYPES.index(_name(parts["scales"].dtype))
    with memoryview(buffer) as memory:
        memory[start : start + ctypes.sizeof(description)] = bytes(description)
    views = [
        buffer[start + place : start + place + part.nbytes].view(part.dtype).reshape(part.shape)
        for place, part in zip(places, parts.values(), strict=True)
    ]
    numbers = buffer[start : start + (buffer.size - start) // 4 * 4].view(mx.float32)
    handle = mx.as_strided(numbers, (rows, columns), (columns, 1))
    mx.eval(views, handle)
    for name, view in zip(parts, views, strict=True):
        layer[name] = view
    layer._handle = (layer.weight, handle, described.address(buffer) + start)
    layer.__class__ = _LAYERS[type(layer)]
    layer.rounds = rounds
    return True


def read_replaced(model: nn.Module) -> None:
    """Has products read the weights that have replaced those of a model's layers as these were read: as stored."""
    plain = {stored: kind for kind, stored in _LAYERS.items()}
    for layer in model.modules():
        if isinstance(layer, StoredLayer) and layer.handle() is None:
            layer.__class__ = plain[type(layer)]
            read_as_stored(layer, layer.rounds)


def _type(layer: nn.Module) -> str | None:
    """Returns the type of a layer's weight by `stored.c`'s name; None where that knows none."""
    if type(layer) not in _LAYERS:
        return None
    if hasattr(layer, "bits"):
        return f"{layer.mode} {layer.bits}" if is_readable(layer.mode, layer.bits) else None
    return _name(layer.weight.dtype) if layer.weight.dtype in (mx.bfloat16, mx.float16) else None


def _laid_out(parts: list[mx.array]) -> tuple[mx.array, int, list[int]]:
    """Returns a buffer, where a description may begin in it, and where behind that copies of `parts` do."""
    sizes = [ctypes.sizeof(_Description), *(part.nbytes for part in parts)]
    *places, end = itertools.accumulate(-(-size // _LINE) * _LINE for size in sizes)
    buffer = mx.zeros(end + 2 * _LINE, mx.uint8)  # a line to align by, and one because vectors reach past the last row
    mx.eval(buffer, parts)
    start = -described.address(buffer) % _LINE
    with memoryview(buffer) as memory:
        for place, part in zip(places, parts, strict=True):
            flat = mx.contiguous(part).reshape(-1).view(mx.uint8)
            memory[start + place : start + place + part.nbytes] = memoryview(flat)
    return buffer, start, places


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
