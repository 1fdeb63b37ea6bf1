"""Shards and their index against the safetensors library, and that one array at a time is asked for."""

from __future__ import annotations

import gc
import json
import weakref
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from elm_mlx.store import shards
from elm_mlx.store.shards import Pending

TYPES = [mx.float32, mx.float16, mx.bfloat16, mx.uint64, mx.uint32, mx.uint8, mx.int64, mx.int32]


def pending(arrays: dict[str, mx.array]) -> list[Pending]:
    return [Pending(name, a.dtype, a.shape, partial(arrays.__getitem__, name)) for name, a in arrays.items()]


def drawn(sizes: list[int]) -> dict[str, mx.array]:
    """Float32 rows of so many values."""
    return {f"layers.{i}.w": mx.random.normal((size,), key=mx.random.key(i)) for i, size in enumerate(sizes)}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 0, 3), ()], ids=str)
def test_every_type_and_shape_is_read_back(tmp_path: Path, dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    array = (mx.random.uniform(0, 100, shape, key=mx.random.key(1))).astype(dtype)
    shards.write(tmp_path, pending({"w": array, "transposed": mx.arange(6).reshape(2, 3).T}))
    read = mx.load(str(tmp_path / "model.safetensors"))
    assert read["w"].dtype == dtype and read["w"].shape == shape and mx.array_equal(read["w"], array)
    assert read["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    if dtype != mx.bfloat16:  # which NumPy does not have
        with safe_open(tmp_path / "model.safetensors", "numpy") as file:
            assert file.metadata() == {"format": "mlx"}
            np.testing.assert_array_equal(file.get_tensor("w"), np.array(array))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(4, 300))
def test_each_array_is_in_the_shard_that_the_index_names(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], most: int
) -> None:
    folder, arrays = tmp_path_factory.mktemp("shards"), drawn(sizes)
    shards.write(folder, pending(arrays), shard_bytes=most)
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
    shards.write(tmp_path, [Pending(f"w{i}", mx.float32, (1000,), partial(make, i)) for i in range(5)], 9000)
    assert len(living) == 5 and most == 1  # the one before, and none of those before it
    read = mx.load(str(tmp_path / "model-00003-of-00003.safetensors"))
    assert read["w4"].tolist() == [4.0] * 1000


def test_an_array_that_is_not_what_was_promised_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="w"):
        shards.write(tmp_path, [Pending("w", mx.float32, (2,), lambda: mx.zeros((3,)))])
