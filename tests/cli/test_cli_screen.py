"""What the command line shows: on a terminal broken between words and harmless, in a pipe as it is."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
from commands import Run

from elm_mlx.cli import screen
from elm_mlx.text.tokenizer import Tokenizer

CONTROLS = {*map(chr, (*range(32), *range(0x7F, 0xA0))), *"\u202e\u2066"} - {"\n", "\t"}
RUDE = "\x1b]0;title\x07\x1b[2J\x9b2J\u202e"


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> pytest.CaptureFixture[str]:
    """Stdout is a terminal of 40 columns."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)  # the object is another one in the test
    return capsys


def spoken(terminal: pytest.CaptureFixture[str], pieces: list[str]) -> str:
    speech = screen.Speech()
    for piece in pieces:
        speech.write(piece)
    speech.finish()
    return terminal.readouterr().out


TEXT = "It was on the other side of the wall now, a handsome-faced thing that nobody had seen before. " * 3


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_speech_breaks_between_words_whatever_the_pieces(terminal: pytest.CaptureFixture[str], size: int) -> None:
    shown = spoken(terminal, [TEXT[at : at + size] for at in range(0, len(TEXT), size)])
    assert [line.rstrip() for line in shown.rstrip().split("\n")] == textwrap.wrap(TEXT, 39, break_on_hyphens=False)


def test_speech_shows_a_word_at_once_where_it_fits(terminal: pytest.CaptureFixture[str]) -> None:
    speech = screen.Speech()
    speech.write("On")
    assert terminal.readouterr().out == "On"
    speech.write("ce upon a time there")
    assert terminal.readouterr().out == "ce upon a time ", "the end of a line waits for the rest of its word"
    speech.write(" was")
    assert terminal.readouterr().out == "there "


def test_a_word_longer_than_the_line_is_left_to_the_terminal(terminal: pytest.CaptureFixture[str]) -> None:
    assert spoken(terminal, ["see ", "x" * 50, " there"]) == "see \n" + "x" * 50 + " there"
    assert spoken(terminal, ["x"] * 100) == "x" * 100


def test_scripts_without_spaces_break_anywhere_and_count_two_columns(terminal: pytest.CaptureFixture[str]) -> None:
    assert spoken(terminal, ["漢字" * 15]) == "漢字" * 9 + "漢" + "\n" + "字" + "漢字" * 5


def test_lines_and_tabs_of_speech_stay(terminal: pytest.CaptureFixture[str]) -> None:
    assert spoken(terminal, ["a\n\n\tb", "\n", "c\n"]) == "a\n\n\tb\nc\n"


def test_speech_cannot_steer_a_terminal_though_a_sequence_comes_in_pieces(terminal: pytest.CaptureFixture[str]) -> None:
    shown = spoken(terminal, [*"a\x1b]52;c;ZXZpbA==\x07b\x9b2J\r\x08\x1b[3A"])
    assert not CONTROLS & {*shown} and shown.startswith("a]52;")


def test_speech_in_a_pipe_is_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    speech = screen.Speech()
    for piece in (*"a\x1b[2J\r\n", "word " * 50):
        speech.write(piece)
    speech.finish()
    assert capsys.readouterr().out == "a\x1b[2J\r\n" + "word " * 50


def test_labelled_lines_go_on_below_their_text(terminal: pytest.CaptureFixture[str]) -> None:
    screen.say("note", "a text that is longer than a line of the terminal is")
    assert (
        terminal.readouterr().out == "note        a text that is longer than a\n            line of the terminal is\n"
    )


def test_labelled_lines_in_a_pipe_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    screen.say("note", "long " * 60 + RUDE + "\nend")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and len(out) > 300 and not CONTROLS & {*out}


def test_what_came_from_outside_is_not_obeyed(
    run: Run, tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Tokenizer
) -> None:
    rude = tmp_path / f"a{RUDE}[red]b"
    tiny.write_directory(rude, tiny.spelling_model(tiny_tokenizer, "né"), tiny_tokenizer.path.read_bytes())
    config = json.loads((rude / "config.json").read_text())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config | {"model_type": RUDE * 1000}))
    (rude / "chat_template.jinja").write_text("{{ raise_exception('" + RUDE + "') }}")
    calls: list[tuple[object, ...]] = [
        ("info", rude), ("info", tmp_path / "bad"), ("info", f"no{RUDE}"), ("info", tiny_model_dir, "--adapter", rude),
        ("generate", rude, "--prompt", "a", "--template", rude), ("generate", tiny_model_dir, f"--t{RUDE}", "1"),
        ("chat", rude), (f"no{RUDE}",), ("data", rude / "x", "--model", rude), ("report", rude), ("eval", rude),
        ("quantize", rude, rude), ("fuse", rude, rude, rude), ("export", rude, rude), ("lora", rude, "--data", rude),
    ]  # fmt: skip
    for call in calls:
        code, out, err = run(*call, stdin="hello\n")
        assert not CONTROLS & {*out + err}, call
        assert code in (0, 1, 2) and "Traceback" not in err
        assert max(map(len, err.splitlines() or [""])) < 600
    assert "[red]" in run("info", rude)[1]


def test_prompts_that_are_echoed_are_not_obeyed(
    run: Run, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text(f"a{RUDE}\n")
    flags = ("generate", tiny_model_dir, "--prompts", tmp_path / "prompts.txt", "--max-tokens", "3")
    assert f"--- 1: a{RUDE}\n" in run(*flags)[1], "a pipe gets it as it is"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = run(*flags)[1]
    assert out.startswith("--- 1: a]0;title[2J2J\n") and not CONTROLS & {*out}
    assert json.loads(run(*flags, "--json")[1])["prompt"] == f"a{RUDE}"


TABLE = (
    ["", "prompt, tokens/s", "generation, tokens/s", "memory"],
    [["elm-mlx", "536 55%", "35.9 53%", "1.21 GB"], ["mlx-lm, same type", "364 ×1.48", "37.3 ×0.97", "1.24 GB"]],
)


def test_a_table_in_a_pipe_has_a_line_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    screen.table(*TABLE)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == " ".join(TABLE[0]).split()
    assert lines[1].split() == ["elm-mlx", "536", "55%", "35.9", "53%", "1.21", "GB"] and len(lines) == 3
    assert [lines[2].index(cell) + len(cell) for cell in TABLE[1][1][1:]] == [
        lines[0].index(header) + len(header) for header in TABLE[0][1:]
    ]


@pytest.mark.parametrize("columns", [80, 60, 52, 40, 24])
def test_a_table_on_a_terminal_fits_and_loses_nothing(
    terminal: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    screen.table(*TABLE)
    out = terminal.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    words = out.split()
    assert all(word in words for row in [*TABLE[1], TABLE[0]] for cell in row for word in cell.split())


def test_cells_of_a_table_are_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    screen.table(["", f"a{RUDE}"], [[f"[red]{RUDE}", "漢字"], ["x", "abc"]])
    out = capsys.readouterr().out
    assert not CONTROLS & {*out} and "[red]" in out
    assert out.splitlines()[1].endswith("漢字") and out.splitlines()[2].endswith("abc")


def test_a_path_that_no_line_can_hold_stays_beside_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/path/" + "x" * 40
    assert screen.folded(f"wrote       {path}, 4-bit", 12) == f"wrote       {path},\n{' ' * 12}4-bit"
    assert screen.folded(f"wrote to    here, and {path}", 12) == f"wrote to    here, and\n{' ' * 12}{path}"


def test_a_terminal_without_a_size_has_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen.shutil, "get_terminal_size", lambda: os.terminal_size((0, 0)))
    assert screen.terminal_width() == 80
