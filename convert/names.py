"""The names of OpenELM's weights: every way they are written, and the canonical one, of the hub and of mlx-lm."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from elm_mlx.errors import InputError
from elm_mlx.reading import listed

T = TypeVar("T")

EMBEDDING = "transformer.token_embeddings.weight"
HEAD = "lm_head.weight"

# canonical (the hub, mlx-lm, this package), CoreNet's. `{}` is the number of the layer.
TABLE = (
    ("transformer.token_embeddings.weight", "token_embeddings.weight"),
    ("transformer.layers.{}.attn_norm.weight", "layers.{}.attn_norm.weight"),
    ("transformer.layers.{}.attn.qkv_proj.weight", "layers.{}.attn.qkv_proj.weight"),
    ("transformer.layers.{}.attn.q_norm.weight", "layers.{}.attn.q_norm.weight"),
    ("transformer.layers.{}.attn.k_norm.weight", "layers.{}.attn.k_norm.weight"),
    ("transformer.layers.{}.attn.out_proj.weight", "layers.{}.attn.out_proj.weight"),
    ("transformer.layers.{}.ffn_norm.weight", "layers.{}.ffn_norm.weight"),
    ("transformer.layers.{}.ffn.proj_1.weight", "layers.{}.ffn.proj_1.weight"),
    ("transformer.layers.{}.ffn.proj_2.weight", "layers.{}.ffn.proj_2.weight"),
    ("transformer.norm.weight", "norm.weight"),
    ("lm_head.weight", "classifier.weight"),
)
_TO_CANONICAL = {name: row[0] for row in TABLE for name in row}
_TO_CORENET = dict(TABLE)

# What DDP, FSDP, activation checkpointing and torch.compile put into a name, anywhere and repeatedly.
WRAPPERS = ("module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")

# Buffers that some versions save and that are computed anew from the config: the ends of their names.
BUFFERS = ("inv_freq", "causal_mask", "_cached_cos", "_cached_sin")

# A layer's number, without leading zeros: no two spellings of one name.
_LAYER = re.compile(r"(?<=\blayers\.)(0|[1-9]\d{0,5})(?=\.)")


def unwrap(name: str) -> str:
    """Returns `name` without what wrappers of a module have put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(tensors: Mapping[str, T], where: str) -> dict[str, T]:
    """Returns `tensors` by their names without wrappers. Raises InputError when that makes two names one."""
    found: dict[str, T] = {}
    for name, tensor in tensors.items():
        if unwrap(name) in found:
            raise InputError(f"{where}: {listed([unwrap(name)])} is there twice, once behind a wrapper's name")
        found[unwrap(name)] = tensor
    return found


def is_buffer(name: str) -> bool:
    """Returns whether `name` is one of the few known buffers that hold no weight."""
    return name.rpartition(".")[2] in BUFFERS


def to_canonical(name: str) -> str | None:
    """Returns the canonical name of a weight in any scheme, wrappers too, or None when it is none of an OpenELM's."""
    pattern, layer = _split(unwrap(name))
    canonical = _TO_CANONICAL.get(pattern)
    return canonical.format(layer) if canonical else None


def to_corenet(name: str) -> str:
    """Returns CoreNet's name of a canonically named weight. Raises KeyError when it is none."""
    pattern, layer = _split(name)
    return _TO_CORENET[pattern].format(layer)


def canonical_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Maps canonical names to those in the file, for every weight among `names`; known buffers are left out.

    Raises:
        InputError: names the tensors that are no OpenELM's, or two that would be the same weight.
    """
    found: dict[str, str] = {}
    unknown = []
    for name in names:
        if is_buffer(name):
            continue
        canonical = to_canonical(name)
        if canonical is None:
            unknown.append(name)
        elif canonical in found:
            raise InputError(f"{where}: {found[canonical]!r} and {name!r} both stand for {canonical!r}")
        else:
            found[canonical] = name
    if unknown:
        raise InputError(f"{where}: holds tensors that no OpenELM has: {listed(unknown)}")
    return found


def _split(name: str) -> tuple[str, str]:
    """Splits `layers.7.ffn_norm.weight` into `layers.{}.ffn_norm.weight` and `7`."""
    match = _LAYER.search(name)
    if match is None:
        return name.replace("{", "{{"), ""  # a brace of the file's own is no place for a number
    return name[: match.start()] + "{}" + name[match.end() :], match[0]
