"""GGUF files of every family against llama.cpp: `benchmarks/gguf_logits.py` kept logits and a hash of each file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import gguf_cases
import mlx.core as mx
import mlx.nn as nn
import pytest

KEPT = json.loads((Path(__file__).parents[1] / "fixtures" / "gguf.json").read_text())


@pytest.mark.parametrize("name", gguf_cases.NAMES)
def test_the_file_that_llama_cpp_has_read_is_written_and_its_logits_are_ours(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemma = name.startswith("gemma")
    if gemma:
        monkeypatch.setattr(nn, "gelu_approx", gelu_by_float16)
    case = gguf_cases.write(tmp_path / "case", name)
    files = [file for file in (case.file, case.adapter) if file is not None]
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == KEPT[name]["sha256"]
    assert gguf_cases.distance(case, KEPT[name]["logits"]) < (2e-4 if gemma else 1e-4)


def gelu_by_float16(x: mx.array, gelu: Callable[[mx.array], mx.array] = nn.gelu_approx) -> mx.array:
    """As llama.cpp on a CPU looks it up, for numbers within 10 of 0."""
    found = gelu(x.astype(mx.float16).astype(mx.float32)).astype(mx.float16).astype(mx.float32)
    return mx.where(mx.abs(x) < 10, found, mx.maximum(x, 0))
