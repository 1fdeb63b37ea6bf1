"""mlx-lm's networks of other families, without the rest of mlx-lm, and with the protocol of `network.Model`.

Importing `mlx_lm` imports transformers, and takes a second. Its networks need neither, so their files are imported as a
package of our own, independent of `mlx_lm`. Before any network is, the helpers that all of them share are replaced by
ours, which compute the same: on a CPU theirs are half of a prompt's time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from elm_mlx.errors import ElmError, InputError
from elm_mlx.model import ops
from elm_mlx.model.attention import Mask, Segments, attention
from elm_mlx.model.cache import SegmentedRow, StateCache
from elm_mlx.model.families import FamilyConfig
from elm_mlx.model.rope import Rope, Rotate
from elm_mlx.model.rope_config import RopeConfig
from elm_mlx.model.sublayers import LayerParts, LayersInC, layers_in_c

_PACKAGE = "elm_mlx_networks"


class NetworkProtocol:
    """The methods of `network.Model` that mlx-lm's networks lack. Mixed into their classes, so that all names stay.

    Attributes:
        body_name, embedding_name: of the module that is all but the head, and of the embedding in it.
        ropes: the layers' RoPE; several layers share one.
    """

    body_name: str
    embedding_name: str
    config: FamilyConfig
    ropes: tuple[_SharedRope, ...]

    def __call__(self, ids: mx.array, cache: Sequence[Any] | None = None, segments: Segments | None = None) -> mx.array:
        """Ids `(batch, length)` to logits `(batch, length, vocab_size)`; as of `network.Model`."""
        return self.head(self.transformer(ids, cache, segments))

    def transformer(
        self,
        ids: mx.array,
        cache: Sequence[Any] | None = None,
        segments: Segments | None = None,
        last: int | None = None,
    ) -> mx.array:
        """All but the head: `(batch, length)` to `(batch, length, model_dim)`.

        `last` of one text's positions may be all that are wanted, `(1, last, model_dim)`.

        Raises:
            InputError: `segments` for a network that keeps a state, which runs from one text into the next.
        """
        layers: list[Any] = self.layers  # type: ignore[attr-defined]
        if segments is not None:
            if not self.config.positions:
                raise InputError(f"several texts in a row: {self.config.family.name} cannot tell them apart")
            cache = [SegmentedRow(segments) for _ in layers]
        elif cache is not None:
            in_c = self.in_c(ids.size)
            if in_c is not None:
                return getattr(self, self.body_name).norm(in_c(self.embed(ids), cache, last))
        with _rotating(self.ropes, ids.shape[1], cache):
            hidden = getattr(self, self.body_name)(ids, cache)
        for layer_cache in cache or ():
            if isinstance(layer_cache, StateCache):
                layer_cache.offset += ids.shape[1]
        return hidden if last is None else hidden[:, -last:]

    def in_c(self, rows: int) -> LayersInC | None:
        """Returns the layers for so many rows, where C computes them."""
        if not self.ropes or self.config.family.offset_norms:  # whose norms, gates and embedding C does not know
            return None
        return layers_in_c(self, rows, self._parts, getattr(self, self.body_name).norm)

    def embed(self, ids: mx.array) -> mx.array:
        """Ids `(...)` to what the first layer reads, `(..., model_dim)`, of a network whose layers C computes."""
        return getattr(getattr(self, self.body_name), self.embedding_name)(ids)

    def layer_ropes(self) -> list[Rope]:
        """Returns the rotation of each layer's queries and keys."""
        return [layer.self_attn.rope.rope for layer in self.layers]  # type: ignore[attr-defined]

    def _parts(self) -> list[LayerParts]:
        """Returns the modules of each layer by what they are for."""
        values, family = self.config.values, self.config.family
        types = values["layer_types"] or ["full_attention"] * self.config.num_layers
        found = []
        for layer, kind in zip(self.layers, types, strict=True):  # type: ignore[attr-defined]
            own, mlp = layer.self_attn, layer.mlp
            norms = (
                {"after": layer.post_attention_layernorm, "ffn_after": layer.post_feedforward_layernorm}
                if family.norms == "after"
                else {"before": layer.input_layernorm, "ffn_before": layer.post_attention_layernorm}
            )
            if family.normed_heads:
                norms |= {"query_norm": own.q_norm, "key_norm": own.k_norm}
            found.append(LayerParts(
                [own.qkv_proj] if "qkv_proj" in own else [own.q_proj, own.k_proj, own.v_proj], own.o_proj,
                [mlp.gate_up_proj] if "gate_up_proj" in mlp else [mlp.gate_proj, mlp.up_proj], mlp.down_proj,
                values["num_attention_heads"], values["num_key_value_heads"], values["head_dim"], own.rope.rope,
                window=None if kind == "full_attention" else values["sliding_window"], **norms,
            ))  # fmt: skip
        return found

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states `(..., model_dim)` to logits `(..., vocab_size)`."""
        owner, cap = self.head_module(), self.config.values.get("final_logit_softcapping")
        logits = owner.as_linear(hidden) if hasattr(owner, "as_linear") else owner(hidden)
        return logits if cap is None else cap * ops.tanh(logits / cap)

    def head_module(self) -> nn.Module:
        """Returns the module whose parameters turn hidden states into logits."""
        own: nn.Module | None = getattr(self, "lm_head", None)
        return getattr(getattr(self, self.body_name), self.embedding_name) if own is None else own


def network(config: FamilyConfig) -> Any:
    """Makes mlx-lm's network with random weights, not computed, and the protocol of `network.Model`.

    Raises:
        ElmError: mlx-lm is not there, has no such network, or not this one.
    """
    family = config.family
    found = module(family.file)
    values = {**config.values, "tie_word_embeddings": config.share_input_output_layers}
    try:
        made = found.Model(found.ModelArgs.from_dict(values))
    except (TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ElmError(f"this mlx-lm makes no {family.name} network from such a config.json: {reason}") from None
    if family.bare_norms:
        _bare_norms(made)
    if config.share_input_output_layers and "lm_head" in made:  # of Gemma 3, which learns it from the weights
        made.pop("lm_head")
        made.tie_word_embeddings = True
    for layer in made.layers if family.capped else ():
        _cap(layer.self_attn, config.values["attn_logit_softcapping"])
    for part in made.modules() if "layer_norm_epsilon" in values else ():  # which mlx-lm's Mamba does not read
        if isinstance(part, nn.RMSNorm):
            part.eps = values["layer_norm_epsilon"]
    made.__class__ = _with_protocol(found.Model, family.body, family.embedding)
    made.config = config
    object.__setattr__(made, "ropes", _share_ropes(made))  # beside the network's parts, not one of them
    return made


def sanitized(config: FamilyConfig, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Returns published weights by the network's names and shapes, without those that it lacks. Computes nothing."""
    kept = {name: value for name, value in weights.items() if config.needs(name)}
    for name, value in kept.items():  # PyTorch keeps a convolution's channels before its width
        if name.endswith("conv1d.weight") and value.ndim == 3 and value.shape[-1] != 1:
            kept[name] = value.moveaxis(2, 1)
    return kept


def module(name: str) -> ModuleType:
    """Imports `mlx_lm/models/NAME.py`. Raises ElmError where mlx-lm is missing, or has none of that name."""
    _package()
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        raise ElmError(f"this mlx-lm has no network {name!r} ({error}): `pip install -U mlx-lm` may bring it") from None


@functools.cache
def _with_protocol(network: type, body: str, embedding: str) -> type:
    return type(network.__name__, (NetworkProtocol, network), {"body_name": body, "embedding_name": embedding})


@functools.cache
def _package() -> None:
    found = importlib.util.find_spec("mlx_lm")  # does not import it
    if found is None or not found.submodule_search_locations:
        raise ElmError("models other than OpenELM need mlx-lm: pip install mlx-lm")
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
    """Replaces RMSNorms by LayerNorms without weights."""
    for part in network.modules():
        for name, child in list(part.items()):
            if isinstance(child, nn.RMSNorm):
                part[name] = nn.LayerNorm(child.weight.size, child.eps, affine=False)


class _CappedAttention(nn.Module):
    """Gemma 2's attention (Gemma Team 2024, section 2), of mlx-lm's parts for Gemma 3: without norms of heads."""

    def __call__(self, x: mx.array, mask: Mask = None, cache: Any = None) -> mx.array:
        """`(batch, length, model_dim)`, as mlx-lm's."""
        queries, keys, values = (
            linear(x).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
            for linear, heads in (
                (self.q_proj, self.n_heads), (self.k_proj, self.n_kv_heads), (self.v_proj, self.n_kv_heads)
            )
        )  # fmt: skip
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset), self.rope(keys, offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out: mx.array = attention(queries, keys, values, self.scale, mask, self.cap)
        return self.o_proj(out.swapaxes(1, 2).flatten(2))


def _cap(attention: nn.Module, cap: float | None) -> None:
    """Has an attention of mlx-lm's Gemma 3 be Gemma 2's."""
    attention.pop("q_norm"), attention.pop("k_norm")
    attention.cap = cap
    attention.__class__ = _CappedAttention


class _SharedRope(nn.Module):
    """Replaces mlx-lm's RoPE in several layers. A forward pass of the network takes its sines once for all of them."""

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.rope = rope  # counts as none of the network's modules
        self.rotate: Rotate | None = None

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """`(batch, heads, length, head_dim)`, rotated; outside a forward pass for positions from `offset` on."""
        rotate = self.rope(x.shape[2], offset) if self.rotate is None else self.rotate
        return rotate(x)


def _share_ropes(network: Any) -> tuple[_SharedRope, ...]:
    """Replaces the RoPEs of all layers that rotate alike by one `_SharedRope`."""
    config: FamilyConfig = network.config
    if not config.positions:
        return ()
    shared: dict[RopeConfig, _SharedRope] = {}
    for number, layer in enumerate(network.layers):
        how = config.layer_rope(number)
        if how not in shared:
            shared[how] = _SharedRope(Rope(config.values["head_dim"], how))
        layer.self_attn.rope = shared[how]
    return tuple(shared.values())


@contextmanager
def _rotating(ropes: Sequence[_SharedRope], length: int, cache: Sequence[Any] | None) -> Iterator[None]:
    """Takes the ropes' sines for a forward pass of `length` positions, which is the block."""
    first = None if cache is None or not ropes else cache[0]
    offset, positions = 0 if first is None else first.offset, getattr(first, "positions", None)
    try:
        for each in ropes:
            if positions is None:
                start = offset if isinstance(offset, int) else mx.array(offset)
                each.rotate = each.rope(length, start, getattr(first, "text_length", 0))
            else:
                each.rotate = each.rope.at(positions)
        yield
    finally:
        for rope in ropes:
            rope.rotate = None


def _attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Mask, sinks: Any = None
) -> mx.array:
    """Has mlx-lm's signature; its quantized caches and attention sinks do not occur here."""
    assert sinks is None and not hasattr(cache, "bits")
    return attention(queries, keys, values, scale, mask)
