"""A model directory made of another: what may be replaced, and what comes along.

Knows the names of files in a model directory. Knows nothing of weights.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from elm_mlx.errors import InputError

CARRIED = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_OWN = ("config.json", "conversion.json", "quantization.json", "README.md", "model.safetensors.index.json")


def check_destination(target: Path, sources: tuple[Path, ...], overwrite: bool) -> None:
    """Refuses to replace what is not plainly a model directory, or what one of `sources` lies in.

    Raises:
        InputError: says which.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file, and a directory is to be written")
    if not overwrite:
        raise InputError(f"{target}: exists already; pass --overwrite to replace it, or choose another")
    real = Path(os.path.realpath(target))
    for source in sources:
        if real in (Path(os.path.realpath(source)), *Path(os.path.realpath(source)).parents):
            raise InputError(f"{target}: holds {source.name}, which is to be read: choose another directory")
    names = sorted(entry.name for entry in target.iterdir())
    foreign = [n for n in names if n not in (*CARRIED, *_OWN) and not Path(n).match("model*.safetensors")]
    if foreign or (names and "config.json" not in names):
        raise InputError(f"{target}: is no model directory: it holds {(foreign or names)[0]}; nothing was replaced")


def carry(source: Path, directory: Path) -> None:
    """Copies tokenizer, chat template and settings. Raises OSError."""
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
