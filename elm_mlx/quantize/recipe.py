"""What is wanted of a quantization: a format or a budget, a method, a type.

Knows which wishes go together. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from elm_mlx import device
from elm_mlx.errors import InputError
from elm_mlx.model import packing
from elm_mlx.quantize import formats, learned
from elm_mlx.quantize.formats import Format


@dataclass(frozen=True)
class Recipe:
    """Checked when made; `choose` makes one of single wishes.

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
    rate: float = learned.RATE
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.bpw is not None and self.how.mode != packing.AFFINE:
            raise InputError(f"--bpw mixes affine weights: it goes with no --mode {self.how.mode}")
        if self.bpw is not None and not 0 < self.bpw <= 32:
            raise InputError(f"--bpw {self.bpw:g}: bits a weight are more than 0 and at most 32")
        if self.bpw is not None and self.method in ("awq", "gptq"):
            raise InputError(f"--method {self.method} wants the same bits everywhere: it goes with no --bpw")
        if self.method is not None:
            learned.check(self.method, self.how)
        if self.dtype is not None and self.dtype not in device.DTYPES:
            raise InputError(f"--dtype {self.dtype}: there are {', '.join(device.DTYPES)}")


def named(name: str) -> Recipe:
    """Of one word: a number of bits, a float mode, or with a decimal point a budget in bits a weight.

    Raises:
        InputError: it is none of these.
    """
    if name in packing.FLOATS:
        return choose(mode=name)
    try:
        return choose(int(name)) if name.isdigit() else choose(bpw=float(name))
    except ValueError:
        raise InputError(
            f"--quantize {name}: is no number of bits, none of {', '.join(packing.FLOATS)}, and no budget such as 4.5"
        ) from None


def choose(
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = packing.AFFINE,
    *,
    bpw: float | None = None,
    method: str | None = None,
    rate: float | None = None,
    dtype: str | None = None,
) -> Recipe:
    """A recipe of single wishes; None is the default of each.

    Raises:
        InputError: MLX has no such format, or wishes contradict each other.
    """
    if bpw is not None and bits is not None:
        raise InputError("--bpw chooses the bits itself: leave --bits out")
    if rate is not None and method != "dwq":
        raise InputError("--learning-rate is for --method dwq")
    how = formats.choose(bits, group_size, mode)
    return Recipe(how, bpw, method, learned.RATE if rate is None else rate, dtype)
