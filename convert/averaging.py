"""The mean of several checkpoints of one model, as a model directory, and how far each checkpoint lies from it.

Sums in float64 with NumPy alone, a few megabytes at a time whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from elm_mlx import reading
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.directories import MODEL, PARAMETERS, RUN_RECORD, check_destination, checkpoints_of
from elm_mlx.errors import InputError
from elm_mlx.files import hold, write_json
from elm_mlx.model.config import ModelConfig
from elm_mlx.reading import counted, expanded
from elm_mlx.text import chat_template
from elm_mlx.version import __version__
from elm_mlx_convert.conversion import write_model
from elm_mlx_convert.destination import failures_named, file_record, new_hashed_directory, sha256
from elm_mlx_convert.lora_files import has_adapter
from elm_mlx_convert.plan import ConversionPlan, make_plan
from elm_mlx_convert.sources import CheckpointSource, open_source
from elm_mlx_convert.tensors import LazyTensor, to_float32

# What a config says beyond the shapes of the weights: models that differ in it compute differently.
_BEYOND_SHAPES = (
    "head_dim", "num_query_heads", "num_kv_heads", "ffn_with_glu", "rms_norm_eps", "rope_freq_constant",
    "max_context_length", "bos_token_id", "eos_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Average:
    """The result of `average`.

    Attributes:
        plan: of the directory, with the mean's tensors.
        distances: of each checkpoint, in the order given: the norm of its difference from the mean, over all weights,
            as a share of the mean's norm.
        warnings: what may not be wanted.
    """

    destination: Path
    plan: ConversionPlan
    distances: tuple[float, ...]
    warnings: tuple[str, ...]


def last(run: Path, count: int) -> list[Path]:
    """Returns the newest `count` checkpoints of a training run, oldest first.

    Raises:
        InputError: `run` holds fewer.
    """
    if count < 1:
        raise InputError(f"--last {count}: must be 1 or more")
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
    on_progress: OnProgress = no_progress,
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
        on_progress: called with "write" and bytes.

    Raises:
        InputError: a checkpoint cannot be read, is of another model than the first, is an adapter, or holds values
            that are not finite. Names it, and the tensor.
        ElmError: the directory cannot be written, or another process is writing it. `destination` is then as it was.
    """
    path = expanded(destination)
    with failures_named(path), hold(path, beside=True):
        check_destination(path, MODEL, overwrite)
        plans = _plans(checkpoints, config, tokenizer, dtype)
        files = list(dict.fromkeys(file for plan in plans for file in plan.source.files))
        check_destination(path, MODEL, overwrite, files)
        tally = _Tally(len(plans))
        names, columns = list(map(str, checkpoints)), zip(*(plan.tensors for plan in plans), strict=True)
        tensors = tuple(_mean(list(zip(names, column, strict=True)), tally) for column in columns)
        plan = replace(plans[0], tensors=tensors)
        with new_hashed_directory(path, files, plan.nbytes, overwrite=overwrite) as (directory, hashes):
            warnings = [*plan.warnings, *_guesses(plan), *write_model(directory, plan, on_progress)]
            write_json(directory / "conversion.json", _record(plans, hashes()))
    return Average(path, plan, tally.distances(), tuple(warnings))


def _guesses(plan: ConversionPlan) -> list[str]:
    """Returns a warning of a config that nobody wrote; the shapes of a known model say all of it."""
    if plan.config_origin != "the shapes":
        return []
    context = plan.config.max_context_length
    return [f"a context of {context:,} tokens, and what else the shapes do not give, is a guess: pass --config FILE"]


def _plans(
    checkpoints: Sequence[str | Path], config: Path | None, tokenizer: str | Path | None, dtype: str
) -> list[ConversionPlan]:
    """Opens the checkpoints, all of the same model."""
    if not checkpoints:
        raise InputError("no checkpoint was named")
    plans: list[ConversionPlan] = []
    for name in checkpoints:
        source, template = _open(name, alone=len(checkpoints) == 1)
        if has_adapter(source.tensors) or any(tensor.endswith((".lora_a", ".lora_b")) for tensor in source.tensors):
            raise InputError(
                f"{name}: holds an adapter, and adapters cannot be averaged: make models of them "
                "first, with `convert` or `fuse`"
            )
        if any(tensor.startswith("maps.") for tensor in source.tensors):
            raise InputError(f"{name}: holds a KV Prediction, which works as it was trained: these cannot be averaged")
        plan = make_plan(source, config=config, tokenizer=tokenizer, dtype=dtype, chat_template=template)
        if plans:
            _check_same(str(checkpoints[0]), plans[0], str(name), plan)
        if any(set(plan.source.files) & set(other.source.files) for other in plans):
            raise InputError(f"{name}: is named twice")
        plans.append(plan)
    return plans


def _open(name: str | Path, alone: bool) -> tuple[CheckpointSource, str | None]:
    """Opens a checkpoint, and finds the chat template that its run was trained by, where it is of a run.

    A run of `pretrain` is a model too, its last one: not what is meant where it is named `alone`.
    """
    path = expanded(name)
    if (path / PARAMETERS).is_file():
        path = path if path.parent.name == "checkpoints" else path.resolve()
        run = path.parent.parent if path.parent.name == "checkpoints" else path
        source = open_source(path / PARAMETERS)
        template, trained_by = None, run / chat_template.FILE_NAME
        if run != path and trained_by.is_file():
            template = str(trained_by) if reading.text(trained_by).strip() else chat_template.NONE
        home = _home(run, source)
        return replace(source, label=path.name, kind="checkpoint of a run", directory=home), template
    found = checkpoints_of(path)
    if found and (alone or not (path / "model.safetensors").is_file()):
        if len(found) == 1:
            raise InputError(
                f"{name}: is a run that kept 1 checkpoint, and 2 are needed: let it keep more (`run.keep` in "
                f"pretrain's recipe, --keep of `lora --full`), or name {found[0]}"
            )
        raise InputError(f"{name}: is a run with {len(found)} checkpoints: pass --last N, or name some of them")
    return open_source(name), None


def _home(run: Path, source: CheckpointSource) -> Path:
    """Returns the directory of a run's config and tokenizer: its own, or that of the model that it trained."""
    if (run / "config.json").is_file():
        return run
    try:
        model = Path(reading.json_object(run / RUN_RECORD)["settings"]["model"])
        shapes = ModelConfig.load(model / "config.json").shapes()
    except (InputError, KeyError, TypeError):  # no such run, or the model is gone
        return run
    return model if shapes == {name: tensor.shape for name, tensor in source.tensors.items()} else run


def _check_same(first: str, expected: ConversionPlan, name: str, plan: ConversionPlan) -> None:
    shapes, own = ({tensor.name: tensor.shape for tensor in each.tensors} for each in (expected, plan))
    if added := own.keys() - shapes.keys():
        raise InputError(f"{name}: has the tensor {min(added)}, which {first} lacks")
    if missing := shapes.keys() - own.keys():
        raise InputError(f"{name}: lacks the tensor {min(missing)}, which {first} has")
    if other := next((tensor for tensor in own if own[tensor] != shapes[tensor]), None):
        raise InputError(
            f"{name}: {other} has the shape {own[other]}, and in {first} {shapes[other]}: only checkpoints of one "
            "model can be averaged"
        )
    for field in _BEYOND_SHAPES:
        here, there = getattr(plan.config, field), getattr(expected.config, field)
        if here != there:
            raise InputError(
                f"{name}: {field} is {here} ({plan.config_origin}), and of {first} {there} "
                f"({expected.config_origin}); --config decides for both"
            )
    if plan.tokenizer and expected.tokenizer and plan.tokenizer.read_bytes() != expected.tokenizer.read_bytes():
        raise InputError(f"{name}: has another tokenizer than {first}")


class _Tally:
    """Sums squared norms while the mean is written: of the mean, and of each checkpoint's difference from it."""

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
    """Returns the mean of one weight: computed, and tallied, as its rows are read. To be read once."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        blocks = [_float64(tensor.read_rows(start, stop), tensor.dtype) for _, tensor in parts]
        mean = blocks[0].copy()
        for block in blocks[1:]:
            mean += block
        if not np.isfinite(mean).all():
            broken = [part for part, block in zip(parts, blocks, strict=True) if not np.isfinite(block).all()]
            name, tensor = broken[0] if broken else parts[0]
            raise InputError(f"{name}: {tensor.name} holds NaN or infinite values; leave it out")
        mean /= len(blocks)
        tally.add(mean, blocks)
        return mean

    first = parts[0][1]
    return LazyTensor(first.name, first.shape, "float64", read_rows)


def _float64(block: np.ndarray, dtype: str) -> np.ndarray:
    return block.astype(np.float64) if dtype == "float64" else to_float32(block, dtype).astype(np.float64)


def _record(plans: Sequence[ConversionPlan], hashes: dict[Path, str]) -> dict[str, Any]:
    """Returns the content of `conversion.json`. As of a conversion, equal input gives equal bytes."""
    plan = plans[0]
    return {
        "tool": f"elm-mlx {__version__}",
        "average": [
            {
                "name": each.source.label,
                "kind": each.source.kind,
                "dtype": each.source_dtype,
                "files": file_record(each.source.files, hashes),
            }
            for each in plans
        ],
        "config": plan.config_origin,
        "dtype": plan.dtype,
        "dropped_vocabulary_rows": plan.dropped_rows,
        "tokenizer_sha256": sha256(plan.tokenizer) if plan.tokenizer else None,
    }
