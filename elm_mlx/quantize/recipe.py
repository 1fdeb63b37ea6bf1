"""The recipe of a quantization: the format of a weight as `mx.quantize` takes it, a budget of bits, a method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from elm_mlx import device
from elm_mlx.errors import InputError
from elm_mlx.model import lora_layers
from elm_mlx.model.config import AFFINE, BITS, FLOATS, GROUPS
from elm_mlx.store.loading import pack

GROUP = 64
METHODS = ("awq", "dwq", "gptq")
RATE = 1e-5  # of DWQ
_BLOCK = 32
_GPTQ_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Format:
    """The format of a packed weight. Made by `choose_format`, which checks. `bits` do not count the group's scale."""

    bits: int
    group_size: int
    mode: str = AFFINE

    def packing(self) -> dict[str, Any]:
        """The arguments of `mx.quantize`, and an entry of a config's `quantization`."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def fit(self, columns: int) -> Format | None:
        """Returns this format in the largest group, of its own or less, that divides `columns`; None for none."""
        groups = GROUPS if self.mode == AFFINE else (self.group_size,)
        # MLX's CPU packs 32 values at a time, in groups of 16 too, and fails on a row of 48.
        fitting = [group for group in groups if group <= self.group_size and columns % max(group, _BLOCK) == 0]
        return replace(self, group_size=fitting[-1]) if fitting else None

    def nbytes(self, size: int, dtype: mx.Dtype) -> int:
        """The bytes of a weight of `size` values, scales and biases of `dtype` counted."""
        scale_bytes = 2 * int(dtype.size) if self.mode == AFFINE else 1
        return size * self.bits // 8 + size // self.group_size * scale_bytes

    def round_trip(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """Returns `weight` packed, with scales and biases in `dtype`, and unpacked again in float32."""
        parts = pack(weight, self.packing(), dtype)
        return lora_layers.dequantize(parts["weight"], parts["scales"], parts.get("biases"), **self.packing())

    def __str__(self) -> str:
        return f"{self.bits}-bit, group {self.group_size}" if self.mode == AFFINE else self.mode


def choose_format(bits: int | None = None, group_size: int | None = None, mode: str = AFFINE) -> Format:
    """Makes a format; None is the mode's own value, of affine 4 bits in groups of 64.

    Raises:
        InputError: MLX has no such format.
    """
    if mode in FLOATS:
        own_bits, own_group = FLOATS[mode]
        if bits not in (None, own_bits) or group_size not in (None, own_group):
            raise InputError(f"{mode} has {own_bits} bits and groups of {own_group}, and no others")
        return Format(own_bits, own_group, mode)
    if mode != AFFINE:
        raise InputError(f"mode {mode!r} is not one of {AFFINE}, {', '.join(FLOATS)}")
    bits, group_size = 4 if bits is None else bits, GROUP if group_size is None else group_size
    if bits not in BITS:
        raise InputError(f"{bits} bits: MLX packs weights in {', '.join(map(str, BITS))}")
    if group_size not in GROUPS:
        raise InputError(f"a group size of {group_size}: MLX has {', '.join(map(str, GROUPS))}")
    return Format(bits, group_size)


@dataclass(frozen=True)
class QuantizationRecipe:
    """The recipe of a quantization, checked when made; `choose` makes one of single settings.

    Args:
        how: the format of every weight; with `bpw`, of which the group size alone counts.
        bpw: mix formats within this many bits a parameter.
        method: one of mlx-lm's, or None to round to the nearest.
        rate: DWQ's learning rate.
        dtype: of scales, biases and what is not packed; None takes the model's, of float32 bfloat16.

    Raises:
        InputError: these contradict each other.
    """

    how: Format
    bpw: float | None = None
    method: str | None = None
    rate: float = RATE
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.bpw is not None and self.how.mode != AFFINE:
            raise InputError(f"--bpw mixes affine weights: leave out --mode {self.how.mode}")
        if self.bpw is not None and not 0 < self.bpw <= 32:
            raise InputError(f"--bpw {self.bpw:g}: must be above 0 and at most 32")
        if self.bpw is not None and self.method in ("awq", "gptq"):
            raise InputError(f"--method {self.method} wants the same bits everywhere: leave out --bpw")
        if self.method is not None:
            _check_method(self.method, self.how)
        if self.dtype is not None and self.dtype not in device.DTYPES:
            raise InputError(f"--dtype {self.dtype}: is not one of {', '.join(device.DTYPES)}")


def _check_method(method: str, how: Format) -> None:
    """Raises InputError where `method` has no such format."""
    if method not in METHODS:
        raise InputError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if how.mode != AFFINE:
        raise InputError(f"--method {method} is for affine weights, not {how.mode}")
    if method == "gptq" and how.bits not in _GPTQ_BITS:
        raise InputError(f"--method gptq packs in {', '.join(map(str, _GPTQ_BITS))} bits, not {how.bits}")
    if method == "dwq" and how.bits == 8:
        raise InputError("--method dwq trains weights of fewer than 8 bits")


def parse(name: str) -> QuantizationRecipe:
    """Makes a recipe of one word: a number of bits, a float mode, or with a decimal point a budget in bits a weight.

    Raises:
        InputError: it is none of these.
    """
    if name in FLOATS:
        return choose(mode=name)
    try:
        return choose(int(name)) if name.isdigit() else choose(bpw=float(name))
    except ValueError:
        raise InputError(
            f"--quantize {name}: is not a number of bits, not one of {', '.join(FLOATS)}, and not a budget such as 4.5"
        ) from None


def choose(
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = AFFINE,
    *,
    bpw: float | None = None,
    method: str | None = None,
    rate: float | None = None,
    dtype: str | None = None,
) -> QuantizationRecipe:
    """Makes a recipe of single wishes; None is the default of each.

    Raises:
        InputError: MLX has no such format, or wishes contradict each other.
    """
    if bpw is not None and bits is not None:
        raise InputError("--bpw chooses the bits itself: leave --bits out")
    if rate is not None and method != "dwq":
        raise InputError("--learning-rate is for --method dwq")
    how = choose_format(bits, group_size, mode)
    return QuantizationRecipe(how, bpw, method, RATE if rate is None else rate, dtype)
