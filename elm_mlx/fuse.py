"""An adapter merged into its model: a model directory like another, which computes what the two computed together.

Knows how a directory's weights, quantized ones too, take up an adapter, and how to prove that they did. What the
merged weight is, is `lora`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from elm_mlx import adapt, adapters, directories, files, lora, shards
from elm_mlx.adapters import EMBEDDING, Adapter
from elm_mlx.config import ModelConfig
from elm_mlx.describe import check_directory
from elm_mlx.errors import ElmError, InputError
from elm_mlx.shards import Pending
from elm_mlx.store import Loaded, Packing, open_adapter, open_model, read_weights
from elm_mlx.version import __version__

# Root mean square of the logits' difference, as a share of their spread, that rounding every weight once explains.
# Six times the distance of neighbours around 1: a fifth of one distance was measured on a trained model of 8 layers,
# 1.4 where it was computed in 16 bits too, and 3.2 on a random one of 36. Of float32 the sums' order is most.
_TOLERANCES = {mx.float32: 1e-3, mx.float16: 6 * 2.0**-10, mx.bfloat16: 6 * 2.0**-7}

_MOST_TOKENS = 512

# Aesop, in the public domain: what logits are compared on where nobody gives a text.
TEXT = """A Crow, half-dead with thirst, came upon a Pitcher which had once been full of water; but when the Crow put \
its beak into the mouth of the Pitcher he found that only very little water was left in it, and that he could not \
reach far enough down to get at it. He tried, and he tried, but at last had to give up in despair. Then a thought \
came to him, and he took a pebble and dropped it into the Pitcher. Then he took another pebble and dropped it into \
the Pitcher. At last, at last, he saw the water mount up near him, and after casting in a few more pebbles he was \
able to quench his thirst and save his life. Little by little does the trick."""


@dataclass(frozen=True)
class Fusion:
    """What `fuse` has written, and how its logits differ from those of model and adapter.

    Attributes:
        dtype: of what was written, as `info` names it.
        untied: whether the head became a weight of its own.
        tokens: positions that were compared.
        on_text: whether they are of a text; else of made-up ids, for want of a tokenizer.
        spread: standard deviation of the logits.
        effect: how far the adapter moves them: root mean square of the difference to those of the model alone.
        rms, largest, mean: of the absolute difference.
        divergence: mean Kullback-Leibler divergence, in nats, of the fused model's next token from the other's.
        same_top: share of positions where the likeliest token is the same.
        tolerance: what `rms / spread` may be; None where weights were quantized anew, whose loss is what it is.
    """

    destination: Path
    adapter: Adapter
    dtype: str
    untied: bool
    tokens: int
    on_text: bool
    effect: float
    spread: float
    rms: float
    largest: float
    mean: float
    divergence: float
    same_top: float
    tolerance: float | None


def fuse(
    model_path: str | Path,
    adapter_path: str | Path,
    destination: str | Path,
    *,
    text: str | None = None,
    dequantize: bool = False,
    overwrite: bool = False,
) -> Fusion:
    """Merges an adapter into its model, and compares the logits of both sides before the result takes its name.

    Weights are merged in float32 one at a time and written in the type that the model has. Quantized ones that
    the adapter changes are quantized anew in the same way; the others are copied bit by bit.

    Args:
        text: what to compare logits on, up to 512 tokens; a built-in fable by default.
        dequantize: write a quantized model in the type of its scales instead.
        overwrite: replace a model directory that is there.

    Raises:
        InputError: model, adapter or destination is at fault.
        ElmError: the fused model computes something else, or cannot be written. Nothing is changed then.
    """
    source, target = check_directory(Path(model_path)), Path(destination)
    directories.check_destination(target, (source, Path(adapter_path)), overwrite)
    config = ModelConfig.load(source / "config.json")
    adapter = open_adapter(adapter_path, source, config)
    loaded = open_model(source)
    ids, on_text = _ids(loaded, text)
    base = _logits(loaded, ids)
    adapt.load(loaded.model, adapter)
    before = _logits(loaded, ids)
    del loaded
    mx.clear_cache()
    with files.new_directory(target, replace=overwrite) as directory:
        untied, requantized = _write(source, adapter, directory, dequantize)
        fused = open_model(directory)
        after = _logits(fused, ids)
        stored_type = read_weights(directory, fused.model.config)[0]["transformer.norm.weight"].dtype
        fusion = Fusion(
            target, adapter, fused.stored, untied, ids.size, on_text,
            effect=_rms(before - base), **_compare(before, after),
            tolerance=None if requantized else _TOLERANCES[stored_type],
        )  # fmt: skip
        _check(fusion)
    return fusion


def _check(fusion: Fusion) -> None:
    found = fusion.rms / fusion.spread if fusion.spread else float("nan")
    limit = 1e3 if fusion.tolerance is None else fusion.tolerance
    if not found <= limit:  # so that a NaN is refused too
        raise ElmError(
            f"{fusion.destination}: the fused model's logits are {found:.2g} of their spread away from those of model "
            f"and adapter, and rounding to {fusion.dtype} explains {limit:.2g}; nothing was written"
        )


def _write(source: Path, adapter: Adapter, directory: Path, dequantize: bool) -> tuple[bool, bool]:
    """The whole directory. Returns whether the head was untied, and whether anything was quantized anew."""
    config = ModelConfig.load(source / "config.json")
    merge = _Merge(*read_weights(source, config), adapt.read_values(adapter, config), adapter, dequantize)
    untied = adapter.unties(config)
    tensors = [tensor for name in config.shapes() for tensor in merge.tensors(name, config.shapes()[name])]
    if untied:
        base = _Merge(*read_weights(source, config), {}, Adapter(adapter.kind), dequantize)
        head = base.tensors(f"{EMBEDDING}.weight", config.shapes()[f"{EMBEDDING}.weight"])
        tensors += [Pending(t.name.replace(EMBEDDING, "lm_head"), t.dtype, t.shape, t.make) for t in head]
    needed, free = sum(tensor.nbytes for tensor in tensors) + (16 << 20), files.free_bytes(directory)
    if needed > free:
        raise ElmError(f"{directory}: needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there")
    shards.write(directory, tensors)
    _write_json(directory / "config.json", _config(source, untied, dequantize))
    _write_json(directory / "conversion.json", _record(source, adapter))
    directories.carry(source, directory)
    return untied, merge.requantizes and not dequantize


class _Merge:
    """The tensors of a fused directory, each made when it is asked for, once: `weights` is emptied on the way.

    An array that MLX reads from a file stays in memory as long as anyone holds it.
    """

    def __init__(
        self,
        weights: dict[str, mx.array],
        packing: Mapping[str, Packing],
        values: Mapping[str, mx.array],
        adapter: Adapter,
        dequantize: bool,
    ):
        self._weights, self._packing, self._values = weights, packing, values
        self._adapter, self._dequantize = adapter, dequantize
        # Norms are never quantized, so theirs is the type that a quantized model came in.
        self._dtype = weights["transformer.norm.weight"].dtype
        self.requantizes = any(self._changes(name) for name in packing)

    def tensors(self, name: str, shape: tuple[int, ...]) -> list[Pending]:
        """The weight `name` of that shape in the model, in the parts that it is stored in."""
        changes = self._changes(name)
        if name in self._packing and not self._dequantize:
            parts = [name, *(self._part(name, kind) for kind in ("scales", "biases"))]
            parts = [part for part in parts if part in self._weights]
            if not changes:
                return [self._copied(part) for part in parts]
            quantized: dict[str, mx.array] = {}
            return [
                Pending(
                    part, self._weights[part].dtype, self._weights[part].shape,
                    partial(self._quantized_part, name, part, quantized),
                )
                for part in parts
            ]  # fmt: skip
        if not changes and name not in self._packing:
            return [self._copied(name)]
        dtype = self._dtype if name in self._packing else self._weights[name].dtype
        return [Pending(name, dtype, shape, partial(self._dense, name, dtype, changes))]

    def _changes(self, name: str) -> bool:
        return name in self._values or name.removesuffix(".weight") in self._adapter.ranks

    def _copied(self, name: str) -> Pending:
        stored = self._weights[name]
        return Pending(name, stored.dtype, stored.shape, partial(self._weights.pop, name))

    def _dense(self, name: str, dtype: mx.Dtype, changes: bool) -> mx.array:
        weight = self._merged(name) if changes else self._wide(name)
        return weight.astype(dtype)

    def _quantized_part(self, name: str, part: str, quantized: dict[str, mx.array]) -> mx.array:
        """One of weight, scales and biases; the first call makes all, each is handed out once."""
        if not quantized:
            how = self._packing[name]
            made = mx.quantize(self._merged(name).astype(self._dtype), **how)
            quantized |= dict(zip((name, self._part(name, "scales"), self._part(name, "biases")), made, strict=False))
        return quantized.pop(part)

    def _merged(self, name: str) -> mx.array:
        if name in self._values:  # of a full fine-tuning
            return self._values[name].astype(mx.float32)
        module = name.removesuffix(".weight")
        product = self._values[f"{module}.lora_a"] @ self._values[f"{module}.lora_b"]
        delta = self._adapter.scale * (product if module == EMBEDDING else product.T)
        return lora.merge(self._wide(name), delta, self._values.get(f"{module}.m"))

    def _wide(self, name: str) -> mx.array:
        if name not in self._packing:
            return self._weights.pop(name).astype(mx.float32)
        scales = self._weights.pop(self._part(name, "scales"))
        biases = self._weights.pop(self._part(name, "biases"), None)
        return lora.dequantize(self._weights.pop(name), scales, biases, **self._packing[name])

    @staticmethod
    def _part(name: str, kind: str) -> str:
        return name.removesuffix("weight") + kind


def _config(source: Path, untied: bool, dequantize: bool) -> dict[str, Any]:
    """The source's own, with what is different now."""
    values: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if untied:
        values["share_input_output_layers"] = False
        values.pop("tie_word_embeddings", None)
    for key in ("quantization", "quantization_config"):
        if dequantize:
            values.pop(key, None)
        elif untied and isinstance(values.get(key), dict) and EMBEDDING in values[key]:
            values[key]["lm_head"] = values[key][EMBEDDING]
    return values


def _record(source: Path, adapter: Adapter) -> dict[str, Any]:
    """Where the model comes from: what was merged, and all that the base's own record says."""
    assert adapter.directory is not None
    weights = adapter.directory / adapters.WEIGHTS
    base: Any = None
    if (source / "conversion.json").is_file():
        base = json.loads((source / "conversion.json").read_text(encoding="utf-8"))
    merged = {
        "name": adapter.directory.resolve().name,
        "what": adapter.describe(),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    return {"tool": f"elm-mlx {__version__}", "adapter": merged, "base": base or {"name": source.resolve().name}}


def _ids(loaded: Loaded, text: str | None) -> tuple[mx.array, bool]:
    most = min(_MOST_TOKENS, loaded.model.config.max_context_length)
    if loaded.tokenizer is None:
        size = loaded.model.config.vocab_size
        return mx.array([[(i * 7919) % size for i in range(min(most, 128))]]), False
    ids = loaded.tokenizer.encode(TEXT if text is None else text)
    if len(ids) < 2:
        raise InputError("the text to compare logits on is empty")
    return mx.array([ids[:most]]), True


def _logits(loaded: Loaded, ids: mx.array) -> mx.array:
    """`(tokens, vocab_size)`, in float32."""
    logits = loaded.model(ids)[0].astype(mx.float32)
    mx.eval(logits)
    return logits


def _compare(before: mx.array, after: mx.array) -> dict[str, float]:
    difference = mx.abs(before - after)
    log_before = before - mx.logsumexp(before, axis=-1, keepdims=True)
    log_after = after - mx.logsumexp(after, axis=-1, keepdims=True)
    divergence = (mx.exp(log_before) * (log_before - log_after)).sum(axis=-1).mean()
    return {
        "spread": float(mx.sqrt(mx.var(before)).item()),
        "rms": _rms(difference),
        "largest": float(difference.max().item()),
        "mean": float(difference.mean().item()),
        "divergence": max(0.0, float(divergence.item())),
        "same_top": float((before.argmax(axis=-1) == after.argmax(axis=-1)).mean().item()),
    }


def _rms(values: mx.array) -> float:
    return float(mx.sqrt(mx.square(values).mean()).item())


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
