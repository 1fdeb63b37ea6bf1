"""Checkpoints of OpenELM, in whatever file they come, into MLX model directories, and back. Imports no MLX."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "Conversion", "ConversionPlan", "GgufExport", "GgufPlan", "LoraWeights", "convert", "export", "export_gguf",
    "read_corenet", "read_peft", "write_gguf_adapter", "write_peft",
]  # fmt: skip

if TYPE_CHECKING:
    from elm_mlx_convert.conversion import Conversion, convert, export
    from elm_mlx_convert.gguf_export import GgufExport, export_gguf, write_gguf_adapter
    from elm_mlx_convert.gguf_model import GgufPlan
    from elm_mlx_convert.lora_files import LoraWeights, read_corenet, read_peft, write_peft
    from elm_mlx_convert.plan import ConversionPlan

_PLACES = {
    "conversion": ("Conversion", "convert", "export"),
    "gguf_export": ("GgufExport", "export_gguf", "write_gguf_adapter"),
    "gguf_model": ("GgufPlan",),
    "lora_files": ("LoraWeights", "read_corenet", "read_peft", "write_peft"),
    "plan": ("ConversionPlan",),
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and no more."""
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
