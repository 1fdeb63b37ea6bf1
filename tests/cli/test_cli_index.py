"""`elm-mlx index`."""

from __future__ import annotations

from pathlib import Path

from commands import Run
from static_models import write_static_model


def test_an_index_is_made_and_brought_up_to_date(run: Run, tmp_path: Path) -> None:
    notes, out = tmp_path / "notes", tmp_path / "notes.db"
    notes.mkdir()
    (notes / "a.md").write_text("# A\n\ntext")
    for number in range(12):
        (notes / f"{number:02}.txt").write_bytes(b"\0")
    code, printed, notes_printed = run("index", notes, "--out", out)
    assert (code, printed) == (0, f"1 file: 1 new, 0 changed, 0 as before, 0 gone | 1 passage | {out}\n")
    assert "elm-mlx: 09.txt: left out: is binary\n" in notes_printed and "10.txt" not in notes_printed
    assert "elm-mlx: and 2 files more: is binary\n" in notes_printed
    static = write_static_model(tmp_path / "static", [["text"]])
    code, printed, _ = run("index", notes, "--out", out, "--embeddings", static)
    assert (code, printed) == (0, f"1 file: 0 new, 0 changed, 1 as before, 0 gone | 1 passage | {out}\n")


def test_what_is_at_fault_is_said_in_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("mine")
    for arguments, said in (
        ([tmp_path], "missing option '--out'"),
        ([tmp_path, "--out", tmp_path / "text"], "is no index of documents"),
        ([tmp_path / "none", "--out", tmp_path / "a.db"], "is no directory"),
        ([tmp_path, "--out", tmp_path / "a.db", "--embeddings", tmp_path], "no static embeddings"),
    ):
        code, _, printed = run("index", *arguments)
        assert code == 2 and said in printed and printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
