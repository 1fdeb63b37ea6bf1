"""Headers of safetensors files against those that the library writes, and lies of every kind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors_headers import entry, raw

from elm_mlx.errors import InputError
from elm_mlx.store import headers

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]))
def test_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], dtype: str
) -> None:
    path = tmp_path_factory.mktemp("headers") / "x.safetensors"
    arrays = {f"t{i}": np.full(shape, i % 2, dtype) for i, shape in enumerate(shapes)}
    save_file(arrays, path, metadata={"format": "pt"})
    entries = headers.read(path)
    data = path.read_bytes()
    assert {each.name: each.shape for each in entries} == {name: array.shape for name, array in arrays.items()}
    for each in entries:
        assert data[each.begin : each.end] == arrays[each.name].tobytes()
        assert math.prod(each.shape) * headers.SIZES[each.dtype] == each.end - each.begin
    assert [each.begin for each in entries] == sorted(each.begin for each in entries)


def test_what_mlx_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((2, 3), mx.bfloat16), "b": mx.zeros((4,), mx.uint32)})
    found = {each.name: (each.dtype, each.shape, each.end - each.begin) for each in headers.read(path)}
    assert found == {"a": ("BF16", (2, 3), 12), "b": ("U32", (4,), 16)}


def test_a_file_without_tensors_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", {"__metadata__": {"format": "mlx"}})
    with safe_open(path, "np") as file:
        assert list(file.keys()) == []
    assert headers.read(path) == []


def test_a_tensor_of_nothing_lies_anywhere(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", {"a": entry([2], 0, 8), "none": entry([0, 3], 8, 8)}, b"\0" * 8)
    assert [each.name for each in headers.read(path)] == ["a", "none"]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "'b' overlaps"),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8, "'b' overlaps"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "'b' leaves a hole"),
        ({"a": entry([2], 4, 12)}, 12, "'a' leaves a hole"),
        ({"a": entry([2], 0, 8)}, 7, "take 8 bytes, but 7 follow"),
        ({"a": entry([2], 0, 8)}, 9, "take 8 bytes, but 9 follow"),
        ({"a": entry([3], 0, 8)}, 8, r"\[3\] in F32 needs 12 bytes, but its data_offsets span 8"),
        ({"a": entry([2], 0, 8, "F16")}, 8, "needs 4 bytes"),
        ({"a": entry([2**31, 2**31, 2**31], 0, 8)}, 8, "needs .* bytes, but"),
        ({"a": entry([2**64], 0, 8)}, 8, "a list of sizes"),
        ({"a": entry([-2], 0, 8)}, 8, "a list of sizes"),
        ({"a": entry([2.0], 0, 8)}, 8, "a list of sizes"),
        ({"a": entry([True], 0, 4)}, 4, "a list of sizes"),
        ({"a": entry(["2"], 0, 8)}, 8, "a list of sizes"),
        ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, 8, "a list of sizes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8, "a begin and an end"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, 8, "a begin and an end"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8, "a list of sizes"),
        ({"a": entry([2], 0, 8, "F8_E4M3")}, 8, "has the type 'F8_E4M3'; known are"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, 8, "known are"),
        ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "needs exactly"),
        ({"a": entry([2], 0, 8) | {"more": 1}}, 8, "needs exactly"),
        ({"a": 3}, 8, "needs exactly"),
        ([1, 2], 0, "no JSON object"),
        (b'{"a": 1, "a": 2}', 0, "a name is there twice"),
        (b"{", 0, "cannot be read"),
        (b"\xff\xfe{}", 0, "cannot be read"),
        (b"[" * 100_000, 0, "cannot be read"),
        (b'{"a": ' + b"1" * 5000 + b"}", 0, "cannot be read|needs exactly"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, data: int, message: str) -> None:
    path = raw(tmp_path / "x.safetensors", header, b"\0" * data)
    with pytest.raises(InputError, match=message) as caught:
        headers.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 50, 2**31, 2**63, 2**64 - 1])
def test_header_lengths_that_lie(tmp_path: Path, length: int) -> None:
    path = raw(tmp_path / "x.safetensors", {"a": entry([1], 0, 4)}, b"\0" * 4, length)
    with pytest.raises(InputError, match=r"truncated|cannot be read"):
        headers.read(path)


def test_a_header_that_would_take_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write((99 << 20).to_bytes(8, "little") + b"{")
        file.truncate(200 << 20)
    with pytest.raises(InputError, match=r"x: its safetensors header has 99 MB, and at most 16 MB are read"):
        headers.read(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 8, b"version https://git-lfs.github.com/spec/v1\noid 1"])
def test_files_too_short_to_be_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=r"truncated|cannot be read"):
        headers.read(tmp_path / "x")
