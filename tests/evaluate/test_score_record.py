"""What is on disk: resumed after a kill, refused for another model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from elm_mlx.errors import ElmError, InputError
from elm_mlx.evaluate.score_record import ABOUT, ITEMS, ScoreRecord, read_results

IDENTITY = {"model": "abc", "computed in": "float32"}


def line(item: int) -> dict[str, object]:
    return {"task": "t", "item": item, "id": f"id{item}", "logprobs": [-1.5], "greedy": [True]}


def test_what_was_appended_is_there_next_time(tmp_path: Path) -> None:
    with ScoreRecord(tmp_path / "new" / "out", IDENTITY, {"machine": "m"}) as record:
        record.append([line(0), line(1)])
        assert len(record.done) == 2
    with ScoreRecord(tmp_path / "new" / "out", IDENTITY, {}) as record:
        assert record.done["t", 1] == line(1)
        assert len(record.done) == 2
    assert json.loads((tmp_path / "new" / "out" / ABOUT).read_text()) == {"machine": "m", "identity": IDENTITY}


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    with ScoreRecord(tmp_path, IDENTITY, {}) as record:
        record.append([line(0)])
    with (tmp_path / ITEMS).open("a") as file:
        file.write('{"task": "t", "item": 1, "id"')
    with ScoreRecord(tmp_path, IDENTITY, {}) as record:
        assert set(record.done) == {("t", 0)}
        record.append([line(1)])
    assert [json.loads(each)["item"] for each in (tmp_path / ITEMS).read_text().splitlines()] == [0, 1]


def test_lines_that_are_damaged_are_computed_again(tmp_path: Path) -> None:
    with ScoreRecord(tmp_path, IDENTITY, {}) as record:
        record.append([line(0)])
    (tmp_path / ITEMS).write_bytes(b"\0\0\0\n3\n{}\n" + (tmp_path / ITEMS).read_bytes())
    with ScoreRecord(tmp_path, IDENTITY, {}) as record:
        assert set(record.done) == {("t", 0)}


def test_another_models_record_is_refused(tmp_path: Path) -> None:
    ScoreRecord(tmp_path, IDENTITY, {}).__exit__(None, None, None)
    with pytest.raises(InputError, match=r"holds scores with model = abc, not xyz; choose another --out"):
        ScoreRecord(tmp_path, IDENTITY | {"model": "xyz"}, {})
    (tmp_path / ABOUT).write_text("{}")
    with pytest.raises(InputError, match="was not written by `elm-mlx eval`"):
        ScoreRecord(tmp_path, IDENTITY, {})


def test_only_one_process_writes(tmp_path: Path) -> None:
    with (
        ScoreRecord(tmp_path, IDENTITY, {}),
        pytest.raises(ElmError, match=f"process {os.getpid()} is writing to it"),
    ):
        ScoreRecord(tmp_path, IDENTITY, {})
    with pytest.raises(ElmError, match="cannot be written: Not a directory"):
        ScoreRecord(Path("/dev/null/x"), IDENTITY, {})


def test_results_are_read_from_a_run_or_its_file(tmp_path: Path) -> None:
    with ScoreRecord(tmp_path, IDENTITY, {}) as record:
        record.write_results({"tasks": {}})
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == {"tasks": {}}
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(InputError, match="holds no JSON object"):
        read_results(tmp_path)
    with pytest.raises(InputError, match="elm-mlx eval MODEL --out"):
        read_results(tmp_path / "nowhere")
