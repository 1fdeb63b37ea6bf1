"""From one model directory to another in fewer bits: plan, write, measure what was lost.

Knows the order of things and what is recorded. What is packed how is `plan`'s, what it loses `losses`'.
"""

from __future__ import annotations

import json
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
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import MODEL_TYPE
from elm_mlx.model.packing import AFFINE
from elm_mlx.quantize import bit_plan, learned, losses
from elm_mlx.quantize.bit_plan import Plan, Tensors, main_dtype
from elm_mlx.quantize.losses import Advance, Losses, Speed
from elm_mlx.quantize.recipe import Format, Recipe, pack
from elm_mlx.safetensors_file import Pending, fingerprint, weight_files
from elm_mlx.store.describe import check_directory, config_values
from elm_mlx.store.loading import Loaded, open_model, pending, read_weights
from elm_mlx.text import excerpts
from elm_mlx.text.excerpts import Excerpt
from elm_mlx.version import __version__

RECORD = "quantization.json"
_WIDE = 3072  # OpenELM-3B, whose activations float16 cannot hold

Progress = Callable[[str, int, int], None]  # what is done; so much of it, of so much


@dataclass(frozen=True)
class Quantization:
    """What was made, and what it lost.

    Attributes:
        formats: module -> how its weight is packed now.
        dtype: of scales, biases and what is not packed.
        bytes_before, bytes_after: of the weights' files.
        bits_before, bits_after: a parameter, all that is stored counted.
        speed_before, speed_after: computed as `computed` says, on this machine.
        text: what the losses were measured on; None where made-up ids stood in for it.
    """

    destination: Path
    formats: dict[str, Format]
    dtype: str
    bytes_before: int
    bytes_after: int
    bits_before: float
    bits_after: float
    losses: Losses
    speed_before: Speed
    speed_after: Speed
    computed: str
    text: Excerpt | None


@dataclass(frozen=True)
class Listener:
    """Who is told of a quantization as it goes.

    Attributes:
        plan: of what will be done.
        progress: of what is being done.
        done: of the result, before it is kept or refused.
    """

    plan: Callable[[Plan], None] = lambda made: None
    progress: Progress = lambda what, done, total: None
    done: Callable[[Quantization], None] = lambda made: None


def quantize(
    source: str | Path,
    destination: str | Path,
    recipe: Recipe,
    *,
    calibration: Path | None = None,
    text: Path | None = None,
    max_kld: float | None = None,
    overwrite: bool = False,
    listener: Listener = Listener(),
) -> Quantization:
    """Writes `source` in fewer bits, with a record of what that lost.

    Args:
        calibration: text to measure sensitivities on, and for methods to learn from; a built-in one by default.
        text: text to measure losses on, up to 4,096 tokens; another built-in one by default.
        max_kld: refuse what diverges more than so many nats a token on average.

    Raises:
        InputError: model, texts or recipe are at fault.
        ElmError: the result is refused, or cannot be written. Nothing is changed then.
    """
    source, target = check_directory(reading.expanded(source)), reading.expanded(destination)
    directories.check_destination(target, directories.MODEL, overwrite, (source,))
    learn, measured = excerpts.calibration(calibration), excerpts.held_out(text)
    with files.new_directory(target, replace=overwrite) as directory:
        job = _Job(source, directory, recipe, learn, measured, listener)
        done = job.run(target)
        listener.done(done)
        _check(done, max_kld)
        write_json(directory / RECORD, _record(done, recipe, job.plan, source, learn))
    return done


class _Job:
    """One quantization: the model before, its plan, what is written, the model after; one model in memory at a time."""

    plan: Plan

    def __init__(
        self, source: Path, directory: Path, recipe: Recipe, learn: Excerpt, measured: Excerpt, listener: Listener
    ):
        self._source, self._directory, self._recipe = source, directory, recipe
        self._learn, self._measured, self._listener = learn, measured, listener

    def run(self, target: Path) -> Quantization:
        loaded = open_model(self._source)
        if self._recipe.method is not None:
            learned.check_network(self._recipe.method, loaded.model.config)
        tensors, already = read_weights(self._source, loaded.model.config)
        if already:
            raise InputError(f"{self._source}: is quantized already ({loaded.stored}): quantize what it was made of")
        shapes = bit_plan.packable(loaded.model, tensors)
        dtype = _dtype(self._recipe.dtype, loaded, tensors)
        ids = losses.text_ids(self._learn, loaded) if self._recipe.method else []
        self.plan = self._planned(loaded, shapes, tensors, dtype)
        self._listener.plan(self.plan)
        parameters, bits_before = bit_plan.parameters(tensors), _bits(tensors, bit_plan.parameters(tensors))
        rows = losses.text_rows(self._measured, loaded, losses.WINDOW)
        positions = sum(len(row.inputs) for row in rows)
        speed_before = losses.speed(loaded)
        with losses.reference(loaded.model, rows, self._directory, self._advance("reading", positions)) as before:
            del loaded  # before the other is opened
            mx.clear_cache()
            packed = self._write(tensors, dtype, ids)
            after = open_model(self._directory)
            on_text = after.tokenizer is not None
            found = losses.compare(before, after.model, on_text, self._advance("comparing", positions))
        return Quantization(
            target, packed, str(dtype).removeprefix("mlx.core."),
            _file_bytes(self._source), _file_bytes(self._directory),
            bits_before, _bits(read_weights(self._directory, after.model.config)[0], parameters),
            found, speed_before, losses.speed(after),
            computed=after.notes[0] if after.notes else "computed as stored",
            text=self._measured if on_text else None,
        )  # fmt: skip

    def _planned(self, loaded: Loaded, shapes: dict[str, tuple[int, ...]], tensors: Tensors, dtype: mx.Dtype) -> Plan:
        recipe = self._recipe
        if recipe.bpw is None:
            return bit_plan.uniform(shapes, recipe.how, tensors, dtype)
        bit_plan.check_budget(shapes, recipe.how.group_size, recipe.bpw, tensors, dtype)
        losses.text_ids(self._learn, loaded)  # a made-up text tells nothing of what matters
        rows = bit_plan.spread(losses.text_rows(self._learn, loaded, bit_plan.WINDOW, most=1 << 20))
        advance = self._advance("sensitivity", bit_plan.passes(len(shapes)))
        with losses.reference(loaded.model, rows, self._directory) as before:
            found = bit_plan.measure(loaded.model, before, shapes, recipe.how.group_size, dtype, advance)
        return bit_plan.mixed(shapes, recipe.how.group_size, recipe.bpw, found, tensors, dtype)

    def _write(self, tensors: Tensors, dtype: mx.Dtype, ids: list[int]) -> dict[str, Format]:
        recipe, formats = self._recipe, dict(self.plan.formats)
        if recipe.method is None:
            write(self._source, self._directory, tensors, formats, dtype)
            return formats
        tensors.clear()
        self._listener.progress(recipe.method, 0, 0)
        learnt, formats = learned.quantize(
            self._source, recipe.method, formats, recipe.how, ids, dtype, recipe.rate
        )  # fmt: skip
        write(self._source, self._directory, learnt, formats, dtype, packed=True)
        return formats

    def _advance(self, what: str, total: int) -> Advance:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._listener.progress(what, done, total)

        return advance


def _dtype(asked: str | None, loaded: Loaded, tensors: Tensors) -> mx.Dtype:
    stored = bit_plan.main_dtype(tensors, mx.bfloat16)
    config = loaded.model.config
    wide = getattr(loaded.model, "model_type", None) == MODEL_TYPE and config.model_dim >= _WIDE
    if asked == "float16" and wide:
        raise InputError(
            "--dtype float16: the activations of a model as wide as the 3B overflow float16; use bfloat16 or float32"
        )
    if asked is not None:
        return device.DTYPES[asked]
    return stored if stored == mx.float16 and not wide else mx.bfloat16


def _check(done: Quantization, max_kld: float | None) -> None:
    lost = done.losses.kl_mean
    if not math.isfinite(lost):
        raise ElmError(f"{done.destination}: the quantized model's logits are no numbers; nothing was written")
    if max_kld is not None and lost > max_kld:
        raise ElmError(
            f"{done.destination}: diverges by {lost:.3g} nats a token, more than --max-kld {max_kld:g}; "
            "nothing was written"
        )


def _record(done: Quantization, recipe: Recipe, made: Plan, source: Path, learn: Excerpt) -> dict[str, Any]:
    """What `json` holds: how it was made, and all that was measured."""
    learns = recipe.bpw is not None or recipe.method is not None
    return {
        "tool": f"elm-mlx {__version__}",
        "machine": device.machine(),
        "source": {"name": source.resolve().name, "sha256": fingerprint(source)},
        "recipe": {
            "method": recipe.method or "rounding to the nearest",
            **({"rate": recipe.rate} if recipe.method == "dwq" else {}),
            "bits_per_weight_asked": recipe.bpw,
            "calibration": {"name": learn.name, "sha256": learn.sha256} if learns else None,
            "dtype": done.dtype,
        },
        "bytes": {"before": done.bytes_before, "after": done.bytes_after},
        "bits_per_weight": {"before": done.bits_before, "after": done.bits_after},
        "losses": {
            "text": None if done.text is None else {"name": done.text.name, "sha256": done.text.sha256},
            **asdict(done.losses),
            "kl_predicted": made.predicted,
        },
        "tokens_per_second": {
            "before": asdict(done.speed_before), "after": asdict(done.speed_after), "computed": done.computed,
        },
        "weights": {name: how.packing() for name, how in done.formats.items()},
    }  # fmt: skip


def _bits(tensors: Tensors, parameters: int) -> float:
    return 8 * sum(int(tensor.nbytes) for tensor in tensors.values()) / parameters


def _file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(path))


def write(
    source: Path,
    directory: Path,
    tensors: Tensors,
    formats: Mapping[str, Format],
    dtype: mx.Dtype,
    packed: bool = False,
) -> None:
    """Weights, config and all that comes along from `source`, into `directory`. `tensors` is emptied on the way.

    Args:
        dtype: of scales, biases, and what stays as it is.
        packed: whether `tensors` have the weights in their formats already.

    Raises:
        ElmError: there is no room.
        OSError: it cannot be written.
    """
    own = main_dtype(tensors, dtype)
    made: list[Pending] = []
    for name in tensors:
        how = None if packed else formats.get(name.removesuffix(".weight"))
        made += [_kept(tensors, name, own, dtype)] if how is None else _packed(tensors, name, how, dtype)
    files.check_room(directory, sum(tensor.nbytes for tensor in made))
    safetensors_file.write_shards(directory, made)
    write_json(directory / "config.json", config_values(source) | _entries(formats))
    directories.carry(source, directory)
    if (source / "conversion.json").is_file():  # where the model comes from is still true
        shutil.copyfile(directories.own_file(source / "conversion.json"), directory / "conversion.json")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _kept(tensors: Tensors, name: str, own: mx.Dtype, dtype: mx.Dtype) -> Pending:
    """What is of the model's own type is cast; what is not, such as a state that wants float32, has its reasons."""
    tensor = tensors[name]
    cast = dtype if tensor.dtype == own and mx.issubdtype(own, mx.floating) else tensor.dtype
    return pending(name, cast, tensor.shape, lambda: tensors.pop(name).astype(cast))


def _packed(tensors: Tensors, name: str, how: Format, dtype: mx.Dtype) -> list[Pending]:
    *rows, columns = tensors[name].shape
    groups = (*rows, columns // how.group_size)
    shapes: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {"weight": (mx.uint32, (*rows, columns * how.bits // 32))}
    if how.mode == AFFINE:
        shapes |= {"scales": (dtype, groups), "biases": (dtype, groups)}
    else:
        shapes |= {"scales": (mx.uint8, groups)}
    made: dict[str, mx.array] = {}

    def make(part: str) -> mx.array:
        """The first call makes all parts; each is handed out once."""
        if not made:
            made.update(pack(tensors.pop(name), how, dtype))
        return made.pop(part)

    stem = name.removesuffix("weight")
    return [pending(stem + part, kind, shape, partial(make, part)) for part, (kind, shape) in shapes.items()]


def _entries(formats: Mapping[str, Format]) -> dict[str, Any]:
    """The commonest format, and by name what has another; under both names that mlx-lm and the hub look for."""
    common = Counter(formats.values()).most_common(1)[0][0]
    others = {name: how.packing() for name, how in formats.items() if how != common}
    entry = common.packing() | others
    return {"quantization": entry, "quantization_config": entry}
