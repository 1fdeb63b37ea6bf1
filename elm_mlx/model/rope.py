"""Rotary position embeddings (RoPE): the rotation of queries and keys by their positions.

On a GPU it is MLX's own kernel, on a CPU products with the sines, which are taken once for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from elm_mlx import device
from elm_mlx.model.rope_config import RopeConfig

Rotate = Callable[[mx.array], mx.array]

# Larger heads are rotated without the matrices, which take the square of it. No model has larger ones.
_MATRIX = 512


class Rope:
    """Rotary position embeddings, on pairs half of the rotated values apart (not interleaved).

    Made once for a model, and called once a forward pass for the function that rotates every layer's queries and keys.

    Args:
        head_dim: values of a head; those that are not rotated come last.
        rope: the rotation; or the base of a plain rotation's frequencies.
    """

    def __init__(self, head_dim: int, rope: RopeConfig | float) -> None:
        self.head_dim = head_dim
        self.config = rope if isinstance(rope, RopeConfig) else RopeConfig("default", head_dim, rope, original=0)
        self._switch = rope.switch if isinstance(rope, RopeConfig) else None
        half, dims = self.config.dims // 2, self.config.dims
        self._scales = mx.where(mx.arange(head_dim) < dims, self.config.scale, 1.0)
        self._short, self._long = self._computed(0), self._computed(self.config.original + 1)
        mx.eval(self._scales, self._short, self._long)  # or each trace would compute them
        self._table = mx.zeros((0, 2 * head_dim))
        if head_dim <= _MATRIX:
            rotated = (mx.arange(head_dim) < dims)[:, None]
            self._along = mx.eye(head_dim)
            across = mx.eye(head_dim, k=half) - mx.eye(head_dim, k=-half)
            self._across = mx.where(rotated & rotated.T, across, 0)
            mx.eval(self._along, self._across)

    def __call__(self, length: int, offset: int | mx.array, text_length: int = 0) -> Rotate:
        """Returns a function that rotates `(batch, heads, length, head_dim)` for positions from `offset` on.

        Args:
            offset: a whole number, an array `(1,)`, or one `(batch,)` with a position for each row.
            text_length: of the whole text, if more than `offset + length` tokens are known to come. Where frequencies
                depend on it (`RopeConfig.switch`) all of a text's positions must have the same.
        """
        one_position = isinstance(offset, int) or offset.size == 1
        unfused = not device.on_gpu() and self.head_dim <= _MATRIX
        if length == 1 and unfused:
            if isinstance(offset, int) or one_position:
                matrix = self._matrix(offset, self._frequencies(length, offset, text_length))
                return lambda x: x @ matrix.astype(x.dtype)
            matrix = self._matrix(offset[:, None], self._frequencies(length, offset[:, None], text_length))
            return lambda x: (x.squeeze(2) @ matrix.astype(x.dtype))[:, :, None]  # the products of a row alone
        if not one_position or not unfused:
            return lambda x: self._fused(x, offset, text_length)
        turn = self._turn(mx.arange(length) + offset, self._frequencies(length, offset, text_length))
        return lambda x: turn(x) if x.dtype == mx.float32 else self._fused(x, offset, text_length)

    def at(self, positions: mx.array) -> Rotate:
        """Returns a function that rotates `(batch, heads, length, head_dim)` for positions `(batch, length)`."""
        turn = self._turn(positions[:, None], self._of_length(positions.shape[1])[0])
        return lambda x: turn(x.astype(mx.float32)).astype(x.dtype)

    def moved(self, x: mx.array, positions: int) -> mx.array:
        """Returns rotated `(..., head_dim)` as it would be `positions` farther, in a text of up to `switch` tokens."""
        half, dims = self.config.dims // 2, self.config.dims
        angles = positions * self._of_length(0)[0][:half]
        cosines, sines = mx.cos(angles), mx.sin(angles)
        first, second, rest = mx.split(x.astype(mx.float32), [half, dims], axis=-1)
        parts = [first * cosines - second * sines, second * cosines + first * sines, rest]
        return mx.concatenate(parts, axis=-1).astype(x.dtype)

    def turns(self, length: int, offset: int | mx.array, text_length: int = 0) -> mx.array:
        """Returns cosines and sines, side by side, for `(1 or batch, length, 2 * head_dim)`; arguments as of a call."""
        single = isinstance(offset, int)
        first = mx.array([offset]) if isinstance(offset, int) else offset
        positions = (first[:, None] + mx.arange(length))[:, :, None]
        frequencies = self._frequencies(length, offset if single else first[:, None], text_length)
        angles = positions * (frequencies if frequencies.ndim == 1 else frequencies[:, None])
        return mx.concatenate([self._scaled(mx.cos(angles)), self._scaled(mx.sin(angles))], axis=-1)

    def table(self, positions: int) -> mx.array | None:
        """Returns `turns` of the first `positions` positions or more, `(n, 2 * head_dim)`, kept for the next time.

        None where they depend on the text's length.
        """
        if self._switch is not None:
            return None
        table = self._table
        if positions > table.shape[0]:
            table = self.turns(positions, 0)[0]
            mx.eval(table)  # first: another thread could not compute it
            self._table = table
        return table  # not what another thread has put there meanwhile, which may be shorter

    def _frequencies(self, length: int, offset: int | mx.array, text_length: int) -> mx.array:
        """Returns `(head_dim,)`, or `(batch, head_dim)`: radians a position of each value, 0 for those not rotated."""
        if isinstance(offset, int):
            return self._of_length(max(text_length, offset + length))[0]
        switch = self._switch
        if switch is None:
            return self._of_length(0)[0]
        return mx.where(offset + length > switch, self._of_length(switch + 1)[0], self._of_length(0)[0])

    def _fused(self, x: mx.array, offset: int | mx.array, text_length: int) -> mx.array:
        """Rotates by MLX's own kernel."""
        length, switch = x.shape[2], self._switch
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
        """Returns frequencies `(head_dim,)` and the inverse ones `(dims / 2,)` for a text of that length."""
        switch = self._switch
        if switch is None or text_length <= switch:
            return self._short
        return self._long if self.config.kind == "longrope" else self._computed(text_length)

    def _computed(self, text_length: int) -> tuple[mx.array, mx.array]:
        found = frequencies(self.config, text_length)
        every = mx.array([*found, *found, *[0.0] * (self.head_dim - self.config.dims)], mx.float32)
        return every, mx.array([1 / frequency if frequency else math.inf for frequency in found], mx.float32)

    def _turn(self, positions: mx.array, frequencies: mx.array) -> Rotate:
        """Returns the rotation of float32 by positions `(..., length)`, sines and cosines taken once.

        Halves are exchanged by a product, which is exact, so that nothing has to be cut and joined. The derivative is
        the rotation back.
        """
        angles = positions[..., None] * frequencies
        cosines, sines = self._scaled(mx.cos(angles)), self._scaled(mx.sin(angles))

        @mx.custom_function
        def turn(x: mx.array) -> mx.array:
            return x * cosines + self._exchanged(x) * sines

        @turn.vjp
        def turn_back(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
            return cotangent * cosines - self._exchanged(cotangent) * sines

        return turn

    def _exchanged(self, x: mx.array) -> mx.array:
        """Returns the halves of each pair exchanged, the second's negated; 0 for what is not rotated."""
        if self.head_dim <= _MATRIX:
            return x @ self._across
        first, second, rest = mx.split(x, [self.config.dims // 2, self.config.dims], axis=-1)
        return mx.concatenate([-second, first, mx.zeros_like(rest)], axis=-1)

    def _matrix(self, offset: int | mx.array, frequencies: mx.array) -> mx.array:
        """Returns the rotation by one position as a `(head_dim, head_dim)` matrix, to be multiplied from the right.

        Of `offset` `(batch, 1)` it is a matrix for each. On a CPU `mx.fast.rope` is twenty-odd small primitives; a
        product with this is one, and the sines are taken once a token instead of twice a layer.
        """
        angles = frequencies * offset
        cosines, sines = self._scaled(mx.cos(angles)), self._scaled(mx.sin(angles))
        if angles.ndim == 2:
            cosines, sines = cosines[:, None], sines[:, None]
        return self._along * cosines + self._across * sines

    def _scaled(self, x: mx.array) -> mx.array:
        return x if self.config.scale == 1 else x * self._scales


def frequencies(rope: RopeConfig, length: int = 0) -> list[float]:
    """Returns radians a position of each pair, `dims / 2`, for a text of `length` tokens.

    Formulas: Su et al. 2021 (RoPE); Chen et al. 2023 (linear); Peng et al. 2023 (dynamic NTK and YaRN);
    Ding et al. 2024 (LongRoPE); Llama 3.1's model card (llama3). All as transformers computes them.
    """
    theta = rope.theta
    if rope.kind == "dynamic" and length > rope.original:
        stretch = rope.factor * length / rope.original - (rope.factor - 1)
        theta *= stretch ** (rope.dims / (rope.dims - 2))
    plain = [theta ** (-pair / rope.dims) for pair in range(0, rope.dims, 2)]
    if rope.kind == "linear":
        return [frequency / rope.factor for frequency in plain]
    if rope.kind == "llama3":
        return [_llama3(rope, frequency) for frequency in plain]
    if rope.kind == "yarn":
        return [_yarn(rope, pair, frequency) for pair, frequency in enumerate(plain)]
    if rope.kind == "longrope":
        divisors = rope.long if length > rope.original else rope.short
        return [frequency / divisor for frequency, divisor in zip(plain, divisors, strict=True)]
    return plain


def _llama3(rope: RopeConfig, frequency: float) -> float:
    low, high = rope.bounds
    turns = rope.original * frequency / (2 * math.pi)  # over the original context
    if turns > high:
        return frequency
    if turns < low:
        return frequency / rope.factor
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def _yarn(rope: RopeConfig, pair: int, frequency: float) -> float:
    first, last = rope.bounds
    ramp = min(1.0, max(0.0, (pair - first) / (last - first)))
    return ramp * frequency / rope.factor + (1 - ramp) * frequency
