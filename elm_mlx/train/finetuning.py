"""Fine-tuning: from a model directory and data to a run's directory with an adapter in it.

All that can be wrong with what a run is made of is found before the weights are read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
from mlx.utils import tree_map

from elm_mlx import device
from elm_mlx.callbacks import SILENT, TrainingCallback
from elm_mlx.data import batches as batching
from elm_mlx.data import columns, examples
from elm_mlx.data.batches import Batches
from elm_mlx.data.encoding import Example
from elm_mlx.data.examples import Prepared
from elm_mlx.directories import PEFT_WEIGHTS, RUN_RECORD
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model import roofline
from elm_mlx.model.config import Config, read_config
from elm_mlx.model.families import FamilyConfig
from elm_mlx.model.network import Model
from elm_mlx.reading import expanded, json_object
from elm_mlx.safetensors_file import fingerprint, hash_of_pieces
from elm_mlx.store import adapters, loading
from elm_mlx.store.adapters import Adapter
from elm_mlx.store.fusion import LogitSample
from elm_mlx.store.model_names import directory_of
from elm_mlx.text import chat_template
from elm_mlx.text.tokenizer import read_vocabulary
from elm_mlx.train import checkpoint, memory, trackers
from elm_mlx.train.checkpoint import Identity
from elm_mlx.train.loss import Objective
from elm_mlx.train.run import HeldRun, Result, Run, Validation
from elm_mlx.train.settings import DataSettings, LoraSettings
from elm_mlx.train.throughput import Meter

_GRAIN = 32  # rows are as long as a multiple of this
_BEGUN_WITH = "adapter to begin with"  # in a run's identity: the hash of its file
_SAMPLE_POSITIONS, _SAMPLE_EXAMPLES = 256, 32  # of what a run was trained on, read back


class Finetuning(HeldRun):
    """A run that is checked, and not begun: its weights are not read yet.

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

    Raises:
        InputError: the model, the data or the method is not as it must be; or one that `out` says.
        ElmError: another process writes to `out`.
    """

    command, unit = "lora", "example"
    _batching: ClassVar[type[Batches]] = Batches

    def __init__(self, asked: LoraSettings, *, resume: bool = False) -> None:
        _check_place(asked.out)
        super().__init__(asked.out, resume)
        with ExitStack() as on_error:
            on_error.push(self)
            if self.resumed is None and any((asked.out / name).exists() for name in (adapters.WEIGHTS, *PEFT_WEIGHTS)):
                raise InputError(f"{asked.out}: holds an adapter already; choose another directory")
            trackers.check(asked.reports.report_to)
            self.asked, self.batch_size = asked, asked.examples.batch_size
            self.path = directory_of(asked.model)
            self.config = read_config(self.path, with_tokenizer=True)
            self._packed = asked.examples.pack and self._keeps_apart()
            weights = fingerprint(self.path, checkpoint.trained_from(self.resumed) if self.resumed else None)
            self._begun_with = self._started_from()
            self.adapter = replace(self._adapter(), model_sha256=weights)
            self.computation = loading.computation(self.path, self.config, asked.computation.compute_dtype)
            shapes = self.config.shapes() if self.adapter.kind == "full" else self.adapter.shapes(self.config)
            self.trainable = sum(map(math.prod, shapes.values()))
            self._prepare()
            self.settings = asked.loop(self._steps())
            on_error.pop_all()

    def _prepare(self) -> None:
        """Reads what is trained on, and puts it into batches."""
        asked = self.asked.checkpoints
        self.splits = self._read()
        for split, batches in (("valid", asked.val_batches), ("test", asked.test_batches)):
            if batches == 0:
                self.splits.pop(split, None)
        self.row_length = self._row_length(self.splits["train"])
        if asked.patience is not None and "valid" not in self.splits:
            raise InputError("--patience: counts validations, and this run has none: give the data a valid split")
        self.batches = self._batches("train", self.asked.computation.seed)
        self._validation = self._batches("valid") if "valid" in self.splits else None
        self._test = self._batches("test") if "test" in self.splits else None

    @property
    def validates(self) -> bool:
        return self._validation is not None

    @property
    def notes(self) -> list[str]:
        """Says what is done otherwise than asked, because the model's family cannot do it."""
        if self._packed == self.asked.examples.pack:
            return []
        return ["one example in each row: this family would read them as one text"]

    def count(self, split: str = "train") -> int:
        """Counts a split's examples, or pairs: what `unit` names."""
        return len(self.splits[split].examples)

    def load(self) -> memory.Load:
        """Returns what the run needs, to estimate its memory."""
        value = int(self.computation.dtype.size)
        packed = self.config.quantization is not None and not self.computation.unpack
        stored = int(self.config.quantization["bits"]) / 8 if packed and self.config.quantization else value
        return memory.Load(
            self.config, stored, value, self.trainable, self.adapter.kind == "full", self.batch_size,
            self.row_length, self.settings.optimizer, self.settings.grad_checkpoint,
            memory.adapter_values(self.adapter, self.config), parts=device.most_parts(4 * self.trainable),
            accumulate=self.settings.accumulate, layers=self._trained_layers(),
        )  # fmt: skip

    def train(self, callback: TrainingCallback = SILENT) -> Result:
        """Trains, and leaves the adapter in `out`: the best by validation, or the last where none is below the base.

        Raises:
            InputError, ElmError, KeyboardInterrupt: as `Run.train`.
        """
        callback.progress("reading the model")
        model, dtype = self._open()
        save = partial(adapters.save, model=model, adapter=self.adapter, template=self._kept_template())
        about = {
            "command": self.command, "settings": self.asked.record(), "trained": self.adapter.describe(),
            "trainable": self.trainable, "parameters": self.config.parameters, "processes": self.world,
        }  # fmt: skip
        with trackers.tracking(self.asked.reports.report_to if self.leads else (), self.out, about, callback) as told:
            run = self._run(model, dtype, told, about, None if self.adapter.kind == "full" else save)
            result = run.train()
            if result.best is not None and result.best != result.last:
                model.update(self._of_leader(model.trainable_parameters(), result.best))
            if self.leads:
                save(self.out)
            if self._test is None or result.interrupted:
                return result
            return replace(result, test=run.test(Validation(self._test, self.asked.checkpoints.test_batches)))

    def _run(
        self, model: Model, dtype: mx.Dtype | None, callback: TrainingCallback, about: dict[str, Any],
        export: Callable[[Path], None] | None,
    ) -> Run:  # fmt: skip
        """Returns the run, called with the model before its first update; the arguments are `Run`'s."""
        validation = self._validation and Validation(self._validation, self.asked.checkpoints.val_batches)
        return Run(
            model, self.batches, validation, self.settings, self.out, self._identity(), self.resumed, dtype,
            self._objective(model, dtype, callback), rehearsal=next(self.batches.once()), callback=callback,
            about=about, meter=Meter(self.config, self.adapter, self.settings.grad_checkpoint), export=export,
        )  # fmt: skip

    def _of_leader(self, trained: Any, saved: Path) -> Any:
        """The parameters of a checkpoint, which the first process alone may have."""
        if self.world == 1:
            return checkpoint.restore_parameters(saved, trained)
        found = checkpoint.restore_parameters(saved, trained) if self.leads else tree_map(mx.zeros_like, trained)
        return tree_map(mx.distributed.all_sum, found)

    def _steps(self) -> int:
        """Counts the updates: those asked for, or those that the epochs take."""
        asked = self.asked.optimizer
        if asked.iters is not None:
            return asked.iters
        return max(1, round(asked.epochs * self.batches.steps() / asked.grad_accumulation_steps))

    def _keeps_apart(self) -> bool:
        """Says whether several texts can share a row."""
        return not isinstance(self.config, FamilyConfig) or self.config.family.positions

    def _trained_layers(self) -> int | None:
        """Counts the last layers, which the backward pass goes through; None for all."""
        trained = [roofline.layer_of(f"{module}.") for module in self.adapter.ranks]
        layers = [layer for layer in trained if layer is not None]
        return None if len(layers) < len(trained) or not layers else self.config.num_layers - min(layers)

    @property
    def _taught_by(self) -> Path | None:
        """The directory whose template goes before the model's: the adapter's to begin with, or where it was kept."""
        begun = self.asked.method.from_adapter
        kept = begun is not None and self.resumed is not None and (self.out / chat_template.FILE_NAME).is_file()
        return self.out if kept else begun

    def _kept_template(self) -> str | None:
        """Returns the template that goes with what is trained, as `adapters.save` takes it; None for the model's own.

        That of an adapter to begin with is kept in the run's directory: when the run is resumed, it may be gone.
        """
        asked, taught_by = self.asked.examples.template, self._taught_by
        if asked is not None or taught_by is None:
            if self.leads and self.resumed is None and (self.out / RUN_RECORD).is_file():
                (self.out / chat_template.FILE_NAME).unlink(missing_ok=True)  # of a run that ended before it had begun
            return asked
        source, _ = chat_template.own_source(taught_by)
        if source is None:
            return None
        if self.leads:
            chat_template.record(self.out, source)
        return str(self.out / chat_template.FILE_NAME)

    def _started_from(self) -> str | None:
        """Returns the hash of the adapter to begin with; of a resumed run's, which may be gone, as it was."""
        path = self.asked.method.from_adapter
        if path is None:
            return None
        if self.resumed is not None and not path.is_dir():
            return checkpoint.trained_from(self.resumed, _BEGUN_WITH)
        adapters.read(path, self.config, self.path)  # says what is wrong with it
        file = adapters.weights_file(path)
        pieces = file.suffix == ".safetensors"
        return hash_of_pieces([file]) if pieces else hashlib.sha256(file.read_bytes()).hexdigest()

    def _adapter(self) -> Adapter:
        """Plans what is trained: an adapter, or all weights. Raises InputError where a setting makes none."""
        method, config = self.asked.method, self.config
        if method.full and config.quantization is not None:
            raise InputError(
                "--full trains weights, and a quantized model's cannot be: give the model that it was quantized from"
            )
        if method.from_adapter is not None and not (method.full and self.resumed):
            found = adapters.read(self.resumed or method.from_adapter, config)
            if method.full != (found.kind == "full"):
                what = "does not go with" if method.full else "needs"
                raise InputError(f"{method.from_adapter}: {found.describe()}, which {what} --full")
            return replace(found, dropout=method.dropout or found.dropout)
        if method.full:
            return Adapter("full")
        return adapters.plan(
            config, rank=method.ranks(), alpha=method.alpha, targets=method.target or None,
            num_layers=method.num_layers, dropout=method.dropout, dora=method.dora, rslora=method.rslora,
        )  # fmt: skip

    def _open(self) -> tuple[Model, mx.Dtype | None]:
        """Loads the model, what is trained of it in float32; and returns what that is rounded to where it is used."""
        how, begun = self.computation.dtype, self.asked.method.from_adapter
        full = self.adapter.kind == "full"
        name = next(name for name, dtype in device.DTYPES.items() if dtype == (mx.float32 if full else how))
        model = loading.open_model(self.path, name, config=self.config, widen=True).model
        if begun is not None and begun.is_dir():  # or the run is resumed, and its checkpoint has all
            adapters.load(model, replace(self.adapter, directory=begun))
        elif not full:
            adapters.attach(model, self.adapter, self.settings.seed)
        if full:
            model.unfreeze()
        else:
            adapters.train_adapter(model)
        model.train()
        return model, None if how == mx.float32 else how

    def _read(self) -> dict[str, Prepared]:
        return read_data(self.path, self.config, self.asked.data, self.asked.examples, adapter=self._taught_by)

    def _batches(self, split: str, seed: int = 0) -> Batches:
        prepared = self.splits[split]
        return self._batching(
            prepared.examples, self.batch_size, self._row_length(prepared), packed=self._packed, seed=seed,
            rank=self.rank, world=self.world, **self._mixture(split),
        )  # fmt: skip

    def _mixture(self, split: str) -> dict[str, Any]:
        """How many examples, or pairs, each source gave, and the weights; of what is trained on alone."""
        if split != "train" or self.asked.examples.weight is None:
            return {}
        of_each = len(self.splits[split].examples) // self.count(split)
        counts = [examples // of_each for _, examples in self.splits[split].parts]
        return {"counts": counts, "weights": self.asked.examples.weight}

    def _row_length(self, prepared: Prepared) -> int:
        return self._fitting([len(example.ids) - 1 for example in prepared.examples], prepared.max_length)

    def _fitting(self, needs: Sequence[int], most: int) -> int:
        """`most` positions, or as many as an epoch in one batch needs: no row is to be mostly padding."""
        wanted = max(max(needs), -(-sum(needs) // max(1, self.batch_size * self.world)))
        return min(most, -(-wanted // _GRAIN) * _GRAIN)

    def _objective(self, model: Model, dtype: mx.Dtype | None, callback: TrainingCallback) -> Objective | None:
        """Returns what to minimize, called with the model before its first update; None for the tokens' loss."""
        return None

    def _identity(self) -> Identity:
        adapter, ranks = self.adapter, json.dumps(dict(self.adapter.ranks))
        config = {
            "method": adapter.kind, "rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout,
            "number of adapted modules": len(adapter.ranks),
            "adapted modules": hashlib.sha256(ranks.encode()).hexdigest()[:8],
            "batch size": self.batch_size * self.world, "row length": self.row_length,
            "packing": self._packed, "compute dtype": str(self.computation.dtype).removeprefix("mlx.core."),
        }  # fmt: skip
        if self._begun_with is not None:
            config[_BEGUN_WITH] = self._begun_with
        if "valid" in self.splits:
            config["batches of validation"] = self.asked.checkpoints.val_batches
        if self.asked.examples.weight is not None:
            config["weights of the data"] = list(self.asked.examples.weight)
        return Identity(str(adapter.model_sha256), self._data_sha256(), config)

    def _data_sha256(self) -> str:
        data = [batching.fingerprint(self.splits[name].examples) for name in ("train", "valid") if name in self.splits]
        return " ".join(data)


def read_data(
    model: Path,
    config: Config,
    paths: Sequence[str],
    settings: DataSettings,
    *,
    paired: bool = False,
    adapter: Path | None = None,
) -> dict[str, Prepared]:
    """Reads a run's examples, or the answers of its pairs, by split, as the model in a directory learns from them.

    Args:
        adapter: an adapter's directory; the template that it was trained by goes before the model's.

    Raises:
        InputError, ElmError: as `examples.load` and `chat_template.choose`.
    """
    tokenizer = read_vocabulary(model, config).tokenizer
    if tokenizer is None:
        raise InputError(f"{model}: has no tokenizer")
    template = chat_template.choose(model, tokenizer, settings.template, adapter)
    longest = examples.longest(config) if settings.max_seq_length is None else settings.max_seq_length
    return examples.load(
        paths, tokenizer, template, longest, context=config.max_context_length, format=settings.format, paired=paired,
        columns=columns.parsed(settings.columns or ()), train_on_prompt=settings.train_on_prompt,
        truncate=settings.truncate, skip_bad=settings.skip_bad,
    )  # fmt: skip


def trained_on(adapter: Path, model: Path) -> LogitSample | None:
    """Examples of the run that left `adapter`, spread over its data, as it learned from them, up to 256 positions.

    None where no run has left it, or its data are not where they were.
    """
    try:
        found = _examples_of(expanded(adapter), expanded(model))
    except (ElmError, KeyError, TypeError, ValueError):
        return None
    rows: list[tuple[tuple[int, ...], tuple[bool, ...]]] = []
    positions = 0
    for example in found[:: -(-len(found) // _SAMPLE_EXAMPLES)]:
        counted = (*example.trained[1:], False)
        if any(counted) and (not rows or positions + sum(counted) <= _SAMPLE_POSITIONS):
            rows.append((example.ids, counted))
            positions += sum(counted)
    return LogitSample("answers that it was trained on", rows) if rows else None


def _examples_of(adapter: Path, model: Path) -> list[Example]:
    """Raises ElmError, KeyError, TypeError or ValueError where there are none to be had."""
    run = adapter if (adapter / RUN_RECORD).is_file() else adapter.parent.parent  # of a checkpoint
    about = json_object(run / RUN_RECORD)
    settings = about["settings"]
    if not isinstance(settings, dict):
        raise TypeError("no settings")
    asked = DataSettings(
        format=settings.get("format"), max_seq_length=settings.get("max_seq_length"), skip_bad=True,
        truncate=bool(settings.get("truncate")), train_on_prompt=bool(settings.get("train_on_prompt")),
        columns=tuple(settings.get("columns") or ()),
    )  # fmt: skip
    data, paired = settings["data"], about.get("command") == "dpo"
    paths = [data] if isinstance(data, str) else [str(each) for each in data]
    return read_data(model, read_config(model), paths, asked, paired=paired, adapter=adapter)["train"].examples


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; --out names the directory that the adapter is written to")
    if (out / "config.json").exists():
        raise InputError(f"{out}: is a model directory; --out names another one, for the adapter")
