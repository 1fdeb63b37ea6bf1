"""The weights of a model directory as tensors of a GGUF file: of which type each can be, exactly or rounded, and proof.

A matrix is read some rows at a time, and so it is written. What is packed already becomes the GGML type that has the
same grid; what has none is rounded, and the difference measured while it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import AFFINE, Config
from elm_mlx_convert import gguf_blocks, gguf_packing
from elm_mlx_convert.gguf_file import TYPES, GgufHeader, GgufTensor
from elm_mlx_convert.gguf_names import Part, interleaved, parts
from elm_mlx_convert.gguf_packing import ROUNDED
from elm_mlx_convert.tensors import BLOCK_BYTES, FLOATS, LazyTensor, all_finite, cast, to_float32

Array = np.ndarray[Any, np.dtype[Any]]

FLOAT_TYPES = {dtype: name for name, dtype in gguf_blocks.FLOATS.items()}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass
class Rounding:
    """What writing weights of one kind as another has changed.

    Args:
        before: what they were, in words; after: the GGML type.
        largest, total: of the differences, absolute.
        magnitude: the largest absolute value.
    """

    before: str
    after: str
    values: int = 0
    largest: float = 0.0
    total: float = 0.0
    magnitude: float = 0.0

    def add(self, before: Array, after: Array) -> None:
        """Counts the differences of two arrays of float32."""
        differences = np.abs(before - after)
        self.values += differences.size
        self.largest = max(self.largest, float(differences.max(initial=0)))
        self.total += float(differences.sum(dtype=np.float64))
        self.magnitude = max(self.magnitude, float(np.abs(before).max(initial=0)))


@dataclass(frozen=True)
class FloatWeight:
    """A weight in a float type."""

    tensor: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def described(self) -> str:
        return self.tensor.dtype

    @property
    def row_bytes(self) -> int:
        return self.tensor.nbytes // max(1, self.tensor.rows)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The GGML types that hold the same values, the one of the file first."""
        return (FLOAT_TYPES[self.tensor.dtype],) if self.tensor.dtype in FLOATS else ()

    def values(self, rows: tuple[int, int], order: Callable[[Array], Array]) -> Array:
        """Returns some rows in float32."""
        return order(to_float32(self.tensor.read_rows(*rows), self.tensor.dtype))

    def encoded(self, kind: str, rows: tuple[int, int], order: Callable[[Array], Array]) -> Array:
        """Returns the bytes of some rows, of a type in `kinds`. Raises InputError for NaN and infinities."""
        values = self.tensor.read_rows(*rows)
        if not all_finite(values, self.tensor.dtype):
            raise InputError(f"{self.tensor.name} holds NaN or infinite values")
        return order(values)


@dataclass(frozen=True)
class PackedWeight:
    """A weight that MLX has packed: codes, and a scale and in the affine mode a bias for each group of a row."""

    name: str
    words: LazyTensor
    scales: LazyTensor
    biases: LazyTensor | None
    bits: int
    group: int
    mode: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.words.shape[0], self.words.shape[1] * 32 // self.bits

    @property
    def described(self) -> str:
        return f"{self.bits} bits in groups of {self.group}" if self.mode == AFFINE else self.mode

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * 4  # as they are widened

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The GGML types that hold the same values, the smallest first.

        All scales and biases are read for it: GGML's are float16, and some of its types have no biases.
        """
        if self.mode == "mxfp4":
            return ("MXFP4",)
        zero = {4: -8, 5: -16, 8: -128}.get(self.bits)
        with_biases = {1: "Q4_1", 2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1"}.get(self.bits)
        if self.mode != AFFINE or self.shape[1] % gguf_blocks.GROUP:
            return ()
        symmetric, fits = zero is not None, True
        for scales, biases in self._groups():
            with np.errstate(over="ignore"):
                if not np.array_equal(scales.astype(np.float16), scales):
                    return ()
                fits = fits and np.array_equal(biases.astype(np.float16), biases)
            symmetric = symmetric and zero is not None and np.array_equal(biases, zero * scales)
        without = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}[self.bits] if symmetric else None
        return tuple(kind for kind in (without, with_biases if fits else None) if kind is not None)

    @property
    def nearest(self) -> str:
        """The type to round to where none of `kinds` is asked for or possible."""
        if self.mode == AFFINE and self.bits <= 5:
            return "Q5_1" if self.bits == 5 else "Q4_1"
        return "Q8_0"

    def _groups(self) -> Iterator[tuple[Array, Array]]:
        assert self.biases is not None
        for scales, biases in zip(self.scales.blocks(), self.biases.blocks(), strict=True):
            yield to_float32(scales, self.scales.dtype), to_float32(biases, self.biases.dtype)

    def _codes(self, rows: tuple[int, int]) -> Array:
        return gguf_packing.unpacked(self.words.read_rows(*rows), self.bits)

    def _by_32(self, tensor: LazyTensor, rows: tuple[int, int]) -> Array:
        """Returns scales or biases of some rows, one for each 32 weights, in float32."""
        each = to_float32(tensor.read_rows(*rows), tensor.dtype)
        return np.repeat(each, self.group // gguf_blocks.GROUP, axis=1)

    def values(self, rows: tuple[int, int], order: Callable[[Array], Array]) -> Array:
        """Returns some rows in float32."""
        codes = self._codes(rows).reshape(rows[1] - rows[0], -1, self.group)
        if self.mode == AFFINE:
            assert self.biases is not None
            scales, biases = (
                to_float32(each.read_rows(*rows), each.dtype)[..., None] for each in (self.scales, self.biases)
            )
            with np.errstate(over="ignore", invalid="ignore"):
                found = scales * codes + biases
        else:
            steps = self.scales.read_rows(*rows)
            scales = _e4m3(steps) if self.mode == "nvfp4" else np.ldexp(np.float32(1), steps.astype(np.int32) - 127)
            found = scales[..., None] * (_e4m3(codes) if self.bits == 8 else _E2M1[codes])
        return order(found.reshape(len(found), -1))

    def encoded(self, kind: str, rows: tuple[int, int], order: Callable[[Array], Array]) -> Array:
        """Returns the bytes of some rows, of a type in `kinds`; or of `nearest`, with their scales rounded.

        Raises:
            InputError: float16 has no such scales at all.
        """
        codes = self._codes(rows)
        if kind == "MXFP4":
            return order(gguf_packing.mxfp4_rows(codes, self.scales.read_rows(*rows)))
        assert self.biases is not None
        with np.errstate(over="ignore"):
            scales, biases = (self._by_32(each, rows).astype(np.float16) for each in (self.scales, self.biases))
        if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
            raise InputError(
                f"{self.name} has scales that overflow float16, which GGML's are: choose --type bf16 or f32"
            )
        return order(gguf_packing.affine_rows(kind, codes, scales, biases))


Weight = FloatWeight | PackedWeight


def _e4m3(codes: Array) -> Array:
    """Returns floats of 8 bits, a sign, four of exponent and three of fraction, without infinities, as float32."""
    exponent, fraction = codes >> 3 & 15, (codes & 7).astype(np.float32)
    values = np.where(
        exponent == 0, fraction / 8 * np.float32(2**-6), np.ldexp(1 + fraction / 8, exponent.astype(np.int32) - 7)
    )
    return np.where(codes & 128, -values, values).astype(np.float32)


def weights(tensors: Mapping[str, LazyTensor], config: Config, where: str) -> dict[str, Weight]:
    """Returns the weights of a model by its own names, each checked against the shape that `config` means.

    Raises:
        InputError: names the one that is missing or of another shape.
    """
    found: dict[str, Weight] = {}
    for name, shape in config.shapes().items():
        if name not in tensors:
            raise InputError(f"{where}: {name} is missing, which config.json says there is")
        module = name.removesuffix(".weight")
        if f"{module}.scales" in tensors:
            weight: Weight = _packed(module, tensors, config, where)
        elif tensors[name].dtype in (*FLOATS, "float64"):
            weight = FloatWeight(tensors[name])
        else:
            raise InputError(f"{where}: {name} is {tensors[name].dtype}; weights must be floats")
        if weight.shape != shape:
            raise InputError(f"{where}: {name} has the shape {weight.shape}, but config.json says {shape}")
        found[name] = weight
    return found


def _packed(module: str, tensors: Mapping[str, LazyTensor], config: Config, where: str) -> PackedWeight:
    how = config.quantization or {}
    own = how.get(module)
    how = own if isinstance(own, Mapping) else how
    words, scales, biases = (tensors.get(f"{module}.{part}") for part in ("weight", "scales", "biases"))
    mode, bits, group = how.get("mode", AFFINE), how.get("bits"), how.get("group_size")
    assert words is not None and scales is not None
    matrices = all(len(each.shape) == 2 for each in (words, scales, biases) if each is not None)
    if not bits or not group or (mode == AFFINE) != (biases is not None) or not matrices:
        raise InputError(f"{where}: {module} is not packed as config.json says")
    weight = PackedWeight(f"{module}.weight", words, scales, biases, bits, group, mode)
    rows, columns = words.shape[0], words.shape[-1] * 32 // bits
    needed = (rows, columns // group)
    if words.dtype != "uint32" or any(each is not None and each.shape != needed for each in (scales, biases)):
        raise InputError(f"{where}: {module} has scales of the shape {scales.shape}, and {needed} is needed")
    return weight


@dataclass
class TensorPlan:
    """The tensors of a file, in which types, and how exactly; `roundings` is filled while they are written.

    Args:
        tensors: to be written, in the model's order.
        sources: by the tensor's name, what it is made of: the weight, and which of its rows.
        unfit: how many matrices have rows that no blocks of 32 fill, which are written in 16 bits.
    """

    tensors: list[GgufTensor] = field(default_factory=list)
    sources: dict[str, tuple[Weight, Part, str]] = field(default_factory=dict)
    roundings: dict[tuple[str, str], Rounding] = field(default_factory=dict)
    unfit: int = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def types(self) -> dict[str, int]:
        """Returns the bytes of matrices of each type, the most first."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            if len(tensor.shape) > 1:
                sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def plan(found: Mapping[str, Weight], config: Config, asked: str | None) -> TensorPlan:
    """Decides every tensor's type.

    Args:
        asked: a GGML type for all matrices; None for the one that each is stored in.
    """
    made = TensorPlan()
    for name, weight in found.items():
        for part in parts(name, weight.shape[0], config):
            kind = _type(weight, asked)
            if asked in ROUNDED and kind == "F16":
                made.unfit += 1
            _add(made, part, weight, kind)
    return made


def add_copy(made: TensorPlan, weight: Weight, name: str, asked: str | None) -> None:
    """Adds a tensor `name` that is the same as another weight: a head that is the embedding."""
    _add(made, Part(name, 0, weight.shape[0]), weight, _type(weight, asked))


def _add(made: TensorPlan, part: Part, weight: Weight, kind: str) -> None:
    shape = (part.stop - part.start, *weight.shape[1:])
    made.sources[part.name] = weight, part, kind
    made.tensors.append(GgufTensor(part.name, kind, shape, partial(_blocks, made, weight, part, kind)))


def _type(weight: Weight, asked: str | None) -> str:
    """Returns the type to write a weight in: vectors are float32 in llama.cpp, whatever is asked."""
    if len(weight.shape) == 1:
        return "F32"
    fits = weight.shape[1] % gguf_blocks.GROUP == 0
    if asked is not None:
        return asked if fits or asked not in ROUNDED else "F16"
    if weight.kinds:
        return weight.kinds[0]
    if isinstance(weight, FloatWeight):
        return "F32"  # of float64
    return weight.nearest if fits else "BF16"


def chunks(weight: Weight, part: Part) -> Iterator[tuple[tuple[int, int], Callable[[Array], Array]]]:
    """Yields runs of rows of a part, of some BLOCK_BYTES, each with the function that puts them into GGUF's order."""
    step = max(1, BLOCK_BYTES // max(1, weight.row_bytes))
    head = (part.stop - part.start) // part.heads if part.heads else 1
    step = max(1, step // head) * head
    for start in range(part.start, part.stop, step):
        stop = min(start + step, part.stop)
        if part.heads:
            yield (start, stop), partial(interleaved, heads=(stop - start) // head)
        else:
            yield (start, stop), partial(np.add, np.float32(part.more)) if part.more else _as_they_are


def _as_they_are(rows: Array) -> Array:
    return rows


def _blocks(made: TensorPlan, weight: Weight, part: Part, kind: str) -> Iterator[Array]:
    """Yields a tensor's bytes by rows. Raises InputError for values that are no numbers, or too large for the type."""
    as_stored = kind in weight.kinds
    rounded_scales = isinstance(weight, PackedWeight) and not weight.kinds and kind == weight.nearest != "Q8_0"
    for rows, order in chunks(weight, part):
        if as_stored:
            yield weight.encoded(kind, rows, order)
            continue
        values = weight.values(rows, order)
        data = weight.encoded(kind, rows, order) if rounded_scales else _rounded(part.name, kind, values)
        key = weight.described, kind
        made.roundings.setdefault(key, Rounding(*key)).add(values, decoded(kind, data, values.shape))
        yield data


def _rounded(name: str, kind: str, values: Array) -> Array:
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds NaN or infinite values")
    if kind in ROUNDED:
        data = gguf_packing.rounded_rows(kind, values)
        finite = all_finite(np.ascontiguousarray(data.reshape(-1, TYPES[kind].nbytes)[:, :2]).view("<f2"), "float16")
    else:
        dtype = gguf_blocks.FLOATS[kind]
        data = cast(values, "float32", dtype)
        finite = all_finite(data, dtype)
    if not finite:
        most = float(np.abs(values).max())
        raise InputError(
            f"{name} holds values up to {most:.6g}, too large for {kind.lower()}: choose --type bf16 or f32"
        )
    return data


def decoded(kind: str, data: Array, shape: tuple[int, ...]) -> Array:
    """Returns the values of rows of a tensor, by their bytes, as float32."""
    if kind in gguf_blocks.FLOATS:
        dtype = gguf_blocks.FLOATS[kind]
        plain = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return to_float32(plain.view({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[dtype]), dtype).reshape(
            shape
        )
    blocks = np.ascontiguousarray(data).reshape(-1, TYPES[kind].nbytes)
    return gguf_blocks.values(kind, blocks).reshape(shape)


def compare(made: TensorPlan, header: GgufHeader, progress: Callable[[int], None]) -> Rounding:
    """Reads a file that was written, and what it was made of, and compares every value.

    Returns:
        All differences, which are zero where nothing was rounded.

    Raises:
        ElmError: names the tensor that is missing, or further off than what was found when it was written.
    """
    total = Rounding("the model", "the file")
    for name, (weight, part, kind) in made.sources.items():
        entry = header.tensors.get(name)
        shape = (part.stop - part.start, *weight.shape[1:])
        if entry is None or (entry.type.name, entry.shape) != (kind, shape):
            raise ElmError(f"verification failed: {name} was not written as {shape} in {kind}")
        known = made.roundings.get((weight.described, kind))
        allowed = 0.0 if kind in weight.kinds or known is None else known.largest
        row_bytes = entry.nbytes // shape[0]
        for rows, order in chunks(weight, part):
            before = weight.values(rows, order)
            begin = entry.begin + (rows[0] - part.start) * row_bytes
            data = header.file.read(begin, (rows[1] - rows[0]) * row_bytes)
            after = decoded(kind, np.frombuffer(data, np.uint8), before.shape)
            differences = np.abs(before - after)
            if not (differences <= allowed).all():  # NaN is no number below anything
                raise ElmError(f"verification failed: {name} differs from its source; nothing was kept")
            total.add(before, after)
            progress(len(data))
    if len(header.tensors) != len(made.tensors):
        raise ElmError(f"verification failed: {len(header.tensors)} tensors were written for {len(made.tensors)}")
    return total
