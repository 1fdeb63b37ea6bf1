"""JSON files: what cannot be read is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from elm_mlx import reading
from elm_mlx.errors import InputError


def test_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"text":\r\n "Gr\xc3\xbc\xc3\x9fe"}')
    assert reading.json_value(path) == reading.json_object(path) == {"text": "Grüße"}
    assert reading.json_object_if_there(path) == {"text": "Grüße"}
    assert reading.json_object_if_there(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"{", "not JSON"),
        (b"\xff", "line 1: not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "not JSON: lists or objects are nested too deep"),
        (b'{"a": ' * 101 + b"1" + b"}" * 101, "not JSON: lists or objects are nested too deep"),
        (b'{"a": ' + b"9" * 200 + b"}", "not JSON: a whole number of 200 digits"),
        (b'{"a": -' + b"9" * 5000 + b"}", "not JSON: a whole number of 5,001 digits"),
        (b"[1]", "no JSON object"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json.*{message}"):
        reading.json_object(path)


def test_brackets_in_texts_and_lists_side_by_side_are_not_deep() -> None:
    assert reading.load_json('["' + "[{" * 500 + '"]') == ["[{" * 500]
    assert reading.load_json("[" + "[]," * 500 + "1]")[-1] == 1
    deep = "[" * 100 + "]" * 100
    assert str(reading.load_json(deep)) == deep
