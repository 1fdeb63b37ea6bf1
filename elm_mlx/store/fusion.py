"""An adapter merged into its model: a directory like another, whose logits are compared with those of the two."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from elm_mlx import device, directories, files, reading, safetensors_file
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import Config, read_config
from elm_mlx.model.ops import kl_divergences
from elm_mlx.store import adapters
from elm_mlx.store.adapters import EMBEDDING, Adapter
from elm_mlx.store.describe import config_values
from elm_mlx.store.fused_weights import ANEW, LOT, NEAREST, Merge
from elm_mlx.store.loading import Loaded, open_model, read_weights, stored_type
from elm_mlx.text import chat_template, excerpts
from elm_mlx.version import __version__

# Root mean square of the logits' difference, as a share of their spread, that rounding every weight once explains.
# Six times the distance of neighbours around 1: a fifth of one distance was measured on a trained model of 8 layers,
# 1.4 where it was computed in 16 bits too, and 3.2 on a random one of 36. Of float32 the sums' order is most.
_TOLERANCES = {mx.float32: 1e-3, mx.float16: 6 * 2.0**-10, mx.bfloat16: 6 * 2.0**-7}

_MOST_TOKENS = 512
_BATCH_TOKENS = 1024

# Of the adapter's effect, what a quantized model must keep at least. A divergence grows with the square of the distance
# that logits have moved, so a model that keeps three quarters is half as far from model and adapter as the model alone.
# Past the second figure no other way is tried.
_KEPT, _ENOUGH = 0.75, 0.95
WAYS = {LOT: "rounded by lot", NEAREST: "rounded to the nearest", ANEW: "on a new grid"}


@dataclass(frozen=True)
class LogitSample:
    """Rows of ids to compare logits on.

    Attributes:
        name: for a person.
        rows: ids, and of each whether the logits after it count.
    """

    name: str
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]]


@dataclass(frozen=True)
class Fusion:
    """A fused model, and how its logits differ from those of model and adapter.

    Attributes:
        dtype: of what was written, as `info` names it.
        untied: whether the head became a weight of its own.
        tokens: positions that were compared.
        compared: the text that they are of.
        spread: standard deviation of the logits.
        effect: how far the adapter moves them: root mean square of the difference to those of the model alone.
        effect_nats: the same as a divergence, of the model alone from model and adapter.
        rms, largest, mean: of the absolute difference.
        divergence: mean Kullback-Leibler divergence, in nats, of the fused model's next token from the other's.
        same_top: share of positions where the likeliest token is the same.
        tolerance: what `of_spread(rms)` may be; None where weights were quantized anew, whose loss is what it is.
        moved: of the weights that were, the share that has another value than in the model; None where none were.
        template: the file of the adapter's directory with the chat template that it was trained by, now the model's.
        way: how they were rounded, of `requantize`'s ways; None where none were.
        kept: way that was tried -> the share of `effect_nats` that it keeps: 1 - `divergence` / `effect_nats`.
    """

    destination: Path
    adapter: Adapter
    dtype: str
    untied: bool
    tokens: int
    compared: str
    effect: float
    effect_nats: float
    spread: float
    rms: float
    largest: float
    mean: float
    divergence: float
    same_top: float
    tolerance: float | None
    moved: float | None = None
    template: str | None = None
    way: str | None = None
    kept: Mapping[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of the adapter's effect that is kept."""
        if self.effect_nats == 0:
            return 1.0 if self.divergence == 0 else -math.inf
        return 1 - self.divergence / self.effect_nats

    def of_spread(self, difference: float) -> float:
        """Returns a difference of logits as a share of `spread`, which is 0 where a model finds all tokens alike."""
        if self.spread == 0:
            return 0.0 if difference == 0 else math.inf
        return difference / self.spread


def fuse(
    model_path: str | Path,
    adapter_path: str | Path,
    destination: str | Path,
    *,
    text: str | None = None,
    sample: Callable[[], LogitSample | None] = lambda: None,
    dequantize: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Fusion:
    """Merges an adapter into its model, and compares the logits of both sides before the result takes its name.

    Weights are merged in float32 one at a time and written in the type that the model has. Quantized ones that
    the adapter changes are quantized again in the same format, in each of `requantize`'s ways; the one stays that keeps
    most of the adapter's effect. The others are copied bit by bit.

    Args:
        text: compare logits on this, up to 512 tokens.
        sample: called for rows to compare on where `text` is None; without any, those are excerpts of two books.
        dequantize: write a quantized model in the type of its scales instead.
        dtype: "float32", "bfloat16" or "float16", to write all in that type; not of what stays quantized.
        overwrite: replace a model directory that is there.

    Raises:
        InputError: model, adapter or destination is at fault.
        ElmError: the fused model computes something else, keeps too little of what the adapter changes, or cannot be
            written. Nothing is changed then.
    """
    source, target = reading.expanded(model_path), reading.expanded(destination)
    config = read_config(source)
    directories.check_destination(target, directories.MODEL, overwrite, (source, reading.expanded(adapter_path)))
    kind = _dtype(source, config, dtype, dequantize)
    adapter = adapters.read(adapter_path, config, source)
    computed = None if dtype is None else "float32"  # both sides alike: else the difference would be of that, too
    loaded = open_model(source, computed, config=config, widen=True)  # products alike, whatever is stored
    rows = (sample() if text is None else None) or _sample(loaded, text)
    base = _logits(loaded, rows)
    adapters.load(loaded.model, adapter)
    before = _logits(loaded, rows)
    alone = _compare(before, base)
    del loaded, base
    mx.clear_cache()
    with files.new_directory(target, replace=overwrite) as directory:
        found: dict[str, Fusion] = {}
        for way in _ways(source, config, adapter, dequantize):
            untied, moved, trained_by = _write(source, adapter, directory, dequantize, kind, way)
            fused = open_model(directory, computed, widen=True)
            after = _logits(fused, rows)
            stored = stored_type(fused.model.config, *read_weights(directory, fused.model.config))
            found[way] = Fusion(
                target, adapter, fused.stored, untied, len(before), rows.name,
                effect=alone["rms"], effect_nats=alone["divergence"], **_compare(before, after),
                tolerance=_TOLERANCES[stored] if moved is None else None, moved=moved,
                template=trained_by, way=None if moved is None else way, kept={},
            )  # fmt: skip
            _check(found[way])
            del fused, after
            mx.clear_cache()
            if found[way].share >= _ENOUGH:
                break
        best = max(found, key=lambda way: found[way].share)
        fusion = found[best]
        if fusion.moved is not None:
            fusion = replace(fusion, kept={way: each.share for way, each in found.items()})
            _check_kept(fusion)
        if best != way:  # the same bytes again
            _write(source, adapter, directory, dequantize, kind, best)
    return fusion


def _ways(source: Path, config: Config, adapter: Adapter, dequantize: bool) -> tuple[str, ...]:
    """Returns the ways of rounding that differ for what the adapter changes."""
    packing = {} if dequantize else read_weights(source, config)[1]
    modes = {packing[f"{module}.weight"]["mode"] for module in adapter.ranks if f"{module}.weight" in packing}
    return tuple(WAYS) if "affine" in modes else (ANEW,)


def _check_kept(fusion: Fusion) -> None:
    if fusion.share >= _KEPT:
        return
    tried = ", ".join(f"{WAYS[way]} {percent(share)}" for way, share in fusion.kept.items())
    raise ElmError(
        f"{fusion.destination}: in {fusion.dtype} it would keep too little of what the adapter changes, which is "
        f"{fusion.effect_nats:.2g} nats a token ({fusion.compared}): {tried}, and {_KEPT:.0%} are wanted; nothing was "
        "written. --dequantize keeps it, in 16 bits; --adapter uses it beside the model"
    )


def percent(share: float) -> str:
    """Returns a share that is kept, for a person: where more is added than was there to keep, nothing is."""
    return f"{max(0.0, share):.0%}"


def _dtype(source: Path, config: Config, name: str | None, dequantize: bool) -> mx.Dtype | None:
    """Returns the type to write in; None for the one that is there. Raises InputError where there is no such choice."""
    if name is None:
        return None
    if name not in device.DTYPES:
        raise InputError(f"dtype {name!r} is not one of {', '.join(device.DTYPES)}")
    if not dequantize and read_weights(source, config)[1]:
        raise InputError(f"{source}: is quantized and stays so, by its own types; {name} needs --dequantize too")
    return device.DTYPES[name]


def _check(fusion: Fusion) -> None:
    found = fusion.of_spread(fusion.rms)
    limit = 1e3 if fusion.tolerance is None else fusion.tolerance
    if not found <= limit:  # so that a NaN is refused too
        raise ElmError(
            f"{fusion.destination}: the fused model's logits are {found:.2g} of their spread away from those of model "
            f"and adapter, and rounding to {fusion.dtype} explains {limit:.2g}; nothing was written"
        )


def _write(
    source: Path, adapter: Adapter, directory: Path, dequantize: bool, dtype: mx.Dtype | None, way: str
) -> tuple[bool, float | None, str | None]:
    """Writes the directory. Returns whether the head was untied, `Fusion.moved` and `Fusion.template`."""
    config = read_config(source)
    values = adapters.read_values(adapter, config)
    merge = Merge(config, *read_weights(source, config), values, adapter, dequantize, dtype, way)
    untied = adapter.unties(config)
    tensors = [tensor for name in config.shapes() for tensor in merge.tensors(name, config.shapes()[name])]
    if untied:
        base = Merge(config, *read_weights(source, config), {}, Adapter(adapter.kind), dequantize, dtype)
        head = base.tensors(f"{EMBEDDING}.weight", config.shapes()[f"{EMBEDDING}.weight"])
        tensors += [replace(t, name=t.name.replace(EMBEDDING, "lm_head")) for t in head]
    files.check_room(directory, sum(tensor.nbytes for tensor in tensors))
    safetensors_file.write_shards(directory, tensors)
    files.write_json(directory / "config.json", _config(config_values(source, config), untied, dequantize, dtype))
    files.write_json(directory / "conversion.json", _record(source, adapter))
    directories.carry(source, directory)
    assert adapter.directory is not None
    return untied, merge.moved, chat_template.adopt(directory, adapter.directory)


def _config(values: dict[str, Any], untied: bool, dequantize: bool, dtype: mx.Dtype | None) -> dict[str, Any]:
    """Returns the source's `config.json`, with what is different now."""
    if untied:
        values["share_input_output_layers"] = False
        values.pop("tie_word_embeddings", None)
    for key in {"dtype", "torch_dtype"} & values.keys() if dtype else ():
        values[key] = str(dtype).removeprefix("mlx.core.")
    for key in ("quantization", "quantization_config"):
        if dequantize:
            values.pop(key, None)
        elif untied and isinstance(values.get(key), dict) and EMBEDDING in values[key]:
            values[key]["lm_head"] = values[key][EMBEDDING]
    return values


def _record(source: Path, adapter: Adapter) -> dict[str, Any]:
    """Returns the origin of the model: what was merged, and all that the base's own record says."""
    assert adapter.directory is not None
    weights, base = adapters.weights_file(adapter.directory), source / "conversion.json"
    return {
        "tool": f"elm-mlx {__version__}",
        "adapter": {
            "name": adapter.directory.resolve().name,
            "what": adapter.describe(),
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        "base": (reading.json_object(directories.own_file(base)) if base.is_file() else {})
        or {"name": source.resolve().name},
    }


def _sample(loaded: Loaded, text: str | None) -> LogitSample:
    most = min(_MOST_TOKENS, loaded.model.config.max_context_length)
    if loaded.tokenizer is None:
        size = loaded.model.config.vocab_size
        ids = [(i * 7919) % size for i in range(min(most, 128))]
        name = "ids made up, as there is no tokenizer"
    else:
        built_in = excerpts.held_out(None)
        name = built_in.name if text is None else "the text"
        ids = loaded.tokenizer.encode(built_in.content if text is None else text)[:most]
    if len(ids) < 2:
        raise InputError("the text to compare logits on is empty")
    return LogitSample(name, [(ids, [True] * len(ids))])


def _logits(loaded: Loaded, sample: LogitSample) -> mx.array:
    """Computes logits of the positions that count, `(tokens, vocab_size)`, in float32."""
    found = []
    for part in _batches(sample):
        longest = max(len(ids) for ids, _ in part)
        padded = [[*ids, *[0] * (longest - len(ids))] for ids, _ in part]  # nothing looks ahead at what follows a row
        hidden = loaded.model.transformer(mx.array(padded), None)
        for states, (_, counted) in zip(hidden, part, strict=True):
            positions = mx.array([i for i, counts in enumerate(counted) if counts])
            found.append(loaded.model.head(states[positions]).astype(mx.float32))
        mx.eval(found)
    return mx.concatenate(found)


def _batches(sample: LogitSample) -> list[list[tuple[Sequence[int], Sequence[bool]]]]:
    """Returns the rows in batches: short ones cost little more together than one alone."""
    batches: list[list[tuple[Sequence[int], Sequence[bool]]]] = []
    for row in sorted(sample.rows, key=lambda row: len(row[0])):
        if not batches or (len(batches[-1]) + 1) * len(row[0]) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def _compare(before: mx.array, after: mx.array) -> dict[str, float]:
    """Compares logits of shape `(tokens, vocab_size)`; the keys are fields of `Fusion`."""
    difference = mx.abs(before - after)
    logs = [logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (before, after)]
    found = {
        "spread": mx.sqrt(mx.var(before)),
        "rms": mx.sqrt(mx.square(difference).mean()),
        "largest": difference.max(),
        "mean": difference.mean(),
        "divergence": kl_divergences(*logs).mean(),
        "same_top": (before.argmax(axis=-1) == after.argmax(axis=-1)).mean(),
    }
    return {name: float(value.item()) for name, value in found.items()}
