"""Preference tuning from paths: a model directory and pairs in, a run's directory with an adapter out.

Knows what differs from fine-tuning: what is read, what a batch is, what is made small, and that the model as it was
is asked first. All else is `finetune`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_map

from elm_mlx import device, files
from elm_mlx.callbacks import OnProgress, TrainingCallback
from elm_mlx.data import examples
from elm_mlx.data.batches import Batch, Joined, PairBatch, PairBatches
from elm_mlx.data.examples import Prepared
from elm_mlx.errors import InputError
from elm_mlx.model.network import Model
from elm_mlx.model.ops import Segments
from elm_mlx.train import checkpoint, memory
from elm_mlx.train.checkpoint import Identity
from elm_mlx.train.finetuning import Finetuning, row_length
from elm_mlx.train.loss import Head, Objective
from elm_mlx.train.preference import Preferring, log_probabilities, positions
from elm_mlx.train.run import stop_requests
from elm_mlx.train.settings import DpoSettings

FILE = "reference.safetensors"  # in a run's directory
Table = npt.NDArray[np.float32]  # (pairs, 2): of chosen and rejected answers


class Alignment(Finetuning):
    """A `Finetuning` on pairs. Its `splits` have two examples of each pair; a row holds whole pairs.

    Raises:
        InputError: as `Finetuning`; or dropout, under which a margin would be mostly noise.
    """

    command, unit = "dpo", "pair"
    batches: PairBatches
    _validation: PairBatches | None
    asked: DpoSettings

    def __init__(self, asked: DpoSettings, *, resume: bool = False) -> None:
        self._preferring = Preferring(asked.preference.loss, asked.preference.beta)
        if asked.method.dropout:
            raise InputError("pairs are compared without dropout: set it to 0")
        super().__init__(asked, resume=resume)

    def count(self, split: str = "train") -> int:
        return len(self.splits[split].examples) // 2

    def _prepared(self) -> dict[str, Prepared]:
        if not self._keeps_apart():
            raise InputError(f"{self.path}: dpo puts two answers in a row, and this family would read them as one text")
        tokenizer, template, length = self._encoding()
        data = self.asked.examples
        return examples.load(
            self.asked.data, tokenizer, template, length, context=self.config.max_context_length, paired=True,
            truncate=data.truncate, skip_bad=data.skip_bad,
        )  # fmt: skip

    def _batches(self, prepared: Prepared, seed: int = 0) -> PairBatches:
        return PairBatches(
            prepared.examples, self.batch_size, self._row_length(prepared), packed=self._packed, seed=seed,
            rank=mx.distributed.init().rank(), world=self.world,
        )  # fmt: skip

    def _row_length(self, prepared: Prepared) -> int:
        needs = [len(pair.ids) - 1 for pair in Joined(prepared.examples)]
        return row_length(needs, 2 * prepared.max_length, self.batch_size * self.world)

    def load(self) -> memory.Load:
        """As of a `Finetuning`."""
        return replace(super().load(), pairs=True)

    def _objective(self, model: Model, dtype: mx.Dtype | None, callback: TrainingCallback) -> Objective:
        """Asks the model what it says before it learns, unless that is known.

        Raises:
            KeyboardInterrupt: someone ended it, as `loop.train` is ended; there is nothing to save.
        """
        if self._preferring.needs_reference:
            for batches, table in zip(self._all_batches().values(), self._tables(model, dtype, callback), strict=True):
                batches.reference = table
        return self._preferring

    def _all_batches(self) -> dict[str, PairBatches]:
        return {"train": self.batches} | ({} if self._validation is None else {"valid": self._validation})

    def _tables(self, model: Model, dtype: mx.Dtype | None, callback: TrainingCallback) -> list[Table]:
        """The log-probabilities of each split's pairs; the first process alone reads and writes them."""
        path, group, splits = self.out / FILE, mx.distributed.init(), self._all_batches()
        found = read(path, self._whose()) if self.leads else None
        if found is None and self.leads and path.exists() and checkpoint.all_of(self.out):
            raise InputError(
                f"{path}: is of another model, other data or another --compute-dtype; go on with the same, "
                "or choose another directory"
            )
        known = bool(mx.distributed.all_sum(mx.array(int(found is not None)), group=group).item())
        if found is None:
            found = {name: np.zeros_like(batches.reference) for name, batches in splits.items()}
        if not known:
            with stop_requests(callback.stopping) as stop:
                found = self._computed(model, dtype, callback.progress, stop)
                if mx.distributed.all_sum(mx.array(int(stop.is_set())), group=group).item():
                    raise KeyboardInterrupt
        tables = {name: np.array(mx.distributed.all_sum(mx.array(found[name]), group=group)) for name in splits}
        if not known and self.leads:
            self.out.mkdir(parents=True, exist_ok=True)
            write(path, tables, self._whose())
        return list(tables.values())

    def _computed(self, model: Model, dtype: mx.Dtype | None, on_progress: OnProgress, stop: Event) -> dict[str, Table]:
        """This process's part of them."""
        tables, done = {}, 0
        total = sum(len(batches.reference) for batches in self._all_batches().values())
        for name, batches in self._all_batches().items():

            def on_pairs(pairs: int, before: int = done) -> None:
                on_progress("reference of pairs", min(total, (before + pairs) * self.world), total)

            tables[name] = compute(model, batches, dtype, on_pairs, stop)
            if stop.is_set():
                break
            done += -(-len(batches.reference) // self.world)
        return tables

    def _whose(self) -> dict[str, str]:
        """What the reference depends on."""
        identity = super()._identity()
        return {"model": identity.model, "data": identity.data, "dtype": str(identity.config["compute dtype"])}

    def _identity(self) -> Identity:
        identity, preferring = super()._identity(), self._preferring
        own = {"loss": preferring.loss, "beta": preferring.beta}
        return Identity(identity.model, identity.data, {**identity.config, **own})


def compute(
    model: Model,
    batches: PairBatches,
    dtype: mx.Dtype | None,
    on_pairs: Callable[[int], None],
    stop: Event,
) -> Table:
    """The answers' summed log-probabilities, of this process's pairs; noughts for others', and once `stop` is set.

    Args:
        dtype: what trainable parameters are rounded to, as in training; None for what they are.
        on_pairs: called after each batch with the number of pairs that are done.
    """
    table = np.zeros((len(batches.reference), 2), np.float32)
    kept, parts, done = model.trainable_parameters(), device.Parts(device.most_parts()), 0
    model.eval()
    if dtype is not None:
        model.update(tree_map(lambda parameter: parameter.astype(dtype), kept))
    try:
        for batch in batches.once():
            cut, sums = batch.split(parts.most), []
            for part, stream in zip(cut, parts.streams(len(cut), model.parameters()), strict=True):
                with stream:
                    sums.append(_sums(model, part))
            parts.evaluate(sums)
            assert isinstance(batch, PairBatch)
            found = np.concatenate([np.array(each) for each in sums]).reshape(*batch.pairs.shape, 2)
            real = batch.pairs >= 0
            table[batch.pairs[real]] = found[real]
            done += int(real.sum())
            on_pairs(done)
            if stop.is_set():
                break
    finally:
        model.update(kept)
    return table


def _sums(model: Model, batch: Batch) -> mx.array:
    assert isinstance(batch, PairBatch) and batch.segments is not None
    segments = Segments(mx.array(batch.segments), batch.reach())
    hidden = model.transformer(mx.array(batch.inputs), None, segments)
    return log_probabilities(Head.of(model), hidden, positions(batch))[0]


def write(path: Path, tables: Mapping[str, Table], identity: Mapping[str, str]) -> None:
    """Keep each split's table, and whose they are. Raises ElmError."""
    from safetensors.numpy import save

    with files.new_file(path) as file:
        file.write(save(dict(tables), {"identity": json.dumps(dict(identity))}))


def read(path: Path, identity: Mapping[str, str]) -> dict[str, Table] | None:
    """What `write` kept; None where there is no such file, or it is of another `identity`.

    Raises:
        InputError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            if json.loads((file.metadata() or {}).get("identity", "null")) != dict(identity):
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged: {error}; without it, it is computed again") from None
