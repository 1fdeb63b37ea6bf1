"""The config that the tensors' shapes imply.

Knows shapes by canonical name; reads no file and no value. Everything that an OpenELM's config says about
shape comes out of them, but for the size of a head where no QK norm shows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS, ModelConfig

Shapes = Mapping[str, tuple[int, ...]]

EMBEDDING = "transformer.token_embeddings.weight"
HEAD = "lm_head.weight"


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
