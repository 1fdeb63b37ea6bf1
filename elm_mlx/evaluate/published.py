"""The paper's scores, to stand beside ours.

Knows the models by their shapes, and tells an instruction-tuned one by name: weights are not looked at, so whoever
trains a model of a published shape sees the published model's scores beside his own.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from elm_mlx import json_files
from elm_mlx.errors import InputError
from elm_mlx.evaluate.tasks import SUITES
from elm_mlx.model.config import PRESETS, ModelConfig

_FILE = Path(__file__).with_name("published.json")


def name_of(config: Any, directory: Path) -> str | None:
    """The published model that has this shape, `OpenELM-270M-Instruct` for one; None where there is none."""
    if not isinstance(config, ModelConfig):
        return None
    for name in PRESETS:
        preset = ModelConfig.preset(name)
        alike = replace(
            preset, quantization=config.quantization, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
        )
        if config.shapes() == preset.shapes() and config == alike:
            return f"{name}-Instruct" if "instruct" in _names(directory) else name
    return None


def scores(name: str) -> dict[tuple[str, int], float]:
    """In per cent, by task and number of examples."""
    found = _read()["models"][name]
    return {
        (task, shots): found[suite][task]
        for suite, tasks in SUITES.items()
        for task, shots in tasks.items()
        if task in found[suite]
    }


def mean(name: str, suite: str) -> float:
    """Of a suite, in per cent."""
    return float(_read()["models"][name][suite]["mean"])


def source() -> str:
    return str(_read()["source"])


def _names(directory: Path) -> str:
    """What a model directory is called, and what it was made of."""
    try:
        made = json_files.read_object(directory / "conversion.json")["source"]["name"]
    except (InputError, KeyError, TypeError):
        made = ""
    return f"{directory.resolve().name} {made}".lower()


@functools.cache
def _read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found
