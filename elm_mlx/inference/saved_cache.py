"""Saved caches: what a text left in every layer's cache, in a file, so that a long document is read once.

A safetensors file: `tokens`, the ids that were read; `LAYER.NUMBER`, the arrays of each layer's cache; and metadata
that say which model made them. Only the very model, adapter and kind of cache take it again, with the bits that were
saved.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx

from elm_mlx import files, reading
from elm_mlx.errors import InputError
from elm_mlx.model.cache import KVCache
from elm_mlx.model.network import Model
from elm_mlx.safetensors_file import TYPES, Pending, fingerprint, hash_of_pieces, read_file, write_tensors
from elm_mlx.store.loading import load_arrays, pending

_FORMAT = "elm-mlx cache 1"
_TOKENS = "tokens"
_ANEW = "make it anew with --save-cache"


@dataclass(frozen=True)
class Origin:
    """What keys and values depend on beside the ids: hashes of the model and of its adapter, which is empty for none.

    The first is of config.json and of the weights' `fingerprint`. `products` says what a prompt's products were rounded
    to, which is nothing where it is empty.
    """

    model: str
    adapter: str = ""
    products: str = ""


def origin_of(directory: Path, adapter: Path | None = None) -> Origin:
    """Returns the origin of caches of a model directory. Raises InputError where a file is missing or damaged."""
    model = _hash(fingerprint(directory), directory / "config.json")
    if adapter is None:
        return Origin(model)
    from elm_mlx.store import adapters

    return Origin(model, _hash(hash_of_pieces([adapters.weights_file(adapter)]), adapter / adapters.CONFIG))


class CacheFiles:
    """The file that a command loads a cache from, and the one that it saves one to; either may be None.

    Raises:
        InputError: a file is missing, or stands where the cache is to be saved and is none.
    """

    def __init__(self, directory: Path, adapter: Path | None, source: Path | None, target: Path | None) -> None:
        self._origin = origin_of(directory, adapter)
        self._source, self._target = source, target
        if source is not None:
            _check_origin(source, self._origin, _metadata(source))
        if target is not None:
            check_target(target)

    def load(self, model: Model, caches: Sequence[KVCache]) -> list[int]:
        """Fills empty caches, as `load_cache`. Returns the ids that they hold then; none without a file."""
        if any(getattr(layer, "rounds", False) for layer in model.modules()):
            self._origin = replace(self._origin, products="bfloat16")
        return [] if self._source is None else load_cache(self._source, self._origin, model, caches)

    def save(self, ids: Sequence[int], caches: Sequence[KVCache]) -> None:
        """Saves what `ids` have left in caches, as `save_cache`."""
        if self._target is not None:
            save_cache(self._target, self._origin, ids, caches)


def check_target(path: Path) -> None:
    """Raises InputError where a cache must not be saved at `path`: a file is there that is none, or no directory."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: {path.parent} is no directory")
    if path.exists() and not _is_cache(path):
        raise InputError(f"{path}: exists, and is no saved cache; choose another name")


def save_cache(path: Path, origin: Origin, ids: Sequence[int], caches: Sequence[KVCache]) -> None:
    """Writes what `ids` have left in `caches`, of one text, to a file: whole, or not at all.

    Raises:
        InputError: a file is there already that is no saved cache.
        ElmError: it cannot be written.
    """
    check_target(path)
    length = caches[0].offset
    tensors = [pending(_TOKENS, mx.int32, (len(ids),), lambda: mx.array(ids, mx.int32))]
    for layer, cache in enumerate(caches):
        for number, array in enumerate(cache.block(0, 0, length)):
            tensors.append(
                pending(
                    f"{layer}.{number}", array.dtype, array.shape,
                    lambda cache=cache, number=number: cache.block(0, 0, length)[number],  # type: ignore[misc]
                )
            )  # fmt: skip
    about = {
        "elm_mlx": _FORMAT, **asdict(origin), "kind": caches[0].kind,
        "text_length": str(max(caches[0].text_length, length)),
    }  # fmt: skip
    digest = _digest(about)
    for block in _blocks(tensors):
        digest.update(block)
    with files.new_file(path) as file:
        write_tensors(file, tensors, {**about, "sha256": digest.hexdigest()})


def load_cache(path: Path, origin: Origin, model: Model, caches: Sequence[KVCache]) -> list[int]:
    """Fills `caches`, which are empty ones for `model`, from a file. Returns the ids that left what they hold then.

    Nothing is taken from the file before its header says that all of it fits the model, so that no file takes more
    memory than a text of the model's context.

    Raises:
        InputError: it is no saved cache, or one of another model, adapter, type or kind of cache, or damaged.
    """
    entries, metadata = read_file(path)
    _check_origin(path, origin, metadata)
    if metadata.get("kind") != caches[0].kind:
        raise InputError(
            f"{path}: holds {reading.short(metadata.get('kind'))}, and {caches[0].kind} are wanted: "
            f"give the options that it was saved with, or {_ANEW}"
        )
    if metadata.get("products", "") != origin.products:
        before, now = (each or "float32" for each in (metadata.get("products"), origin.products))
        raise InputError(f"{path}: has a prompt in {before}, which now is in {now}: choose --compute-dtype, or {_ANEW}")
    by_name = {entry.name: entry for entry in entries}
    tokens, context = by_name.get(_TOKENS), model.config.max_context_length
    if tokens is None or tokens.dtype != "I32" or len(tokens.shape) != 1 or not 0 < tokens.shape[0] <= context:
        raise InputError(f"{path}: damaged: it has no list of up to {context} tokens; {_ANEW}")
    length = tokens.shape[0]
    expected = _expected(model, caches, length)
    for name, (dtype, shape) in expected.items():
        entry = by_name.get(name)
        if entry is None or entry.shape != shape:
            raise InputError(f"{path}: damaged: array {name} of shape {shape} is missing; {_ANEW}")
        if TYPES[entry.dtype] != dtype:
            raise InputError(
                f"{path}: was computed in {TYPES[entry.dtype]}, and now {dtype} is: {_ANEW}, or choose --compute-dtype"
            )
    if len(by_name) > len(expected) + 1:
        raise InputError(f"{path}: damaged: it has arrays that no layer needs; {_ANEW}")
    arrays = load_arrays(path)
    digest = _digest({name: value for name, value in metadata.items() if name not in ("format", "sha256")})
    try:
        ids = arrays.pop(_TOKENS)
        digest.update(_bytes_of(ids))
        for layer, cache in enumerate(caches):
            own = [arrays.pop(f"{layer}.{number}") for number in range(len(cache.state))]
            for array in own:
                digest.update(_bytes_of(array))
            cache.restore([own], length)
            cache.text_length = int(metadata["text_length"])
            mx.eval(cache.state)  # layer by layer, so that nothing is there twice
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged: {error}; {_ANEW}") from None
    if digest.hexdigest() != metadata.get("sha256"):
        raise InputError(f"{path}: damaged: its contents are not those that were saved; {_ANEW}")
    found: list[int] = ids.tolist()
    if not all(0 <= token < model.config.vocab_size for token in found):
        raise InputError(f"{path}: damaged: it has tokens outside the vocabulary; {_ANEW}")
    return found


def _check_origin(path: Path, origin: Origin, metadata: Mapping[str, object]) -> None:
    if metadata.get("elm_mlx") != _FORMAT:
        raise InputError(f"{path}: no cache that this version has saved: {_ANEW}")
    if metadata.get("model") != origin.model:
        raise InputError(f"{path}: a cache of another model, or of this one before it changed: {_ANEW}")
    if metadata.get("adapter") != origin.adapter:
        which = "another adapter" if origin.adapter and metadata.get("adapter") else "the model with an adapter"
        which = which if metadata.get("adapter") else "the model without an adapter"
        raise InputError(f"{path}: a cache of {which}: give the same --adapter, or {_ANEW}")


def _expected(model: Model, caches: Sequence[KVCache], length: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns types and shapes of all arrays that a text of `length` leaves. They are known before any is computed."""
    probes = [cache.empty() for cache in caches]
    model.transformer(mx.array([[0]]), probes)
    expected = {}
    for layer, probe in enumerate(probes):
        probe.reserve(length)
        for number, array in enumerate(probe.block(0, 0, length)):
            expected[f"{layer}.{number}"] = (str(array.dtype).removeprefix("mlx.core."), array.shape)
    return expected


def _metadata(path: Path) -> dict[str, object]:
    return read_file(path)[1]


def _is_cache(path: Path) -> bool:
    try:
        return "elm_mlx" in _metadata(path)
    except InputError:
        return False


def _hash(weights: str, config: Path) -> str:
    return hashlib.sha256(weights.encode() + reading.content(config, reading.SETTINGS_BYTES)).hexdigest()


def _digest(about: Mapping[str, object]) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())


def _blocks(tensors: Sequence[Pending]) -> Iterator[memoryview]:
    for tensor in tensors:
        yield from tensor.blocks()


def _bytes_of(array: mx.array) -> memoryview:
    return memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)) if math.prod(array.shape) else memoryview(b"")
