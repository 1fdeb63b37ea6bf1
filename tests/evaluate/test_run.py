"""From tasks to results: the same whether or not it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elm_mlx.errors import InputError
from elm_mlx.evaluate import run
from elm_mlx.evaluate.evaluation import Evaluation, Wanted
from elm_mlx.evaluate.record import ITEMS, RESULTS

ANIMALS = ("the quick brown fox", "lazy dogs", "an old king", "cafés")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A few questions of several tasks."""
    path = tmp_path / "data"
    path.mkdir()
    lines: dict[str, list[dict[str, Any]]] = {
        "arc_easy.jsonl": [
            {"query": f"Question: who told story {n}?", "choices": list(ANIMALS), "gold": n % 4} for n in range(12)
        ],
        "winogrande.jsonl": [
            {
                "context_options": [f"{a} saw {n} dogs since {a}" for a in ANIMALS[:2]],
                "continuation": "jumps.",
                "gold": 0,
            }
            for n in range(7)
        ],
        "lambada_openai.jsonl": [{"context": f"the quick {word} fox", "continuation": "jumps"} for word in ("a", "b")],
    }
    for name, records in lines.items():
        (path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "tale.txt").write_text("the quick brown fox jumps over lazy dogs. " * 20)
    return path


def wanted(data: Path, **fields: Any) -> Wanted:
    options: dict[str, Any] = {"tasks": ["arc_easy,winogrande", "lambada_openai"], "data": data}
    return Wanted(**options | fields)


def test_results_are_kept_with_each_questions_values(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    done = Evaluation(tiny_model_dir, wanted(data, texts=[data / "tale.txt"]), tmp_path / "out")
    done.run()
    kept = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert list(kept["tasks"])[:3] == ["arc_easy", "winogrande", "lambada_openai"]
    arc = kept["tasks"]["arc_easy"]
    assert len(arc["logprobs"]) == 12
    assert arc["metrics"]["acc"]["value"] == pytest.approx(sum(arc["values"]["acc"]) / 12)
    assert [row["metric"] for row in kept["scores"]] == [
        "acc_norm", "acc", "acc", "acc", "perplexity", "bits_per_byte", "perplexity"
    ]  # fmt: skip
    assert kept["pace"]["items"] == 12 + 7 + 2 + len(kept["tasks"]["tale.txt, window 512, stride 256"]["logprobs"])
    assert done.published is None


def test_a_run_that_was_killed_goes_on_where_it_was(
    tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Evaluation(tiny_model_dir, wanted(data), tmp_path / "whole")
    whole.run()
    killed = Evaluation(tiny_model_dir, wanted(data), tmp_path / "killed")

    class Killed(BaseException):
        pass

    def advance(key: str, items: int, done: int, total: int) -> None:
        if key == "winogrande":
            raise Killed

    with pytest.raises(Killed):
        killed.run(advance)
    lines = (tmp_path / "killed" / ITEMS).read_bytes()
    assert 12 < lines.count(b"\n") < 21
    (tmp_path / "killed" / ITEMS).write_bytes(lines[:-40])  # torn, as by kill -9
    resumed = Evaluation(tiny_model_dir, wanted(data), tmp_path / "killed")
    resumed.run()
    assert resumed.pace.items == 21 - (lines.count(b"\n") - 1)
    for key, entry in whole.results["tasks"].items():
        for one, other in zip(resumed.results["tasks"][key]["logprobs"], entry["logprobs"], strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    assert [row["value"] for row in resumed.results["scores"]] == pytest.approx(
        [row["value"] for row in whole.results["scores"]], rel=1e-4
    )


def test_more_questions_and_tasks_are_added_to_what_is_there(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    first = Evaluation(tiny_model_dir, wanted(data, tasks=["arc_easy"], limit=5), tmp_path / "out")
    first.run()
    more = Evaluation(tiny_model_dir, wanted(data, tasks=["arc_easy", "winogrande"]), tmp_path / "out")
    more.run()
    assert (first.pace.items, more.pace.items) == (5, 7 + 7)
    again = Evaluation(tiny_model_dir, wanted(data, tasks=["arc_easy"], limit=3), tmp_path / "out")
    again.run()
    assert again.pace.items == 0
    assert again.rows[0].score.count == 3
    kept = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert {line["task"] for line in kept["scores"]} == set(kept["tasks"]) == {"arc_easy", "winogrande"}
    assert len(kept["tasks"]["arc_easy"]["logprobs"]) == 3


def test_changed_questions_are_scored_again(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    Evaluation(tiny_model_dir, wanted(data), tmp_path / "out").run()
    path = data / "winogrande.jsonl"
    path.write_text(path.read_text().replace("saw 3 dogs", "saw three dogs"))
    again = Evaluation(tiny_model_dir, wanted(data), tmp_path / "out")
    again.run()
    assert again.pace.items == 1


def test_what_is_computed_otherwise_needs_another_place(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    Evaluation(tiny_model_dir, wanted(data, limit=1), tmp_path / "out").run()
    other = Evaluation(tiny_model_dir, wanted(data, limit=1), tmp_path / "out", compute_dtype="bfloat16")
    with pytest.raises(InputError, match=r"computed in float32 on cpu, now bfloat16 on cpu"):
        other.run()


def test_a_suite_tells_what_is_missing_and_has_no_mean_then(
    tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    done = Evaluation(tiny_model_dir, Wanted(data=data), tmp_path / "out")
    done.run()
    assert {row.name for row in done.rows} == {"arc_easy", "winogrande"}
    assert set(done.missing) == {"arc_challenge", "boolq", "hellaswag", "piqa", "sciq"}
    assert done.mean is None
    (data / "arc_easy.jsonl").unlink()
    (data / "winogrande.jsonl").unlink()
    with pytest.raises(InputError, match="no task's data are here; of arc_challenge"):
        Evaluation(tiny_model_dir, Wanted(data=data), tmp_path / "out").run()


def test_a_question_that_cannot_be_scored_is_named(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    (data / "long.jsonl").write_text(json.dumps({"context": "a", "continuation": "b " * 2000}) + "\n")
    done = Evaluation(tiny_model_dir, Wanted(tasks=[str(data / "long.jsonl")]), tmp_path / "out")
    with pytest.raises(InputError, match=r"long\.jsonl, question 1: an answer of"):
        done.run()


def test_examples_are_part_of_what_is_read(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    own = str(data / "arc_easy.jsonl")
    done = Evaluation(tiny_model_dir, Wanted(tasks=[own], shots=2), tmp_path / "out")
    done.run()
    assert list(done.results["tasks"]) == ["arc_easy@2"]
    works, _ = run.prepare(Wanted(tasks=[own], shots=2).chosen(), done._loaded.tokenizer, 512)
    assert all(each.start > 60 for item in works[0].items for each in item)


def test_bits_per_byte_are_the_same_however_the_text_is_cut_in_batches(
    tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    options = {"texts": [data / "tale.txt"], "tasks": []}
    fine = Evaluation(tiny_model_dir, Wanted(**options, window=128, stride=16), tmp_path / "fine")
    coarse = Evaluation(tiny_model_dir, Wanted(**options, window=128, stride=128), tmp_path / "coarse")
    for each in (fine, coarse):
        each.run()
    assert fine.rows[0].score.count == coarse.rows[0].score.count == 1
    assert fine.rows[0].score.value == pytest.approx(coarse.rows[0].score.value, rel=0.2)
