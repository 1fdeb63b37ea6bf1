"""A model directory and an adapter in figures, by their configs and the headers of their weights. Imports no MLX."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.model.config import AFFINE, Config, read_config, tokenizer_file
from elm_mlx.model.families import FamilyConfig
from elm_mlx.safetensors_file import read_header, weight_files

if TYPE_CHECKING:
    from elm_mlx.store.adapters import Adapter


@dataclass(frozen=True)
class Layer:
    """One layer's widths and parameters."""

    query_heads: int
    kv_heads: int
    ffn_dim: int
    parameters: int


@dataclass(frozen=True)
class Description:
    """A model in figures. Sizes are in bytes; `memory` is per type that it can be computed in.

    Attributes:
        family: its name: "OpenELM", or such as "Llama".
        linears: of a layer: what an adapter can be put on.
        keeps: "keys and values", or "a state", of which nothing can be taken back.
        head_dim, glu, qk_norm, layers: of an OpenELM alone.
    """

    path: str
    family: str
    parameters: int
    embedding_parameters: int
    dtype: str
    file_bytes: int
    memory: dict[str, int]
    kv_bytes_per_token: dict[str, int]
    vocab_size: int
    model_dim: int
    num_layers: int
    context: int
    tied_head: bool
    tokenizer: bool
    linears: tuple[str, ...]
    keeps: str
    head_dim: int | None = None
    glu: bool | None = None
    qk_norm: bool | None = None
    layers: tuple[Layer, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that a model of this family has, for JSON."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


@dataclass(frozen=True)
class AdapterDescription:
    """An adapter in figures.

    Attributes:
        summary: kind, rank and scale.
        share: of its parameters in the model's.
        head: what a tied head reads.
        made_for: the model that it names, for a person.
        modules: kind of module -> its ranks, of layers first to last.
    """

    path: str
    summary: str
    parameters: int
    share: float
    file_bytes: int
    head: str
    made_for: str
    modules: dict[str, str]


def config_values(path: Path, config: Config) -> dict[str, Any]:
    """Reads the values of `config.json`, of which `config` was made, for a directory that is made of this one.

    Of another family they say how the head is tied: where that is unsaid, mlx-lm takes it otherwise than transformers.
    """
    values = reading.json_object(path / "config.json")
    if isinstance(config, FamilyConfig):
        values["tie_word_embeddings"] = config.share_input_output_layers
    return values


def describe_adapter(path: Path, model: Path) -> AdapterDescription:
    """Describes the adapter in `path`, of the model in `model`. Raises InputError where it cannot be read or does not
    fit."""
    from elm_mlx.store import adapters

    config = read_config(model)
    adapter = adapters.read(path, config, model)
    weights = adapters.weights_file(path)
    shapes = adapter.shapes(config) or {entry.name: entry.shape for entry in read_header(weights)}
    parameters = sum(math.prod(shape) for shape in shapes.values())
    ranks: dict[str, list[int]] = {}
    for module, rank in adapter.ranks.items():
        ranks.setdefault(module.split(".")[-1], []).append(rank)
    return AdapterDescription(
        path=str(path),
        summary=adapter.describe(),
        parameters=parameters,
        share=parameters / sum(math.prod(shape) for shape in config.shapes().values()),
        file_bytes=weights.stat().st_size,
        head=_head(adapter, config),
        made_for="this model" if adapter.model_sha256 else "a model of these shapes; it does not say which",
        modules={module: _runs(of_layers) for module, of_layers in ranks.items()},
    )


def _head(adapter: Adapter, config: Config) -> str:
    from elm_mlx.store import adapters

    if not config.share_input_output_layers or adapters.EMBEDDING not in adapter.ranks:
        return "as in the model"
    return "reads the adapted embedding" if adapter.adapted_head else "reads the embedding without its adapter"


def _runs(ranks: list[int]) -> str:
    """Returns `8, in 3 layers` or, where they differ, all of them."""
    if len(set(ranks)) > 1:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}" + (f", in {len(ranks)} layers" if len(ranks) > 1 else "")


def describe(path: Path) -> Description:
    """Describes the model in `path` by its config and headers. Raises InputError where they cannot be read."""
    config = read_config(path)
    shapes = config.shapes()
    parameters = sum(map(math.prod, shapes.values()))
    dtype, file_bytes = _stored(path, shapes, config.quantization)
    about = Description(
        path=str(path),
        family=config.family.name if isinstance(config, FamilyConfig) else "OpenELM",
        parameters=parameters,
        embedding_parameters=math.prod(shapes[f"{config.embedding}.weight"]),
        dtype=dtype,
        file_bytes=file_bytes,
        memory={"float32": 4 * parameters, "16 bits": 2 * parameters},
        kv_bytes_per_token={"float32": config.kv_bytes_per_token(4), "16 bits": config.kv_bytes_per_token(2)},
        vocab_size=config.vocab_size,
        model_dim=config.model_dim,
        num_layers=config.num_layers,
        context=config.max_context_length,
        tied_head=config.share_input_output_layers,
        tokenizer=tokenizer_file(path, config.model_type) is not None,
        linears=tuple(config.linears),
        keeps="keys and values" if config.kv_bytes_per_token(2) else "a state",
    )
    if isinstance(config, FamilyConfig):
        return about
    of_layers = [0] * config.num_layers
    for name, shape in shapes.items():
        if name.startswith(f"{config.layers_prefix}."):
            of_layers[int(name.split(".")[2])] += math.prod(shape)
    widths = zip(config.num_query_heads, config.num_kv_heads, config.ffn_dims, of_layers, strict=True)
    return replace(
        about, head_dim=config.head_dim, glu=config.ffn_with_glu, qk_norm=config.normalize_qk_projections,
        layers=tuple(Layer(*each) for each in widths),
    )  # fmt: skip


def packing_name(ways: Iterable[Mapping[str, Any]]) -> str:
    """Returns bits and group sizes of weights that are packed in `ways`, such as "4-bit, group 64"; a float mode's name
    first."""
    ways = list(ways)
    modes = sorted({str(mode) for way in ways if (mode := way.get("mode") or AFFINE) != AFFINE})
    bits, groups = (sorted({int(way[name]) for way in ways}) for name in ("bits", "group_size"))
    sizes = f"{'/'.join(map(str, bits))}-bit, group {'/'.join(map(str, groups))}"
    return " ".join([*modes, sizes])


def missing(path: Path, name: str) -> InputError:
    """Returns the error for a tensor that a model directory lacks."""
    untied = "; config.json does not say that it is the embedding (tie_word_embeddings)"
    return InputError(f"{path}: tensor {name} is missing{untied if name == 'lm_head.weight' else ''}")


def _stored(
    path: Path, shapes: Mapping[str, tuple[int, ...]], quantization: Mapping[str, Any] | None
) -> tuple[str, int]:
    """Returns the weights' type, by their headers, and their size on disk."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "float8"}
    files = weight_files(path)
    entries = {entry.name: entry for file in files for entry in read_header(file)}
    for name, shape in shapes.items():
        if name not in entries:
            raise missing(path, name)
        found = entries[name].shape
        if name.endswith("conv1d.weight") and len(found) == 3:  # in PyTorch's order, or MLX's
            found = (found[0], max(found[1:]), min(found[1:]))
        if quantization is not None and len(found) == len(shape):  # a packed row has fewer values
            found = (*found[:-1], shape[-1])
        if found != shape:
            raise InputError(f"{path}: tensor {name} is {entries[name].shape}, and config.json implies {shape}")
    types = {entry.dtype for entry in entries.values()}
    floats = " and ".join(sorted(names.get(kind, kind) for kind in types - {"U32"}))
    if quantization is not None:
        ways = [quantization, *(way for way in quantization.values() if isinstance(way, Mapping))]
        parameters = sum(map(math.prod, shapes.values()))
        per_weight = 8 * sum(entry.end - entry.begin for entry in entries.values()) / parameters
        floats = f"{packing_name(ways)}, scales {floats}, {per_weight:.2f} bits a weight"
    return floats, sum(file.stat().st_size for file in files)
