"""Small models as GGUF files, as `benchmarks/gguf_logits.py` shows them to llama.cpp and tests make them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import family_cases
import mlx.core as mx
import numpy as np

from elm_mlx.model.config import Config, read_config
from elm_mlx.store import adapters
from elm_mlx.store.adapter_conversion import export_adapter
from elm_mlx.store.loading import load_model
from elm_mlx_convert import export_gguf

# llama.cpp has no place for these.
REFUSED = {
    "llama, dynamic", "olmo2", "olmo3, layers apart", "mamba", "mamba, biases, own head", "smollm3, its layers",
    "gemma3", "gemma3, linear", "gemma2", "gemma2, caps unsaid",
}  # fmt: skip
# And these others it has, of the same cases.
CHANGED = {
    "gemma2, its scale": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma2, layers by turns": (
        "gemma2",
        {
            "query_pre_attn_scalar": 16, "attn_logit_softcapping": 30.0,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        },
    ),
    "gemma3, its scale": ("gemma3", {"query_pre_attn_scalar": 16}),
    "gemma3, its scale, linear": ("gemma3, linear", {"query_pre_attn_scalar": 16}),
    "gemma3, its own turns": ("gemma3", {"query_pre_attn_scalar": 16, "layer_types": None}),
    "smollm3, yarn, tied": (
        "smollm3",
        {
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
}  # fmt: skip
_ADAPTED = {
    "OpenELM, adapter": 4,
    "OpenELM, adapter of several ranks": {"*qkv_proj": 2, "*proj_1": 5, "*proj_2": 3},
    "llama, adapter": 4,
    "phi3, adapter": 4,
}
NAMES = ("OpenELM", *(name for name in family_cases.CASES if name not in REFUSED), *CHANGED, *_ADAPTED)


@dataclass(frozen=True)
class GgufCase:
    """A model directory, the GGUF file of it, and an adapter's directory and file."""

    directory: Path
    file: Path
    adapter_directory: Path | None = None
    adapter: Path | None = None


def write(path: Path, name: str) -> GgufCase:
    """A case's files in `path`."""
    base = name.partition(",")[0] if name in _ADAPTED else name
    if base == "OpenELM":
        config = checkpoints.tiny(vocab_size=64)
        path.mkdir(parents=True)
        directory = checkpoints.save_hub(path / "model", config, checkpoints.weights(config))
        for file in directory.glob("tokenizer*"):
            file.unlink()
    else:
        directory = write_family(path / "model", base)
    export_gguf(directory, path / "model.gguf")
    if name not in _ADAPTED:
        return GgufCase(directory, path / "model.gguf")
    _write_adapter(path / "adapter", read_config(directory), _ADAPTED[name])
    export_adapter(directory, path / "adapter", path / "adapter.gguf")
    return GgufCase(directory, path / "model.gguf", path / "adapter", path / "adapter.gguf")


def write_family(path: Path, name: str) -> Path:
    """The directory of a case of `family_cases`, or of CHANGED."""
    base, changes = CHANGED.get(name, (name, {}))
    return family_cases.write(path, base, {**family_cases.config(base), **changes} if changes else None)


def _write_adapter(path: Path, config: Config, rank: int | Mapping[str, int]) -> None:
    adapter = adapters.plan(config, rank=rank, alpha=6.0, targets=list(rank) if isinstance(rank, Mapping) else None)
    draw = np.random.default_rng(5)
    values = {
        name: draw.standard_normal(shape).astype(np.float32) / 8 for name, shape in adapter.shapes(config).items()
    }
    path.mkdir()
    adapters.write(path, adapter, {name: mx.array(each) for name, each in values.items()}, config)


def distance(case: GgufCase, logits: Sequence[float]) -> float:
    """The largest difference of our logits after all of `family_cases.IDS` from others, as a share of their spread."""
    model = load_model(case.directory, adapter_path=case.adapter_directory)
    found = np.array(model(mx.array([family_cases.IDS]))[0, -1].astype(mx.float32))
    return float(np.abs(found - logits).max() / np.std(logits))
