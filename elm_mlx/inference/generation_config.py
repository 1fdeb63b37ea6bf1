"""How a model likes to be sampled: the `generation_config.json` of its directory.

Knows that file, which Hugging Face's tools share. Flags go before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elm_mlx import files
from elm_mlx.errors import InputError
from elm_mlx.reading import json_object_if_there

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
# What they may be, as `sampling` says it; -1 is how some tools write that `top_k` keeps all.
_RANGES = {
    "temp": (0.0, math.inf, "0 or more"),
    "top_p": (math.nextafter(0, 1), 1.0, "above 0, at most 1"),
    "top_k": (-1, math.inf, "0 or more"),
    "min_p": (0.0, 1.0, "from 0 to 1"),
    "repetition_penalty": (math.nextafter(0, 1), math.inf, "above 0"),
    "max_tokens": (1, math.inf, "1 or more"),
}


def load(directory: Path) -> dict[str, float]:
    """Settings by our names, only those that the directory has.

    As in Hugging Face's tools, `do_sample` true means a temperature of 1 unless the file has another, and false
    `temp` 0; without `do_sample` a temperature is not used. null is nothing said.

    Raises:
        InputError: the file is no JSON, or a setting is no number, or out of range.
    """
    path = files.expanded(directory) / FILE_NAME
    values = json_object_if_there(path)
    found = {
        ours: _number(path, ours, values[theirs]) for ours, theirs in NAMES.items() if values.get(theirs) is not None
    }
    sampled = values.get("do_sample")
    if not isinstance(sampled, bool | None):
        raise InputError(f"{path}: do_sample is {str(sampled)[:60]!r}: true or false is needed")
    if sampled is None:
        found.pop("temp", None)
    else:
        found["temp"] = found.get("temp", 1.0) if sampled else 0.0
    return found


def merge(
    directory: Path, flags: Mapping[str, float | None], defaults: Mapping[str, float] = DEFAULTS
) -> dict[str, float]:
    """`flags` that were given, else what the directory says, else `defaults`; the keys are those of `flags`."""
    saved = {**defaults, **load(directory)}
    return {name: saved[name] if value is None else value for name, value in flags.items()}


def save(directory: Path, settings: Mapping[str, float]) -> Path:
    """Write `settings` to the directory's file, whose path is returned; what else is in it stays.

    Raises:
        InputError: the file that is there cannot be read.
        ElmError: it cannot be written.
    """
    load(directory)  # what could not be read again is not written over
    path = files.expanded(directory) / FILE_NAME
    values = json_object_if_there(path) | {NAMES[name]: value for name, value in settings.items()}
    values["do_sample"] = settings["temp"] > 0
    if not values["do_sample"]:  # Hugging Face's tools refuse a temperature of 0
        del values[NAMES["temp"]]
    files.write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return path


def _number(path: Path, name: str, value: Any) -> float:
    """The value of our `name`, a whole number where ours is one. Raises InputError."""
    low, high, range_ = _RANGES[name]
    counts = isinstance(DEFAULTS[name], int)
    if type(value) is float and counts and value.is_integer():  # some tools write 50.0
        value = int(value)
    if type(value) not in ((int,) if counts else (int, float)):
        kind = "a whole number" if counts else "a number"
        raise InputError(f"{path}: {NAMES[name]} is {str(value)[:60]!r}: {kind} is needed")
    if not (low <= value <= high and math.isfinite(value)):
        raise InputError(f"{path}: {NAMES[name]} is {str(value)[:60]}: it must be {range_}")
    return max(value, 0)
