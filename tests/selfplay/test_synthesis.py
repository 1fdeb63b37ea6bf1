"""A round of synthesis: data and pairs that lora and dpo read, and what is never overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import guesses
import pytest

from elm_mlx.data import records
from elm_mlx.data.records import Preference, PromptAnswer
from elm_mlx.errors import ElmError, InputError
from elm_mlx.selfplay.answer_sampling import Sampling, SamplingSettings
from elm_mlx.selfplay.synthesis import record_of, synthesize


@pytest.fixture(scope="module")
def sampling(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Sampling:
    model, task = guesses.write(tmp_path_factory.mktemp("guesses"), tiny_tokenizer_file)
    return Sampling(SamplingSettings(model, str(task), answers=4, max_tokens=4))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lora_and_dpo_read_what_is_written(sampling: Sampling, tmp_path: Path) -> None:
    out, pairs = tmp_path / "data.jsonl", tmp_path / "pairs.jsonl"
    done = synthesize(sampling, 160, out, pairs)
    assert len(done.problems) == 40
    assert read(out) == done.chosen.examples and read(pairs) == done.chosen.pairs
    split = records.read(out)["train"]
    examples = [record for record in split.records if isinstance(record, PromptAnswer)]
    assert len(examples) == len(done.chosen.examples) > 10
    assert split.ignored == {"`source`": len(examples)}
    preferences = list(records.read(pairs, paired=True)["train"].records)
    assert all(isinstance(each, Preference) for each in preferences) and len(preferences) > 5
    for line in read(out):
        assert set(line["source"]) == {"task", "model", "seed", "difficulty", "problem", "sample", "verdict"}
        assert line["source"]["verdict"] == "right" and line["completion"] in "123"


def test_more_samples_add_to_the_record_and_fewer_take_its_beginning(sampling: Sampling, tmp_path: Path) -> None:
    out, other = tmp_path / "data.jsonl", tmp_path / "other.jsonl"
    synthesize(sampling, 80, out)
    few, record = out.read_bytes(), record_of(out).read_bytes()
    synthesize(sampling, 160, out)
    synthesize(sampling, 160, other)
    assert out.read_bytes() == other.read_bytes() != few
    assert record_of(out).read_bytes().startswith(record)
    synthesize(sampling, 80, out)
    assert out.read_bytes() == few


def test_a_file_that_is_there_is_not_replaced_unasked(sampling: Sampling, tmp_path: Path) -> None:
    out, pairs = tmp_path / "data.jsonl", tmp_path / "pairs.jsonl"
    out.write_text("mine")
    with pytest.raises(InputError, match=r"data.jsonl: exists already; pass --overwrite"):
        synthesize(sampling, 40, out)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"] and out.read_text() == "mine"
    pairs.write_text("mine")
    with pytest.raises(InputError, match=r"pairs.jsonl: exists already"):
        synthesize(sampling, 40, tmp_path / "new.jsonl", pairs)
    synthesize(sampling, 40, out, overwrite=True)
    assert read(out)


def test_a_file_of_something_else_is_not_replaced_though_there_is_a_record(sampling: Sampling, tmp_path: Path) -> None:
    out, pairs = tmp_path / "data.jsonl", tmp_path / "pairs.jsonl"
    synthesize(sampling, 80, out)
    kept = out.read_bytes()
    pairs.write_text('{"prompt": "mine", "chosen": "a", "rejected": "b"}\n')
    out.write_bytes(kept.replace(b"right", b"wrong", 1))
    with pytest.raises(InputError, match=r"data.jsonl: exists already, and not of what data.jsonl.answers holds"):
        synthesize(sampling, 80, out)
    out.write_bytes(kept)
    with pytest.raises(InputError, match=r"pairs.jsonl: exists already, and not of what"):
        synthesize(sampling, 80, out, pairs)
    assert b"mine" in pairs.read_bytes()
    synthesize(sampling, 80, out, pairs, overwrite=True)
    assert out.read_bytes() == kept and b"mine" not in pairs.read_bytes()
    for samples in (120, 80):  # of more of the record, and less
        synthesize(sampling, samples, out, pairs)


def test_lines_that_someone_has_added_are_kept(sampling: Sampling, tmp_path: Path) -> None:
    out, pairs = tmp_path / "data.jsonl", tmp_path / "pairs.jsonl"
    synthesize(sampling, 40, out, pairs)
    for path in (out, pairs):
        written = path.read_bytes()
        path.write_bytes(written + b'{"prompt": "mine", "completion": "mine"}\n')
        kept = out.read_bytes(), pairs.read_bytes()
        for samples in (20, 40, 80):
            why = "(goes on after|exists already, and not of) what data.jsonl.answers"
            with pytest.raises(InputError, match=f"{path.name}: {why}"):
                synthesize(sampling, samples, out, pairs)
            assert (out.read_bytes(), pairs.read_bytes()) == kept
        path.write_bytes(written)
    synthesize(sampling, 80, out, pairs)


def test_begun_anew_the_record_is_another(sampling: Sampling, tmp_path: Path) -> None:
    out = tmp_path / "data.jsonl"
    record_of(out).write_text('{"record of": {}}\n')
    with pytest.raises(InputError, match="holds answers with MODEL = none"):
        synthesize(sampling, 40, out)
    synthesize(sampling, 40, out, overwrite=True)
    assert len(read(record_of(out))) == 11


def test_no_pair_is_said_and_leaves_nothing_but_the_record(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    model, task = guesses.write(tmp_path / "made", tiny_tokenizer_file)
    task.write_text(task.read_text().replace("return answer ==", "return True or answer =="))
    out = tmp_path / "data.jsonl"
    sampling = Sampling(SamplingSettings(model, str(task), answers=2, max_tokens=2, difficulty="1"))
    with pytest.raises(ElmError, match="answered both rightly and wrongly"):
        synthesize(sampling, 8, out, tmp_path / "pairs.jsonl")
    assert not out.exists()
