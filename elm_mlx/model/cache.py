"""KV caches: keys and values that grow, those of a compiled step, and the state of a network without keys.

All have as much of mlx-lm's cache protocol as the models use: `update_and_fetch`, `offset`, `make_mask`; a state, `[]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import mlx.core as mx

from elm_mlx.errors import InputError
from elm_mlx.model import packed
from elm_mlx.model.attention import Causal, Segments
from elm_mlx.model.packed import Packed
from elm_mlx.model.rope import Rope

Arrays = Sequence[mx.array]  # of one layer
_LEAST = 32  # positions of a cache that drops some
Fetched: TypeAlias = mx.array | Packed


class Writer(Protocol):
    """Somebody who writes into a cache's arrays in place, and says so there."""

    def end(self) -> Any:
        """Ends that, when what was to be written is."""


class KVCache:
    """One layer's keys and values: `(batch, num_kv_heads, capacity, head_dim)`, of which `offset` positions are used.

    Attributes:
        switch: the length past which all keys of a text are rotated otherwise (LongRoPE); None if there is none.
        text_length: of the whole text that is being read, where more than `offset` tokens are known to come.
        kind: what it holds, for a person.
        limit: positions at most, of a cache that drops the oldest; None for one that grows.
        dropped: positions that it has dropped.
        writer: writes into the arrays' memory beside it; None where nobody does.
    """

    kind = "keys and values"
    limit: int | None = None
    dropped = 0
    step = 256  # capacity grows by this many positions, or by an eighth: a step's mask never reaches beyond

    def __init__(self, switch: int | None = None) -> None:
        self._held: list[mx.array] = []  # keys and values, or what stands for them; positions are the third axis
        self.writer: Writer | None = None
        self.offset = 0
        self.switch = switch
        self.text_length = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the arrays too, so nobody may write into their memory; and it grows by itself."""
        return {**vars(self), "_held": [array[...] for array in self._arrays], "writer": None}

    @property
    def _arrays(self) -> list[mx.array]:
        """The arrays, to be used in any way: nobody writes into them from now on."""
        if self.writer is not None:
            self.writer.end()
            self.writer = None
        return self._held

    @_arrays.setter
    def _arrays(self, arrays: list[mx.array]) -> None:
        if self.writer is not None:
            self.writer.end()
            self.writer = None
        self._held = arrays

    def lend(self, at: int) -> list[mx.array]:
        """Returns the arrays to somebody who will be the `writer`, from position `at` on, until the cache is used.

        They are copied where others have them too, and else stay where they are, as with all that MLX writes.
        """
        held = self._arrays
        for number in range(len(held)):  # whole at any time: an interrupt may come
            held[number] = mx.contiguous(held[number])
            held[number][:, :, at : at + 1] = 0
        mx.eval(held)
        return [*held]

    def empty(self) -> KVCache:
        """Returns an empty cache of this kind."""
        return KVCache(self.switch)

    def held(self, keys: mx.array, values: mx.array) -> Arrays:
        """Returns the arrays that stand for keys and values `(batch, num_kv_heads, length, head_dim)`."""
        return keys, values

    def fetched(self, arrays: Arrays) -> tuple[Fetched, Fetched]:
        """Returns the keys and values that arrays stand for, as `attention` takes them."""
        keys, values = arrays
        return keys, values

    def suits(self, length: int) -> bool:
        """Returns whether the cached keys are rotated as in a text of `length` tokens; else it must be read again."""
        if self.switch is None or self.offset == 0:
            return True
        return (max(self.text_length, self.offset) > self.switch) == (length > self.switch)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Fetched, Fetched]:
        """Appends `(batch, num_kv_heads, length, head_dim)`. Returns all keys and values so far."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        new = self.held(keys, values)
        self._arrays = [_grown(old, like, self.offset, self.step) for old, like in zip(self.state, new, strict=True)]
        for array, part in zip(self._arrays, new, strict=True):
            array[..., start : self.offset, :] = part
        return self.fetched([array[..., : self.offset, :] for array in self._arrays])

    def reserve(self, length: int) -> None:
        """Allocates room for `length` positions. The cache must not be empty."""
        self._arrays = [_grown(array, array, length, self.step) for array in self._arrays]

    @property
    def capacity(self) -> int:
        return self._held[0].shape[2] if self._held else 0

    @property
    def state(self) -> list[mx.array | None]:
        return [*self._arrays] if self._arrays else [None] * self._parts

    @state.setter
    def state(self, arrays: Sequence[mx.array | None]) -> None:
        self._arrays = [array for array in arrays if array is not None]

    _parts = 2  # arrays

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._held)

    def put(self, row: int, other: KVCache, copies: int = 1) -> None:
        """Makes `other`, of one text, a row of this batch in which every text begins at position 0, or several.

        `row` is one that is there, or the next. There is room for twice the rows each time it is at its end.
        """
        if not self._arrays:
            self.state = other.single(0, other.offset).state
        capacity = max(self.capacity, row_capacity(other.offset))
        self.reserve(capacity)
        if row + copies > self._arrays[0].shape[0]:
            self.state = [_with_rows(array, row_slots(row + copies)) for array in self._arrays]
        for mine, theirs in zip(self._arrays, other._arrays, strict=True):
            own = mx.pad(theirs[0, :, : other.offset], [(0, 0), (0, capacity - other.offset), (0, 0)])
            mine[row : row + copies] = own  # zeros to its end, or what was there could be no numbers
        self.text_length = max(self.text_length, other.text_length)

    def drop(self, row: int, rows: int) -> None:
        """Removes one of `rows` texts: the last takes its place."""
        for array in self._arrays:
            if row < rows - 1:
                array[row] = array[rows - 1]
        slots = row_slots(rows - 1)
        if slots < self._arrays[0].shape[0] // 2:
            self.state = [mx.contiguous(array[:slots]) for array in self._arrays]

    def narrow(self) -> None:
        """Gives up the room for rows behind the first."""
        if self._held[0].shape[0] > 1:
            self._arrays = [mx.contiguous(array[:1]) for array in self._arrays]

    def shorten(self, length: int) -> None:
        """Gives up the room behind `length` positions, where that is half of it or more."""
        room = row_capacity(length)
        if 2 * room <= self.capacity:
            self._arrays = [mx.contiguous(array[:, :, :room]) for array in self._arrays]

    def single(self, row: int, length: int) -> KVCache:
        """Returns a copy of the first `length` positions of a row."""
        cache = self.empty()
        cache.state = [array[row : row + 1, :, :length] for array in self._arrays]
        cache.offset, cache.text_length = length, self.text_length
        cache.reserve(row_capacity(length))
        return cache

    def block(self, row: int, start: int, stop: int) -> list[mx.array]:
        """Returns copies `(1, kv_heads, length, …)` of what a row holds from position `start` to `stop`."""
        return [array[row : row + 1, :, start:stop] * 1 for array in self._arrays]

    def restore(self, blocks: Sequence[list[mx.array]], length: int) -> None:
        """Fills an empty cache with the `length` positions of blocks that follow each other."""
        self.state = [mx.concatenate(parts, axis=2) for parts in zip(*blocks, strict=True)]
        self.offset = length
        self.reserve(row_capacity(length))

    def inside(self, arrays: Arrays, position: mx.array, mask: mx.array) -> StepCache:
        """Returns the cache that stands for one of this kind in a compiled step."""
        return StepCache(self, arrays, position, mask)

    def trim(self, length: int) -> int:
        """Removes the last `length` positions, or all of fewer. Returns how many were removed.

        Raises:
            ValueError: `length` is negative.
        """
        if length < 0:
            raise ValueError(f"a cache cannot be trimmed by {length} positions")
        length = min(length, self.offset)
        self.offset -= length
        return length

    def is_trimmable(self) -> bool:
        return True

    def can_trim(self, length: int) -> bool:
        """Returns whether the last `length` tokens of the text can be removed, and what is left be as before them."""
        return True

    @property
    def length(self) -> int:
        """Tokens of the text, those included whose positions were dropped."""
        return self.offset + self.dropped

    def make_room(self, length: int) -> int:
        """Drops positions until `length` more fit under the limit. Returns how many; there is no limit here."""
        return 0

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Causal | str | None:
        """Returns the mask of `length` new positions: each sees those before it, `window_size` with itself at most."""
        if window_size is None or self.offset + length <= window_size:
            return "causal" if length > 1 else None
        return Causal(self.offset + 1, window_size)


class QuantizedCache(KVCache):
    """One layer's keys and values in 8 or 4 bits, with a scale and a bias for each group (see `packed`).

    It holds three arrays, of keys and behind them values as heads: codes, scales and biases.
    """

    _parts = 3

    def __init__(self, bits: int, switch: int | None = None) -> None:
        super().__init__(switch)
        self.kv_bits = bits
        self.kind = f"keys and values in {bits} bits"

    def empty(self) -> QuantizedCache:
        return QuantizedCache(self.kv_bits, self.switch)

    def held(self, keys: mx.array, values: mx.array) -> Arrays:
        return packed.pack(mx.concatenate([keys, values], axis=1), self.kv_bits)

    def fetched(self, arrays: Arrays) -> tuple[Fetched, Fetched]:
        codes, scales, biases = (mx.split(array, 2, axis=1) for array in arrays)
        keys, values = (Packed(*half, self.kv_bits) for half in zip(codes, scales, biases, strict=True))
        return keys, values


class StreamingCache(KVCache):
    """One layer's keys and values of a text without end: its first positions, and the last ones (Xiao et al., 2023).

    Where it is full, an eighth goes at once behind the first `SINKS`, and what follows moves up: its keys are rotated
    back by as many positions. So positions count within the cache, none is one that the model was not trained on, and
    a step writes and looks as in a cache that grows.

    Args:
        limit: positions at most.
        rope: the layer's rotation, of texts of up to `limit` tokens.
    """

    SINKS = 4

    def __init__(self, limit: int, rope: Rope) -> None:
        super().__init__()
        self.limit: int = limit
        self.kind = f"the first {self.SINKS} and the last keys and values, {limit} at most"
        self._rope = rope

    def empty(self) -> StreamingCache:
        return StreamingCache(self.limit, self._rope)

    @property
    def text_length(self) -> int:
        """No text is longer than the limit to RoPE."""
        return 0

    @text_length.setter
    def text_length(self, length: int) -> None:
        pass

    def make_room(self, length: int) -> int:
        count = max(self.offset + length - self.limit, self.limit // 8)
        if self.offset + length <= self.limit:
            return 0
        assert length <= self.limit - self.SINKS
        kept = [array[:, :, self.SINKS + count : self.offset] for array in self._arrays]
        kept[0] = self._rope.moved(kept[0], -count)
        self.state = [
            mx.concatenate([array[:, :, : self.SINKS], rest], axis=2)
            for array, rest in zip(self._arrays, kept, strict=True)
        ]
        mx.eval(self.state)  # or what was dropped would stay in memory
        self.offset -= count
        self.dropped += count
        return count

    def trim(self, length: int) -> int:
        removed = super().trim(length)
        self.dropped = self.dropped if self.offset else 0
        return removed

    def is_trimmable(self) -> bool:
        return not self.dropped

    def can_trim(self, length: int) -> bool:
        return not self.dropped or length <= self.offset - self.SINKS


class StepCache:
    """One layer's keys and values inside a compiled step: the capacity is fixed, the positions an array.

    Args:
        kind: a cache whose arrays these are.
        arrays: `(slots, num_kv_heads, capacity, …)`, of which the first ones are used, a slot a text.
        position: where the step writes, and RoPE's offset: `(batch,)`, of a row a text, or `(texts, n)`, of n rows
            for each, whose positions follow each other.
        mask: boolean, `(batch, 1, length, seen)`: the positions written so far, with each row's and query's own. None
            sees more.
    """

    def __init__(self, kind: KVCache, arrays: Arrays, position: mx.array, mask: mx.array):
        self.state = list(arrays)
        self.offset = position.reshape(-1)
        self._places = position if position.ndim == 2 else position[:, None]
        self._kind = kind
        self._mask = mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Fetched, Fetched]:
        texts, each = self._places.shape
        slots, seen = self.state[0].shape[0], self._mask.shape[-1]
        for number, new in enumerate(self._kind.held(keys, values)):
            if each > 1:
                new = new.reshape(texts, each, *new.shape[1:]).swapaxes(1, 3).squeeze(1)
            if slots == 1:
                self.state[number] = mx.slice_update(self.state[number], new, self.offset[:1], axes=[2])
            elif slots == texts:  # one operation, where the assignment below is six
                at = mx.broadcast_to(self._places[:, None, :, None], new.shape)
                self.state[number] = mx.put_along_axis(self.state[number], at, new, axis=2)
            else:
                self.state[number][mx.arange(texts)[:, None], :, self._places] = new.swapaxes(1, 2)
        return self._kind.fetched([array[:texts, :, :seen] for array in self.state])

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Causal:
        """Returns the mask of a step's new positions."""
        return Causal(self.offset + 1, window_size)


class StateCache:
    """One layer's state in a network without keys and values (Mamba): of the same size for a text of any length.

    Only all of it can be removed. mlx-lm's networks read and write it by `[]`.
    """

    kind = "states"
    limit: int | None = None
    switch = writer = None
    text_length = 0

    def __init__(self, size: int = 2) -> None:
        self._arrays: list[mx.array | None] = [None] * size
        self.offset = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy goes on by itself."""
        return {**vars(self), "_arrays": [*self._arrays]}

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

    def can_trim(self, length: int) -> bool:
        return length == 0

    @property
    def length(self) -> int:
        return self.offset

    def make_room(self, length: int) -> int:
        return 0

    def suits(self, length: int) -> bool:
        return True

    def put(self, row: int, other: StateCache, copies: int = 1) -> None:
        """Makes `other`, of one text, a row of this batch, one that is there, or the next; or several."""
        parts = zip(self._arrays, other._arrays, strict=True)
        self.state = [
            theirs if mine is None else mx.concatenate([mine[:row], *[theirs] * copies, mine[row + copies :]])
            for mine, theirs in parts
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

    def inside(self, arrays: Arrays, position: mx.array, mask: mx.array) -> StateCache:
        """Returns the cache that stands for one of this kind in a compiled step."""
        cache = self.empty()
        cache.state = arrays
        return cache


class SegmentedRow:
    """Takes a cache's place in training on rows of several texts: keeps nothing, and its mask separates the texts."""

    offset = 0

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self.positions = segments.positions

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Segments | mx.array:
        """Returns the segments; where a window hides more, a boolean array `(batch, 1, length, length)`."""
        if window_size is None or length <= window_size:
            return self._segments
        return self._segments.seen(window_size)


def shared_length(cache: KVCache, held: Sequence[int], prompt: Sequence[int]) -> int:
    """Returns the number of ids of `prompt` that need not be read. Never all: the last one's logits are not kept.

    Of what can't be cut back that far, all that was read or none; and none where RoPE rotates a text of this length
    otherwise.

    Args:
        cache: any layer's, which holds the ids `held`.
    """
    if not cache.suits(len(prompt)):
        return 0
    most = min(len(held), len(prompt) - 1)
    same = next((i for i in range(most) if held[i] != prompt[i]), most)
    return same if cache.can_trim(len(held) - same) else 0


def place_step(lengths: Sequence[int]) -> tuple[mx.array, mx.array]:
    """Returns `position` and `mask` of the StepCaches of a step that writes behind `lengths` positions in each row."""
    position = mx.array(lengths)
    return position, mx.arange(_seen(max(lengths) + 1)) <= position[:, None, None, None]


def place_pass(lengths: Sequence[int], count: int, apart: bool) -> tuple[mx.array, mx.array]:
    """Returns `position` and `mask` of the StepCaches of a pass that writes `count` tokens behind each text.

    `apart` makes a row of each token, as if it had a step of its own; else they are the queries of one row, for one
    text.
    """
    if apart:
        position, mask = place_step([length + at for length in lengths for at in range(count)])
        return position.reshape(len(lengths), count), mask
    (length,) = lengths
    position = mx.arange(length, length + count)
    return mx.array([length]), (mx.arange(_seen(length + count)) <= position[:, None])[None, None]


def row_slots(rows: int) -> int:
    """Returns how many rows a batch's arrays have room for."""
    return 1 << max(0, rows - 1).bit_length()


def row_capacity(length: int) -> int:
    """Returns how many positions a batch's arrays get for texts of `length`."""
    return _rounded(length, KVCache.step)


def _seen(length: int) -> int:
    """Returns how many positions a step looks at that writes the last of `length`."""
    return _rounded(length, 64)


def _rounded(length: int, step: int) -> int:
    """Rounds up to one of few numbers, an eighth or `step` too many at most: for each a step is compiled."""
    while 8 * step < length:
        step *= 2
    return -(-length // step) * step


def make_prompt_cache(model: Any, kv_bits: int | None = None, max_kv_size: int | None = None) -> list[KVCache]:
    """Returns an empty cache for each layer of `model`; for a network that keeps a state, `StateCache`s.

    Args:
        kv_bits: 8 or 4 to quantize keys and values to; None keeps them in the type that is computed in.
        max_kv_size: positions at most: a longer text's first ones and its last ones stay (`StreamingCache`).

    Raises:
        InputError: the model's heads cannot be quantized so, or it has none; its positions can't be dropped.
    """
    config = model.config
    check_caches(config, kv_bits, max_kv_size)
    if max_kv_size is not None:
        return [StreamingCache(max_kv_size, rope) for rope in model.layer_ropes()]
    if kv_bits is not None:
        return [QuantizedCache(kv_bits, config.rope_switch) for _ in range(config.num_layers)]
    make: Callable[[], Any] = partial(KVCache, config.rope_switch) if config.positions else StateCache
    return [make() for _ in range(config.num_layers)]


def check_caches(config: Any, bits: int | None, max_kv_size: int | None = None, saved: bool = False) -> None:
    """Raises InputError where a model with this config cannot have the caches that `make_prompt_cache` would make.

    Args:
        saved: they come from a file, or go into one.
    """
    if max_kv_size is not None:
        if saved:
            raise InputError("a saved cache holds a whole text, and --max-kv-size keeps parts of one: choose one")
        if bits is not None:
            raise InputError("--max-kv-size drops positions and moves others, which cannot be in --kv-bits: choose one")
        if not config.positions:
            raise InputError(f"--max-kv-size: {config.family.name} keeps a state, of the same size for any text")
        most = min(config.max_context_length, config.rope_switch or config.max_context_length)
        if not _LEAST <= max_kv_size <= most:
            raise InputError(f"--max-kv-size {max_kv_size}: {_LEAST} to {most} are possible for this model")
    if bits is None:
        return
    if bits not in packed.BITS:
        raise InputError(f"--kv-bits {bits}: {' or '.join(map(str, packed.BITS))} are possible")
    if not config.positions:
        raise InputError(f"--kv-bits: {config.family.name} keeps a state, which is not quantized, and no keys")
    packed.group_size(config.head_dim)


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
