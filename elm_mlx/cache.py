"""KV caches: the one that grows, and the window through which a compiled step writes to it.

Knows how keys and values are stored, and nothing of how they are computed. Both speak as much of mlx-lm's
cache protocol as the model uses: `update_and_fetch`, `offset`, `make_mask`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


class KVCache:
    """One layer's keys and values: `(batch, num_kv_heads, capacity, head_dim)`, `offset` positions of it in use."""

    step = 256  # capacity grows by this many positions

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `(batch, num_kv_heads, length, head_dim)`; returns all that is in use."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = _grown(self.keys, keys, self.offset, self.step)
        self.values = _grown(self.values, values, self.offset, self.step)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def reserve(self, length: int) -> None:
        """Make room for `length` positions. Something must be in the cache already."""
        assert self.keys is not None and self.values is not None
        self.keys = _grown(self.keys, self.keys, length, self.step)
        self.values = _grown(self.values, self.values, length, self.step)

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    def trim(self, length: int) -> int:
        """Forget the last `length` positions; returns how many there were to forget."""
        length = min(length, self.offset)
        self.offset -= length
        return length

    def is_trimmable(self) -> bool:
        return True

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> str | None:
        """What to hide from `length` new positions: only what comes after each."""
        return "causal" if length > 1 else None


class StepCache:
    """One layer's arrays inside a compiled step: of fixed capacity, the position being an array.

    Args:
        keys, values: `(batch, num_kv_heads, capacity, head_dim)`.
        position: `(1,)`, where the step writes, the same in every row.
        offset: what RoPE counts from, `(1,)` or `(batch,)`; less than `position` where a row starts with padding.
        mask: boolean, `(1 or batch, 1, 1, capacity)`, what has been written, `position` included.
    """

    def __init__(self, keys: mx.array, values: mx.array, position: mx.array, offset: mx.array, mask: mx.array):
        self.keys = keys
        self.values = values
        self.offset = offset
        self._position = position
        self._mask = mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = mx.slice_update(self.keys, keys, self._position, axes=[2])
        self.values = mx.slice_update(self.values, values, self._position, axes=[2])
        return self.keys, self.values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """For a single new position, which is all that a step has."""
        assert length == 1
        return self._mask


def place_step(start: int, capacity: int, padding: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
    """`position`, `offset` and `mask` for the StepCaches of a step that writes at `start`.

    `padding` `(batch,)`: how many positions at the beginning of each row hold nothing.
    """
    position = mx.array([start])
    positions = mx.arange(capacity)
    mask = (positions <= start)[None, None, None]
    if padding is None:
        return position, position, mask
    return position, start - padding, mask & (positions >= padding[:, None, None, None])


def make_prompt_cache(model: Any) -> list[KVCache]:
    """An empty cache for each layer of `model`."""
    return [KVCache() for _ in model.layers]


def pad_left(caches: Sequence[KVCache]) -> tuple[mx.array, mx.array]:
    """One layer's caches of several prompts (batch 1 each) as one batch that ends at the same position."""
    longest = max(cache.offset for cache in caches)

    def stack(arrays: list[mx.array | None]) -> mx.array:
        rows = []
        for cache, array in zip(caches, arrays, strict=True):
            assert array is not None
            rows.append(mx.pad(array[:, :, : cache.offset], [(0, 0), (0, 0), (longest - cache.offset, 0), (0, 0)]))
        return mx.concatenate(rows)

    return stack([cache.keys for cache in caches]), stack([cache.values for cache in caches])


def _grown(old: mx.array | None, like: mx.array, length: int, step: int) -> mx.array:
    """`old` with room for `length` positions, zeros at its end; a new one, shaped `like`, where there is none."""
    batch, heads, _, head_dim = like.shape
    capacity = 0 if old is None else old.shape[2]
    if old is not None and length <= capacity:
        return old
    room = mx.zeros((batch, heads, -(-length // step) * step - capacity, head_dim), like.dtype)
    return room if old is None else mx.concatenate([old, room], axis=2)
