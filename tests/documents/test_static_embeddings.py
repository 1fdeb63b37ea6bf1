"""Vectors beside words: what is said in other words is found, and an index stays with the embeddings that it has."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from static_models import write_static_model

from elm_mlx.documents import indexing
from elm_mlx.documents.indexing import index_documents
from elm_mlx.documents.retrieval import DocumentIndex
from elm_mlx.documents.static_embeddings import StaticEmbeddings, embeddings_directory
from elm_mlx.errors import ElmError, InputError

MEANINGS = [["car", "automobile", "vehicle"], ["boat", "ship"], ["red", "crimson"], ["house", "home"]]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    directory = tmp_path / "notes"
    directory.mkdir()
    for name, text in {
        "a.md": "# Car\n\na red car",
        "b.md": "the old ship",
        "c.md": "a house\n\n# Home\n\nhome",
    }.items():
        (directory / name).write_text(text)
    return directory


@pytest.fixture
def embeddings(tmp_path: Path) -> StaticEmbeddings:
    return StaticEmbeddings(write_static_model(tmp_path / "static", MEANINGS))


def places(index: DocumentIndex, question: str) -> list[str]:
    return [each.place for each in index.search(question)]


def test_other_words_are_found_by_vectors_alone(notes: Path, embeddings: StaticEmbeddings, tmp_path: Path) -> None:
    index_documents(notes, tmp_path / "words.db")
    index_documents(notes, tmp_path / "both.db", embeddings)
    words, both = DocumentIndex(tmp_path / "words.db"), DocumentIndex(tmp_path / "both.db")
    assert places(words, "crimson automobile") == []
    assert places(both, "crimson automobile")[0] == "a.md:3"
    assert places(both, "boat")[0] == "b.md:1" == places(words, "ship")[0]
    assert places(both, "unheard") == places(both, "?") == []


def test_no_passage_is_left_out_by_its_score_of_words(
    notes: Path, embeddings: StaticEmbeddings, tmp_path: Path
) -> None:
    index_documents(notes, tmp_path / "words.db")
    index_documents(notes, tmp_path / "both.db", embeddings)
    words, both = DocumentIndex(tmp_path / "words.db"), DocumentIndex(tmp_path / "both.db")
    assert places(words, "the red car of a house") == ["a.md:3"]
    assert {"a.md:3", "c.md:1"} <= {*places(both, "the red car of a house")}


def test_vectors_follow_the_documents(notes: Path, embeddings: StaticEmbeddings, tmp_path: Path) -> None:
    out = tmp_path / "notes.db"
    index_documents(notes, out, embeddings)
    index = DocumentIndex(out)
    assert places(index, "boat")[0] == "b.md:1"
    (notes / "b.md").write_text("nothing\n\nof the sort")
    (notes / "d.md").write_text("# A ship\n\nsails")
    (notes / "c.md").unlink()
    index_documents(notes, out)  # goes on with its embeddings
    assert places(index, "boat")[0] == "d.md:3"
    with sqlite3.connect(out) as connection:
        rows = connection.execute("SELECT rows FROM vectors ORDER BY file").fetchall()
        texts = [
            text for (text,) in connection.execute("SELECT heading || char(10) || text FROM passages ORDER BY file, id")
        ]
    connection.close()
    made = np.frombuffer(b"".join(row for (row,) in rows), np.float16).reshape(-1, embeddings.width)
    np.testing.assert_array_equal(made, embeddings.vectors(texts))


def test_an_index_of_words_gets_vectors_and_other_embeddings_replace_them(
    notes: Path, embeddings: StaticEmbeddings, tmp_path: Path
) -> None:
    out = tmp_path / "notes.db"
    index_documents(notes, out)
    index_documents(notes, out, embeddings)
    assert places(DocumentIndex(out), "boat")[0] == "b.md:1"
    others = StaticEmbeddings(write_static_model(tmp_path / "others", [["boat", "home"]], width=4, seed=1))
    index_documents(notes, out, others)
    assert places(DocumentIndex(out), "boat")[0] == "c.md:5"


def test_an_index_that_was_stopped_before_its_vectors_gets_them_in_the_next_run(
    notes: Path, embeddings: StaticEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(indexing._Update, "_vectors", stop)
        with pytest.raises(KeyboardInterrupt):
            index_documents(notes, tmp_path / "notes.db", embeddings)
    index_documents(notes, tmp_path / "notes.db")  # as the note says, without --embeddings
    index_documents(notes, tmp_path / "whole.db", embeddings)
    rows = []
    for name in ("notes.db", "whole.db"):
        with sqlite3.connect(tmp_path / name) as connection:
            rows.append(connection.execute("SELECT rows FROM vectors ORDER BY file").fetchall())
    assert rows[0] == rows[1] != []


@pytest.mark.parametrize("harm", ["gone", "others", "rows"])
def test_embeddings_that_an_index_no_longer_has(
    notes: Path, embeddings: StaticEmbeddings, tmp_path: Path, harm: str
) -> None:
    out = tmp_path / "notes.db"
    index_documents(notes, out, embeddings)
    if harm == "gone":
        shutil.rmtree(embeddings.directory)
    elif harm == "others":
        write_static_model(embeddings.directory, MEANINGS, seed=5)
    else:
        with sqlite3.connect(out) as connection:
            connection.execute("UPDATE vectors SET rows = x'00'")
        connection.close()
    with pytest.raises(InputError, match=str(out)):
        DocumentIndex(out).search("car")


def test_what_is_no_embeddings(tmp_path: Path, without: Callable[[str], None]) -> None:
    with pytest.raises(InputError, match=r"config.json and tokenizer.json and model.safetensors missing"):
        StaticEmbeddings(tmp_path)
    directory = write_static_model(tmp_path / "static", MEANINGS)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no static embeddings"):
        StaticEmbeddings(directory)
    without("model2vec")
    with pytest.raises(ElmError, match=r"pip install 'elm-mlx\[vectors\]'"):
        StaticEmbeddings(directory)


def test_a_name_on_the_hub(notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embeddings_directory(tmp_path) == tmp_path
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ElmError, match="HF_HUB_OFFLINE"):
        embeddings_directory(Path("someone/static"))
    cached = tmp_path / "models--someone--static"
    snapshot, blobs = cached / "snapshots" / "abc", cached / "blobs"
    write_static_model(snapshot, MEANINGS)
    for path in (blobs, cached / "refs"):
        path.mkdir()
    for number, file in enumerate(snapshot.iterdir()):  # as the hub's client keeps them
        file.rename(blobs / str(number))
        file.symlink_to(Path("..", "..", "blobs", str(number)))
    (cached / "refs" / "main").write_text("abc")
    found = embeddings_directory(Path("someone/static"))
    assert found == snapshot
    index_documents(notes, tmp_path / "notes.db", StaticEmbeddings(found))
    assert places(DocumentIndex(tmp_path / "notes.db"), "boat")[0] == "b.md:1"
