"""Packed files: whole ones read, damaged ones named; the rest is tested by what records are made of."""

from __future__ import annotations

import builtins
import gzip
import os
from pathlib import Path
from typing import Any

import pytest

from elm_mlx import reading
from elm_mlx.errors import ElmError, InputError
from elm_mlx.train import formats, records

LINES = b'{"text": "a"}\n' * 20_000  # more than is unpacked at once


def packed(*parts: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


@pytest.mark.parametrize("frames", [(LINES,), (LINES[:99], LINES[99:]), (b"", LINES), (LINES, b"")])
def test_zstandard_frames(tmp_path: Path, frames: tuple[bytes, ...]) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(packed(*frames))
    with formats.opened(tmp_path / "a.jsonl.zst") as file:
        assert file.read() == LINES
    assert len(records.read(tmp_path / "a.jsonl.zst")["train"].records) == 20_000


def test_a_zstandard_stream_without_its_size(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    (tmp_path / "a.json.zst").write_bytes(stream.compress(LINES) + stream.flush())
    with formats.opened(tmp_path / "a.json.zst") as file:
        assert file.read() == LINES


@pytest.mark.parametrize("keep", [1, 3, 9, -1, -4])
def test_zstandard_cut_short(tmp_path: Path, keep: int) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(packed(LINES)[:keep])
    with pytest.raises(InputError, match=r"a\.jsonl\.zst: damaged Zstandard: it is cut short"):
        records.read(tmp_path / "a.jsonl.zst")


def test_zstandard_by_name_alone(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(LINES)
    with pytest.raises(InputError, match=r"a\.jsonl\.zst: damaged Zstandard: "):
        records.read(tmp_path / "a.jsonl.zst")


def test_zstandard_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    real = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ElmError, match=r"a\.jsonl\.zst: Zstandard needs its package: pip install 'elm-mlx\[zstd\]'"):
        records.read(tmp_path / "a.jsonl.zst")


def test_parquet_from_a_row_on(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": [str(number) for number in range(2500)], "other": list(range(2500))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1100)
    every = list(formats.parquet(tmp_path / "a.parquet", ("text",)))
    assert [row for row, _, _ in every] == list(range(2500)) and every[1200] == (
        1200,
        1,
        {"text": "1200", "other": None},
    )
    for start in (0, 1, 1099, 1100, 2499, 2500, 9999):
        assert list(formats.parquet(tmp_path / "a.parquet", ("text",), start)) == every[start:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("begin", [b'{"text": "', b'[\n{"text": "'])
def test_a_line_or_a_file_that_no_text_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begin: bytes
) -> None:
    monkeypatch.setattr(formats, "LINE_BYTES", 1 << 20)
    monkeypatch.setattr(reading, "CORPUS_BYTES", 2 << 20)
    data = begin + b"a" * (3 << 20) + b'"}'
    pack = {"a.jsonl": bytes, "a.jsonl.gz": gzip.compress, "a.jsonl.zst": packed}[name]
    (tmp_path / name).write_bytes(pack(data))
    with pytest.raises(InputError, match=rf"{name}(, line 1: has more than 1 MB without an end|: more than \d MB)"):
        records.read(tmp_path / name)


def test_a_packed_array_may_not_be_a_thousand_times_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LINE_BYTES", 1 << 20)
    array = b"[\n" + b",\n".join([b'{"text": "a"}'] * 200_000) + b"]"
    (tmp_path / "a.json").write_bytes(array)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(array))
    assert len(records.read(tmp_path / "a.json")["train"].records) == 200_000
    with pytest.raises(InputError, match=r"a\.json\.gz: more than 1 MB, which only JSON lines"):
        records.read(tmp_path / "a.json.gz")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_utf_16_is_refused_by_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "a"}\n', encoding="utf-16")
    with formats.opened(tmp_path / name) as file, pytest.raises(InputError, match="not UTF-8 but UTF-16"):
        list(formats.lines(tmp_path / name, file))


def test_a_pipe_is_no_data_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="is no regular file"), formats.opened(tmp_path / "a.jsonl"):
        pass
