"""Archives that contradict themselves are refused, and sound ones of other writers are read."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_files import Member, archive, error_of, put, tensor, zip_file

from elm_mlx_convert import tensors, zip_files
from elm_mlx_convert.tensors import File
from elm_mlx_convert.torch_files import load
from elm_mlx_convert.zip_files import read_archive, read_entry

PICKLE = Member("a/data.pkl", b"\x80\x02}.")
ZIP64 = struct.pack("<2HQ", 1, 8, 5)


def data_member(**fields: Any) -> Member:
    return Member("a/data/0", b"01234", **fields)


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (data_member(central={"flags": 0x0809}), "encrypted"), (data_member(central={"flags": 0x0840}), "encrypted"),
        (data_member(flags=0x0821), "encrypted"), (data_member(flags=0x0820), "patch"),
        (data_member(central={"disk": 1}), "several disks"),
        (data_member(local={"name": b"a/data/1"}), "headers of a/data/0 disagree"),
        (data_member(local={"name": b"a/data/00"}), "disagree"),
        (data_member(local={"flags": 0x0800}), "disagree"), (data_member(local={"method": 8}), "disagree"),
        (data_member(local={"size": 5}), "disagree"), (data_member(local={"crc": 1}), "disagree"),
        (data_member(flags=0x0800, local={"size": 4}), "disagree"),
        (data_member(flags=0x0800, local={"packed": 4}), "disagree"),
        (data_member(flags=0x0800, local={"crc": 4}), "disagree"), (data_member(local={"packed": 2**32 - 1}), "zip64"),
        (data_member(central={"size": 4}), "two sizes, 5 and 4"), (data_member(central={"packed": 4}), "two sizes, 4"),
        (data_member(central={"size": 2**31, "packed": 2**31}), "longer than the data"),
        (data_member(central={"at": 2**31}), "starts past the end"), (data_member(central={"at": 1}), "disagree"),
        (data_member(central={"size": 2**32 - 1}), "zip64 size is announced but missing"),
        (data_member(central={"size": 2**32 - 1, "extra": ZIP64[:-1]}), "zip64 size is announced but missing"),
        (data_member(central={"size": 2**32 - 1, "extra": b"\1\0\7\0" + ZIP64[4:]}), "zip64 size is announced"),
        (data_member(central={"size": 2**32 - 1, "extra": ZIP64[:4] + b"\xff" * 8}), "two sizes"),
        (data_member(central={"at": 2**32 - 1, "extra": ZIP64[:4] + b"\xff" * 8}), "starts past the end"),
        (Member("a/data.pkl", b""), "two entries called a/data.pkl"), (Member("/a/b", b""), "stays inside"),
        (Member("a/../b", b""), "stays inside"), (Member("../b", b""), "stays inside"), (Member("a/./b", b""), "stays"),
        (Member("a//b", b""), "stays inside"), (Member("a\\b", b""), "stays inside"), (Member("a\0b", b""), "stays"),
        (Member("", b""), "an entry is not a name"), (Member("a/\x1b[2J/..", b""), "a/\\x1b[2J/.."),
        (Member("x", b"", local={"name": b"\xff"}, central={"name": b"\xff"}), "not UTF-8"),
    ],
)  # fmt: skip
def test_entries_that_lie(tmp_path: Path, member: Member, words: str) -> None:
    assert words in error_of(tmp_path, archive([PICKLE, member]))


def test_entries_that_overlap(tmp_path: Path) -> None:
    # The second entry's header lies in the data of the first, where it is a sound one.
    inner = archive([data_member()])
    inner = inner[: inner.index(b"PK\1\2")]
    outer = archive([PICKLE, Member("a/data/1", inner), data_member()])
    at = outer.index(b"a/data/0") - 30
    real = outer.rindex(b"a/data/0", 0, outer.index(b"PK\1\2")) - 30
    assert read_archive(File(put(tmp_path, outer)))["a/data/0"].start > real
    lying = outer.replace(struct.pack("<I", real) + b"a/data/0", struct.pack("<I", at) + b"a/data/0")
    assert lying != outer and "a/data/0 overlaps another entry" in error_of(tmp_path, lying)


def test_two_names_for_one_entry(tmp_path: Path) -> None:
    at = archive([PICKLE, data_member()]).index(b"a/data/0") - 30
    assert "overlaps" in error_of(tmp_path, archive([PICKLE, data_member(), data_member(central={"at": at})]))


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(
    ("end", "words"),
    [
        ({"disk": 1}, "several disks"), ({"count": 1}, "holds more"), ({"count": 3}, "ends before"),
        ({"count": 2**16 - 2}, "the limit is"), ({"size": 5}, "not where its end record says"),
        ({"start": 5}, "not where its end record says"), ({"start": 2**32 - 2}, "not where its end record says"),
    ],
)  # fmt: skip
def test_end_records_that_lie(tmp_path: Path, end: dict[str, int], words: str, wide: bool) -> None:
    assert words in error_of(tmp_path, archive([PICKLE, data_member()], wide=wide, end=end))


def test_end_records_that_disagree(tmp_path: Path) -> None:
    data = bytearray(archive([PICKLE]))
    end, locator, wide = data.rindex(b"PK\5\6"), data.rindex(b"PK\6\7"), data.rindex(b"PK\6\6")
    changes = {
        **dict.fromkeys((end + 10, end + 12, end + 16), "two end records disagree"),
        locator + 4: "several disks", locator + 8: "do not follow", locator + 16: "several disks", wide: "malformed",
        wide + 4: "malformed", wide + 16: "several disks", wide + 24: "several disks", end: "truncated archive",
        end + 20: "truncated archive", locator: "not where its end record says",
    }  # fmt: skip
    for at, words in changes.items():
        changed = data.copy()
        changed[at] += 2
        assert words in error_of(tmp_path, bytes(changed)), at
    for size in (len(data) - 1, end, wide, 40, 4):
        assert "truncated archive" in error_of(tmp_path, bytes(data[:size]))
    assert "truncated archive" in error_of(tmp_path, bytes(data) + b"x")


def test_a_directory_cut_inside_an_entry(tmp_path: Path) -> None:
    data = archive([PICKLE])
    at = data.index(b"PK\1\2") + 28
    assert "ends inside an entry" in error_of(tmp_path, data[:at] + b"\xff" + data[at + 1 :])


def test_compression_is_refused_where_it_matters(tmp_path: Path) -> None:
    bomb = bytes(50_000_000)
    tracemalloc.start()
    text = error_of(tmp_path, archive([Member("a/data.pkl", bomb[:10_000_000], method=8)]))
    assert tracemalloc.get_traced_memory()[0] < 1_000_000
    tracemalloc.stop()
    assert "a/data.pkl is compressed" in text and "torch.save" in text
    assert "byteorder is compressed" in error_of(tmp_path, archive([PICKLE, Member("a/byteorder", bomb, method=8)]))
    value = zip_file(tensor(np.zeros(4)))
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(value)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            method = zipfile.ZIP_DEFLATED if name == "archive/data/0" else zipfile.ZIP_STORED
            target.writestr(name, source.read(name), method)
    assert "archive/data/0 is compressed" in error_of(tmp_path, out.getvalue())


def test_a_long_byteorder(tmp_path: Path) -> None:
    assert "the limit is 16" in error_of(tmp_path, archive([PICKLE, Member("a/byteorder", b"x" * 17)]))


@pytest.mark.parametrize("wide", [True, False])
def test_what_zipfile_writes_and_reads(tmp_path: Path, wide: bool) -> None:
    members = {"a/": b"", "a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(range(200)), "a/é": b""}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name, data in members.items():
            if wide and data:
                with target.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                    member.write(data)
            else:
                target.writestr(name, data)
        target.comment = b"PK\5\6" * 7
    file = File(put(tmp_path, out.getvalue()))
    del members["a/"]  # a folder
    assert {name: read_entry(file, entry, 1000) for name, entry in read_archive(file).items()} == members
    assert load(file.path) == {}
    ours = archive([Member(name, data) for name, data in members.items()], wide=wide)
    with zipfile.ZipFile(io.BytesIO(ours)) as source:
        assert {name: source.read(name) for name in source.namelist()} == members and source.testzip() is None


def test_sizes_of_zip64(tmp_path: Path) -> None:
    size = 5 << 30
    path = tmp_path / "sparse.pt"
    wide = struct.pack("<2H3Q", 1, 24, size, size, 0)
    full = {"size": 2**32 - 1, "packed": 2**32 - 1, "at": 2**32 - 1}
    data = archive([Member("a/data/0", b"", central=full | {"extra": wide})])
    head, tail = data.index(b"PK\7\x08"), data.index(b"PK\1\2")
    directory = data[tail : data.index(b"PK\6\6")]
    with path.open("wb") as file:
        file.write(data[:head])
        file.seek(size, 1)
        end = archive([], end={"count": 1, "size": len(directory), "start": file.tell()})
        locator = end.index(b"PK\6\7")
        file.write(directory + end[: locator + 8])
        file.write(struct.pack("<QI", head + size + len(directory), 1) + end[locator + 20 :])
    entry = read_archive(File(path))["a/data/0"]
    assert (entry.start, entry.size) == (head, size)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_files, "MAX_ENTRIES", 1)
    assert "lists 2 entries" in error_of(tmp_path, archive([PICKLE, data_member()]))
    monkeypatch.setattr(zip_files, "MAX_DIRECTORY_BYTES", 50)
    assert "lists 1 entries in 56 bytes" in error_of(tmp_path, archive([PICKLE]))


def test_large_reads_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_READ_BYTES", 7)
    values = np.arange(100, dtype=np.int16)
    assert load(put(tmp_path, zip_file(tensor(values)))).read().tolist() == values.tolist()


def test_without_preadv_as_on_a_mac_the_same_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((70, 90)).astype(np.float32)
    path = tmp_path / "a.pt"
    path.write_bytes(zip_file({"a": tensor(values)}))
    monkeypatch.delattr(tensors.os, "preadv", raising=False)
    np.testing.assert_array_equal(load(path)["a"].read(), values)
