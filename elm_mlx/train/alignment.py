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
from elm_mlx.callbacks import TrainingCallback
from elm_mlx.data import batches as batching
from elm_mlx.data.batches import Batch, Joined, PairBatch, PairBatches
from elm_mlx.data.examples import Prepared
from elm_mlx.errors import InputError
from elm_mlx.model.attention import Segments
from elm_mlx.model.network import Model
from elm_mlx.train import memory
from elm_mlx.train.checkpoint import Identity
from elm_mlx.train.finetuning import Finetuning, read_data
from elm_mlx.train.loss import Head, Objective
from elm_mlx.train.preference import Preferring, log_probabilities, positions
from elm_mlx.train.settings import DpoSettings
from elm_mlx.train.stop_signals import stop_requests

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
        return read_data(
            self.path, self.config, self.asked.data, self.asked.examples, paired=True, adapter=self._taught_by
        )

    def _row_length(self, prepared: Prepared) -> int:
        return self._fitting([len(pair.ids) - 1 for pair in Joined(prepared.examples)], 2 * prepared.max_length)

    def _objective(self, model: Model, dtype: mx.Dtype | None, callback: TrainingCallback) -> Objective:
        """Computes the reference, unless it is known.

        Raises:
            KeyboardInterrupt: someone ended it, as `Run.train` is ended; there is nothing to save.
        """
        if not self._preferring.needs_reference:
            return self._preferring

        def computed(sources: Mapping[str, PairBatches]) -> dict[str, Table]:
            total = sum(len(batches.reference) for batches in sources.values())

            def on_pairs(done: int) -> None:
                callback.progress("reference of pairs", min(total, done * self.world), total)

            with stop_requests(callback.stopping) as stop:
                tables = compute(model, dtype, sources, on_pairs, stop)
                if mx.distributed.all_sum(mx.array(int(stop.is_set()))).item():
                    raise KeyboardInterrupt
            return tables

        sources = {"train": self.batches} | ({"valid": self._validation} if self._validation else {})
        for name, table in self._reference(FILE, sources, computed).items():
            sources[name].reference = table
        if self._test is not None:
            # Apart from the others: a run that began without it goes on without.
            tables = self._reference(TEST_FILE, {"test": self._test}, computed)
            self._test = self._test if tables else None
            if self._test is not None:
                self._test.reference = tables["test"]
        return self._preferring

    def _reference(
        self,
        file: str,
        sources: Mapping[str, PairBatches],
        computed: Callable[[Mapping[str, PairBatches]], dict[str, Table]],
    ) -> dict[str, Table]:
        """Returns the log-probabilities of each split's pairs, `computed` where the run has no `file` with them.

        The first process alone reads and writes it. None of a test's where a resumed run has none.
        """
        path, identity, tested = self.out / file, super()._identity(), "test" in sources
        whose = {"model": identity.model, "data": identity.data, "dtype": str(identity.config["compute dtype"])}
        if self._begun_with is not None:
            whose["adapter"] = self._begun_with
        if tested:
            whose["data"] = batching.fingerprint(self.splits["test"].examples)
        tables = read(path, whose) if self.leads else None
        if tables is None and not tested and self.leads and path.exists() and self.resumed is not None:
            raise InputError(
                f"{path}: is of another model, other data or another --compute-dtype; go on with the same, "
                "or choose another directory"
            )
        known = bool(mx.distributed.all_sum(mx.array(int(tables is not None))).item())
        if not known:
            if tested and self.resumed is not None:
                return {}
            begun = self.asked.method.from_adapter
            if begun is not None and not begun.is_dir():
                raise InputError(f"{path}: is missing, and made from {begun}, which is gone; start anew")
            tables = computed(sources)
        elif tables is None:
            tables = {name: np.zeros_like(batches.reference) for name, batches in sources.items()}
        assert tables is not None
        whole = {name: np.array(mx.distributed.all_sum(mx.array(tables[name]))) for name in sources}
        if not known and self.leads:
            write(path, whole, whose)
        return whole

    def _identity(self) -> Identity:
        identity, preferring = super()._identity(), self._preferring
        own = {"loss": preferring.loss, "beta": preferring.beta}
        return replace(identity, config={**identity.config, **own})


def compute(
    model: Model,
    dtype: mx.Dtype | None,
    sources: Mapping[str, PairBatches],
    on_pairs: Callable[[int], None],
    stop: Event,
) -> dict[str, Table]:
    """Computes the answers' summed log-probabilities, of this process's pairs; 0 for others', and once `stop` is set.

    Args:
        dtype: what trainable parameters are rounded to, as in training; None for what they are.
        sources: the pairs, by split.
        on_pairs: called after each batch with the number of this process's pairs that are done, of all splits.
    """
    tables = {name: np.zeros((len(batches.reference), 2), np.float32) for name, batches in sources.items()}
    kept, parts, done = model.trainable_parameters(), device.Parts(device.most_parts()), 0
    model.eval()
    if dtype is not None:
        model.update(tree_map(lambda parameter: parameter.astype(dtype), kept))
    try:
        for name, batch in ((name, batch) for name, batches in sources.items() for batch in batches.once()):
            cut, sums = batch.split(parts.most), []
            for part, stream in zip(cut, parts.streams(len(cut), model.parameters()), strict=True):
                with stream:
                    sums.append(_sums(model, part))
            parts.evaluate(sums)
            assert isinstance(batch, PairBatch)
            found = np.concatenate([np.array(each) for each in sums]).reshape(*batch.pairs.shape, 2)
            real = batch.pairs >= 0
            tables[name][batch.pairs[real]] = found[real]
            done += int(real.sum())
            on_pairs(done)
            if stop.is_set():
                break
    finally:
        model.update(kept)
    return tables


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
