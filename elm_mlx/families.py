"""Models of other families: which ones, and what the rest of the house has to know of their shape.

Knows the `config.json` of Llama, Mistral, Phi-3, OLMo, and Mamba, and where mlx-lm's networks of them keep
their parts. Knows no arrays: the networks themselves are `networks`'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from elm_mlx.config import MODEL_TYPE, ModelConfig
from elm_mlx.errors import InputError
from elm_mlx.json_files import read_object

_MAX_LAYERS = 10_000
# What Mamba may read: it has no positions, so its config names no limit. Far above what any text here has.
_UNBOUNDED = 1 << 20


@dataclass(frozen=True)
class Family:
    """Where mlx-lm has a family's network: the file, and in it the module of all but the head, and the embedding.

    Attributes:
        positions: whether it looks back at keys and values. Else it keeps a state, of which nothing can be taken
            back, and texts in one row would run into each other.
        bare_norms: whether its norms are LayerNorms without weights, in the place of RMSNorms.
        windowed: whether `sliding_window` bounds what all of its layers see. mlx-lm's network sees everything, so
            no more than a window is read at once, where both are the same.
    """

    name: str
    file: str
    body: str = "model"
    embedding: str = "embed_tokens"
    positions: bool = True
    bare_norms: bool = False
    windowed: bool = False


_MAMBA = Family("Mamba", "mamba", "backbone", "embeddings", positions=False)
FAMILIES = {
    "llama": Family("Llama", "llama"),
    "mistral": Family("Mistral", "llama", windowed=True),
    "phi3": Family("Phi-3", "phi3", windowed=True),
    # mlx-lm's own file for it wants another package, and fails on any prompt; it is a Llama but for its norms.
    "olmo": Family("OLMo", "llama", bare_norms=True),
    "olmo2": Family("OLMo 2", "olmo2"),
    "olmo3": Family("OLMo 3", "olmo3"),
    "mamba": _MAMBA,
}


@dataclass(frozen=True)
class FamilyConfig:
    """What a `config.json` says of a model of another family; what `ModelConfig` is to an OpenELM.

    Attributes:
        values: all of it, as the network's own arguments are made of it.
        eos_token_ids: what `end_tokens` has joined, of a model that `store` has opened; empty before.
        weights: every weight's name in the network, and its shape; empty until `networks.described` asked that.
    """

    model_type: str
    values: Mapping[str, Any] = field(repr=False, hash=False)
    vocab_size: int
    num_layers: int
    max_context_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...] = ()
    quantization: Mapping[str, Any] | None = field(default=None, hash=False)
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False, hash=False)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def embedding(self) -> str:
        """The embedding's name; the layers' is `layers_prefix`."""
        return f"{self.family.body}.{self.family.embedding}"

    @property
    def layers_prefix(self) -> str:
        return f"{self.family.body}.layers"

    @property
    def share_input_output_layers(self) -> bool:
        return "lm_head.weight" not in self.shapes()

    @property
    def model_dim(self) -> int:
        return self.shapes()[f"{self.embedding}.weight"][1]

    @property
    def linears(self) -> tuple[str, ...]:
        """What a layer's linears are called within it, as in mlx-lm's `keys`."""
        within = (module.removeprefix(f"{self.layers_prefix}.").partition(".")[2] for module in self.modules())
        return tuple(dict.fromkeys(name for name in within if name))

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight's name in the network, and its shape."""
        return dict(self.weights)

    def modules(self) -> list[str]:
        """What an adapter can be put on: linears, and not the embedding."""
        shapes = {name: shape for name, shape in self.shapes().items() if name != f"{self.embedding}.weight"}
        return [
            name.removesuffix(".weight")
            for name, shape in shapes.items()
            if len(shape) == 2 and name.endswith(".weight")
        ]

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Size of the KV cache for one token over all layers; 0 for a state of constant size."""
        if not self.family.positions:
            return 0
        heads = self.values["num_attention_heads"]
        head_dim = self.values.get("head_dim") or self.values["hidden_size"] // heads
        return 2 * self.num_layers * (self.values.get("num_key_value_heads") or heads) * head_dim * bytes_per_value


Config: TypeAlias = ModelConfig | FamilyConfig


def read(directory: Path) -> Config:
    """The config of a model directory, of an OpenELM or of another family; that one's `weights` are still empty.

    Raises:
        InputError: it cannot be read, or is of a family that is not known here.
    """
    path = directory / "config.json"
    values = read_object(path)
    model_type = values.get("model_type", MODEL_TYPE)
    if model_type == MODEL_TYPE:
        return ModelConfig.from_dict(values, where=str(path))
    if model_type not in FAMILIES:
        known = ", ".join((MODEL_TYPE, *FAMILIES))
        raise InputError(f"{path}: model_type is {str(model_type)[:60]!r}, and this reads {known}")
    values = _flat_rope(path, values)
    if FAMILIES[model_type].bare_norms:
        values = _as_llama(path, values)
    _check_quantization(path, values)
    return FamilyConfig(
        model_type=model_type,
        values=values,
        vocab_size=_size(path, values, "vocab_size"),
        num_layers=_size(path, values, "num_hidden_layers", _MAX_LAYERS),
        max_context_length=_context(path, values, FAMILIES[model_type]),
        bos_token_id=next(iter(_ids(values.get("bos_token_id"))), None),
        quantization=values.get("quantization"),
    )


def is_other(directory: Path) -> bool:
    """Whether a model directory is of another family than OpenELM, as far as its config says."""
    try:
        values = read_object(directory / "config.json")
    except InputError:
        return False
    return bool(values.get("model_type", MODEL_TYPE) != MODEL_TYPE)


def tokenizer_file(path: Path) -> Path | None:
    """The file that a model directory's text is encoded by; None where it has none.

    Of other families than OpenELM it is `tokenizer.json`: a `tokenizer.model` beside it lacks their control tokens.
    """
    names = ("tokenizer.json", "tokenizer.model") if is_other(path) else ("tokenizer.model",)
    return next((path / name for name in names if (path / name).exists()), None)


def _context(path: Path, values: Mapping[str, Any], family: Family) -> int:
    if not family.positions:
        return _UNBOUNDED
    most = _size(path, values, "max_position_embeddings")
    if family.windowed and values.get("sliding_window") is not None:
        most = min(most, _size(path, values, "sliding_window"))
    return most


def _flat_rope(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """With `rope_theta` and `rope_scaling`, which mlx-lm's networks read, where the config says `rope_parameters`.

    These may be apart for layers that see all and those that see a window, whose RoPE mlx-lm does not scale.
    """
    rope = values.get("rope_parameters")
    flat = {name: value for name, value in values.items() if value is not None or not name.startswith("rope_")}
    if not isinstance(rope, Mapping):
        return flat
    whole, window = rope.get("full_attention"), rope.get("sliding_attention")
    if isinstance(whole, Mapping):
        if isinstance(window, Mapping) and window.get("rope_theta") != whole.get("rope_theta"):
            raise InputError(f"{path}: rope_theta differs from layer to layer, which mlx-lm's network does not do")
        rope = whole
    if "rope_theta" in rope:
        flat.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        flat.setdefault("rope_scaling", dict(rope))
    return flat


def _as_llama(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The first OLMo's values as a Llama's network takes them; its LayerNorms' epsilon is fixed."""
    if "hidden_size" not in values:
        raise InputError(f"{path}: an OLMo in its first layout; the repository whose name ends with -hf can be read")
    if values.get("clip_qkv") is not None:
        raise InputError(f"{path}: clip_qkv is {str(values['clip_qkv'])[:20]}, which mlx-lm's network does not do")
    return {"tie_word_embeddings": False, **values, "rms_norm_eps": 1e-5}


def _check_quantization(path: Path, values: Mapping[str, Any]) -> None:
    how = values.get("quantization_config")
    if values.get("quantization") is None and isinstance(how, Mapping):
        method = str(how.get("quant_method", "another tool"))[:40]
        raise InputError(
            f"{path}: quantized by {method}; `mlx_lm.convert --hf-path` makes a directory that can be read"
        )
    if values.get("quantization") is not None and not isinstance(values["quantization"], Mapping):
        raise InputError(f"{path}: `quantization` is no JSON object")


def _ids(value: object) -> tuple[int, ...]:
    found = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    return tuple(token for token in found if type(token) is int and token >= 0)


def _size(path: Path, values: Mapping[str, Any], name: str, most: int = 1 << 31) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 < value <= most:
        raise InputError(f"{path}: {name} is {str(value)[:60]}: a whole number from 1 to {most:,} is needed")
    return value
