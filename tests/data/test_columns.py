"""Columns: those that are said, those that are guessed, and what is not guessed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from texts import records as read

from elm_mlx.data.columns import guess, parsed
from elm_mlx.errors import InputError


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ("id,Question,Answer", {"prompt": "Question", "completion": "Answer"}),
        ("User Input,Bot_Response", {"prompt": "User Input", "completion": "Bot_Response"}),
        ("system,query,reply", {"prompt": "query", "completion": "reply", "system": "system"}),
        ("prompt,response,text", {"prompt": "prompt", "completion": "response"}),
        ("instruction,context,response", {"instruction": "instruction", "input": "context", "output": "response"}),
        ("Instruction,Input,Output", {"instruction": "Instruction", "input": "Input", "output": "Output"}),
        ("instruction,input,response", {"instruction": "instruction", "input": "input", "output": "response"}),
        ("instruction,response", {"prompt": "instruction", "completion": "response"}),
        ("input,output", {"prompt": "input", "completion": "output"}),
        ("Text,label", {"text": "Text"}),
        ("title,body", {"text": "body"}),
        ("conversation", {"conversations": "conversation"}),
        ("Prompt,Question,Answer", None),  # which of two
        ("question,context,answer", None),  # what of the context
        ("quote", None),
        ("How are you?,Fine.", None),  # no names at all
        ("prompt,Chosen,Rejected", None),
        ("", None),
    ],
)  # fmt: skip
def test_what_is_guessed(names: str, taken: dict[str, str] | None) -> None:
    found = guess(names.split(","))
    assert (None if found is None else dict(found.taken)) == taken
    assert found is None or "guessed" in str(found)


def test_pairs_are_guessed_where_they_are_wanted() -> None:
    found = guess(["Question", "Accepted", "Rejected"], "pairs")
    assert found is not None and dict(found.taken) == {
        "chosen": "Accepted",
        "rejected": "Rejected",
        "prompt": "Question",
    }
    assert guess(["Question", "Answer"], "pairs") is None and guess(["Question", "Answer"], "text") is None


@pytest.mark.parametrize(
    ("texts", "taken"),
    [
        (["prompt=question,completion=answer"], {"prompt": "question", "completion": "answer"}),
        (["prompt=question", "completion = answer"], {"prompt": "question", "completion": "answer"}),
        (["prompt=a, b=c,completion=d"], {"prompt": "a, b=c", "completion": "d"}),
        ([], None),
    ],
)
def test_what_is_said(texts: list[str], taken: dict[str, str] | None) -> None:
    found = parsed(texts)
    assert (None if found is None else dict(found.taken)) == taken


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("question=prompt", "--columns question=prompt: write KEY=COLUMN, with one of the keys chosen, "),
        ("prompt", "--columns prompt: write KEY=COLUMN"),
        ("prompt=", "write KEY=COLUMN"),
        ("text=a,text=b", "--columns: text stands there twice"),
        ("prompt=a", "--columns names prompt: all of one of these are needed: chosen, rejected; prompt, completion;"),
    ],
)
def test_what_says_no_columns(text: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed([text])
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ("text,label", "fields between commas"),
        ("question,answer,text", "fields between commas; prompt = `question`, completion = `answer` (guessed; "
         "--columns says it otherwise)"),
        ("prompt,completion,question", "fields between commas"),
    ],
)  # fmt: skip
def test_what_is_called_like_keys_is_taken_as_it_is(tmp_path: Path, names: str, taken: str) -> None:
    (tmp_path / "a.csv").write_text(f"{names}\n{','.join('abc'[: names.count(',') + 1])}\n")
    assert list(read(tmp_path / "a.csv")["train"].columns) == [taken]


def test_a_hint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question\\n": "a", "answer": "b"}\n')
    assert read(tmp_path / "a.jsonl")["train"].bad[0].endswith("it has `question\\n`, `answer`")


def test_faults_are_named_by_the_files_own_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Frage;Antwort;prompt\nWas?;;x\nWer?;Ich;y\n")
    columns = ["prompt=Frage,completion=Antwort"]
    split = read(tmp_path / "a.csv", columns=columns)["train"]
    assert split.bad == [f"{tmp_path}/a.csv, line 2: `Antwort` is empty"]
    assert len(split.records) == 1 and split.ignored == {"`prompt`": 1}
    assert list(split.columns) == ["fields between semicolons; prompt = `Frage`, completion = `Antwort`"]


@pytest.mark.parametrize(
    ("content", "names", "instead"),
    [
        ("Where is it?;In a hole.\nWho?;I\n", "`Where is it?`, `In a hole.`", "`prompt;completion`"),
        ("\nWhere?\tHere.\t3\nWho?\tI\t4\n", "`Where?`, `Here.`, `3`", r"`prompt\\tcompletion\\tcolumn 3`"),
        ("The fox ran.\nThe crow sat.\n", "`The fox ran.`", "`text`"),
    ],
)
def test_a_table_without_names_is_told_how_to_have_some(content: str, names: str, instead: str, tmp_path: Path) -> None:
    """What was taken for names is shown, where, and what makes it a record."""
    (tmp_path / "a.csv").write_text(content)
    line = 2 if content.startswith("\n") else 1
    taken = rf"a\.csv, line {line}: was taken for the columns' names: {re.escape(names)}; "
    hint = rf"; if it is a record already, put a line with a name for each column above it: {instead}$"
    for columns, reason in (((), "--columns prompt=NAME,.* says which to train on"), (["text=Text"], "none is `Text`")):
        with pytest.raises(InputError, match=taken + reason + hint):
            read(tmp_path / "a.csv", columns=columns)
    (tmp_path / "a.csv").write_text(f"{instead.strip('`')}\n{content}".replace(r"\\t", "\t"))
    assert [str(bad) for bad in read(tmp_path / "a.csv")["train"].bad] == []
