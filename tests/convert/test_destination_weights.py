"""The casts, the files that hold what was cast, and the proof of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elm_mlx.errors import ElmError, InputError
from elm_mlx_convert import destination
from elm_mlx_convert.destination import write_weights
from elm_mlx_convert.tensors import (
    BLOCK_BYTES,
    FLOATS,
    ITEM_SIZES,
    LazyTensor,
    all_finite,
    cast,
    numpy_dtype,
    read_safetensors,
)

MLX = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def lazy(name: str, array: np.ndarray, dtype: str = "") -> LazyTensor:
    return LazyTensor(name, array.shape, dtype or array.dtype.name, lambda start, stop: array[start:stop])


def mlx_cast(values: np.ndarray, source: str, target: str) -> np.ndarray:
    array = mx.array(values).view(mx.bfloat16) if source == "bfloat16" else mx.array(values)
    array = array.astype(MLX[target])
    return np.array(array.view(mx.uint16) if target == "bfloat16" else array)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_casts_are_mlxs_for_every_pattern_of_16_bits(source: str, target: str) -> None:
    """All 65,536 values of a 16-bit type; for float32 its upper halves with every kind of tail."""
    high = np.arange(1 << 16, dtype=np.uint32)
    if source == "float32":
        tails = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
        values = ((high[:, None] << 16) | tails).reshape(-1).view(np.float32)
    else:
        values = high.astype(np.uint16).view(numpy_dtype(source))
    ours, theirs = cast(values, source, target), mlx_cast(values, source, target)
    assert ours.dtype == numpy_dtype(target)
    nan = np.isnan(cast(theirs, target, "float32"))
    np.testing.assert_array_equal(np.isnan(cast(ours, target, "float32")), nan)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert all_finite(ours, target) == bool(np.isfinite(cast(theirs, target, "float32")).all())
    finite = ours[np.isfinite(cast(ours, target, "float32"))]
    assert all_finite(finite, target) and all_finite(finite[:0], target)


@settings(max_examples=100)
@given(hnp.arrays(np.float32, st.integers(0, 64), elements=st.floats(width=32, allow_nan=False)))
def test_casts_of_any_floats(values: np.ndarray) -> None:
    for target in FLOATS:
        np.testing.assert_array_equal(cast(values, "float32", target), mlx_cast(values, "float32", target))


def test_nan_stays_nan_and_float64_comes_down() -> None:
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    assert (cast(nans, "float32", "bfloat16") & 0x7FFF == 0x7FC0).all()
    np.testing.assert_array_equal(cast(np.array([1.5, -2.0]), "float64", "float32"), np.float32([1.5, -2.0]))


def test_blocks_are_bounded_and_cover_every_row() -> None:
    array = np.arange(3 * BLOCK_BYTES // 4, dtype=np.float32).reshape(-1, 16)
    blocks = list(lazy("a", array).blocks())
    assert len(blocks) == 3 and max(block.nbytes for block in blocks) <= BLOCK_BYTES
    np.testing.assert_array_equal(np.concatenate(blocks), array)
    assert [b.shape for b in lazy("a", np.zeros((2, BLOCK_BYTES), np.float32)).blocks()] == [(1, BLOCK_BYTES)] * 2


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    shapes = {"b": (700, 600), "a": (5,), "c": (3, 4), "d": (40, 50)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def read_all(directory: Path) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= read_safetensors(file)
    return found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 5000, 1])
def test_files_hold_the_values(tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    made = arrays()
    said: list[tuple[str, int, int]] = []
    tensors = [lazy(name, array) for name, array in made.items()]
    broken = write_weights(tmp_path, tensors, dtype, shard_bytes=shard_bytes, on_progress=lambda *at: said.append(at))
    total = sum(array.size for array in made.values()) * ITEM_SIZES[dtype]
    assert broken == []
    assert said[-1] == ("write", total, total) and sorted(said) == said
    found = read_all(tmp_path)
    assert found.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(found[name].read(), mlx_cast(array, "float32", dtype))
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    if shard_bytes == 1 << 30:
        assert files == ["model.safetensors"]
        assert not (tmp_path / "model.safetensors.index.json").exists()
    else:
        count = 4 if shard_bytes == 1 else {"float32": 3}.get(dtype, 2)
        assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {
            "total_size": total,
            "total_parameters": sum(array.size for array in made.values()),
        }
        for name, file in index["weight_map"].items():
            assert name in read_safetensors(tmp_path / file)
        for file in files:
            read = read_safetensors(tmp_path / file).values()
            assert len(read) == 1 or sum(tensor.nbytes for tensor in read) <= shard_bytes


def test_mlx_reads_them_with_their_metadata(tmp_path: Path) -> None:
    write_weights(tmp_path, [lazy("a", np.float32([1, 2]))], "bfloat16")
    read, metadata = mx.load(str(tmp_path / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx"} and read["a"].dtype == mx.bfloat16 and read["a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float16", 65520, r"x\.y holds values up to 65520, but float16 ends at 65504: use --dtype bfloat16"),
        ("float16", -1e30, r"x\.y holds values up to 1e\+30"),
        ("bfloat16", 3.4e38, r"x\.y holds values up to 3.4e\+38, but bfloat16 ends at 3.39e38: use --dtype float32"),
    ],
)
def test_overflow_names_the_tensor(tmp_path: Path, dtype: str, value: float, message: str) -> None:
    array = np.zeros((1000, 1000), np.float32)
    array[999, 5], array[0, 0], array[0, 1] = value, np.inf, np.nan
    with pytest.raises(InputError, match=message):
        write_weights(tmp_path, [lazy("x.y", array)], dtype)


def test_overflow_of_float64(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds values up to 1e\+300, but float32 ends at 3.40e38; nothing"):
        write_weights(tmp_path, [lazy("x", np.array([1e300]))], "float32")


def test_just_below_overflow_is_no_overflow(tmp_path: Path) -> None:
    assert write_weights(tmp_path, [lazy("x", np.float32([65519.9, -65504]))], "float16") == []


def test_what_is_no_number_is_kept_and_told(tmp_path: Path) -> None:
    odd = np.float32([1, np.nan, -np.inf])
    tensors = [lazy("x", np.concatenate([odd] * BLOCK_BYTES)), lazy("y", np.float32([1]))]
    for dtype in FLOATS:
        assert write_weights(tmp_path, tensors, dtype) == ["x"]
        destination.compare(tensors, tmp_path, dtype)


NAMES = {
    "transformer.token_embeddings.weight": "embedding",
    "transformer.layers.0.attn_norm.weight": "norms",
    "transformer.layers.0.attn.q_norm.weight": "norms",
    "transformer.layers.0.attn.qkv_proj.weight": "attention",
    "transformer.layers.0.ffn.proj_1.weight": "ffn",
    "transformer.layers.0.ffn_norm.weight": "norms",
    "transformer.norm.weight": "norms",
    "lm_head.weight": "head",
}


def test_groups() -> None:
    for name, group in NAMES.items():
        assert destination.group_of(name) == group


@pytest.mark.parametrize("dtype", FLOATS)
def test_verification_finds_the_largest_difference(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(0)
    made = {name: random.standard_normal((40, 50)).astype(np.float32) for name in NAMES}
    made["lm_head.weight"][3, 4] = 1e-41  # subnormal
    tensors = [lazy(name, array) for name, array in made.items()]
    write_weights(tmp_path, tensors, dtype, shard_bytes=9000)
    differences = destination.compare(tensors, tmp_path, dtype)
    assert [difference.group for difference in differences] == list(destination.GROUPS)
    assert {d.group: d.tensors for d in differences}["norms"] == 4
    for difference in differences:
        chosen = {name: array for name, array in made.items() if NAMES[name] == difference.group}
        expected = {
            name: float(np.abs(array - cast(mlx_cast(array, "float32", dtype), dtype, "float32")).max())
            for name, array in chosen.items()
        }
        assert difference.largest == max(expected.values())
        assert expected[difference.where] == difference.largest
        assert difference.magnitude == float(max(np.abs(array).max() for array in chosen.values()))
        assert (difference.largest == 0) == (dtype == "float32")


def change_value(tensors: dict[str, Any]) -> None:
    tensors["b"] = tensors["b"].copy()
    tensors["b"][-1, -1] *= np.float32(1 + 2**-7)


def make_nan(tensors: dict[str, Any]) -> None:
    tensors["d"] = tensors["d"].copy()
    tensors["d"][3, 3] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_value, "b holds .* where its source holds .*, further off than rounding to bfloat16"),
        (make_nan, "d holds nan where its source holds"),
        (lambda tensors: tensors.pop("a"), r"a was not written as \(5,\) in bfloat16"),
        (lambda tensors: tensors.update(a=tensors["a"][:4]), r"a was not written as \(5,\) in bfloat16"),
        (lambda tensors: tensors.update(more=tensors["a"]), "5 tensors were written for 4"),
    ],
)
def test_verification_fails_where_files_differ(tmp_path: Path, change: Any, message: str) -> None:
    tensors = [lazy(name, array) for name, array in arrays().items()]
    other = arrays()
    change(other)
    write_weights(tmp_path, [lazy(name, array) for name, array in other.items()], "bfloat16")
    with pytest.raises(ElmError, match=f"verification failed: {message}"):
        destination.compare(tensors, tmp_path, "bfloat16")
