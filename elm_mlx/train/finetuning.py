"""Fine-tuning from paths: a model directory and data in, a run's directory with an adapter out.

Knows which parts make a run: tokenizer and template, examples and batches, adapter, model, loop. All that can be
wrong with any of them is found before the weights are read. Knows nothing of flags, and nothing of how it is shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx

from elm_mlx import device, reading
from elm_mlx.callbacks import SILENT, TrainingCallback
from elm_mlx.data import batches as batching
from elm_mlx.data import examples
from elm_mlx.data.batches import Batch, Batches
from elm_mlx.data.examples import Prepared
from elm_mlx.errors import InputError
from elm_mlx.model import roofline
from elm_mlx.model.config import Config, read_config
from elm_mlx.model.families import FamilyConfig
from elm_mlx.model.network import Model
from elm_mlx.safetensors_file import fingerprint
from elm_mlx.store import adapters, loading
from elm_mlx.store.adapters import Adapter
from elm_mlx.text import chat_template
from elm_mlx.text.chat_template import Template
from elm_mlx.text.tokenizer import Tokenizer, read_vocabulary
from elm_mlx.train import checkpoint, memory
from elm_mlx.train.checkpoint import Identity
from elm_mlx.train.loss import Objective
from elm_mlx.train.run import Result, train
from elm_mlx.train.settings import LoraSettings, MethodSettings
from elm_mlx.train.throughput import Meter

_GRAIN = 32  # rows are as long as a multiple of this


class Finetuning:
    """A run that is checked, and not begun: its weights are not read yet. To be closed, which gives `out` free.

    Attributes:
        asked: the settings that it is made by.
        settings: those of the loop.
        adapter: what is trained.
        splits: the examples, "train" first.
        batches: of the training examples.
        trainable: how many parameters are trained.
        computation: what the model is computed in.
        row_length: positions of a row.
        batch_size: rows of a batch, of one process.
        world: processes that train together.
        leads: whether this is the one that writes and speaks.

    Raises:
        InputError: the model, the data or the method is not as it must be; or one that `out` says.
        ElmError: another process writes to `out`.
    """

    command, unit = "lora", "example"

    def __init__(self, asked: LoraSettings, *, resume: bool = False) -> None:
        self.asked, self.out = asked, asked.out
        _check_place(self.out)
        with ExitStack() as held:
            held.enter_context(checkpoint.hold(self.out))
            _check_runs(self.out, resume)
            self._check()
            self._held = held.pop_all()

    def __enter__(self) -> Finetuning:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.close()

    def _check(self) -> None:
        """Read all that decides the run, but for the weights."""
        asked = self.asked
        self.path = reading.expanded(asked.model)
        self.config = read_config(self.path, with_tokenizer=True)
        self._packed = asked.examples.pack and self._keeps_apart()
        weights = fingerprint(self.path, checkpoint.trained_model(self.out))
        self.adapter = replace(_adapter(asked.method, self.config), model_sha256=weights)
        self.computation = loading.computation(self.path, self.config, asked.computation.compute_dtype)
        self.trainable = sum(_sizes(self.adapter, self.config))
        self.splits = self._prepared()
        if asked.checkpoints.val_batches == 0:
            self.splits.pop("valid", None)
        group = mx.distributed.init()
        self.world, self.leads = group.size(), bool(group.rank() == 0)
        self.batch_size = asked.examples.batch_size
        self.row_length = self._row_length(self.splits["train"])
        self.batches = self._batches(self.splits["train"], asked.computation.seed)
        self._validation = self._batches(self.splits["valid"]) if "valid" in self.splits else None
        self.settings = asked.loop(self._steps())

    @property
    def notes(self) -> list[str]:
        """What is done otherwise than asked, because the model's family cannot do it."""
        if self._packed == self.asked.examples.pack:
            return []
        return ["one example in each row: this family would read them as one text"]

    def count(self, split: str = "train") -> int:
        """What a split has of what `unit` names."""
        return len(self.splits[split].examples)

    def _steps(self) -> int:
        """Updates that are asked for, or that the epochs take."""
        asked = self.asked.optimizer
        if asked.iters is not None:
            return asked.iters
        if not asked.epochs > 0:
            raise InputError(f"--epochs {asked.epochs:g}: must be above 0")
        if asked.grad_accumulation_steps < 1:
            raise InputError(f"accumulate must be at least 1, not {asked.grad_accumulation_steps}")
        return max(1, round(asked.epochs * self.batches.steps() / asked.grad_accumulation_steps))

    def _keeps_apart(self) -> bool:
        """Whether several texts can share a row."""
        return not isinstance(self.config, FamilyConfig) or self.config.family.positions

    def load(self) -> memory.Load:
        """What the run asks of the machine."""
        value = int(self.computation.dtype.size)
        packed = self.config.quantization is not None and not self.computation.unpack
        stored = int(self.config.quantization["bits"]) / 8 if packed and self.config.quantization else value
        return memory.Load(
            self.config, stored, value, self.trainable, self.adapter.kind == "full", self.batch_size,
            self.row_length, self.settings.optimizer, self.settings.grad_checkpoint,
            memory.adapter_values(self.adapter, self.config), parts=device.most_parts(4 * self.trainable),
            accumulate=self.settings.accumulate, layers=self._passed(),
        )  # fmt: skip

    def _passed(self) -> int | None:
        """How many of the last layers the way back passes; None where it is all."""
        trained = [roofline.layer_of(f"{module}.") for module in self.adapter.ranks]
        layers = [layer for layer in trained if layer is not None]
        return None if len(layers) < len(trained) or not layers else self.config.num_layers - min(layers)

    def train(self, *, resume: bool = False, callback: TrainingCallback = SILENT) -> Result:
        """Train, and leave the adapter in `out`: the best by validation, or the last where none is below the base.

        Raises:
            InputError, ElmError, KeyboardInterrupt: as `loop.train`.
        """
        callback.progress("reading the model")
        model, dtype = self._open()
        objective = self._objective(model, dtype, callback)
        result = train(
            model, self.batches, self._validations if self._validation else None, self.settings, self.out,
            self._identity(),
            resume=resume, compute_dtype=dtype, objective=objective, rehearsal=next(self.batches.once()),
            meter=Meter(self.config, self.adapter, self.settings.grad_checkpoint),
            callback=callback, about=self._about(),
            export=None if self.adapter.kind == "full" else lambda path: self._save(path, model),
        )  # fmt: skip
        if self.leads:
            self._finish(model, result)
        return result

    def _about(self) -> dict[str, Any]:
        return {
            "command": self.command, "settings": self.asked.record(), "trained": self.adapter.describe(),
            "trainable": self.trainable, "parameters": self.config.parameters, "processes": self.world,
        }  # fmt: skip

    def _open(self) -> tuple[Model, mx.Dtype | None]:
        """The model with what is trained in float32, and what that is to be rounded to where it is used."""
        how = self.computation.dtype
        full = self.adapter.kind == "full"
        name = next(name for name, dtype in device.DTYPES.items() if dtype == (mx.float32 if full else how))
        loaded = loading.open_model(self.path, name, config=self.config)
        if full:
            loaded.model.unfreeze()
        else:
            adapters.attach(loaded.model, self.adapter, self.settings.seed)
        return loaded.model, None if how == mx.float32 else how

    def _prepared(self) -> dict[str, Prepared]:
        data = self.asked.examples
        tokenizer, used, length = self._encoding()
        return examples.load(
            self.asked.data, tokenizer, used, length, context=self.config.max_context_length, format=data.format,
            train_on_prompt=data.train_on_prompt, truncate=data.truncate, skip_bad=data.skip_bad,
        )  # fmt: skip

    def _encoding(self) -> tuple[Tokenizer, Template | None, int]:
        """Tokenizer, template, and tokens of an example at most."""
        data, config = self.asked.examples, self.config
        tokenizer = read_vocabulary(self.path, config).tokenizer
        assert tokenizer is not None  # read_config has seen its file
        most = examples.longest(config) if data.max_seq_length is None else data.max_seq_length
        return tokenizer, chat_template.choose(self.path, tokenizer, data.template), most

    def _batches(self, prepared: Prepared, seed: int = 0) -> Batches:
        group = mx.distributed.init()
        return Batches(
            prepared.examples, self.batch_size, self._row_length(prepared), packed=self._packed, seed=seed,
            rank=group.rank(), world=group.size(),
        )  # fmt: skip

    def _row_length(self, prepared: Prepared) -> int:
        needs = [len(example.ids) - 1 for example in prepared.examples]
        return row_length(needs, prepared.max_length, self.batch_size * self.world)

    def _objective(self, model: Model, dtype: mx.Dtype | None, callback: TrainingCallback) -> Objective | None:
        """What is made small; called with the model as it is before the first update."""
        return None

    def _validations(self) -> Iterable[Batch]:
        assert self._validation is not None
        batches: Iterator[Batch] = self._validation.once()
        most = self.asked.checkpoints.val_batches
        return batches if most < 0 else islice(batches, most)

    def _identity(self) -> Identity:
        adapter, ranks = self.adapter, json.dumps(dict(self.adapter.ranks))
        config = {
            "method": adapter.kind, "rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout,
            "number of adapted modules": len(adapter.ranks),
            "adapted modules": hashlib.sha256(ranks.encode()).hexdigest()[:8],
            "batch size": self.batch_size * self.world, "row length": self.row_length,
            "packing": self._packed, "compute dtype": str(self.computation.dtype).removeprefix("mlx.core."),
        }  # fmt: skip
        data = [batching.fingerprint(self.splits[name].examples) for name in ("train", "valid") if name in self.splits]
        return Identity(str(adapter.model_sha256), " ".join(data), config)

    def _finish(self, model: Model, result: Result) -> None:
        """Write the adapter that the run is for."""
        if result.best is not None and result.best != result.last:
            model.update(checkpoint.parameters(result.best, model.trainable_parameters()))
        self._save(self.out, model)

    def _save(self, directory: Path, model: Model) -> None:
        """The adapter, and the template that it is trained by where that is not the model's own."""
        adapters.save(directory, model, self.adapter)
        if self.asked.examples.template is not None:
            chat_template.record(directory, chat_template.read_source(self.asked.examples.template))


def row_length(needs: Sequence[int], most: int, rows: int) -> int:
    """`most` positions, or as many as an epoch in one batch of `rows` needs: no row is to be mostly padding."""
    wanted = max(max(needs), -(-sum(needs) // max(1, rows)))
    return min(most, -(-wanted // _GRAIN) * _GRAIN)


def _adapter(method: MethodSettings, config: Config) -> Adapter:
    """Raises InputError where a figure makes none."""
    if method.full and config.quantization is not None:
        raise InputError(
            "--full trains weights, and a quantized model's cannot be: give the model that it was quantized from"
        )
    if method.full:
        return Adapter("full")
    return adapters.plan(
        config, rank=method.ranks(), alpha=method.alpha, targets=method.target or None, num_layers=method.num_layers,
        dropout=method.dropout, dora=method.dora, rslora=method.rslora,
    )  # fmt: skip


def _sizes(adapter: Adapter, config: Config) -> Iterator[int]:
    for shape in (config.shapes() if adapter.kind == "full" else adapter.shapes(config)).values():
        size = 1
        for side in shape:
            size *= side
        yield size


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; --out names the directory that the adapter is written to")
    if (out / "config.json").exists():
        raise InputError(f"{out}: is a model directory; --out names another one, for the adapter")


def _check_runs(out: Path, resume: bool) -> None:
    if resume:
        checkpoint.newest(out)
    elif checkpoint.all_of(out):
        raise InputError(f"{out}: holds a run already; --resume goes on with it, or choose another directory")
    if (out / adapters.WEIGHTS).exists() and not checkpoint.all_of(out):
        raise InputError(f"{out}: holds an adapter already; choose another directory")
