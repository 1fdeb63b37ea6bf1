"""Where questions come from: files, directories of them, the hub's cache; and what is said where there are none."""

from __future__ import annotations

import bz2
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.evaluate import task_sources
from elm_mlx.evaluate.tasks import TASKS, Chosen

ARC = {"question": "What is ice?", "choices": {"text": ["fire", "water"], "label": ["A", "B"]}, "answerKey": "B"}


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    from huggingface_hub import constants

    path = tmp_path / "hub"
    path.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    return path


def cached(hub: Path, dataset: str, files: dict[str, list[Any]]) -> None:
    """A dataset as `hf download` leaves it."""
    repository = hub / f"datasets--{dataset.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    for name, records in files.items():
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(records), path)
        else:
            write(path, *records)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_a_table_is_a_task(tmp_path: Path) -> None:
    made = [{"query": f"{n}+1=", "choices": ["x", 'a "y"'], "gold": n % 2} for n in range(4)]
    with (tmp_path / "sums.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["query", "choices", "gold"])
        writer.writeheader()
        writer.writerows(row | {"choices": json.dumps(row["choices"])} for row in made)
    (tmp_path / "next.tsv").write_text("context\tcontinuation\nthe\t fox\n")
    same = write(tmp_path / "sums.jsonl", *made)
    table, lines = (
        task_sources.load(Chosen(task_sources.task_of_file(path)), None).questions
        for path in (tmp_path / "sums.csv", same)
    )
    assert table == lines
    assert len(task_sources.load(Chosen(task_sources.task_of_file(tmp_path / "next.tsv")), None).questions) == 1
    (tmp_path / "bad.csv").write_text("query,choices,gold\na,x;y,0\n")
    with pytest.raises(InputError, match=r"bad\.csv, line 2: `choices` is not a list of strings"):
        task_sources.load(Chosen(task_sources.task_of_file(tmp_path / "bad.csv")), None)


def test_a_file_is_a_task_and_its_own_examples(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", *({"query": f"{n}+1=", "choices": ["x", "y"], "gold": 0} for n in range(4)))
    task = task_sources.task_of_file(path)
    found = task_sources.load(Chosen(task, 2), None)
    assert task.name == "sums"
    assert found.examples == found.questions
    assert len(found.questions) == 4
    assert task_sources.metrics_of(found.questions) == ("acc_norm", "acc")
    assert task_sources.load(Chosen(task), None).examples is None
    write(tmp_path / "sums.examples.jsonl", {"query": "9+1=", "choices": ["x"], "gold": 0})
    assert task.leaves_out and not task_sources.task_of_file(path).leaves_out  # none of those is a question
    examples = task_sources.load(Chosen(task, 1), None).examples
    assert examples is not None
    assert [each.example for each in examples] == ["9+1= x"]


def test_what_a_file_is_measured_by_depends_on_its_shape(tmp_path: Path) -> None:
    words = write(tmp_path / "a.jsonl", {"context": "a", "continuation": "b"})
    names = write(tmp_path / "b.jsonl", {"context_options": ["a", "b"], "continuation": "c", "gold": 0})
    for path, metrics in ((words, ("acc", "perplexity")), (names, ("acc",))):
        assert (
            task_sources.metrics_of(task_sources.load(Chosen(task_sources.task_of_file(path)), None).questions)
            == metrics
        )


def test_a_directory_holds_tasks_by_name_as_the_hub_has_them_or_in_a_shape(tmp_path: Path) -> None:
    write(tmp_path / "arc_easy.jsonl", ARC)
    write(
        tmp_path / "arc_challenge.jsonl", {"query": "Question: What is ice?", "choices": ["fire", "water"], "gold": 1}
    )
    easy, challenge = (task_sources.load(Chosen(TASKS[name]), tmp_path) for name in ("arc_easy", "arc_challenge"))
    assert easy.questions == challenge.questions
    assert easy.where == str(tmp_path / "arc_easy.jsonl")


def test_hellaswag_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Roof: A man sits. he\n3\na\nb\nc\nd\n" * 2 + "\n"
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(text.encode()))
    found = task_sources.load(Chosen(TASKS["hellaswag"]), tmp_path).questions
    assert len(found) == 2
    assert found[0].requests()[3] == ("Roof: A man sits. He", " d")
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(text.replace("\n", "\r\n").encode()))
    assert task_sources.load(Chosen(TASKS["hellaswag"]), tmp_path).questions == found
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(b"Roof\n7\na\nb\nc\nd\n"))
    with pytest.raises(InputError, match="line 1: needs a context, an index and four endings"):
        task_sources.load(Chosen(TASKS["hellaswag"]), tmp_path)
    monkeypatch.setattr(reading, "TEXT_BYTES", 1 << 20)  # what unpacks to more is not half a set of questions
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(text.encode() * (1 << 15)))
    with pytest.raises(InputError, match="more than 1 MB, unpacked"):
        task_sources.load(Chosen(TASKS["hellaswag"]), tmp_path)


def test_the_hubs_cache_is_read_where_the_directory_lacks_a_task(hub: Path, tmp_path: Path) -> None:
    files = {
        "ARC-Challenge/test-00000-of-00001.parquet": [ARC | {"question": "hard"}],
        "ARC-Easy/test-00000-of-00001.parquet": [ARC],
        "ARC-Easy/train-00000-of-00001.parquet": [ARC | {"question": "shown"}],
    }
    cached(hub, "allenai/ai2_arc", files)
    (tmp_path / "data").mkdir()
    found = task_sources.load(Chosen(TASKS["arc_easy"], 1), tmp_path / "data")
    assert [each.contexts[0] for each in found.questions] == ["Question: What is ice?\nAnswer:"]
    assert found.examples is not None
    assert "shown" in found.examples[0].example
    assert "hub cache" in found.where


def test_a_copy_in_part_gives_no_other_configs_questions(hub: Path) -> None:
    cached(hub, "allenai/ai2_arc", {"ARC-Easy/test-00000-of-00001.parquet": [ARC]})
    assert len(task_sources.load(Chosen(TASKS["arc_easy"]), None).questions) == 1
    with pytest.raises(task_sources.Missing, match="no test split of ARC-Challenge; `hf download"):
        task_sources.load(Chosen(TASKS["arc_challenge"]), None)


def test_a_split_that_lacks_a_file_is_missing(hub: Path) -> None:
    cached(hub, "allenai/ai2_arc", {"ARC-Easy/test-00001-of-00003.parquet": [ARC]})
    with pytest.raises(task_sources.Missing, match="has 1 of 3 files of test"):
        task_sources.load(Chosen(TASKS["arc_easy"]), None)


def test_a_repository_without_folders_has_one_config(hub: Path) -> None:
    cached(hub, "allenai/ai2_arc", {"data/test-00000-of-00001.parquet": [ARC]})
    assert len(task_sources.load(Chosen(TASKS["arc_challenge"]), None).questions) == 1


@pytest.mark.parametrize(
    "name", ["validation.jsonl", "data/validation-00000-of-00001.jsonl", "plain/validation/0.jsonl"]
)
def test_splits_are_found_by_files_and_folders(hub: Path, name: str) -> None:
    record = {"goal": "boil", "sol1": "heat", "sol2": "cool", "label": 0}
    cached(hub, "baber/piqa", {name: [record], name.replace("validation", "train"): []})
    assert len(task_sources.load(Chosen(TASKS["piqa"]), None).questions) == 1


def test_examples_may_come_from_the_hub_for_questions_of_a_file(hub: Path, tmp_path: Path) -> None:
    write(tmp_path / "arc_easy.jsonl", ARC)
    with pytest.raises(
        task_sources.Missing, match=r"no arc_easy\.examples\.jsonl is .*hf download allenai/ai2_arc --repo-type dataset"
    ):
        task_sources.load(Chosen(TASKS["arc_easy"], 1), tmp_path)
    cached(hub, "allenai/ai2_arc", {"ARC-Easy/train.jsonl": [ARC | {"question": "shown"}]})
    examples = task_sources.load(Chosen(TASKS["arc_easy"], 1), tmp_path).examples
    assert examples is not None
    assert "shown" in examples[0].example


def test_what_is_missing_is_said_with_how_to_get_it(hub: Path) -> None:
    with pytest.raises(
        task_sources.Missing, match=r"`hf download allenai/sciq --repo-type dataset` fetches it.*sciq\.jsonl"
    ):
        task_sources.load(Chosen(TASKS["sciq"]), None)
    cached(hub, "allenai/sciq", {"train.jsonl": []})
    with pytest.raises(task_sources.Missing, match="no test split"):
        task_sources.load(Chosen(TASKS["sciq"]), None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"query": "q", "choices": ["a"], "gold": 0}\n{"query": 1}\n', r"line 2: `choices` is missing|line 2: "),
        ("[1]\n", "line 1: is a number, not an object"),
        ("nonsense\n", "line 1: not JSON"),
        ("\n", "holds no records"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=reason):
        task_sources.load(Chosen(task_sources.task_of_file(path)), None)


@pytest.mark.parametrize("text", ["a\n", "a\n1\nb\nc\nd\ne\nf\n", "a\n4\nb\nc\nd\ne\n", "\xe9\n"])
def test_hellaswag_as_text_is_six_lines_a_question(tmp_path: Path, text: str) -> None:
    (tmp_path / "hellaswag_val_full.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"line [17]: (needs a context, an index and four endings|not UTF-8)"):
        task_sources.load(Chosen(TASKS["hellaswag"]), tmp_path)
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(b"no bzip2")
    with pytest.raises(InputError, match="damaged bzip2"):
        task_sources.load(Chosen(TASKS["hellaswag"]), tmp_path)


def test_records_of_another_task_are_named(tmp_path: Path) -> None:
    write(tmp_path / "piqa.jsonl", ARC)
    with pytest.raises(
        InputError, match=r"piqa\.jsonl, line 1: is not a record of this task: `goal` is missing; it has"
    ):
        task_sources.load(Chosen(TASKS["piqa"]), tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        task_sources.load(Chosen(TASKS["piqa"]), tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such file"):
        task_sources.task_of_file(tmp_path / "x.jsonl")
