"""A GGUF file into an MLX model directory: what becomes of each tensor, the weights, and their verification.

Blocks that MLX has the same grid for stay quantized, with the same codes; all else becomes floats of one type. Scales
and biases take that type too: float16 where the file has blocks, as these have them in it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from elm_mlx import hub
from elm_mlx.callbacks import OnProgress
from elm_mlx.directories import own_file
from elm_mlx.errors import ElmError, InputError
from elm_mlx.files import write_json, write_text
from elm_mlx.model import families
from elm_mlx.model.config import Config, ModelConfig, written_dtype
from elm_mlx.reading import Keys, counted, expanded, json_object_if_there, listed, short
from elm_mlx.safetensors_file import Pending, write_shards
from elm_mlx.text import chat_template
from elm_mlx.text.tokenizer import read_vocabulary
from elm_mlx_convert import gguf_blocks, gguf_names, gguf_vocabulary, sources
from elm_mlx_convert.destination import ROUNDING, Difference, differences, group_of, progress_of
from elm_mlx_convert.gguf_blocks import DEQUANTIZED, FINE_SCALES, FLOATS, GRIDS, GROUP, Array
from elm_mlx_convert.gguf_file import TYPES, GgufHeader, TensorEntry, read_header
from elm_mlx_convert.gguf_vocabulary import GgufVocabulary
from elm_mlx_convert.source_config import infer_config
from elm_mlx_convert.sources import CheckpointSource
from elm_mlx_convert.tensors import (
    BLOCK_BYTES,
    File,
    LazyTensor,
    cast_blocks,
    numpy_dtype,
    read_safetensors,
    to_float32,
)

_DIVISORS = (gguf_names.FREQUENCIES, gguf_names.LONG, gguf_names.SHORT)
_MAX_DIVISORS = 1 << 12
# What old files hold and nothing needs: RoPE's plain frequencies.
_SPARE = "attn_rot_embd.weight"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "phi3": "Phi3ForCausalLM",
    "olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
}  # fmt: skip


@dataclass(frozen=True)
class GgufWeight:
    """A weight of the model, and where the file has it.

    Attributes:
        name: ours, with `.weight` or `.bias`.
        pieces: tensors of the file that are its rows, one below the other, each with the number of heads whose rows
            lie in RoPE's other order; 0 where they lie as ours do.
        grid: bits and mode of MLX's packed weights; None where it becomes floats.
        more: the file's values are larger than the model's by so much.
    """

    file: File = field(repr=False)
    name: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[TensorEntry, int], ...]
    grid: tuple[int, str] | None
    more: int = 0

    @property
    def kinds(self) -> set[str]:
        return {entry.type.name for entry, _ in self.pieces}

    @property
    def dtype(self) -> str:
        """The type that its values have, where they become floats, before they are cast."""
        plain = len(self.kinds) == 1 and self.kinds <= FLOATS.keys() and not self.more
        return FLOATS[next(iter(self.kinds))] if plain else "float32"

    def tensors(self, dtype: str) -> list[tuple[LazyTensor, str]]:
        """Returns what is written of it, each with the type that it is written in."""
        if self.grid is None:
            return [(LazyTensor(self.name, self.shape, self.dtype, partial(self._read, self._values)), dtype)]
        bits, mode = self.grid
        rows, columns = self.shape
        module = self.name.removesuffix(".weight")
        packed = LazyTensor(self.name, (rows, columns * bits // 32), "uint32", partial(self._read, self._packed))
        groups = rows, columns // GROUP
        scale_dtype = "uint8" if mode == "mxfp4" else "float32"
        scales = LazyTensor(f"{module}.scales", groups, scale_dtype, partial(self._read, self._scales))
        if mode == "mxfp4":
            return [(packed, "uint32"), (scales, "uint8")]
        biases = LazyTensor(f"{module}.biases", groups, "float32", partial(self._read, self._biases))
        return [(packed, "uint32"), (scales, dtype), (biases, dtype)]

    def values(self, start: int, stop: int) -> Array:
        """Returns rows as the file means them, in float32."""
        return to_float32(self._read(self._values, start, stop), self.dtype)

    @property
    def step(self) -> int:
        """How many rows to read at a time."""
        return max(1, BLOCK_BYTES // max(1, 4 * int(np.prod(self.shape[1:]))))

    def _read(self, make: Callable[[str, Array], Array], start: int, stop: int) -> Array:
        """Returns what `make` makes of rows, which it is given as bytes, with the name of their type."""
        found, first = [], 0
        for entry, heads in self.pieces:
            rows = entry.shape[0]
            low, high = max(start - first, 0), min(stop - first, rows)
            if low < high:
                found.append(make(entry.type.name, _raw(self.file, entry, heads, low, high)))
            first += rows
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _values(self, kind: str, raw: Array) -> Array:
        if kind in FLOATS:
            values = raw.view(numpy_dtype(FLOATS[kind])).reshape(len(raw), *self.shape[1:])
            values = values if self.dtype == FLOATS[kind] else to_float32(values, FLOATS[kind])
            return values - np.float32(self.more) if self.more else values
        return gguf_blocks.values(kind, _blocks(kind, raw)).reshape(len(raw), *self.shape[1:])

    def _packed(self, kind: str, raw: Array) -> Array:
        assert self.grid is not None
        return gguf_blocks.packed(gguf_blocks.codes(kind, _blocks(kind, raw)).reshape(len(raw), -1), self.grid[0])

    def _scales(self, kind: str, raw: Array) -> Array:
        return gguf_blocks.scales(kind, _blocks(kind, raw)).reshape(len(raw), -1)

    def _biases(self, kind: str, raw: Array) -> Array:
        return gguf_blocks.biases(kind, _blocks(kind, raw)).reshape(len(raw), -1)


def _raw(file: File, entry: TensorEntry, heads: int, start: int, stop: int) -> Array:
    """Returns the bytes of rows, `(rows, bytes)`; of a vector each value is a row."""
    nbytes = entry.nbytes // entry.shape[0]
    size = entry.shape[0] // heads if heads else 1
    first, last = start // size * size, -(-stop // size) * size
    rows = np.frombuffer(file.read(entry.begin + first * nbytes, (last - first) * nbytes), np.uint8).reshape(-1, nbytes)
    if heads:
        rows = gguf_names.separated(rows, (last - first) // size)[start - first : stop - first]
    return rows


def _blocks(kind: str, raw: Array) -> Array:
    return np.ascontiguousarray(raw).reshape(-1, TYPES[kind].nbytes)


@dataclass(frozen=True)
class GgufPlan:
    """Everything that will be written of a GGUF file, and how that was found out.

    Attributes:
        values: the content of `config.json`, which `config` is the normal form of.
        source_dtype: the types of its tensors, in words.
        dtype: of all floats that are written.
        tokenizer: a directory whose tokenizer is taken in place of the file's; `template` is then written in place of
            its chat template, unless it is None; an empty one means none.
        notes: what is done that is not self-evident; warnings: what may not be wanted.
    """

    source: CheckpointSource
    config: Config
    values: dict[str, Any] = field(repr=False)
    source_dtype: str
    dtype: str
    weights: tuple[GgufWeight, ...] = field(repr=False)
    vocabulary: GgufVocabulary | None = field(repr=False)
    tokenizer: Path | None
    template: str | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return self.config.parameters

    @property
    def stored(self) -> str:
        """How the weights are written, in words: the type of the floats, before that the bits of what is packed."""
        grids = sorted({weight.grid for weight in self.weights if weight.grid is not None})
        packed = [mode if mode == "mxfp4" else f"{bits}-bit" for bits, mode in grids]
        return " and ".join([*([f"{', '.join(packed)} in groups of {GROUP}"] if packed else []), self.dtype])

    @property
    def tensors(self) -> list[tuple[LazyTensor, str]]:
        return [each for weight in self.weights for each in weight.tensors(self.dtype)]

    @property
    def nbytes(self) -> int:
        """The bytes of the weights, as they will be written."""
        return sum(_pending(tensor, dtype, []).nbytes for tensor, dtype in self.tensors)


def find(source: str | Path, revision: str | None = None) -> Path | None:
    """Returns the GGUF file that a source means: itself, or the one in a directory without other weights; else None.

    Of a repository on the hub, at `revision`, it is downloaded.

    Raises:
        InputError: the directory or repository holds several, or as `hub.contents`.
        ElmError: the hub cannot be reached.
    """
    repository = sources.named_repository(source)
    if repository is not None:
        repository = replace(repository, revision=repository.revision or revision)
        held = sources.contents(repository)
        if repository.file is None and not hub.has_gguf_alone(held.sizes):
            return None
        name = hub.gguf_file(repository, held.sizes)
        return hub.download(repository, held, [name]) / name
    path = expanded(source)
    found = _in(path)
    if found is not None and revision is not None:
        raise InputError(f"--revision {revision} is for a repository on the hub, but {path} is a path")
    return found


def _in(path: Path) -> Path | None:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        if not found or any(file.suffix in (".safetensors", ".bin", ".pt") for file in path.iterdir()):
            return None
        if len(found) > 1:
            raise InputError(f"{path}: holds {listed([file.name for file in found])}: name the one to convert")
        return found[0]
    return path if path.is_file() and sources.is_gguf(path) else None


def make_plan(
    path: Path, *, dtype: str | None = None, tokenizer: str | Path | None = None, template: str | None = None
) -> GgufPlan:
    """Opens a file and decides everything.

    Args:
        dtype: of the floats that are written: float32, float16 or bfloat16. By default float16 where the file has
            blocks, else the source's type if that has 16 bits, else bfloat16.
        tokenizer: a directory or repository with a `tokenizer.json` that is taken in place of the file's tokenizer.
        template: as `chat_template` of `conversion.convert`.

    Raises:
        InputError: the file is damaged, or its model is none that is known here: says why.
    """
    header = read_header(path)
    if (parts := header.metadata.get("split.count", 1)) != 1:
        raise header.file.fail(f"is one of {short(parts)} files: join them by llama.cpp's `llama-gguf-split --merge`")
    values, config = _config(header)
    weights = _weights(header, config)
    kinds: Counter[str] = Counter()
    for weight in weights:
        for entry, _ in weight.pieces:
            kinds[entry.type.name] += entry.nbytes
    blocks = kinds.keys() - FLOATS.keys()
    source = "float16" if blocks else FLOATS[kinds.most_common(1)[0][0]]
    written = written_dtype(config, source, dtype)
    quantization = _quantization(weights)
    if quantization is not None:
        values["quantization"] = values["quantization_config"] = quantization
        config = replace(config, quantization=quantization)
    values["torch_dtype"] = written
    beside = _tokenizer_directory(tokenizer) if tokenizer is not None else None
    vocabulary = gguf_vocabulary.read(header) if beside is None else None
    values |= gguf_vocabulary.special_ids(header)
    warnings = list(vocabulary.warnings) if vocabulary else [] if beside else [_NO_TOKENIZER]
    if vocabulary is not None:
        vocabulary = _with_template(vocabulary, template)
        if len(vocabulary.tokens) > config.vocab_size:
            raise header.file.fail(
                f"has {len(vocabulary.tokens):,} tokens, but the model's embedding has {config.vocab_size:,} rows"
            )
    return GgufPlan(
        source=CheckpointSource(
            path.name, f"GGUF of {header.metadata['general.architecture']}", path.parent, (path,), {}
        ),
        config=config,
        values=values,
        source_dtype=", ".join(kind for kind, _ in kinds.most_common()),
        dtype=written,
        weights=tuple(weights),
        vocabulary=vocabulary,
        tokenizer=beside,
        template=None if beside is None else _template_beside(header, beside, template),
        notes=tuple(_notes(weights, written)),
        warnings=tuple(warnings),
    )


_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
_NO_TOKENIZER = "no tokenizer in the file: the model cannot read or write text; pass --tokenizer DIR|REPO"


def _config(header: GgufHeader) -> tuple[dict[str, Any], Config]:
    """Returns the content of `config.json` and its normal form, both without tokens and quantization."""
    where, metadata, tensors = str(header.file.path), header.metadata, header.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise header.file.fail("has no embedding (token_embd.weight)")
    if gguf_names.model_type_of(metadata, where) == "openelm":
        config = _openelm(header)
        return config.to_dict(), config
    values = gguf_names.config_values(metadata, tensors, _divisors(header), where)
    values |= {
        "architectures": [_ARCHITECTURES[values["model_type"]]], "vocab_size": embedding.shape[0],
    }  # fmt: skip
    # No weights lie below a file, which a head of their own is looked for in.
    return values, families.read(Keys(where, values), header.file.path)


def _openelm(header: GgufHeader) -> ModelConfig:
    """Returns an OpenELM's config: the shapes say it, but for three numbers."""
    where = str(header.file.path)
    keys = Keys(where, header.metadata)
    shapes: dict[str, tuple[int, ...]] = {}
    table = gguf_names.ARCHITECTURES["openelm"].tensors
    layers = keys.size("openelm.block_count", most=10_000)
    for name, theirs in table.items():
        for layer in range(layers) if "{}" in name else (0,):
            entries = [header.tensors.get(f"{each.format(layer)}.weight") for each in theirs]
            found = [entry.shape for entry in entries if entry is not None]
            if len(found) == len(theirs) and len(set(found)) == 1:
                shapes[f"{name.format(layer)}.weight"] = (len(found) * found[0][0], *found[0][1:])
    config = infer_config(shapes, where, head_dim=keys.size("openelm.attention.key_length", 64, 1 << 12))
    length = keys.size("openelm.context_length", most=1 << 24)
    return replace(
        config,
        max_context_length=length,
        rope_max_length=2 * length,  # as in CoreNet
        rope_freq_constant=keys.number("openelm.rope.freq_base", 10_000.0, low=1.0),
        rms_norm_eps=keys.number("openelm.attention.layer_norm_rms_epsilon", 1e-6, high=1.0),
    )


def _divisors(header: GgufHeader) -> dict[str, Array]:
    found = {}
    for name in _DIVISORS:
        entry = header.tensors.get(name)
        if entry is None:
            continue
        if entry.type.name != "F32" or entry.size > _MAX_DIVISORS:
            raise header.file.fail(f"has {name} of {entry.size:,} values in {entry.type.name}; a few in F32 are needed")
        found[name] = np.frombuffer(header.file.read(entry.begin, entry.nbytes), "<f4")
    return found


def _weights(header: GgufHeader, config: Config) -> list[GgufWeight]:
    """Returns every weight of the model. Raises InputError where the file has another one, or one of other shape."""
    weights, used = [], set(_DIVISORS)
    for name, shape in config.shapes().items():
        pieces = []
        for part in gguf_names.parts(name, shape[0], config):
            entry = header.tensors.get(part.name)
            needed = (part.stop - part.start, *shape[1:])
            if entry is None:
                raise header.file.fail(f"has no {part.name}, which its metadata need")
            if entry.shape != needed:
                raise header.file.fail(f"has {part.name} of the shape {entry.shape}, but its metadata say {needed}")
            _check_type(header, entry)
            pieces.append((entry, part.heads))
            used.add(part.name)
        weights.append(GgufWeight(header.file, name, shape, tuple(pieces), _grid(pieces), part.more))
    spare = [name for name in header.tensors if name not in used and not name.endswith(_SPARE)]
    if spare:
        raise header.file.fail(f"has tensors that no {config.model_type} has a place for: {listed(spare)}")
    return weights


def _check_type(header: GgufHeader, entry: TensorEntry) -> None:
    kind = entry.type.name
    if kind not in (*GRIDS, *FLOATS, *DEQUANTIZED):
        known = ", ".join((*FLOATS, *GRIDS, *DEQUANTIZED))
        raise header.file.fail(f"has {entry.name} in {kind}, which cannot be read here; {known} can")
    if len(entry.shape) == 1 and kind not in FLOATS:
        raise header.file.fail(f"has the vector {entry.name} in {kind}; F32, F16 or BF16 is needed")


def _grid(pieces: Sequence[tuple[TensorEntry, int]]) -> tuple[int, str] | None:
    """Returns how a weight is packed: pieces of different bits in those of the widest, as a code has any number."""
    kinds = {entry.type.name for entry, _ in pieces}
    grids = {GRIDS.get(kind) for kind in kinds}
    modes = {grid[1] for grid in grids if grid is not None}
    if None in grids or len(modes) != 1:
        return None
    return max(grid for grid in grids if grid is not None)


def _quantization(weights: Iterable[GgufWeight]) -> dict[str, Any] | None:
    """Returns what `config.json` says of packed weights: how most are, and each that is packed otherwise."""
    packed = {weight.name.removesuffix(".weight"): weight.grid for weight in weights if weight.grid is not None}
    if not packed:
        return None
    usual = Counter(packed.values()).most_common(1)[0][0]
    each = {name: _entry(grid) for name, grid in packed.items() if grid != usual}
    return {**_entry(usual), **each}


def _entry(grid: tuple[int, str]) -> dict[str, Any]:
    return {"group_size": GROUP, "bits": grid[0], "mode": grid[1]}


def _notes(weights: Sequence[GgufWeight], dtype: str) -> Iterator[str]:
    """Says what becomes of the file's types, and what is rounded."""
    packed = [weight for weight in weights if weight.grid is not None]
    exact = [weight for weight in packed if not weight.kinds & set(FINE_SCALES)]
    fine = [weight for weight in packed if weight.kinds & set(FINE_SCALES)]
    dense = [weight for weight in weights if weight.grid is None and weight.kinds - FLOATS.keys()]
    if exact and dtype in ("float16", "float32"):
        yield f"{_types(exact)}: {counted(len(exact), 'tensor')} quantized as in the file, without loss"
    elif exact:
        yield f"{_types(exact)}: {counted(len(exact), 'tensor')} quantized as in the file, scales rounded to {dtype}"
    if fine and dtype == "float32":
        yield f"{_types(fine)}: {counted(len(fine), 'tensor')} quantized as in the file, without loss"
    elif fine:
        yield (
            f"{_types(fine)}: {counted(len(fine), 'tensor')} with the codes of the file, scales rounded to {dtype} "
            "(--dtype float32 keeps them whole)"
        )
    if dense:
        yield f"{_types(dense)}: {counted(len(dense), 'tensor')} dequantized to {dtype}, as MLX has no such blocks"


def _types(weights: Iterable[GgufWeight]) -> str:
    return ", ".join(sorted({kind for weight in weights for kind in weight.kinds - FLOATS.keys()}))


def _with_template(vocabulary: GgufVocabulary, asked: str | None) -> GgufVocabulary:
    if asked is None:
        return vocabulary
    own = chat_template.read_source(asked)
    others = {name: text for name, text in vocabulary.templates.items() if name}
    return replace(vocabulary, templates=others if own is None else {"": own, **others})


def _template_beside(header: GgufHeader, directory: Path, asked: str | None) -> str | None:
    """Returns the chat template that goes with a tokenizer in a directory, as `GgufPlan.template`: what was asked for,
    or else the file's own where the directory has none."""
    if asked is not None:
        return chat_template.read_source(asked) or ""
    own, _ = chat_template.own_source(directory)
    there = header.metadata.get("tokenizer.chat_template")
    return own if own is not None else there if isinstance(there, str) else None


def _tokenizer_directory(source: str | Path) -> Path:
    path, repository = expanded(source), sources.named_repository(source)
    if repository is not None:
        path = sources.fetch(repository, sources.contents(repository), _TOKENIZER_FILES)
    if path.is_file():
        path = path.parent
    if not (path / "tokenizer.json").is_file():
        raise InputError(f"{path}: holds no tokenizer.json, which --tokenizer names for a GGUF file")
    return path


def write_model(directory: Path, plan: GgufPlan, on_progress: OnProgress) -> list[str]:
    """Fills a model directory, but for the record of what it was made of. Returns warnings.

    Raises:
        InputError: a value overflows the type that it is written in; the tokenizer cannot be read.
        OSError: the system could not write.
    """
    broken: list[str] = []
    pending = [_pending(tensor, dtype, broken) for tensor, dtype in plan.tensors]
    progress = progress_of(on_progress, "write", sum(each.nbytes for each in pending))
    write_shards(directory, pending, parameters=plan.parameters, progress=progress)
    write_json(directory / "config.json", plan.values)
    warnings = [f"NaN or infinite values in {listed(broken)}"] if broken else []
    vocabulary = plan.vocabulary
    if vocabulary is None and plan.tokenizer is None:
        return warnings
    where = str(plan.tokenizer) if vocabulary is None else vocabulary.where
    try:
        if vocabulary is not None:
            if len(vocabulary.end_ids) > 1:
                write_json(directory / "generation_config.json", {"eos_token_id": list(vocabulary.end_ids)})
            warnings += gguf_vocabulary.write(vocabulary, directory, plan.config.max_context_length)
        else:
            _copy_tokenizer(plan, directory)
        if read_vocabulary(directory, plan.config).tokenizer is None:
            raise InputError("an OpenELM's is read from a tokenizer.model")
    except InputError as error:
        said = str(error).replace(f"{directory}/", "").removeprefix(f"{where}: ")
        raise InputError(f"{where}: its tokenizer cannot be used: {said}") from None
    return warnings


def _copy_tokenizer(plan: GgufPlan, directory: Path) -> None:
    """Copies the tokenizer of another directory, with the plan's chat template."""
    assert plan.tokenizer is not None
    for name in _TOKENIZER_FILES:
        if (plan.tokenizer / name).is_file():
            shutil.copyfile(own_file(plan.tokenizer / name), directory / name)
    if plan.template is None:
        return
    settings = directory / "tokenizer_config.json"
    if (values := json_object_if_there(settings)).pop("chat_template", None) is not None:
        write_json(settings, values)
    (directory / chat_template.FILE_NAME).unlink(missing_ok=True)
    if plan.template:
        write_text(directory / chat_template.FILE_NAME, plan.template)


def _pending(tensor: LazyTensor, dtype: str, broken: list[str]) -> Pending:
    if dtype in ("uint32", "uint8"):
        return Pending(tensor.name, dtype, tensor.shape, partial(_plain_blocks, tensor))
    return Pending(tensor.name, dtype, tensor.shape, partial(cast_blocks, tensor, dtype, broken))


def _plain_blocks(tensor: LazyTensor) -> Iterator[memoryview]:
    for block in tensor.blocks():
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data


def compare(plan: GgufPlan, directory: Path, on_progress: OnProgress) -> list[Difference]:
    """Compares every weight of the file with what `directory` holds: the values that the codes stand for.

    Returns and raises as `destination.compare`; packed weights are unpacked here bit by bit.
    """
    written: dict[str, LazyTensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        written |= read_safetensors(file)
    expected = {tensor.name: (tensor.shape, dtype) for tensor, dtype in plan.tensors}
    if expected != {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()}:
        raise ElmError("verification failed: other tensors were written than planned; nothing was kept")
    progress = progress_of(on_progress, "verify", sum(tensor.nbytes for tensor in written.values()))
    found: dict[str, Difference] = {}
    for weight in plan.weights:
        difference = found.setdefault(group_of(weight.name), Difference(group_of(weight.name)))
        difference.tensors += 1
        difference.values += int(np.prod(weight.shape))
        for start in range(0, weight.shape[0], weight.step):
            stop = min(start + weight.step, weight.shape[0])
            _compare_rows(weight, written, start, stop, plan.dtype, difference)
        progress(sum(written[tensor.name].nbytes for tensor, _ in weight.tensors(plan.dtype)))
    return differences(found)


def _compare_rows(
    weight: GgufWeight, written: Mapping[str, LazyTensor], start: int, stop: int, dtype: str, found: Difference
) -> None:
    """Compares rows; what rounding may move is that of a scale times its code, and of a bias."""
    module = weight.name.removesuffix(".weight")
    rows = written[weight.name].read_rows(start, stop)
    with np.errstate(all="ignore"):
        before = weight.values(start, stop)
        relative, absolute = ROUNDING[dtype]
        if weight.grid is None:
            after = to_float32(rows, dtype)
            allowed = np.abs(before) * np.float32(relative) + np.float32(absolute)
        elif weight.grid[1] == "mxfp4":
            codes = _unpacked(rows, 4)
            exponents = written[f"{module}.scales"].read_rows(start, stop).astype(np.int32) - 127
            magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes & 7]
            after = np.ldexp(np.where(codes < 8, magnitudes, -magnitudes), np.repeat(exponents, GROUP, axis=1))
            allowed = np.zeros_like(before)
        else:
            codes = _unpacked(rows, weight.grid[0]).astype(np.float32)
            scales, biases = (
                np.repeat(to_float32(written[f"{module}.{part}"].read_rows(start, stop), dtype), GROUP, axis=1)
                for part in ("scales", "biases")
            )
            after = scales * codes + biases
            # A half more, for the sum itself; and nothing where nothing is rounded.
            exact = dtype in ("float16", "float32") and not weight.kinds & set(FINE_SCALES)
            relative, absolute = (2.0**-23, 0.0) if exact or dtype == "float32" else (1.5 * relative, absolute)
            allowed = (np.abs(scales) * codes + np.abs(biases)) * np.float32(relative) + (codes + 1) * np.float32(
                absolute
            )
        difference = np.abs(before - after)
        wrong = ~(difference <= allowed) & ~((before == after) | (np.isnan(before) & np.isnan(after)))
        finite = np.isfinite(difference)
    if wrong.any():
        at = np.unravel_index(int(wrong.argmax()), wrong.shape)
        raise ElmError(
            f"verification failed: {weight.name} holds {float(after[at]):.9g} where its source holds "
            f"{float(before[at]):.9g}, further off than rounding to {dtype}; nothing was kept"
        )
    found.magnitude = max(found.magnitude, float(np.abs(before[finite]).max(initial=0)))
    most = float(difference[finite].max(initial=0))
    if most > found.largest or not found.where:
        found.largest, found.where = most, weight.name


def _unpacked(packed: Array, bits: int) -> Array:
    """Returns codes `(rows, columns)` of MLX's packed weights, bit by bit."""
    each = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), axis=1, bitorder="little")
    return each.reshape(len(packed), -1, bits) @ (1 << np.arange(bits))
