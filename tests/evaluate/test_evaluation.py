"""From tasks to results: the same whether or not it was interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from elm_mlx.errors import ElmError, InputError
from elm_mlx.evaluate import comparison, evaluation, tasks
from elm_mlx.evaluate.evaluation import Evaluation, EvaluationRequest
from elm_mlx.evaluate.score_record import ITEMS, RESULTS
from elm_mlx.store import adapters
from elm_mlx.store.loading import open_model

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


def wanted(data: Path, **fields: Any) -> EvaluationRequest:
    options: dict[str, Any] = {"tasks": ["arc_easy,winogrande", "lambada_openai"], "data": data}
    return EvaluationRequest(**options | fields)


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

    def advance(key: str, done: int = 0, total: int = 0) -> None:
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
    other = Evaluation(tiny_model_dir, wanted(data, limit=1), tmp_path / "out", compute_dtype="float16")
    with pytest.raises(InputError, match=r"computed in = float32 on cpu, not float16(/float32)? on cpu"):
        other.run()


def test_a_suite_tells_what_is_missing_and_has_no_mean_then(
    tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    done = Evaluation(tiny_model_dir, EvaluationRequest(data=data), tmp_path / "out")
    done.run()
    assert {row.name for row in done.rows} == {"arc_easy", "winogrande"}
    assert set(done.missing) == {"arc_challenge", "boolq", "hellaswag", "piqa", "sciq"}
    assert done.mean is None
    (data / "arc_easy.jsonl").unlink()
    (data / "winogrande.jsonl").unlink()
    with pytest.raises(InputError, match="none of the tasks' data were found; arc_challenge"):
        Evaluation(tiny_model_dir, EvaluationRequest(data=data), tmp_path / "out").run()


def test_a_question_that_cannot_be_scored_is_named(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    (data / "long.jsonl").write_text(json.dumps({"context": "a", "continuation": "b " * 2000}) + "\n")
    done = Evaluation(tiny_model_dir, EvaluationRequest(tasks=[str(data / "long.jsonl")]), tmp_path / "out")
    with pytest.raises(InputError, match=r"long\.jsonl, question 1: an answer of"):
        done.run()


def test_examples_are_part_of_what_is_read(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    own = str(data / "arc_easy.jsonl")
    done = Evaluation(tiny_model_dir, EvaluationRequest(tasks=[own], shots=2), tmp_path / "out")
    done.run()
    assert list(done.results["tasks"]) == ["arc_easy@2"]
    works, _ = evaluation.prepare(EvaluationRequest(tasks=[own], shots=2).chosen(), done._loaded.tokenizer, 512)
    assert all(each.start > 60 for item in works[0].items for each in item)


def test_bits_per_byte_are_the_same_however_the_text_is_cut_in_batches(
    tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    options = {"texts": [data / "tale.txt"], "tasks": []}
    fine = Evaluation(tiny_model_dir, EvaluationRequest(**options, window=128, stride=16), tmp_path / "fine")
    coarse = Evaluation(tiny_model_dir, EvaluationRequest(**options, window=128, stride=128), tmp_path / "coarse")
    for each in (fine, coarse):
        each.run()
    assert fine.rows[0].score.count == coarse.rows[0].score.count == 1
    assert fine.rows[0].score.value == pytest.approx(coarse.rows[0].score.value, rel=0.2)


def test_what_would_have_one_name_in_the_results_is_refused(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tale.txt").write_text(f"the {folder} story")
        (tmp_path / folder / "arc_easy.jsonl").write_text((data / "arc_easy.jsonl").read_text())
    paths = [tmp_path / folder / "arc_easy.jsonl" for folder in "ab"]
    for names in ([str(paths[0]), str(paths[1])], ["arc_easy", str(paths[0])]):
        with pytest.raises(InputError, match="results are kept by name, and both are arc_easy"):
            EvaluationRequest(tasks=names).chosen()
    assert len(EvaluationRequest(tasks=[str(paths[0])] * 2).chosen()) == 1
    texts = [tmp_path / folder / "tale.txt" for folder in "ab"]
    with pytest.raises(InputError, match=r"both are tale\.txt"):
        EvaluationRequest(texts=texts).chosen()
    once = Evaluation(tiny_model_dir, EvaluationRequest(texts=texts[:1] * 2), tmp_path / "out")
    once.run()
    assert [row.score.count for row in once.rows] == [1, 1]
    with pytest.raises(InputError, match="--tasks names no task"):
        EvaluationRequest(tasks=[""]).chosen()


def test_some_of_a_groups_parts_do_not_have_its_name_nor_take_its_place(
    tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.GROUPS, "mmlu", ["mmlu_anatomy", "mmlu_virology"])
    for name in tasks.GROUPS["mmlu"]:
        record = {"question": f"{name}?", "choices": list(ANIMALS), "answer": 1}
        (data / f"{name}.jsonl").write_text(json.dumps(record) + "\n")

    def ask(*names: str) -> dict[str, Any]:
        done = Evaluation(tiny_model_dir, EvaluationRequest(tasks=list(names), data=data), tmp_path / "out")
        done.run()
        return {line["task"]: line["count"] for line in done.results["scores"]}

    assert ask("mmlu_anatomy") == {"mmlu_anatomy": 1}
    assert ask("mmlu") == {"mmlu": 2}
    assert ask("mmlu_virology") == {"mmlu": 2, "mmlu_virology": 1}
    path = data / "mmlu_virology.jsonl"
    path.write_text(path.read_text() * 2)
    assert ask("mmlu_virology") == {"mmlu_virology": 2}, "the group's score was of questions past"
    assert set(json.loads((tmp_path / "out" / RESULTS).read_text())["tasks"]) == set(tasks.GROUPS["mmlu"])


def test_a_config_that_was_changed_needs_another_place(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_model_dir, path)
    Evaluation(path, wanted(data, limit=1), tmp_path / "out").run()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_freq_constant": 77}))
    with pytest.raises(InputError, match="holds scores with"):
        Evaluation(path, wanted(data, limit=1), tmp_path / "out").run()


def test_no_numbers_are_no_scores(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    done = Evaluation(tiny_model_dir, wanted(data), tmp_path / "out")
    norm = done._loaded.model.transformer.norm
    norm.weight = norm.weight * float("nan")
    with pytest.raises(ElmError, match=r"arc_easy, item [0-9]+: the model's log-probabilities are NaN"):
        done.run()
    assert (tmp_path / "out" / ITEMS).read_bytes() == b""


def test_texts_differ_document_by_document(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    path = data / "tales.jsonl"
    path.write_text("".join(json.dumps({"text": "the quick fox " * n}) + "\n" for n in range(1, 9)))
    runs = []
    for dtype in ("float32", "bfloat16"):
        done = Evaluation(tiny_model_dir, EvaluationRequest(texts=[path]), tmp_path / dtype, compute_dtype=dtype)
        done.run()
        runs.append(done.results)
    (found,) = comparison.compare(*runs)
    row = next(line for line in runs[0]["scores"] if line["metric"] == "bits_per_byte")
    assert (found.task, found.metric, found.count) == ("tales.jsonl", "bits_per_byte", 8)
    assert found.first == pytest.approx(row["value"])


def test_an_adapters_results_have_a_place_of_their_own(
    tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = open_model(tiny_model_dir)
    adapter = adapters.plan(loaded.model.config, rank=2)
    adapters.attach(loaded.model, adapter)
    adapters.save(tmp_path / "mine", loaded.model, adapter)
    monkeypatch.chdir(tmp_path)
    plain, adapted = (Evaluation(tiny_model_dir, wanted(data, limit=1), adapter=path) for path in (None, Path("mine")))
    assert adapted.out == Path("evals", f"{tiny_model_dir.name}+mine") and plain.out.name == tiny_model_dir.name
    adapted.run()
    config = json.loads(Path("mine/adapter_config.json").read_text())
    config["lora_parameters"]["scale"] *= 2
    Path("mine/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"with adapter = [0-9a-f]{8}…, not [0-9a-f]{8}…; "):
        Evaluation(tiny_model_dir, wanted(data, limit=1), adapter=Path("mine")).run()
