"""Headers against those that the safetensors library writes, and lies of every kind; shards and their index, written
one array at a time."""

from __future__ import annotations

import gc
import json
import math
import weakref
from functools import partial
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

from elm_mlx import safetensors_file
from elm_mlx.errors import InputError
from elm_mlx.safetensors_file import Pending, read_header, write_arrays, write_shards
from elm_mlx.store.loading import pending

TYPES = [mx.float32, mx.float16, mx.bfloat16, mx.uint64, mx.uint32, mx.uint8, mx.int64, mx.int32]
SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=40)
@given(SHAPES, st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]))
def test_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], dtype: str
) -> None:
    path = tmp_path_factory.mktemp("headers") / "x.safetensors"
    arrays = {f"t{i}": np.full(shape, i % 2, dtype) for i, shape in enumerate(shapes)}
    save_file(arrays, path, metadata={"format": "pt"})
    entries = read_header(path)
    data = path.read_bytes()
    assert {each.name: each.shape for each in entries} == {name: array.shape for name, array in arrays.items()}
    for each in entries:
        assert data[each.begin : each.end] == arrays[each.name].tobytes()
        assert math.prod(each.shape) * safetensors_file.SIZES[each.dtype] == each.end - each.begin
    assert [each.begin for each in entries] == sorted(each.begin for each in entries)


def test_what_mlx_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((2, 3), mx.bfloat16), "b": mx.zeros((4,), mx.uint32)})
    found = {each.name: (each.dtype, each.shape, each.end - each.begin) for each in read_header(path)}
    assert found == {"a": ("BF16", (2, 3), 12), "b": ("U32", (4,), 16)}


def test_a_file_without_tensors_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", {"__metadata__": {"format": "mlx"}})
    with safe_open(path, "np") as file:
        assert list(file.keys()) == []
    assert read_header(path) == []


def test_a_tensor_of_nothing_lies_anywhere(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", {"a": entry([2], 0, 8), "none": entry([0, 3], 8, 8)}, b"\0" * 8)
    assert [each.name for each in read_header(path)] == ["a", "none"]


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
        ({"a": entry([2], 0, 8, "F8_E4M3")}, 8, "has the type 'F8_E4M3'; supported are"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, 8, "supported are"),
        ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "needs exactly"),
        ({"a": entry([2], 0, 8) | {"more": 1}}, 8, "needs exactly"),
        ({"a": 3}, 8, "needs exactly"),
        ([1, 2], 0, "not a JSON object"),
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
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 50, 2**31, 2**63, 2**64 - 1])
def test_header_lengths_that_lie(tmp_path: Path, length: int) -> None:
    path = raw(tmp_path / "x.safetensors", {"a": entry([1], 0, 4)}, b"\0" * 4, length)
    with pytest.raises(InputError, match=r"truncated|cannot be read"):
        read_header(path)


def test_a_header_that_would_take_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write((99 << 20).to_bytes(8, "little") + b"{")
        file.truncate(200 << 20)
    with pytest.raises(InputError, match=r"x: its safetensors header has 99 MB, and at most 16 MB are read"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 8, b"version https://git-lfs.github.com/spec/v1\noid 1"])
def test_files_too_short_to_be_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=r"truncated|cannot be read"):
        read_header(tmp_path / "x")


def listed(arrays: dict[str, mx.array]) -> list[Pending]:
    return [pending(name, a.dtype, a.shape, partial(arrays.__getitem__, name)) for name, a in arrays.items()]


def drawn(sizes: list[int]) -> dict[str, mx.array]:
    """Float32 rows of so many values."""
    return {f"layers.{i}.w": mx.random.normal((size,), key=mx.random.key(i)) for i, size in enumerate(sizes)}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 0, 3), ()], ids=str)
def test_every_type_and_shape_is_read_back(tmp_path: Path, dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    array = (mx.random.uniform(0, 100, shape, key=mx.random.key(1))).astype(dtype)
    arrays = {"w": array, "transposed": mx.arange(6).reshape(2, 3).T}
    write_shards(tmp_path, listed(arrays))
    with (tmp_path / "arrays").open("wb") as file:
        write_arrays(file, arrays)
    assert (tmp_path / "arrays").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    read = mx.load(str(tmp_path / "model.safetensors"))
    assert read["w"].dtype == dtype and read["w"].shape == shape and mx.array_equal(read["w"], array)
    assert read["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    if dtype != mx.bfloat16:  # which NumPy does not have
        with safe_open(tmp_path / "model.safetensors", "numpy") as file:
            assert file.metadata() == {"format": "mlx"}
            np.testing.assert_array_equal(file.get_tensor("w"), np.array(array))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(4, 300))
def test_each_array_is_in_the_shard_that_the_index_names(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], most: int
) -> None:
    folder, arrays = tmp_path_factory.mktemp("shards"), drawn(sizes)
    write_shards(folder, listed(arrays), shard_bytes=most)
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if len(files) == 1:
        assert files[0].name == "model.safetensors" and not index.exists()
        placed = dict.fromkeys(arrays, files[0].name)
    else:
        described = json.loads(index.read_text("utf-8"))
        placed = described["weight_map"]
        assert described["metadata"]["total_size"] == 4 * sum(sizes)
        assert [file.name for file in files] == [
            f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
        ]
    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, "numpy") as opened:
            names = list(opened.keys())
            assert len(names) == 1 or sum(arrays[name].nbytes for name in names) <= most
            for name in names:
                found[name] = file.name
                np.testing.assert_array_equal(opened.get_tensor(name), np.array(arrays[name]))
    assert found == placed


def test_one_array_at_a_time_is_in_memory(tmp_path: Path) -> None:
    living: list[weakref.ref[np.ndarray]] = []
    most = 0

    def make(value: int) -> mx.array:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in living))
        owner = np.full(1000, value, np.float32)
        living.append(weakref.ref(owner))
        array = mx.array(owner)
        holders.append(owner)  # lives as long as the array that was asked for last
        del holders[:-1]
        return array

    holders: list[np.ndarray] = []
    write_shards(tmp_path, [pending(f"w{i}", mx.float32, (1000,), partial(make, i)) for i in range(5)], 9000)
    assert len(living) == 5 and most == 1  # the one before, and none of those before it
    read = mx.load(str(tmp_path / "model-00003-of-00003.safetensors"))
    assert read["w4"].tolist() == [4.0] * 1000


def test_an_array_that_is_not_what_was_promised_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="w"):
        write_shards(tmp_path, [pending("w", mx.float32, (2,), lambda: mx.zeros((3,)))])
