"""The experiment on little: it runs, its figures are those of what it wrote, and it goes on where it was."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from elm_mlx.store.loading import load

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parent.parent


def test_few_and_many_tokens_quantized_and_repaired(tmp_path: Path) -> None:
    options = ["--steps", "2", "--seeds", "0", "--bits", "2", "--iters", "2", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "examples" / "fragility" / "run.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "losses.json").read_text("utf-8"))
    assert list(losses) == ["2/0/16", "2/0/2"]
    assert losses["2/0/2"]["after"] != losses["2/0/2"]["before"] > losses["2/0/16"]["before"]

    model, tokenizer = load(tmp_path / "steps-2-seed-0-2-bit", compute_dtype="float32")
    assert tokenizer is not None
    means = []
    with gzip.open(ROOT / "examples" / "classics" / "held-out.jsonl.gz", "rt", encoding="utf-8") as lines:
        for text in [json.loads(line)["text"] for line in lines]:
            ids = np.array(tokenizer.encode(text)[: 32 * 256 + 1])
            logits = np.array(model(mx.array(ids[:-1].reshape(32, 256)))).reshape(32 * 256, -1)
            means.append(np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(32 * 256), ids[1:]]))
    assert losses["2/0/2"]["before"] == pytest.approx(np.mean(means), abs=1e-4)

    again = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert "$ elm-mlx" not in again.stdout and again.stdout.strip() in done.stdout
    parameters = sum(weight.size for weight in mx.load(str(tmp_path / "steps-2-seed-0" / "model.safetensors")).values())
    assert f"PARAMETERS = {parameters:_}" in (ROOT / "examples" / "fragility" / "run.py").read_text("utf-8")
