"""Preference tuning: from a model directory and pairs to a run's directory with an adapter in it.

The reference is what the model said before it was trained: log-probabilities of all pairs' answers, computed once and
kept. Under an adapter that has learnt nothing yet the model is its base, so no second model is ever in memory; with an
adapter to begin with, the reference is the model with that.
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
from elm_mlx.data import batches as batching
from elm_mlx.data.batches import Batch, Joined, PairBatch, PairBatches
from elm_mlx.data.examples import Prepared
from elm_mlx.errors import InputError
from elm_mlx.model.network import Model
from elm_mlx.model.ops import Segments
from elm_mlx.train import memory
from elm_mlx.train.checkpoint import Identity
from elm_mlx.train.finetuning import Finetuning, read_data
from elm_mlx.train.loss import Head, Objective
from elm_mlx.train.preference import Preferring, log_probabilities, positions
from elm_mlx.train.run import stop_requests
from elm_mlx.train.settings import DpoSettings

FILE, TEST_FILE = "reference.safetensors", "reference_test.safetensors"  # in a run's directory
Table = npt.NDArray[np.float32]  # (pairs, 2): of chosen and rejected answers


class Alignment(Finetuning):
    """A `Finetuning` on pairs. Its `splits` have two examples of each pair; a row holds whole pairs.

    Raises:
        InputError: as `Finetuning`; or dropout, under which a margin would be mostly noise.
    """

    command, unit = "dpo", "pair"
    _batching = PairBatches
    batches: PairBatches
    _validation: PairBatches | None
    _test: PairBatches | None
    asked: DpoSettings

    def __init__(self, asked: DpoSettings, *, resume: bool = False) -> None:
        self._preferring = Preferring(asked.preference.loss, asked.preference.beta)
        if asked.method.dropout:
            raise InputError("--dropout: must be 0, for pairs are compared without")
        super().__init__(asked, resume=resume)

    def count(self, split: str = "train") -> int:
        return len(self.splits[split].examples) // 2

    def load(self) -> memory.Load:
        """Returns what the run needs, to estimate its memory."""
        return replace(super().load(), pairs=True)

    def _read(self) -> dict[str, Prepared]:
        if not self._keeps_apart():
            raise InputError(f"{self.path}: dpo puts two answers in a row, and this family would read them as one text")
        return read_data(self.path, self.config, self.asked.data, self.asked.examples, paired=True)

    def _row_length(self, prepared: Prepared) -> int:
        return self._fitting([len(pair.ids) - 1 for pair in Joined(prepared.examples)], 2 * prepared.max_length)

    def _objective(self, model: Model, dtype: mx.Dtype | None, callback: TrainingCallback) -> Objective:
        """Computes the reference, unless it is known.

        Raises:
            KeyboardInterrupt: someone ended it, as `Run.train` is ended; there is nothing to save.
        """
        if self._preferring.needs_reference:
            sources = {"train": self.batches} | ({"valid": self._validation} if self._validation else {})
            for name, table in self._reference(model, dtype, sources, callback, FILE).items():
                sources[name].reference = table
            if self._test is not None:
                # Apart from the others: a run that began without it goes on without.
                tables = self._reference(model, dtype, {"test": self._test}, callback, TEST_FILE)
                self._test = self._test if tables else None
                if self._test is not None:
                    self._test.reference = tables["test"]
        return self._preferring

    def _reference(
        self,
        model: Model,
        dtype: mx.Dtype | None,
        sources: Mapping[str, PairBatches],
        callback: TrainingCallback,
        file: str,
    ) -> dict[str, Table]:
        """Returns the log-probabilities of each split's pairs; the first process alone reads and writes them.

        None of a test's where a resumed run has none.
        """
        path, group = self.out / file, mx.distributed.init()
        identity = super()._identity()
        whose = {"model": identity.model, "data": identity.data, "dtype": str(identity.config["compute dtype"])}
        if self._begun_with is not None:
            whose["adapter"] = self._begun_with
        if "test" in sources:
            whose["data"] = batching.fingerprint(self.splits["test"].examples)
        found = read(path, whose) if self.leads else None
        if found is None and "test" not in sources and self.leads and path.exists() and self.resumed is not None:
            raise InputError(
                f"{path}: is of another model, other data or another --compute-dtype; go on with the same, "
                "or choose another directory"
            )
        known = bool(mx.distributed.all_sum(mx.array(int(found is not None)), group=group).item())
        if not known and "test" in sources and self.resumed is not None:
            return {}
        if found is None:
            found = {name: np.zeros_like(batches.reference) for name, batches in sources.items()}
        begun = self.asked.method.from_adapter
        if not known and begun is not None and not begun.is_dir():
            raise InputError(f"{path}: is missing, and made from {begun}, which is gone; start anew")
        if not known:
            with stop_requests(callback.stopping) as stop:
                found = self._computed(model, dtype, sources, callback.progress, stop)
                if mx.distributed.all_sum(mx.array(int(stop.is_set())), group=group).item():
                    raise KeyboardInterrupt
        tables = {name: np.array(mx.distributed.all_sum(mx.array(found[name]), group=group)) for name in sources}
        if not known and self.leads:
            write(path, tables, whose)
        return tables

    def _computed(
        self,
        model: Model,
        dtype: mx.Dtype | None,
        sources: Mapping[str, PairBatches],
        on_progress: OnProgress,
        stop: Event,
    ) -> dict[str, Table]:
        """Computes this process's part of them."""
        tables, done, total = {}, 0, sum(len(batches.reference) for batches in sources.values())
        for name, batches in sources.items():

            def on_pairs(pairs: int, before: int = done) -> None:
                on_progress("reference of pairs", min(total, (before + pairs) * self.world), total)

            tables[name] = compute(model, batches, dtype, on_pairs, stop)
            if stop.is_set():
                break
            done += -(-len(batches.reference) // self.world)
        return tables

    def _identity(self) -> Identity:
        identity, preferring = super()._identity(), self._preferring
        own = {"loss": preferring.loss, "beta": preferring.beta}
        return replace(identity, config={**identity.config, **own})


def compute(
    model: Model,
    batches: PairBatches,
    dtype: mx.Dtype | None,
    on_pairs: Callable[[int], None],
    stop: Event,
) -> Table:
    """Computes the answers' summed log-probabilities, of this process's pairs; 0 for others', and once `stop` is set.

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
    """Writes each split's table, and the identity of the run. Raises ElmError."""
    from safetensors.numpy import save

    with files.new_file(path) as file:
        file.write(save(dict(tables), {"identity": json.dumps(dict(identity))}))


def read(path: Path, identity: Mapping[str, str]) -> dict[str, Table] | None:
    """Reads what `write` wrote; None where there is no such file, or it is of another `identity`.

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
