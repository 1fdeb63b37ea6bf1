"""JSON in a file, read with an error that says which file and where. Knows nothing of what it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elm_mlx.errors import InputError


def read(path: Path) -> Any:
    """What a file holds. Raises InputError where it cannot be read, or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError where there is none."""
    values = read(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object")
    return values
