"""How a model likes to be sampled: the `generation_config.json` of its directory.

Knows that file, which Hugging Face's tools share. Flags go before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from elm_mlx import files
from elm_mlx.errors import InputError
from elm_mlx.json_files import read_object_if_there

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
    """Settings by our names, only those that the directory has.

    `do_sample` false means `temp` 0; without `do_sample` a temperature is not used, as in Hugging Face's tools.

    Raises:
        InputError: the file is no JSON, or a setting is no number.
    """
    path = files.expanded(directory) / FILE_NAME
    values = read_object_if_there(path)
    found = {ours: values[theirs] for ours, theirs in NAMES.items() if values.get(theirs) is not None}
    for ours, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, type(DEFAULTS[ours]))):
            raise InputError(f"{path}: {NAMES[ours]} is {value!r}: a number is needed")
    if values.get("do_sample") is False:
        found["temp"] = 0.0
    elif not values.get("do_sample"):
        found.pop("temp", None)
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
    values = read_object_if_there(path) | {NAMES[name]: value for name, value in settings.items()}
    values["do_sample"] = settings["temp"] > 0
    if not values["do_sample"]:  # Hugging Face's tools refuse a temperature of 0
        del values[NAMES["temp"]]
    files.write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return path
