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
        kind: what it holds, for a person.
    """

    kind = "keys and values"
    step = 256  # capacity grows by this many positions, or by an eighth: a step's mask never reaches beyond

    def __init__(self, switch: int | None = None) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        self.switch = switch
        self.text_length = 0

    def empty(self) -> KVCache:
        """Returns an empty cache of this kind."""
        return KVCache(self.switch)

    def suits(self, length: int) -> bool:
        """Returns whether the cached keys are rotated as in a text of `length` tokens; else it must be read again."""
        if self.switch is None or self.offset == 0:
            return True
        return (max(self.text_length, self.offset) > self.switch) == (length > self.switch)

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

    def put(self, row: int, other: KVCache) -> None:
        """Makes `other`, of one text, a row of this batch in which every text begins at position 0.

        `row` is one that is there, or the next. There is room for twice the rows each time it is at its end.
        """
        if self.keys is None:
            self.state = other.single(0, other.offset).state
        capacity = max(self.capacity, row_capacity(other.offset))
        self.reserve(capacity)
        if row >= self._arrays()[0].shape[0]:
            self.state = [_with_rows(array, row_slots(row + 1)) for array in self._arrays()]
        for mine, theirs in zip(self._arrays(), other._arrays(), strict=True):
            own = mx.pad(theirs[0, :, : other.offset], [(0, 0), (0, capacity - other.offset), (0, 0)])
            mine[row] = own  # zeros to its end, or what was there could be no numbers
        self.text_length = max(self.text_length, other.text_length)

    def drop(self, row: int, rows: int) -> None:
        """Removes one of `rows` texts: the last takes its place."""
        for array in self._arrays():
            if row < rows - 1:
                array[row] = array[rows - 1]
        slots = row_slots(rows - 1)
        if slots < self._arrays()[0].shape[0] // 2:
            self.state = [mx.contiguous(array[:slots]) for array in self._arrays()]

    def single(self, row: int, length: int) -> KVCache:
        """Returns a copy of the first `length` positions of a row."""
        cache = self.empty()
        cache.state = [array[row : row + 1, :, :length] for array in self._arrays()]
        cache.offset, cache.text_length = length, self.text_length
        cache.reserve(row_capacity(length))
        return cache

    def block(self, row: int, start: int, stop: int) -> list[mx.array]:
        """Returns copies `(1, kv_heads, length, head_dim)` of a row's keys and values from `start` to `stop`."""
        return [array[row : row + 1, :, start:stop] * 1 for array in self._arrays()]

    def restore(self, blocks: Sequence[list[mx.array]], length: int) -> None:
        """Fills an empty cache with the `length` positions of blocks that follow each other."""
        keys, values = zip(*blocks, strict=True)
        self.state = [mx.concatenate(keys, axis=2), mx.concatenate(values, axis=2)]
        self.offset = length
        self.reserve(row_capacity(length))

    def _arrays(self) -> tuple[mx.array, mx.array]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    @staticmethod
    def inside(arrays: Arrays, position: mx.array, mask: mx.array) -> StepCache:
        """Returns the cache that stands for this one in a compiled step."""
        return StepCache(arrays[0], arrays[1], position, mask)

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
    """One layer's keys and values inside a compiled step: the capacity is fixed, the positions an array.

    Args:
        keys, values: `(slots, num_kv_heads, capacity, head_dim)`, of which the first `batch` slots are used.
        position: `(batch,)`, where the step writes in each row; RoPE's offset too.
        mask: boolean, `(batch, 1, 1, seen)`: the positions written so far, `position` included. No row sees more.
    """

    def __init__(self, keys: mx.array, values: mx.array, position: mx.array, mask: mx.array):
        self.keys = keys
        self.values = values
        self.offset = position
        self._mask = mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        batch = keys.shape[0]
        if self.keys.shape[0] == 1:
            self.keys = mx.slice_update(self.keys, keys, self.offset, axes=[2])
            self.values = mx.slice_update(self.values, values, self.offset, axes=[2])
        else:
            self.keys[mx.arange(batch), :, self.offset] = keys[:, :, 0]
            self.values[mx.arange(batch), :, self.offset] = values[:, :, 0]
        seen = self._mask.shape[-1]
        return self.keys[:batch, :, :seen], self.values[:batch, :, :seen]

    @property
    def state(self) -> Arrays:
        return self.keys, self.values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Returns the mask of a step's one new position."""
        assert length == 1
        if window_size is None:
            return self._mask
        first = self.offset[:, None, None, None] - window_size
        return self._mask & (mx.arange(self._mask.shape[-1]) > first)


class StateCache:
    """One layer's state in a network without keys and values (Mamba): of the same size for a text of any length.

    Only all of it can be removed. mlx-lm's networks read and write it by `[]`.
    """

    kind = "states"
    switch = None
    text_length = 0

    def __init__(self, size: int = 2) -> None:
        self._arrays: list[mx.array | None] = [None] * size
        self.offset = 0

    def empty(self) -> StateCache:
        """Returns an empty cache of this kind."""
        return StateCache(len(self._arrays))

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

    def put(self, row: int, other: StateCache) -> None:
        """Makes `other`, of one text, a row of this batch: one that is there, or the next."""
        parts = zip(self._arrays, other._arrays, strict=True)
        self.state = [
            theirs if mine is None else mx.concatenate([mine[:row], theirs, mine[row + 1 :]]) for mine, theirs in parts
        ]

    def drop(self, row: int, rows: int) -> None:
        """Removes one of `rows` texts: the last takes its place."""
        kept = mx.array([rows - 1 if at == row else at for at in range(rows - 1)])
        self.state = [array[kept] for array in self._arrays if array is not None]

    def single(self, row: int, length: int) -> StateCache:
        """Returns a copy of the state of a row, after `length` tokens."""
        cache = self.empty()
        cache.state = [array[row : row + 1] for array in self._arrays if array is not None]
        cache.offset = length
        return cache

    def block(self, row: int, start: int, stop: int) -> list[mx.array]:
        """Returns a copy of a row's state, which must be that after `stop` tokens: an earlier one is gone."""
        return [array[row : row + 1] * 1 for array in self._arrays if array is not None]

    def restore(self, blocks: Sequence[list[mx.array]], length: int) -> None:
        """Takes the state of the last block, after `length` tokens."""
        self.state, self.offset = blocks[-1], length

    @staticmethod
    def inside(arrays: Arrays, position: mx.array, mask: mx.array) -> StateCache:
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


def shared_length(cache: KVCache, held: Sequence[int], prompt: Sequence[int]) -> int:
    """Returns the number of ids of `prompt` that need not be read. Never all: the last one's logits are not kept.

    Of a state that can't be cut back, all that was read or none; and none where RoPE rotates a text of this length
    otherwise.

    Args:
        cache: any layer's, which holds the ids `held`.
    """
    if not cache.suits(len(prompt)):
        return 0
    most = min(len(held), len(prompt) - 1)
    same = next((i for i in range(most) if held[i] != prompt[i]), most)
    return same if same == len(held) or cache.is_trimmable() else 0


def place_step(lengths: Sequence[int]) -> tuple[mx.array, mx.array]:
    """Returns `position` and `mask` of the StepCaches of a step that writes behind `lengths` positions in each row."""
    position = mx.array(lengths)
    return position, mx.arange(_rounded(max(lengths) + 1, 64)) <= position[:, None, None, None]


def row_slots(rows: int) -> int:
    """Returns how many rows a batch's arrays have room for."""
    return 1 << max(0, rows - 1).bit_length()


def row_capacity(length: int) -> int:
    """Returns how many positions a batch's arrays get for texts of `length`."""
    return _rounded(length, KVCache.step)


def _rounded(length: int, step: int) -> int:
    """Rounds up to one of few numbers, an eighth or `step` too many at most: for each a step is compiled."""
    while 8 * step < length:
        step *= 2
    return -(-length // step) * step


def make_prompt_cache(model: Any) -> list[KVCache]:
    """Returns an empty cache for each layer of `model`; for a network that keeps a state, `StateCache`s."""
    config = model.config
    make: Callable[[], Any] = partial(KVCache, config.rope_switch) if config.positions else StateCache
    return [make() for _ in range(config.num_layers)]


def _with_rows(array: mx.array, rows: int) -> mx.array:
    return mx.concatenate([array, mx.zeros((rows - array.shape[0], *array.shape[1:]), array.dtype)])


def _grown(old: mx.array | None, like: mx.array, length: int, step: int) -> mx.array:
    """Returns `old` with room for `length` positions, filled with zeros; if it is None a new array, shaped `like`."""
    batch, heads, _, head_dim = like.shape
    capacity = 0 if old is None else old.shape[2]
    if old is not None and length <= capacity:
        return old
    room = mx.zeros((batch, heads, _rounded(length, step) - capacity, head_dim), like.dtype)
    return room if old is None else mx.concatenate([old, room], axis=2)
