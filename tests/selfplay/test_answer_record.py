"""The record of answers: gone on with from any instant, and refused for what it is not of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from elm_mlx.errors import ElmError, InputError
from elm_mlx.problems.checked_task import Verdict
from elm_mlx.selfplay.answer_record import AnswerRecord, RecordedAnswer, RecordedProblem

IDENTITY = {"MODEL": "abc", "--answers": 2, "--temp": 1.0, "--adapter": None}


def problem(number: int) -> RecordedProblem:
    answers = (RecordedAnswer("4 \ud83d", Verdict.RIGHT, 2, True), RecordedAnswer("…", Verdict.UNREADABLE, 9, False))
    return RecordedProblem(number, 2, f"What is {number}?\n", 1, answers)


def write(path: Path, count: int, first: int = 0) -> bytes:
    with AnswerRecord(path, IDENTITY, first) as record:
        for number in range(first + len(record.problems), first + count):
            record.append(problem(number))
    return path.read_bytes()


def test_what_was_appended_is_there_next_time(tmp_path: Path) -> None:
    write(tmp_path / "a", 3)
    with AnswerRecord(tmp_path / "a", IDENTITY) as record:
        assert record.problems == [problem(number) for number in range(3)]
        assert record.problems[0].count == (1, 2)


@pytest.mark.parametrize("first", [0, 40])
def test_cut_anywhere_it_becomes_the_same_bytes(tmp_path: Path, first: int) -> None:
    whole = write(tmp_path / "whole", 3, first)
    for size in {*range(0, len(whole), 31), *(len(whole) - each for each in range(1, 4))}:
        (tmp_path / "cut").write_bytes(whole[:size])
        assert write(tmp_path / "cut", 3, first) == whole


def test_a_damaged_line_and_what_follows_it_are_made_again(tmp_path: Path) -> None:
    whole = write(tmp_path / "a", 4)
    head, *lines = whole.splitlines(keepends=True)
    fewer = json.dumps({**json.loads(lines[1]), "answers": json.loads(lines[1])["answers"][:1]}).encode() + b"\n"
    for damaged in (b"\0" * 40 + b"\n", b"{}\n", lines[2], b'{"number": 1}\n', fewer):
        (tmp_path / "a").write_bytes(b"".join([head, lines[0], damaged, *lines[2:]]))
        with AnswerRecord(tmp_path / "a", IDENTITY) as record:
            assert record.problems == [problem(0)]
        assert write(tmp_path / "a", 4) == whole


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"MODEL": "f" * 64}, r"with MODEL = abc, not ffffffff…; leave it as it was, choose another --out"),
        ({"--temp": 0.5}, r"with --temp = 1.0, not 0.5"),
        ({"--adapter": "x"}, r"with --adapter = none, not x"),
        ({"--seed": 1}, r"with --seed = none, not 1"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    before = write(tmp_path / "a", 1)
    with pytest.raises(InputError, match=said):
        AnswerRecord(tmp_path / "a", IDENTITY | changed)
    assert (tmp_path / "a").read_bytes() == before


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b"{}\n", b'{"record of": 3}\n', b"\xff\n"])
def test_another_file_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match="is no record of `elm-mlx synthesize`"):
        AnswerRecord(tmp_path / "a", IDENTITY)
    assert (tmp_path / "a").read_bytes() == content


def test_begun_anew_it_forgets_what_was_there_unless_another_process_writes_to_it(tmp_path: Path) -> None:
    write(tmp_path / "a", 3)
    with AnswerRecord(tmp_path / "a", IDENTITY) as record:
        with pytest.raises(ElmError, match="is writing to it"):
            AnswerRecord(tmp_path / "a", {"MODEL": "new"}, anew=True)
        assert len(record.problems) == 3
    with AnswerRecord(tmp_path / "a", {"MODEL": "new"}, anew=True) as record:
        assert not record.problems
    assert (tmp_path / "a").read_text() == '{"record of": {"MODEL": "new"}}\n'


def test_only_one_process_writes(tmp_path: Path) -> None:
    with (
        AnswerRecord(tmp_path / "a", IDENTITY),
        pytest.raises(ElmError, match=f"process {os.getpid()} is writing to it"),
    ):
        AnswerRecord(tmp_path / "a", IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(ElmError, match="cannot be written"):
        AnswerRecord(Path("/dev/null/x"), IDENTITY)
