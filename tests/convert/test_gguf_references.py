"""GGUF files of every family against llama.cpp: `benchmarks/gguf_logits.py` kept logits and a hash of each file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf_cases
import pytest

KEPT = json.loads((Path(__file__).parents[1] / "fixtures" / "gguf.json").read_text())


@pytest.mark.parametrize("name", gguf_cases.NAMES)
def test_the_file_that_llama_cpp_has_read_is_written_and_its_logits_are_ours(name: str, tmp_path: Path) -> None:
    case = gguf_cases.write(tmp_path / "case", name)
    files = [file for file in (case.file, case.adapter) if file is not None]
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == KEPT[name]["sha256"]
    assert gguf_cases.distance(case, KEPT[name]["logits"]) < 1e-4
