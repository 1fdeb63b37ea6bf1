"""The config of a checkpoint: as a file beside it says, or as the shapes of its tensors imply.

Reads `config.json`, CoreNet's YAML and the presets' names; everything that an OpenELM's config says about shape comes
out of the shapes too, but for the size of a head where no QK norm shows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS, ModelConfig
from elm_mlx.reading import Keys, json_object, short, yaml_mapping
from elm_mlx_convert.names import EMBEDDING, HEAD

_COMPLETE = ("num_transformer_layers", "model_type")  # a config.json with one of them means to say everything


_Q_NORM = "transformer.layers.0.attn.q_norm.weight"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Scaling:
    """The scale of an adapter of rank r: alpha / r, or with rank-stabilised LoRA alpha / sqrt(r)."""

    alpha: float
    by_root: bool = False

    def of(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.by_root else rank)


@dataclass(frozen=True)
class ConfigFile:
    """The content of a config file: the whole shape (`config`), or CoreNet's few words about it.

    Args:
        scaling: of a LoRA adapter, where the file says it.
    """

    path: Path
    config: ModelConfig | None = None
    model_name: str | None = None
    vocab_size: int | None = None
    max_context_length: int | None = None
    scaling: Scaling | None = None


def read_config_file(path: Path) -> ConfigFile:
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
        return ConfigFile(path, config=ModelConfig.from_dict(values, where=str(path)))
    if "model_name" in values:  # Apple's MLX example keeps CoreNet's words in JSON
        return _few_words(path, values, None)
    raise InputError(f"{path}: does not describe an OpenELM: {_COMPLETE[0]} is missing")


def find_config_file(directory: Path) -> ConfigFile | None:
    """Reads the config file in a directory. Returns None where there is none.

    Raises:
        InputError: there are two, or the model that it describes cannot be converted.
    """
    found = [directory / name for name in ("config.json", "config.yaml", "config.yml") if (directory / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{directory}: holds {found[0].name} and {found[1].name}: choose with --config")
    return read_config_file(found[0]) if found else None


def decide(
    settings: ConfigFile | None, preset: str | None, shapes: Shapes, where: str, *, head_dim: int | None, untied: bool
) -> tuple[ModelConfig, str]:
    """Returns the config of the tensors with these shapes, and in words where it comes from.

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
        config, origin = _by_name_or_shapes(settings, preset, shapes, where, head_dim)
        if settings is not None and settings.max_context_length is not None:
            length = settings.max_context_length  # RoPE's table is twice the context, as in CoreNet
            config = replace(config, max_context_length=length, rope_max_length=2 * length)
    if head_dim not in (None, config.head_dim):
        raise InputError(f"--head-dim is {head_dim}, but {origin} says {config.head_dim}")
    if untied:
        config = replace(config, share_input_output_layers=False)
    check_shapes(config, shapes, where, origin)
    return config, origin


def _by_name_or_shapes(
    settings: ConfigFile | None, preset: str | None, shapes: Shapes, where: str, head_dim: int | None
) -> tuple[ModelConfig, str]:
    file, vocab_size = (settings.path.name, settings.vocab_size) if settings else ("", None)
    name = preset or (settings.model_name if settings else None)
    if name is not None and (preset or name in PRESETS):
        rows = shapes.get(EMBEDDING, (0,))[0]
        return ModelConfig.preset(name, vocab_size or rows or 1), f"--preset {name}" if preset else f"{file} ({name})"
    config = infer_config(shapes, where, head_dim=head_dim)
    if vocab_size not in (None, config.vocab_size):
        said = vocab_size, config.model_dim
        raise InputError(f"{where}: {EMBEDDING} has the shape {shapes[EMBEDDING]}, but {file} says {said}")
    found = preset_name(config)
    origin = f"the shapes, those of {found}" if found else "the shapes"
    return config, f"{origin}; context from {file}" if settings else origin


def _corenet(path: Path, values: Mapping[str, Any]) -> ConfigFile:
    words = _section(path, values, "model.language_modeling.general_gpt")
    if words is None:
        raise InputError(
            f"{path}: has no model.language_modeling.general_gpt, so it does not describe CoreNet's OpenELM"
        )
    return _few_words(path, words, _lora(path, _section(path, values, "model.lora")))


def _section(path: Path, values: Mapping[str, Any], dotted: str) -> Mapping[str, Any] | None:
    """Returns a mapping nested in `values`; CoreNet also reads files whose keys are dotted from the start."""
    section: Any = values
    for key in dotted.split("."):
        section = section.get(key) if isinstance(section, Mapping) else None
    if section is None:
        prefix = f"{dotted}."
        section = {k.removeprefix(prefix): v for k, v in values.items() if isinstance(k, str) and k.startswith(prefix)}
        return section or None
    if not isinstance(section, Mapping):
        raise InputError(f"{path}: {dotted} is not a mapping")
    return section


def _few_words(path: Path, values: Mapping[str, Any], scaling: Scaling | None) -> ConfigFile:
    keys, name = Keys(str(path), values), values.get("model_name")
    if name is not None and not isinstance(name, str):
        raise InputError(f"{path}: model_name is {short(name)}: a text is needed")
    vocab_size, length = (keys.size(key) if keys.says(key) else None for key in ("vocab_size", "max_context_length"))
    return ConfigFile(path, None, name, vocab_size, length, scaling)


def _lora(path: Path, values: Mapping[str, Any] | None) -> Scaling | None:
    """Returns the one scaling that all entries of `model.lora.config` agree on."""
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
        raise InputError(f"{path}: model.lora.config gives its adapters different scales, which cannot be merged")
    return found.pop()


def infer_config(shapes: Shapes, where: str, *, head_dim: int | None = None) -> ModelConfig:
    """Returns the config of a model with these weights, and only these.

    Widths that are one of the paper's four models' give that model's own multipliers; others give
    multipliers that reproduce them exactly. RoPE, context and special tokens are the published ones.

    Args:
        shapes: canonical name -> shape, of every weight.
        where: the file, for messages.
        head_dim: the size of a head, where no QK norm tells it.

    Raises:
        InputError: names the tensor that is missing, or whose shape fits no OpenELM.
    """
    look = partial(_shape, shapes, where)
    vocab_size, model_dim = look(EMBEDDING, 2)
    num_layers = _num_layers(shapes, where)
    with_norm = _Q_NORM in shapes
    head_dim = _head_dim(look(_Q_NORM, 1)[0] if with_norm else None, head_dim, where)
    layers = [_layer(look, f"transformer.layers.{layer}", where, head_dim) for layer in range(num_layers)]
    query, kv, ffn, with_glu = zip(*layers, strict=True)
    if len(set(with_glu)) > 1:
        odd = with_glu.index(not with_glu[0])
        raise InputError(f"{where}: layer {odd}'s FFN is gated where layer 0's is not, or the reverse: no OpenELM")
    config = ModelConfig(
        vocab_size=vocab_size,
        model_dim=model_dim,
        head_dim=head_dim,
        num_query_heads=query,
        num_kv_heads=kv,
        ffn_multipliers=tuple(width / model_dim for width in ffn),
        ffn_dim_divisor=math.gcd(256, *ffn),
        ffn_with_glu=with_glu[0],
        normalize_qk_projections=with_norm,
        share_input_output_layers=HEAD not in shapes,
    )
    check_shapes(config, shapes, where, "the other tensors")
    if name := preset_name(config):
        preset = ModelConfig.preset(name)
        return replace(config, ffn_multipliers=preset.ffn_multipliers, ffn_dim_divisor=preset.ffn_dim_divisor)
    return config


def check_shapes(config: ModelConfig, shapes: Shapes, where: str, source: str) -> None:
    """Checks that `config`, which came from `source`, describes exactly these weights.

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
    """Returns the name of the paper's model with these widths; vocabulary, context and a tied head may differ."""
    tied = config.share_input_output_layers
    for name in PRESETS:
        preset = replace(ModelConfig.preset(name, config.vocab_size), share_input_output_layers=tied)
        if preset.shapes() == config.shapes():
            return name
    return None


def _shape(shapes: Shapes, where: str, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in shapes:
        raise InputError(f"{where}: {name} is missing")
    if len(shapes[name]) != dimensions or 0 in shapes[name]:
        needed = "matrix" if dimensions == 2 else "vector"
        raise InputError(f"{where}: {name} has the shape {shapes[name]}, and a {needed} is needed")
    return shapes[name]


def _num_layers(shapes: Shapes, where: str) -> int:
    layers = {int(match[1]) for name in shapes if (match := re.match(r"transformer\.layers\.(\d+)\.", name))}
    if not layers:
        raise InputError(f"{where}: has no layers")
    if layers != set(range(len(layers))):
        first = min(set(range(len(layers))) - layers)
        raise InputError(f"{where}: has {len(layers)} layers up to number {max(layers)}, but none with number {first}")
    return len(layers)


def _head_dim(found: int | None, asked: int | None, where: str) -> int:
    """Returns the size of a head, as the QK norm shows it or as it was asked for."""
    if asked is not None and asked < 1:
        raise InputError(f"--head-dim is {asked}: a positive whole number is needed")
    if found is not None and asked not in (None, found):
        raise InputError(f"{where}: {_Q_NORM} has the shape ({found},), but --head-dim says ({asked},)")
    size = found or asked
    if size is None:
        raise InputError(
            f"{where}: without QK norms the shapes do not give head_dim: pass --head-dim, --preset or --config"
        )
    return size


def _layer(look: Callable[[str, int], tuple[int, ...]], name: str, where: str, head_dim: int) -> tuple[Any, ...]:
    """Returns a layer's numbers of query and key/value heads, the width of its FFN, and whether that has a gate.

    `out_proj` reads all query heads, and what `qkv_proj` writes besides is keys and values. With a gate `proj_1` writes
    gate and value, twice what `proj_2` reads.
    """
    qkv, out, up, down = (
        f"{name}.{part}.weight" for part in ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")
    )
    rows, width = look(qkv, 2)[0], look(out, 2)[1]
    query, kv = width // head_dim, (rows - width) // (2 * head_dim)
    if query * head_dim != width or kv < 1 or (query + 2 * kv) * head_dim != rows or query % kv:
        raise InputError(
            f"{where}: {qkv} writes {rows} values and {out} reads {width}: no whole number of query and key/value "
            f"heads of {head_dim} gives that"
        )
    rows, width = look(up, 2)[0], look(down, 2)[1]
    if rows not in (width, 2 * width):
        raise InputError(
            f"{where}: {up} writes {rows} values, but {down} reads {width}: it should write as many, or with a gate "
            "twice as many"
        )
    return query, kv, width, rows == 2 * width
