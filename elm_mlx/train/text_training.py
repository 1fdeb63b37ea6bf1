"""A run on raw text: batches of a mixture, its validation, and the identity that resuming is checked by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from elm_mlx import device, reading
from elm_mlx.callbacks import SILENT, TrainingCallback
from elm_mlx.data import duplicates
from elm_mlx.data.batches import Batch
from elm_mlx.data.filters import Filters
from elm_mlx.data.stream import Reading, TextBatches
from elm_mlx.data.text_sources import TextSource
from elm_mlx.directories import PREDICTION
from elm_mlx.errors import InputError
from elm_mlx.model.config import ModelConfig
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx.train import checkpoint, memory, trackers
from elm_mlx.train.checkpoint import Identity
from elm_mlx.train.loss import Objective
from elm_mlx.train.pretraining_recipe import TextRecipe
from elm_mlx.train.run import HeldRun, Result, Run
from elm_mlx.train.settings import DTypeName
from elm_mlx.train.throughput import Meter

RecipeType = TypeVar("RecipeType", bound=TextRecipe)
_TRAINED = ("*.safetensors", "*.bin", "*.gguf", "*.npz", PREDICTION)
_UNFILTERED = Filters(duplicates=False, min_chars=0, max_repetition=None, max_symbols=None, min_tokens=0)


class TextTraining(HeldRun, Generic[RecipeType]):
    """A run that is checked, and not begun. Closing it ends the workers that read, too.

    Attributes:
        config: of the network that is trained.
        settings: of the run.
        batches: of the mixture.
        sources: what they are read from.

    Raises:
        InputError: the recipe, a source or the tokenizer is not as it must be.
        ElmError: another process writes to `out`.
    """

    command: str
    config: ModelConfig

    def __init__(
        self,
        recipe: RecipeType,
        out: Path,
        *,
        resume: bool = False,
        on_wrong: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(out, resume)
        with ExitStack() as on_error:
            on_error.push(self)
            if self.resumed is None:
                _check_place(out)
            self._recipe, self.sources = recipe, recipe.data.sources
            self._tokenizer, context = self._prepare()
            trackers.check(recipe.run.report_to)
            self.settings = recipe.loop()
            if self.settings.patience is not None and recipe.data.validation is None:
                raise InputError("run.patience counts validations, and data.validation names no text")
            if recipe.data.sequence_length > context:
                raise InputError(f"sequences of {recipe.data.sequence_length:,} tokens exceed the model's context")
            self._dtype = _compute_dtype(recipe.run.compute_dtype)
            self.batches = TextBatches(
                recipe.data.sources, self._tokenizer.path, recipe.filters, recipe.reading(self.world), rank=self.rank,
                world=self.world, cache=duplicates.default_cache(), on_wrong=on_wrong, gather=gather,
            )  # fmt: skip
            self._held.callback(self.batches.close)
            on_error.pop_all()

    def _prepare(self) -> tuple[Tokenizer, int]:
        """Finds what is trained, and sets `config`. Returns the tokenizer, and the most tokens of a sequence."""
        raise NotImplementedError

    @property
    def tokens_per_update(self) -> int:
        return self._recipe.tokens_per_update(self.world)

    @property
    def trainable(self) -> int:
        """The number of parameters that are trained."""
        return self.config.parameters

    def load(self) -> memory.Load:
        """Returns what the run needs, to estimate its memory."""
        size, run = 4 if self._dtype is None else int(self._dtype.size), self._recipe.run
        return memory.Load(
            self.config, 4, size, self.trainable, True, run.batch_size, self._recipe.data.sequence_length,
            self._recipe.optimizer.name, run.grad_checkpoint, parts=device.most_parts(4 * self.trainable),
            accumulate=run.accumulate,
        )  # fmt: skip

    def train(self, callback: TrainingCallback = SILENT) -> Result:
        """Trains, and leaves in `out` what comes of it.

        Raises:
            InputError, ElmError, KeyboardInterrupt: as `Run.train`, and as the batches do.
        """
        raise NotImplementedError

    def _run(
        self,
        model: nn.Module,
        callback: TrainingCallback,
        *,
        objective: Objective | None = None,
        meter: Meter | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Result:
        """Trains `model`; `about` is kept of the run beside its settings. Other arguments and errors are `Run`'s."""
        if self.resumed is not None:
            self._check_window(self.resumed)
        validation, recipe = list(self._validation()), self._recipe
        if self.leads and self.resumed is None:
            self._describe()
        settings: Any = recipe
        described = {
            "command": self.command, "settings": asdict(settings), "parameters": self.config.parameters,
            "trainable": self.trainable, "processes": self.world, **(about or {}),
        }  # fmt: skip
        with trackers.tracking(recipe.run.report_to if self.leads else (), self.out, described, callback) as told:
            return Run(
                model, self.batches, validation or None, self.settings, self.out, self._identity(), self.resumed,
                self._dtype, objective, rehearsal=self._rehearsal(), callback=told, about=described, meter=meter,
            ).train()  # fmt: skip

    def _describe(self) -> None:
        """Writes what the run's directory has from its beginning on."""

    def _check_window(self, newest: Path) -> None:
        """Says how to go on with a run whose window was another because nobody chose it: an earlier version's always
        had four million tokens.

        Raises:
            InputError: it was.
        """
        now = self._recipe.reading(self.world).window
        try:
            before = reading.json_object(newest / checkpoint.STATE)["progress"]["data"]["window"]
        except (InputError, KeyError, TypeError):  # of which the loop says what is wrong
            return
        if self._recipe.data.window is None and before != now:
            raise InputError(
                f"{newest}: shuffled windows of {before} tokens, and this recipe now makes them of {now}; "
                f"--set data.window={before} goes on with the former"
            )

    def _validation(self) -> Iterator[Batch]:
        """Returns this process's share of the first rows of the validation's text, unfiltered."""
        data, size, rank = self._recipe.data, self._recipe.run.batch_size, self.rank
        if data.validation is None:
            return
        reading = Reading(
            data.validation_rows, data.sequence_length, window=1, segments=data.segments, shards=1, workers=0
        )
        with TextBatches([TextSource(data.validation)], self._tokenizer.path, _UNFILTERED, reading) as batches:
            rows = next(batches).rows(slice(rank, None, self.world))
        for start in range(0, len(rows.inputs), size):
            part = rows.rows(slice(start, start + size))
            yield replace(part, tokens=part.inputs.size)

    def _rehearsal(self) -> Batch:
        shape = (self._recipe.run.batch_size, self._recipe.data.sequence_length)
        ids = np.random.default_rng(0).integers(0, self.config.vocab_size, shape, dtype=np.int32)
        return Batch(ids, ids, np.ones(shape, np.bool_), None, ids.size)

    def _identity(self) -> Identity:
        """Returns the recipe without the fields that may change on resuming; the loop adds its own settings."""
        digest, data = hashlib.sha256(), self._recipe.data
        if data.validation is not None:
            digest.update(reading.content(reading.expanded(data.validation), reading.CORPUS_BYTES))
        model, config = self._model_identity()
        config |= {"batch size": self._recipe.run.batch_size * self.world, "compute dtype": str(self._dtype)}
        config["text (its hash)"] = self.batches.sampled_content()
        if data.validation is not None:
            config["rows of validation"] = data.validation_rows
        return Identity(model, f"{self.batches.fingerprint} {digest.hexdigest()}", config)

    def _model_identity(self) -> tuple[str, dict[str, Any]]:
        """Returns a hash of what is trained, and its settings, by their names for `Identity.config`."""
        raise NotImplementedError


def _check_place(out: Path) -> None:
    """Raises InputError where weights lie that what is trained would replace."""
    if any(next(out.glob(pattern), None) for pattern in _TRAINED):
        raise InputError(f"{out}: holds weights already, and no checkpoint to go on from; choose another directory")


def ends(tokenizer: Tokenizer) -> tuple[int, int]:
    """Returns BOS and EOS, which stand around documents. Raises InputError where the tokenizer lacks one."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if bos is None or eos is None:
        raise InputError(f"{tokenizer.path}: has no BOS or no EOS, which stand around documents")
    return bos, eos


def _compute_dtype(name: DTypeName | None) -> mx.Dtype | None:
    """Returns what weights are rounded to where they are used; None for float32, in which they are kept."""
    name = name or ("bfloat16" if device.on_gpu() else "float32")
    return None if name == "float32" else device.DTYPES[name]


def gather(value: Any, group: mx.distributed.Group | None = None) -> list[Any]:
    """Returns the `value` of every process, by rank, as JSON's types. All processes call it at once."""
    group = group or mx.distributed.init()
    if group.size() == 1:
        return [json.loads(json.dumps(value))]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = mx.distributed.all_gather(mx.array([len(data)]), group=group).tolist()
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(data)] = data
    rows = np.array(mx.distributed.all_gather(mx.array(padded)[None], group=group))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
