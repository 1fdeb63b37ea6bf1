"""Attention and its masks: by one call of `attention.c`, by MLX's own, or by blocks of queries.

Which one is taken depends on the device, on how many queries and positions there are, and on the mask.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx

from elm_mlx import blas, device
from elm_mlx.model import packed
from elm_mlx.model.ops import fast_exp, mlx_is_best, tanh
from elm_mlx.model.packed import Packed


@dataclass(frozen=True)
class Segments:
    """The mask of several texts in a row: causal, and a position sees those of its own text alone.

    Attributes:
        numbers: `(batch, length)` integers, the text of each position; -1 where all texts of a row begin, if that is
            at its start.
        reach: a length that no text exceeds: positions farther back are skipped. None for all of a row, as where texts
            have a beginning in common.
        positions: `(batch, length)` integers, of each position in its text, where texts have a beginning in common,
            which all of them see. None where each is by itself.
    """

    numbers: mx.array
    reach: int | None = None
    positions: mx.array | None = None

    def seen(self, window: int | None = None) -> mx.array:
        """Returns the mask as a boolean `(batch, 1, length, length)`; of a sliding window, if there is one."""
        order = mx.arange(self.numbers.shape[1])
        seen = ~self.apart(slice(None), slice(None)) & (order <= order[:, None])
        if window is None:
            return seen
        at = order[None] if self.positions is None else self.positions
        return seen & (at[:, None, :, None] - at[:, None, None, :] < window)

    def apart(self, queries: slice, keys: slice) -> mx.array:
        """Returns which positions are of different texts, as a boolean `(batch, 1, queries, keys)`."""
        of_queries, of_keys = self.numbers[:, None, queries, None], self.numbers[:, None, None, keys]
        apart = of_queries != of_keys
        return apart if self.positions is None else apart & (of_keys >= 0)


@dataclass(frozen=True)
class Causal:
    """The causal mask of rows that end at different positions, or of a sliding window.

    Attributes:
        seen: how many positions a row's first query sees, its own included; each that follows sees one more. A number,
            or an array `(batch,)`.
        window: how many of them at most, the last ones; None for all.
    """

    seen: int | mx.array
    window: int | None = None

    def array(self, length: int, positions: int) -> mx.array:
        """Returns the mask as a boolean `(1 or batch, 1, length, positions)`."""
        seen = self.seen if isinstance(self.seen, mx.array) else mx.array(self.seen)
        ends = seen.reshape(-1, 1, 1, 1) + mx.arange(length)[:, None]
        at = mx.arange(positions)
        return at < ends if self.window is None else (at < ends) & (at >= ends - self.window)

    def for_mlx(self, length: int, positions: int) -> mx.array | str | None:
        """Returns the mask as MLX's own attention takes it: by its name where it has one."""
        plain = isinstance(self.seen, int) and self.seen == positions - length + 1
        if not plain or (self.window is not None and self.window < positions):
            return self.array(length, positions)
        return "causal" if length > 1 else None


Mask: TypeAlias = mx.array | Segments | Causal | str | None

_BLOCK_SCORES = 1 << 18  # scores computed at once: they should stay in a core's cache
# Of attention.c: the product's alpha, numbers of its note, and those of a query.
_ATTENTION = struct.unpack("f", struct.pack("I", 0x7FC0A77E))[0]
_NOTE, _STATISTICS = 16, 2
_DEPTH = 4  # of the product


def attention(
    queries: mx.array,
    keys: mx.array | Packed,
    values: mx.array | Packed,
    scale: float,
    mask: Mask,
    cap: float | None = None,
) -> mx.array:
    """Softmax attention of `(batch, heads, length, head_dim)` on `(batch, kv_heads, positions, head_dim)`.

    `mask` is None, "causal" (the last query sees all positions), `Causal`, `Segments` (as many queries as positions),
    or boolean `(…, length, positions)`. Where keys and values have fewer rows, as many rows of a query each are of the
    same text, at positions that follow each other. With a `cap` a score becomes cap * tanh(score / cap).
    """
    batch, heads, length, head_dim = queries.shape
    kv_heads, positions = keys.shape[1], keys.shape[2]
    plain = isinstance(mask, str) or (mask is None and length == 1)
    causal = Causal(positions - length + 1) if plain else mask
    if isinstance(causal, Causal) and keys.shape[0] < batch:
        assert isinstance(causal.seen, mx.array)
        each = batch // keys.shape[0]
        first = Causal(causal.seen[::each], causal.window)
        together = queries.reshape(-1, each, heads, head_dim).swapaxes(1, 2)
        if _fits_one_call(together, keys):  # keys and values are read once
            out = _attend_in_one_call(together, keys, values, scale, first, cap)
            return out.swapaxes(1, 2).reshape(queries.shape)
        keys, values = (mx.repeat(packed.whole(x), each, axis=0) for x in (keys, values))
    if isinstance(causal, Causal) and _fits_one_call(queries, keys):
        return _attend_in_one_call(queries, keys, values, scale, causal, cap)
    if isinstance(keys, Packed) or isinstance(values, Packed):
        if device.on_gpu() and length <= packed.FEW and cap is None:
            hidden = causal.array(length, positions) if isinstance(causal, Causal) else causal
            return packed.attention(queries, keys, values, scale, hidden)
        return attention(queries, packed.whole(keys), packed.whole(values), scale, causal, cap)
    if cap is not None:
        return _capped_attention(queries, keys, values, scale, causal, cap)
    little = mlx_is_best(queries, batch * heads * length * positions)
    if isinstance(mask, Causal):
        mask = mask.for_mlx(length, positions)
    segments = mask if isinstance(mask, Segments) else None
    if segments and (length == 1 or little):
        mask = segments.seen()
    if length == 1 and not device.on_gpu():  # the queries that share a head are rows of one product
        grouped = queries.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        out = mx.fast.scaled_dot_product_attention(grouped, keys, values, scale=scale, mask=mask)
        return out.reshape(batch, heads, 1, head_dim)
    if isinstance(mask, mx.array) or mask is None or little:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    return _causal_attention(queries, keys, values, scale, segments)


def _attend_in_one_call(
    queries: mx.array,
    keys: mx.array | Packed,
    values: mx.array | Packed,
    scale: float,
    causal: Causal,
    cap: float | None,
) -> mx.array:
    """Attention by `attention.c`, with derivatives where keys are no codes."""
    if isinstance(keys, Packed) or isinstance(values, Packed):
        return _call(queries, keys, values, scale, causal, cap)[0]

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return _call(queries, keys, values, scale, causal, cap)

    @attend.vjp
    def derive(primals: tuple[mx.array, ...], cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        length, positions = queries.shape[2], keys.shape[2]
        mask = causal.for_mlx(length, positions)
        plain: Callable[..., mx.array]
        if cap is not None:
            plain = functools.partial(_capped_attention, scale=scale, mask=causal, cap=cap)
            return tuple(mx.vjp(plain, list(primals), [cotangents[0]])[1])
        if isinstance(mask, str):
            out, statistics = outputs
            tops, sums = mx.split(statistics, 2, axis=-1)
            log_sums = (tops + mx.log(sums)).reshape(*out.shape[:3], 1)
            return _derive(primals, cotangents[0], (out, log_sums), scale, None)
        plain = functools.partial(mx.fast.scaled_dot_product_attention, scale=scale, mask=mask)
        return tuple(mx.vjp(plain, list(primals), [cotangents[0]])[1])

    return attend(queries, keys, values)[0]


def _capped_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask, cap: float
) -> mx.array:
    """Attention by MLX's operations, which the backward pass computes again: kept, scores would fill the memory."""
    batch, heads, length, head_dim = queries.shape
    kv_heads, positions = keys.shape[1:3]
    if mask == "causal":
        mask = Causal(positions - length + 1)
    seen = mask.array(length, positions) if isinstance(mask, Causal) else mask
    seen = seen.seen() if isinstance(seen, Segments) else seen

    @mx.checkpoint
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        grouped = queries.reshape(batch, kv_heads, -1, head_dim)
        scores = cap * tanh((grouped * (scale / cap)) @ keys.swapaxes(2, 3))
        if isinstance(seen, mx.array):
            each = scores.reshape(batch, heads, length, positions)
            scores = mx.where(seen, each, -1e30).reshape(scores.shape)
        return (mx.softmax(scores, axis=-1, precise=True) @ values).reshape(queries.shape)

    return attend(queries, keys, values)


def _call(
    queries: mx.array,
    keys: mx.array | Packed,
    values: mx.array | Packed,
    scale: float,
    causal: Causal,
    cap: float | None = None,
) -> tuple[mx.array, mx.array]:
    """Returns attention by a product that stands for it, and `(batch, kv_heads, 2 * queries)` of each head's queries.

    These are their largest scores, and then the sums of their weights relative to those.

    MLX calls `cblas_sgemm` once for each key and value head. The factors are the first of the head's keys and values,
    or of their codes, which are handed over where they stand: from there the C finds the others. They stand one after
    the other in what a reshape returns, a view of the cache, and of anything that lies otherwise a copy. Scales and
    biases of codes, which are little beside them, are copied to the queries.
    """
    batch, heads, length, head_dim = queries.shape
    kv_heads = keys.shape[1]
    group, side = heads // kv_heads * length, _side(queries, keys)
    numbers = group * head_dim
    seen = mx.array(causal.seen).reshape(-1, 1, 1)
    note = mx.broadcast_to(_note(queries, keys, causal.window, cap) + _SEEN * seen, (batch, kv_heads, _NOTE))
    beside = [x.reshape(batch, kv_heads, -1) for held in (keys, values) for x in packed.scales_and_biases(held)]
    taken = numbers + sum(x.shape[-1] for x in beside) + _NOTE
    room = mx.zeros((batch, kv_heads, side * side - taken))
    square = mx.concatenate([queries.reshape(batch, kv_heads, numbers), room, *beside, note], axis=-1)
    first = (_handed_over(x).reshape(batch, kv_heads, -1)[..., : side * _DEPTH] for x in (keys, values))
    out = mx.addmm(
        square.reshape(batch, kv_heads, side, side),
        next(first).reshape(batch, kv_heads, side, _DEPTH),
        next(first).reshape(batch, kv_heads, _DEPTH, side),
        alpha=_ATTENTION,
        beta=scale,
    ).reshape(batch, kv_heads, side * side)
    return out[..., :numbers].reshape(queries.shape), out[..., numbers : numbers + _STATISTICS * group]


def _handed_over(x: mx.array | Packed) -> mx.array:
    return x.codes.view(mx.float32) if isinstance(x, Packed) else x


def _side(queries: mx.array, keys: mx.array | Packed) -> int:
    """Returns how long the sides of a product are whose result has room for what `attention.c` is to know."""
    _, heads, length, head_dim = queries.shape
    beside = 2 * sum(math.prod(x.shape[2:]) for x in packed.scales_and_biases(keys))
    return _root(heads // keys.shape[1] * length * (head_dim + _STATISTICS) + _NOTE + beside)


def _root(numbers: int) -> int:
    return math.isqrt(numbers - 1) + 1


def fits_one_call(queries: int, positions: int, head_dim: int) -> bool:
    """Returns whether keys in float32 are enough for `attention.c` to be called, for so many queries of each head."""
    return positions * head_dim >= _DEPTH * _root(queries * (head_dim + _STATISTICS) + _NOTE)


def _fits_one_call(queries: mx.array, keys: mx.array | Packed) -> bool:
    """Returns whether `attention.c` is there and takes these."""
    return (
        queries.dtype == keys.dtype == mx.float32
        and math.prod(_handed_over(keys).shape[2:]) >= _DEPTH * _side(queries, keys)
        and not device.on_gpu()
        and blas.attends()
        and _calls_arrive()
    )


@functools.cache
def _calls_arrive() -> bool:
    """Returns whether this MLX hands over views as `_call` expects, and the C computes the right thing from them."""
    draw = functools.partial(mx.random.normal, key=mx.random.key(1))
    queries, keys, values = draw((2, 4, 3, 16)), draw((3, 2, 40, 16))[:2, :, :21], draw((2, 21, 2, 16)).swapaxes(1, 2)
    found, _ = _call(queries, keys, values, 0.25, Causal(19))
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.25, mask="causal")
    return bool(mx.allclose(found, expected, atol=1e-5).item())


_SEEN = mx.array([0, 0, 0, 1, *[0] * (_NOTE - 4)], mx.float32)  # where the note says how many positions are seen


def _note(queries: mx.array, keys: mx.array | Packed, window: int | None, cap: float | None) -> mx.array:
    """Returns what `attention.c` is told but for the positions seen."""
    _, heads, length, head_dim = queries.shape
    held = (32, 0, 0) if isinstance(keys, mx.array) else (keys.bits, keys.group, keys.shape[2])
    rows, least = heads // keys.shape[1] * length, 2**24 if window is None else window
    return _note_of(head_dim, rows, length, 0, least, *held, cap or 0)


@functools.lru_cache(maxsize=256)
def _note_of(*numbers: float) -> mx.array:
    """Layers share it, and a step has it once."""
    return mx.array([*numbers, *[0] * (_NOTE - len(numbers))], mx.float32)


def _causal_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, segments: Segments | None
) -> mx.array:
    """Computes blocks of queries; the backward pass computes each block's weights again.

    Kept, they would be most of the memory of a training step.
    """

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        parts = []
        for start, stop, seen in _blocks(queries, keys, segments):
            scores = _block_scores(queries[:, :, start:stop] * scale, keys, seen, segments)
            parts.append(_attend_block(scores, values[:, :, seen]))
        if len(parts) == 1:
            return parts[0]
        return tuple(mx.concatenate(part, axis=2) for part in zip(*parts, strict=True))

    @attend.vjp
    def derive(primals: tuple[mx.array, ...], cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        return _derive(primals, cotangents[0], outputs, scale, segments)

    return attend(queries, keys, values)[0]


def _derive(
    primals: tuple[mx.array, ...],
    cotangent: mx.array,
    outputs: tuple[mx.array, mx.array],
    scale: float,
    segments: Segments | None,
) -> tuple[mx.array, ...]:
    """Returns the cotangents of causal attention's queries, keys and values, block by block."""
    queries, keys, values = primals
    out, log_sums = outputs
    along = (cotangent * out).sum(axis=-1, keepdims=True)
    query_grads: list[mx.array] = []
    key_grad, value_grad = mx.zeros_like(keys), mx.zeros_like(values)
    for start, stop, seen in _blocks(queries, keys, segments):
        part = queries[:, :, start:stop] * scale
        if query_grads:  # one block after the other, or all blocks' scores would be in memory together
            part = mx.depends([part], [query_grads[-1], key_grad, value_grad])[0]
        scores = _block_scores(part, keys, seen, segments)
        weights = fast_exp(mx.maximum(scores - log_sums[:, :, start:stop], -87.0))
        query_part, key_part, value_part = _derive_block(
            part, keys[:, :, seen], values[:, :, seen], weights, cotangent[:, :, start:stop], along[:, :, start:stop]
        )
        query_grads.append(query_part * scale)
        key_grad[:, :, seen] += key_part
        value_grad[:, :, seen] += value_part
    return mx.concatenate(query_grads, axis=2), key_grad, value_grad


def _blocks(queries: mx.array, keys: mx.array, segments: Segments | None) -> list[tuple[int, int, slice]]:
    """Returns runs of queries: start, stop, and the positions they see."""
    batch, heads, length, _ = queries.shape
    return _runs(batch * heads, length, keys.shape[2], segments.reach if segments else None)


def _runs(heads: int, length: int, positions: int, reach: int | None) -> list[tuple[int, int, slice]]:
    """Returns runs of the last `length` queries: start, stop, and the positions they see."""
    if reach is None:
        rows, back = _BLOCK_SCORES // (heads * positions), positions
    else:  # a block of `rows` queries sees `rows + reach` positions
        rows, back = (math.isqrt(reach * reach + 4 * _BLOCK_SCORES // heads) - reach) // 2, reach - 1
    rows, before = max(32, rows), positions - length
    runs = ((start, min(start + rows, length)) for start in range(0, length, rows))
    return [(start, stop, slice(max(0, before + start - back), before + stop)) for start, stop in runs]


def _block_scores(queries: mx.array, keys: mx.array, seen: slice, segments: Segments | None) -> mx.array:
    """Scores of a run of queries, the last of which stands at the end of the positions `seen`.

    Others are not computed at all.
    """
    batch, heads, rows, head_dim = queries.shape
    kv_heads, count = keys.shape[1], seen.stop - seen.start
    grouped = queries.reshape(batch, kv_heads, -1, head_dim)
    scores = (grouped @ keys[:, :, seen].swapaxes(2, 3)).reshape(batch, heads, rows, count)
    hidden = mx.arange(count) > mx.arange(count - rows, count)[:, None]
    if segments is not None:
        hidden = hidden | segments.apart(slice(seen.stop - rows, seen.stop), seen)
    return mx.where(hidden, -1e30, scores)


def _attend_block(scores: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """Attention by `scores`, and the logarithm of what each row's exponentials sum to."""
    batch, heads, rows, seen = scores.shape  # of `values` as many positions
    kv_heads, head_dim = values.shape[1], values.shape[3]
    largest = scores.max(axis=-1, keepdims=True)
    weights = fast_exp(mx.maximum(scores - largest, -87.0))
    sums = weights.sum(axis=-1, keepdims=True)
    out = (weights.reshape(batch, kv_heads, -1, seen) @ values).reshape(batch, heads, rows, head_dim)
    return out / sums, largest + mx.log(sums)


def _derive_block(
    queries: mx.array, keys: mx.array, values: mx.array, weights: mx.array, cotangent: mx.array, along: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Cotangents of scaled queries, keys and values, the latter two of the positions that the block sees.

    `along` is the cotangent's product with the output, row by row: what the softmax takes off each score's.
    """
    batch, kv_heads = keys.shape[:2]

    def grouped(x: mx.array) -> mx.array:
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    value_grad = grouped(weights).swapaxes(2, 3) @ grouped(cotangent)
    weight_grad = (grouped(cotangent) @ values.swapaxes(2, 3)).reshape(weights.shape)
    score_grad = grouped(weights * (weight_grad - along))
    query_grad = (score_grad @ keys).reshape(queries.shape)
    return query_grad, score_grad.swapaxes(2, 3) @ grouped(queries), value_grad
