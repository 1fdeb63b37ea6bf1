"""Quantization of a model directory: plan the bits, write another directory, measure the loss.

`config.json` and the packed weights are laid out as mlx-lm does it. Tensors are made one at a time, and one model at a
time is in memory.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from elm_mlx import device, directories, files, reading, safetensors_file
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import read_config, written_dtype
from elm_mlx.quantize import bit_plan, learned, losses
from elm_mlx.quantize.bit_plan import BitPlan, Weights
from elm_mlx.quantize.losses import QuantizationLosses, Speed
from elm_mlx.quantize.recipe import Format, QuantizationRecipe
from elm_mlx.safetensors_file import Pending, fingerprint, weight_files
from elm_mlx.store.describe import config_values
from elm_mlx.store.loading import Loaded, open_model, pending, pending_packed, read_weights
from elm_mlx.store.model_names import name_of
from elm_mlx.text import excerpts
from elm_mlx.text.excerpts import Excerpt
from elm_mlx.version import __version__

RECORD = "quantization.json"


@dataclass(frozen=True)
class Quantization:
    """A quantized model, and what it lost.

    Attributes:
        formats: module -> how its weight is packed now.
        dtype: of scales, biases and what is not packed.
        bytes_before, bytes_after: of the weights' files.
        bits_before, bits_after: a parameter, all that is stored counted.
        kl_predicted: the divergence that a mix was planned by.
        speed_before, speed_after: computed as `computed` says, on this machine.
        text: the text that losses were measured on; None where made-up ids stood in for it.
    """

    destination: Path
    formats: dict[str, Format]
    dtype: str
    bytes_before: int
    bytes_after: int
    bits_before: float
    bits_after: float
    losses: QuantizationLosses
    kl_predicted: float | None
    speed_before: Speed
    speed_after: Speed
    computed: str
    text: Excerpt | None


def quantize(
    source: str | Path,
    destination: str | Path,
    recipe: QuantizationRecipe,
    *,
    calibration: Path | None = None,
    text: Path | None = None,
    max_kld: float | None = None,
    overwrite: bool = False,
    on_plan: Callable[[BitPlan], None] = lambda plan: None,
    on_progress: OnProgress = no_progress,
    on_result: Callable[[Quantization], None] = lambda result: None,
) -> Quantization:
    """Writes `source` in fewer bits, with a record of what that lost.

    Args:
        calibration: text to measure sensitivities on, and for methods to learn from; a built-in one by default.
        text: text to measure losses on, up to 4,096 tokens; another built-in one by default.
        max_kld: refuse a model that diverges more than so many nats a token on average.
        on_plan: called with the plan before it is carried out.
        on_result: called with the result before it is kept or refused.

    Raises:
        InputError: model, texts or recipe are at fault.
        ElmError: the result is refused, or cannot be written. Nothing is changed then.
    """
    source, target = reading.expanded(source), reading.expanded(destination)
    read_config(source)
    directories.check_destination(target, directories.MODEL, overwrite, (source,))
    learn, measured = excerpts.calibration(calibration), excerpts.held_out(text)
    with files.new_directory(target, replace=overwrite) as directory:
        loaded = open_model(source)
        if recipe.method is not None:
            learned.check_network(recipe.method, loaded.model.config)
        tensors, already = read_weights(source, loaded.model.config)
        if already:
            raise InputError(f"{source}: is quantized already ({loaded.stored}): quantize what it was made of")
        stored = str(bit_plan.main_dtype(tensors)).removeprefix("mlx.core.")
        dtype = written_dtype(loaded.model.config, stored, recipe.dtype)
        weights = Weights.of(loaded.model, tensors, device.DTYPES[dtype])
        ids = losses.text_ids(learn, loaded) if recipe.method or recipe.bpw else []
        plan = _plan(recipe, weights, loaded, learn, directory, on_progress)
        on_plan(plan)
        bits_before = _bits(tensors, weights.parameters)
        rows = losses.text_rows(measured, loaded, losses.WINDOW)
        speed_before = losses.speed(loaded)
        with losses.reference(loaded.model, rows, directory, on_progress) as before:
            del loaded  # before the other is opened
            mx.clear_cache()
            formats = dict(plan.formats)
            if recipe.method is None:
                _write(source, directory, tensors, formats, weights.dtype)
            else:
                tensors.clear()
                on_progress(recipe.method)
                learnt, formats = learned.quantize(source, recipe, formats, ids, weights.dtype)
                _write(source, directory, learnt, formats, weights.dtype, is_packed=True)
            after = open_model(directory)
            on_text = after.tokenizer is not None
            found = losses.compare(before, after.model, on_text, on_progress)
        result = Quantization(
            target, formats, dtype, _file_bytes(source), _file_bytes(directory),
            bits_before, _bits(read_weights(directory, after.model.config)[0], weights.parameters),
            found, plan.predicted, speed_before, losses.speed(after),
            computed=after.notes[0] if after.notes else "computed as stored",
            text=measured if on_text else None,
        )  # fmt: skip
        on_result(result)
        _check(result, max_kld)
        files.write_json(directory / RECORD, _record(result, recipe, source, learn))
    return result


def _plan(
    recipe: QuantizationRecipe, weights: Weights, loaded: Loaded, learn: Excerpt, folder: Path, on_progress: OnProgress
) -> BitPlan:
    if recipe.bpw is None:
        return bit_plan.uniform(weights, recipe.how)
    group_size = recipe.how.group_size
    bit_plan.check_budget(weights, group_size, recipe.bpw)
    rows = bit_plan.spread(losses.text_rows(learn, loaded, bit_plan.WINDOW, most=1 << 20))
    with losses.reference(loaded.model, rows, folder) as before:
        found = bit_plan.sensitivities(loaded.model, before, weights, group_size, on_progress)
    return bit_plan.mix(weights, group_size, recipe.bpw, found)


def _write(
    source: Path,
    directory: Path,
    tensors: dict[str, mx.array],
    formats: Mapping[str, Format],
    dtype: mx.Dtype,
    is_packed: bool = False,
) -> None:
    """Writes weights, config and the other files of `source` into `directory`. `tensors` is emptied on the way.

    Args:
        dtype: of scales, biases, and what stays as it is. What is not of the model's main type keeps its own: a state
            that wants float32, for one.
        is_packed: whether `tensors` have the weights in their formats already.

    Raises:
        ElmError: there is no room.
        OSError: it cannot be written.
    """
    main = bit_plan.main_dtype(tensors)
    made: list[Pending] = []

    def take(name: str, cast: mx.Dtype) -> mx.array:
        return tensors.pop(name).astype(cast)

    for name, tensor in tensors.items():
        how = None if is_packed else formats.get(name.removesuffix(".weight"))
        if how is None:
            cast = dtype if tensor.dtype == main and mx.issubdtype(main, mx.floating) else tensor.dtype
            made.append(pending(name, cast, tensor.shape, partial(take, name, cast)))
        else:
            made += pending_packed(name, tensor.shape, how.packing(), dtype, partial(tensors.pop, name))
    del tensor
    files.check_room(directory, sum(each.nbytes for each in made))
    safetensors_file.write_shards(directory, made)
    # The commonest format, and by name what has another; under both names that mlx-lm and the hub look for.
    common = Counter(formats.values()).most_common(1)[0][0]
    entry = common.packing() | {name: how.packing() for name, how in formats.items() if how != common}
    config = config_values(source, read_config(source)) | {"quantization": entry, "quantization_config": entry}
    files.write_json(directory / "config.json", config)
    directories.carry(source, directory)
    if (source / "conversion.json").is_file():  # where the model comes from is still true
        shutil.copyfile(directories.own_file(source / "conversion.json"), directory / "conversion.json")


def _check(result: Quantization, max_kld: float | None) -> None:
    lost = result.losses.kl_mean
    if not math.isfinite(lost):
        raise ElmError(f"{result.destination}: the quantized model's logits are NaN; nothing was written")
    if max_kld is not None and lost > max_kld:
        raise ElmError(
            f"{result.destination}: diverges by {lost:.3g} nats a token, more than --max-kld {max_kld:g}; "
            "nothing was written"
        )


def _record(result: Quantization, recipe: QuantizationRecipe, source: Path, learn: Excerpt) -> dict[str, Any]:
    """The contents of `quantization.json`: how the model was made, and all that was measured."""
    learns = recipe.bpw is not None or recipe.method is not None
    return {
        "tool": f"elm-mlx {__version__}",
        "machine": device.machine(),
        "source": {"name": name_of(source), "sha256": fingerprint(source)},
        "recipe": {
            "method": recipe.method or "rounding to the nearest",
            **({"rate": recipe.rate} if recipe.method == "dwq" else {}),
            "bits_per_weight_asked": recipe.bpw,
            "calibration": {"name": learn.name, "sha256": learn.sha256} if learns else None,
            "dtype": result.dtype,
        },
        "bytes": {"before": result.bytes_before, "after": result.bytes_after},
        "bits_per_weight": {"before": result.bits_before, "after": result.bits_after},
        "losses": {
            "text": None if result.text is None else {"name": result.text.name, "sha256": result.text.sha256},
            **asdict(result.losses),
            "kl_predicted": result.kl_predicted,
        },
        "tokens_per_second": {
            "before": asdict(result.speed_before), "after": asdict(result.speed_after), "computed": result.computed,
        },
        "weights": {name: how.packing() for name, how in result.formats.items()},
    }  # fmt: skip


def _bits(tensors: Mapping[str, mx.array], parameters: int) -> float:
    return 8 * sum(int(tensor.nbytes) for tensor in tensors.values()) / parameters


def _file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(path))
