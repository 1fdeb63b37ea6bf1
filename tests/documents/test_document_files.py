"""Which files of a directory are documents, and their text in any encoding."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elm_mlx.documents import document_files
from elm_mlx.documents.document_files import LeftOut, text_of, walk
from elm_mlx.errors import InputError


def found(directory: Path) -> tuple[list[str], list[LeftOut]]:
    left_out: list[LeftOut] = []
    return [path for path, _ in walk(directory, left_out.append)], left_out


def write(directory: Path, *paths: str) -> None:
    for path in paths:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text("text")


def test_hidden_files_other_kinds_and_links_are_left_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        "in/b/c.md",
        "in/a.TXT",
        "in/README",
        "in/.git/x.md",
        "in/.env",
        "in/photo.png",
        "in/node_modules/m.js",
    )
    write(tmp_path, "in/__pycache__/a.py", "secret.md", "outside/deep.md")
    (tmp_path / "in" / "link.md").symlink_to("../secret.md")
    (tmp_path / "in" / "folder").symlink_to("../outside")
    (tmp_path / "in" / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    assert found(tmp_path / "in") == (["README", "a.TXT", "b/c.md"], [])


def test_gitignore_is_followed_the_nearest_rule_first(tmp_path: Path) -> None:
    write(
        tmp_path,
        "a.md",
        "b.md",
        "build/x.md",
        "sub/a.md",
        "sub/b.md",
        "sub/build/y.md",
        "only/here.md",
        "sub/only/here.md",
    )
    (tmp_path / ".gitignore").write_text("# rules\na.md\nbuild/\n/only/\n")
    (tmp_path / "sub" / ".gitignore").write_text("!a.md\nb.*\n")
    assert found(tmp_path)[0] == ["b.md", "sub/a.md", "sub/only/here.md"]
    (tmp_path / ".gitignore").write_bytes(b"\xff\xfe\n[\n!\nb.md\n")
    assert "b.md" not in found(tmp_path)[0] and "a.md" in found(tmp_path)[0]


def test_no_rule_takes_long(tmp_path: Path) -> None:
    write(tmp_path, "a" * 100 + ".md", "d/" * 50 + "x.md", "e/f/gitted.md")
    (tmp_path / ".gitignore").write_text("*a" * 20 + "b\n" + "**/" * 20 + "b\n**/f*/*ted*\n")
    assert found(tmp_path)[0] == ["a" * 100 + ".md", "d/" * 50 + "x.md"]


def test_what_is_too_large_or_has_no_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_files, "MOST_TEXT", 3)
    write(tmp_path, "a.md", "b.pdf")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.md")).write_text("x")
    paths, left_out = found(tmp_path)
    assert paths == ["b.pdf"]
    assert [each.why for each in left_out] == ["has more than 0 MB", "its name is not UTF-8"]


def test_no_directory_is_too_deep(tmp_path: Path) -> None:
    write(tmp_path, *(f"{'d/' * depth}a.md" for depth in range(120)))
    paths, left_out = found(tmp_path)
    assert len(paths) == 101 and [each.why for each in left_out] == ["lies more than 100 directories deep"]


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no directory"):
        found(tmp_path / "none")


@pytest.mark.parametrize(
    ("data", "html", "text"),
    [
        ("für".encode(), False, "für"),
        ("\ufefffür\r\nb\rc".encode(), False, "für\nb\nc"),
        ("für".encode("utf-16"), False, "für"),
        ("\ufefffür".encode("utf-16-be"), False, "für"),
        ("für “so”".encode("cp1252"), False, "für “so”"),
        (b"a\x81b\0c", False, "a\ufffdbc"),
        ('<meta charset="iso-8859-7">λ'.encode("iso-8859-7"), True, '<meta charset="iso-8859-7">λ'),
        ("\ufeff<meta charset=iso-8859-1>café".encode(), True, "<meta charset=iso-8859-1>café"),
        (b"<meta charset=utf-16>even", True, "<meta charset=utf-16>even"),
        ("<meta charset=gb2312>朱镕基".encode("gbk"), True, "<meta charset=gb2312>朱镕基"),
        ("<meta charset=Shift_JIS>①".encode("cp932"), True, "<meta charset=Shift_JIS>①"),
        ("<meta charset=iso-8859-1>it’s".encode("cp1252"), True, "<meta charset=iso-8859-1>it’s"),
        (b"<meta charset=utf-7>+2AA-", True, "<meta charset=utf-7>+2AA-"),
        (b"<meta charset=punycode>-" + b"a" * 1_000_000, True, "<meta charset=punycode>-" + "a" * 1_000_000),
        (b"<meta charset=base64>x", True, "<meta charset=base64>x"),
        (b"<meta charset='no-such'>\xfc", True, "<meta charset='no-such'>ü"),
    ],
)
def test_encodings(data: bytes, html: bool, text: str) -> None:
    assert text_of(data, html) == text
