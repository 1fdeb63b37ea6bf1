"""The settings of a run of `lora`, `dpo` or `grpo`, as it is asked for.

A field's type, default and choices stand in its class, and what it means under `Args:` of the class's docstring. From
these come the options of the command line, their help, what `--config` and run.json hold, and, by `Settings.identity`,
what must not change when a run is resumed. Nothing heavy is imported: `--help` reads this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from elm_mlx.errors import InputError
from elm_mlx.reading import counted, expanded
from elm_mlx.train.loop_settings import OnNan, OptimizerName, Schedule, ScheduleShape, Settings, check_choice
from elm_mlx.train.setting_fields import Setting, abouts, described, flat

DTypeName = Literal["float32", "float16", "bfloat16"]
RecordFormat = Literal["completion", "messages", "sharegpt", "chatgpt", "alpaca", "text"]
PreferenceLoss = Literal["sigmoid", "hinge", "ipo", "orpo"]
Advantage = Literal["mean", "std"]
TrackerName = Literal["tensorboard", "wandb"]

_MOST_WARMUP = 100  # updates
_COUNT, _POSITIVE = "a whole number from 1", "a number above 0"


@dataclass(frozen=True)
class DataSettings:
    """Settings of how examples are read and put into rows.

    Args:
        format: layout of the records. (default: by each record's keys)
        weight: share of the tokens of each --data, in relation to the others' weights; can be repeated. (default: each
            example once)
        columns: columns or fields to take, as prompt=question,completion=answer. (default: by name)
        template: chat template: openelm-instruct, none, or a file of Jinja text. (default: the model's own)
        max_seq_length: tokens of an example, at most. (default: the model's context, of other families at most 2048)
        truncate: truncate longer examples.
        train_on_prompt: train on every token, not on answers alone.
        skip_bad: leave bad records out; they are still named.
        batch_size: rows of a batch.
        pack: put several examples in a row, none of which sees another.
    """

    format: RecordFormat | None = None
    weight: tuple[float, ...] | None = None
    columns: tuple[str, ...] | None = None
    template: str | None = None
    max_seq_length: int | None = None
    truncate: bool = False
    train_on_prompt: bool = False
    skip_bad: bool = False
    batch_size: int = 4
    pack: bool = True

    def __post_init__(self) -> None:
        _check_options(self, _COUNT, lambda value: value >= 1, "batch_size")


@dataclass(frozen=True)
class RolloutSettings(DataSettings):
    """Settings of what the model is asked, and of its answers.

    Args:
        task: a built-in task, or FILE.py with problem(difficulty, seed) and judge(problem, answer). (no default)
        difficulty: difficulty of the problems, as 2 or 1-4. (default: all that the task has)
        problems: problems of an update.
        answers: answers to each problem.
        max_tokens: tokens of an answer, at most; one that is cut off is not trained on.
        updates_per_batch: updates by the same answers; with more than 1, probabilities are kept from moving far.
        advantage: a reward less its problem's mean, or that divided by the standard deviation (std).
        eval_problems: held-out problems of a validation.
        batch_size: answers in a forward and backward pass: fewer take less memory.
    """

    task: str = ""
    difficulty: str | None = None
    problems: int = 16
    answers: int = 8
    max_tokens: int = 128
    updates_per_batch: int = 1
    advantage: Advantage = "mean"
    eval_problems: int = 64
    batch_size: int = 32

    def __post_init__(self) -> None:
        counts = ("problems", "max_tokens", "updates_per_batch", "eval_problems", "batch_size")
        _check_options(self, _COUNT, lambda value: value >= 1, *counts)
        check_choice("--advantage", self.advantage, Advantage)
        _check_options(self, "a whole number from 2, for answers are compared,", lambda value: value >= 2, "answers")


@dataclass(frozen=True)
class MethodSettings:
    """Settings of which parameters are trained.

    Args:
        rank: rank of the adapters: one, one a layer (4,4,8), or by module (qkv_proj=8,ffn.*=4).
        alpha: adapters are scaled by alpha / rank. (default: twice the rank)
        dropout: dropout on the adapters' inputs.
        target: a module to adapt, by name or pattern; can be repeated. (default: all linears of layers)
        num_layers: last layers to adapt; -1 for all.
        dora: DoRA: train the norms of the weights' rows too.
        rslora: scale by alpha / sqrt(rank).
        full: train all the model's weights, without an adapter.
        from_adapter: begin with the adapter in this directory, and its ranks and scale. (default: with a new one)
    """

    rank: str = "8"
    alpha: float | None = None
    dropout: float = 0.0
    target: tuple[str, ...] | None = None
    num_layers: int = -1
    dora: bool = False
    rslora: bool = False
    full: bool = False
    from_adapter: Path | None = None

    def __post_init__(self) -> None:
        _check_options(self, "a number from 0 to below 1", lambda value: 0 <= value < 1, "dropout")
        _check_options(self, "a number from 0", lambda value: 0 <= value < math.inf, "alpha")
        _check_options(
            self, "a whole number from 1, or -1 for all,", lambda value: value == -1 or value >= 1, "num_layers"
        )
        if self.from_adapter is None:
            return
        new = replace(MethodSettings(), dropout=self.dropout, full=self.full, from_adapter=None)
        other = next((item.name for item in fields(self) if item.name != "from_adapter"
                      and getattr(self, item.name) != getattr(new, item.name)), None)  # fmt: skip
        if other is not None:
            raise InputError(f"--{other.replace('_', '-')}: --from begins with an adapter, which has its own")

    def ranks(self) -> int | list[int] | dict[str, int]:
        """Returns `rank` as `adapters.plan` takes it. Raises InputError."""
        items = [item.strip() for item in self.rank.split(",")]
        try:
            if "=" in self.rank:
                pairs = (item.rsplit("=", 1) for item in items)
                return {name.strip(): int(number) for name, number in pairs}
            numbers = [int(item) for item in items]
        except ValueError:
            raise InputError(f"--rank {self.rank}: needs a number, numbers like 4,4,8, or qkv_proj=8,ffn.*=4") from None
        return numbers if len(numbers) > 1 else numbers[0]


@dataclass(frozen=True)
class LossSettings:
    """Settings of the loss of pairs.

    Args:
        loss: loss of a pair: sigmoid is DPO's; orpo needs no reference model.
        beta: strength of the pull towards the reference model.
    """

    loss: PreferenceLoss = "sigmoid"
    beta: float = 0.1

    def __post_init__(self) -> None:
        _check_options(self, _POSITIVE, lambda value: 0 < value < math.inf, "beta")


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of updates.

    Args:
        iters: updates. (default: as many as --epochs take)
        epochs: passes over the training data.
        extend: updates to add to a run that has ended, with --resume; the rate begins anew with them. (default: none)
        grad_accumulation_steps: batches to an update.
        learning_rate: the peak learning rate.
        lr_schedule: learning rate after warm-up; cosine and linear fall to a tenth.
        warmup: updates of rising learning rate; below 1, a share of all. (default: a tenth, at most 100)
        optimizer: AdamW, or Adafactor, which needs less memory.
        weight_decay: weight decay of matrices; norms have none.
        clip: limit on the gradients' norm; 0 for none.
        on_nan: at a NaN loss or a spike: stop the run, or skip the update.
    """

    iters: int | None = None
    epochs: float = 3.0
    extend: tuple[int, ...] = ()
    grad_accumulation_steps: int = 1
    learning_rate: float | None = None
    lr_schedule: ScheduleShape = "cosine"
    warmup: float | None = None
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    on_nan: OnNan = "stop"

    def __post_init__(self) -> None:
        _check_options(self, _COUNT, lambda value: value >= 1, "iters", "extend", "grad_accumulation_steps")
        _check_options(self, _POSITIVE, lambda value: 0 < value < math.inf, "epochs", "learning_rate")
        _check_options(self, "a number from 0", lambda value: 0 <= value < math.inf, "weight_decay", "warmup")
        _check_options(self, "a number from 0", lambda value: value >= 0, "clip")

    def warmup_steps(self, steps: int) -> int:
        """Returns how many of so many updates have a rising learning rate. Raises InputError."""
        if self.warmup is None:
            return min(_MOST_WARMUP, steps // 10)
        if self.warmup > max(1, steps):
            raise InputError(f"--warmup {self.warmup:g}: does not fit in {counted(steps, 'update')}")
        return round(self.warmup if self.warmup >= 1 else self.warmup * steps)


@dataclass(frozen=True)
class ComputationSettings:
    """Settings of how the model is computed.

    Args:
        compute_dtype: type to compute in. (default: as stored on a GPU, float32 on a CPU)
        grad_checkpoint: compute layers again in the backward pass: less memory, slower.
        seed: seed of the adapters' initial values, the order of examples and dropout.
    """

    compute_dtype: DTypeName | None = None
    grad_checkpoint: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_options(self, "a whole number from 0 to 2**64 - 1", lambda value: 0 <= value < 1 << 64, "seed")


@dataclass(frozen=True)
class CheckpointsSettings:
    """Settings of validations and checkpoints.

    Args:
        val_batches: batches of a validation; -1 for all, 0 for none.
        test_batches: batches of the test at the end, where the data have that split; -1 for all, 0 for none.
        steps_per_eval: updates between validations.
        save_every: updates between checkpoints.
        keep: checkpoints that are kept, beside the best.
        patience: validations in a row without a lower loss that end the run. (default: it goes to its end)
    """

    val_batches: int = -1
    test_batches: int = -1
    steps_per_eval: int = 200
    save_every: int = 100
    keep: int = 2
    patience: int | None = None

    def __post_init__(self) -> None:
        _check_options(self, _COUNT, lambda value: value >= 1, "steps_per_eval", "save_every", "keep", "patience")
        needed = "a whole number from 0, or -1 for all,"
        _check_options(self, needed, lambda value: value >= -1, "val_batches", "test_batches")


@dataclass(frozen=True)
class ReportsSettings:
    """Settings of how a run is watched.

    Args:
        steps_per_report: updates between lines in the terminal. (default: a bar, or a line every few seconds)
        report_to: a program that gets the metrics too; can be repeated. (default: none)
    """

    steps_per_report: int | None = None
    report_to: tuple[TrackerName, ...] = ()

    def __post_init__(self) -> None:
        _check_options(self, _COUNT, lambda value: value >= 1, "steps_per_report")
        for name in self.report_to:
            check_choice("--report-to", name, TrackerName)


@dataclass(frozen=True)
class LoraSettings:
    """A run of `lora`.

    Args:
        model: a model directory.
        data: a data file, a directory with train, valid and test, or hub:OWNER/NAME; can be repeated. (no default)
        out: the directory of the run and its adapter. (no default)
    """

    model: Path
    data: tuple[str, ...]
    out: Path
    examples: DataSettings = field(default_factory=DataSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    computation: ComputationSettings = field(default_factory=ComputationSettings)
    checkpoints: CheckpointsSettings = field(default_factory=CheckpointsSettings)
    reports: ReportsSettings = field(default_factory=ReportsSettings)

    rates: ClassVar[tuple[float, float]] = (2e-4, 2e-5)  # of an adapter, and of all weights
    spike: ClassVar[float | None] = 3.0
    last_rate: ClassVar[float] = 0.1  # as a share of the peak
    needed: ClassVar[tuple[str, ...]] = ("model", "data", "out")
    unused: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[Mapping[str, Any]] = {}  # of settings that other commands have others for

    @classmethod
    def options(cls) -> dict[str, Setting]:
        """Returns the settings that the command takes, by name."""
        own = abouts(cls)
        return {
            name: replace(each, default=cls.defaults.get(name, each.default), about=own.get(name, each.about))
            for name, each in described(cls).items() if name not in cls.unused
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Returns the settings as JSON has them; a file for `--config` may hold them."""
        from elm_mlx.data.hub_data import PREFIX

        chosen = {name: value for name, value in flat(self).items() if value is not None}
        paths = {name: str(chosen[name].resolve()) for name in ("model", "from_adapter") if name in chosen}
        if not self.model.exists():
            paths["model"] = str(self.model)  # a name on the hub
        data = [name if name.startswith(PREFIX) else str(expanded(name).resolve()) for name in self.data]
        chosen |= paths | {"out": str(self.out), "data": data[0] if len(data) == 1 else data}
        return {name: value for name, value in chosen.items() if name not in self.unused}

    def loop(self, steps: int) -> Settings:
        """Returns the settings of a training loop of so many updates."""
        asked, computation, checkpoints = self.optimizer, self.computation, self.checkpoints
        rate = self.rates[self.method.full] if asked.learning_rate is None else asked.learning_rate
        return Settings(
            Schedule(rate, steps, asked.warmup_steps(steps), asked.lr_schedule, self.last_rate, extend=asked.extend),
            optimizer=asked.optimizer, weight_decay=asked.weight_decay, clip=asked.clip or None,
            accumulate=asked.grad_accumulation_steps, seed=computation.seed,
            grad_checkpoint=computation.grad_checkpoint, spike=self.spike, on_nan=asked.on_nan,
            eval_every=checkpoints.steps_per_eval, save_every=checkpoints.save_every, keep=checkpoints.keep,
            patience=checkpoints.patience,
        )  # fmt: skip


@dataclass(frozen=True)
class DpoSettings(LoraSettings):
    """A run of `dpo`."""

    preference: LossSettings = field(default_factory=LossSettings)

    rates: ClassVar[tuple[float, float]] = (5e-5, 5e-6)
    spike: ClassVar[float | None] = None  # of nats a token; a pair's loss has no such scale
    unused: ClassVar[frozenset[str]] = frozenset({"format", "train_on_prompt", "dropout"})


@dataclass(frozen=True)
class GrpoSettings(LoraSettings):
    """A run of `grpo`.

    Args:
        iters: updates.
        lr_schedule: learning rate after warm-up; cosine and linear fall to 0.
        seed: seed of the problems, the answers and the adapters' initial values.
        patience: validations in a row without more right answers that end the run. (default: it goes to its end)
    """

    data: tuple[str, ...] = field(default=(), kw_only=True)
    examples: RolloutSettings = field(default_factory=RolloutSettings)

    rates: ClassVar[tuple[float, float]] = (5e-5, 5e-6)
    spike: ClassVar[float | None] = None
    last_rate: ClassVar[float] = 0.0
    needed: ClassVar[tuple[str, ...]] = ("model", "task", "out")
    unused: ClassVar[frozenset[str]] = frozenset({
        "data", "format", "weight", "columns", "max_seq_length", "truncate", "train_on_prompt", "skip_bad", "pack",
        "dropout", "epochs", "grad_accumulation_steps", "val_batches", "test_batches",
    })  # fmt: skip
    defaults: ClassVar[Mapping[str, Any]] = {"iters": 200, "steps_per_eval": 20}

    def record(self) -> dict[str, Any]:
        chosen = super().record()
        if self.examples.task.endswith(".py"):
            chosen["task"] = str(expanded(self.examples.task).resolve())
        return chosen


def _check_options(settings: Any, needed: str, fits: Callable[[float], bool], *names: str) -> None:
    """Raises InputError, by the option, where one of these fields' values, None excepted, does not fit."""
    for name in names:
        value = getattr(settings, name)
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and not fits(each):
                shown = f"{each:g}" if isinstance(each, float) else each
                raise InputError(f"--{name.replace('_', '-')} {shown}: {needed} is needed")
