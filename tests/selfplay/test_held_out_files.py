"""Prompts of data files of every kind, as they are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elm_mlx.errors import InputError
from elm_mlx.selfplay.held_out_files import prompts_in


def write(path: Path, *records: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_prompts_of_every_kind_of_record(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "First"}, {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Second"}, {"role": "assistant", "content": "B"},
    ]  # fmt: skip
    paths = [
        write(tmp_path / "a.jsonl", {"prompt": " What  is 1?\n", "completion": "1"}),
        write(tmp_path / "b.jsonl", {"messages": turns}),
        write(tmp_path / "c.jsonl", {"instruction": "Do", "input": "it", "output": "done"}),
        write(tmp_path / "d.jsonl", {"text": "Just text"}),
        write(tmp_path / "e.jsonl", {"prompt": "Which?", "chosen": "a", "rejected": "b"}),
    ]
    assert prompts_in(paths) == {"what is 1?", "first", "second", "do it", "just text", "which?"}
    assert prompts_in([]) == frozenset()


def test_all_splits_of_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"prompt": "one", "completion": "1"})
    write(tmp_path / "test.jsonl", {"prompt": "two", "completion": "2"})
    assert prompts_in([str(tmp_path)]) == {"one", "two"}


def test_a_bad_record_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "one", "completion": "1"}, {"completion": "2"})
    with pytest.raises(InputError, match=r"--held-out: .*a.jsonl, line 2"):
        prompts_in([path])
