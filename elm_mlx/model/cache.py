"""KV caches: keys and values that grow, those of a compiled step, and the state of a network without keys.

All have as much of mlx-lm's cache protocol as the models use: `update_and_fetch`, `offset`, `make_mask`; a state, `[]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from elm_mlx.model.ops import Segments

Arrays = Sequence[mx.array]  # of one layer


class KVCache:
    """One layer's keys and values: `(batch, num_kv_heads, capacity, head_dim)`, of which `offset` positions are used.

    Attributes:
        switch: the length past which all keys of a text are rotated otherwise (LongRoPE); None if there is none.
        text_length: of the whole text that is being read, where more than `offset` tokens are known to come.
    """

    step = 256  # capacity grows by this many positions

    def __init__(self, switch: int | None = None) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        self.switch = switch
        self.text_length = 0

    def suits(self, length: int) -> bool:
        """Returns whether the cached keys are rotated as in a text of `length` tokens; else it must be read again."""
        if self.switch is None or self.offset == 0:
            return True
        return (max(self.text_length, self.offset) > self.switch) == (length > self.switch)

    def replace_row(self, row: int, other: KVCache) -> None:
        """Overwrites the last positions of a row with the contents of `other` (batch 1)."""
        assert self.keys is not None and self.values is not None and other.keys is not None and other.values is not None
        self.text_length = max(self.text_length, other.text_length)
        place = slice(self.offset - other.offset, self.offset)
        self.keys[row, :, place] = other.keys[0, :, : other.offset]
        self.values[row, :, place] = other.values[0, :, : other.offset]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends `(batch, num_kv_heads, length, head_dim)`. Returns all keys and values so far."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = _grown(self.keys, keys, self.offset, self.step)
        self.values = _grown(self.values, values, self.offset, self.step)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def reserve(self, length: int) -> None:
        """Allocates room for `length` positions. The cache must not be empty."""
        assert self.keys is not None and self.values is not None
        self.keys = _grown(self.keys, self.keys, length, self.step)
        self.values = _grown(self.values, self.values, length, self.step)

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        return self.keys, self.values

    @state.setter
    def state(self, arrays: Arrays) -> None:
        self.keys, self.values = arrays

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @classmethod
    def joined(cls, caches: Sequence[KVCache]) -> KVCache:
        """Joins one layer's caches of several prompts (batch 1 each) into a batch, padded on the left."""
        cache = cls(caches[0].switch)
        cache.state = pad_left(caches)
        cache.offset = cache.capacity
        return cache

    @staticmethod
    def inside(arrays: Arrays, position: mx.array, offset: mx.array, mask: mx.array) -> StepCache:
        """Returns the cache that stands for this one in a compiled step."""
        return StepCache(arrays[0], arrays[1], position, offset, mask)

    def trim(self, length: int) -> int:
        """Removes the last `length` positions, or all of fewer. Returns how many were removed."""
        length = min(length, self.offset)
        self.offset -= length
        return length

    def is_trimmable(self) -> bool:
        return True

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Returns the mask of `length` new positions: each sees those before it, `window_size` with itself at most."""
        end = self.offset + length
        if window_size is None or end <= window_size:
            return "causal" if length > 1 else None
        back = mx.arange(self.offset, end)[:, None] - mx.arange(end)
        return (back >= 0) & (back < window_size)


class StepCache:
    """One layer's keys and values inside a compiled step: the capacity is fixed, the position an array.

    Args:
        keys, values: `(batch, num_kv_heads, capacity, head_dim)`.
        position: `(1,)`, where the step writes, the same in every row.
        offset: the position for RoPE, `(1,)` or `(batch,)`; less than `position` where a row starts with padding.
        mask: boolean, `(1 or batch, 1, 1, capacity)`: the positions written so far, `position` included.
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

    @property
    def state(self) -> Arrays:
        return self.keys, self.values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Returns the mask of a step's one new position."""
        assert length == 1
        if window_size is None:
            return self._mask
        return self._mask & (mx.arange(self.keys.shape[2]) > self._position - window_size)


class StateCache:
    """One layer's state in a network without keys and values (Mamba): of the same size for a text of any length.

    Only all of it can be removed. mlx-lm's networks read and write it by `[]`.
    """

    switch = None
    text_length = 0

    def __init__(self, size: int = 2) -> None:
        self._arrays: list[mx.array | None] = [None] * size
        self.offset = 0

    def __getitem__(self, index: int) -> mx.array | None:
        return self._arrays[index]

    def __setitem__(self, index: int, array: mx.array) -> None:
        self._arrays[index] = array

    @property
    def state(self) -> list[mx.array | None]:
        return list(self._arrays)

    @state.setter
    def state(self, arrays: Arrays) -> None:
        self._arrays = list(arrays)

    @property
    def capacity(self) -> int:
        return 1

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays if array is not None)

    def reserve(self, length: int) -> None:
        """Does nothing: a state does not grow."""

    def trim(self, length: int) -> int:
        """Removes everything if `length` is all there is, else nothing. Returns how much was removed."""
        if length < self.offset:
            return 0
        forgotten, self.offset = self.offset, 0
        self._arrays = [None] * len(self._arrays)
        return forgotten

    def is_trimmable(self) -> bool:
        return False

    def suits(self, length: int) -> bool:
        return True

    @classmethod
    def joined(cls, caches: Sequence[StateCache]) -> StateCache:
        """Joins one layer's states of several prompts into a batch."""
        cache = cls(len(caches[0]._arrays))
        cache.state = [mx.concatenate(arrays) for arrays in zip(*(cache.state for cache in caches), strict=True)]
        cache.offset = max(cache.offset for cache in caches)
        return cache

    @staticmethod
    def inside(arrays: Arrays, position: mx.array, offset: mx.array, mask: mx.array) -> StateCache:
        """Returns the cache that stands for this one in a compiled step."""
        cache = StateCache()
        cache.state = arrays
        return cache


class SegmentedRow:
    """Takes a cache's place in training on rows of several texts: keeps nothing, and its mask separates the texts."""

    offset = 0

    def __init__(self, segments: Segments) -> None:
        self._segments = segments

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Segments | mx.array:
        """Returns the segments; where a window hides more, a boolean array `(batch, 1, length, length)`."""
        if window_size is None or length <= window_size:
            return self._segments
        positions = mx.arange(length)
        return self._segments.seen() & (positions[:, None] - positions < window_size)


def place_step(start: int, capacity: int, padding: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
    """Returns `position`, `offset` and `mask` of the StepCaches of a step that writes at `start`.

    `padding` `(batch,)`: the number of empty positions at the beginning of each row.
    """
    position = mx.array([start])
    positions = mx.arange(capacity)
    mask = (positions <= start)[None, None, None]
    if padding is None:
        return position, position, mask
    return position, start - padding, mask & (positions >= padding[:, None, None, None])


def make_prompt_cache(model: Any) -> list[KVCache]:
    """Returns an empty cache for each layer of `model`; for a network that keeps a state, `StateCache`s."""
    config = model.config
    make: Callable[[], Any] = partial(KVCache, config.rope_switch) if config.positions else StateCache
    return [make() for _ in range(config.num_layers)]


def pad_left(caches: Sequence[KVCache]) -> tuple[mx.array, mx.array]:
    """Joins one layer's keys, and its values, of several prompts (batch 1 each), so that all end at one position."""
    longest = max(cache.offset for cache in caches)

    def stack(arrays: list[mx.array | None]) -> mx.array:
        rows = []
        for cache, array in zip(caches, arrays, strict=True):
            assert array is not None
            rows.append(mx.pad(array[:, :, : cache.offset], [(0, 0), (0, 0), (longest - cache.offset, 0), (0, 0)]))
        return mx.concatenate(rows)

    return stack([cache.keys for cache in caches]), stack([cache.values for cache in caches])


def _grown(old: mx.array | None, like: mx.array, length: int, step: int) -> mx.array:
    """Returns `old` with room for `length` positions, filled with zeros; if it is None a new array, shaped `like`."""
    batch, heads, _, head_dim = like.shape
    capacity = 0 if old is None else old.shape[2]
    if old is not None and length <= capacity:
        return old
    room = mx.zeros((batch, heads, -(-length // step) * step - capacity, head_dim), like.dtype)
    return room if old is None else mx.concatenate([old, room], axis=2)
