"""Adapters: which modules at what ranks, mlx-lm's directory of one, and its arrays into a model and out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from elm_mlx import files, reading
from elm_mlx.directories import PEFT_WEIGHTS, PREDICTION
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model import lora_layers, stored_layers
from elm_mlx.model.config import Config
from elm_mlx.model.network import Model
from elm_mlx.model.roofline import layer_of
from elm_mlx.reading import Keys, counted, json_object, short
from elm_mlx.safetensors_file import fingerprint, read_header, write_arrays
from elm_mlx.text import chat_template

if TYPE_CHECKING:
    from elm_mlx_convert.lora_files import LoraWeights

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
KINDS = ("lora", "dora", "full")

EMBEDDING = "transformer.token_embeddings"
# What the files call the embedding when its adapter is not seen by a tied head. mlx-lm's tied head always sees it
# and would compute something else; it knows no such module, so it refuses the file.
INPUT_EMBEDDING = "transformer.input_embeddings"

Rank = int | Sequence[int] | Mapping[str, int]


@dataclass(frozen=True)
class Adapter:
    """An adapter: the modules that it changes, their ranks and its scale.

    Args:
        kind: "lora", "dora", or "full": weights that replace the model's own.
        ranks: by the canonical name of the module, in the model's order; empty for "full".
        scale: what the product of the two matrices is multiplied by; alpha / rank in the literature. One for all.
        dropout: of the input of the adapters, in training.
        adapted_head: whether a tied head reads the adapted embedding, as in mlx-lm. CoreNet's and PEFT's read the
            base's.
        model_sha256: `fingerprint` of the model that it was made for, where known.
        directory: where it was read from.
    """

    kind: str
    ranks: Mapping[str, int] = field(default_factory=dict)
    scale: float = 1.0
    dropout: float = 0.0
    adapted_head: bool = False
    model_sha256: str | None = None
    directory: Path | None = None

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values(), default=0)

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Returns the adapter's own parameters: name in the model -> shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module, rank in self.ranks.items():
            rows, columns = config.shapes()[f"{module}.weight"]
            if module == EMBEDDING:
                shapes |= {f"{module}.lora_a": (rows, rank), f"{module}.lora_b": (rank, columns)}
            else:
                shapes |= {f"{module}.lora_a": (columns, rank), f"{module}.lora_b": (rank, rows)}
            if self.kind == "dora":
                shapes[f"{module}.m"] = (rows,)
        return shapes

    def file_name(self, name: str, config: Config) -> str:
        """Returns the name of the module or parameter `name` in the directory."""
        if name.startswith(EMBEDDING) and config.share_input_output_layers and not self.adapted_head:
            return INPUT_EMBEDDING + name.removeprefix(EMBEDDING)
        return name

    def unties(self, config: Config) -> bool:
        """Returns whether merging it needs a head of its own: the base embedding, beside the adapted one."""
        return EMBEDDING in self.ranks and config.share_input_output_layers and not self.adapted_head

    def describe(self) -> str:
        """Returns one line for a person."""
        if self.kind == "full":
            return "weights of the whole model"
        low, high = min(self.ranks.values()), self.rank
        ranks = f"{low}" if low == high else f"{low} to {high}"
        name = {"lora": "LoRA", "dora": "DoRA"}[self.kind]
        return f"{name} of rank {ranks}, scale {self.scale:g}, on {counted(len(self.ranks), 'module')}"


def plan(
    config: Config,
    *,
    rank: Rank = 8,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    num_layers: int = -1,
    dropout: float = 0.0,
    dora: bool = False,
    rslora: bool = False,
    adapted_head: bool = False,
) -> Adapter:
    """Returns an adapter for `config`'s model.

    Args:
        rank: one number; one for each layer of the model (an embedding and a head get the largest); or numbers by
            pattern as in `targets`, or by a layer's number, the last that fits counts.
        alpha: the strength: `scale` is alpha / rank, of the largest rank where they differ; None for twice that.
        targets: modules by name or pattern, with or without what stands in front: `qkv_proj`, `ffn.*`,
            `layers.3.*`, `token_embeddings`, `lm_head`; None for all linears of the layers.
        num_layers: adapt the last so many layers alone; -1: all. Says nothing of the embedding and the head.
        rslora: alpha / sqrt(rank) instead.
        adapted_head: see `Adapter`.

    Raises:
        InputError: a target that names nothing, a rank for nothing or none for something, a number out of range.
    """
    if not (-1 <= num_layers <= config.num_layers):
        raise InputError(
            f"num_layers is {num_layers}, and the model has {counted(config.num_layers, 'layer')} (-1 means all)"
        )
    for name, value, most in (("alpha", alpha or 0.0, 1e6), ("dropout", dropout, 1 - 1e-9)):
        if not 0 <= value <= most:
            raise InputError(
                f"{name} is {value}: a number from 0 to {'below 1' if most < 1 else f'{most:g}'} is needed"
            )
    first = 0 if num_layers == -1 else config.num_layers - num_layers
    chosen = _choose(config, config.linears if targets is None else targets, first)
    ranks = {module: _rank_of(module, rank, config) for module in chosen}
    largest = max(ranks.values())
    alpha = 2.0 * largest if alpha is None else alpha
    scale = alpha / (math.sqrt(largest) if rslora else largest)
    return Adapter("dora" if dora else "lora", ranks, scale, dropout, adapted_head)


def read(directory: str | Path, config: Config, model: Path | None = None) -> Adapter:
    """Reads an adapter's directory, of mlx-lm's layout or of PEFT's, but for the values of its arrays.

    Every tensor's name and shape is checked against `config`'s model.

    Args:
        model: the model's directory; an adapter that says that it was made for other weights is refused.

    Raises:
        InputError: names the file, and the tensor and both shapes, where something is missing or does not fit; or the
            adapter is of a kind that cannot be expressed here.
    """
    path = reading.expanded(directory)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; an adapter is one with {CONFIG} and {WEIGHTS}")
    if not (path / CONFIG).exists():
        if (path / PREDICTION).is_file():
            raise InputError(f"{path}: is a KV Prediction, not an adapter: give it as --kvp")
        raise InputError(
            f"{path}: holds no {CONFIG}, so it is not an adapter; `elm-mlx lora --out DIR` writes one to DIR"
        )
    if _is_peft(path):
        import elm_mlx_convert

        return of_weights(elm_mlx_convert.read_peft(path, config), path)
    adapter = _read_config(path, config)
    _check_tensors(path / WEIGHTS, adapter, config)
    known = adapter.model_sha256
    if model is not None and known is not None and known != fingerprint(model, known):
        raise InputError(
            f"{path}: was made for a model with other weights; to use it here all the same, "
            f"take model_sha256 out of its {CONFIG}"
        )
    return adapter


def of_weights(found: LoraWeights, directory: Path | None = None) -> Adapter:
    """Returns the adapter that `elm_mlx_convert` has read from another tool's files."""
    return Adapter("dora" if found.dora else "lora", found.ranks, found.scale, found.dropout, directory=directory)


def weights_file(directory: Path) -> Path:
    """Returns the file of an adapter's arrays, in either layout; where PEFT's is missing, the first of its names."""
    names = PEFT_WEIGHTS if _is_peft(directory) else (WEIGHTS,)
    return next((directory / name for name in names if (directory / name).is_file()), directory / names[0])


def attach(model: Model, adapter: Adapter, seed: int = 0) -> None:
    """Puts a new adapter into `model`, which then computes what it did before, and freezes all but the adapter.

    `seed` draws it: the same one, the same adapter.
    """
    modules = dict(model.named_modules())
    keys = mx.random.split(mx.random.key(seed), max(1, len(adapter.ranks)))
    wrapped = [
        (
            name,
            lora_layers.wrap(
                modules[name], rank, adapter.scale, adapter.dropout, key,
                dora=adapter.kind == "dora", adapted_head=adapter.adapted_head,
            ),
        )
        for (name, rank), key in zip(adapter.ranks.items(), keys, strict=False)
    ]  # fmt: skip
    model.update_modules(tree_unflatten(wrapped))
    model.train(model.training)
    train_adapter(model)


def train_adapter(model: Model) -> None:
    """Freezes all of `model` but the parameters of its adapter."""
    model.freeze()
    for module in _adapted(model).values():
        module.unfreeze(recurse=False, keys=lora_layers.PARAMETERS)


def load(model: Model, adapter: Adapter) -> None:
    """Puts an adapter that `read` has read into `model`, with its values.

    Everything is frozen, and what does not change is computed; `train_adapter` and `model.train()` go on training.

    Raises:
        InputError: the file holds NaN or infinite values, or is damaged.
    """
    assert adapter.directory is not None
    values = read_values(adapter, model.config)
    if adapter.kind == "full":
        _replace(model, values)
        stored_layers.read_replaced(model)
    else:
        attach(model, adapter)
        model.load_weights(list(values.items()), strict=False)
    model.eval()
    model.freeze()
    for module in _adapted(model).values():
        if hasattr(module, "settle"):
            module.settle()


def save(directory: Path, model: Model, adapter: Adapter, template: str | None = None) -> None:
    """Writes the adapter that is in `model`; for "full", what is trainable in it.

    Args:
        template: that of the conversations it was trained on, a name or a file, where it is not the model's own.

    Raises:
        ElmError: it cannot be written.
    """
    values = dict(tree_flatten(model.trainable_parameters() if adapter.kind == "full" else model.parameters()))
    if adapter.kind != "full":
        values = {name: values[name] for name in adapter.shapes(model.config)}
    write(directory, adapter, values, model.config)
    if template is not None:
        chat_template.record(directory, chat_template.read_source(template))


def write(directory: Path, adapter: Adapter, values: Mapping[str, mx.array], config: Config) -> None:
    """Writes mlx-lm's directory of an adapter, which is made if need be; each of the two files atomically.

    Ranks that differ are filled up with zeros to the largest, which changes nothing and is all that mlx-lm can read.

    Args:
        values: the adapter's arrays by their names in the model.

    Raises:
        ElmError: it cannot be written.
    """
    if adapter.kind != "full":
        values = {adapter.file_name(name, config): _filled(name, v, adapter.rank) for name, v in values.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ElmError(f"{directory}: cannot be made: {error.strerror}") from None
    with files.new_file(directory / WEIGHTS) as file:
        write_arrays(file, values)
    files.write_json(directory / CONFIG, _config_values(adapter, config))


def read_values(adapter: Adapter, config: Config) -> dict[str, mx.array]:
    """Reads the adapter's arrays: by their names in the model, at their own ranks, float32 but for "full".

    Raises:
        InputError: the file holds NaN or infinite values, or is damaged.
    """
    assert adapter.directory is not None
    path = weights_file(adapter.directory)
    if path.name in PEFT_WEIGHTS:
        import elm_mlx_convert

        arrays = elm_mlx_convert.read_peft(adapter.directory, config).arrays
        values = {name: mx.array(array) for name, array in arrays.items()}
    else:
        try:
            values = dict(mx.load(str(path)))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: MLX cannot load it: {error}") from None
        if adapter.kind != "full":
            values = {
                name: _cut(path, name, values[adapter.file_name(name, config)].astype(mx.float32), shape)
                for name, shape in adapter.shapes(config).items()
            }
    for name, value in values.items():
        if not mx.isfinite(value).all().item():
            raise InputError(f"{path}: tensor {name} holds NaN or infinite values")
    return values


def _matches(module: str, pattern: str) -> bool:
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def _choose(config: Config, targets: Sequence[str], first: int) -> list[str]:
    modules = config.modules()
    for target in targets:
        if not any(_matches(module, target) for module in modules):
            tied = " (this model's head is its embedding)" if "lm_head" in target else ""
            known = ", ".join(dict.fromkeys(module.split(".")[-1] for module in modules))
            raise InputError(f"no module is called {target!r}{tied}; there are {known}")
    chosen = [module for module in modules if any(_matches(module, target) for target in targets)]
    chosen = [module for module in chosen if (layer := layer_of(module)) is None or layer >= first]
    if not chosen:
        raise InputError("nothing is left to adapt: give targets, and num_layers above 0")
    return chosen


def _rank_of(module: str, rank: Rank, config: Config) -> int:
    layer = layer_of(module)
    found: object = None
    if isinstance(rank, int):
        found = rank
    elif isinstance(rank, Mapping):
        for pattern, value in rank.items():
            if str(pattern) == str(layer) or _matches(module, str(pattern)):
                found = value
        if found is None:
            raise InputError(f"rank does not cover {module}: a pattern '*' matches what no other does")
    elif len(rank) != config.num_layers:
        raise InputError(f"rank has {counted(len(rank), 'entry')}, and the model {counted(config.num_layers, 'layer')}")
    else:
        found = max(rank) if layer is None else rank[layer]
    if type(found) is not int or not 0 < found <= config.vocab_size:
        raise InputError(f"the rank of {module} is {found!r}: a whole number from 1 to {config.vocab_size:,} is needed")
    return found


def _is_peft(directory: Path) -> bool:
    try:
        return "peft_type" in json_object(directory / CONFIG)
    except InputError:
        return False


def _check_tensors(file: Path, adapter: Adapter, config: Config) -> None:
    entries = {entry.name: entry for entry in read_header(file)}
    for name, entry in entries.items():
        if entry.dtype not in ("F32", "F16", "BF16"):
            raise InputError(f"{file}: tensor {name} is {entry.dtype}, which is not a type of weights")
    if adapter.kind == "full":
        expected = {name: shape for name, shape in config.shapes().items() if name in entries}
    else:  # in the file all have the largest rank, filled up with zeros
        full = replace(adapter, ranks=dict.fromkeys(adapter.ranks, adapter.rank))
        expected = {adapter.file_name(name, config): shape for name, shape in full.shapes(config).items()}
    for name, shape in expected.items():
        if name not in entries:
            raise InputError(f"{file}: tensor {name} is missing, which {CONFIG} implies")
        if entries[name].shape != shape:
            raise InputError(f"{file}: tensor {name} is {entries[name].shape}, and the model needs {shape}")
    extra = next((name for name in entries if name not in expected), None)
    if extra is not None:
        raise InputError(f"{file}: tensor {extra} has no place in this model under {CONFIG}")
    if not entries:
        raise InputError(f"{file}: holds no tensors")


def _read_config(path: Path, config: Config) -> Adapter:
    where, values = path / CONFIG, json_object(path / CONFIG)
    keys = Keys(str(where), values)
    kind = keys.word("fine_tune_type", KINDS, "lora")
    sha256 = values.get("model_sha256")
    sha256 = sha256 if isinstance(sha256, str) else None
    if kind == "full":
        return Adapter(kind, model_sha256=sha256, directory=path)
    parameters = keys.within("lora_parameters")
    rank, scale = parameters.size("rank", most=config.vocab_size), parameters.number("scale", low=-1e12)
    dropout = parameters.get("dropout") if parameters.says("dropout") else 0.0
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise InputError(f"{parameters.where}: dropout is {short(dropout)}: a number from 0 to below 1 is needed")
    named = _modules(where, parameters.get("keys"), values.get("num_layers"), config)
    ranks = _ranks(where, values.get("ranks"), named, rank)
    modules = {EMBEDDING if key == INPUT_EMBEDDING else key: rank for key, rank in ranks.items()}
    modules = {module: modules[module] for module in config.modules() if module in modules}
    return Adapter(kind, modules, scale, float(dropout), EMBEDDING in named, sha256, path)


def _modules(where: Path, keys: object, num_layers: object, config: Config) -> list[str]:
    """Returns the modules that mlx-lm's `keys` and `num_layers` mean: in the last layers, or by their full names."""
    if num_layers is not None and type(num_layers) is not int:
        raise InputError(f"{where}: num_layers is {short(num_layers)}: a whole number is needed")
    if keys is not None and (not isinstance(keys, list) or not all(isinstance(key, str) for key in keys)):
        raise InputError(f"{where}: keys is {short(keys)}: a list of names is needed")
    count = num_layers if num_layers and num_layers > 0 else config.num_layers
    layers = range(config.num_layers)[-count:]
    known = {*config.modules(), *([INPUT_EMBEDDING] if config.share_input_output_layers else [])}
    found: dict[str, None] = {}
    for key in config.linears if keys is None else keys:
        named = [f"{config.layers_prefix}.{layer}.{key}" for layer in layers] if key in config.linears else [key]
        if named[0] == config.embedding and named[0] not in known:
            raise InputError(f"{where}: adapts the embedding, which only an OpenELM supports")
        if named[0] not in known:
            hint = ": its head is untied, as after fusing" if key == INPUT_EMBEDDING else ""
            raise InputError(f"{where}: keys names {short(key)}, and this model has no such module{hint}")
        found |= dict.fromkeys(named)
    if not found or {EMBEDDING, INPUT_EMBEDDING} <= found.keys():
        raise InputError(f"{where}: keys names {'the embedding twice' if found else 'no module'}")
    return list(found)


def _ranks(where: Path, ranks: object, keys: Sequence[str], most: int) -> dict[str, int]:
    if ranks is None:
        return dict.fromkeys(keys, most)
    if not isinstance(ranks, Mapping) or set(ranks) != set(keys):
        raise InputError(f"{where}: ranks and keys do not name the same modules")
    for module, rank in ranks.items():
        if type(rank) is not int or not 0 < rank <= most:
            raise InputError(f"{where}: the rank of {module} is {short(rank)}: one from 1 to {most} is needed")
    if max(ranks.values()) != most:
        raise InputError(f"{where}: rank is {most}, and the largest of ranks {max(ranks.values())}")
    return dict(ranks)


def _replace(model: Model, values: Mapping[str, mx.array]) -> None:
    own = dict(tree_flatten(model.parameters()))
    for name, value in values.items():
        if own[name].shape != value.shape:  # packed: `read` knows the model's shapes, not its packing
            raise InputError(
                f"tensor {name} of the adapter is {value.shape}, and the model's, quantized, {own[name].shape}"
            )
    model.load_weights([(name, value.astype(own[name].dtype)) for name, value in values.items()], strict=False)


def _config_values(adapter: Adapter, config: Config) -> dict[str, Any]:
    """The keys of `adapter_config.json` that this package and mlx-lm read."""
    values: dict[str, Any] = {"fine_tune_type": adapter.kind, "num_layers": -1}
    if adapter.kind != "full":
        keys = [adapter.file_name(module, config) for module in adapter.ranks]
        values["lora_parameters"] = {
            "rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": keys,
        }  # fmt: skip
        if len(set(adapter.ranks.values())) > 1:
            values["ranks"] = {adapter.file_name(module, config): rank for module, rank in adapter.ranks.items()}
    if adapter.model_sha256 is not None:
        values["model_sha256"] = adapter.model_sha256
    return values


def _filled(name: str, value: mx.array, rank: int) -> mx.array:
    if name.endswith(".lora_a"):
        return mx.pad(value, [(0, 0), (0, rank - value.shape[1])])
    if name.endswith(".lora_b"):
        return mx.pad(value, [(0, rank - value.shape[0]), (0, 0)])
    return value


def _cut(path: Path, name: str, value: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Cuts off the zeros that filled `value` up; anything else there is an error."""
    kept = value[tuple(slice(size) for size in shape)]
    if kept.shape != value.shape and mx.abs(value).sum().item() != mx.abs(kept).sum().item():
        raise InputError(f"{path}: tensor {name} is not 0 past the rank that {CONFIG} says: {shape}")
    return kept


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if "lora_a" in module}
