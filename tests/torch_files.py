"""Writes PyTorch's files without PyTorch: sound ones of both layouts, and ones that are wrong on purpose.

    save(path, {"a": tensor(array)})                   the zip layout
    save(path, {"a": tensor(array)}, legacy=True)      the layout before PyTorch 1.6

Tensors that share a Storage share it in the file. `zip_of` and `legacy_of` take a pickle as it is, and
`archive` lets every field of a zip archive be set.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from elm_mlx.errors import InputError
from elm_mlx_convert.torch_files import load

STORAGE_NAMES = {
    "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "float64": "DoubleStorage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage",
}  # fmt: skip
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class Global:
    """A name that the pickle asks for."""

    name: str


@dataclass(frozen=True)
class Call:
    """A global called with arguments, and the state that is put on what it returns."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True)
class Raw:
    """Opcodes that go into the pickle as they are; they must leave one value."""

    opcodes: bytes


@dataclass(eq=False)
class Storage:
    """A flat run of values. Fields after the second make the file say something else than the truth."""

    values: np.ndarray
    dtype: str
    kind: str = ""  # the global that names its class
    location: Any = "cpu"
    key: Any = None
    numel: Any = None
    view: Any = None  # legacy only: (key, first, numel)


@dataclass(eq=False)
class Tensor:
    storage: Storage
    offset: Any
    shape: Any
    strides: Any
    rebuild: str = "_rebuild_tensor_v2"
    metadata: Any = None

    def part(self, offset: Any, shape: Any, strides: Any) -> Tensor:
        """Another view of the same storage."""
        return Tensor(self.storage, offset, shape, strides)


def tensor(array: np.ndarray, dtype: str = "") -> Tensor:
    """A contiguous tensor with its own storage; bfloat16 comes as uint16 bit patterns and by name."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    strides = np.empty(array.shape, np.uint8).strides  # in values, a value being a byte here
    return Tensor(Storage(array.reshape(-1), dtype or array.dtype.name), 0, array.shape, strides)


def parameter(data: Tensor, state: Any = None) -> Call:
    """A torch.nn.Parameter, with attributes if `state` is given."""
    if state is None:
        return Call("torch._utils._rebuild_parameter", (data, True, {}))
    return Call("torch._utils._rebuild_parameter_with_state", (data, True, {}, state))


def save(path: Path, value: Any, *, legacy: bool = False, protocol: int = 2) -> Path:
    """Writes `value` as torch.save would, and returns the path."""
    path.write_bytes(legacy_file(value, protocol) if legacy else zip_file(value, protocol))
    return path


def zip_file(value: Any, protocol: int = 2, **extras: Any) -> bytes:
    data, storages = _dump(value, protocol, legacy=False)
    return zip_of(data, {key: storage.values.tobytes() for key, storage in storages.items()}, **extras)


def zip_of(
    data_pkl: bytes, storages: Mapping[str, bytes] | None = None, top: str = "archive", byteorder: str | None = "little"
) -> bytes:
    """The zip layout around a pickle."""
    members = [Member(f"{top}/data.pkl", data_pkl), Member(f"{top}/.format_version", b"1")]
    if byteorder is not None:
        members.append(Member(f"{top}/byteorder", byteorder.encode()))
    members += [Member(f"{top}/data/{key}", data) for key, data in (storages or {}).items()]
    members += [Member(f"{top}/version", b"3\n"), Member(f"{top}/.data/serialization_id", b"0" * 40)]
    return archive(members)


def legacy_file(value: Any, protocol: int = 2, little_endian: bool = True) -> bytes:
    data, storages = _dump(value, protocol, legacy=True)
    counted = {}
    for key, storage in storages.items():
        counted[key] = (len(storage.values), storage.values.tobytes())
    return legacy_of(data, counted, protocol, little_endian)


def legacy_of(
    main_pickle: bytes,
    storages: Mapping[str, tuple[int, bytes]] | None = None,
    protocol: int = 2,
    little_endian: bool = True,
    keys: Any = None,
) -> bytes:
    """The layout before PyTorch 1.6 around a pickle: five pickles, then each storage's count and bytes."""
    storages = storages or {}
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    order = sorted(storages) if keys is None else keys
    head = b"".join(pickle.dumps(part, protocol) for part in (LEGACY_MAGIC, 1001, system))
    raw = b"".join(struct.pack("<q", count) + data for count, data in (storages[key] for key in sorted(storages)))
    return head + main_pickle + pickle.dumps(order, protocol) + raw


def put(folder: Path, data: bytes) -> Path:
    """The path of a file with these bytes."""
    path = folder / "file.pt"
    path.write_bytes(data)
    return path


def error_of(folder: Path, data: bytes) -> str:
    """What `load` says of a file with these bytes: an InputError of one line that starts with its path."""
    path = put(folder, data)
    with pytest.raises(InputError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.isprintable()
    return text.removeprefix(f"{path}: ")


class _Pickler(pickle._Pickler):  # the one in Python: its table of types can be added to
    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, file: io.BytesIO, protocol: int, legacy: bool) -> None:
        super().__init__(file, protocol)
        self.legacy = legacy
        self.keys: dict[int, str] = {}
        self.storages: dict[str, Storage] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Storage):
            return None
        key = value.key
        if key is None:
            number = len(self.keys)
            key = self.keys.setdefault(id(value), str(94_000_000 + 64 * number if self.legacy else number))
        if isinstance(key, str):
            self.storages.setdefault(key, value)
        kind = Global(value.kind or f"torch.{STORAGE_NAMES[value.dtype]}")
        numel = len(value.values) if value.numel is None else value.numel
        reference = ("storage", kind, key, value.location, numel)
        return (*reference, value.view) if self.legacy else reference

    def save_global_name(self, value: Global) -> None:
        module, _, attribute = value.name.rpartition(".")
        if self.proto >= 4:
            self.save(module)
            self.save(attribute)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())

    def save_call(self, value: Call) -> None:
        self.save_global_name(Global(value.name))
        self.save(value.arguments)
        self.write(pickle.REDUCE)
        if value.state is not None:
            self.save(value.state)
            self.write(pickle.BUILD)

    def save_tensor(self, value: Tensor) -> None:
        arguments: tuple[Any, ...] = (value.storage, value.offset, value.shape, value.strides)
        if value.rebuild != "_rebuild_tensor":
            arguments += (False, Call("collections.OrderedDict", ()))
        if value.metadata is not None:
            arguments += (value.metadata,)
        self.save_call(Call(f"torch._utils.{value.rebuild}", arguments))
        self.memoize(value)

    def save_raw(self, value: Raw) -> None:
        self.write(value.opcodes)

    dispatch |= {Global: save_global_name, Call: save_call, Tensor: save_tensor, Raw: save_raw}


def _dump(value: Any, protocol: int, legacy: bool) -> tuple[bytes, dict[str, Storage]]:
    out = io.BytesIO()
    pickler = _Pickler(out, protocol, legacy)
    pickler.dump(value)
    return out.getvalue(), pickler.storages


@dataclass
class Member:
    """One entry of a zip archive. `central` and `local` overwrite fields of its two headers, by name."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0x0808  # UTF-8 names, sizes behind the data: as torch.save has it
    central: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)


def archive(members: Iterable[Member], *, wide: bool = True, end: Mapping[str, int] | None = None) -> bytes:
    """A zip archive as torch.save lays it out: data at multiples of 64, descriptors, zip64 end records if `wide`.

    `end` overwrites fields of the end records: disk, count, size, start.
    """
    out = bytearray()
    directory = bytearray()
    count = 0
    for member in members:
        at = len(out)
        packed = member.data if not member.method else _deflate(member.data)
        fields = {
            "flags": member.flags, "method": member.method, "crc": zlib.crc32(member.data), "packed": len(packed),
            "size": len(member.data), "name": member.name.encode(), "extra": b"", "disk": 0, "at": at,
        }  # fmt: skip
        pad = -(at + 30 + len(fields["name"]) + 4) % 64
        hidden = {"crc": 0, "packed": 0, "size": 0} if member.flags & 8 else {}
        local = fields | hidden | {"extra": struct.pack("<2H", 0x4246, pad) + b"Z" * pad} | member.local
        out += struct.pack(
            "<4s5H3I2H", b"PK\3\4", 0, local["flags"], local["method"], 0, 0,
            local["crc"], local["packed"], local["size"], len(local["name"]), len(local["extra"]),
        )  # fmt: skip
        out += local["name"] + local["extra"] + packed
        if member.flags & 8:
            out += struct.pack("<4s3I", b"PK\7\x08", fields["crc"], len(packed), len(member.data))
        central = fields | member.central
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 0, 0, central["flags"], central["method"], 0, 0, central["crc"],
            central["packed"], central["size"], len(central["name"]), len(central["extra"]), 0, central["disk"], 0, 0,
            central["at"],
        )  # fmt: skip
        directory += central["name"] + central["extra"]
        count += 1
    last = {"disk": 0, "count": count, "size": len(directory), "start": len(out)} | dict(end or {})
    where = len(out) + len(directory)
    out += directory
    disk, count, size, start = last["disk"], last["count"], last["size"], last["start"]
    if wide:
        out += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, disk, disk, count, count, size, start)
        out += struct.pack("<4sIQI", b"PK\6\7", 0, where, 1)
    narrow = (min(count, 0xFFFF), min(size, 0xFFFFFFFF), min(start, 0xFFFFFFFF))
    out += struct.pack("<4s4H2IH", b"PK\5\6", disk, disk, narrow[0], *narrow, 0)
    return bytes(out)


def _deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()
