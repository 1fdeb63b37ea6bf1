"""Damaged inputs of every kind are answered or refused in one line: a few thousand here, more by benchmarks/fuzz.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Of those that open a model fewer, as each answer costs a prompt and two tokens.
WITHOUT_A_MODEL = (
    "tokenizer.json", "tokenizer.json phi3", "tokenizer.model", "template", "torch", "hub", "run.json", "metrics",
    "records", "transcript", "yaml", "toml", "eval",
)  # fmt: skip
OF_A_MODEL = (
    "config", "config llama", "config mistral", "config phi3", "config olmo", "config olmo2", "config olmo3",
    "config mamba", "config quantized", "generation_config", "tokenizer_config", "safetensors", "safetensors llama",
    "safetensors quantized", "index", "adapter", "conversion.json", "state.json",
)  # fmt: skip


@pytest.mark.parametrize(("kinds", "cases"), [(WITHOUT_A_MODEL, 150), (OF_A_MODEL, 40)])
def test_damaged_inputs_are_answered_or_refused_in_one_line(kinds: tuple[str, ...], cases: int) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "fuzz.py", *kinds, "--cases", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == len(kinds) + 2 and done.stdout.endswith("refused in one line\n")


def test_every_kind_is_tried() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "fuzz.py", "--help"], capture_output=True, text=True, check=True
    )
    named = " ".join(done.stdout.split())
    assert all(kind in named for kind in (*WITHOUT_A_MODEL, *OF_A_MODEL))
    assert named.count(", ") >= len((*WITHOUT_A_MODEL, *OF_A_MODEL)) - 1
