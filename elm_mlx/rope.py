"""Rotary position embeddings, on pairs half a head apart (not interleaved).

Knows positions and nothing of the network around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from elm_mlx import device

Rotate = Callable[[mx.array], mx.array]
Plain = Callable[[mx.array, int | mx.array], mx.array]


class Rope:
    """Made once for a model; called once a forward pass, for a function that every layer's queries and keys share.

    Args:
        frequencies: `(head_dim / 2,)`, radians a position; or the base that they are powers of.
        plain: what rotates where the forms here are not the faster ones; None for `mx.fast.rope` of that base.
        scale: what else the rotated is multiplied by.
    """

    def __init__(
        self, head_dim: int, frequencies: mx.array | float, plain: Plain | None = None, scale: float = 1.0
    ) -> None:
        self.head_dim = head_dim
        self.scale = scale
        half = head_dim // 2
        if isinstance(frequencies, mx.array):
            assert plain is not None
        else:
            plain = plain or _by_mlx(head_dim, frequencies)
            frequencies = mx.exp(mx.arange(half, dtype=mx.float32) * (-math.log(frequencies) / half))
        self._plain = plain
        self._frequencies = mx.concatenate([frequencies, frequencies])
        self._along = mx.eye(head_dim)
        self._across = mx.eye(head_dim, k=half) - mx.eye(head_dim, k=-half)
        mx.eval(self._frequencies, self._along, self._across)  # or each trace would compute them

    def __call__(self, length: int, offset: int | mx.array) -> Rotate:
        """A function that rotates `(batch, heads, length, head_dim)` for positions from `offset` on.

        `offset` is a whole number, an array `(1,)`, or one `(batch,)` with a position for each row.
        """
        one_position = isinstance(offset, int) or offset.size == 1
        if length == 1 and one_position and not device.on_gpu():
            matrix = self._matrix(offset)
            return lambda x: x @ matrix.astype(x.dtype)

        def fast(x: mx.array) -> mx.array:
            return self._plain(x, offset)

        if not one_position or device.on_gpu():
            return fast
        turn = self._turn(length, offset)
        return lambda x: turn(x) if x.dtype == mx.float32 else fast(x)

    def _turn(self, length: int, offset: int | mx.array) -> Rotate:
        """The rotation of float32 by several positions on a CPU, sines and cosines taken once.

        Where halves are exchanged by a product, which is exact, nothing has to be cut and joined. The derivative is
        the rotation back.
        """
        angles = (mx.arange(length) + offset)[:, None] * self._frequencies
        cosines, sines = self._scaled(mx.cos(angles)), self._scaled(mx.sin(angles))

        @mx.custom_function
        def turn(x: mx.array) -> mx.array:
            return x * cosines + (x @ self._across) * sines

        @turn.vjp
        def turn_back(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
            return cotangent * cosines - (cotangent @ self._across) * sines

        return turn

    def _matrix(self, offset: int | mx.array) -> mx.array:
        """The rotation by one position as a `(head_dim, head_dim)` matrix, to be multiplied from the right.

        On a CPU `mx.fast.rope` is twenty-odd small primitives; a product with this is one, and the sines
        are taken once a token instead of twice a layer.
        """
        angles = self._frequencies * offset
        return self._scaled(self._along * mx.cos(angles) + self._across * mx.sin(angles))

    def _scaled(self, x: mx.array) -> mx.array:
        return x if self.scale == 1 else x * self.scale


def _by_mlx(head_dim: int, base: float) -> Plain:
    def rotate(x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(x, head_dim, traditional=False, base=base, scale=1.0, offset=offset)

    return rotate
