"""The reader of GGUF against the `gguf` package's writer, on damaged and hostile headers, and in bounded memory."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import ARRAY, BOOL, F32, STRING, U32, U64, entry, gguf_file, string

from elm_mlx.errors import InputError
from elm_mlx_convert.gguf_file import TYPE_NUMBERS, TYPES, Strings, read_header

ONE = [("a.weight", (2, 4), 0, np.arange(8, dtype="<f4").tobytes())]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_types_are_those_of_gguf() -> None:
    computed_with = {"Q8_1", "Q8_K"}
    theirs = {t.name: (int(t), *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    ours = {name: (TYPE_NUMBERS[name], kind.block, kind.nbytes) for name, kind in TYPES.items()}
    assert {name: ours.get(name) for name in theirs.keys() - computed_with} == {
        name: sizes for name, sizes in theirs.items() if name not in computed_with
    }


def test_what_gguf_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, Any] = {
        "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 1e-5, "float64": 0.1, "bool": True, "string": "Grüße 🌻",
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_array("test.ints", [1, 2, 3])
    writer.add_array("test.floats", [0.5, -1.25])
    writer.add_array("test.flags", [True, False])
    writer.add_array("test.strings", ["", "Ġthe", "日本", "🌻"])
    tensors = {
        "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
        "vector": np.ones(5, np.float16),
        "cube": np.zeros((2, 3, 4), np.float32),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.add_tensor("blocks", np.zeros((2, 36), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(path)
    assert header.metadata["general.architecture"] == "llama"
    assert {kind: header.metadata[f"test.{kind}"] for kind in values} == values
    assert all(type(header.metadata[f"test.{kind}"]) is type(value) for kind, value in values.items())
    arrays = {name: header.metadata[f"test.{name}"] for name in ("ints", "floats", "flags")}
    assert {name: array.tolist() for name, array in arrays.items() if isinstance(array, np.ndarray)} == {
        "ints": [1, 2, 3], "floats": [0.5, -1.25], "flags": [True, False],
    }  # fmt: skip
    strings = header.metadata["test.strings"]
    assert isinstance(strings, Strings) and list(strings) == ["", "Ġthe", "日本", "🌻"]
    assert (strings[1], strings[-1], strings[1:3]) == ("Ġthe", "🌻", ["Ġthe", "日本"])
    for name, tensor in tensors.items():
        found = header.tensors[name]
        data = header.file.read(found.begin, found.nbytes)
        assert found.shape == tensor.shape and np.array_equal(
            np.frombuffer(data, tensor.dtype).reshape(found.shape), tensor
        )
    blocks = header.tensors["blocks"]
    assert (blocks.shape, blocks.type.name, blocks.nbytes, blocks.row_bytes) == ((2, 64), "Q4_0", 72, 36)


@pytest.mark.parametrize("version", [2, 3])
def test_versions_and_alignments(tmp_path: Path, version: int) -> None:
    data = gguf_file([("general.alignment", (U32, 64))], ONE, version=version, alignment=64)
    header = read_header(write(tmp_path / "a.gguf", data))
    assert header.tensors["a.weight"].begin % 64 == 0
    assert header.file.read(header.tensors["a.weight"].begin, 32) == ONE[0][3]


def listed(*entries: bytes, data: bytes = bytes(64)) -> bytes:
    """A file without metadata whose list of tensors says what it likes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 0) + b"".join(entries)
    return head + b"\0" * (-len(head) % 32) + data


def keyed(raw: bytes) -> bytes:
    """A file whose only key, `k`, has the bytes of a type and a value that are given."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + raw + bytes(64)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not a GGUF file, or a truncated one"),
        (b"GGUF" + bytes(8), "is not a GGUF file, or a truncated one"),
        (b"ggjt" + bytes(60), "is not a GGUF file"),
        (gguf_file(version=1), "of version 1"),
        (gguf_file(version=4), "of version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian"),
        (gguf_file(tensor_count=2**63), "says that it has"),
        (gguf_file(key_count=2**64 - 1), "says that it has"),
        (gguf_file(key_count=9_999), "has a key without a name"),
        (gguf_file(tensor_count=1), "has no name for tensor 0"),
        (gguf_file([("", (U32, 1))]), "a key without a name"),
        (gguf_file([("a", (U32, 1)), ("a", (U32, 1))]), "the key 'a' twice"),
        (gguf_file([(b"\xff", (U32, 1))]), "a key of its metadata: is not UTF-8 at byte 0"),
        (gguf_file([("a" * 65_536, (U32, 1))]), "a key of its metadata has 65,536 bytes"),
        (gguf_file([("a", (STRING, b"ab\xff"))]), "'a': is not UTF-8 at byte 2"),
        (keyed(struct.pack("<I", 13)), "type number 13"),
        (keyed(struct.pack("<IQ", 8, 2**63)), "'k' has 9,223,372,036,854,775,808 bytes"),
        (keyed(struct.pack("<IB", 7, 2)), "neither true nor false"),
        (keyed(struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 4, 0)), "arrays within the array 'k'"),
        (keyed(struct.pack("<IIQ", 9, 77, 1)), "type number 77"),
        (keyed(struct.pack("<IIQ", 9, 8, 2**61)), "is truncated or damaged"),
        (keyed(struct.pack("<IIQ", 9, 4, 2**64 - 1)), "is truncated or damaged"),
        (keyed(struct.pack("<IIQQ", 9, 8, 1, 2**64 - 1)), "is truncated or damaged"),
        (gguf_file([("general.alignment", (U32, 0))], ONE), "general.alignment 0"),
        (gguf_file([("general.alignment", (U32, 24))], ONE), "general.alignment 24"),
        (gguf_file([("general.alignment", (U64, 2**40))], ONE), "general.alignment 1099511627776"),
        (gguf_file([("general.alignment", (STRING, "32"))], ONE), "general.alignment '32'"),
        (gguf_file([], ONE * 2), "the tensor 'a.weight' twice"),
        (listed(entry("", (2,), 0, 0)), "no name for tensor 0"),
        (listed(entry("x" * 257, (2,), 0, 0)), "the name of tensor 0 has 257 bytes"),
        (listed(entry("x", (), 0, 0)), "'x' of 0 dimensions"),
        (listed(entry("x", (1,) * 5, 0, 0)), "'x' of 5 dimensions"),
        (listed(entry("x", (0,), 0, 0)), "impossible shape [0]"),
        (listed(entry("x", (2**31, 2**31), 0, 0)), "impossible shape"),
        (listed(entry("x", (2**63,), 0, 0)), "impossible shape"),
        (listed(entry("x", (2**32, 2**20), 0, 0)), "is truncated, or wrong about 'x'"),
        (listed(entry("x", (17,), 0, 0)), "is truncated, or wrong about 'x'"),
        (listed(entry("x", (2,), 0, 4)), "'x' at 4, which is no multiple of 32"),
        (listed(entry("x", (2,), 0, 2**63)), "is truncated, or wrong about 'x'"),
        (listed(entry("x", (9,), 0, 0), entry("y", (2,), 0, 32)), "'x' and 'y' in the same place"),
        (listed(entry("x", (2, 48), 2, 0)), "'x' in Q4_0, whose blocks have 32 values, with rows of 48"),
        (listed(entry("x", (256,), 31, 0)), "type number 31, Q4_0_4_4, which llama.cpp reads no more"),
        (listed(entry("x", (256,), 99, 0)), "type number 99, which is not known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = write(tmp_path / "a.gguf", data)
    with pytest.raises(InputError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and words in message and message.isprintable()


def test_every_cut(tmp_path: Path) -> None:
    whole = gguf_file(
        [
            ("a", (STRING, "text")),
            ("b", (ARRAY, (STRING, ["x", "yz"]))),
            ("c", (ARRAY, (F32, [1, 2]))),
            ("d", (BOOL, 1)),
        ],
        ONE,
    )
    assert list(read_header(write(tmp_path / "a.gguf", whole)).tensors) == ["a.weight"]
    for length in range(len(whole)):
        with pytest.raises(InputError):
            read_header(write(tmp_path / "a.gguf", whole[:length]))


def test_a_string_that_is_not_utf_8_is_found_when_it_is_asked_for(tmp_path: Path) -> None:
    data = gguf_file([("tokens", (ARRAY, (STRING, ["a", b"\xe2\x96", "b"])))])
    strings = read_header(write(tmp_path / "a.gguf", data)).metadata["tokens"]
    assert isinstance(strings, Strings) and strings[2] == "b"
    with pytest.raises(InputError, match=r"its 'tokens'\[1\]: is not UTF-8 at byte 0"):
        list(strings)


def many_strings(count: int) -> bytes:
    """A file with an array of strings of two letters each, which take ten bytes in it and sixty in Python."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("tokens") + struct.pack("<IIQ", 9, 8, count)
    return head + (struct.pack("<Q", 2) + b"ab") * count


def test_memory_is_that_of_the_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", many_strings(200_000))
    tracemalloc.start()
    strings = read_header(path).metadata["tokens"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(strings, Strings) and strings[-1] == "ab"
    assert peak < 4 * path.stat().st_size


def test_a_header_past_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", many_strings(10_000_000))
    with pytest.raises(InputError, match="has a header of more than 64 MB, by its 'tokens', 10,000,000 strings,"):
        read_header(path)
