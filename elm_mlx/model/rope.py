"""Rotary position embeddings, on pairs half of the rotated values apart (not interleaved).

Knows positions and nothing of the network around them.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from elm_mlx import device
from elm_mlx.model.rope_config import RopeConfig

Rotate = Callable[[mx.array], mx.array]

# Larger heads are rotated without the matrices, which take the square of it. No model has larger ones.
_MATRIX = 512


class Rope:
    """Made once for a model; called once a forward pass, for a function that every layer's queries and keys share.

    Args:
        head_dim: values of a head; those that are not rotated come last and stay as they are.
        rope: which of them are, and how; or the base that the frequencies of a plain rotation are powers of.
    """

    def __init__(self, head_dim: int, rope: RopeConfig | float) -> None:
        self.head_dim = head_dim
        self.config = rope if isinstance(rope, RopeConfig) else RopeConfig("default", head_dim, rope, original=0)
        half, dims = self.config.dims // 2, self.config.dims
        self._scales = mx.where(mx.arange(head_dim) < dims, self.config.scale, 1.0)
        self._short, self._long = self._computed(0), self._computed(self.config.original + 1)
        mx.eval(self._scales, self._short, self._long)  # or each trace would compute them
        if head_dim <= _MATRIX:
            rotated = (mx.arange(head_dim) < dims)[:, None]
            self._along = mx.eye(head_dim)
            across = mx.eye(head_dim, k=half) - mx.eye(head_dim, k=-half)
            self._across = mx.where(rotated & rotated.T, across, 0)
            mx.eval(self._along, self._across)

    def __call__(self, length: int, offset: int | mx.array, text_length: int = 0) -> Rotate:
        """A function that rotates `(batch, heads, length, head_dim)` for positions from `offset` on.

        Args:
            offset: a whole number, an array `(1,)`, or one `(batch,)` with a position for each row.
            text_length: of the whole text, where more than `offset + length` is known to come. Where frequencies
                depend on it (`RopeConfig.switch`) all of a text's positions are to be rotated by the same ones.
        """
        one_position = isinstance(offset, int) or offset.size == 1
        unfused = not device.on_gpu() and self.head_dim <= _MATRIX
        if length == 1 and one_position and unfused:
            matrix = self._matrix(offset, self._frequencies(length, offset, text_length))
            return lambda x: x @ matrix.astype(x.dtype)
        if not one_position or not unfused:
            return lambda x: self._fused(x, offset, text_length)
        turn = self._turn(length, offset, self._frequencies(length, offset, text_length))
        return lambda x: turn(x) if x.dtype == mx.float32 else self._fused(x, offset, text_length)

    def _frequencies(self, length: int, offset: int | mx.array, text_length: int) -> mx.array:
        """`(head_dim,)`, radians a position of each value, 0 for what is not rotated."""
        if isinstance(offset, int):
            return self._of_length(max(text_length, offset + length))[0]
        switch = self.config.switch
        if switch is None:
            return self._of_length(0)[0]
        return mx.where(offset + length > switch, self._of_length(switch + 1)[0], self._of_length(0)[0])

    def _fused(self, x: mx.array, offset: int | mx.array, text_length: int) -> mx.array:
        """The rotation by MLX's own kernel."""
        length, switch = x.shape[2], self.config.switch
        if self.config.scale != 1:
            x = x * self._scales.astype(x.dtype)
        if isinstance(offset, int):
            return self._by_mlx(x, offset, max(text_length, offset + length))
        shorter = self._by_mlx(x, offset, 0)
        if switch is None:
            return shorter
        return mx.where((offset + length > switch)[:, None, None, None], self._by_mlx(x, offset, switch + 1), shorter)

    def _by_mlx(self, x: mx.array, offset: int | mx.array, text_length: int) -> mx.array:
        plain = self.config.kind == "default"
        base, periods = (self.config.theta, None) if plain else (None, self._of_length(text_length)[1])
        return mx.fast.rope(
            x, self.config.dims, traditional=False, base=base, scale=1.0, offset=offset, freqs=periods
        )  # fmt: skip

    def _of_length(self, text_length: int) -> tuple[mx.array, mx.array]:
        """Frequencies `(head_dim,)` and the inverse ones `(dims / 2,)` for a text of that length."""
        switch = self.config.switch
        if switch is None or text_length <= switch:
            return self._short
        return self._long if self.config.kind == "longrope" else self._computed(text_length)

    def _computed(self, text_length: int) -> tuple[mx.array, mx.array]:
        found = self.config.frequencies(text_length)
        every = mx.array([*found, *found, *[0.0] * (self.head_dim - self.config.dims)], mx.float32)
        return every, mx.array([1 / frequency for frequency in found], mx.float32)

    def _turn(self, length: int, offset: int | mx.array, frequencies: mx.array) -> Rotate:
        """The rotation of float32 by several positions on a CPU, sines and cosines taken once.

        Where halves are exchanged by a product, which is exact, nothing has to be cut and joined. The derivative is
        the rotation back.
        """
        angles = (mx.arange(length) + offset)[:, None] * frequencies
        cosines, sines = self._scaled(mx.cos(angles)), self._scaled(mx.sin(angles))

        @mx.custom_function
        def turn(x: mx.array) -> mx.array:
            return x * cosines + (x @ self._across) * sines

        @turn.vjp
        def turn_back(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
            return cotangent * cosines - (cotangent @ self._across) * sines

        return turn

    def _matrix(self, offset: int | mx.array, frequencies: mx.array) -> mx.array:
        """The rotation by one position as a `(head_dim, head_dim)` matrix, to be multiplied from the right.

        On a CPU `mx.fast.rope` is twenty-odd small primitives; a product with this is one, and the sines
        are taken once a token instead of twice a layer.
        """
        angles = frequencies * offset
        return self._along * self._scaled(mx.cos(angles)) + self._across * self._scaled(mx.sin(angles))

    def _scaled(self, x: mx.array) -> mx.array:
        """What is rotated, times the rotation's scale."""
        return x if self.config.scale == 1 else x * self._scales
