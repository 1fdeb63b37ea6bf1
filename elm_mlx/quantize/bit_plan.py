"""The plan of a quantization: which weights are packed, and how: all alike, or mixed within a budget of bits.

A mix is planned by sensitivity. One weight at a time is replaced by its packed values, and the divergence of the
model's output is measured, in few bits. In more, the divergence follows from them: close to its minimum it is quadratic
in the weight's error, so it falls as the square of the error does (Hassibi & Stork, 1993). Divergences add up to that
of a whole plan only roughly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.errors import InputError
from elm_mlx.model.config import BITS
from elm_mlx.model.ops import kl_divergences
from elm_mlx.model.stored_layers import StoredLayer
from elm_mlx.quantize.losses import Reference, TextRow, log_softmax
from elm_mlx.quantize.recipe import Format
from elm_mlx.reading import counted

STEPS = 50_000  # units that a budget is cut into
MEASURED = (2, 3, 4)  # bits whose divergence is measured
WINDOW = 128
TOKENS = 1024  # a few windows from all over the text


@dataclass(frozen=True)
class BitPlan:
    """The format of each weight.

    Attributes:
        formats: module -> its weight's format, in the model's order; what is not here stays as it is.
        bits_per_weight: of all that is stored, over the number of parameters; as mlx-lm counts it.
        predicted: the sum of the modules' own divergences, in nats; None where none were measured.
        notes: remarks for the user.
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
        return {
            kind: str(hows[0]) if len(set(hows)) == 1 else " ".join(str(how.bits) for how in hows) + " bits"
            for kind, hows in kinds.items()
        }


@dataclass(frozen=True)
class Weights:
    """The tensors of a model that is to be quantized.

    Attributes:
        tensors: all of them, by name.
        shapes: module -> shape of its weight, of those that have a quantized form, in the model's order.
        dtype: of scales, biases, and what stays as it is, as far as that is of the model's main type.
        parameters: their number, which stays when `tensors` are emptied.
    """

    tensors: dict[str, mx.array]
    shapes: dict[str, tuple[int, ...]]
    dtype: mx.Dtype
    parameters: int

    @classmethod
    def of(cls, model: nn.Module, tensors: dict[str, mx.array], dtype: mx.Dtype) -> Weights:
        """Raises InputError where no weight can be quantized."""
        leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
        names = [name for name, module in leaves if hasattr(module, "to_quantized") and f"{name}.weight" in tensors]
        if not names:
            raise InputError("the model has no weight that MLX could quantize")
        shapes = {name: tensors[f"{name}.weight"].shape for name in names}
        return cls(tensors, shapes, dtype, sum(int(tensor.size) for tensor in tensors.values()))

    def fit(self, how: Format) -> dict[str, Format]:
        """Module -> the format, in smaller groups where its rows want that; without those that divide into none."""
        found = {name: how.fit(shape[-1]) for name, shape in self.shapes.items()}
        return {name: fitted for name, fitted in found.items() if fitted is not None}

    def stored_bytes(self, formats: Mapping[str, Format]) -> int:
        main = main_dtype(self.tensors)
        total = 0
        for name, tensor in self.tensors.items():
            how = formats.get(name.removesuffix(".weight"))
            total += self.left_bytes(tensor, main) if how is None else how.nbytes(tensor.size, self.dtype)
        return total

    def left_bytes(self, tensor: mx.array, main: mx.Dtype) -> int:
        """Returns what a tensor takes that is not packed: in `dtype` if it is of the `main` type, or in its own."""
        return tensor.size * int((self.dtype if tensor.dtype == main else tensor.dtype).size)

    def bits_per_weight(self, formats: Mapping[str, Format]) -> float:
        return 8 * self.stored_bytes(formats) / self.parameters


def main_dtype(tensors: Mapping[str, mx.array]) -> mx.Dtype:
    """The type of the largest tensor: what the model is stored in. A few may be kept in another on purpose."""
    return max(tensors.values(), key=lambda tensor: tensor.size).dtype


def uniform(weights: Weights, how: Format) -> BitPlan:
    """Plans every weight in one format, in smaller groups where its rows want that."""
    formats = weights.fit(how)
    if not formats:
        raise InputError(f"no weight of the model has rows that divide into groups of {how.group_size}")
    smaller = [name for name, fitted in formats.items() if fitted != how]
    left = [name for name in weights.shapes if name not in formats]
    notes = []
    if smaller:
        notes.append(
            f"{counted(len(smaller), 'weight')} in smaller groups, into which rows divide; such as {smaller[0]}"
        )
    if left:
        notes.append(f"{counted(len(left), 'weight')} left as stored: rows divide into no groups; such as {left[0]}")
    return BitPlan(formats, weights.bits_per_weight(formats), notes=tuple(notes))


def check_budget(weights: Weights, group_size: int, bpw: float) -> None:
    """Raises InputError where `bpw` is below what the fewest bits take, or above what the model takes as it is."""
    lowest = weights.bits_per_weight(weights.fit(Format(BITS[0], group_size)))
    if bpw < lowest:
        raise InputError(
            f"--bpw {bpw:g}: {BITS[0]} bits everywhere are {lowest:.2f} bits a weight already, groups' scales and "
            "norms counted"
        )
    if bpw >= weights.bits_per_weight({}):
        raise InputError(f"--bpw {bpw:g}: the unquantized model takes no more")


def mix(weights: Weights, group_size: int, bpw: float, divergences: Mapping[str, Mapping[int, float]]) -> BitPlan:
    """Plans the bits of each weight that lose least within `bpw` bits a parameter of the model; see `check_budget`.

    Args:
        divergences: module -> bits -> the divergence from packing it alone, in nats a token.
    """
    fitted = {bits: weights.fit(Format(bits, group_size)) for bits in BITS}
    names = [name for name in weights.shapes if name in divergences]
    # The last choice is to leave a weight as it is.
    choices = [[*(fitted[bits][name] for bits in BITS), None] for name in names]
    tensors, main = [weights.tensors[f"{name}.weight"] for name in names], main_dtype(weights.tensors)
    costs = [
        [weights.left_bytes(each, main) if how is None else how.nbytes(each.size, weights.dtype) for how in of_module]
        for each, of_module in zip(tensors, choices, strict=True)
    ]
    losses = [[*(divergences[name][bits] for bits in BITS), 0.0] for name in names]
    rest = weights.stored_bytes({}) - sum(of_module[-1] for of_module in costs)
    chosen = allocate(costs, losses, int(bpw * weights.parameters / 8) - rest)
    assert chosen is not None, "the budget was not checked"
    found = {name: hows[choice] for name, hows, choice in zip(names, choices, chosen, strict=True)}
    formats = {name: how for name, how in found.items() if how is not None}
    predicted = sum(of_module[choice] for of_module, choice in zip(losses, chosen, strict=True))
    return BitPlan(formats, weights.bits_per_weight(formats), predicted)


def allocate(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """The choice of each item that fits the budget and loses least in sum; None where nothing fits.

    By the dynamic programme of the multiple-choice knapsack. Costs are counted in units of a `STEPS`th of what the
    budget leaves over the cheapest choices, rounded up: it is never exceeded, and the sum is the least but for what
    those roundings keep out. Takes items x choices x STEPS steps.

    Args:
        costs: of each item, of each of its choices.
        losses: in the same order.
        budget: upper limit of the chosen costs' sum.
    """
    least = [min(of_item) for of_item in costs]
    spare = budget - sum(least)
    if spare < 0:
        return None
    unit = max(1, -(-spare // STEPS))
    room = spare // unit
    units = [
        [-(-(cost - cheapest) // unit) for cost in of_item] for of_item, cheapest in zip(costs, least, strict=True)
    ]
    best = np.zeros(room + 1)  # the least loss of the items so far, within each room
    chosen = np.zeros((len(costs), room + 1), np.uint8)
    for i, loss in enumerate(losses):
        after = np.full(room + 1, np.inf)
        for choice, (needed, lost) in enumerate(zip(units[i], loss, strict=True)):
            if needed > room:
                continue
            total = best[: room + 1 - needed] + lost
            better = total < after[needed:]
            after[needed:][better] = total[better]
            chosen[i, needed:][better] = choice
        best = after
    choices = []
    for i in reversed(range(len(costs))):
        choices.append(int(chosen[i, room]))
        room -= units[i][choices[-1]]
    return choices[::-1]


def spread(rows: Sequence[TextRow], tokens: int = TOKENS) -> list[TextRow]:
    """Takes rows of the whole text, evenly apart, that hold about so many tokens."""
    full = [row for row in rows if len(row.inputs) == len(rows[0].inputs)]
    count = max(1, tokens // len(full[0].inputs))
    return list(rows) if len(full) <= count else [full[i * len(full) // count] for i in range(count)]


def sensitivities(
    model: nn.Module, before: Reference, weights: Weights, group_size: int, on_progress: OnProgress = no_progress
) -> dict[str, dict[int, float]]:
    """Module -> bits -> mean divergence in nats a token, where that module alone is packed in so many bits.

    Modules whose rows divide into no group are left out. `model` is as before when this returns.

    Args:
        before: the log-probabilities of `model` as it is.
        on_progress: called after each pass over the text.
    """
    leaves = dict(model.named_modules())
    names = list(weights.fit(Format(BITS[0], group_size)))
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    done, total = 0, len(names) * len(MEASURED)
    for name, lost in found.items():
        module = leaves[name]
        weight, error = module.weight, 0.0
        wide = weight.astype(mx.float32) if isinstance(module, StoredLayer) else weight  # as it is computed with
        try:
            for bits in BITS:
                how = Format(bits, group_size).fit(weight.shape[-1])
                assert how is not None
                packed = how.round_trip(wide, weights.dtype)
                own = float(mx.square(packed - wide.astype(mx.float32)).sum().item())
                if bits in MEASURED:
                    module.weight = packed.astype(wide.dtype)
                    lost[bits], error = _divergence(model, before), own
                    done += 1
                    on_progress("sensitivity", done, total)
                else:
                    lost[bits] = lost[MEASURED[-1]] * (own / error if error else 0.0)
        finally:
            module.weight = weight
    return found


def _divergence(model: nn.Module, before: Reference) -> float:
    total = sum(float(kl_divergences(old, log_softmax(model, row)).sum().item()) for row, old in before)
    return total / before.positions
