"""PyTorch's files without PyTorch, read and written: plain values, and tensors that stay on disk until they are read.

Reads the zip layout of PyTorch 1.6 and later, and the row of pickles with raw data behind it that came before. Nothing
in a file is ever imported or called: `pickle_machine` runs the pickle, and the globals listed here are looked up by
name and mean functions of this module, or nothing at all: what training loops put beside the weights
(hyper-parameters, paths, dates, arrays) becomes a name, whatever it was made of. Each view of a storage is checked
against the bytes that the file has before any of them is used.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from elm_mlx.reading import printable
from elm_mlx_convert.names import to_corenet
from elm_mlx_convert.pickle_machine import MAX_PICKLE_BYTES, PickleMachine, Stream
from elm_mlx_convert.tensors import ITEM_SIZES, File, LazyTensor, Record, Storage, cast_blocks, row_major, view
from elm_mlx_convert.zip_files import ZipEntry, read_archive, read_entry, require_stored

# The number that opens a file of the old layout, as LONG1 spells it.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_MARK = b"\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little")
_LEGACY_PROTOCOL = 1001

_RESAVE = "save it again with torch.save(model.state_dict(), ...)"


@dataclass(frozen=True)
class Symbol:
    """Something that the file names but does not hold: a dtype, a device, an object of a class in `_INERT`."""

    name: str


def load(path: Path) -> Any:
    """Returns what torch.save put into a file, with a LazyTensor, its name empty, for each tensor and parameter.

    Dicts of every kind come as dict, torch.Size as tuple, dtypes and devices as Symbol. No data is
    read: the tensors keep the file open and read from it, and notice if it changes meanwhile.

    Raises:
        InputError: when the file is damaged, lies about itself, or asks for more than values and
            tensors. The tensors' `read_rows` raise it when the file changed since.
    """
    file = File(path)
    head = file.read(0, min(512, file.size))
    if head.startswith(b"PK\3\4"):
        return _load_zip(file)
    if head.startswith(b"\x80") and _LEGACY_MARK in head[:32]:
        return _load_legacy(file)
    raise file.fail(f"{_guess(head, file.size)}, not a file of torch.save")


def _guess(head: bytes, size: int) -> str:
    """Returns what a file that torch.save did not write seems to be."""
    if not head:
        return "is empty"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return "is a safetensors file"
    if head[257:262] == b"ustar":
        return "is a tar archive, perhaps one of PyTorch 0.1"
    known = {
        b"version https://git-lfs": "is a Git LFS pointer (fetch the real file with `git lfs pull`)",
        b"GGUF": "is a GGUF file",
        b"\x80": "is a pickle of something else",
    }
    return next((what for begin, what in known.items() if head.startswith(begin)), "is of an unknown kind")


# The two layouts


def _load_zip(file: File) -> Any:
    entries = read_archive(file)
    top = _find_top(file, entries)
    if order := entries.get(f"{top}/byteorder"):
        _require_little_endian(file, read_entry(file, order, limit=16) == b"little")

    def find(key: str, dtype: str, numel: int) -> Record:
        entry = entries.get(f"{top}/data/{key}")
        if entry is None:
            raise file.fail(f"its storage {printable(key)} is missing from the archive")
        require_stored(file, entry)
        return Record(entry.size, numel, entry.start)

    entry = entries[f"{top}/data.pkl"]
    require_stored(file, entry)
    if entry.size > MAX_PICKLE_BYTES:
        raise file.fail(f"its data.pkl has {entry.size:,} bytes; the limit is {MAX_PICKLE_BYTES:,}")
    stream = Stream(file, entry.start, entry.size)
    value = _TorchMachine(stream, find, reference_fields=5).run()
    if stream.position != entry.start + entry.size:
        raise file.fail("its data.pkl goes on after its pickle")
    return value


def _find_top(file: File, entries: dict[str, ZipEntry]) -> str:
    """Returns the folder in the archive that everything is in."""
    tops = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    script = [name for name in entries if name.endswith("/constants.pkl") or "/code/" in name]
    if script:
        raise file.fail(f"is a TorchScript archive, a program; load it with torch.jit.load and {_RESAVE}")
    if not tops:
        raise file.fail("is a zip archive without a data.pkl, not a file of torch.save")
    if len(tops) > 1:
        raise file.fail("is an archive with more than one data.pkl")
    return tops[0]


def _load_legacy(file: File) -> Any:
    stream = Stream(file, 0, MAX_PICKLE_BYTES)
    magic, protocol, system = (PickleMachine(stream).run() for _ in range(3))
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL) or type(system) is not dict:
        raise file.fail(f"starts as a file of torch.save, but in an unknown layout; {_RESAVE}")
    _require_little_endian(file, system.get("little_endian") is True)
    records: dict[str, Record] = {}

    def find(key: str, dtype: str, numel: int) -> Record:
        return records.setdefault(key, Record(numel * ITEM_SIZES[dtype], numel))

    value = _TorchMachine(stream, find, reference_fields=6).run()
    _place_records(file, records, keys=PickleMachine(stream).run(), position=stream.position)
    return value


def _require_little_endian(file: File, is_little: bool) -> None:
    if not is_little:
        raise file.fail(f"was written on a big-endian machine; load it with torch and {_RESAVE}")


def _place_records(file: File, records: dict[str, Record], keys: Any, position: int) -> None:
    """Finds each storage's bytes: in the order of `keys`, each behind a count of its values."""
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(records):
        raise file.fail("its list of storages differs from the storages that its tensors use")
    for key in keys:
        record = records[key]
        (numel,) = struct.unpack("<q", file.read(position, 8))
        record.start = position + 8
        position = record.start + record.nbytes
        if numel != record.numel:
            raise file.fail(f"its storage {printable(key)} has {numel:,} values, and its tensors say {record.numel:,}")
        if position > file.size:
            raise file.fail(f"is truncated: it has {file.size:,} bytes, and its storages end at byte {position:,}")
    if position != file.size:
        raise file.fail(f"has {file.size - position:,} bytes after its last storage")


# What the globals mean

_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_STORAGE_DTYPES = {f"{module}.{name}": dtype for name, dtype in _STORAGES.items() for module in ("torch", "torch.cuda")}
_STORAGE_DTYPES |= {
    f"{module}.{name}": "uint8"
    for module in ("torch", "torch.storage")
    for name in ("UntypedStorage", "_UntypedStorage")
}
_NUMPY_LAYOUTS = {
    "f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b",
    "u8": "<Q", "u4": "<I", "u2": "<H", "u1": "<B", "b1": "<?",
}  # fmt: skip


class _TorchMachine(PickleMachine):
    """Runs the pickle that torch.save makes of an object.

    Args:
        find: the record of the storage `(key, dtype, numel)`.
        reference_fields: how many fields a reference to a storage has; the sixth is the old layout's.
    """

    def __init__(self, stream: Stream, find: Callable[[str, str, int], Record], reference_fields: int) -> None:
        super().__init__(stream)
        self._find = find
        self._reference_fields = reference_fields

    def resolve(self, name: str) -> Any:
        return _SYMBOLS[name] if name in _SYMBOLS else super().resolve(name)

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if self.is_inert(function):
            return function
        meaning = _CALLS.get(function.name) if type(function) is Symbol else None
        return meaning(self, arguments) if meaning else super().call(function, arguments)

    def new(self, kind: Any, arguments: tuple[Any, ...]) -> Any:
        return kind if self.is_inert(kind) else super().new(kind, arguments)

    def is_inert(self, value: Any) -> bool:
        return type(value) is Symbol and value.name in _INERT

    def build(self, value: Any, state: Any) -> Any:
        if type(value) is dict or self.is_inert(value):  # a state dict's `_metadata`
            return value
        if type(value) is Symbol and value.name.startswith("numpy.dtype "):
            if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|"):
                self.fail("a numpy value in it is not little-endian")
            return value
        return super().build(value, state)

    def persistent(self, reference: Any) -> Storage:
        if type(reference) is tuple and reference[:1] == ("module",):
            self.fail(f"holds a whole module, not its weights; {_RESAVE}")
        self.expect("a storage", reference, (str, Symbol, str, str, int), most=self._reference_fields)
        tag, kind, key, _, numel, *rest = reference
        dtype = _STORAGE_DTYPES.get(kind.name)
        if tag != "storage" or dtype is None or len(reference) != self._reference_fields:
            self.fail("its pickle refers to something that is not a storage")
        if numel < 0:
            self.fail(f"its storage {printable(key)} has a negative size")
        record = self._find(key, dtype, numel)
        if record.nbytes != numel * ITEM_SIZES[dtype]:
            self.fail(
                f"its storage {printable(key)} has {record.nbytes:,} bytes, and its pickle says {numel:,} values of "
                f"{dtype}"
            )
        storage = Storage(record, dtype, 0, numel)
        return storage if not rest or rest[0] is None else self._narrow(storage, rest[0])

    def _narrow(self, storage: Storage, view: Any) -> Storage:
        """Returns what the old layout calls a view of a storage: its key, first value and size."""
        self.expect("a view of a storage", view, (str, int, int))
        _, first, numel = view
        if first < 0 or numel < 0 or first + numel > storage.numel:
            self.fail("it has a view that ends past its storage")
        return replace(storage, first=first, numel=numel)

    def expect(self, what: str, values: Any, kinds: tuple[type, ...], most: int | None = None) -> None:
        """Refuses `values` unless it is a tuple that starts with `kinds`, with `most` items at most."""
        most = len(kinds) if most is None else most
        if (
            type(values) is not tuple
            or not len(kinds) <= len(values) <= most
            or any(type(value) is not kind for value, kind in zip(values, kinds, strict=False))
        ):
            self.fail(f"its pickle describes {what} in a way that torch.save does not")


def _tensor(machine: _TorchMachine, arguments: tuple[Any, ...]) -> LazyTensor:
    """Returns the tensor of storage, offset, shape and strides; requires_grad and hooks do not matter."""
    machine.expect("a tensor", arguments, (Storage, int, tuple, tuple), most=7)
    storage, offset, shape, strides = arguments[:4]
    if len(arguments) == 7 and arguments[6]:
        machine.fail("it has a tensor that is conjugated or negated lazily; save it after .resolve_neg()")
    return view(machine.stream.file, storage, offset, shape, strides)


def _parameter(machine: _TorchMachine, arguments: tuple[Any, ...]) -> LazyTensor:
    """Returns the tensor; whether it needs a gradient, hooks and attributes do not matter."""
    machine.expect("a parameter", arguments, (LazyTensor,), most=4)
    tensor: LazyTensor = arguments[0]
    return tensor


def _ordered_dict(machine: _TorchMachine, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """Makes an empty dict, or one of a list of pairs, as Python 2 wrote it."""
    made: dict[Any, Any] = {}
    if arguments:
        machine.expect("a dict", arguments, (list,))
        machine.spend(len(arguments[0]))
        for pair in arguments[0]:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                machine.fail("its pickle makes a dict of something other than pairs")
            machine.put(made, *pair)
    return made


def _size(machine: _TorchMachine, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(arguments) != 1 or type(arguments[0]) not in (tuple, list):
        machine.fail("its pickle makes a torch.Size of something other than a list")
    machine.spend(len(arguments[0]))
    return tuple(arguments[0])


def _bytes(machine: _TorchMachine, arguments: tuple[Any, ...]) -> bytes:
    """Reads bytes as protocol 2 spells them: a text whose characters they are."""
    machine.expect("bytes", arguments, (str, str))
    text, encoding = arguments
    machine.spend(len(text))
    if encoding not in ("latin1", "latin-1") or any(character > "\xff" for character in text):
        machine.fail("its pickle spells bytes in a way that torch.save does not")
    return bytes(map(ord, text))


def _numpy_dtype(machine: _TorchMachine, arguments: tuple[Any, ...]) -> Symbol:
    machine.expect("a numpy dtype", arguments, (str,), most=3)
    return Symbol(f"numpy.dtype {printable(arguments[0])}")


def _numpy_scalar(machine: _TorchMachine, arguments: tuple[Any, ...]) -> Any:
    """Reads a number, such as a metric that NumPy computed."""
    machine.expect("a numpy value", arguments, (Symbol, bytes))
    layout = _NUMPY_LAYOUTS.get(arguments[0].name.removeprefix("numpy.dtype "))
    if layout is None or struct.calcsize(layout) != len(arguments[1]):
        machine.fail("it has a numpy value that is not a number")
    return struct.unpack(layout, arguments[1])[0]


_CALLS: dict[str, Callable[[_TorchMachine, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "torch.device": lambda machine, arguments: Symbol("torch.device"),
    "_codecs.encode": _bytes,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
_CLASSES = {
    "argparse": "Namespace",
    "builtins": "set frozenset list dict tuple int float bool str bytes bytearray complex object slice range",
    "__builtin__": "set frozenset list dict tuple int long float bool str unicode bytearray complex object slice",
    "collections": "Counter deque defaultdict",
    "copyreg": "_reconstructor",
    "copy_reg": "_reconstructor",
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "pathlib": "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath",
    "pathlib._local": "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath",
    "random": "Random",
    "types": "SimpleNamespace",
    "typing": "Any",
    "uuid": "UUID SafeUUID",
    "numpy": "ndarray bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64",
    "numpy.core.multiarray": "_reconstruct",
    "numpy._core.multiarray": "_reconstruct",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "numpy.random": "RandomState",
    "numpy.random.mtrand": "RandomState",
    "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
    "numpy.random._generator": "Generator",
    "numpy.random._mt19937": "MT19937",
    "numpy.random._pcg64": "PCG64 PCG64DXSM",
    "numpy.random._philox": "Philox",
    "numpy.random._sfc64": "SFC64",
    "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
    "torch": "complex32 complex64 complex128 float8_e4m3fn float8_e5m2 uint16 uint32 uint64 Generator strided",
    "torch.serialization": "_get_layout",
    "torch._C": "Generator",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.base": "ContainerMetadata Metadata Node UnionNode",
    "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode BytesNode PathNode EnumNode",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "lightning.pytorch.utilities.parsing": "AttributeDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "lightning.fabric.utilities.data": "AttributeDict",
    "yacs.config": "CfgNode",
    "easydict": "EasyDict",
    "addict.addict": "Dict",
    "munch": "Munch",
    "ml_collections.config_dict.config_dict": "ConfigDict",
}  # fmt: skip
# Torch's optimizers and schedulers, where someone has saved them and not their state.
_CLASSES |= {
    f"torch.optim.{name.lower()}": name for name in ("Adam", "AdamW", "Adafactor", "SGD", "RMSprop", "Adagrad")
}
_CLASSES["torch.optim.lr_scheduler"] = (
    "LambdaLR StepLR MultiStepLR ConstantLR LinearLR ExponentialLR CosineAnnealingLR CosineAnnealingWarmRestarts "
    "SequentialLR ChainedScheduler PolynomialLR CyclicLR OneCycleLR ReduceLROnPlateau"
)
_INERT = frozenset(f"{module}.{name}" for module, names in _CLASSES.items() for name in names.split())
# All the globals that a file may name.
_SYMBOLS = {
    name: Symbol(name) for name in (*_CALLS, *_STORAGE_DTYPES, *_INERT, *(f"torch.{dtype}" for dtype in ITEM_SIZES))
}


# Writing

_ALIGNMENT = 64  # bytes: where torch.save puts a storage, so that it can be mapped into memory
_HEADER = 30 + 4  # bytes of a record's header without its name, and of the extra field's own
_PADDING = 0x4246  # torch.save's id of the extra field that pads
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}


def write_state_dict(path: Path, tensors: Sequence[LazyTensor], dtype: str) -> list[str]:
    """Writes tensors of canonical names as a PyTorch file. Returns the names of those with NaN or infinite values.

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
            put(f"data/{number}", cast_blocks(tensor, dtype, broken), tensor.size * ITEM_SIZES[dtype])
        put("version", [b"3\n"])
    return broken


def _put(
    file: BinaryIO, archive: zipfile.ZipFile, name: str, blocks: Iterable[bytes | memoryview], size: int = 0
) -> None:
    """Writes a stored record whose data begin at a multiple of _ALIGNMENT, dated as long ago as zip files can be.

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
    """Returns the pickle of a dict of tensors, each a view of a storage of its own."""
    items = b"".join(
        _plain(to_corenet(tensor.name)) + _tensor_opcodes(tensor, str(number), dtype)
        for number, tensor in enumerate(tensors)
    )
    return pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _tensor_opcodes(tensor: LazyTensor, key: str, dtype: str) -> bytes:
    """Returns opcodes of `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`."""
    kind = _global("torch", _STORAGE_NAMES[dtype])
    storage = _tuple(_plain("storage"), kind, _plain(key), _plain("cpu"), _plain(tensor.size))
    arguments = _tuple(
        storage + pickle.BINPERSID, _plain(0), _plain(tensor.shape), _plain(row_major(tensor.shape)), _plain(False),
        _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    )  # fmt: skip
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _plain(value: Any) -> bytes:
    """Returns the opcodes that leave `value`, a number, string or tuple of numbers."""
    head, end = 2, len(pickle.STOP)  # protocol and its number, and what ends a pickle
    return pickle.dumps(value, protocol=2)[head:-end]
