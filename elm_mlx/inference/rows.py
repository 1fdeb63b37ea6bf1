"""Prefill of a prompt, and rows: the texts of a continuous batch, of which one compiled step computes a token each.

Every text begins at position 0 of a row of its own and has its own position, so that it may come and go between two
steps, and no other row moves for it but the last.

On a CPU in float32, with the BLAS that `elm_mlx.blas` compiles, a row's logits have the same bits whatever stands in up
to fifteen others, and however far they are: products of up to 16 rows are summed in an order that does not depend on
the number of rows, and attention in one that depends on no other query and no position that is not seen. From 17 rows
on the products are summed in another order, and equal to rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from elm_mlx import device
from elm_mlx.device import compile_hindrance, on_gpu, trim_cache
from elm_mlx.errors import InputError
from elm_mlx.model.cache import Arrays, KVCache, make_prompt_cache, place_pass, place_step, row_capacity
from elm_mlx.model.compiled import Compiled
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.model.network import Model
from elm_mlx.model.sublayers import LayersInC
from elm_mlx.model.whole_step import whole_piece, whole_step

# Prompt tokens in one pass: bounds memory. A CPU is as fast by 128 as by 512, and pieces end where kept blocks do.
PREFILL_STEP = 512 if on_gpu() else 128
_PREDICTED = 4  # times as many are predicted together: small models, whose operations take as long for fewer
TOGETHER = 16  # rows of a step, at most, whose bits are those of each alone
_TRIM_EVERY = 256  # steps: caches grow on the way, and what they leave may be kept


def prefill(
    model: Model, ids: Sequence[int], caches: list[KVCache], step: int = PREFILL_STEP, text_length: int = 0
) -> mx.array:
    """Reads `ids` into `caches`, `step` at a time. Returns the logits `(1, vocab)` after the last, not yet computed.

    `text_length` is that of the whole text, where more than `ids` is known to come: LongRoPE depends on it.

    Raises:
        InputError: the model rotates a text of this length in another way than the one that `caches` hold.
    """
    text_length = max(text_length, caches[0].offset + len(ids))
    if not caches[0].suits(text_length):
        raise _turned(caches[0])
    for cache in caches:
        cache.text_length = text_length
    rows = mx.array(ids)[None]
    step = step if caches[0].limit is None else min(step, caches[0].limit // 2)
    while rows.shape[1] > step:
        _make_room(caches, step)
        _, written = _read(model, rows[:, :step], caches, wanted=False)
        mx.eval(written)
        mx.clear_cache()  # a GPU would keep each chunk's buffers for the next
        rows = rows[:, step:]
    _make_room(caches, rows.shape[1])
    hidden, _ = _read(model, rows, caches, wanted=True)
    return model.head(hidden)


def predicted_prefill(
    model: Model,
    kvp: KVPrediction,
    ids: Sequence[int],
    caches: list[KVCache],
    own: list[KVCache] | None = None,
    step: int = PREFILL_STEP,
) -> mx.array:
    """Fills `caches` with what `kvp` predicts of all `ids` but the last, which the model reads itself.

    Returns the logits `(1, vocab)` after it, not yet computed: an estimate of those that `prefill` returns, sooner.

    Args:
        own: the auxiliary model's caches, which hold the text that `caches` do; None where that is none.
    """
    own, last = make_prompt_cache(kvp.auxiliary) if own is None else own, len(ids) - 1
    # The rest of a step apart: of more than `TOGETHER` rows any number gives the same bits, in a server's pieces too.
    starts = [*range(0, last // step * step, _PREDICTED * step), last // step * step]
    for start, stop in zip(starts, [*starts[1:], last], strict=True):
        if start < stop:
            kvp.read(mx.array(ids[start:stop])[None], own, caches)
        if stop < last:
            mx.eval([cache.state for cache in (*own, *caches)])
            mx.clear_cache()
    return prefill(model, ids[-1:], caches, step)


def _read(model: Model, ids: mx.array, caches: list[KVCache], wanted: bool) -> tuple[mx.array, list[Any]]:
    """Reads `ids` `(1, n)` into `caches`.

    Returns the hidden states `(1, model_dim)` of the last one, if it is wanted, and what is to be computed for the
    caches to be whole; neither is computed yet.
    """
    count = ids.shape[1]
    in_c = model.in_c(count)
    whole = None if in_c is None else whole_piece(in_c, caches, count)
    if in_c is None or whole is None:
        return model.transformer(ids, caches, last=1)[0], [cache.state for cache in caches]
    hidden = whole.read(model.embed(ids[0]), caches[0].offset, caches[0].text_length, int(wanted))
    for cache in caches:
        cache.offset += count
    return in_c.norm(hidden[-1:]), [hidden]


def _make_room(caches: Sequence[KVCache], length: int) -> int:
    """Drops positions of caches with a limit, until `length` more fit. Returns how many."""
    (dropped,) = {cache.make_room(length) for cache in caches}
    return dropped


def _turned(cache: KVCache) -> InputError:
    return InputError(
        f"the text grows past {cache.switch} tokens, where this model's RoPE changes (longrope), and what is cached "
        "cannot be read again: give the whole text, without a prompt_cache"
    )


class Rows:
    """The caches of several texts, and the step that appends a token to each.

    The arrays are of fixed capacity inside the step, and it is traced anew for another number of rows and when they
    grow; both take few values.

    Attributes:
        caches: a cache for each layer, whose arrays have a row for each text; always whole between two steps.
        lengths: the number of tokens in each row.
        traced: the last step was the first one of its shapes, which takes longer.
    """

    def __init__(self, model: Model) -> None:
        self.caches: list[KVCache] = []
        self.lengths: list[int] = []
        self._model = model
        self._texts: list[list[Any] | None] = []  # the ids in each row: numbers, or an array and a place in it
        self._steps = 0
        self._in_c: LayersInC | None = None
        self._compiled: Any = None
        self._shapes: set[tuple[int, ...]] = set()
        self.traced = False

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def join(self, caches: list[KVCache], ids: Sequence[int] | None) -> None:
        """Adds a row, behind the others.

        Args:
            caches: of one text, which is in them. They belong to the rows from now on.
            ids: that text; None where it is not known.
        """
        length = caches[0].offset
        if self.lengths:
            for cache, own in zip(self.caches, caches, strict=True):
                cache.put(len(self), own)
                mx.eval(cache.state)
                own.trim(own.offset)
                own.state = [None] * len(own.state)  # layer by layer, so that nothing is there twice
        else:
            self.caches = caches
        self._texts.append(None if ids is None else list(ids))
        self.resize([*self.lengths, length])

    def begin(self, row: int, caches: Sequence[KVCache], ids: Sequence[int], copies: int = 1) -> None:
        """Makes a row, or the next one, or several, the text `ids`, which is in `caches`; these stay as they are."""
        length = caches[0].offset
        self.caches = self.caches or [cache.single(0, length) for cache in caches]
        for cache, own in zip(self.caches, caches, strict=True):
            cache.put(row, own, copies)
        self._texts[row : row + copies] = [list(ids) for _ in range(copies)]
        self.resize([*self.lengths[:row], *[length] * copies, *self.lengths[row + copies :]])

    def rewind(self, row: int, length: int) -> bool:
        """Makes a row end after its first `length` tokens, in no time. Returns False where it has to `begin` again."""
        cache = self.caches[0]
        if not cache.is_trimmable() or (cache.switch is not None and self.lengths[row] > cache.switch):
            return False
        self.resize([*self.lengths[:row], length, *self.lengths[row + 1 :]])
        text = self._texts[row]
        if text is not None:
            del text[length:]
        return True

    def leave(self, row: int) -> None:
        """Removes a row. The last one takes its place, and room that only this one needed goes."""
        lengths, self._texts[row] = [*self.lengths], self._texts[-1]
        lengths[row] = lengths[-1]
        lengths.pop()
        self._texts.pop()
        for cache in self.caches if lengths else ():
            cache.drop(row, len(self))
            if cache.is_trimmable():
                cache.shorten(max(lengths) + 1)
            mx.eval(cache.state)
        if not lengths:
            self.caches = []
        self.resize(lengths)

    def copy(self, row: int) -> list[KVCache]:
        """Returns caches of one text, that of a row."""
        return [cache.single(row, self.lengths[row]) for cache in self.caches]

    def step(self, tokens: mx.array) -> mx.array:
        """Appends tokens `(rows,)` to the texts. Returns the logits `(rows, vocab_size)` after them, not yet computed.

        Raises:
            InputError: RoPE rotates the longer text in another way, and the text is not known.
        """
        switch = self.caches[0].switch
        if switch is not None:
            self._read_again(switch, tokens)
        dropped = _make_room(self.caches, 1)
        self.lengths = [length - dropped for length in self.lengths]
        logits = self._compute(tokens[:, None], 1, apart=True)
        self.resize([length + 1 for length in self.lengths])
        return logits

    def look_ahead(self, tokens: mx.array) -> mx.array:
        """Computes the logits `(texts * n, vocab_size)` after each of tokens `(texts, n)` that may follow the texts.

        These are longer by none of them until `resize` says so. On a CPU each is a row of the step, so that its logits
        have the bits of a step of its own, as far as rows' have. A GPU reads keys once for queries of one row, and
        takes one text.

        Args:
            tokens: of each text `together` at most.

        Raises:
            InputError: as of `step`.
        """
        switch, (texts, count), flat = self.caches[0].switch, tokens.shape, tokens.reshape(-1)
        if switch is not None:
            self._read_again(switch, flat)
            for row, (text, length) in enumerate(zip(self._texts, self.lengths, strict=True)):
                if length < switch and text is not None:
                    text[length:] = [(flat, row * count + place) for place in range(count)]
        if texts == 1:
            for cache in self.caches:
                cache.narrow()
        apart = not device.on_gpu()
        return self._compute(flat[:, None] if apart else tokens, count, apart)

    def resize(self, lengths: Sequence[int]) -> None:
        """Makes each text end with so many of its tokens and of those that `look_ahead` took."""
        self.lengths = list(lengths)
        for cache in self.caches:
            cache.offset = max(lengths)  # there are none without texts

    def together(self) -> int:
        """Returns how many tokens of each text a pass may take.

        It ends where RoPE changes for all of a text, and where a cache is full, for a step there begins otherwise.
        """
        cache = self.caches[0]
        if cache.limit is not None:
            return max(1, cache.limit - max(self.lengths))
        if cache.switch is None:
            return sys.maxsize
        return min((cache.switch - length for length in self.lengths if length < cache.switch), default=sys.maxsize)

    def _compute(self, ids: mx.array, count: int, apart: bool) -> mx.array:
        """Runs the step on `ids` `(rows, length)`, `count` behind each text, and each a row of its own if `apart`.

        Returns the logits of each. No cache counts what was written.
        """
        end = max(self.lengths) + count
        for cache in self.caches:
            if end > cache.capacity:
                cache.reserve(row_capacity(end))
        if self._steps == 0:
            self._in_c = self._model.in_c(1)
        self._steps += 1
        if self._steps % _TRIM_EVERY == 0:
            trim_cache()
        if self._in_c is not None and ids.shape[1] == 1:
            before = self.caches[0].writer
            whole = whole_step(self._in_c, self.caches, len(ids), max(self.lengths))
            self.traced = whole is not before
            if whole is not None:
                places = mx.array([[length + at for at in range(count)] for length in self.lengths])
                return self._model.head(whole(self._model.embed(ids[:, 0]), places))
        position, mask = place_step(self.lengths) if count == 1 else place_pass(self.lengths, count, apart)
        arrays: list[Any] = [cache.state for cache in self.caches]
        shapes = (*ids.shape, *position.shape, mask.shape[-1], self.caches[0].capacity)
        self.traced = shapes not in self._shapes
        self._shapes.add(shapes)
        if self._compiled is None:
            step = partial(_step, self._model, [cache.empty() for cache in self.caches])
            self._compiled = Compiled(step) if compile_hindrance() is None else step
        logits, arrays = self._compiled(ids, position, mask, arrays)
        for cache, state in zip(self.caches, arrays, strict=True):
            cache.state = state
        return logits  # `arrays` is gone with its last reference to what went in, so the step writes in place

    def _read_again(self, switch: int, tokens: mx.array) -> None:
        """Reads again the rows that the next token makes longer than `switch`, where RoPE changes for the whole text.

        As in transformers for Phi-3. It takes a prefill, once a text.
        """
        for row, (text, length) in enumerate(zip(self._texts, self.lengths, strict=True)):
            if length == switch and text is None:
                if not self.caches[0].suits(length + 1):
                    raise _turned(self.caches[0])
            elif length == switch and text is not None:
                ids = [part if isinstance(part, int) else int(part[0][part[1]].item()) for part in text[:length]]
                again = [cache.empty() for cache in self.caches]
                prefill(self._model, ids, again, text_length=length + 1)
                for cache, own in zip(self.caches, again, strict=True):
                    cache.put(row, own)
                    mx.eval(cache.state)
            if length < switch and text is not None:
                text[length:] = [(tokens, row)]


def _step(
    model: Model,
    kinds: Sequence[KVCache],
    ids: mx.array,
    position: mx.array,
    mask: mx.array,
    arrays: Sequence[Arrays],
) -> tuple[mx.array, list[Arrays]]:
    """Computes of `ids` `(rows, length)` the logits `(rows * length, vocab_size)`, and the caches' arrays with them."""
    caches = [kind.inside(own, position, mask) for kind, own in zip(kinds, arrays, strict=True)]
    logits = model(ids, cache=caches)
    return logits.reshape(ids.size, -1), [cache.state for cache in caches]
