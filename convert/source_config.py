"""The config of a checkpoint: as a file beside it says, or as the shapes of its tensors imply.

Reads `config.json`, CoreNet's YAML and the presets' names; everything that an OpenELM's config says about shape comes
out of the shapes too, but for the size of a head where no QK norm shows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS, ModelConfig
from elm_mlx.reading import json_object, yaml_mapping
from elm_mlx_convert.names import EMBEDDING, HEAD

_COMPLETE = ("num_transformer_layers", "model_type")  # a config.json with one of them means to say everything


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Scaling:
    """How strongly an adapter of rank r counts: alpha / r, or with rank-stabilised LoRA alpha / sqrt(r)."""

    alpha: float
    by_root: bool = False

    def of(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.by_root else rank)


@dataclass(frozen=True)
class Settings:
    """What a config file says: the whole shape (`config`), or CoreNet's few words about it.

    Args:
        scaling: of a LoRA adapter, where the file says it.
    """

    path: Path
    config: ModelConfig | None = None
    model_name: str | None = None
    vocab_size: int | None = None
    max_context_length: int | None = None
    scaling: Scaling | None = None


def read_settings(path: Path) -> Settings:
    """Reads a `config.json` of the hub or of MLX, or CoreNet's YAML.

    Raises:
        InputError: it cannot be read, says nothing of an OpenELM, or a value in it makes no sense.
    """
    if path.suffix in (".yaml", ".yml"):
        return _corenet(path, yaml_mapping(path))
    values = json_object(path)
    if "quantization" in values or "quantization_config" in values:
        raise InputError(f"{path}: the model is already quantized; convert the original, then quantize it")
    if any(key in values for key in _COMPLETE):
        return Settings(path, config=ModelConfig.from_dict(values, where=str(path)))
    if "model_name" in values:  # Apple's MLX example keeps CoreNet's words in JSON
        return _words(path, values, None)
    raise InputError(f"{path}: says nothing of an OpenELM: {_COMPLETE[0]} is missing")


def find_settings(directory: Path) -> Settings | None:
    """What the config file in a directory says; None where there is none.

    Raises:
        InputError: there are two, or the model that it describes cannot be converted.
    """
    found = [directory / name for name in ("config.json", "config.yaml", "config.yml") if (directory / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{directory}: holds {found[0].name} and {found[1].name}: choose with --config")
    return read_settings(found[0]) if found else None


def decide(
    settings: Settings | None, preset: str | None, shapes: Shapes, where: str, *, head_dim: int | None, untied: bool
) -> tuple[ModelConfig, str]:
    """The config of the tensors with these shapes, and in words where it comes from.

    Args:
        settings: a config file, if there is one.
        preset: one of PRESETS; counts for the shape instead of what `settings` says.
        where: what the tensors are in, for messages.
        head_dim: as in `infer_config`.
        untied: whether merging an adapter has untied the head, which no config then knows of.

    Raises:
        InputError: the config contradicts the shapes (names the tensor and both), or they are no OpenELM's.
    """
    if settings is not None and settings.config is not None and preset is None:
        config, origin = settings.config, settings.path.name
    else:
        name = preset or (settings.model_name if settings else None)
        config, origin = _by_name(name, preset is not None, settings, shapes, where, head_dim)
        config = _with_context(config, settings)
    if head_dim not in (None, config.head_dim):
        raise InputError(f"--head-dim is {head_dim}, but {origin} says {config.head_dim}")
    if untied:
        config = replace(config, share_input_output_layers=False)
    check_shapes(config, shapes, where, origin)
    return config, origin


def _by_name(
    name: str | None, asked: bool, settings: Settings | None, shapes: Shapes, where: str, head_dim: int | None
) -> tuple[ModelConfig, str]:
    vocab_size = settings.vocab_size if settings else None
    if name is not None and (asked or name in PRESETS):
        rows = shapes.get(EMBEDDING, (0,))[0]
        said = f"--preset {name}" if asked else f"{settings.path.name} ({name})" if settings else name
        return ModelConfig.preset(name, vocab_size or rows or 1), said
    config = infer_config(shapes, where, head_dim=head_dim)
    if vocab_size not in (None, config.vocab_size):
        assert settings is not None
        raise InputError(
            f"{where}: {EMBEDDING} has the shape {shapes[EMBEDDING]}, but {settings.path.name} says "
            f"{(vocab_size, config.model_dim)}"
        )
    found = preset_name(config)
    origin = f"the shapes, those of {found}" if found else "the shapes"
    return config, f"{origin}; context from {settings.path.name}" if settings else origin


def _with_context(config: ModelConfig, settings: Settings | None) -> ModelConfig:
    """RoPE's table is twice the context, as in CoreNet."""
    if settings is None or settings.max_context_length is None:
        return config
    length = settings.max_context_length
    return replace(config, max_context_length=length, rope_max_length=2 * length)


def _corenet(path: Path, values: Mapping[str, Any]) -> Settings:
    words = _section(path, values, "model.language_modeling.general_gpt")
    if words is None:
        raise InputError(f"{path}: has no model.language_modeling.general_gpt, so it describes no OpenELM of CoreNet")
    return _words(path, words, _lora(path, _section(path, values, "model.lora")))


def _section(path: Path, values: Mapping[str, Any], dotted: str) -> Mapping[str, Any] | None:
    """A mapping nested in `values`; CoreNet also reads files whose keys are dotted from the start."""
    section: Any = values
    for key in dotted.split("."):
        section = section.get(key) if isinstance(section, Mapping) else None
    if section is None:
        prefix = f"{dotted}."
        section = {k.removeprefix(prefix): v for k, v in values.items() if isinstance(k, str) and k.startswith(prefix)}
        return section or None
    if not isinstance(section, Mapping):
        raise InputError(f"{path}: {dotted} is no mapping")
    return section


def _words(path: Path, values: Mapping[str, Any], scaling: Scaling | None) -> Settings:
    name = values.get("model_name")
    if name is not None and not isinstance(name, str):
        raise InputError(f"{path}: model_name is {name!r}: a text is needed")
    numbers = {}
    for key in ("vocab_size", "max_context_length"):
        value = values.get(key)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            shown = "huge" if isinstance(value, int) and abs(value) > 2**63 else repr(value)[:40]
            raise InputError(f"{path}: {key} is {shown}: a positive whole number is needed")
        numbers[key] = value
    return Settings(path, None, name, numbers["vocab_size"], numbers["max_context_length"], scaling)


def _lora(path: Path, values: Mapping[str, Any] | None) -> Scaling | None:
    """The one scaling that all entries of `model.lora.config` agree on."""
    entries = values.get("config") if values else None
    if not isinstance(entries, list) or not entries:
        return None
    found = set()
    for entry in entries:
        params = entry.get("params") if isinstance(entry, Mapping) else None
        alpha = params.get("lora_alpha") if isinstance(params, Mapping) else None
        if not isinstance(params, Mapping) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise InputError(f"{path}: model.lora.config has an entry without a lora_alpha in its params")
        found.add(Scaling(float(alpha), params.get("use_rslora") is True))
    if len(found) > 1:
        raise InputError(f"{path}: model.lora.config scales its adapters differently, which cannot be merged here")
    return found.pop()


def infer_config(shapes: Shapes, where: str, *, head_dim: int | None = None) -> ModelConfig:
    """The config of a model with these weights, and only these.

    Widths that are one of the paper's four models' give that model's own multipliers; others give
    multipliers that reproduce them exactly. RoPE, context and special tokens are the published ones.

    Args:
        shapes: canonical name -> shape, of every weight.
        where: the file, for messages.
        head_dim: the size of a head, where no QK norm tells it.

    Raises:
        InputError: names the tensor that is missing, or whose shape fits no OpenELM.
    """
    reader = _Reader(shapes, where)
    vocab_size, model_dim = reader.matrix(EMBEDDING)
    num_layers = _num_layers(shapes, where)
    with_norm = "transformer.layers.0.attn.q_norm.weight" in shapes
    head_dim = _head_dim(reader, with_norm, head_dim)
    query, kv, ffn, with_glu = [], [], [], []
    for layer in range(num_layers):
        heads, groups = _heads(reader, layer, head_dim)
        width, glu = _ffn(reader, layer)
        query.append(heads)
        kv.append(groups)
        ffn.append(width)
        with_glu.append(glu)
    if len(set(with_glu)) > 1:
        odd = with_glu.index(not with_glu[0])
        raise InputError(f"{where}: layer {odd}'s FFN is gated where layer 0's is not, or the reverse: no OpenELM")
    divisor = math.gcd(256, *ffn)
    config = ModelConfig(
        vocab_size=vocab_size,
        model_dim=model_dim,
        head_dim=head_dim,
        num_query_heads=tuple(query),
        num_kv_heads=tuple(kv),
        ffn_multipliers=tuple(width / model_dim for width in ffn),
        ffn_dim_divisor=divisor,
        ffn_with_glu=with_glu[0],
        normalize_qk_projections=with_norm,
        share_input_output_layers=HEAD not in shapes,
    )
    check_shapes(config, shapes, where, "the other tensors")
    return _published(config)


def check_shapes(config: ModelConfig, shapes: Shapes, where: str, source: str) -> None:
    """Whether `config`, which came from `source`, describes exactly these weights.

    Raises:
        InputError: names the tensor, its shape in the file and the shape that the config means.
    """
    expected = config.shapes()
    for name, shape in expected.items():
        if name not in shapes:
            raise InputError(f"{where}: {name} is missing; {source} says it has the shape {shape}")
        if shapes[name] != shape:
            raise InputError(f"{where}: {name} has the shape {shapes[name]}, but {source} says {shape}")
    for name, shape in shapes.items():
        if name not in expected:
            raise InputError(f"{where}: {name} has the shape {shape}, but {source} says there is no such tensor")


def preset_name(config: ModelConfig) -> str | None:
    """Which of the paper's four models has these widths, with any vocabulary and context, tied or not."""
    tied = config.share_input_output_layers
    for name in PRESETS:
        preset = replace(ModelConfig.preset(name, config.vocab_size), share_input_output_layers=tied)
        if preset.shapes() == config.shapes():
            return name
    return None


class _Reader:
    """Shapes, asked for one by one, with the message for what is not there."""

    def __init__(self, shapes: Shapes, where: str) -> None:
        self._shapes = shapes
        self.where = where

    def matrix(self, name: str) -> tuple[int, int]:
        shape = self._shape(name)
        if len(shape) != 2 or 0 in shape:
            raise InputError(f"{self.where}: {name} has the shape {shape}, and a matrix is needed")
        return shape[0], shape[1]

    def vector(self, name: str) -> int:
        shape = self._shape(name)
        if len(shape) != 1 or 0 in shape:
            raise InputError(f"{self.where}: {name} has the shape {shape}, and a vector is needed")
        return shape[0]

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise InputError(f"{self.where}: {name} is missing")
        return self._shapes[name]


def _num_layers(shapes: Shapes, where: str) -> int:
    layers = {int(match[1]) for name in shapes if (match := re.match(r"transformer\.layers\.(\d+)\.", name))}
    if not layers:
        raise InputError(f"{where}: has no layers")
    if layers != set(range(len(layers))):
        first = min(set(range(len(layers))) - layers)
        raise InputError(f"{where}: has {len(layers)} layers up to number {max(layers)}, but none with number {first}")
    return len(layers)


def _head_dim(reader: _Reader, with_norm: bool, asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise InputError(f"--head-dim is {asked}: a positive whole number is needed")
    if not with_norm:
        if asked is None:
            raise InputError(
                f"{reader.where}: without QK norms the shapes do not tell the size of a head: pass --head-dim, "
                "--preset or --config"
            )
        return asked
    found = reader.vector("transformer.layers.0.attn.q_norm.weight")
    if asked is not None and asked != found:
        raise InputError(
            f"{reader.where}: transformer.layers.0.attn.q_norm.weight has the shape ({found},), "
            f"but --head-dim says ({asked},)"
        )
    return found


def _heads(reader: _Reader, layer: int, head_dim: int) -> tuple[int, int]:
    """Query and key/value heads: `out_proj` reads all query heads; what `qkv_proj` writes besides is k and v."""
    prefix = f"transformer.layers.{layer}.attn"
    rows, _ = reader.matrix(f"{prefix}.qkv_proj.weight")
    _, width = reader.matrix(f"{prefix}.out_proj.weight")
    query, kv = width // head_dim, (rows - width) // (2 * head_dim)
    if query * head_dim != width or kv < 1 or (query + 2 * kv) * head_dim != rows or query % kv:
        raise InputError(
            f"{reader.where}: {prefix}.qkv_proj.weight writes {rows} values and {prefix}.out_proj.weight reads "
            f"{width}: no whole number of query and key/value heads of {head_dim} gives that"
        )
    return query, kv


def _ffn(reader: _Reader, layer: int) -> tuple[int, bool]:
    """Width of the FFN, and whether it is gated: `proj_1` then writes gate and value, twice what `proj_2` reads."""
    prefix = f"transformer.layers.{layer}.ffn"
    rows, _ = reader.matrix(f"{prefix}.proj_1.weight")
    _, width = reader.matrix(f"{prefix}.proj_2.weight")
    if rows not in (width, 2 * width):
        raise InputError(
            f"{reader.where}: {prefix}.proj_1.weight writes {rows} values, but {prefix}.proj_2.weight reads {width}: "
            "it should write as many, or with a gate twice as many"
        )
    return width, rows == 2 * width


def _published(config: ModelConfig) -> ModelConfig:
    """The same shape in the words of the paper, where it is one of the paper's."""
    name = preset_name(config)
    if name is None:
        return config
    preset = ModelConfig.preset(name)
    return replace(config, ffn_multipliers=preset.ffn_multipliers, ffn_dim_divisor=preset.ffn_dim_divisor)
