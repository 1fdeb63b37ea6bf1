"""Where a model's config comes from, and whether it is true of the tensors.

Knows `config.json`, CoreNet's YAML, the presets' names, and which of them counts. What none of them says,
`infer` reads off the shapes. Knows no values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS, ModelConfig
from elm_mlx.reading import json_object, yaml_mapping
from elm_mlx_convert.corenet_adapters import Scaling
from elm_mlx_convert.infer import EMBEDDING, Shapes, check_shapes, infer_config, preset_name

_COMPLETE = ("num_transformer_layers", "model_type")  # a config.json with one of them means to say everything


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
