"""How quantized weights are packed, as a config's `quantization` says it: bits, group size and mode.

Knows what MLX can pack and the words for it; knows no arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.reading import short

BITS = (2, 3, 4, 5, 6, 8)  # of what is written here; MLX reads 1 too
GROUPS = (32, 64, 128)
# mode -> bits and group size, of which each has one: microscaling floats (OCP MX 1.0) and NVIDIA's.
FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
AFFINE = "affine"


def check(where: str, quantization: object) -> None:
    """Refuses a `quantization` that does not say of all weights how they are packed, and of those that it names.

    Raises:
        InputError: names `where` and the key that is missing, or that MLX has nothing for.
    """
    _check_packing(f"{where}: quantization", quantization)
    assert isinstance(quantization, Mapping)
    for name, own in quantization.items():
        if isinstance(own, Mapping):
            _check_packing(f"{where}: quantization of {short(name)}", own)
        elif name not in ("bits", "group_size", "mode") and not isinstance(own, (bool, str)):
            raise InputError(f"{where}: quantization of {short(name)} is {short(own)}: an object is needed")


def _check_packing(where: str, how: Any) -> None:
    if not isinstance(how, Mapping):
        raise InputError(f"{where} is {short(how)}: an object is needed")
    bits, group_size, mode = how.get("bits"), how.get("group_size"), how.get("mode", AFFINE)
    if not isinstance(mode, str) or mode not in (AFFINE, *FLOATS):
        raise InputError(f"{where}: mode is {short(mode)}: one of {AFFINE}, {', '.join(FLOATS)} is needed")
    if type(bits) is not int or type(group_size) is not int:
        raise InputError(f"{where}: bits {short(bits)}, group_size {short(group_size)}: whole numbers are needed")
    known = (bits in (1, *BITS) and group_size in GROUPS) if mode == AFFINE else (bits, group_size) == FLOATS[mode]
    if not known:
        raise InputError(f"{where}: MLX has no {mode} of {short(bits)} bits in groups of {short(group_size)}")
