"""LoRA and DoRA adapters in the files of PEFT and CoreNet: read for a model, written for PEFT, merged into weights.

Both name their parts `X.lora_A.weight` (rank, inputs), `X.lora_embedding_A` (rank, tokens) and so on, with or without
the adapter's own name behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from elm_mlx.directories import PEFT_WEIGHTS
from elm_mlx.errors import InputError
from elm_mlx.files import write_json
from elm_mlx.model.config import Config, ModelConfig
from elm_mlx.model.families import FamilyConfig
from elm_mlx.reading import Keys, json_object, listed, short
from elm_mlx_convert import names, torch_files
from elm_mlx_convert.names import HEAD, to_canonical, unwrap
from elm_mlx_convert.source_config import Scaling, find_config_file, read_config_file
from elm_mlx_convert.sources import open_source
from elm_mlx_convert.tensors import FLOATS, LazyTensor, read_safetensors, to_float32

EMBEDDING = names.EMBEDDING.removesuffix(".weight")
PEFT_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_BASE = ".base_layer.weight"
_LINEAR, _EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
_PART = re.compile(rf"(.+?)\.({'|'.join((*_LINEAR, *_EMBEDDING, _MAGNITUDE))})(?:\.([^.]+))??(?:\.weight)?")
# Ways in which PEFT's adapter would mean something else than a product added to the model's own weights.
_UNKNOWN = (
    "lora_bias", "fan_in_fan_out", "use_qalora", "layer_replication", "alora_invocation_tokens", "modules_to_save",
    "trainable_token_indices", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "megatron_config",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
# What is followed of the regular expressions in PEFT's patterns: one group, two repetitions, so that no pattern of a
# downloaded file takes more than a moment.
_CHARACTER = r"(?:\w|\.|-|\\[.dw]|\[[\w-]+\])[*+?]?"
_PATTERN = re.compile(rf"\^?(?:{_CHARACTER})*(?:\((?:\?:)?(?:[\w.|]|\\[.dw])+\)(?:{_CHARACTER})*)?\$?")
_MOST_PATTERNS, _LONGEST_PATTERN = 1000, 200

Arrays = dict[str, np.ndarray]
_Parts = dict[str, LazyTensor]  # of one module


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA or DoRA adapter as numbers.

    Args:
        dora: whether each module has a magnitude vector.
        scale: of the product of the two matrices, the same for all modules.
        dropout: of the adapters' input, in training.
        arrays: float32, in the model's order: `MODULE.lora_a` (inputs, rank), `MODULE.lora_b` (rank, outputs), and
            for DoRA `MODULE.m` (outputs).
    """

    dora: bool
    scale: float
    dropout: float
    arrays: Mapping[str, np.ndarray]

    @property
    def ranks(self) -> dict[str, int]:
        """Returns the ranks by the canonical name of the module."""
        end = ".lora_a"
        return {name.removesuffix(end): a.shape[1] for name, a in self.arrays.items() if name.endswith(end)}


def read_peft(directory: Path, config: Config) -> LoraWeights:
    """Reads the adapter that PEFT has saved in `directory`, for `config`'s model.

    Raises:
        InputError: a file is missing or damaged, a part does not fit the model (names it and both shapes), or the
            adapter is of a kind that cannot be expressed here.
    """
    where = str(directory / PEFT_CONFIG)
    values = json_object(directory / PEFT_CONFIG)
    keys = Keys(where, values)
    if values.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type is {short(values.get('peft_type'))}; only LORA is known")
    dora, by_root = keys.flag("use_dora", False), keys.flag("use_rslora", False)
    unknown = [name for name in _UNKNOWN if values.get(name)] + ["bias"] * (values.get("bias", "none") != "none")
    if unknown:
        raise InputError(f"{where}: asks for {listed(unknown)}, which is not supported: merge it with PEFT")
    if str(values.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{where}: init_lora_weights changed the model's own weights; convert it to plain LoRA in PEFT"
        )
    alpha, patterns = keys.number("lora_alpha", low=-1e12), _patterns(keys)
    file = next((directory / name for name in PEFT_WEIGHTS if (directory / name).is_file()), None)
    if file is None:
        raise InputError(f"{directory}: holds neither {PEFT_WEIGHTS[0]} nor {PEFT_WEIGHTS[1]}")
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else _read_bin(file)
    modules, rest = _modules(tensors, config, str(file))
    strange = [name for name in rest if not name.endswith("base_layer.weight")]  # PEFT saves an adapted embedding whole
    if strange:
        raise InputError(f"{file}: holds tensors of no LoRA or DoRA adapter: {listed(strange)}")
    if dora and not any(_MAGNITUDE in parts for parts in modules.values()):
        raise InputError(f"{file}: holds no {_MAGNITUDE}, and {PEFT_CONFIG} says use_dora")
    scalings = {
        module: Scaling(next((value for fits, value in patterns if fits.match(module)), alpha), by_root)
        for module in modules
    }
    dropout = values.get("lora_dropout")
    dropout = float(dropout) if isinstance(dropout, (int, float)) and 0 <= dropout < 1 else 0.0
    return _assemble(modules, scalings, config, str(file), dropout)


def read_corenet(
    source: Path, config: ModelConfig, *, alpha: float | None = None, settings: Path | None = None
) -> LoraWeights:
    """Reads the adapter in a CoreNet checkpoint, without the model that stands beside it there.

    Args:
        alpha: the adapter's strength, which is not in the file; or it is in the YAML `settings`, or beside `source`.

    Raises:
        InputError: as `read_peft`; or the strength is not known.
    """
    opened = open_source(source)
    modules, _ = _modules(opened.tensors, config, opened.label)
    if not modules:
        raise InputError(f"{source}: holds no adapter")
    scaling = None if alpha is None else Scaling(alpha)
    if scaling is None:
        found = read_config_file(settings) if settings is not None else find_config_file(opened.directory)
        scaling = found.scaling if found else None
    if scaling is None:
        raise InputError(f"{source}: does not say its adapter's alpha: pass --alpha, or its YAML with --config")
    return _assemble(_without_padding(modules, config), dict.fromkeys(modules, scaling), config, opened.label, 0.0)


def write_peft(directory: Path, adapter: LoraWeights) -> None:
    """Writes the directory that `PeftModel.from_pretrained` reads; its model is the hub's own.

    Raises:
        InputError: PEFT cannot express the adapter.
    """
    arrays = adapter.arrays
    if EMBEDDING in adapter.ranks and adapter.dora:
        raise InputError(
            "DoRA of an embedding cannot be written for PEFT, which normalizes columns where elm-mlx normalizes rows"
        )
    from safetensors.numpy import save

    tensors: Arrays = {}
    for module in adapter.ranks:
        a, b = ("lora_embedding_A", "lora_embedding_B") if module == EMBEDDING else ("lora_A.weight", "lora_B.weight")
        tensors[f"{_PREFIX}{module}.{a}"] = arrays[f"{module}.lora_a"].T
        tensors[f"{_PREFIX}{module}.{b}"] = arrays[f"{module}.lora_b"].T
        if adapter.dora:
            tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = arrays[f"{module}.m"]
    values = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    (directory / PEFT_WEIGHTS[0]).write_bytes(save(values, {"format": "pt"}))
    write_json(directory / PEFT_CONFIG, _peft_config(adapter))


def _peft_config(adapter: LoraWeights) -> dict[str, Any]:
    largest = max(adapter.ranks.values())
    differ = {module: rank for module, rank in adapter.ranks.items() if rank != largest}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": largest, "lora_alpha": adapter.scale * largest, "lora_dropout": adapter.dropout,
        "target_modules": list(adapter.ranks), "rank_pattern": differ,
        "alpha_pattern": {module: adapter.scale * rank for module, rank in differ.items()},
        "use_dora": adapter.dora, "use_rslora": False, "bias": "none", "fan_in_fan_out": False,
    }  # fmt: skip


def has_adapter(tensors: Iterable[str]) -> bool:
    """Returns whether any of the names is a part of an adapter."""
    return any(_PART.fullmatch(name) or name.endswith(_BASE) for name in tensors)


def merge(tensors: Mapping[str, LazyTensor], scaling: Scaling, where: str) -> dict[str, LazyTensor]:
    """Merges CoreNet's adapters: returns float32 weights under the names of a model without adapters.

    Rows are merged as they are read, so a merged tensor costs no more memory than another. CoreNet's tied head reads
    the embedding without its adapter. So an adapter on the embedding of a tied model unties it: the result has an
    `lm_head.weight`, which is the base embedding.

    Raises:
        InputError: names the tensor that is missing, or whose shape does not fit its base.
    """
    modules: dict[str, _Parts] = {}
    bases: _Parts = {}
    merged: dict[str, LazyTensor] = {}
    adapters = set()
    for name, tensor in tensors.items():
        if match := _PART.fullmatch(name):
            if match[2] in modules.setdefault(match[1], {}) and match[3] in adapters:
                raise InputError(f"{where}: holds {listed([name])} under two names")
            modules[match[1]][match[2]] = tensor
            adapters.add(match[3])
        elif name.endswith(_BASE):
            bases[name.removesuffix(_BASE)] = tensor
        else:
            merged[name] = tensor
    if len(adapters) > 1:
        raise InputError(f"{where}: holds the adapters {', '.join(sorted(map(str, adapters)))}: only one can be merged")
    known = [to_canonical(name) for name in (*tensors, *(f"{module}.weight" for module in (*modules, *bases)))]
    for module in dict.fromkeys((*bases, *modules)):
        name, parts = f"{module}.weight", modules.get(module, {})
        if module not in bases:
            raise InputError(f"{where}: {module}{_BASE} is missing: the file holds an adapter without its model")
        merged[name] = _merged(f"{where}: {module}", bases[module], parts, scaling) if parts else bases[module]
        if to_canonical(name) == names.EMBEDDING and HEAD not in known and parts:
            merged[HEAD] = bases[module].renamed(HEAD)
    return merged


def _read_bin(path: Path) -> dict[str, LazyTensor]:
    tree = torch_files.load(path)
    if not isinstance(tree, dict) or not all(isinstance(v, LazyTensor) for v in tree.values()):
        raise InputError(f"{path}: holds no named tensors")
    return {str(name): tensor for name, tensor in tree.items()}


def _modules(tensors: Mapping[str, LazyTensor], config: Config, where: str) -> tuple[dict[str, _Parts], list[str]]:
    """Returns the parts by the model's module, and the names of what is no part."""
    modules: dict[str, _Parts] = {}
    rest = []
    weights = config.shapes()
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match is None:
            rest.append(name)
            continue
        module = unwrap(match[1].removeprefix(_PREFIX))
        weight = next((weight for weight in _names(module, config) if weight in weights), None)
        if weight is None:
            raise InputError(f"{where}: adapts {listed([module])}, which this model {_lacks(module, config)}")
        parts = modules.setdefault(weight.removesuffix(".weight"), {})
        if match[2] in parts:
            raise InputError(f"{where}: holds two adapters; save only one")
        parts[match[2]] = tensor
    return modules, rest


def _names(module: str, config: Config) -> list[str]:
    """Returns the names that a module's weight may have: PEFT's are transformers', alone or under a head."""
    if isinstance(config, FamilyConfig):
        return [f"{module}.weight", f"{config.family.body}.{module}.weight"]
    canonical = to_canonical(f"{module}.weight")
    return [] if canonical is None else [canonical]


def _lacks(module: str, config: Config) -> str:
    if module == HEAD.removesuffix(".weight") and config.share_input_output_layers:
        return "does not have: its head is its embedding"
    return f"does not have; there are {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in config.modules()))}"


def _without_padding(modules: dict[str, _Parts], config: ModelConfig) -> dict[str, _Parts]:
    """Drops the padding of CoreNet's vocabulary: rows and columns of tokens that the model has not."""
    size = config.vocab_size
    head = modules.get(HEAD.removesuffix(".weight"), {})
    if "lora_B" in head:
        head["lora_B"] = head["lora_B"].first_rows(size)
    tokens = modules.get(EMBEDDING, {}).get("lora_embedding_A")
    if tokens is not None and len(tokens.shape) == 2 and tokens.shape[1] > size:
        read = tokens.read_rows
        modules[EMBEDDING]["lora_embedding_A"] = LazyTensor(
            tokens.name, (tokens.shape[0], size), tokens.dtype, lambda start, stop: read(start, stop)[:, :size]
        )
    return modules


def _assemble(
    modules: dict[str, _Parts], scalings: Mapping[str, Scaling], config: Config, where: str, dropout: float
) -> LoraWeights:
    if not modules:
        raise InputError(f"{where}: adapts nothing")
    order = config.modules()
    missing = [module for module in modules if module not in order]
    if missing:
        raise InputError(f"{where}: adapts {listed(missing)}, which only an OpenELM supports")
    dora = any(_MAGNITUDE in parts for parts in modules.values())
    if dora and EMBEDDING in modules:
        raise InputError(
            f"{where}: PEFT's DoRA of an embedding normalizes its columns, elm-mlx's its rows: merge it with PEFT"
        )
    arrays: Arrays = {}
    scales: dict[str, tuple[int, float]] = {}
    for module in sorted(modules, key=order.index):
        parts, matrices = modules[module], _EMBEDDING if module == EMBEDDING else _LINEAR
        wanted = (*matrices, _MAGNITUDE) if dora else matrices
        rank = _rank(f"{where}: {module}", parts, wanted, config.shapes()[f"{module}.weight"], config.vocab_size)
        scales[module] = rank, scalings[module].of(rank)
        for part, name in zip(wanted, ("lora_a", "lora_b", "m"), strict=False):
            value = to_float32(parts[part].read(), parts[part].dtype)
            arrays[f"{module}.{name}"] = np.array(value.T, np.float32, order="C")
    _, scale = max(scales.values(), key=lambda found: found[0])
    for module, (_, own) in scales.items():
        if own != scale:  # there is one scale for all; the rest goes into B
            arrays[f"{module}.lora_b"] *= np.float32(own / scale if scale else 0.0)
    return LoraWeights(dora, scale, dropout, arrays)


def _rank(where: str, parts: _Parts, wanted: tuple[str, ...], shape: tuple[int, ...], most: int) -> int:
    """Checks a module's parts against its weight's shape. Returns their rank, of at most `most`."""
    for part in dict.fromkeys((*wanted, *parts)):
        if part not in parts:
            raise InputError(f"{where}.{part} is missing")
        if part not in wanted:
            raise InputError(f"{where} has an unexpected {part}")
        if parts[part].dtype not in (*FLOATS, "float64"):
            raise InputError(f"{where}.{part} is {parts[part].dtype}; it must be a float type")
    a, b = wanted[:2]
    rank = parts[a].shape[0] if len(parts[a].shape) == 2 else 0
    if not 0 < rank <= most:
        raise InputError(f"{where}.{a} of shape {parts[a].shape} is no matrix of a rank")
    rows, columns = shape
    inputs, outputs = (rows, columns) if a in _EMBEDDING else (columns, rows)
    expected = {a: (rank, inputs), b: (outputs, rank), _MAGNITUDE: (rows,)}
    for part, tensor in parts.items():
        if tensor.shape != expected[part]:
            raise InputError(f"{where}.{part} has the shape {tensor.shape}, and the model needs {expected[part]}")
    return rank


def _patterns(keys: Keys) -> list[tuple[re.Pattern[str], float]]:
    """Reads `alpha_pattern`: regular expressions of a module's name, or of its end; the first that fits counts."""
    where, pattern = keys.where, keys.object("alpha_pattern")
    if len(pattern) > _MOST_PATTERNS:
        raise InputError(f"{where}: alpha_pattern has {len(pattern):,} entries; the limit is {_MOST_PATTERNS:,}")
    for key in pattern:
        repeated = sum(key.count(sign) for sign in "*+?") - key.count("(?:")
        if len(key) > _LONGEST_PATTERN or repeated > 2 or not _PATTERN.fullmatch(key):
            raise InputError(
                f"{where}: alpha_pattern has {listed([key])}, a regular expression that is not supported: "
                "name the modules"
            )
    alphas = keys.within("alpha_pattern")
    try:
        return [(re.compile(rf"(?:.*\.)?(?:{key})$"), alphas.number(key, low=-1e12)) for key in pattern]
    except re.error as error:
        raise InputError(f"{where}: alpha_pattern holds an invalid regular expression: {error}") from None


def _merged(where: str, base: LazyTensor, parts: _Parts, scaling: Scaling) -> LazyTensor:
    if len(base.shape) != 2 or base.dtype not in (*FLOATS, "float64"):
        raise InputError(f"{where}{_BASE}, {base.dtype} of shape {base.shape}, is no matrix that an adapter fits")
    embedding = any(part in _EMBEDDING for part in parts)
    wanted = _EMBEDDING if embedding else (*_LINEAR, _MAGNITUDE) if _MAGNITUDE in parts else _LINEAR
    rank = _rank(where, parts, wanted, base.shape, base.size)
    a, b, magnitude = parts[wanted[0]], parts[wanted[1]], parts.get(_MAGNITUDE)
    scale = np.float32(scaling.of(rank))

    def read_rows(start: int, stop: int) -> np.ndarray:
        weight = _rows(base, start, stop)
        if embedding:
            return weight + (_rows(a, 0, a.rows)[:, start:stop].T @ _rows(b, 0, b.rows).T) * scale
        weight = weight + (_rows(b, start, stop) @ _rows(a, 0, a.rows)) * scale
        if magnitude is None:
            return weight
        length = np.linalg.norm(weight, axis=1)  # over the inputs: one for each output (DoRA, equation 5)
        with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros, as in CoreNet, is no number
            return weight * (_rows(magnitude, start, stop) / length)[:, None]

    return replace(base, dtype="float32", read_rows=read_rows)


def _rows(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
    return to_float32(tensor.read_rows(start, stop), tensor.dtype)
