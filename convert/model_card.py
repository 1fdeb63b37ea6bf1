"""A model card, the YAML at the head of a model's README.md, as GGUF's metadata: licence, languages, base models.

The card's keys are the hub's (https://huggingface.co/docs/hub/model-cards), and GGUF's those of llama.cpp's converter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx_convert.gguf_file import Metadatum

CARD = "README.md"
_HEAD = re.compile(r"---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_ADDRESS = "https://huggingface.co/"
_MOST = 100  # languages or base models


def card_metadata(directory: Path) -> tuple[dict[str, Metadatum], list[str]]:
    """Returns what the card in a model's directory says, by GGUF's keys, and a note where it cannot be read."""
    path = directory / CARD
    if not path.is_file():
        return {}, []
    try:
        head = _HEAD.match(reading.text(path))
        card = reading.mapping_of_yaml(head[1], path) if head and len(head[1]) <= reading.TABLES_BYTES else {}
    except InputError as error:
        return {}, [f"licence, languages and base model are not in the file: {error}"]
    values: dict[str, Metadatum] = {}
    for key, own in (("license", "license"), ("license.name", "license_name"), ("license.link", "license_link")):
        if texts := _texts(card, own):
            values[f"general.{key}"] = ", ".join(texts)
    if languages := _texts(card, "language"):
        values["general.languages"] = languages
    models = _texts(card, "base_model")
    if models:
        values["general.base_model.count"] = len(models)
    for number, model in enumerate(models):
        values |= {f"general.base_model.{number}.{key}": value for key, value in _base_model(model).items()}
    return values, []


def _texts(card: Mapping[Any, Any], key: str) -> list[str]:
    """Returns a value, or the values of a list, as texts. YAML reads Norwegian's code, `no`, as false."""
    value = card.get(key)
    values = value if isinstance(value, list) else [value]
    return [text for each in values[:_MOST] if (text := "no" if each is False else each) and isinstance(text, str)]


def _base_model(model: str) -> dict[str, str]:
    """Returns name, organization and address of a repository or of a page."""
    if "://" in model:
        return {"name": model.rstrip("/").rpartition("/")[2], "repo_url": model}
    organization, slash, name = model.rpartition("/")
    if not slash:
        return {"name": model}
    return {"name": name, "organization": organization, "repo_url": f"{_ADDRESS}{model}"}
