"""Duplicates: the first by the order of the data is kept; hashes are kept until a file changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import texts
from hypothesis import given
from hypothesis import strategies as st

from elm_mlx.data import duplicates
from elm_mlx.data.duplicates import find
from elm_mlx.data.filters import Filters
from elm_mlx.data.text_sources import TextFiles, TextSource
from elm_mlx.data.workers import Hash, Pool

Marks = list[list[list[bool]]]


@pytest.fixture
def pool(tiny_tokenizer_file: Path) -> Iterator[Pool]:
    made = Pool(0, tiny_tokenizer_file, Filters())
    yield made
    made.close()


def found(pool: Pool, *sources: TextSource, cache: Path | None = None) -> Marks:
    return [[file.tolist() for file in marks] for marks in find([TextFiles(each) for each in sources], pool, cache)]


def test_the_first_of_equal_texts_is_kept(tmp_path: Path, pool: Pool) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/b.jsonl").write_text(
        '{"text": "b"}\n\n{"text": "a"}\n{"text": 3}\n{\n{"text": "c"}\n{"text": "c"}\n'
    )
    texts.write(tmp_path / "one/a.jsonl", ["a", "e\u0301", "é"])
    texts.write(tmp_path / "two.jsonl", [{"body": "é", "text": "new"}, {"body": "x", "text": "new"}])
    one, two = TextSource(str(tmp_path / "one")), TextSource(str(tmp_path / "two.jsonl"), key="body")
    assert found(pool, one, two) == [
        [[False, False, True], [False, False, True, False, False, False, True]],
        [[True, False]],
    ]
    assert found(pool, two, one)[0] == [[False, False]]
    assert found(pool) == []


@given(st.lists(st.lists(st.sampled_from("abc\n"), max_size=8), min_size=1, max_size=4))
def test_it_equals_a_set_that_remembers(tmp_path_factory: pytest.TempPathFactory, files: list[list[str]]) -> None:
    import numpy as np

    seen: set[str] = set()
    expected = [
        [letter != "\n" and (letter in seen or bool(seen.add(letter))) for letter in file]  # type: ignore[func-returns-value]
        for file in files
    ]
    hashes = [np.array([0 if letter == "\n" else ord(letter) for letter in file], np.uint64) for file in files]
    assert [marks.tolist() for marks in duplicates._repeated(hashes)] == expected


def test_hashes_are_kept_until_a_file_changes(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = texts.write(tmp_path / "a.jsonl", ["a", "a"]), tmp_path / "cache"
    asked: list[Path] = []
    submit = pool.submit

    def counted(task: object) -> object:
        assert isinstance(task, Hash)
        asked.append(task.path)
        return submit(task)

    monkeypatch.setattr(pool, "submit", counted)
    source = TextSource(str(path))
    for _ in range(3):
        assert found(pool, source, cache=cache) == [[[False, True]]]
    assert asked == [path]
    assert [entry.stat().st_size for entry in cache.iterdir()] == [16]
    texts.write(path, ["a", "b"])
    os.utime(path, ns=(1, 1))
    assert found(pool, source, cache=cache) == [[[False, False]]]
    assert found(pool, TextSource(str(path), key="body"), cache=cache) == [[[]]]
    assert asked == [path] * 3


def test_a_cache_that_cannot_be_written(tmp_path: Path, pool: Pool) -> None:
    path = texts.write(tmp_path / "a.jsonl", ["a", "a"])
    (tmp_path / "cache").write_text("a file")
    assert found(pool, TextSource(str(path)), cache=tmp_path / "cache") == [[[False, True]]]


def test_where_hashes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert duplicates.default_cache() == Path("/somewhere/elm-mlx/hashes")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/me")
    assert duplicates.default_cache() == Path("/me/.cache/elm-mlx/hashes")
