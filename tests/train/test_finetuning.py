"""What a run was taught, read back from its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from elm_mlx.data import examples
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx.train.finetuning import trained_on

RECORDS = [{"prompt": f"the fox {i}", "completion": "jumps over lazy dogs"} for i in range(100)]


def left(path: Path, data: Path, command: str = "lora", **settings: Any) -> Path:
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"command": command, "settings": {"data": str(data), **settings}}))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def test_the_answers_of_a_run(tiny_model_dir: Path, tiny_tokenizer: Tokenizer, data: Path, tmp_path: Path) -> None:
    out = left(tmp_path / "run", data)
    found = trained_on(out, tiny_model_dir)
    assert found is not None and found.name == "answers that it was trained on"
    learned = {e.ids: e.trained for e in examples.load(data, tiny_tokenizer, None, 512)["train"].examples}
    assert 1 < len(found.rows) <= 32
    assert sum(sum(counted) for _, counted in found.rows) <= 256
    for ids, counted in found.rows:  # what is said after a position counts where predicting the next token did
        assert learned[tuple(ids)][1:] == tuple(counted)[:-1] and not counted[-1]
    assert trained_on(out / "checkpoints" / "step-1", tiny_model_dir) == found


def test_of_pairs_both_answers(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "the fox", "chosen": "jumps", "rejected": "sleeps"}) + "\n")
    found = trained_on(left(tmp_path / "run", path, "dpo"), tiny_model_dir)
    assert found is not None and len(found.rows) == 2


@pytest.mark.parametrize(
    "record", ["", "[]", "{}", '{"settings": []}', '{"settings": {"data": 7}}', '{"settings": {}}']
)
def test_none_where_the_record_says_nothing(record: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(record)
    assert trained_on(tmp_path, tiny_model_dir) is None


def test_none_where_there_is_nothing(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    assert trained_on(tmp_path / "nowhere", tiny_model_dir) is None
    assert trained_on(left(tmp_path / "run", tmp_path / "gone.jsonl"), tiny_model_dir) is None
    data.write_text("not JSON")
    assert trained_on(left(tmp_path / "other", data), tiny_model_dir) is None


def test_fuse_compares_on_them(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    from elm_mlx.store import adapters
    from elm_mlx.store.loading import load

    model, _ = load(tiny_model_dir)
    adapter = adapters.plan(model.config, rank=2)
    adapters.attach(model, adapter)
    out = left(tmp_path / "run", data)
    adapters.save(out, model, adapter)
    code, printed, err = run("fuse", tiny_model_dir, out, tmp_path / "fused")
    assert code == 0 and "positions: answers that it was trained on" in printed, err
