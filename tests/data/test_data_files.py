"""Data files: splits and shards by name, every layout of JSON, packed files, Parquet; damaged ones are named."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import texts

from elm_mlx import reading
from elm_mlx.data import data_files, packed_files, parquet_rows, text_sources
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.data.split_files import Name, find, is_held_out, name_of
from elm_mlx.errors import ElmError, InputError

LINES = b'{"text": "a"}\n' * 20_000  # more than is unpacked at once


def values(path: Path) -> list[tuple[int, Any]]:
    """Each value and its line."""
    return [
        (int(where.removeprefix(f"{path}, line ").partition(",")[0]), value)
        for _, where, value in data_files.read(path, ())
    ]


def packed(*parts: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


@pytest.mark.parametrize("frames", [(LINES,), (LINES[:99], LINES[99:]), (b"", LINES), (LINES, b"")])
def test_zstandard_frames(tmp_path: Path, frames: tuple[bytes, ...]) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(packed(*frames))
    with packed_files.open_file(tmp_path / "a.jsonl.zst") as file:
        assert file.read() == LINES
    assert len(texts.records(tmp_path / "a.jsonl.zst")["train"].records) == 20_000


def test_a_zstandard_stream_without_its_size(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    (tmp_path / "a.json.zst").write_bytes(stream.compress(LINES) + stream.flush())
    with packed_files.open_file(tmp_path / "a.json.zst") as file:
        assert file.read() == LINES


@pytest.mark.parametrize("keep", [1, 3, 9, -1, -4])
def test_zstandard_cut_short(tmp_path: Path, keep: int) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(packed(LINES)[:keep])
    with pytest.raises(InputError, match=r"a\.jsonl\.zst: damaged Zstandard: it is cut short"):
        texts.records(tmp_path / "a.jsonl.zst")


def test_zstandard_by_name_alone(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(LINES)
    with pytest.raises(InputError, match=r"a\.jsonl\.zst: damaged Zstandard: "):
        texts.records(tmp_path / "a.jsonl.zst")


def test_zstandard_without_its_package(tmp_path: Path, without: Callable[[str], None]) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    without("zstandard")
    with pytest.raises(ElmError, match=r"a\.jsonl\.zst: Zstandard needs its package: pip install 'elm-mlx\[zstd\]'"):
        texts.records(tmp_path / "a.jsonl.zst")


def test_a_parquet_columns_name_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "d\u00e9tail": ["b"]}), path)
    path.write_bytes(path.read_bytes().replace("d\u00e9tail".encode(), b"d\xed\xa9tail"))
    with pytest.raises(InputError, match=r"a\.parquet: not Parquet that can be read: "):
        list(data_files.read(path, ("text",)))


def test_parquet_from_a_row_on(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": [str(number) for number in range(2500)], "other": list(range(2500))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1100)
    every = list(data_files.read(tmp_path / "a.parquet", ("text",)))
    assert [row for row, _, _ in every] == list(range(2500))
    assert every[1200] == (1200, f"{tmp_path}/a.parquet, row 1201 (row group 1)", {"text": "1200", "other": None})
    for start in (0, 1, 1099, 1100, 2499, 2500, 9999):
        assert list(data_files.read(tmp_path / "a.parquet", ("text",), start)) == every[start:]


@pytest.mark.parametrize("shape", ["text", "list", "fixed list", "struct", "map", "nulls"])
def test_rows_that_repeat_what_is_stored_once_are_counted_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """Up to a terabyte of text, of a few kilobytes: refused before a text is made of what is too much."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def column(count: int) -> Any:
        many = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["ab cd " * 170_000]))
        offsets = pa.array([0, count], pa.int32())
        if shape == "list":
            return pa.ListArray.from_arrays(offsets, many)
        if shape == "fixed list":
            return pa.FixedSizeListArray.from_arrays(many, 3)
        if shape == "map":
            return pa.MapArray.from_arrays(offsets, pa.array(range(count)), many)
        if shape == "nulls":
            return pa.nulls(40_000 * count, pa.string())
        return many if shape == "text" else pa.StructArray.from_arrays([many], ["content"])

    made: list[int] = []
    real = parquet_rows._row_values

    def recorded(batch: Any) -> list[Any]:
        made.append(len(batch))
        return real(batch)

    monkeypatch.setattr(parquet_rows, "_row_values", recorded)
    monkeypatch.setattr(packed_files, "LINE_BYTES", 8 << 20)
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": column(3)}), path, compression="zstd")
    rows = list(data_files.read(path, ("text",)))
    assert len(rows) == sum(made) > 0
    made.clear()
    parquet.write_table(pa.table({"text": column(1_000_000 if shape in ("list", "map") else 600)}), path)
    with pytest.raises(InputError, match=r"a\.parquet, row \d+: rows unpack to more than \d+ MB, over 100 times"):
        for _ in data_files.read(path, ("text",)):
            pass
    assert sum(made) < 200_000 if shape == "nulls" else not made


def test_a_parquet_file_reads_alike_whether_its_texts_are_counted_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "s": pa.array(["é", None, "b"] * 50),
        "large": pa.array(["a", "b", None] * 50, pa.large_string()),
        "bytes": pa.array([b"a", b"\xff", None] * 50),
        "decimal": pa.array([Decimal("1.5")] * 150),
        "map": pa.array([[("k", "v"), ("k", "w")], None, []] * 50, pa.map_(pa.string(), pa.string())),
        "lists": pa.array([["a", "b"], None, []] * 50, pa.large_list(pa.string())),
        "turns": pa.array([[{"role": "user", "content": "x"}], None, [None, {"role": None}]] * 50),
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    counted = list(data_files.read(tmp_path / "a.parquet", tuple(columns)))
    monkeypatch.setattr(parquet_rows, "_COUNTED_FIRST", -1)
    assert list(data_files.read(tmp_path / "a.parquet", tuple(columns))) == counted and len(counted) == 150


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.jsonl.zst", "a.csv.zst"])
def test_a_packed_file_of_a_hundred_times_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(packed_files, "LINE_BYTES", 1 << 20)
    text = "aaa " * 500
    line = (f'{{"text": "{text}"}}\n' if "jsonl" in name else f"{text}\n").encode()
    for size, refused in ((1 << 20, False), (4 << 20, True)):
        data = b"text\n" * ("csv" in name) + line * (size // len(line) - 2)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else packed(data))
        rows = data_files.read(tmp_path / name, ("text",))
        if refused:
            with pytest.raises(
                InputError, match=rf"{name}: more than \d MB unpacked, over 100 times the file: unpack it"
            ):
                list(rows)
        else:
            assert {value["text"] for _, _, value in rows} == {text}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("begin", [b'{"text": "', b'[\n{"text": "'])
def test_a_line_or_a_file_that_no_text_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begin: bytes
) -> None:
    monkeypatch.setattr(packed_files, "LINE_BYTES", 1 << 20)
    monkeypatch.setattr(reading, "CORPUS_BYTES", 2 << 20)
    data = begin + b"a" * (3 << 20) + b'"}'
    pack = {"a.jsonl": bytes, "a.jsonl.gz": gzip.compress, "a.jsonl.zst": packed}[name]
    (tmp_path / name).write_bytes(pack(data))
    with pytest.raises(InputError, match=rf"{name}(, line 1: has more than 1 MB without an end|: more than \d MB)"):
        texts.records(tmp_path / name)


def test_a_packed_array_may_not_be_a_thousand_times_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_files, "LINE_BYTES", 1 << 20)
    array = b"[\n" + b",\n".join([b'{"text": "a"}'] * 200_000) + b"]"
    (tmp_path / "a.json").write_bytes(array)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(array))
    assert len(texts.records(tmp_path / "a.json")["train"].records) == 200_000
    with pytest.raises(InputError, match=r"a\.json\.gz: more than 1 MB unpacked, over 100 times the file: unpack it"):
        texts.records(tmp_path / "a.json.gz")


def test_a_parquet_row_group_may_not_be_a_thousand_times_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(packed_files, "LINE_BYTES", 1 << 20)
    table = pyarrow.table({"text": ["a" * (1 << 20)] * 4, "text.b": ["b"] * 4})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(InputError, match=r"a\.parquet: row group 0 unpacks to 4 MB, over 100 times its size"):
        list(data_files.read(tmp_path / "a.parquet", ("text",)))
    assert len(list(data_files.read(tmp_path / "a.parquet", ("text.b",)))) == 4


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_utf_16_is_refused_by_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "a"}\n', encoding="utf-16")
    with packed_files.open_file(tmp_path / name) as file, pytest.raises(InputError, match="not UTF-8 but UTF-16"):
        list(packed_files.lines(tmp_path / name, file))


def test_a_pipe_is_no_data_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="is not a regular file"), packed_files.open_file(tmp_path / "a.jsonl"):
        pass


A, B, C = {"text": "a"}, {"text": "b\nö"}, {"messages": [{"role": "user", "content": "a"}]}


def indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


LAYOUTS = {
    "lines": json.dumps(A) + "\n\n" + json.dumps(B) + "\n" + json.dumps(C),
    "array": json.dumps([A, B, C]),
    "indented array": indented([A, B, C]),
    "indented objects": "\n".join(map(indented, (A, B, C))),
    "objects on a line": json.dumps(A) + json.dumps(B) + " " + json.dumps(C) + "\n",
    "objects with commas": ",\n".join(map(json.dumps, (A, B, C))),
    "indented objects with commas": ",\n".join(map(indented, (A, B, C))),
    "under a key": json.dumps({"version": 1, "data": [A, B, C], "about": {"data": [1]}}),
    "under a key, indented": "\n " + indented({"tags": ["x"], "empty": [], "train": [A, B, C], "license": None}),
    "under a key, a line each": '{"rows": [\n' + ",\n".join(map(json.dumps, (A, B, C))) + "\n]}",
}


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_in_every_layout(tmp_path: Path, layout: str, packing: str) -> None:
    path, text = tmp_path / f"a.json{packing}", LAYOUTS[layout]
    path.write_bytes(gzip.compress(text.encode()) if packing else text.encode())
    found = values(path)
    assert [value for _, value in found] == [A, B, C]
    for number, value in found:  # each begins on the line that is said
        line = text.split("\n")[number - 1]
        assert line.lstrip(" [,").startswith("{") and (len(line) < 20 or json.dumps(next(iter(value))) in line)
    documents = list(text_sources.documents(path, "text", None))
    parsed = [
        content if not isinstance(content, bytes) else data_files.parse_line(content) for _, _, content in documents
    ]
    assert parsed[:2] in ([A, B], ["a", "b\nö"]) and len(parsed) == 3
    later = text_sources.documents(path, "text", None, documents[1][0])
    assert list(map(repr, later)) == list(map(repr, documents[1:]))


@pytest.mark.parametrize(
    "value", [A, C, {"prompt": "a", "completion": "b", "notes": [{"by": "c"}]}, {"data": []}, {"a": [1]}]
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_a_record(tmp_path: Path, value: Any, indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    assert values(tmp_path / "a.json") == [(1, value)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "data": [\n  {"a": 1},\n  {"b": }\n ]\n}', "line 4, column 9: not JSON: Expecting value"),
        ('{\n "text": "a"\n', "line 3, column 1: not JSON: Expecting"),
        ('{"data": [\n{"a": 1}', "line 2, column 9: not JSON: Expecting ',' delimiter"),
        ('{\n"text": "a"\n}\n{"text": }\n', "line 4, column 10: not JSON: Expecting value"),
        ('{\n"text": "a",\n"text": "b"}', "line 1, column 1: not JSON: an object has the key 'text' twice"),
        (
            json.dumps({"train": [A], "validation": [A]}),
            "holds lists of objects under `train` and `validation`: write each",
        ),
    ],
)
def test_what_is_wrong_beyond_a_line_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError) as caught:
        values(tmp_path / "a.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ('[{"a": 1}, {"a": 2}]', ["line 1, record 1", "line 1, record 2"]),
        ('[{"a": 1}]', ["line 1"]),
        (
            '[{"a": 1},\n{"a": 2}, {"a": 3},\n{"a": 4}\n]\n',
            ["line 1", "line 2, record 2", "line 2, record 3", "line 3"],
        ),
        ('[\n  {\n"a": 1\n}, {\n"a": 2\n}\n]', ["line 2", "line 4"]),
        ('{"data": [{"a": 1},{"a": 2}]}', ["line 1, record 1", "line 1, record 2"]),
    ],
)
def test_records_that_share_a_line_are_numbered(tmp_path: Path, text: str, places: list[str]) -> None:
    """As in the one line that ChatGPT's export is."""
    (tmp_path / "a.json").write_text(text)
    found = [where for _, where, _ in data_files.read(tmp_path / "a.json", ())]
    assert found == [f"{tmp_path}/a.json, {place}" for place in places]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"} x', "not JSON: Extra data at column 15"),
        ('{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
        ('{"text": "a"} {"text": "b"}', "another object begins at column 15: each needs a line of its own"),
        ('{"text": "a", "text": "b"}', "not JSON: an object has the key 'text' twice"),
    ],
)
def test_a_bad_line_among_others_is_one_bad_record(tmp_path: Path, line: str, reason: str) -> None:
    for place in (0, 1, 2):
        if place == 0 and "another" in reason:
            continue  # begins a file of objects in a row
        lines = [json.dumps(A), json.dumps(B)]
        lines.insert(place, line)
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        found = values(tmp_path / "a.jsonl")
        bad = found.pop(place)
        assert isinstance(bad[1], BadRecord) and str(bad[1]) == reason and bad[0] == place + 1
        assert [value for _, value in found] == [A, B]


class TestParquet:
    """A column that holds no text, or what Python cannot hold, is refused by row."""

    @pytest.fixture
    def bad_of(self, tmp_path: Path) -> Callable[[Any], list[str]]:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        def call(columns: dict[str, Any]) -> list[str]:
            parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
            return [line.partition("row ")[2] for line in texts.records(tmp_path / "a.parquet")["train"].bad]

        return call

    def test_columns_of_another_type(self, bad_of: Callable[[Any], list[str]]) -> None:
        values = {
            "a number": [1, 2.5, Decimal("1.5")], "bytes": [b"a"], "a datetime": [datetime(2026, 1, 1)],
            "a list": [["a"]], "an object": [{"a": "b"}], "true": [True],
        }  # fmt: skip
        for kind, each in values.items():
            for value in each:
                assert bad_of({"text": [value]}) == [f"1 (row group 0): `text` is {kind}, not a string"]
                reason = f"1 (row group 0): `input` is {kind}, not a string"
                assert bad_of({"instruction": ["a"], "input": [value], "output": ["b"]}) == [reason]

    def test_nulls(self, bad_of: Callable[[Any], list[str]]) -> None:
        assert bad_of({"text": [None, "a"]}) == ["1 (row group 0): `text` is null, not a string"]
        assert bad_of({"instruction": ["a"], "input": [None], "output": ["b"], "system": [None], "tools": [None]}) == []

    def test_nested_messages(self, bad_of: Callable[[Any], list[str]]) -> None:
        turns = [{"role": "user", "content": "a", "weight": None}, {"role": "assistant", "content": "b", "weight": 1.0}]
        assert bad_of({"messages": [turns]}) == []
        reasons = bad_of({"messages": [turns, None, [], [None, *turns], [turns[0] | {"content": None}, turns[1]]]})
        assert [reason.partition(": ")[2] for reason in reasons] == [
            "`messages` is not a list of objects", "a conversation needs a message",
            "`messages` is not a list of objects", "message 1: content is null, not a string",
        ]  # fmt: skip

    def test_what_python_cannot_hold(self, bad_of: Callable[[Any], list[str]]) -> None:
        import pyarrow

        bad = pyarrow.StringArray.from_buffers(
            1, pyarrow.py_buffer(bytes(4) + b"\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
        )
        mixed = pyarrow.concat_arrays([pyarrow.array(["a"]), bad, pyarrow.array(["b"])])
        (reason,) = bad_of({"text": mixed})
        assert reason.startswith("2 (row group 0): holds what cannot be read: 'utf-8' codec can't decode")

    def test_two_columns_of_one_name(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        arrays = [pyarrow.array(["a"])] * 2
        parquet.write_table(pyarrow.Table.from_arrays(arrays, names=["text", "text"]), tmp_path / "a.parquet")
        with pytest.raises(InputError, match="has the column `text` twice"):
            texts.records(tmp_path / "a.parquet")


SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".ndjson", ".parquet")
HASH = "a09b74b3ef9c3b56"


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root: Path, *names: str) -> dict[str, list[str]]:
    splits = find(make(root, *names), SUFFIXES)
    return {split: [str(path.relative_to(root)) for path in files.paths] for split, files in splits.items()}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("train.jsonl", Name("train")),
        ("TRAIN.JSONL", Name("train")),
        ("val.ndjson", Name("valid")),
        ("Validation.json", Name("valid")),
        ("dev.jsonl.gz", Name("valid")),
        ("eval.json", Name("valid")),
        ("test.parquet", Name("test")),
        ("train-00000-of-00002.parquet", Name("train", "", 0, 2)),
        (f"train-00001-of-00002-{HASH}.parquet", Name("train", "", 1, 2)),
        ("train_3.jsonl", Name("train", "", 3)),
        ("train.00012.jsonl.gz", Name("train", "", 12)),
        (f"train_sft-00000-of-00001-{HASH}.parquet", Name("train", "_sft", 0, 1)),
        ("train-v2.json", Name("train", "-v2")),
        ("training.json", None),
        ("trained-1.json", None),
        ("my-train.json", None),
    ],
)
def test_what_a_name_says(name: str, wanted: Name | None) -> None:
    suffix = max((each for each in SUFFIXES if name.lower().endswith(each)), key=len)
    assert name_of(Path(name), suffix) == wanted


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["train.jsonl", "dev.jsonl", "test.json"], ["train.jsonl"]),
        (["train.jsonl", ".DS_Store", "._train.jsonl", "README.md", "dataset_infos.json"], ["train.jsonl"]),
        (["train.jsonl", "train_old.jsonl", "train-raw.json", "train.jsonl.bak", "training.json"], ["train.jsonl"]),
        (["train_2.json", "train_10.json", "train_1.jsonl.gz"], ["train_1.jsonl.gz", "train_2.json", "train_10.json"]),
        ([f"train-0000{i}-of-00002-{HASH}.parquet" for i in (1, 0)],
         [f"train-0000{i}-of-00002-{HASH}.parquet" for i in (0, 1)]),
        (["train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"], ["train_sft-00000-of-00001.parquet"]),
        (["data/train-00000-of-00001.parquet", "README.md"], ["data/train-00000-of-00001.parquet"]),
        (["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl"], ["train/a.jsonl", "train/b.jsonl"]),
        (["train/part-10.parquet", "train/part-9.parquet"], ["train/part-9.parquet", "train/part-10.parquet"]),
        (["TRAIN/x.json", "Val/y.json"], ["TRAIN/x.json"]),
        (["data/default/train/0000.parquet", "data/default/test/0000.parquet"], ["data/default/train/0000.parquet"]),
        (["train/1/a.json", "train/2/a_1.json", "train/state.json"], ["train/1/a.json", "train/2/a_1.json"]),
        (["train/train-00000-of-00001.json"], ["train/train-00000-of-00001.json"]),
        (["train/books-00000-of-00001.json", "train/news-00000-of-00001.json"],
         ["train/books-00000-of-00001.json", "train/news-00000-of-00001.json"]),
        (["train.jsonl", "data/train.jsonl"], ["train.jsonl"]),
        (["train/test-questions.json", "train/test.json"], ["train/test-questions.json"]),
    ],
)  # fmt: skip
def test_the_files_to_train_on(tmp_path: Path, names: list[str], wanted: list[str]) -> None:
    assert found(tmp_path, *names)["train"] == wanted


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev", "eval", "VALID"])
def test_a_validation_by_any_name(tmp_path: Path, name: str) -> None:
    assert found(tmp_path, "train.jsonl", f"{name}.jsonl", "test.jsonl") == {
        "train": ["train.jsonl"], "valid": [f"{name}.jsonl"], "test": ["test.jsonl"],
    }  # fmt: skip
    assert found(tmp_path / "folders", "train/a.jsonl", f"{name}/b.jsonl")["valid"] == [f"{name}/b.jsonl"]


@pytest.mark.parametrize(
    ("names", "both"),
    [
        (["train.json", "train.jsonl"], "train.json and train.jsonl"),
        (["train.jsonl", "TRAIN.jsonl"], "TRAIN.jsonl and train.jsonl"),
        (["train.jsonl", "train-00000-of-00001.jsonl"], "train-00000-of-00001.jsonl and train.jsonl"),
        (["train.jsonl", "val.jsonl", "dev.jsonl"], "dev.jsonl and val.jsonl"),
        (["train.jsonl", "train/a.jsonl"], "train.jsonl and train/a.jsonl"),
        (["train_gen.jsonl", "train_sft.jsonl"], "train_gen.jsonl and train_sft.jsonl"),
        ([f"train-00000-of-00001-{HASH}.json", f"train-00000-of-00001-{HASH[::-1]}.json"], "0001-a"),
        (["train-00000-of-00001.json", "train-00000-of-00001.parquet"], ".json and train-00000-of-00001.parquet"),
        (["train-00000-of-00001.json", "train-00001-of-00002.json"], "train-00000-of-00001.json and train-00001-of"),
        (["train/a.jsonl", "train/a.json"], "train/a.json and train/a.jsonl"),
        (["en/train.jsonl", "fr/train.jsonl"], "en and fr both hold data"),
    ],
)
def test_of_two_none_is_guessed(tmp_path: Path, names: list[str], both: str) -> None:
    if len({name.lower() for name in names}) < len(names):
        make(tmp_path, *names)
        if len(list(tmp_path.iterdir())) < len(names):
            pytest.skip("this file system takes them for one")
    with pytest.raises(InputError) as caught:
        found(tmp_path, *names)
    assert both in str(caught.value)


def test_shards_that_are_not_there_are_told(tmp_path: Path) -> None:
    whole = find(make(tmp_path / "whole", "train-00000-of-00002.json", "train-00001-of-00002.json"), SUFFIXES)
    assert whole["train"].missing is None
    one = find(make(tmp_path / "one", "train-00000-of-00002.json"), SUFFIXES)
    assert one["train"].missing == "1 of 2 shards are here, train-00000-of-00002.json first; missing: 00001"
    few = find(make(tmp_path / "few", "train/x-00007-of-99999999999.json"), SUFFIXES)
    assert few["train"].missing == (
        "1 of 99,999,999,999 shards are here, x-00007-of-99999999999.json first; missing: 00000, 00001, 00002, 00003, "
        "00004, …"
    )


@pytest.mark.parametrize(
    "names", [[], ["valid.jsonl"], ["a/b/c/d/train.jsonl"], ["train.csv", "train.arrow"], [".train/a.json"]]
)
def test_nothing_to_train_on(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(InputError, match=r"holds no train\.jsonl, train\.json, .*pass it") as caught:
        found(tmp_path, *names)
    assert all(f"{name.partition('/')[0]}" in str(caught.value) for name in names if not name.startswith("."))


@pytest.mark.parametrize(
    ("path", "held_out"),
    [
        ("a.jsonl", False), ("train.jsonl", False), ("valid.jsonl", True), ("Test-00000-of-00001.parquet", True),
        ("val.txt", True), ("dev/a.txt", True), ("x/Validation/a.json", True), ("train/a.json", False),
        ("test_of_time.txt", False), ("test_sft-00000-of-00001.parquet", True), ("test-of-time.txt", True),
        ("testament.txt", False),
    ],
)  # fmt: skip
def test_what_raw_text_is_held_out(path: str, held_out: bool) -> None:
    suffix = ".txt" if path.endswith(".txt") else next(each for each in SUFFIXES if path.endswith(each))
    assert is_held_out(Path(path), suffix) is held_out


def test_a_folder_of_texts(tmp_path: Path) -> None:
    """Each is a record, by the folders of splits that they lie in."""
    files = {
        "b.txt": "B", "a.md": "A", "deep/er/c.TXT": "C\r\n", "valid/x/d.txt": "D", "test.txt": "E",
        "README.md": "about", ".hidden/f.txt": "F", "test_of_time.txt": "G", "e.png": "no text",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"Z"))
    found = texts.records(tmp_path)
    assert {name: [record.text for record in split.records] for name, split in found.items()} == {  # type: ignore[union-attr]
        "train": ["A", "B", "C\n", "G", "Z"], "valid": ["D"], "test": ["E"],
    }  # fmt: skip
    assert found["train"].records[0].where == str(tmp_path / "a.md")
    (tmp_path / "a.md").write_bytes(b"a\nb\xff")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_bytes(b"a text\nof\0zeros")
    bad = texts.records(tmp_path)["train"].bad
    assert bad == [
        f"{tmp_path}/a.md: line 2, byte 2: not UTF-8; {reading.AS_UTF8}",
        f"{tmp_path}/b.txt: `text` is white space alone",
        f"{tmp_path}/c.txt: line 2, byte 3: a byte 0, which no text has",
    ]
    assert [record.text for record in texts.records(tmp_path / "test.txt")["train"].records] == ["E"]  # type: ignore[union-attr]
    (tmp_path / "deep" / "some.jsonl").write_text('{"text": "not meant"}\n')
    with pytest.raises(InputError, match=r"holds no train\.jsonl"):
        texts.records(tmp_path)
