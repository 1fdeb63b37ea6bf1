"""Caches: keys and values that grow, the window through which a compiled step writes to them, a state.

Knows how keys and values are stored, and nothing of how they are computed. All speak as much of mlx-lm's
cache protocol as the models use: `update_and_fetch`, `offset`, `make_mask`; a state, `[]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from elm_mlx.model.ops import Segments

Arrays = Sequence[mx.array]  # what a layer keeps


class KVCache:
    """One layer's keys and values: `(batch, num_kv_heads, capacity, head_dim)`, `offset` positions of it in use.

    Attributes:
        switch: the length past which all keys of a text are rotated otherwise (LongRoPE); None where none is.
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
        """Whether what is cached is rotated as in a text of `length` tokens. Else all has to be read anew."""
        if self.switch is None or self.offset == 0:
            return True
        return (max(self.text_length, self.offset) > self.switch) == (length > self.switch)

    def replace_row(self, row: int, other: KVCache) -> None:
        """Put what `other` holds (batch 1) in the place of the last positions of a row."""
        assert self.keys is not None and self.values is not None and other.keys is not None and other.values is not None
        self.text_length = max(self.text_length, other.text_length)
        place = slice(self.offset - other.offset, self.offset)
        self.keys[row, :, place] = other.keys[0, :, : other.offset]
        self.values[row, :, place] = other.values[0, :, : other.offset]

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

    @state.setter
    def state(self, arrays: Arrays) -> None:
        self.keys, self.values = arrays

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @classmethod
    def joined(cls, caches: Sequence[KVCache]) -> KVCache:
        """One layer's caches of several prompts (batch 1 each) as one batch, padded in front to the same length."""
        cache = cls(caches[0].switch)
        cache.state = pad_left(caches)
        cache.offset = cache.capacity
        return cache

    @staticmethod
    def inside(arrays: Arrays, position: mx.array, offset: mx.array, mask: mx.array) -> StepCache:
        """What stands for this one in a compiled step."""
        return StepCache(arrays[0], arrays[1], position, offset, mask)

    def trim(self, length: int) -> int:
        """Forget the last `length` positions; returns how many there were to forget."""
        length = min(length, self.offset)
        self.offset -= length
        return length

    def is_trimmable(self) -> bool:
        return True

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What to hide from `length` new positions: what comes after each, and what is `window_size` before it."""
        end = self.offset + length
        if window_size is None or end <= window_size:
            return "causal" if length > 1 else None
        back = mx.arange(self.offset, end)[:, None] - mx.arange(end)
        return (back >= 0) & (back < window_size)


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

    @property
    def state(self) -> Arrays:
        return self.keys, self.values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """For a single new position, which is all that a step has."""
        assert length == 1
        if window_size is None:
            return self._mask
        return self._mask & (mx.arange(self.keys.shape[2]) > self._position - window_size)


class StateCache:
    """One layer's state in a network that has no keys and values (Mamba): of one size, however much was read.

    Of such a state nothing can be taken back but all of it. mlx-lm's networks read and write it by `[]`.
    """

    switch = None  # it knows no positions
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
        """There is always room."""

    def trim(self, length: int) -> int:
        """Forget everything, if `length` is all there is; else nothing, and 0 is returned."""
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
        """One layer's states of several prompts as one batch."""
        cache = cls(len(caches[0]._arrays))
        cache.state = [mx.concatenate(arrays) for arrays in zip(*(cache.state for cache in caches), strict=True)]
        cache.offset = max(cache.offset for cache in caches)
        return cache

    @staticmethod
    def inside(arrays: Arrays, position: mx.array, offset: mx.array, mask: mx.array) -> StateCache:
        """What stands for this one in a compiled step: the same, for it does not grow."""
        cache = StateCache()
        cache.state = arrays
        return cache


class SegmentedRow:
    """A cache's place in training on rows of several texts: keeps nothing, and its mask tells the texts apart."""

    offset = 0

    def __init__(self, segments: Segments) -> None:
        self._segments = segments

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Segments | mx.array:
        """`ops.Segments`; where a window hides more, all of it as a boolean array `(batch, 1, length, length)`."""
        if window_size is None or length <= window_size:
            return self._segments
        positions = mx.arange(length)
        return self._segments.seen() & (positions[:, None] - positions < window_size)


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
    """An empty cache for each layer of `model`; of a network that keeps a state, `StateCache`s."""
    return model.prompt_cache() if hasattr(model, "prompt_cache") else [KVCache() for _ in model.layers]


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
