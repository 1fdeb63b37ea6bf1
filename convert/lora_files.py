"""LoRA and DoRA adapters in the files of PEFT and of CoreNet: read, checked against a model, and written for PEFT.

Both name their parts `X.lora_A.weight` (rank, inputs), `X.lora_embedding_A` (rank, tokens) and so on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from elm_mlx.errors import InputError
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.families import Config, FamilyConfig
from elm_mlx.reading import json_object, listed
from elm_mlx_convert import names, torch_files
from elm_mlx_convert.names import HEAD, to_canonical, unwrap
from elm_mlx_convert.source_config import Scaling, find_settings, read_settings
from elm_mlx_convert.sources import open_source
from elm_mlx_convert.tensors import FLOATS, LazyTensor, read_safetensors, to_float32

EMBEDDING = names.EMBEDDING.removesuffix(".weight")
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(.+?)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.[^.]+)??(?:\.weight)?"
)
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

_Parts = dict[str, dict[str, LazyTensor]]
Arrays = dict[str, np.ndarray]


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
        """By the canonical name of the module."""
        end = ".lora_a"
        return {name.removesuffix(end): a.shape[1] for name, a in self.arrays.items() if name.endswith(end)}


def read_peft(directory: Path, config: Config) -> LoraWeights:
    """Reads the adapter that PEFT has saved in `directory`, for `config`'s model.

    Raises:
        InputError: a file is missing or damaged, a part does not fit the model (names it and both shapes), or the
            adapter is of a kind that cannot be expressed here.
    """
    values = json_object(directory / PEFT_CONFIG)
    where = str(directory / PEFT_CONFIG)
    if values.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type is {str(values.get('peft_type'))[:40]!r}; only LORA is known")
    for name in ("use_dora", "use_rslora"):
        if not isinstance(values.get(name), bool | None):
            raise InputError(f"{where}: {name} is {str(values[name])[:40]!r}: true or false is needed")
    unknown = [name for name in _UNKNOWN if values.get(name)] + ["bias"] * (values.get("bias", "none") != "none")
    if unknown:
        raise InputError(f"{where}: asks for {listed(unknown)}, which this does not know: merge it with PEFT")
    if str(values.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{where}: init_lora_weights changed the model's own weights; convert it to plain LoRA in PEFT"
        )
    file = next((directory / name for name in PEFT_WEIGHTS if (directory / name).is_file()), None)
    if file is None:
        raise InputError(f"{directory}: holds neither {PEFT_WEIGHTS[0]} nor {PEFT_WEIGHTS[1]}")
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else _read_bin(file)
    alpha, pattern = values.get("lora_alpha"), values.get("alpha_pattern") or {}
    if (
        alpha is None
        or not _is_number(alpha)
        or not isinstance(pattern, dict)
        or not all(map(_is_number, pattern.values()))
    ):
        raise InputError(f"{where}: lora_alpha or alpha_pattern is no number")
    patterns = _patterns(where, pattern)
    parts, rest = _parts(tensors, config, str(file))
    strange = [name for name in rest if not name.endswith("base_layer.weight")]  # PEFT saves an adapted embedding whole
    if strange:
        raise InputError(f"{file}: holds what is no part of a LoRA or DoRA adapter: {listed(strange)}")
    if values.get("use_dora") is True and not any("lora_magnitude_vector" in found for found in parts.values()):
        raise InputError(f"{file}: holds no lora_magnitude_vector, and {PEFT_CONFIG} says use_dora")
    by_root = values.get("use_rslora") is True
    strengths = {
        module: next((value for fits, value in patterns if fits.match(module)), float(alpha)) for module in parts
    }
    scalings = {module: Scaling(strength, by_root) for module, strength in strengths.items()}
    dropout = values.get("lora_dropout", 0.0)
    return _assemble(parts, scalings, config, str(file), float(dropout) if _is_number(dropout) else 0.0)


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
    parts, _ = _parts(opened.tensors, config, opened.label)
    if not parts:
        raise InputError(f"{source}: holds no adapter")
    if alpha is None:
        found = read_settings(settings) if settings is not None else find_settings(opened.directory)
        if found is None or found.scaling is None:
            raise InputError(
                f"{source}: does not say how strong its adapter is: pass --alpha, or with --config its YAML"
            )
        scaling = found.scaling
    else:
        scaling = Scaling(alpha)
    return _assemble(_without_padding(parts, config), dict.fromkeys(parts, scaling), config, opened.label, 0.0)


def write_peft(directory: Path, adapter: LoraWeights) -> None:
    """Fills `directory` with what `PeftModel.from_pretrained` reads; its model is the hub's own.

    Raises:
        InputError: PEFT cannot express the adapter.
    """
    arrays = adapter.arrays
    if EMBEDDING in adapter.ranks and adapter.dora:
        raise InputError(
            "PEFT's DoRA of an embedding measures its columns, and this one its rows: it cannot be written"
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
    text = json.dumps(_peft_config(adapter), indent=2) + "\n"
    (directory / PEFT_CONFIG).write_text(text, encoding="utf-8")


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


def _read_bin(path: Path) -> dict[str, LazyTensor]:
    tree = torch_files.load(path)
    if not isinstance(tree, dict) or not all(isinstance(v, LazyTensor) for v in tree.values()):
        raise InputError(f"{path}: holds no tensors by name")
    return {str(name): tensor for name, tensor in tree.items()}


def _parts(tensors: Mapping[str, LazyTensor], config: Config, where: str) -> tuple[_Parts, list[str]]:
    """The model's module -> part -> tensor, and the names of what is no part."""
    parts: _Parts = {}
    rest = []
    weights = config.shapes()
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match is None:
            rest.append(name)
            continue
        name = unwrap(match[1].removeprefix(_PREFIX))
        weight = next((weight for weight in _names(name, config) if weight in weights), None)
        if weight is None:
            raise InputError(f"{where}: adapts {listed([name])}, which {_lacks(name, config)}")
        found = parts.setdefault(weight.removesuffix(".weight"), {})
        if match[2] in found:
            raise InputError(f"{where}: holds two adapters; save one alone")
        found[match[2]] = tensor
    return parts, rest


def _names(module: str, config: Config) -> list[str]:
    """What the weight of a module may be called in the model: PEFT's is transformers', alone or under a head."""
    if isinstance(config, FamilyConfig):
        return [f"{module}.weight", f"{config.family.body}.{module}.weight"]
    canonical = to_canonical(f"{module}.weight")
    return [] if canonical is None else [canonical]


def _lacks(module: str, config: Config) -> str:
    """Why the model has no such module, as far as can be told."""
    if module == HEAD.removesuffix(".weight") and config.share_input_output_layers:
        return "this model does not have: its head is its embedding"
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in config.modules()))
    return f"this model does not have; there are {known}"


def _without_padding(parts: _Parts, config: ModelConfig) -> _Parts:
    """CoreNet pads the vocabulary; what stands for tokens that the model has not is left out."""
    size = config.vocab_size
    head = parts.get(HEAD.removesuffix(".weight"), {})
    if "lora_B" in head:
        head["lora_B"] = head["lora_B"].first_rows(size)
    tokens = parts.get(EMBEDDING, {}).get("lora_embedding_A")
    if tokens is not None and len(tokens.shape) == 2 and tokens.shape[1] > size:
        read = tokens.read_rows
        parts[EMBEDDING]["lora_embedding_A"] = LazyTensor(
            tokens.name, (tokens.shape[0], size), tokens.dtype, lambda start, stop: read(start, stop)[:, :size]
        )
    return parts


def _assemble(
    parts: _Parts, scalings: Mapping[str, Scaling], config: Config, where: str, dropout: float
) -> LoraWeights:
    if not parts:
        raise InputError(f"{where}: adapts nothing")
    order = config.modules()
    missing = [module for module in parts if module not in order]
    if missing:
        raise InputError(f"{where}: adapts {listed(missing)}, which is done for OpenELM alone")
    dora = any("lora_magnitude_vector" in found for found in parts.values())
    arrays: Arrays = {}
    ranks: dict[str, int] = {}
    for module in sorted(parts, key=order.index):
        ranks[module] = _take(module, parts[module], config, where, dora, arrays)
    scales = {module: scalings[module].of(rank) for module, rank in ranks.items()}
    scale = scales[max(ranks, key=lambda module: ranks[module])]
    for module, own in scales.items():
        if own != scale:  # there is one scale for all; the rest goes into B
            arrays[f"{module}.lora_b"] *= np.float32(own / scale if scale else 0.0)
    return LoraWeights(dora, scale, dropout if 0 <= dropout < 1 else 0.0, arrays)


def _take(module: str, found: dict[str, LazyTensor], config: Config, where: str, dora: bool, arrays: Arrays) -> int:
    """Puts the module's parts into `arrays`, checked. Returns its rank."""
    rows, columns = config.shapes()[f"{module}.weight"]
    embedding = module == EMBEDDING
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    wanted = [a, b, *(["lora_magnitude_vector"] if dora else [])]
    if embedding and dora:
        raise InputError(
            f"{where}: DoRA of an embedding measures its columns in PEFT, and its rows here: merge it there"
        )
    for part in {*wanted, *found}:
        if part not in found:
            raise InputError(f"{where}: {module}.{part} is missing")
        if part not in wanted:
            raise InputError(f"{where}: {module} has a {part}, which has no place there")
        if found[part].dtype not in (*FLOATS, "float64"):
            raise InputError(f"{where}: {module}.{part} is {found[part].dtype}, and floats are needed")
    rank = found[a].shape[0] if len(found[a].shape) == 2 else 0
    if not 0 < rank <= config.vocab_size:
        raise InputError(f"{where}: {module}.{a} of shape {found[a].shape} is no matrix of a rank")
    inputs, outputs = (rows, columns) if embedding else (columns, rows)
    for part, shape in ((a, (rank, inputs)), (b, (outputs, rank)), ("lora_magnitude_vector", (rows,))):
        if part in found and found[part].shape != shape:
            raise InputError(f"{where}: {module}.{part} is {found[part].shape}, and the model needs {shape}")
    for part, name in ((a, "lora_a"), (b, "lora_b"), ("lora_magnitude_vector", "m")):
        if part in found:
            value = to_float32(found[part].read(), found[part].dtype)
            arrays[f"{module}.{name}"] = np.array(value.T, np.float32, order="C")
    return rank


def _patterns(where: str, pattern: Mapping[str, Any]) -> list[tuple[re.Pattern[str], float]]:
    """PEFT's `alpha_pattern`: regular expressions of a module's name, or of its end; the first that fits counts."""
    if len(pattern) > _MOST_PATTERNS:
        raise InputError(f"{where}: alpha_pattern has {len(pattern):,} entries; {_MOST_PATTERNS:,} are the most")
    for key in pattern:
        repeated = sum(key.count(sign) for sign in "*+?") - key.count("(?:")
        if len(key) > _LONGEST_PATTERN or repeated > 2 or not _PATTERN.fullmatch(key):
            raise InputError(
                f"{where}: alpha_pattern has {listed([key])}, which is more of an expression than is followed here: "
                "name the modules"
            )
    try:
        return [(re.compile(rf"(?:.*\.)?(?:{key})$"), float(value)) for key, value in pattern.items()]
    except re.error as error:
        raise InputError(f"{where}: alpha_pattern holds what is no regular expression: {error}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Merging

_CORENET_PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.([^.]+)(?:\.weight)?"
)
_BASE = ".base_layer.weight"


def has_adapter(names: Iterable[str]) -> bool:
    """Whether any of the names is a part of an adapter."""
    return any(_CORENET_PART.fullmatch(name) or name.endswith(_BASE) for name in names)


def merge(tensors: Mapping[str, LazyTensor], scaling: Scaling, where: str) -> dict[str, LazyTensor]:
    """The weights with their adapters merged in, float32, under the names of a model without adapters.

    CoreNet's tied head reads the embedding without its adapter. So an adapter on the embedding of a tied
    model unties it: the result has an `lm_head.weight`, which is the base embedding.

    Raises:
        InputError: names the tensor that is missing, or whose shape does not fit its base.
    """
    parts: dict[str, dict[str, LazyTensor]] = {}
    merged: dict[str, LazyTensor] = {}
    adapters = set()
    for name, tensor in tensors.items():
        if match := _CORENET_PART.fullmatch(name):
            parts.setdefault(match[1], {})[match[2]] = tensor
            adapters.add(match[3])
        elif name.endswith(_BASE):
            parts.setdefault(name.removesuffix(_BASE), {})["base"] = tensor
        else:
            merged[name] = tensor
    if len(adapters) > 1:
        raise InputError(f"{where}: holds the adapters {', '.join(sorted(adapters))}: only one can be merged")
    head_is_tied = not any(to_canonical(name) == HEAD for name in [*tensors, *(f"{m}.weight" for m in parts)])
    for module, module_parts in parts.items():
        name = f"{module}.weight"
        merged[name] = _merge_module(name, module_parts, scaling, where)
        if to_canonical(name) == names.EMBEDDING and head_is_tied and len(module_parts) > 1:
            merged[HEAD] = module_parts["base"].renamed(HEAD)
    return merged


def _merge_module(name: str, parts: dict[str, LazyTensor], scaling: Scaling, where: str) -> LazyTensor:
    module = name.removesuffix(".weight")
    if "base" not in parts:
        raise InputError(f"{where}: {module}{_BASE} is missing: the file holds an adapter without its model")
    base = parts["base"]
    if len(parts) == 1:
        return base
    a, b = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A", "lora_B")
    for part in (a, b):
        if part not in parts:
            raise InputError(f"{where}: {module}.{part} is missing beside {module}{_BASE}")
    for part, tensor in parts.items():
        if tensor.dtype not in (*FLOATS, "float64"):
            raise InputError(f"{where}: {module}.{part} is {tensor.dtype}, and floats are needed")
    rank = parts[a].shape[0] if len(parts[a].shape) == 2 else 0
    _check(parts, rank, where, module, of_embedding=a == "lora_embedding_A")
    if a == "lora_embedding_A":
        return _lora_embedding(base, parts[a], parts[b], scaling.of(rank))
    return _lora_linear(base, parts[a], parts[b], parts.get("lora_magnitude_vector"), scaling.of(rank))


def _check(parts: dict[str, LazyTensor], rank: int, where: str, module: str, *, of_embedding: bool) -> None:
    shape = parts["base"].shape
    if len(shape) != 2 or rank < 1:
        raise InputError(f"{where}: {module}{_BASE} of shape {shape} is no matrix that an adapter fits")
    rows, columns = shape
    expected: dict[str, tuple[int, ...]] = {"base": shape}
    if of_embedding:
        expected |= {"lora_embedding_A": (rank, rows), "lora_embedding_B": (columns, rank)}
    else:
        expected |= {"lora_A": (rank, columns), "lora_B": (rows, rank), "lora_magnitude_vector": (rows,)}
    for part, tensor in parts.items():
        if part not in expected:
            raise InputError(f"{where}: {module} has a {part} where CoreNet has none")
        if tensor.shape != expected[part]:
            raise InputError(
                f"{where}: {module}.{part} has the shape {tensor.shape}; beside {module}{_BASE} of shape {shape} "
                f"it needs {expected[part]}"
            )


def _lora_linear(
    base: LazyTensor, a: LazyTensor, b: LazyTensor, magnitude: LazyTensor | None, scale: float
) -> LazyTensor:
    def read_rows(start: int, stop: int) -> np.ndarray:
        weight = _rows(base, start, stop) + (_rows(b, start, stop) @ _rows(a, 0, a.rows)) * np.float32(scale)
        if magnitude is None:
            return weight
        length = np.linalg.norm(weight, axis=1)  # over the inputs: one for each output (DoRA, equation 5)
        with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros, as in CoreNet, is no number
            return weight * (_rows(magnitude, start, stop) / length)[:, None]

    return replace(base, dtype="float32", read_rows=read_rows)


def _lora_embedding(base: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
    def read_rows(start: int, stop: int) -> np.ndarray:
        tokens = _rows(a, 0, a.rows)[:, start:stop].T
        return _rows(base, start, stop) + (tokens @ _rows(b, 0, b.rows).T) * np.float32(scale)

    return replace(base, dtype="float32", read_rows=read_rows)


def _rows(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
    return to_float32(tensor.read_rows(start, stop), tensor.dtype)
