"""Files of records: every kind gives the same, and what is wrong is named by file and line."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from texts import records as read

from elm_mlx.data.records import FORMATS, Conversation, Instruction, PlainText, PromptAnswer, Record
from elm_mlx.errors import ElmError, InputError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say naïve, 漢字\u2028.", "input": "", "output": "naïve"},
    {"instruction": "Go on.", "input": None, "output": "No."},
]


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), "utf-8")
    return path


def bare(records: list[Record]) -> list[tuple[Any, ...]]:
    """Without where they stand."""
    return [tuple(value for name, value in vars(record).items() if name != "where") for record in records]


def write_jsonl(path: Path) -> None:
    lines(path, *ROWS)


def write_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2), "utf-8-sig")


def write_lines_zipped(path: Path) -> None:
    path.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in ROWS)))


def write_array_zipped(path: Path) -> None:
    path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if path.suffix == ".TSV" else ";")
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([row | {"id": 7} for row in ROWS]), path, row_group_size=2)


KINDS: list[tuple[str, Callable[[Path], None]]] = [
    ("a.jsonl", write_jsonl),
    ("a.json", write_array),
    ("a.json", write_jsonl),  # as Hugging Face's often are
    ("a.JSONL", write_jsonl),
    ("a.jsonl", write_array),
    ("a.json.gz", write_lines_zipped),
    ("a.json.gz", write_array_zipped),
    ("a.jsonl.gz", write_lines_zipped),
    ("a.parquet", write_parquet),
    ("a.csv", write_csv),
    ("a.TSV", write_csv),
]


# What is no text and, but for the last, counts as nothing in Python.
NO_TEXTS = [("0", "a number"), ("0.0", "a number"), ("false", "false"), ("[]", "a list"), ("{}", "an object"),
            ("7", "a number")]  # fmt: skip


class TestFiles:
    @pytest.mark.parametrize(("name", "write"), KINDS)
    def test_every_kind_of_file_gives_the_same(self, tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
        write(tmp_path / name)
        splits = read(tmp_path / name)
        assert list(splits) == ["train"] and splits["train"].bad == []
        assert bare(splits["train"].records) == [
            ("Add.", "1 and 2", "3"), ("Say naïve, 漢字\u2028.", "", "naïve"), ("Go on.", "", "No."),
        ]  # fmt: skip

    def test_where_a_line_stands(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\r\n\n{"text": "b"}')
        assert read(path)["train"].records == [PlainText(f"{path}, line 2", "a"), PlainText(f"{path}, line 4", "b")]

    def test_where_an_element_stands(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text('\n [\n{"text":\n "a"} ,\n\n {"text": "b"}, {"text": "c"}\n]\n')
        found = [(record.where.partition("line ")[2], *bare([record])[0]) for record in read(path)["train"].records]
        assert found == [("3", "a"), ("6, record 2", "b"), ("6, record 3", "c")]

    def test_where_a_row_stands(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a.parquet")
        wheres = [record.where.partition(", ")[2] for record in read(tmp_path / "a.parquet")["train"].records]
        assert wheres == ["row 1 (row group 0)", "row 2 (row group 0)", "row 3 (row group 1)"]

    def test_messages_in_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [{"messages": [USER, ASSISTANT | {"tool_calls": None}], "prompt": "no matter"}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        assert bare(read(tmp_path / "a.parquet")["train"].records) == [((USER, ASSISTANT), frozenset(), ())]

    def test_other_columns_are_guessed_of_a_table_and_hinted_at_elsewhere(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [{"id": "1", "question": "a", "answer": "b"}, {"id": "2", "question": "c", "answer": "d"}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        (tmp_path / "a.csv").write_text("id,question,answer\n1,a,b\n2,c,d\n")
        lines(tmp_path / "a.jsonl", *rows)
        for name in ("a.parquet", "a.csv"):
            split = read(tmp_path / name)["train"]
            assert bare(split.records) == [("a", "b"), ("c", "d")] and split.ignored == {"`id`": 2}
            (columns,) = split.columns
            assert "prompt = `question`, completion = `answer` (guessed" in columns
        hinted = read(tmp_path / "a.jsonl")["train"].bad
        option = "--columns prompt=question,completion=answer"
        assert len(hinted) == 2 and hinted[0].endswith(f"it has `id`, `question`, `answer`; {option} takes it")
        for name in ("a.parquet", "a.csv", "a.jsonl"):
            split = read(tmp_path / name, columns=[option.partition(" ")[2]])["train"]
            assert bare(split.records) == [("a", "b"), ("c", "d")] and split.ignored == {"`id`": 2}

    def test_parquet_without_pyarrow(self, tmp_path: Path, without: Callable[[str], None]) -> None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        without("pyarrow")
        with pytest.raises(ElmError, match=r"a\.parquet: Parquet needs pyarrow: pip install 'elm-mlx\[parquet\]'"):
            read(tmp_path / "a.parquet")

    def test_damaged_parquet(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a.parquet")
        data = (tmp_path / "a.parquet").read_bytes()
        for broken in (b"", b"PAR1", data[:-9], b"x" * 100):
            (tmp_path / "a.parquet").write_bytes(broken)
            with pytest.raises(InputError, match=r"a\.parquet: not Parquet that can be read"):
                read(tmp_path / "a.parquet")

    @pytest.mark.parametrize("keep", [5, 30])
    def test_gzip_cut_short(self, tmp_path: Path, keep: int) -> None:
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:keep])
        with pytest.raises(InputError, match=r"a\.json\.gz: damaged gzip"):
            read(tmp_path / "a.json.gz")

    def test_gzip_by_name_alone(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="damaged gzip"):
            read(lines(tmp_path / "a.jsonl.gz", {"text": "a"}))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[{"text": "a"},\n{"text": }]', "line 2, column 10: not JSON: Expecting value"),
            ('[{"text": "a"}\n{"text": "b"}]', "line 2, column 1: not JSON: a comma or ] is missing"),
            ('[{"text": "a"},', "line 1, column 16: not JSON: Expecting value"),
            ('[{"text": "a"}\n', "line 2, column 1: not JSON: a comma or ] is missing"),
            ('[\n {"text": "a', "line 2, column 11: not JSON: Unterminated string"),
            ('[{"text": "a"}]\n[]', "line 2, column 1: not JSON: something follows"),
            ("[" * 99999, "line 1, column 2: not JSON"),
            ("[\n" + "9" * 5000 + "]", "line 2, column 1: not JSON"),
        ],
    )
    def test_an_array_that_is_no_json(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError) as caught:
            read(tmp_path / "a.json")
        assert str(caught.value).startswith(f"{tmp_path}/a.json, {message}") and "\n" not in str(caught.value)

    def test_an_array_that_is_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_bytes(b'[{"text":\n"\xff"}]')
        with pytest.raises(InputError, match="line 2: not UTF-8"):
            read(tmp_path / "a.json")

    @pytest.mark.parametrize("text", ["", "\n \n", "[]", " [ ]\n"])
    def test_a_file_without_records(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match=r"a\.json: holds no records"):
            read(tmp_path / "a.json")

    def test_what_is_no_data_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.docx").write_text("text\na\n")
        with pytest.raises(InputError, match=r"a\.docx: not a kind of data file .*\.jsonl, \.json"):
            read(tmp_path / "a.docx")
        (tmp_path / "a.XLSX").write_text("text\na\n")
        with pytest.raises(InputError, match=r"a\.XLSX: a spreadsheet; save it as CSV \(in Excel: CSV UTF-8\)"):
            read(tmp_path / "a.XLSX")
        with pytest.raises(InputError, match="no such file or directory"):
            read(tmp_path / "nowhere")

    def test_what_is_neither_a_file_nor_a_directory(self, tmp_path: Path) -> None:
        """A link to nowhere, to itself, a pipe, a directory of a file's name: each is said to be what it is."""
        data = tmp_path / "data"
        data.mkdir()
        (data / "train.jsonl").symlink_to("gone.jsonl")
        (data / "test.jsonl").mkdir()
        (data / "loop").symlink_to("loop")
        os.mkfifo(data / "a.jsonl")
        shown = r"it holds a\.jsonl, loop, a link to loop, .*, test\.jsonl/, train\.jsonl, a link to gone\.jsonl, "
        for path, reason in (
            (data, shown), (data / "train.jsonl", "a link to gone.jsonl, which is not there"),
            (data / "loop", "a link to loop"), (data / "a.jsonl", "neither a file nor a directory"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=reason):
                read(path)

    def test_a_file_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = lines(tmp_path / "a.jsonl", {"text": "a"})

        def refuse(*_: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(InputError, match=r"a\.jsonl: cannot be read: Permission denied"):
            read(path)


class TestDirectories:
    def test_splits_come_in_order(self, tmp_path: Path) -> None:
        lines(tmp_path / "test.jsonl", {"text": "c"})
        lines(tmp_path / "train.json", {"text": "a"})
        lines(tmp_path / "validation.jsonl", {"text": "b"})
        lines(tmp_path / "training.jsonl", {"text": "of no account"})
        found = read(tmp_path)
        assert {name: bare(split.records) for name, split in found.items()} == {
            "train": [("a",)], "valid": [("b",)], "test": [("c",)],
        }  # fmt: skip
        assert list(found) == ["train", "valid", "test"]

    def test_shards_are_one_split(self, tmp_path: Path) -> None:
        for number in (2, 0, 1):
            lines(tmp_path / f"train-0000{number}-of-00003.jsonl", {"text": str(number)})
        assert bare(read(tmp_path)["train"].records) == [("0",), ("1",), ("2",)]

    @pytest.mark.parametrize(
        "names",
        [
            ("train.json", "train.jsonl"),
            ("train-00000-of-00001.jsonl", "train.jsonl"),
            ("train.jsonl", "valid.jsonl", "validation.jsonl"),
        ],
    )
    def test_which_of_two_is_not_guessed(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        for name in names:
            lines(tmp_path / name, {"text": "a"})
        with pytest.raises(InputError, match=r"are of the same split"):
            read(tmp_path)

    def test_without_training_data(self, tmp_path: Path) -> None:
        lines(tmp_path / "valid.jsonl", {"text": "a"})
        with pytest.raises(InputError, match=r"holds no train\.jsonl, train\.json, .* pass it"):
            read(tmp_path)


class TestRecords:
    @pytest.mark.parametrize(
        ("value", "kind"),
        [
            ({"text": "a"}, PlainText),
            ({"prompt": "a", "completion": "b", "text": "c"}, PromptAnswer),
            ({"instruction": "a", "output": "b", "text": "a b"}, Instruction),  # Alpaca's own file
            ({"messages": [USER, ASSISTANT], "prompt": "a", "prompt_id": 3}, Conversation),  # UltraChat
            ({"tools": [], "text": "a"}, PlainText),
            (
                {"prompt": None, "completion": None, "messages": [USER, ASSISTANT]},
                Conversation,
            ),  # data sets put together
            ({"chosen": None, "rejected": None, "text": "a"}, PlainText),
        ],
    )
    def test_keys_tell_the_format(self, tmp_path: Path, value: dict[str, Any], kind: type) -> None:
        (record,) = read(lines(tmp_path / "a.jsonl", value))["train"].records
        assert type(record) is kind

    def test_formats_may_mix(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "a.jsonl", {"text": "a"}, {"messages": [USER, ASSISTANT]})
        assert [type(record) for record in read(path)["train"].records] == [PlainText, Conversation]

    def test_a_format_that_is_asked_for(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "a.jsonl", {"instruction": "a", "output": "b", "text": "all"}, {"instruction": "c"})
        split = read(path, "text")["train"]
        assert bare(split.records) == [("all",)]
        assert split.bad == [f"{path}, line 2: `text` is missing; it has `instruction`"]
        with pytest.raises(InputError, match=f"--format csv: is not one of {', '.join(FORMATS)}"):
            read(path, "csv")

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
            (b'{"text": "a"} x', "not JSON: Extra data at column 15"),
            (b'{"text": "\xff"}', "not UTF-8 at byte 11 of the line; save it as UTF-8"),
            (b'{"text": "a', "not JSON: Unterminated string at column 10"),
            (b"9" * 5000, "not JSON: a whole number of 5,000 digits"),
            (b"[" * 99999 + b"", None),
            (b'"text"', "is a string, not an object"),
            (b"null", "is null, not an object"),
            (b"3", "is a number, not an object"),
            (b"{}", "it has no keys"),
            (b'{"PlainText": "a", "n\\u001b\\n": 1}', "it has `PlainText`, `n\\x1b\\n`"),
            (b'{"text": null}', "`text` is null, not a string"),
            (b'{"text": 3.5}', "`text` is a number, not a string"),
            (b'{"text": " \\n"}', "`text` is white space alone"),
            (b'{"prompt": "a", "completion": ""}', "`completion` is empty"),
            (b'{"instruction": "a", "output": []}', "`output` is a list, not a string"),
            (b'{"instruction": "a", "input": {"b": 1}, "output": "c"}', "`input` is an object, not a string"),
            (b'{"messages": "a"}', "`messages` is not a list of objects"),
            (b'{"messages": ["a"]}', "`messages` is not a list of objects"),
            (b'{"messages": []}', "a conversation needs a message"),
            (b'{"messages": [{"role": "narrator", "content": "a"}]}', "message 1: role is 'narrator', not one of"),
            (b'{"messages": [{"role": "user", "content": [1]}]}', "message 1, part 1 has no text"),
            (b'{"messages": [{"role": "user", "content": "a"}]}', "no message is the assistant's"),
            (b'{"messages": [{"role": "assistant", "content": "a"}]}', "message 1 is the assistant's"),
            (
                b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}',
                "message 2: the assistant says nothing",
            ),
            (
                b'{"messages": [{"role": "user", "content": "a"},'
                b' {"role": "assistant", "content": "b", "tool_calls": [1]}]}',
                "message 2: a call is a list, not an object with `name` and `arguments`",
            ),
            (b'{"text": "a", "tools": [{"name": "f"}]}', "has tools beside `text`"),
            (b'{"prompt": "a", "completion": "b", "tools": [{}]}', "`tools`, function 1: an object with a `name`"),
            (b'{"prompt": "a", "completion": "b", "images": ["c"]}', "has `images`, which no template here can show"),
            (b'{"text": "a", "system": "b"}', "has a system prompt beside `text`"),
            (b'{"prompt": "a", "completion": "b", "system": "c", "system_prompt": "d"}', "has two system prompts"),
            (b'{"prompt": "a", "completion": "b", "label": false}', "an answer that is not wanted"),
            (b'{"prompt": "a", "completion": "b", "loss_mask": [0, 1]}', "has `loss_mask`, and what is trained on"),
            (b'{"prompt": "a", "completion": "b", "weight": 0}', "has a `weight`, but"),
            (b'{"instruction": "a", "output": "b", "history": [["c", "d"]]}', "has `history`, earlier turns"),
            (
                b'{"prompt": "a", "chosen": "b", "rejected": "c"}',
                "is a pair of answers, `chosen` and `rejected`: `elm-mlx",
            ),
            (b'{"conversations": [{"from": "human", "value": "a"}]}', "no message is the assistant's"),
            (b'{"conversations": [{"from": "narrator", "value": "a"}]}', "message 1: role is 'narrator', not one of"),
            (b'{"conversations": "[{]"}', "`conversations` is not a list of objects"),
        ]
        + [
            (f'{{"instruction": "a", "input": {value}, "output": "c"}}'.encode(), f"`input` is {kind}, not a string")
            for value, kind in NO_TEXTS
        ]
        + [
            (b'{"messages": ' + json.dumps([first, ASSISTANT | second]).encode() + more + b"}", reason)
            for first, second, more, reason in [
                (USER, {"weight": 2}, b"", "message 2 has the `weight` 2: 0 (not to be trained on) or 1 is needed"),
                (USER, {"weight": "0"}, b"", "message 2 has the `weight` '0'"),
                (USER, {"loss": [1]}, b"", "message 2 has the `loss` [1]"),
                (USER, {"weight": 0}, b"", "no answer of the assistant's is to be trained on"),
                (USER, {"weight": 1, "train": False}, b"", "`weight` and `train`, which contradict each other"),
                (USER | {"weight": 1}, {}, b"", "message 1 has the `weight` 1, and the assistant's messages alone"),
                (USER, {"name": "Ann"}, b"", "message 2 has `name`, which no template here can show but of a tool's"),
                (USER, {"reasoning_content": "hm"}, b"", "message 2 has `reasoning_content`"),
                (USER | {"role": None}, {}, b"", "message 1: role is None, not one of system, user, assistant, tool,"),
                (USER | {"from": "human"}, {}, b"", "message 1 has `role` and `from`: keep one"),
                (USER | {"value": "a"}, {}, b"", "message 1 has `content` and `value`: keep one"),
                ({"role": "user"}, {}, b"", "message 1: content is missing"),
                (USER | {"content": {"a": 1}}, {}, b"", "message 1: content is an object, not a string"),
                (USER | {"tool_calls": [{"name": "f"}]}, {}, b"", "message 1 has `tool_calls`, and is not the assist"),
                (
                    USER | {"role": "system"},
                    {},
                    b', "system": "other"',
                    "a system prompt beside its messages, and another",
                ),
                (USER, {}, b', "system": {"a": 1}', "`system` is an object, not a string"),
            ]
        ],
    )
    def test_a_bad_record_is_named_and_the_others_are_read(
        self, tmp_path: Path, line: bytes, reason: str | None
    ) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
        split = read(path)["train"]
        assert bare(split.records) == [("a",), ("b",)]
        (bad,) = split.bad
        assert bad.startswith(f"{path}, line 2: ") and bad.isprintable()
        assert reason is None or reason in bad

    @pytest.mark.parametrize("nothing", ["", None])
    def test_what_is_empty_is_nothing(self, tmp_path: Path, nothing: str | None) -> None:
        row = {"instruction": "a", "input": nothing, "output": "b", "system": nothing}
        (record,) = read(lines(tmp_path / "a.jsonl", row))["train"].records
        assert bare([record]) == [("a", "", "b")]

    @pytest.mark.parametrize("blank", [" ", "\n\t", "\u3000"])
    @pytest.mark.parametrize("key", ["input", "system", "instruction", "output"])
    def test_what_is_blank_is_refused(self, tmp_path: Path, key: str, blank: str) -> None:
        row = {"instruction": "a", "input": "c", "output": "b"} | {key: blank}
        split = read(lines(tmp_path / "a.jsonl", row))["train"]
        assert split.records == [] and split.bad[0].endswith(f"`{key}` is white space alone")

    @pytest.mark.parametrize("key", ["system", "system_prompt"])
    def test_a_system_prompt_is_part_of_a_conversation(self, tmp_path: Path, key: str) -> None:
        told = {"role": "system", "content": " Be kind. "}
        rows = [
            {"prompt": "Q", "completion": "A", key: told["content"]},
            {"instruction": "Q", "output": "A", key: told["content"]},
            {"messages": [USER, ASSISTANT], key: told["content"]},
            {"messages": [told, USER, ASSISTANT], key: told["content"]},
        ]
        split = read(lines(tmp_path / "a.jsonl", *rows))["train"]
        assert split.bad == [] and bare(split.records) == [((told, USER, ASSISTANT), frozenset(), ())] * 4

    @pytest.mark.parametrize("mark", [0, 0.0, False])
    @pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
    def test_an_answer_that_is_not_trained_on(self, tmp_path: Path, key: str, mark: Any) -> None:
        messages = [
            USER | {key: mark},
            ASSISTANT | {key: mark},
            USER,
            ASSISTANT | {key: 1},
            USER,
            ASSISTANT | {key: None},
        ]
        split = read(lines(tmp_path / "a.jsonl", {"messages": messages}, {"messages": messages, "system": "S"}))[
            "train"
        ]
        assert split.bad == [] and [record.untrained for record in split.records] == [{0, 1}, {1, 2}]  # type: ignore[union-attr]

    def test_keys_that_mean_nothing_are_told(self, tmp_path: Path) -> None:
        rows = [
            {"text": "a", "id": 3, "source": None},
            {"text": "b", "id": 4, "weight": 1, "tools": [], "system": ""},
            {"messages": [USER | {"time": 1}, ASSISTANT | {"time": 2, "weight": 1}], "prompt": "no matter"},
            {"instruction": "a", "input": "", "output": "b", "text": "a b"},
            {"id": 5},
        ]
        split = read(lines(tmp_path / "a.jsonl", *rows))["train"]
        assert split.ignored == {"`id`": 2, "`source`": 1, "`time` of messages": 1, "`prompt`": 1, "`text`": 1}
        assert len(split.bad) == 1

    def test_pairs_are_one_error_and_not_one_each(self, tmp_path: Path) -> None:
        pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
        path = lines(tmp_path / "a.jsonl", pair, pair | {"text": "d"})
        with pytest.raises(
            InputError, match=r"a\.jsonl, line 1: is a pair of answers.*`elm-mlx dpo` trains on those, and"
        ):
            read(path)
        assert len(read(path, "text")["train"].records) == 1

    def test_a_file_of_bad_records_is_no_empty_file(self, tmp_path: Path) -> None:
        assert len(read(lines(tmp_path / "a.jsonl", 1, 2))["train"].bad) == 2


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("instruct/openbookqa_train.json", Instruction, 4957),
        ("shakespeare", PlainText, 1327),
        ("classics", PlainText, None),
    ],
)
def test_real_files(name: str, kind: type, count: int | None) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    split = read(SHARED / name)["train"]
    assert split.bad == [] and {type(record) for record in split.records} == {kind}
    assert count is None or len(split.records) == count
