"""The mean of several checkpoints of one model, as a model directory.

Knows what may be averaged, the mean in float64, and how far each checkpoint lies from it. Takes a few megabytes of
memory whatever the model's size: files are opened, tensors named and directories written by the converter. Computes
with NumPy alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from elm_mlx import reading
from elm_mlx.directories import MODEL, PARAMETERS, RUN_RECORD, check_destination, checkpoints_of
from elm_mlx.errors import ElmError, InputError, counted
from elm_mlx.files import expanded, hold, new_directory
from elm_mlx.model.config import ModelConfig
from elm_mlx.text import chat_template
from elm_mlx.version import __version__
from elm_mlx_convert.conversion import write_settings
from elm_mlx_convert.destination import check_room, hashing, sha256, write_weights
from elm_mlx_convert.lora_files import has_adapter
from elm_mlx_convert.plan import Plan, make_plan
from elm_mlx_convert.sources import Source, open_source
from elm_mlx_convert.tensors import LazyTensor, to_float32

# What a config says beyond the shapes of the weights: models that differ in it compute differently.
_BEYOND_SHAPES = (
    "head_dim", "num_query_heads", "num_kv_heads", "ffn_with_glu", "rms_norm_eps", "rope_freq_constant",
    "max_context_length", "bos_token_id", "eos_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Average:
    """What `average` has written.

    Attributes:
        plan: of the directory, with the mean's tensors.
        distances: of each checkpoint, in the order given: the norm of its difference from the mean, over all weights,
            as a share of the mean's norm.
        warnings: what may not be wanted.
    """

    destination: Path
    plan: Plan
    distances: tuple[float, ...]
    warnings: tuple[str, ...]


def last(run: Path, count: int) -> list[Path]:
    """The newest `count` checkpoints of a training run, oldest first.

    Raises:
        InputError: `run` holds fewer.
    """
    if count < 1:
        raise InputError(f"--last {count}: one checkpoint at least is needed")
    if not run.is_dir():
        raise InputError(f"{run}: no such directory")
    found = checkpoints_of(run)
    if len(found) < count:
        held = counted(len(found), "checkpoint")
        raise InputError(f"{run}: holds {held} (checkpoints/step-…), and --last asks for {count}")
    return found[-count:]


def average(
    checkpoints: Sequence[str | Path],
    destination: str | Path,
    *,
    config: Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Average:
    """Writes the mean of `checkpoints`, every one with the same weight.

    The values are those of CoreNet's own averaging: sums in float64 in the order given, divided, and rounded once.

    Args:
        checkpoints: of our training runs (`RUN/checkpoints/step-…`), or whatever `convert` reads. One is enough.
        destination: the model directory to make. It appears complete or not at all.
        config: a `config.json` or CoreNet YAML for all of them; by default the one beside each, for a run's checkpoint
            the run's own or that of the model that it started from.
        tokenizer: a SentencePiece model, a directory or repository that has one; by default found like the config.
        dtype: float32, float16 or bfloat16.
        overwrite: replace a model directory that is there.
        on_progress: called with the number of bytes written since the last call, and of all.

    Raises:
        InputError: a checkpoint cannot be read, is of another model than the first, is an adapter, or holds values
            that are not finite. Names it, and the tensor.
        ElmError: the directory cannot be written, or another process is writing it. `destination` is then as it was.
    """
    path = expanded(destination)
    try:
        with hold(path, beside=True):
            check_destination(path, MODEL, overwrite)
            plans = _plans(checkpoints, config, tokenizer, dtype)
            check_destination(path, MODEL, overwrite, [file for plan in plans for file in plan.source.files])
            check_room(path, plans[0].nbytes)
            tally = _Tally(len(plans))
            names, columns = list(map(str, checkpoints)), zip(*(plan.tensors for plan in plans), strict=True)
            tensors = tuple(_mean(list(zip(names, column, strict=True)), tally) for column in columns)
            said = _write(plans, tensors, path, overwrite, partial(_report, on_progress, plans[0].nbytes))
    except OSError as error:
        raise ElmError(f"{path}: was not made: {error.filename or 'input or output'}: {error.strerror}") from None
    warnings = (*plans[0].warnings, *_guesses(plans[0]), *([said] if said else []))
    return Average(path, replace(plans[0], tensors=tensors), tally.distances(), warnings)


def _guesses(plan: Plan) -> list[str]:
    """What is told of a config that nobody wrote; the shapes of a known model say all of it."""
    if plan.config_origin != "the shapes":
        return []
    context = plan.config.max_context_length
    return [f"a context of {context:,} tokens, and what else the shapes don't say, is guessed: --config FILE says it"]


def _report(on_progress: Callable[[int, int], None], total: int, count: int) -> None:
    on_progress(count, total)


def _plans(
    checkpoints: Sequence[str | Path], config: Path | None, tokenizer: str | Path | None, dtype: str
) -> list[Plan]:
    """Each checkpoint opened, named and measured; all of the same model."""
    if not checkpoints:
        raise InputError("no checkpoint was named")
    plans: list[Plan] = []
    for given in checkpoints:
        source = _open(given, alone=len(checkpoints) == 1)
        if has_adapter(source.tensors) or any(name.endswith((".lora_a", ".lora_b")) for name in source.tensors):
            raise InputError(
                f"{given}: holds an adapter, and a mean of adapters is no adapter of the mean: make models of them "
                "first, with `convert` or `fuse`"
            )
        plan = make_plan(source, config=config, tokenizer=tokenizer, dtype=dtype, chat_template=_trained_by(given))
        if plans:
            _check_same(str(checkpoints[0]), plans[0], str(given), plan)
        if any(set(plan.source.files) & set(other.source.files) for other in plans):
            raise InputError(f"{given}: is named twice")
        plans.append(plan)
    return plans


def _open(given: str | Path, alone: bool) -> Source:
    """A checkpoint's tensors, and the directory with its config and tokenizer: the run's, if it is of a run.

    A run of `pretrain` is a model too, its last one: not what is meant where it is named `alone`.
    """
    path = expanded(given)
    weights = path / PARAMETERS
    if weights.is_file():
        path = path if path.parent.name == "checkpoints" else path.resolve()
        run = path.parent.parent if path.parent.name == "checkpoints" else path
        source = open_source(weights)
        return replace(source, label=path.name, kind="checkpoint of a run", directory=_home(run, source))
    found = checkpoints_of(path)
    if found and (alone or not (path / "model.safetensors").is_file()):
        if len(found) == 1:
            raise InputError(
                f"{given}: is a run that kept 1 checkpoint, which is its own mean: let it keep more (`run.keep` in "
                f"pretrain's recipe, --keep of `lora --full`), or name {found[0]}"
            )
        raise InputError(f"{given}: is a run with {len(found)} checkpoints: pass --last N, or name some of them")
    return open_source(given)


def _trained_by(given: str | Path) -> str | None:
    """The chat template that the run of a checkpoint was trained by, where that is not the model's own."""
    path = expanded(given)
    recorded = path.parent.parent / chat_template.FILE_NAME
    if path.parent.name != "checkpoints" or not recorded.is_file():
        return None
    return str(recorded) if reading.text(recorded).strip() else chat_template.NONE


def _home(run: Path, source: Source) -> Path:
    """Where a run's config and tokenizer are: with it; or, if it trained a model of that shape, still with that."""
    if (run / "config.json").is_file():
        return run
    try:
        model = Path(reading.json_object(run / RUN_RECORD)["settings"]["model"])
        shapes = ModelConfig.load(model / "config.json").shapes()
    except (InputError, KeyError, TypeError):  # no such run, or the model is gone
        return run
    return model if shapes == {name: tensor.shape for name, tensor in source.tensors.items()} else run


def _check_same(first: str, expected: Plan, given: str, plan: Plan) -> None:
    shapes = {tensor.name: tensor.shape for tensor in expected.tensors}
    for tensor in plan.tensors:
        if tensor.name not in shapes:
            raise InputError(f"{given}: has {tensor.name}, which {first} has not")
        if tensor.shape != shapes[tensor.name]:
            raise InputError(
                f"{given}: {tensor.name} has the shape {tensor.shape}, and in {first} {shapes[tensor.name]}: only "
                "checkpoints of one model have a mean"
            )
    missing = shapes.keys() - {tensor.name for tensor in plan.tensors}
    if missing:
        raise InputError(f"{given}: has no {min(missing)}, which {first} has")
    for field in _BEYOND_SHAPES:
        here, there = getattr(plan.config, field), getattr(expected.config, field)
        if here != there:
            raise InputError(
                f"{given}: {field} is {here} ({plan.config_origin}), and of {first} {there} "
                f"({expected.config_origin}); --config decides for both"
            )
    if plan.tokenizer and expected.tokenizer and plan.tokenizer.read_bytes() != expected.tokenizer.read_bytes():
        raise InputError(f"{given}: has another tokenizer than {first}")


class _Tally:
    """Squared norms, summed up while the mean is written: of the mean, and of each checkpoint's difference."""

    def __init__(self, checkpoints: int) -> None:
        self._differences = [0.0] * checkpoints
        self._mean = 0.0

    def add(self, mean: np.ndarray, blocks: Sequence[np.ndarray]) -> None:
        """Leaves in `blocks` their differences from `mean`."""
        self._mean += _squared(mean)
        for number, block in enumerate(blocks):
            block -= mean
            self._differences[number] += _squared(block)

    def distances(self) -> tuple[float, ...]:
        return tuple(math.sqrt(squared / self._mean) if self._mean else 0.0 for squared in self._differences)


def _squared(values: np.ndarray) -> float:
    flat = values.reshape(-1)
    return float(np.einsum("i,i", flat, flat))  # not np.dot, whose threads cost more than they gain on a block


def _mean(parts: Sequence[tuple[str, LazyTensor]], tally: _Tally) -> LazyTensor:
    """The mean of one weight in every checkpoint: computed, and tallied, as its rows are read. To be read once."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        blocks = [_float64(tensor.read_rows(start, stop), tensor.dtype) for _, tensor in parts]
        mean = blocks[0].copy()
        for block in blocks[1:]:
            mean += block
        if not np.isfinite(mean).all():
            broken = [part for part, block in zip(parts, blocks, strict=True) if not np.isfinite(block).all()]
            name, tensor = broken[0] if broken else parts[0]
            raise InputError(f"{name}: {tensor.name} holds values that are no numbers, or infinite; leave it out")
        mean /= len(blocks)
        tally.add(mean, blocks)
        return mean

    first = parts[0][1]
    return LazyTensor(first.name, first.shape, "float64", read_rows)


def _float64(block: np.ndarray, dtype: str) -> np.ndarray:
    return block.astype(np.float64) if dtype == "float64" else to_float32(block, dtype).astype(np.float64)


def _write(
    plans: Sequence[Plan],
    tensors: Sequence[LazyTensor],
    path: Path,
    overwrite: bool,
    progress: Callable[[int], None],
) -> str | None:
    """The whole directory. Returns what there is to warn of."""
    plan = plans[0]
    files = dict.fromkeys(file for plan in plans for file in plan.source.files)
    with hashing(files) as hashes, new_directory(path, replace=overwrite) as directory:
        write_weights(directory, tensors, plan.dtype, progress=progress)
        said = write_settings(plan, directory)
        _write_json(directory / "conversion.json", _record(plans, hashes()))
    return said


def _record(plans: Sequence[Plan], hashes: dict[Path, str]) -> dict[str, Any]:
    """Where the model comes from. As of a conversion, equal input gives equal bytes."""
    plan = plans[0]
    return {
        "tool": f"elm-mlx {__version__}",
        "average": [
            {
                "name": each.source.label,
                "kind": each.source.kind,
                "dtype": each.source_dtype,
                "files": [
                    {"name": file.name, "bytes": file.stat().st_size, "sha256": hashes[file]}
                    for file in each.source.files
                ],
            }
            for each in plans
        ],
        "config": plan.config_origin,
        "dtype": plan.dtype,
        "dropped_vocabulary_rows": plan.dropped_rows,
        "tokenizer_sha256": sha256(plan.tokenizer) if plan.tokenizer else None,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
