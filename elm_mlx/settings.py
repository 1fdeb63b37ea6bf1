"""How a model likes to be sampled: the `generation_config.json` of its directory.

Knows that file, which Hugging Face's tools share. Flags go before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from elm_mlx.errors import InputError

FILE_NAME = "generation_config.json"

# our name -> the file's
NAMES = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
}
DEFAULTS = {"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 256}


def load(directory: Path) -> dict[str, float]:
    """Settings by our names, only those that the directory has. `do_sample` false, or absent, means `temp` 0.

    Raises:
        InputError: the file is no JSON, or a setting is no number.
    """
    path = directory / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object")
    found = {ours: values[theirs] for ours, theirs in NAMES.items() if values.get(theirs) is not None}
    for ours, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, type(DEFAULTS[ours]))):
            raise InputError(f"{path}: {NAMES[ours]} is {value!r}: a number is needed")
    if not values.get("do_sample", False):
        found.pop("temp", None)
    return found


def merge(directory: Path, flags: Mapping[str, float | None]) -> dict[str, float]:
    """`flags` that were given, else what the directory says, else DEFAULTS; the keys are those of `flags`."""
    saved = {**DEFAULTS, **load(directory)}
    return {name: saved[name] if value is None else value for name, value in flags.items()}
