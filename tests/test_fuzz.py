"""Damaged inputs of every kind are answered or refused in one line: a few thousand here, more by benchmarks/fuzz.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_kinds import KINDS

ROOT = Path(__file__).parents[1]

# Of those that open a model fewer, as each answer costs a prompt and two tokens.
WITHOUT_A_MODEL = (
    "tokenizer.json", "tokenizer.json phi3", "tokenizer.json's parts", "tokenizer.model", "template", "torch", "hub",
    "gguf", "gguf openelm", "run.json", "metrics", "records", "transcript", "answers", "yaml", "toml", "eval",
    "documents", "documents' index",
)  # fmt: skip
OF_A_PROCESS = ("pdf",)  # each of its own
OF_A_MODEL = tuple(name for name in KINDS if name not in WITHOUT_A_MODEL + OF_A_PROCESS)


@pytest.mark.parametrize(("kinds", "cases"), [(WITHOUT_A_MODEL, 150), (OF_A_MODEL, 40), (OF_A_PROCESS, 8)])
def test_damaged_inputs_are_answered_or_refused_in_one_line(kinds: tuple[str, ...], cases: int) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "fuzz.py", *kinds, "--cases", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == len(kinds) + 2 and done.stdout.endswith("refused in one line\n")
