"""How a weight is packed: bits, group size and mode, as `mx.quantize` takes them.

Knows what MLX can pack, what that takes on disk and what a weight is afterwards. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from elm_mlx.errors import InputError
from elm_mlx.model import lora_layers
from elm_mlx.model.packing import AFFINE, BITS, FLOATS, GROUPS

_BLOCK = 32
GROUP = 64


@dataclass(frozen=True)
class Format:
    """Made by `choose`, which checks. `bits` are those of one value, without its share of the group's scale."""

    bits: int
    group_size: int
    mode: str = AFFINE

    def packing(self) -> dict[str, int | str]:
        """As `mx.quantize` and a config's `quantization` have it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def fitted(self, columns: int) -> Format | None:
        """This, or the same in the largest smaller group that rows of `columns` values divide into; None for none."""
        groups = GROUPS if self.mode == AFFINE else (self.group_size,)
        # MLX's CPU packs 32 values at a time, in groups of 16 too, and fails on a row of 48.
        fitting = [group for group in groups if group <= self.group_size and columns % max(group, _BLOCK) == 0]
        return replace(self, group_size=fitting[-1]) if fitting else None

    def nbytes(self, size: int, dtype: mx.Dtype) -> int:
        """What a weight of `size` values takes, scales and biases of `dtype` counted."""
        scale_bytes = 2 * int(dtype.size) if self.mode == AFFINE else 1
        return size * self.bits // 8 + size // self.group_size * scale_bytes

    def __str__(self) -> str:
        return f"{self.bits}-bit, group {self.group_size}" if self.mode == AFFINE else self.mode


def choose(bits: int | None, group_size: int | None, mode: str) -> Format:
    """The format that is asked for; None is the mode's own, of affine 4 bits in groups of 64.

    Raises:
        InputError: MLX has no such format.
    """
    if mode in FLOATS:
        own_bits, own_group = FLOATS[mode]
        if bits not in (None, own_bits) or group_size not in (None, own_group):
            raise InputError(f"{mode} has {own_bits} bits and groups of {own_group}, and no others")
        return Format(own_bits, own_group, mode)
    if mode != AFFINE:
        raise InputError(f"no mode {mode!r}; there are {AFFINE}, {', '.join(FLOATS)}")
    bits, group_size = 4 if bits is None else bits, GROUP if group_size is None else group_size
    if bits not in BITS:
        raise InputError(f"{bits} bits: MLX packs weights in {', '.join(map(str, BITS))}")
    if group_size not in GROUPS:
        raise InputError(f"a group size of {group_size}: MLX has {', '.join(map(str, GROUPS))}")
    return Format(bits, group_size)


def pack(weight: mx.array, how: Format, dtype: mx.Dtype) -> dict[str, mx.array]:
    """`weight`, scales and, of affine, biases; the latter two in `dtype`, which float modes have 8-bit floats for."""
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, **how.packing()), strict=False))
    if how.mode == AFFINE:
        parts |= {name: parts[name].astype(dtype) for name in ("scales", "biases")}
    return parts


def rounded(weight: mx.array, how: Format, dtype: mx.Dtype) -> mx.array:
    """What `weight` is once packed, in float32."""
    parts = pack(weight, how, dtype)
    return lora_layers.dequantize(
        parts["weight"], parts["scales"], parts.get("biases"),
        group_size=how.group_size, bits=how.bits, mode=how.mode,
    )  # fmt: skip
