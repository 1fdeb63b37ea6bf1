"""The memory that a run takes at its peak, estimated before it starts; and what helps where that may be too much.

What a step keeps for its backward pass follows from the model's figures: what each product, norm, rotation and gate
was given. The factors over that are measured, on MLX's CPU backend (`python benchmarks/memory.py`), where buffers are
handed out some operations ahead of their use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.model.config import Config
from elm_mlx.model.families import FamilyConfig
from elm_mlx.reading import byte_size
from elm_mlx.store.adapters import Adapter

_PROCESS = 110_000_000  # Python, MLX and what it compiles
_ACTIVATIONS = 1.45  # of what a block keeps
_OF_ONE_BLOCK, _BETWEEN_BLOCKS = 2.0, 5.0  # where blocks keep nothing: the widest one; with --grad-checkpoint, inputs
_LOGITS = 16  # buffers as large as a chunk's logits
_CHUNK_LOGITS, _LEAST_CHUNK = 1 << 20, 64  # as in loss.py, a test says
_HEAD_GRADIENTS = 2  # a trained head's, of the chunks so far and of the one being added
_FRAGMENTS = 1.12  # what the allocator loses of what comes and goes
_PAIRS = 1.5  # of the activations: beside them the reference is computed, and pairs are validated
_STATE_COPIES = 2.5  # of a Mamba's state after each token: before and after it has faded, some of it for a while
_STATES = {"adamw": 2.0, "adafactor": 0.05}  # values of the optimizer for each one trained
_UPDATE = 1.5  # copies of what is trained, while it is being replaced
_SURE = 2.0  # an estimate of so many times the machine's memory: MLX's CPU backend ends there without a word (SIGSEGV)
_LEAST_LENGTH = 128  # tokens of a row, below which it is not advised to go
# What can make a run smaller, as the options of `lora` and `dpo` say it, and as a recipe of `pretrain` does.
OPTIONS = {
    "grad_checkpoint": "--grad-checkpoint", "rows": "--batch-size {}", "length": "--max-seq-length {}",
    "layers": "--num-layers {}", "optimizer": "--optimizer {}", "full": "an adapter in place of --full",
}  # fmt: skip
RECIPE = {
    "grad_checkpoint": "run.grad_checkpoint=true", "rows": "run.batch_size={}", "length": "data.sequence_length={}",
    "optimizer": "optimizer.name={}",
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """The load of a run on a machine's memory.

    Args:
        weight_bytes: of a value of the model's weights, as they are held; below 2 where they stay quantized.
        value_bytes: of a value in the forward pass.
        trained: values that are trained, each held in 4 bytes.
        full: whether they are the model's own weights.
        pairs: whether rows hold pairs of answers.
        adapter_values: what adapters keep for each token beside that: see `adapter_values`.
        parts: of a batch that are computed at the same time, at most: see `device.most_parts`.
        accumulate: batches of an update.
        layers: the last ones, which the backward pass goes through; None for all.
        rows, length: of a batch, in one process.
        optimizer: "adamw" or "adafactor".
        grad_checkpoint: whether blocks are computed again in the backward pass.
        beside: a frozen model that the gradients go through too, held in `value_bytes`: the base of KV prediction.
    """

    config: Config
    weight_bytes: float
    value_bytes: int
    trained: int
    full: bool
    rows: int
    length: int
    optimizer: str = "adamw"
    grad_checkpoint: bool = False
    adapter_values: int = 0
    pairs: bool = False
    parts: int = 1
    accumulate: int = 1
    layers: int | None = None
    beside: Config | None = None


@dataclass(frozen=True)
class Estimate:
    """Bytes. `activations`, `gradients` and `update` never come together: the largest counts.

    Attributes:
        process: without any model.
        weights: of the model; of what is trained of it too.
        training: the optimizer state, and the sum of gradients where an update has several batches.
        activations: what a step keeps for its backward pass, the logits of one chunk, and the head's gradient.
        gradients: of all parts, whose backward pass has freed the activations.
        update: gradients, and what is new before the old is gone.
    """

    process: int
    weights: int
    training: int
    activations: int
    gradients: int
    update: int

    @property
    def total(self) -> int:
        return self.process + self.weights + self.training + max(self.activations, self.gradients, self.update)


def estimate(load: Load) -> Estimate:
    """Estimates the most memory that a run holds at once."""
    config, tokens = load.config, load.rows * load.length
    blocks = _kept(config) + ([] if load.beside is None else _kept(load.beside))
    first = 0 if load.layers is None else config.num_layers - load.layers
    ahead = _OF_ONE_BLOCK * max(blocks[:first], default=0)  # of blocks that keep nothing
    if load.grad_checkpoint:
        values = _OF_ONE_BLOCK * max(blocks) + _BETWEEN_BLOCKS * config.model_dim * len(blocks[first:])
    else:
        values = min(_ACTIVATIONS * sum(blocks), _ACTIVATIONS * sum(blocks[first:]) + ahead) + load.adapter_values
    chunk = min(tokens, max(_LEAST_CHUNK, _CHUNK_LOGITS // config.vocab_size)) * config.vocab_size
    parts = min(load.parts, load.rows)
    head = _HEAD_GRADIENTS * parts * config.vocab_size * config.model_dim if load.full else 0
    summed = load.accumulate > 1
    activations = values * tokens * load.value_bytes + 4 * _LOGITS * chunk
    if load.pairs:
        activations *= _PAIRS
    model = 4 * config.parameters if load.full else load.weight_bytes * config.parameters + 4 * load.trained
    model += 0 if load.beside is None else load.value_bytes * load.beside.parameters
    return Estimate(
        process=_PROCESS,
        weights=round(model),
        training=round(4 * load.trained * (summed + _STATES[load.optimizer])),
        activations=round(_FRAGMENTS * activations + 4 * head),
        gradients=4 * load.trained * parts,
        update=round(4 * load.trained * (_UPDATE + (not summed))),
    )


def adapter_values(adapter: Adapter, config: Config) -> int:
    """Values for each token that adapters keep: their narrow product, and with dropout its mask and what it leaves."""
    shapes = config.shapes()
    widths = [shapes[f"{module}.weight"][1] for module in adapter.ranks]
    return 2 * sum(adapter.ranks.values()) + (2 * sum(widths) if adapter.dropout else 0)


def check(
    load: Load, available: int | None, memory: int | None, names: Mapping[str, str] = OPTIONS, force: bool = False
) -> str | None:
    """Returns a warning where a run may not fit into `available` bytes, with what would help, and by how much.

    Args:
        memory: bytes of the machine. It and `available` are None where the system does not say.
        names: the options' names, as in `OPTIONS`; what has none here is not advised.
        force: warn of what cannot be, too.

    Raises:
        InputError: weights, gradients and optimizer state alone take more than `memory`, or all that the run holds
            more than twice as much, and no `force`.
    """
    found = estimate(load)
    least = found.weights + found.training + 4 * load.trained
    if available is None or found.total <= available:
        return None
    turned = [(name, estimate(changed).total) for name, changed in _knobs(load, names, available)]
    turned = sorted((each for each in turned if each[1] < 0.98 * found.total), key=lambda each: each[1])
    helps = "; ".join(f"{name} would take {byte_size(total)}" for name, total in turned) or "a smaller model is needed"
    if memory is not None and not force:
        has = f"and the machine has {byte_size(memory)}; {helps}; --force tries it all the same"
        if least > memory:
            raise InputError(f"weights, gradients and the optimizer's state alone take {byte_size(least)}, {has}")
        if found.total > _SURE * memory:
            raise InputError(f"the run takes about {byte_size(found.total)}, {has}")
    return f"about {byte_size(found.total)} may be too much for the {byte_size(available)} that are free: {helps}"


def _knobs(load: Load, names: Mapping[str, str], available: int) -> list[tuple[str, Load]]:
    """The options that can make a run smaller, each turned by itself, as far as need be; and their names."""
    turned: dict[str, tuple[object, Load]] = {}
    if not load.grad_checkpoint:
        turned["grad_checkpoint"] = None, replace(load, grad_checkpoint=True)
    for name, least in (("rows", 1), ("length", _LEAST_LENGTH), ("layers", 1)):
        before = value = int(getattr(load, name) or load.config.num_layers)
        if name == "layers" and load.full:
            continue
        while value // 2 >= least:
            value //= 2
            changed: dict[str, Any] = {name: value}
            if name == "layers":  # with which the adapters shrink
                changed |= {each: getattr(load, each) * value // before for each in ("trained", "adapter_values")}
            turned[name] = value, replace(load, **changed)
            if estimate(turned[name][1]).total <= available:
                break
    if load.optimizer == "adamw":
        turned["optimizer"] = "adafactor", replace(load, optimizer="adafactor")
    if load.full:
        turned["full"] = None, replace(load, full=False, trained=load.config.parameters // 100)
    return [(names[name].format(value), smaller) for name, (value, smaller) in turned.items() if name in names]


def _kept(config: Config) -> list[int]:
    """Values that each block keeps for each token."""
    if isinstance(config, FamilyConfig):
        return _kept_by_other(config)
    kept = []
    for heads, kv_heads, ffn_dim in zip(config.num_query_heads, config.num_kv_heads, config.ffn_dims, strict=True):
        projected = (heads + 2 * kv_heads) * config.head_dim
        rotated = 2 * (heads + kv_heads) * config.head_dim  # normed, and turned
        attended = 2 * heads * config.head_dim
        gated = (3 if config.ffn_with_glu else 2) * ffn_dim
        kept.append(4 * config.model_dim + projected + rotated + attended + gated)
    return kept


def _kept_by_other(config: FamilyConfig) -> list[int]:
    """The same of another family, by the widths of its linears: their outputs, and the inputs of some."""
    shapes, start = config.shapes(), f"{config.layers_prefix}."
    projected, made = [0] * config.num_layers, [0] * config.num_layers
    for module in config.modules():
        if module.startswith(start):
            layer, (rows, columns) = int(module.removeprefix(start).split(".")[0]), shapes[f"{module}.weight"][:2]
            projected[layer] += rows
            made[layer] += columns if module.endswith(("o_proj", "down_proj")) else 0
    if config.family.positions:  # attention's answer and the gated product, beside what both norms leave
        return [2 * config.model_dim + both for both in map(sum, zip(projected, made, strict=True))]
    state = int(config.values["intermediate_size"]) * int(config.values["state_size"])
    return [4 * config.model_dim + 2 * rows + round(_STATE_COPIES * state) for rows in projected]
