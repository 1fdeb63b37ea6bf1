"""Thousands of damaged files: each is refused in one clean line, or is read to its last tensor.

Seeded, so that a failure can be had again: the id of a test and the number in its message name the case.
"""

from __future__ import annotations

import argparse
import os
import random
import tracemalloc
from collections import Counter, deque
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from torch_files import Call, Global, Tensor, legacy_file, legacy_of, parameter, tensor, zip_file, zip_of

from elm_mlx.errors import InputError
from elm_mlx_convert.tensors import LazyTensor, Storage
from elm_mlx_convert.torch_files import Symbol, load

CASES = 2000
MEMORY = 2_000_000  # of one case; the files have some 3,000 bytes
INTERESTING = [0, 1, 2, 127, 128, 254, 255]
# The opcodes that the machine knows, some that it does not, and operands that make sense together.
PIECES = [
    *(bytes([code]) for code in b"NJKMILGXTUBC}])t(aesuqrhjcRbQ.0i2"),
    *(bytes([code]) for code in b"\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95"),
    b"cargparse\nNamespace\n)\x81}b", b"ccollections\ndeque\n)R", b"cpathlib\nPosixPath\n", b"c__builtin__\nset\n(]tR",
    b"\x00", b"\x01", b"\x02", b"\xff", b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"K\x00", b"K\x02", b"\x8c\x010",
    b"X\x07\x00\x00\x00storage", b"ctorch\nFloatStorage\n", b"\x8c\x03cpu", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n)R", b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x04tQ",
    b"K\x02\x85", b"K\x01\x85", b"K\x02K\x02\x86", b"ctorch\nSize\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n",
]  # fmt: skip


def value() -> Any:
    whole = tensor(np.arange(12, dtype=np.float32).reshape(3, 4))
    return {
        "model_state_dict": Call("collections.OrderedDict", (), {"_metadata": {"": {"version": 1}}}),
        "weights": {"a": whole, "b": whole.part(1, (4, 2), (1, 4)), "c": parameter(whole)},
        "half": tensor(np.arange(5, dtype=np.uint16), "bfloat16"), "flags": tensor(np.array([True, False])),
        "old": Tensor(whole.storage, 2, (), (), "_rebuild_tensor"), "empty": tensor(np.zeros((0, 3))),
        "lr": (0.1, 2**70, None, True, b"bytes"), "metric": np.float64(2), "dtype": Global("torch.float16"),
        "size": Call("torch.Size", ((2, 3),)), "groups": [{"params": [0, 1], "name": "é"}],
        "hyper": argparse.Namespace(lr=0.1, at=datetime(2024, 1, 2), out=PurePosixPath("a/b"), seen={1, 2}),
        "random": np.random.RandomState(0).get_state()[:2], "order": deque([1, 2], 3), "count": Counter("abca"),
    }  # fmt: skip


def damaged(rng: random.Random, sources: list[bytes]) -> bytes:
    """One of `sources`, hurt once or a few times."""
    data = bytearray(rng.choice(sources))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(data) or 1)
        kind = rng.randrange(9)
        if kind == 0:
            data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
        elif kind == 1:
            data[at : at + 1] = bytes([rng.choice(INTERESTING)])
        elif kind == 2:
            data[at : at + 1] = rng.randbytes(1)
        elif kind == 3:
            data[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", rng.randbytes(4)])
        elif kind == 4 and rng.randrange(4) == 0:
            del data[at:]
        elif kind == 5:
            del data[at : at + rng.choice([1, 2, 8, 64])]
        elif kind == 6:
            data[at:at] = rng.choice(PIECES)
        elif kind == 7:
            other = rng.choice(sources)
            start = rng.randrange(len(other))
            data[at : at + rng.choice([0, 1, 16])] = other[start : start + rng.choice([1, 4, 16, 100])]
        else:
            data[at : at + 1] = rng.choice(PIECES)
    return bytes(data)


def soup(rng: random.Random) -> bytes:
    return b"\x80\x02" + b"".join(rng.choices(PIECES, k=rng.randrange(1, 40))) + b"."


def walk(part: Any) -> None:
    """Reads every tensor, and finds nothing but what may be there."""
    if isinstance(part, LazyTensor):
        array = part.read()
        assert array.shape == part.shape and array.nbytes == part.nbytes
    elif type(part) is dict:
        assert all(type(key) in (str, int, bool, type(None)) for key in part)
        for inner in part.values():
            walk(inner)
    elif type(part) in (list, tuple):
        for inner in part:
            walk(inner)
    else:
        assert part is None or type(part) in (str, bytes, int, float, bool, Symbol, Storage)


def cases(kind: str, rng: random.Random) -> Iterator[bytes]:
    if kind.startswith("soup"):
        storages = {"0": np.arange(4, dtype=np.float32).tobytes()}
        for _ in range(CASES):
            pickle = soup(rng)
            counted = {"0": (4, storages["0"])} if b"storage" in pickle else None
            yield zip_of(pickle, storages) if kind.endswith("zip") else legacy_of(pickle, counted)
    else:
        make = zip_file if kind == "zip" else legacy_file
        sources = [make(value(), protocol) for protocol in (2, 4)]
        # Most of an archive is padding: the pickle alone is hurt more often than its chance is.
        inner = [source[source.index(b"\x80", 20) :][:900] for source in sources]
        for number in range(CASES):
            if number % 3:
                yield damaged(rng, sources)
            else:
                place = rng.randrange(2)
                yield sources[place].replace(inner[place], damaged(rng, [inner[place]])[:900].ljust(900, b"."))


@pytest.mark.parametrize("kind", ["zip", "legacy", "soup in a zip", "soup in a legacy file"])
def test_damage(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "case.pt"
    read, refused = 0, set()
    tracemalloc.start()
    for number, data in enumerate(cases(kind, random.Random(kind))):
        path.write_bytes(data)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        try:
            walk(load(path))
            read += 1
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable(), (number, str(error))
            refused.add(str(error)[len(str(path)) + 2 :][:40])
        except BaseException as error:
            raise AssertionError(f"case {number}: {data!r}") from error
        assert tracemalloc.get_traced_memory()[1] - before < MEMORY, number
    tracemalloc.stop()
    print(f"{kind}: {read} read, {CASES - read} refused for {len(refused)} reasons")
    # The damage must neither be so heavy nor so light that nothing is tested.
    assert len(refused) >= 20 and CASES > read >= (1 if kind.startswith("soup") else CASES // 50)
    assert [path.name for path in tmp_path.iterdir()] == ["case.pt"]


def test_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / "case.pt"
    for make in (zip_file, legacy_file):
        whole = make(value())
        path.write_bytes(whole)
        walk(load(path))
        for size in reversed(range(len(whole))):
            os.truncate(path, size)
            with pytest.raises(InputError):
                load(path)
