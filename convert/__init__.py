"""File formats in, arrays by canonical name out, and back.

Turns checkpoints of OpenELM, in whatever file they come, into an MLX model directory.
Knows no model class and imports no MLX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Conversion", "LoraWeights", "Plan", "convert", "export", "read_corenet", "read_peft", "write_peft"]

if TYPE_CHECKING:
    from elm_mlx_convert.conversion import Conversion, convert, export
    from elm_mlx_convert.lora_files import LoraWeights, read_corenet, read_peft, write_peft
    from elm_mlx_convert.plan import Plan

_PLACES = {"convert": "conversion", "Conversion": "conversion", "Plan": "plan", "export": "conversion"}
_PLACES |= dict.fromkeys(("LoraWeights", "read_corenet", "read_peft", "write_peft"), "lora_files")


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and no more: names and shapes need no reader of files."""
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
