"""What the model said before it was trained: log-probabilities of all pairs' answers, computed once and kept.

Knows the file that they are kept in, and by what it tells whose they are. Under an adapter that has learnt nothing yet
the model is its base, so no second model is ever in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_map

from elm_mlx import files
from elm_mlx.data.batches import Batch
from elm_mlx.data.pairs import PairBatch, PairBatches
from elm_mlx.data.parallel import Parts
from elm_mlx.errors import InputError
from elm_mlx.model.network import Model
from elm_mlx.model.ops import Segments
from elm_mlx.train.preference import log_probabilities, positions

FILE = "reference.safetensors"  # in a run's directory
Table = npt.NDArray[np.float32]  # (pairs, 2): of chosen and rejected answers


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
    kept, parts, done = model.trainable_parameters(), Parts(0), 0
    model.eval()
    if dtype is not None:
        model.update(tree_map(lambda parameter: parameter.astype(dtype), kept))
    try:
        for batch in batches.once():
            sums = parts.compute(lambda part: _sums(model, part), batch, model.parameters())
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
    head = lambda _, rows: model.head(rows)  # noqa: E731
    return log_probabilities(head, model.config.vocab_size, {}, hidden, positions(batch))[0]


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
