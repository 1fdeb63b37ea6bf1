"""KV Prediction (arXiv 2410.08391): keys and values of a model, its base, predicted from those of a smaller one.

The auxiliary model reads a prompt, and for each layer of the base two linear maps make the base's keys and values of
its own. The base then decodes from them, and never reads the prompt: the first token comes sooner, at a price in
quality. What is mapped are keys as the auxiliary projects them, before its norm and RoPE; they get the base's norm and
RoPE (CoreNet, kv_prediction.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from elm_mlx.errors import InputError
from elm_mlx.model.attention import Mask, Segments
from elm_mlx.model.cache import KVCache
from elm_mlx.model.network import Attention, Model, causal_mask
from elm_mlx.model.rope import Rotate

KEEPS = (0.75, 0.5, 0.25)  # of the base's layers, as the paper's auxiliaries of left-out layers have them
KeysValues = tuple[mx.array, mx.array]  # of a layer


def layer_map(base_layers: int, auxiliary_layers: int) -> tuple[int, ...]:
    """Returns the auxiliary's layer for each of the base's: as many for each, or for the first ones one more.

    Raises:
        InputError: the auxiliary has more layers than the base.
    """
    if auxiliary_layers > base_layers:
        raise InputError(f"the auxiliary model has {auxiliary_layers} layers, and its base only {base_layers}")
    each, more = divmod(base_layers, auxiliary_layers)
    served = (repeat(layer, each + (layer < more)) for layer in range(auxiliary_layers))
    return tuple(chain.from_iterable(served))


def kept_layers(layers: int, keep: float) -> tuple[int, ...]:
    """Returns the layers that are left of so many: of four in a row the first three, the first and third, or the first.

    Raises:
        InputError: `keep` is none of `KEEPS`.
    """
    if keep not in KEEPS:
        raise InputError(f"{keep:g} of the layers cannot be kept: {', '.join(map(str, KEEPS))} are possible")
    kept = {0.75: (0, 1, 2), 0.5: (0, 2), 0.25: (0,)}[keep]
    return tuple(layer for layer in range(layers) if layer % 4 in kept)


def pruned_map(layers: int, kept: Sequence[int]) -> tuple[int, ...]:
    """Returns for each of the base's layers its place among the kept ones, or that of the last kept one before it."""
    return tuple(bisect_right(kept, layer) - 1 for layer in range(layers))


class LayerMap(nn.Module):
    """The two linear maps to a layer of the base; heads are side by side, `(..., kv_heads * head_dim)`."""

    def __init__(self, auxiliary: Attention, base: Attention) -> None:
        super().__init__()
        inputs, outputs = (attention.num_kv_heads * attention.head_dim for attention in (auxiliary, base))
        self.to_keys, self.to_values = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)


class KVPrediction(nn.Module):
    """A base with the auxiliary model and the maps that predict its keys and values.

    Args:
        base: is frozen.
        auxiliary: reads the same tokens; its own caches are `make_prompt_cache(auxiliary)`.
        places: the auxiliary's layer for each of the base's.
    """

    def __init__(self, base: Model, auxiliary: Model, places: Sequence[int]) -> None:
        super().__init__()
        self.base, self.auxiliary, self.places = base, auxiliary, tuple(places)
        base.freeze()
        self.maps = [
            LayerMap(auxiliary.layers[place].attn, layer.attn)
            for place, layer in zip(self.places, base.layers, strict=True)
        ]

    @property
    def layers(self) -> list[Any]:
        """The layers that are trained."""
        return self.auxiliary.layers

    def describe(self) -> str:
        """Returns a line for whoever asks for it."""
        return (
            f"KV prediction: {self.auxiliary.config.parameters:,} parameters read prompts for the model's "
            f"{self.base.config.parameters:,}: the first token comes sooner, and the text is another (lossy)"
        )

    def predict(self, ids: mx.array, segments: Segments | None = None) -> tuple[mx.array, list[KeysValues]]:
        """Returns the auxiliary's hidden states `(batch, length, its model_dim)`, and what is predicted from them.

        Of each layer of the base these are keys, by its norm and before RoPE, and values, `(batch, kv_heads, length,
        head_dim)`; with a gradient in the auxiliary and the maps.
        """
        inputs: list[mx.array] = []
        hidden = self.auxiliary.transformer(ids, None, segments, on_layer=inputs.append)
        known = [projected(layer, x) for layer, x in zip(self.auxiliary.layers, inputs, strict=True)]
        return hidden, [self._mapped(layer, *known[place]) for layer, place in enumerate(self.places)]

    def hidden(
        self,
        ids: mx.array,
        predicted: Sequence[KeysValues],
        segments: Segments | None = None,
        recompute: bool = False,
    ) -> mx.array:
        """Returns the base's hidden states `(batch, length, model_dim)` where all its keys and values are `predicted`.

        A token sees what is predicted of itself too; queries are the base's own (CoreNet's `concat_kvs=False`).

        Args:
            recompute: layers are computed again in the backward pass.
        """
        transformer, length = self.base.transformer, ids.shape[1]
        mask, rotate = causal_mask(length, None) if segments is None else segments, transformer.rope(length, 0)
        x = transformer.token_embeddings(ids)
        for layer, (keys, values) in zip(transformer.layers, predicted, strict=True):
            read = partial(_read_given, layer, mask, rotate)
            x = (mx.checkpoint(read) if recompute else read)(x, keys, values)
        return transformer.norm(x)

    def true(self, ids: mx.array, segments: Segments | None = None) -> list[KeysValues]:
        """Returns what `predict` is to predict: the base's own keys, by its norm and before RoPE, and values."""
        inputs: list[mx.array] = []
        self.base.transformer(ids, None, segments, on_layer=inputs.append)
        entered = zip(self.base.layers, inputs, strict=True)
        return [_in_heads(layer.attn, *projected(layer, x)) for layer, x in entered]

    def read(self, ids: mx.array, own: Sequence[KVCache], caches: Sequence[KVCache]) -> None:
        """Appends to the base's `caches` what is predicted of ids `(batch, length)`; not yet computed.

        Texts may be read in pieces.

        Args:
            own: the auxiliary's, which the ids join. They are whole, so that it may go on from them.
            caches: hold as many positions as `own`.
        """
        rotate = self.base.transformer.rope(ids.shape[1], caches[0].offset)
        served: list[list[int]] = [[] for _ in self.auxiliary.layers]
        for layer, place in enumerate(self.places):
            served[place].append(layer)
        left = iter(zip(self.auxiliary.layers, served, strict=True))

        def append(x: mx.array) -> None:
            auxiliary_layer, layers = next(left)
            known = _keys_and_values(auxiliary_layer, x)
            for layer in layers:
                keys, values = self._mapped(layer, *known)
                caches[layer].update_and_fetch(rotate(keys), values)

        self.auxiliary.transformer(ids, own, on_layer=append)

    def _mapped(self, layer: int, keys: mx.array, values: mx.array) -> KeysValues:
        """Returns a base layer's keys and values, from the auxiliary's `(batch, length, kv_heads * head_dim)`."""
        maps = self.maps[layer]
        return _in_heads(self.base.layers[layer].attn, maps.to_keys(keys), maps.to_values(values))


class _Given:
    """Takes a cache's place where keys, rotated already, and values come from elsewhere: a layer's own are dropped."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self._held = keys, values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        return self._held


def _read_given(layer: Any, mask: Mask, rotate: Rotate, x: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    return layer(x, mask, rotate, _Given(rotate(keys), values))


def projected(layer: Any, x: mx.array) -> KeysValues:
    """Returns keys and values `(batch, length, kv_heads * head_dim)` as a layer projects them of what enters it.

    A compiled update finds the product that the layer computes anyway, and makes no second one.
    """
    own = layer.attn
    every = own.qkv_proj(layer.attn_norm(x))
    first, second = (heads * own.head_dim for heads in (own.num_heads, own.num_heads + own.num_kv_heads))
    _, keys, values = mx.split(every, [first, second], axis=-1)
    return keys, values


def _keys_and_values(layer: Any, x: mx.array) -> KeysValues:
    """Returns what `projected` does where nobody computes queries: of a plain linear the rows of these two alone."""
    own = layer.attn
    if type(own.qkv_proj) is not nn.Linear:
        return projected(layer, x)
    keys, values = mx.split(layer.attn_norm(x) @ own.qkv_proj.weight[own.num_heads * own.head_dim :].T, 2, axis=-1)
    return keys, values


def _in_heads(attention: Attention, keys: mx.array, values: mx.array) -> KeysValues:
    """Returns `(batch, kv_heads, length, head_dim)` of both, keys by the layer's norm."""
    batch, length, _ = keys.shape
    shape = (batch, length, attention.num_kv_heads, attention.head_dim)
    keys, values = (each.reshape(shape).swapaxes(1, 2) for each in (keys, values))
    return (attention.k_norm(keys) if attention.normalize_qk else keys), values
