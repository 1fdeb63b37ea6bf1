"""Views show what numpy's do, and none shows anything outside of its storage."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_files import Storage, Tensor, error_of, legacy_file, put, save, tensor, zip_file

from elm_mlx.errors import InputError
from elm_mlx_convert import tensors
from elm_mlx_convert.torch_files import load

LAYOUTS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


@LAYOUTS
@pytest.mark.parametrize(
    ("offset", "shape", "strides", "words"),
    [
        (0, (25,), (1,), "needs 25 values of a storage of 24"), (1, (4, 6), (6, 1), "needs 25 values"),
        (24, (), (), "needs 25"), (0, (2**61, 2**61), (2**61, 1), "needs"), (0, (2,), (2**61,), "needs"),
        (-1, (2,), (1,), "negative"), (0, (-1,), (1,), "negative"), (5, (2,), (-1,), "negative"),
        (0, (24,), (0,), "repeats values"), (0, (2**40, 2), (0, 1), "repeats values"),
        (0, (3, 3), (1, 1), "repeats values"), (0, (5, 5), (4, 1), "repeats values"),
        (0, (2**62,), (1,), "huge"), (2**70, (1,), (1,), "huge"), (0, (1,), (2**62,), "huge"),
        (0, (2,), (1, 1), "2 strides"), (0, (1,) * 33, (1,) * 33, "33 dimensions"),
        (0, (True,), (1,), "not whole"), (0, (1.0,), (1,), "not whole"), (0, ("2",), (1,), "not whole"),
        (0, ((2,),), (1,), "not whole"), (0, [2], (1,), "describes a tensor"), (None, (2,), (1,), "describes a tensor"),
        (25, (0,), (1,), "outside"), (0, (0, 2**40), (1, 1), "outside"),
    ],
)  # fmt: skip
def test_tensors_that_lie(tmp_path: Path, offset: Any, shape: Any, strides: Any, words: str, legacy: bool) -> None:
    value = {"a": tensor(np.zeros(24)).part(offset, shape, strides)}
    assert words in error_of(tmp_path, legacy_file(value) if legacy else zip_file(value))


@st.composite
def views(draw: st.DrawFn) -> tuple[np.ndarray, int, tuple[int, ...], tuple[int, ...]]:
    """A flat array, and an offset, shape and strides over it such as slicing and transposing make."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=0, max_size=4))
    steps = [draw(st.integers(1, 3)) for _ in sizes]
    lengths = [draw(st.integers(0, -(-size // step))) for size, step in zip(sizes, steps, strict=True)]
    strides = [int(np.prod(sizes[axis + 1 :], dtype=int)) * step for axis, step in enumerate(steps)]
    order = draw(st.permutations(range(len(sizes))))
    total = int(np.prod(sizes, dtype=int))
    reach = sum((n - 1) * s for n, s in zip(lengths, strides, strict=True)) if all(lengths) else -1
    offset = draw(st.integers(0, max(0, total - 1 - reach)))
    dtype = draw(st.sampled_from([np.uint8, np.float16, np.int64]))
    return np.arange(total).astype(dtype), offset, tuple(lengths[i] for i in order), tuple(strides[i] for i in order)


@settings(max_examples=300)
@given(case=views(), legacy=st.booleans(), small=st.sampled_from([1, 16, 1 << 16]), data=st.data())
def test_views_read_as_numpy_sees_them(
    tmp_path_factory: pytest.TempPathFactory, case: Any, legacy: bool, small: int, data: st.DataObject
) -> None:
    flat, offset, shape, strides = case
    folder = tmp_path_factory.getbasetemp()
    lazy = load(save(folder / "view.pt", Tensor(Storage(flat, flat.dtype.name), offset, shape, strides), legacy=legacy))
    expected = np.lib.stride_tricks.as_strided(flat[offset:], shape, [s * flat.itemsize for s in strides])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_SMALL_READ", small)  # so that small tensors are split as large ones are
        assert np.array_equal(lazy.read(), expected) and lazy.read().flags.c_contiguous
        start = data.draw(st.integers(0, lazy.rows))
        stop = data.draw(st.integers(start, lazy.rows))
        assert np.array_equal(lazy.read_rows(start, stop), expected.reshape(lazy.rows, *shape[1:])[start:stop])


@settings(max_examples=300)
@given(
    numel=st.integers(0, 30),
    offset=st.integers(0, 40),
    axes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), max_size=4),
)
def test_a_view_is_refused_or_lies_within(
    tmp_path_factory: pytest.TempPathFactory, numel: int, offset: int, axes: list[tuple[int, int]]
) -> None:
    shape, strides = tuple(n for n, _ in axes), tuple(s for _, s in axes)
    value = Tensor(Storage(np.arange(numel), "int64"), offset, shape, strides)
    path = put(tmp_path_factory.getbasetemp(), zip_file(value))
    places = np.array([offset + sum(map(mul, index, strides)) for index in np.ndindex(shape)])
    if places.size and (places.max() >= numel or len(set(places.tolist())) < places.size):
        assert error_of(path.parent, path.read_bytes()).startswith("it has a tensor")
        return
    try:
        lazy = load(path)
    except InputError as error:
        # Refused without need: only views that no slicing makes, whose axes interlock, and empty ones out of place.
        assert "repeats values" in str(error) or not places.size
    else:
        assert lazy.read().reshape(-1).tolist() == places.tolist()


def peak_of(function: Callable[..., Any], *arguments: Any) -> int:
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_is_bounded_by_what_is_asked(tmp_path: Path) -> None:
    whole = tensor(np.arange(2_000_000, dtype=np.float32).reshape(1000, 2000))
    value = {
        "rows": whole, "columns": whole.part(0, (2000, 1000), (1, 2000)),
        "sparse": whole.part(0, (1000, 2), (2000, 1999)), "every other": whole.part(0, (1000, 500), (2000, 4)),
    }  # fmt: skip
    path = save(tmp_path / "a.pt", value)
    assert peak_of(load, path) < 300_000
    loaded = load(path)
    asked = {"rows": 10 * 8000, "columns": 10 * 4000, "sparse": 10 * 8, "every other": 10 * 2000}
    for name, size in asked.items():
        assert peak_of(loaded[name].read_rows, 20, 30) < 3 * size + tensors._SMALL_READ + 20_000, name
    flat = np.arange(2_000_000, dtype=np.float32)
    assert np.array_equal(loaded["columns"].read(), flat.reshape(1000, 2000).T)
    assert np.array_equal(loaded["sparse"].read(), flat.reshape(1000, 2000)[:, [0, 1999]])


def test_rows_past_the_end(tmp_path: Path) -> None:
    lazy = load(save(tmp_path / "a.pt", tensor(np.zeros((3, 2)))))
    for start, stop in [(0, 4), (-1, 2), (2, 1)]:
        with pytest.raises(IndexError):
            lazy.read_rows(start, stop)


def test_a_scalar_is_read_as_one_row(tmp_path: Path) -> None:
    lazy = load(save(tmp_path / "a.pt", tensor(np.float32(2.5))))
    assert (lazy.shape, lazy.rows, lazy.read_rows(0, 1).tolist(), float(lazy.read())) == ((), 1, [2.5], 2.5)


def test_bools_of_other_bytes_are_true(tmp_path: Path) -> None:
    storage = Storage(np.array([0, 1, 2, 255], np.uint8), "bool")
    assert load(save(tmp_path / "a.pt", Tensor(storage, 0, (4,), (1,)))).read().tolist() == [False, True, True, True]
