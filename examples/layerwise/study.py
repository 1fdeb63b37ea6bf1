"""The study's design: what is compared, and in which order, so that each finished part is an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]  # of a training, as training.py makes it

CORENET, FAN_IN = "CoreNet", "fan-in"  # rules for the initial weights, see training.py
UNIFORM, LAYERWISE, MILDER = "uniform", "layer-wise", "milder"
SMALL, MIDDLE, LARGE = "0.23M", "1.4M", "5.4M"  # parameters
SEEDS = (1, 2, 3)  # rates are tried with seed 0, which has no part in the result
LONG, SHORT = 20.0, 5.0  # tokens a parameter, of all parameters
TRIAL = SHORT  # of the runs that rates are chosen by
UPDATE = 2048  # tokens
_LOOKS = 8  # validations in a run


class Size(NamedTuple):
    """A model's size; every shape of it has the same number of parameters, and the same arithmetic for a token.

    Attributes:
        divisor: FFN widths are multiples of this.
        tokens_per_second: of one training beside another, on an AMD EPYC with two cores that did nothing else.
    """

    layers: int
    width: int
    head: int
    divisor: int
    parameters: int
    tokens_per_second: int


SIZES = {
    SMALL: Size(4, 64, 16, 8, 225_984, 30_129),
    MIDDLE: Size(8, 128, 16, 8, 1_411_456, 8_968),
    LARGE: Size(8, 256, 32, 16, 5_378_816, 3_178),
}
# Multipliers of the heads' and of the FFNs' widths, from the first layer to the last. The layer-wise ones are the
# paper's, the milder ones reach half as far, or so; the mean is the uniform model's.
SHAPES = {
    UNIFORM: ((0.75,), (2.25,)),
    LAYERWISE: ((0.5, 1.0), (0.5, 4.0)),
    MILDER: ((0.625, 0.875), (1.25, 3.25)),
}
_WHOLE_HEADS = {(SMALL, MILDER): (0.75,)}  # where layers of 2, 3 and 4 heads allow nothing between


@dataclass(frozen=True)
class Training:
    """One model: what it is, and how it is trained.

    Attributes:
        budget: tokens a parameter.
        rate: the highest learning rate.
        seed: of the initial weights and the order of what is read.
    """

    size: str
    shape: str
    initial: str
    budget: float
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.size}-{self.shape}-{self.initial}-{self.budget:g}-lr-{self.rate:g}-seed-{self.seed}"

    def fields(self) -> list[str]:
        """Returns the recipe's fields that are this model's own."""
        size, (heads, ffn) = SIZES[self.size], SHAPES[self.shape]
        heads = _WHOLE_HEADS.get((self.size, self.shape), heads)
        steps = -(-self.budget * size.parameters // UPDATE)
        return [
            f"model.num_layers={size.layers}", f"model.model_dim={size.width}", f"model.head_dim={size.head}",
            f"model.ffn_dim_divisor={size.divisor}", f"model.qkv_multipliers={list(heads)}",
            f"model.ffn_multipliers={list(ffn)}", f"optimizer.lr={self.rate:g}", f"optimizer.steps={steps:.0f}",
            f"optimizer.warmup={steps // 20:.0f}", f"run.seed={self.seed}", f"run.eval_every={-(-steps // _LOOKS):.0f}",
            f"run.save_every={-(-steps // _LOOKS):.0f}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Models that differ in their seeds.

    Attributes:
        times: they are trained with the learning rate that suits them best, times these.
    """

    size: str
    shape: str
    initial: str = CORENET
    budget: float = LONG
    times: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = SEEDS


def _both(size: str, initial: str = CORENET, **more: Any) -> tuple[Cell, ...]:
    return tuple(Cell(size, shape, initial, **more) for shape in (UNIFORM, LAYERWISE))


# The cells of a part are trained side by side, where processors allow it.
PARTS: tuple[tuple[Cell, ...], ...] = (
    _both(SMALL, budget=SHORT),
    _both(SMALL),
    _both(SMALL, FAN_IN, budget=SHORT),
    _both(SMALL, FAN_IN),
    (Cell(SMALL, MILDER), Cell(SMALL, MILDER, FAN_IN)),
    _both(SMALL, times=(0.5, 2.0), seeds=(1,)),  # is the rate that was best for short runs best for long ones?
    _both(MIDDLE),
    _both(MIDDLE, FAN_IN),
    (Cell(MIDDLE, MILDER), Cell(MIDDLE, MILDER, FAN_IN)),
    _both(LARGE),
)


def read(path: Path) -> dict[Training, Record]:
    """Returns the records of a file, by what was trained; none where there is no such file."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {Training(**{name: record[name] for name in Training.__dataclass_fields__}): record for record in records}
