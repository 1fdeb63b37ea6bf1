"""Small text files that say something about a model: JSON and YAML, read with care.

Knows that either may be huge, malformed or hostile. Knows no key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elm_mlx.errors import InputError

# An index of the largest model has some 100 KB; a tokenizer_config.json with every added token, 1 MB.
_MAX_BYTES = 16 << 20
_MAX_YAML_BYTES = 1 << 20  # PyYAML reads about 1 MB a second


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError when it cannot be read or is none."""
    try:
        values = json.loads(_text(path, _MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file of plain values. Raises InputError when it cannot be read or is none."""
    import yaml

    try:
        values = yaml.safe_load(_text(path, _MAX_YAML_BYTES))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not YAML of plain values: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no YAML mapping")
    return values


def _text(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if len(data) > limit:
        raise InputError(f"{path}: larger than {limit >> 20} MB, which no such file of a model is")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
