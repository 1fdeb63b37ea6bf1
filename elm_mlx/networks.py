"""mlx-lm's networks of other families, without the rest of mlx-lm, and with the protocol of `model.Model`.

Importing `mlx_lm` imports transformers, and takes a second. Its networks need neither, so their files are
imported as a package of our own, beside `mlx_lm` and independent of it. There, before any network is, the helpers
that all of them share are replaced by ours, which compute the same: on a CPU theirs are half of a prompt's time.
Knows where the files lie and what is replaced in them; knows no weights.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from elm_mlx import device, ops
from elm_mlx.cache import KVCache, SegmentedRow, StateCache
from elm_mlx.errors import ElmError, InputError
from elm_mlx.families import FamilyConfig
from elm_mlx.ops import Segments
from elm_mlx.rope import Rope, Rotate

_PACKAGE = "elm_mlx_networks"


class Spoken:
    """What `model.Model` has and mlx-lm's networks lack. Mixed into their classes, so that all names stay theirs.

    Attributes:
        body_name, embedding_name: of the module that is all but the head, and of the embedding in it.
        ropes: what takes the place of RoPE in the layers, on a CPU; several layers share one.
    """

    body_name: str
    embedding_name: str
    config: FamilyConfig
    ropes: tuple[_SharedRope, ...]

    def __call__(self, ids: mx.array, cache: Sequence[Any] | None = None, segments: Segments | None = None) -> mx.array:
        """Ids `(batch, length)` to logits `(batch, length, vocab_size)`; as of `model.Model`."""
        return self.head(self.transformer(ids, cache, segments))

    def transformer(
        self, ids: mx.array, cache: Sequence[Any] | None = None, segments: Segments | None = None
    ) -> mx.array:
        """All but the head: `(batch, length)` to `(batch, length, model_dim)`.

        Raises:
            InputError: `segments` for a network that keeps a state, which runs from one text into the next.
        """
        layers: list[Any] = self.layers  # type: ignore[attr-defined]
        if segments is not None:
            if not self.config.family.positions:
                raise InputError(f"several texts in a row: {self.config.family.name} cannot tell them apart")
            cache = [SegmentedRow(segments) for _ in layers]
        with _rotating(self.ropes, ids.shape[1], cache):
            hidden = getattr(self, self.body_name)(ids, cache)
        for layer_cache in cache or ():
            if isinstance(layer_cache, StateCache):
                layer_cache.offset += ids.shape[1]
        return hidden

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states `(..., model_dim)` to logits `(..., vocab_size)`."""
        owner = self.head_module()
        return owner.as_linear(hidden) if hasattr(owner, "as_linear") else owner(hidden)

    def head_module(self) -> nn.Module:
        """The module whose parameters turn hidden states into logits."""
        own: nn.Module | None = getattr(self, "lm_head", None)
        return getattr(getattr(self, self.body_name), self.embedding_name) if own is None else own

    def prompt_cache(self) -> list[Any]:
        """An empty cache for each layer, as `cache.make_prompt_cache` hands them out."""
        kind = KVCache if self.config.family.positions else StateCache
        return [kind() for _ in self.layers]  # type: ignore[attr-defined]


def network(config: FamilyConfig) -> Any:
    """mlx-lm's network with random weights, speaking `model.Model`'s protocol.

    Raises:
        InputError: a value is missing in the config, or makes no sense to the network.
        ElmError: mlx-lm is not there, or has no such network.
    """
    family = config.family
    found = module(family.file)
    try:
        made = found.Model(found.ModelArgs.from_dict(dict(config.values)))
    except Exception as error:  # whatever a constructor makes of odd values
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"config.json: makes no {family.name} network: {reason}") from None
    if family.bare_norms:
        _bare_norms(made)
    made.__class__ = _speaking(found.Model, family.body, family.embedding)
    made.config = config
    # Beside the network's parts, not one of them.
    object.__setattr__(made, "ropes", () if device.on_gpu() else _share_ropes(made))
    constants = (value for part in made.modules() for name, value in part.items() if name.startswith("_"))
    mx.eval([value for value in constants if isinstance(value, mx.array)])  # RoPE's, or each graph would compute them
    return made


def described(config: FamilyConfig) -> FamilyConfig:
    """`config` with the names and shapes of its network's weights. Raises as `network`."""
    weights = {name: tuple(value.shape) for name, value in tree_flatten(network(config).parameters())}
    return replace(config, weights=weights)


def sanitized(config: FamilyConfig, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Weights as published by the network's names and shapes, what it does not need left out. Nothing is computed."""
    made = network(config)
    return made.sanitize(weights) if hasattr(made, "sanitize") else weights


def module(name: str) -> ModuleType:
    """The file `mlx_lm/models/NAME.py`, imported. Raises ElmError where mlx-lm is missing, or has none of that name."""
    _package()
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        raise ElmError(f"this mlx-lm has no network {name!r} ({error}): `pip install -U mlx-lm` may bring it") from None


@functools.cache
def _speaking(network: type, body: str, embedding: str) -> type:
    return type(network.__name__, (Spoken, network), {"body_name": body, "embedding_name": embedding})


@functools.cache
def _package() -> None:
    found = importlib.util.find_spec("mlx_lm")  # does not import it
    if found is None or not found.submodule_search_locations:
        raise ElmError("mlx-lm is not installed, whose networks run models other than OpenELM: pip install mlx-lm")
    package = ModuleType(_PACKAGE, __doc__)
    package.__path__ = [str(Path(found.submodule_search_locations[0]) / "models")]
    sys.modules[_PACKAGE] = package
    for name, helper, ours in (
        ("activations", "swiglu", ops.swiglu),
        ("base", "scaled_dot_product_attention", _attention),
        ("cache", "ArraysCache", StateCache),
    ):
        setattr(importlib.import_module(f"{_PACKAGE}.{name}"), helper, ours)


def _bare_norms(network: nn.Module) -> None:
    """LayerNorms without weights in the place of RMSNorms."""
    for part in network.modules():
        for name, child in list(part.items()):
            if isinstance(child, nn.RMSNorm):
                part[name] = nn.LayerNorm(child.weight.size, child.eps, affine=False)


class _SharedRope(nn.Module):
    """RoPE of several layers. During a forward pass of the network its sines are taken once, and not in each layer."""

    def __init__(self, own: nn.Module, rope: Rope) -> None:
        super().__init__()
        self._plain, self._rope = own.__call__, rope  # the method: it counts as none of the network's modules
        self.rotate: Rotate | None = None

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return self._plain(x, offset) if self.rotate is None else self.rotate(x)

    def begin(self, length: int, offset: int | mx.array) -> None:
        self.rotate = self._rope(length, offset)


def _share_ropes(network: nn.Module) -> tuple[_SharedRope, ...]:
    """Puts one `_SharedRope` in the place of all RoPEs that are alike, where it is a plain rotation of half heads."""
    shared: dict[tuple[Any, ...], _SharedRope] = {}
    for part in network.modules():
        own = part.get("rope") if isinstance(part, dict) else None
        found = None if own is None else _rotation(own, part)
        if found is not None:
            frequencies, scale = found
            key = (tuple(frequencies.tolist()), scale)
            if key not in shared:
                shared[key] = _SharedRope(own, Rope(2 * frequencies.size, frequencies, own, scale))
            part.rope = shared[key]
    return tuple(shared.values())


def _rotation(rope: nn.Module, attention: nn.Module) -> tuple[mx.array, float] | None:
    """Radians a position and the scale of mlx-lm's RoPE; None where it isn't such a one, or not of whole heads."""
    kind = type(rope).__name__
    dims = getattr(rope, "dims", getattr(rope, "dim", None))
    if dims is None or dims != getattr(attention, "head_dim", None) or getattr(rope, "traditional", False):
        return None
    if kind == "RoPE":
        half = dims // 2
        return mx.exp(mx.arange(half, dtype=mx.float32) * (-math.log(rope.base) / half)) * rope.scale, 1.0
    if kind == "Llama3RoPE":
        return 1 / rope._freqs, 1.0
    return (1 / rope._freqs, float(rope._scale)) if kind == "SuScaledRoPE" else None


@contextmanager
def _rotating(ropes: Sequence[_SharedRope], length: int, cache: Sequence[Any] | None) -> Iterator[None]:
    """A forward pass of `length` positions, for which the ropes' sines are taken now."""
    offset = 0 if cache is None or cache[0] is None or not ropes else cache[0].offset
    try:
        for rope in ropes:
            rope.begin(length, offset if isinstance(offset, int) else mx.array(offset))
        yield
    finally:
        for rope in ropes:
            rope.rotate = None


def _attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: ops.Mask, sinks: Any = None
) -> mx.array:
    """mlx-lm's signature. Its quantized caches and its attention sinks are nothing that runs here."""
    assert sinks is None and not hasattr(cache, "bits")
    return ops.attention(queries, keys, values, scale, mask)
