"""Numbers that make no run, which are refused by the option."""

from __future__ import annotations

import math
import typing
from pathlib import Path

import pytest

from elm_mlx.errors import InputError
from elm_mlx.train.setting_fields import described, made
from elm_mlx.train.settings import DpoSettings, LoraSettings

# But for two that data are read by, and are refused where these are.
OPTIONS = [
    name
    for name, each in DpoSettings.options().items() | LoraSettings.options().items()
    if {each.kind, *typing.get_args(each.kind)} & {int, float} and name not in ("max_seq_length", "weight")
]


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_what_is_no_number_of_an_option_is_refused_by_the_option(name: str) -> None:
    kind = described(DpoSettings)[name].kind
    for value in (-3, math.nan, -math.inf):
        given = (1, value) if typing.get_args(kind) else value
        with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} {value}: a .*number.* is needed$"):
            made(DpoSettings, {"model": Path("m"), "data": ("d",), "out": Path("o"), name: given})
