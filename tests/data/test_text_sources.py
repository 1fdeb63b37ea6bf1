"""Sources: their files found, read lazily from anywhere, each document of one shard, damage named."""

from __future__ import annotations

import gzip
import json
import os
import sys
import types
from collections import Counter
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest
import texts
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.data import text_sources
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.data.text_sources import Broken, Position, Raw, TextFiles, TextSource, documents
from elm_mlx.errors import ElmError, InputError


def in_order(epoch: int, count: int) -> list[int]:
    return list(range(count))


def backwards(epoch: int, count: int) -> list[int]:
    return list(range(count))[:: -1 if epoch % 2 else 1]


def read(path: Path, key: str = "text", separator: str | None = None, start: int = 0) -> list[tuple[int, str, Any]]:
    """Documents, their places without the path, and lines of JSON parsed."""
    found = []
    for number, where, content in documents(path, key, separator, start):
        value = json.loads(content)[key] if isinstance(content, bytes) else content
        found.append((number, where.removeprefix(f"{path}").removeprefix(", "), value))
    return found


def epochs(files: TextFiles, count: int, **options: Any) -> list[Raw]:
    """The first epochs' documents."""
    return list(takewhile(lambda raw: raw.position.epoch < count, files.read(Position(), backwards, **options)))


class TestFiles:
    def test_a_file_a_directory_and_a_glob(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        names = ["b.jsonl", "a.json.gz", "deep/c.txt", "deep/d.parquet", "notes.md", ".hidden/e.jsonl", ".f.jsonl"]
        names += ["valid.jsonl", "deep/Test-00000-of-00001.parquet", "validation.json.gz", "testing.md"]
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("")

        def found(pattern: str) -> list[str]:
            return [path.name for path in TextFiles(TextSource(pattern)).paths]

        assert found(f"{tmp_path}/b.jsonl") == ["b.jsonl"]
        assert found(str(tmp_path)) == ["a.json.gz", "b.jsonl", "c.txt", "d.parquet"]
        assert found(f"{tmp_path}/*.jso*") == ["a.json.gz", "b.jsonl", "valid.jsonl", "validation.json.gz"]
        assert found(f"{tmp_path}/**/[cd].*") == ["c.txt", "d.parquet"]
        monkeypatch.chdir(tmp_path)
        assert found("deep") == ["c.txt", "d.parquet"] and found("deep/c*") == ["c.txt"]
        monkeypatch.setenv("HOME", str(tmp_path))
        assert found("~/b.jsonl") == ["b.jsonl"]

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("nowhere.jsonl", "nowhere.jsonl: no such file or directory, and no file matches it"),
            ("*.jsonl", "no such file"),
            ("notes.md", "notes.md: not a kind of data file that can be read: .jsonl, "),
            ("*", "notes.md: not a kind of data file"),
            ("", "holds no data files, which are .jsonl, "),
        ],
    )
    def test_what_is_not_there(self, tmp_path: Path, pattern: str, message: str) -> None:
        (tmp_path / "notes.md").write_text("")
        with pytest.raises(InputError) as caught:
            TextFiles(TextSource(str(tmp_path / pattern)))
        assert message in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "a path or a dataset"),
            ({"path": "a", "dataset": "b"}, "a path or a dataset"),
            ({"path": "a", "weight": 0}, "a: its weight must be above 0, not 0"),
            ({"path": "a", "weight": float("nan")}, "must be above 0, not nan"),
            ({"path": "a", "weight": float("inf")}, "must be above 0, not inf"),
            ({"path": "a", "key": ""}, "a: its key is empty"),
            ({"path": "a", "separator": ""}, "a: its separator is empty"),
        ],
    )
    def test_sources_that_will_not_do(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            TextSource(**options)

    def test_the_fingerprint(self, tmp_path: Path) -> None:
        path = texts.write(tmp_path / "a.jsonl", ["a", "b"])
        before = TextFiles(TextSource(str(path))).fingerprint()
        os.utime(path, (1, 1))
        (tmp_path / "moved").mkdir()
        moved = texts.write(tmp_path / "moved" / "a.jsonl", ["a", "b"])
        assert (
            TextFiles(TextSource(str(path), weight=3)).fingerprint()
            == before
            == TextFiles(TextSource(str(moved))).fingerprint()
        )
        assert TextFiles(TextSource(str(path), key="b")).fingerprint() != before
        texts.write(path, ["a", "b", "c"])
        assert TextFiles(TextSource(str(path))).fingerprint() != before


class TestDocuments:
    def test_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\r\n\n{"text": "b"}')
        assert read(path) == [(1, "line 2", "a"), (3, "line 4", "b")]
        assert read(path, start=2) == [(3, "line 4", "b")] and read(path, start=4) == []

    def test_an_array(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json.gz"
        path.write_bytes(gzip.compress(b'[{"text": "a"},\n{"text": 3},\n{"text": "c"}]'))
        (first, bad, last) = read(path)
        assert (first, last) == ((0, "line 1", "a"), (2, "line 3", "c"))
        assert bad[:2] == (1, "line 2") and str(bad[2]) == "`text` is a number, not a string"
        assert read(path, start=2) == [last]

    def test_rows(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table({"body": ["a", None, "c"]}), path, row_group_size=2)
        first, bad, last = read(path, "body")
        assert (first, last) == ((0, "row 1 (row group 0)", "a"), (2, "row 3 (row group 1)", "c"))
        assert isinstance(bad[2], BadRecord) and str(bad[2]) == "`body` is null, not a string"
        assert read(path, "body", start=2) == [last]
        ((_, _, broken),) = read(path, "text")
        assert isinstance(broken, Broken) and str(broken) == f"{path}: has no column `text`; it has `body`"

    def test_a_text_file_is_a_document(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("\ufeffnaïve\r\n\r\nb\n".encode())
        assert read(tmp_path / "a.txt") == [(0, "", "naïve\n\nb\n")] and read(tmp_path / "a.txt", start=1) == []
        (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"ok \xff"))
        assert str(read(tmp_path / "b.txt.gz")[0][2]) == "not UTF-8 at byte 4"

    def test_a_text_file_of_several(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("<end>\na\nb\n<end>\n \n<end>\nc <end>\nd\n<end> \n")
        assert read(path, separator="<end>") == [(0, "line 2", "a\nb\n"), (1, "line 7", "c <end>\nd\n")]
        assert read(path, separator="<end>", start=1) == [(1, "line 7", "c <end>\nd\n")]

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
    def test_a_gzip_that_is_cut_short(self, tmp_path: Path, name: str) -> None:
        lines = b"".join(b'{"text": "%d"}\n' % number for number in range(30_000))
        (tmp_path / name).write_bytes(gzip.compress(lines)[:-3000])
        *whole, (number, _, broken) = read(tmp_path / name)
        assert isinstance(broken, Broken) and str(broken).startswith(f"{tmp_path / name}: damaged gzip: ")
        assert [value for _, _, value in whole] == [str(i) for i in range(len(whole))] and number == len(whole)
        assert bool(whole) == (name == "a.jsonl.gz")  # what came before the damage is of use

    def test_a_file_that_is_gone(self, tmp_path: Path) -> None:
        ((_, _, broken),) = read(tmp_path / "a.jsonl")
        assert str(broken) == f"{tmp_path}/a.jsonl: cannot be read: No such file or directory"


class TestReading:
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 4), st.sampled_from([1, 2, 16]))
    @settings(max_examples=40)
    def test_shards_have_each_document_once(self, sizes: list[int], shards: int, many: int) -> None:
        """In every epoch, whether they share files or documents."""
        sizes = [*sizes, *[shards] * max(shards, many * shards)]
        files, kept, many_kept = TextFiles.__new__(TextFiles), text_sources.documents, text_sources._MANY
        files.source, files.paths = TextSource("x"), [Path(str(number)) for number in range(len(sizes))]
        text_sources.documents = lambda path, key, separator, start: (  # type: ignore[assignment]
            (i, f"{path}.{i}", "") for i in range(start, sizes[int(str(path))])
        )
        text_sources._MANY = many
        try:
            found = [raw for shard in range(shards) for raw in epochs(files, 3, shard=shard, shards=shards)]
        finally:
            text_sources.documents, text_sources._MANY = kept, many_kept
        expected = Counter(
            (epoch, f"{file}.{i}") for epoch in range(3) for file, size in enumerate(sizes) for i in range(size)
        )
        assert Counter((raw.position.epoch, raw.where) for raw in found) == expected

    def test_the_order_is_as_given_and_it_begins_anywhere(self, tmp_path: Path) -> None:
        for name, count in (("a", 3), ("b", 1), ("c", 2)):
            texts.write(tmp_path / f"{name}.jsonl", [name] * count)
        files = TextFiles(TextSource(str(tmp_path)))
        every = epochs(files, 2)
        assert [Path(raw.where.partition(",")[0]).stem for raw in every] == [*"aaabcc", *"ccbaaa"]
        assert [vars(raw.position) for raw in every[5:7]] == [
            {"epoch": 0, "file": 2, "number": 1}, {"epoch": 1, "file": 0, "number": 0},
        ]  # fmt: skip
        for at, raw in enumerate(every):
            assert list(islice(files.read(raw.position, backwards), len(every) - at)) == every[at:]

    def test_what_is_skipped_is_still_told(self, tmp_path: Path) -> None:
        texts.write(tmp_path / "a.jsonl", ["a", "b"])
        files = TextFiles(TextSource(str(tmp_path)))
        raws = epochs(files, 1, skipped=lambda file, number: (file, number) == (0, 1))
        assert [raw.content for raw in raws] == [b'{"text": "a"}', None]

    def test_files_that_hold_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("\n\n")
        with pytest.raises(InputError, match=r"holds no documents$"):
            next(TextFiles(TextSource(str(tmp_path))).read(Position(), in_order))
        texts.write(tmp_path / "a.jsonl", ["a"])
        with pytest.raises(InputError, match="holds no documents for each process"):
            list(islice(TextFiles(TextSource(str(tmp_path))).read(Position(), in_order, 1, 2), 1))


class TestHub:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        made: list[Any] = []

        class Stream:
            def __init__(self, rows: list[Any]) -> None:
                self.rows = rows

            def skip(self, count: int) -> Stream:
                made.append(count)
                return Stream(self.rows[count:])

            def __iter__(self) -> Any:
                for row in self.rows:
                    if row is None:
                        raise ConnectionError("the server\nis gone")
                    yield row

        def load_dataset(*arguments: Any, **options: Any) -> Stream:
            made.append((arguments, options))
            rows = [{"body": "a"}, {"body": "b"}, {"body": None}]
            return Stream([*rows, None] if arguments[1] == "broken" else rows)

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        return made

    def test_it_is_streamed_and_begins_anywhere(self, calls: list[Any]) -> None:
        files = TextFiles(TextSource(dataset="some/texts", subset="en", split="valid", key="body"))
        raws = list(islice(files.read(Position(), in_order), 4))
        assert calls[0] == (("some/texts", "en"), {"split": "valid", "streaming": True})
        assert [raw.content for raw in raws[:2]] == ["a", "b"] and raws[1].where == "some/texts, row 2"
        assert isinstance(raws[2].content, BadRecord) and raws[3].position == Position(1, 0, 0)
        assert next(files.read(Position(0, 0, 1), in_order)) == raws[1] and calls[-1] == 1

    def test_what_goes_wrong_there(self, calls: list[Any]) -> None:
        raws = list(
            islice(TextFiles(TextSource(dataset="t", subset="broken", key="body")).read(Position(), in_order), 4)
        )
        assert str(raws[3].content) == "t: cannot be streamed on: the server is gone"

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ElmError, match=r"some/texts: streaming needs datasets: pip install 'elm-mlx\[hub\]'"):
            TextFiles(TextSource(dataset="some/texts"))
