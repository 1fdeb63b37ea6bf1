"""The recipe of a pretraining run, in sections, with the paper's values and some for small texts as presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from elm_mlx.data.filters import Filters
from elm_mlx.data.stream import Reading
from elm_mlx.data.text_sources import TextSource
from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS, ModelConfig
from elm_mlx.train.loop_settings import OnNan, OptimizerName, Schedule, ScheduleShape, Settings, check_counts
from elm_mlx.train.settings import DTypeName, TrackerName

# CoreNet, projects/openelm/pretraining_configs
_LEARNING_RATES = {"OpenELM-270M": 5.3e-3, "OpenELM-450M": 3.9e-3, "OpenELM-1_1B": 2.4e-3, "OpenELM-3B": 1.2e-3}
_ROWS = 2048  # sequences of an update: 4M tokens
_MOST_WARMUP = 5_000  # updates, as in CoreNet's configs
_WINDOW = 1 << 22  # tokens that are shuffled with one another
SMALL = "small"


@dataclass(frozen=True)
class Shape:
    """The network. Heads and FFN widths grow from the first layer to the last (paper, section 2.1).

    Args:
        num_layers: layers.
        model_dim: width of the residual stream.
        head_dim: width of a head.
        num_gqa_groups: query heads that share a key and value head.
        qkv_multipliers: width of the heads as a share of model_dim, in the first and the last layer; one number for a
            uniform model.
        ffn_multipliers: width of the FFN, likewise.
        ffn_dim_divisor: FFN widths are multiples of this.
        context: the most tokens that the model is to read.
        share_input_output_layers: whether the head is the embedding.
    """

    num_layers: int
    model_dim: int
    head_dim: int
    num_gqa_groups: int = 4
    qkv_multipliers: tuple[float, ...] = (0.5, 1.0)
    ffn_multipliers: tuple[float, ...] = (0.5, 4.0)
    ffn_dim_divisor: int = 256
    context: int = 2048
    share_input_output_layers: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_layers", "model_dim", "head_dim", "num_gqa_groups", "ffn_dim_divisor", "context")
        for name in ("qkv_multipliers", "ffn_multipliers"):
            values = getattr(self, name)
            if len(values) not in (1, 2) or not all(0 <= value < math.inf for value in values):
                raise InputError(f"{name} are one or two numbers from 0 on, not {values}")

    def config(self, vocab_size: int, bos_id: int, eos_id: int) -> ModelConfig:
        """Raises InputError where the figures make no model."""
        return ModelConfig.scaled(
            vocab_size=vocab_size, num_layers=self.num_layers, model_dim=self.model_dim, head_dim=self.head_dim,
            num_gqa_groups=self.num_gqa_groups, qkv_multipliers=_one_or_two(self.qkv_multipliers),
            ffn_multipliers=_one_or_two(self.ffn_multipliers), ffn_dim_divisor=self.ffn_dim_divisor,
            max_context_length=self.context, rope_max_length=2 * self.context, bos_token_id=bos_id,
            eos_token_id=eos_id, share_input_output_layers=self.share_input_output_layers,
        )  # fmt: skip


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, its learning rate and the loss: how parameters are updated.

    Args:
        lr: the highest learning rate.
        steps: updates.
        extend: updates to add to a run that has ended, on resuming it; the learning rate begins anew with each of them.
        warmup: updates in which the learning rate rises (default: a tenth of steps, at most 5000).
        warmup_from: where it begins.
        shape: cosine, linear or constant after that.
        end: the share of lr that is left at the end.
        name: adamw, or adafactor, which needs less memory.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: on matrices, never on norms.
        clip: the limit on the gradients' norm; 0 for none.
        z_loss: weight of the squared log-partition, which keeps logits from drifting; 0 for none.
    """

    lr: float
    steps: int = 350_000
    extend: tuple[int, ...] = ()
    warmup: int | None = None
    warmup_from: float = 1e-6
    shape: ScheduleShape = "cosine"
    end: float = 0.1
    name: OptimizerName = "adamw"
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    z_loss: float = 1e-4

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise InputError(f"betas are two numbers, not {len(self.betas)}")

    def warmup_steps(self) -> int:
        """Returns the updates of rising learning rate: `warmup`, or the default where that is more than `steps`."""
        fits = self.warmup is not None and self.warmup <= self.steps
        return self.warmup if fits and self.warmup is not None else min(_MOST_WARMUP, self.steps // 10)


@dataclass(frozen=True)
class RunSettings:
    """The run: how much is computed at a time, and which checkpoints are kept.

    Args:
        batch_size: sequences of a batch, in one process.
        accumulate: batches to an update.
        compute_dtype: float32, bfloat16 (default: bfloat16 on a GPU, float32 on a CPU).
        grad_checkpoint: compute layers again in the backward pass: less memory, slower.
        seed: of the weights and the order of the data.
        eval_every: updates between validations.
        save_every: updates between checkpoints.
        keep: checkpoints that are kept: what `average` averages.
        on_nan: at a NaN loss or a spike: stop, or skip the update.
        patience: validations in a row without a lower loss that end the run (default: it goes to its end).
        steps_per_report: updates between lines in the terminal (default: a bar, or a line every few seconds).
        report_to: programs that get the metrics too: tensorboard, wandb.
    """

    batch_size: int = 16
    accumulate: int = _ROWS // 16
    compute_dtype: DTypeName | None = None
    grad_checkpoint: bool = False
    seed: int = 0
    eval_every: int = 1_000
    save_every: int = 5_000
    keep: int = 5
    on_nan: OnNan = "stop"
    patience: int | None = None
    steps_per_report: int | None = None
    report_to: tuple[TrackerName, ...] = ()

    def __post_init__(self) -> None:
        check_counts(self, "patience", "steps_per_report")


@dataclass(frozen=True)
class Data:
    """The texts, and how they are read.

    Args:
        sequence_length: tokens of a row; documents are packed end to end.
        window: tokens that are shuffled with one another, and so are read before the first update (default: 4194304,
            or as many as the run trains on where that is less).
        segments: let attention keep to a document; otherwise a row is one text, as in the paper.
        shards: streams that documents are dealt to; a multiple of the number of processes, which is the default.
        workers: processes that filter and tokenize; 0 to do it in the training process.
        max_bad: records that cannot be read before the run stops.
        max_broken: files that cannot be read before the run stops.
        validation: a file of texts that are not trained on.
        validation_rows: rows of it that count, from its beginning.
        sources: the mixture.
    """

    sources: tuple[TextSource, ...]
    sequence_length: int = 2048
    window: int | None = None
    segments: bool = False
    shards: int | None = None
    workers: int = 1
    max_bad: int = 100
    max_broken: int = 0
    validation: str | None = None
    validation_rows: int = 256


class TextRecipe:
    """A recipe of a run on raw text: what pretraining and KV prediction have in common."""

    data: Data
    optimizer: Optimizer
    filters: Filters
    run: RunSettings

    def loop(self) -> Settings:
        """Returns the settings of the training loop. Raises InputError where a value is out of its range."""
        asked, run = self.optimizer, self.run
        return Settings(
            Schedule(
                asked.lr, asked.steps, asked.warmup_steps(), asked.shape, asked.end, asked.warmup_from, asked.extend
            ),
            optimizer=asked.name, betas=(asked.betas[0], asked.betas[1]), eps=asked.eps,
            weight_decay=asked.weight_decay, z_loss=asked.z_loss, clip=asked.clip or None,
            accumulate=run.accumulate, seed=run.seed, grad_checkpoint=run.grad_checkpoint, on_nan=run.on_nan,
            eval_every=run.eval_every, save_every=run.save_every, keep=run.keep, patience=run.patience,
        )  # fmt: skip

    def tokens_per_update(self, world: int = 1) -> int:
        """Returns the tokens of an update of all of `world` processes together."""
        return self.run.batch_size * self.run.accumulate * world * self.data.sequence_length

    def reading(self, world: int = 1) -> Reading:
        """Returns how each of `world` processes reads the mixture."""
        data, run = self.data, self.run
        window = data.window
        if window is None:
            window = min(_WINDOW, self.optimizer.steps * self.tokens_per_update(world))
        return Reading(
            run.batch_size, data.sequence_length, run.seed, window, data.segments, data.shards, data.workers,
            data.max_bad, data.max_broken,
        )  # fmt: skip


@dataclass(frozen=True)
class Recipe(TextRecipe):
    """A pretraining run.

    Args:
        tokenizer: a SentencePiece model, such as Llama 2's or one of `elm-mlx train-tokenizer`.
    """

    tokenizer: str
    model: Shape
    data: Data
    optimizer: Optimizer
    filters: Filters = field(default_factory=Filters)
    run: RunSettings = field(default_factory=RunSettings)


def _one_or_two(multipliers: tuple[float, ...]) -> float | tuple[float, ...]:
    return multipliers[0] if len(multipliers) == 1 else multipliers


def preset(name: str, text: str = "data/*.jsonl.gz") -> Recipe:
    """Returns the paper's recipe for one of its models, or `SMALL`, for minutes on a laptop with a few megabytes.

    Args:
        text: the path of what is trained on.

    Raises:
        InputError: there is no such preset.
    """
    sources = (TextSource(text),)
    if name == SMALL:
        return Recipe(
            "tokenizer.model",
            Shape(8, 192, 32, num_gqa_groups=2, ffn_dim_divisor=64, context=512),
            Data(sources, sequence_length=512, window=1 << 18, validation_rows=64),
            Optimizer(4e-3, steps=1_000),
            run=RunSettings(batch_size=4, accumulate=1, eval_every=100, save_every=100),
        )
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is not one of {', '.join((SMALL, *PRESETS))}")
    return Recipe("tokenizer.model", Shape(*PRESETS[name]), Data(sources), Optimizer(_LEARNING_RATES[name]))
