"""JSON files: what cannot be read is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from elm_mlx import json_files
from elm_mlx.errors import InputError


def test_what_a_file_holds(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "Grüße"}', encoding="utf-8")
    assert json_files.read(tmp_path / "a.json") == json_files.read_object(tmp_path / "a.json") == {"text": "Grüße"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "no JSON object"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json: .*{message}"):
        json_files.read_object(path)
