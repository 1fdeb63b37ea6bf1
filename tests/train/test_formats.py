"""Packed files: whole ones read, damaged ones named; the rest is tested by what records are made of."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

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
