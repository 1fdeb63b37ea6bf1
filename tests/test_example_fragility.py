"""The experiment on little: it runs, its figures are those of what it wrote, and it goes on where it was."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from elm_mlx.store.loading import load

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parent.parent
FRAGILITY = ROOT / "examples" / "fragility"


def imported(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A module of the example, as its own script would find it."""
    for found in ("run", "page", "command", "books", "measure", "pages", "spread"):
        monkeypatch.delitem(sys.modules, found, raising=False)
    monkeypatch.setattr(sys, "path", [str(FRAGILITY), str(FRAGILITY.parent), *sys.path])
    return importlib.import_module(name)


def test_few_and_many_tokens_quantized_and_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--steps", "2", "--seeds", "0", "--bits", "8", "2", "--iters", "2", "--out", str(tmp_path)]
    command = [sys.executable, str(FRAGILITY / "run.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "losses.json").read_text("utf-8"))
    whole, coarse, fine = (losses[f"steps-2-seed-0-bits-{bits}"] for bits in (16, 2, 8))
    assert [[*each] for each in (whole, coarse, fine)] == [
        ["rounded", "adapter"], ["rounded", "adapter", "learned"], ["rounded"],
    ]  # fmt: skip
    assert len({*whole.values(), *coarse.values()}) == 5 and coarse["rounded"] > whole["rounded"]

    for name, part in (("2-bit", "rounded"), ("2-bit-dwq", "learned")):
        model, tokenizer = load(tmp_path / f"steps-2-seed-0-{name}", compute_dtype="float32")
        assert tokenizer is not None
        means = []
        with gzip.open(ROOT / "examples" / "classics" / "held-out.jsonl.gz", "rt", encoding="utf-8") as lines:
            for text in [json.loads(line)["text"] for line in lines]:
                ids = np.array(tokenizer.encode(text)[: 32 * 256 + 1])
                logits = np.array(model(mx.array(ids[:-1].reshape(32, 256)))).reshape(32 * 256, -1)
                means.append(np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(32 * 256), ids[1:]]))
        assert coarse[part] == pytest.approx(np.mean(means), abs=1e-4)

    again = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert "$ elm-mlx" not in again.stdout and again.stdout.strip() in done.stdout
    parameters = sum(weight.size for weight in mx.load(str(tmp_path / "steps-2-seed-0" / "model.safetensors")).values())
    assert parameters == imported(monkeypatch, "page").PARAMETERS


@pytest.mark.parametrize(("made", "asked"), [(1, True), (2, False)])
def test_a_training_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: int, asked: bool
) -> None:
    """It has left a model, too."""
    run, calls = imported(monkeypatch, "run"), []
    monkeypatch.setattr(run, "elm", lambda *words: calls.append(words))
    model = tmp_path / "steps-2-seed-0"
    (model / "checkpoints").mkdir(parents=True)
    (model / "model.safetensors").touch()
    (model / "metrics.jsonl").write_text(f'{{"step": 0}}\n{{"step": {made}}}\n')
    assert run.train(tmp_path, 2, 0) == model
    assert ["--resume" in words for words in calls] == [True] * asked


def test_the_page_is_that_of_its_recorded_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = imported(monkeypatch, "page")
    for name in ("README.md", "losses.json"):
        shutil.copyfile(FRAGILITY / name, tmp_path / name)
    before = (tmp_path / "README.md").read_text("utf-8")
    (tmp_path / "README.md").write_text(re.sub(r"(?m)^\| [\d.]+ \| .*±.*\n", "", before), "utf-8")
    monkeypatch.setattr(page, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["page.py"])
    page.main()
    assert (tmp_path / "README.md").read_text("utf-8") == before
    assert (tmp_path / "fragility.png").read_bytes().startswith(b"\x89PNG")

    recorded = json.loads((FRAGILITY / "losses.json").read_text("utf-8"))
    coarse, whole = ([recorded[f"steps-450-seed-{seed}-bits-{bits}"] for seed in range(3)] for bits in (2, 16))
    for part in coarse[0]:
        against = "adapter" if part == "adapter" else "rounded"
        added = [one[part] - other[against] for one, other in zip(coarse, whole, strict=True)]
        reach = 4.3027 * statistics.stdev(added) / 3**0.5
        assert f"| {statistics.fmean(added):.3f} ± {reach:.3f}" in before
