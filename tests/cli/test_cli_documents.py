"""`--docs` of generate and chat: the answer's sources are named, and what does not go together is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Run

from elm_mlx.documents.indexing import index_documents

QUICK = ("--max-tokens", 4, "--temp", 0)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("# Towers\n\nThe tower has seven floors.\n")
    (tmp_path / "notes" / "b.md").write_text("Bridges are long.\n")
    index_documents(tmp_path / "notes", tmp_path / "notes.db")
    return tmp_path / "notes.db"


@pytest.mark.parametrize("template", [(), ("--template", "openelm-instruct")])
def test_generate_names_its_sources(run: Run, tiny_model_dir: Path, notes: Path, template: tuple[str, ...]) -> None:
    code, _, said = run("generate", tiny_model_dir, "How high is the tower?", "--docs", notes, *template, *QUICK)
    assert code == 0 and said.endswith("\n[1] notes/a.md:3 (Towers)\n")
    code, _, said = run("generate", tiny_model_dir, "zebra", "--docs", notes, *template, *QUICK)
    assert code == 0 and said.endswith(f"\nnothing found in {notes}: answered without documents\n")


def test_generate_in_json_and_several_prompts(run: Run, tiny_model_dir: Path, notes: Path) -> None:
    prompts = notes.with_name("prompts.txt")
    prompts.write_text("tower\nzebra\nbridge\n")
    code, printed, _ = run("generate", tiny_model_dir, "--prompts", prompts, "--docs", notes, "--json", *QUICK)
    records = [json.loads(line) for line in printed.splitlines()]
    assert code == 0 and [[each["file"] for each in record["sources"]] for record in records] == [
        ["a.md"],
        [],
        ["b.md"],
    ]
    code, _, said = run("generate", tiny_model_dir, "--prompts", prompts, "--docs", notes, *QUICK)
    assert code == 0 and said.count("[1] notes/") == 2 and said.count("nothing found") == 1
    code, printed, _ = run("generate", tiny_model_dir, "tower", "--docs", notes, "--json", *QUICK)
    source = {"number": 1, "file": "a.md", "first_line": 3, "last_line": 3, "heading": "Towers"}
    assert code == 0 and json.loads(printed)["sources"] == [source | {"text": "The tower has seven floors."}]
    code, printed, _ = run("generate", tiny_model_dir, "tower", "--json", *QUICK)
    assert code == 0 and "sources" not in json.loads(printed)


def test_chat_names_the_sources_of_each_answer(run: Run, tiny_model_dir: Path, notes: Path) -> None:
    code, _, said = run("chat", tiny_model_dir, "--docs", notes, *QUICK, stdin="the tower?\nzebra\nand its floors\n")
    assert code == 0
    assert [line for line in said.splitlines() if "notes" in line] == [
        "[1] notes/a.md:3 (Towers)", "[1] notes/a.md:3 (Towers)", "[1] notes/a.md:3 (Towers)",
    ]  # fmt: skip


def test_what_does_not_go_together(run: Run, tiny_model_dir: Path, notes: Path) -> None:
    for command in ("generate", "chat"):
        code, _, said = run(command, tiny_model_dir, "x", "--docs", notes, "--max-kv-size", 64)
        assert code == 2 and "--max-kv-size" in said and said.count("\n") == 1
        code, _, said = run(command, tiny_model_dir, "x", "--docs", notes / "none")
        assert code == 2 and said.count("\n") == 1


def test_a_server_of_base_models_has_nobody_to_answer(run: Run, tiny_model_dir: Path, notes: Path) -> None:
    code, _, said = run("serve", tiny_model_dir, "--docs", notes, "--port", 0)
    assert code == 2 and "none of the models has a chat template" in said


def test_an_unfinished_index_is_said(run: Run, tiny_model_dir: Path, notes: Path) -> None:
    from elm_mlx.documents.index_file import connect, write_setting

    connection = connect(notes, writable=True)
    write_setting(connection, "unfinished", True)
    connection.close()
    _, _, said = run("generate", tiny_model_dir, "tower", "--docs", notes, *QUICK)
    assert f"not all documents are in it yet: elm-mlx index {notes.with_name('notes')} --out {notes}" in said
