"""Which weights of a model are packed, and how: all alike, or mixed within a budget of bits.

Knows a model's leaf modules, any network's, and the tensors of its directory. Knows nothing of what a plan costs in
quality; `sensitivity` measures that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from elm_mlx.errors import InputError, counted
from elm_mlx.model.ops import kl_divergences
from elm_mlx.model.packing import BITS
from elm_mlx.quantize.losses import Advance, Reference, Row, log_softmax
from elm_mlx.quantize.recipe import Format, rounded

Tensors = dict[str, mx.array]


@dataclass(frozen=True)
class Plan:
    """How each weight is to lie on the disk.

    Attributes:
        formats: module -> its weight's format, in the model's order; what is not here stays as it is.
        bits_per_weight: of all that is stored, over the number of parameters; as mlx-lm counts it.
        predicted: the sum of the modules' own divergences, in nats; None for a plan that none were measured for.
        notes: lines that a user should know of.
    """

    formats: Mapping[str, Format]
    bits_per_weight: float
    predicted: float | None = None
    notes: tuple[str, ...] = ()

    def table(self) -> dict[str, str]:
        """Kind of module -> its format, or where layers differ the bits of each, first to last."""
        kinds: dict[str, list[Format]] = {}
        for name, how in self.formats.items():
            kinds.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), []).append(how)
        return {kind: _told(of_kind) for kind, of_kind in kinds.items()}


def packable(model: nn.Module, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Modules that have a quantized form, in the model's order, with their weights' shapes.

    Raises:
        InputError: there is none.
    """
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    names = [name for name, module in leaves if hasattr(module, "to_quantized") and f"{name}.weight" in tensors]
    if not names:
        raise InputError("the model has no weight that MLX could quantize")
    return {name: tensors[f"{name}.weight"].shape for name in names}


def uniform(shapes: Mapping[str, tuple[int, ...]], how: Format, tensors: Tensors, dtype: mx.Dtype) -> Plan:
    """Every weight in one format, in smaller groups where its rows want that."""
    formats = {name: fitted for name, shape in shapes.items() if (fitted := how.fitted(shape[-1])) is not None}
    if not formats:
        raise InputError(f"no weight of the model has rows that divide into groups of {how.group_size}")
    return Plan(formats, bits_per_weight(formats, tensors, dtype), notes=_notes(shapes, formats, how))


def check_budget(
    shapes: Mapping[str, tuple[int, ...]], group_size: int, bpw: float, tensors: Tensors, dtype: mx.Dtype
) -> None:
    """Raises InputError where `bpw` is below what the fewest bits take, or above what the model takes as it is."""
    fewest = Format(BITS[0], group_size)
    least = {name: fitted for name, shape in shapes.items() if (fitted := fewest.fitted(shape[-1])) is not None}
    lowest, highest = (bits_per_weight(formats, tensors, dtype) for formats in (least, {}))
    if bpw < lowest:
        raise InputError(
            f"--bpw {bpw:g}: {fewest.bits} bits everywhere are {lowest:.2f} bits a weight already, groups' scales and "
            "norms counted"
        )
    if bpw >= highest:
        raise InputError(f"--bpw {bpw:g}: the model as it is takes no more")


def mixed(
    shapes: Mapping[str, tuple[int, ...]],
    group_size: int,
    bpw: float,
    divergences: Mapping[str, Mapping[int, float]],
    tensors: Tensors,
    dtype: mx.Dtype,
) -> Plan:
    """The bits of each weight that lose least within `bpw` bits a parameter of the whole model; see `check_budget`.

    Args:
        divergences: module -> bits -> what packing it alone in so many costs, in nats a token.
    """
    names = [name for name in shapes if name in divergences]
    choices = {name: _choices(shapes[name], group_size) for name in names}
    dense = int(dtype.size)
    sizes = {name: tensors[f"{name}.weight"].size for name in names}
    costs = [[*(how.nbytes(sizes[name], dtype) for how in choices[name]), sizes[name] * dense] for name in names]
    losses = [[*(divergences[name][how.bits] for how in choices[name]), 0.0] for name in names]
    rest = stored_bytes({}, tensors, dtype) - sum(of_item[-1] for of_item in costs)
    chosen = allocate(costs, losses, int(bpw * parameters(tensors) / 8) - rest)
    assert chosen is not None, "the budget was not checked"
    formats = {
        name: choices[name][choice]
        for name, choice in zip(names, chosen, strict=True)
        if choice < len(choices[name])  # the last is to leave it as it is
    }
    predicted = sum(of_item[choice] for of_item, choice in zip(losses, chosen, strict=True))
    return Plan(formats, bits_per_weight(formats, tensors, dtype), predicted)


def parameters(tensors: Tensors) -> int:
    return sum(int(tensor.size) for tensor in tensors.values())


def bits_per_weight(formats: Mapping[str, Format], tensors: Tensors, dtype: mx.Dtype) -> float:
    return 8 * stored_bytes(formats, tensors, dtype) / parameters(tensors)


def stored_bytes(formats: Mapping[str, Format], tensors: Tensors, dtype: mx.Dtype) -> int:
    """Of all tensors, those in no format in `dtype` as far as they are of the model's own type."""
    own = main_dtype(tensors, dtype)
    total = 0
    for name, tensor in tensors.items():
        how = formats.get(name.removesuffix(".weight"))
        width = dtype if tensor.dtype == own else tensor.dtype
        total += tensor.size * int(width.size) if how is None else how.nbytes(tensor.size, dtype)
    return total


def main_dtype(tensors: Tensors, default: mx.Dtype) -> mx.Dtype:
    """The type of the largest tensor: what the model is stored in. A few may be kept in another on purpose."""
    return max(tensors.values(), key=lambda tensor: tensor.size).dtype if tensors else default


def _told(of_kind: Sequence[Format]) -> str:
    if len(set(of_kind)) == 1:
        return str(of_kind[0])
    return " ".join(str(how.bits) for how in of_kind) + " bits"


def _choices(shape: Sequence[int], group_size: int) -> list[Format]:
    """Of fewest bits first."""
    found = (Format(bits, group_size).fitted(shape[-1]) for bits in BITS)
    return [how for how in found if how is not None]


def _notes(shapes: Mapping[str, tuple[int, ...]], formats: Mapping[str, Format], how: Format) -> tuple[str, ...]:
    smaller = [name for name, fitted in formats.items() if fitted != how]
    left = [name for name in shapes if name not in formats]
    notes = []
    if smaller:
        notes.append(
            f"{counted(len(smaller), 'weight')} in smaller groups, into which rows divide; such as {smaller[0]}"
        )
    if left:
        notes.append(f"{counted(len(left), 'weight')} left as stored: rows divide into no groups; such as {left[0]}")
    return tuple(notes)


STEPS = 50_000  # units that a budget is cut into


def allocate(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """The choice of each item, by the multiple-choice knapsack's dynamic programme; None where nothing fits.

    Costs are counted in units of a `STEPS`th of what the budget leaves over the cheapest choices, rounded up: it is
    never exceeded, and the sum is the least but for what those roundings keep out. Takes items x choices x STEPS steps.

    Args:
        costs: of each item, of each of its choices.
        losses: in the same order.
        budget: what the chosen costs may sum to.
    """
    least = [min(of_item) for of_item in costs]
    spare = budget - sum(least)
    if spare < 0:
        return None
    unit = max(1, -(-spare // STEPS))
    room = spare // unit
    best = np.zeros(room + 1)  # the least loss of the items so far, within each room
    chosen = np.zeros((len(costs), room + 1), np.uint8)
    for i, (of_item, loss) in enumerate(zip(costs, losses, strict=True)):
        units = [-(-(cost - least[i]) // unit) for cost in of_item]
        after = np.full(room + 1, np.inf)
        for choice, (needed, lost) in enumerate(zip(units, loss, strict=True)):
            if needed > room:
                continue
            total = best[: room + 1 - needed] + lost
            better = total < after[needed:]
            after[needed:][better] = total[better]
            chosen[i, needed:][better] = choice
        best = after
    return _read_back(chosen, costs, least, unit)


def _read_back(chosen: np.ndarray, costs: Sequence[Sequence[int]], least: Sequence[int], unit: int) -> list[int]:
    room, choices = chosen.shape[1] - 1, []
    for i in reversed(range(len(costs))):
        choice = int(chosen[i, room])
        choices.append(choice)
        room -= -(-(costs[i][choice] - least[i]) // unit)
    return choices[::-1]


MEASURED = (2, 3, 4)
WINDOW = 128
TOKENS = 1024  # a few windows from all over the text


def spread(rows: Sequence[Row], tokens: int = TOKENS) -> list[Row]:
    """Windows of the whole text, evenly apart, that hold about so many tokens."""
    full = [row for row in rows if len(row.inputs) == len(rows[0].inputs)]
    wanted = max(1, tokens // len(full[0].inputs))
    if len(full) <= wanted:
        return list(rows)
    return [full[i * len(full) // wanted] for i in range(wanted)]


def passes(modules: int) -> int:
    """Over the text, for so many modules."""
    return modules * len(MEASURED)


def measure(
    model: nn.Module,
    before: Reference,
    shapes: Mapping[str, tuple[int, ...]],
    group_size: int,
    dtype: mx.Dtype,
    advance: Advance = lambda count: None,
) -> dict[str, dict[int, float]]:
    """Module -> bits -> mean divergence in nats a token, where that module alone is packed in so many bits.

    Modules whose rows divide into no group are left out. `model` is as before when this returns.

    Args:
        before: of `model` as it is.
        dtype: of scales and biases.
        advance: told of each pass over the text.
    """
    leaves = dict(model.named_modules())
    found: dict[str, dict[int, float]] = {}
    for name, shape in shapes.items():
        if Format(BITS[0], group_size).fitted(shape[-1]) is not None:
            found[name] = _of_module(model, leaves[name], before, group_size, dtype, advance)
    return found


def _of_module(
    model: nn.Module, module: nn.Module, before: Reference, group_size: int, dtype: mx.Dtype, advance: Advance
) -> dict[int, float]:
    weight, lost, error = module.weight, {}, 0.0
    try:
        for bits in BITS:
            how = Format(bits, group_size).fitted(weight.shape[-1])
            assert how is not None
            packed = rounded(weight, how, dtype)
            own = float(mx.square(packed - weight.astype(mx.float32)).sum().item())
            if bits in MEASURED:
                module.weight = packed.astype(weight.dtype)
                lost[bits], error = _divergence(model, before), own
                advance(1)
            else:
                lost[bits] = lost[MEASURED[-1]] * (own / error if error else 0.0)
    finally:
        module.weight = weight
    return lost


def _divergence(model: nn.Module, before: Reference) -> float:
    total = sum(float(kl_divergences(old, log_softmax(model, row)).sum().item()) for row, old in before)
    return total / sum(len(row.inputs) for row in before.rows)
