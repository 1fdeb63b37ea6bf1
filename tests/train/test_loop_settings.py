"""The schedule at its corners; and numbers that make no loop, which are refused where they are given."""

from __future__ import annotations

import math
import typing
from dataclasses import MISSING, fields
from typing import Any

import pytest
import runs

from elm_mlx.errors import InputError
from elm_mlx.train.loop_settings import Schedule, Settings
from elm_mlx.train.preference import Preferring
from elm_mlx.train.settings import OptimizerSettings


def test_cosine_goes_up_in_a_line_and_down_to_its_end() -> None:
    rate = Schedule(peak=1.0, steps=101, warmup=10, shape="cosine", end=0.1, start=0.0)
    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(10) == 1.0 and rate(100) == pytest.approx(0.1) and rate(500) == pytest.approx(0.1)
    assert rate(55) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)


def test_linear_constant_and_no_warmup() -> None:
    linear, constant = Schedule(2.0, 11, shape="linear", end=0.0), Schedule(2.0, 11, 2, "constant", start=1.0)
    assert [linear(step) for step in (0, 5, 10)] == pytest.approx([2.0, 1.0, 0.0])
    assert [constant(step) for step in (0, 1, 2, 99)] == pytest.approx([1.5, 2.0, 2.0, 2.0])
    assert Schedule(1.0, 1)(0) == Schedule(1.0, 5, 5)(4) == 1.0


def test_what_a_schedule_is_extended_by_begins_anew() -> None:
    first, short = Schedule(1.0, 10, 4), Schedule(1.0, 3, 3)
    rate = Schedule(1.0, 10, 4, extend=(10, 3))
    assert rate.total == 23
    assert [rate(step) for step in range(23)] == [*map(first, range(10)), *map(first, range(10)), *map(short, range(3))]
    assert rate(30) == short(10)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"shape": "step"}, "learning rate schedule 'step' is not one of"), ({"peak": 0.0}, "above 0"),
        ({"peak": math.nan}, "above 0"), ({"warmup": 11}, "warm-up of 11"), ({"steps": 0}, "must be at least 1, not 0"),
        ({"extend": (3, 0)}, "must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(options: dict[str, float], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Schedule(**{"peak": 1.0, "steps": 10} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"on_nan": "hope"}, "on_nan 'hope' is not one of stop, skip"),
        ({"optimizer": "sgd"}, "optimizer 'sgd' is not one of adamw, adafactor"),
        ({"accumulate": 0}, "accumulate must be at least 1, not 0"),
        ({"clip": 0.0}, "norm must be above 0"),
        ({"betas": (0.9, math.nan)}, r"betas are from 0 to below 1, not \(0.9, nan\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        runs.settings(**options)


NUMBERS: list[tuple[type[Any], str]] = [
    (cls, item.name)
    for cls in (Schedule, Settings, Preferring)
    for item in fields(cls)
    if typing.get_type_hints(cls)[item.name] is float
] + [(OptimizerSettings, "epochs")]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize(("cls", "name"), NUMBERS)
def test_what_is_no_number_is_refused_wherever_one_is_given(cls: type[Any], name: str, value: float) -> None:
    needed = {"peak": 1e-3, "steps": 10, "schedule": Schedule(1e-3, 10)}
    given = {item.name: needed[item.name] for item in fields(cls) if item.default is MISSING}
    with pytest.raises(InputError, match=name.split("_")[0] if cls is not Schedule else "rate"):
        cls(**given | {name: value})
