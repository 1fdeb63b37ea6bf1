"""The safetensors format: what the reference library writes is read, what it reads is written, lies are refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors_headers import entry, raw

from elm_mlx.errors import InputError
from elm_mlx_convert.tensors import read_safetensors


def test_what_the_library_writes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        dtype: random.integers(0, 2, (3, 5)).astype(dtype)
        for dtype in ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "uint32", "bool")
    }
    arrays |= {"scalar": np.array(3, np.float32), "empty": np.zeros((0, 4), np.float32)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = read_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].shape == array.shape and read[name].dtype == array.dtype.name
        np.testing.assert_array_equal(read[name].read(), array)
    np.testing.assert_array_equal(read["int16"].read_rows(1, 3), arrays["int16"][1:3])


def test_what_mlx_writes_bfloat16_too(tmp_path: Path) -> None:
    import mlx.core as mx

    array = mx.array(np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)).astype(mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": array})
    tensor = read_safetensors(tmp_path / "x.safetensors")["a"]
    assert tensor.dtype == "bfloat16"
    np.testing.assert_array_equal(tensor.read(), np.array(array.view(mx.uint16)))


def test_absent_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_safetensors(tmp_path / "x")
    with pytest.raises(InputError, match="directory"):
        read_safetensors(tmp_path)


def test_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    path = raw(tmp_path / "x", {"a": entry([2], 0, 8)}, b"\0" * 8)
    tensor = read_safetensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError):
        tensor.read()


def test_flipped_bytes_are_refused_wherever_the_library_refuses_them(tmp_path: Path) -> None:
    """3,000 damaged files: no error but InputError, and nothing accepted that the reference would not accept."""
    choose = random.Random(7)
    header = {"__metadata__": {"format": "pt"}, "a": entry([2, 3], 0, 24), "b": entry([4], 24, 32, "BF16")}
    sound = raw(tmp_path / "x", header, bytes(range(32))).read_bytes()
    refused = 0
    for _ in range(3000):
        data = bytearray(sound)
        for _ in range(choose.randint(1, 3)):
            action, at = choose.random(), choose.randrange(len(data))
            if action < 0.6:
                data[at] ^= 1 << choose.randrange(8)
            elif action < 0.8:
                data[at] = choose.choice(b'0123456789,:[]{}"')
            else:
                del data[at : at + choose.randint(1, 9)]
        path = tmp_path / "y"
        path.unlink(missing_ok=True)  # writing over it would make ext4 flush
        path.write_bytes(data)
        try:
            for tensor in read_safetensors(path).values():
                tensor.read()
        except InputError:
            refused += 1
        else:
            with safe_open(path, "np"):
                pass
    assert 1000 < refused < 3000
