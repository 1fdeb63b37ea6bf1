"""Whatever a path leads to: its bytes and text, or one line of error at once."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from elm_mlx import reading
from elm_mlx.errors import InputError


def refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def stdin_of(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_content_is_the_bytes_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert reading.content(tmp_path / "a", 3) == b"abc"
    refused(r"a: larger than 0 MB", lambda: reading.content(tmp_path / "a", 2))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(6 << 30)
    (tmp_path / "loop").symlink_to("loop")
    for path, message in (
        (tmp_path / "pipe", "is not a regular file"), (Path("/dev/zero"), "is not a regular file"),
        (tmp_path / "sparse", "larger than 64 MB"), (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "loop", "cannot be read: "), (tmp_path / "none", "cannot be read: No such file"),
        (Path("a\0b"), "is not a valid file name"), (Path("a\ud800"), "is not a valid file name"),
    ):  # fmt: skip
        refused(message, lambda path=path: reading.text(path))  # type: ignore[misc]


def test_limits_are_those_of_the_documentation_and_are_shown_as_there() -> None:
    limits = (reading.SETTINGS_BYTES, reading.TABLES_BYTES, reading.TEXT_BYTES, reading.CORPUS_BYTES)
    assert limits == (16 << 20, 1 << 20, 64 << 20, 1 << 30)
    assert [*map(reading.limit_size, limits)] == ["16 MB", "1 MB", "64 MB", "1 GB"]
    page = (Path(__file__).parents[1] / "docs" / "limits.md").read_text("utf-8")
    assert all(f" {reading.limit_size(each)} " in page for each in limits)


def test_a_shells_pipe_is_read() -> None:
    out, into = os.pipe()
    os.write(into, b"from a command\r\n")
    os.close(into)
    try:
        assert reading.text(Path(f"/dev/fd/{out}")) == "from a command\n"
    finally:
        os.close(out)


def test_files_that_say_they_are_empty_are_read() -> None:
    path = Path("/proc/self/status")
    if not path.exists():
        pytest.skip("there is no /proc here")
    assert "Name:" in reading.text(path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_text_is_the_same_however_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: bytes, end: bytes
) -> None:
    data = mark + "Grüße".encode() + end + "\ufeffa\rb".encode() + end
    (tmp_path / "a").write_bytes(data)
    stdin_of(monkeypatch, data)
    assert reading.text(tmp_path / "a") == reading.stdin_text() == "Grüße\n\ufeffa\rb\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\ncaf\xe9 noir", r"line 3: not UTF-8: byte 4 is 0xe9; save it as UTF-8 .*iconv"),
        (b"\xef\xbb\xbfa\n\xc3", r"line 2: not UTF-8: byte 1 is 0xc3"),
        ("a".encode("utf-16"), "not UTF-8 but UTF-16; save it as UTF-8"),
        (b"\xfe\xff\0a", "not UTF-8 but UTF-16"),
        ("ab".encode("utf-16-le"), "not UTF-8 but UTF-16"),
        ("ab".encode("utf-16-be"), "not UTF-8 but UTF-16"),
    ],
)
def test_other_encodings_are_named_with_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    (tmp_path / "a").write_bytes(data)
    stdin_of(monkeypatch, data)
    refused(f"a(, |: ){message}", lambda: reading.text(tmp_path / "a"))
    refused(f"stdin(, |: ){message}", reading.stdin_text)


def test_a_line_without_end_is_not_waited_for() -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            buffer[:] = b"y" * len(buffer)
            return len(buffer)

    file = io.BufferedReader(Endless())
    refused("here: has more than 1 MB without an end", lambda: reading.limited_line(file, 1 << 20, "here"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "no YAML mapping"),
        ("a: [", "not YAML with plain values"),
        ("a: 2021-13-45", "not YAML with plain values: month must be"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML with plain values"),
        ("a: &a [*a]", "more than 100,000 values"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ), "more than 100,000 values"),
        ("a: {x: 1, y: {b: 1, c: 2, b: 3}}", "line 1: the key b stands twice"),
        ("{" + ", ".join(f"k{i}: 1" for i in range(3000)) + ", k7: 1}", "the key k7 stands twice"),
        ("x: &x {" + ", ".join(f"k{i}: 1" for i in range(1000)) + "}\ny: {<<: [" + "*x, " * 101 + "]}",
         "more than 100,000 values"),
        ("x: &x {<<: *x}", "not YAML with plain values"),
        ("[" * 50_000, "not YAML with plain values"),
        ("a: " + "9" * 5000, "not YAML with plain values"),
    ],
)  # fmt: skip
def test_yaml_is_a_mapping_of_plain_values(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &x {b: 1.5}\nc: *x\n")
    assert reading.yaml_mapping(path) == {"a": {"b": 1.5}, "c": {"b": 1.5}}
    path.write_text(text)
    refused(rf"a\.yaml: {'.*' + message}", lambda: reading.yaml_mapping(path))


def test_yaml_keys_that_are_merged_and_said_anew_are_no_keys_said_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("all:\n  a: &a {rank: 1, seed: 1}\n  b: &b {<<: *a, rank: 2}\nrun: {<<: *b, seed: 3}\n")
    assert reading.yaml_mapping(path)["run"] == {"rank": 2, "seed": 3}
