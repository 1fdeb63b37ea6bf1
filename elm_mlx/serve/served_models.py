"""The models of a server: directories and adapters that were named when it started, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.inference.grammar import GrammarCompiler
from elm_mlx.inference.sampling import saved_settings
from elm_mlx.model.config import read_config
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.serve.tool_calls import ToolCaller
from elm_mlx.store import adapters, kvp_directory
from elm_mlx.store.loading import Loaded, open_model
from elm_mlx.text.chat_template import Template, choose, prepare
from elm_mlx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A model by its name in requests.

    Attributes:
        template: None for a base model, which continues texts and has no chat.
        base: the name of the model that this one is an adapter of, or a KV prediction for; None of a model itself.
        settings: of sampling, as its directory has them.
        created: when the directory was written, seconds since 1970.
        grammars: what answers can be held to.
        tools: how this model calls functions.
        kvp: predicts what prompts leave in the caches; None where the model reads them.
    """

    name: str
    loaded: Loaded
    template: Template | None
    base: str | None
    settings: Mapping[str, float]
    created: int
    grammars: GrammarCompiler
    tools: ToolCaller
    kvp: KVPrediction | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.loaded.tokenizer is not None
        return self.loaded.tokenizer

    @property
    def context_length(self) -> int:
        return int(self.loaded.model.config.max_context_length)


def named(paths: Sequence[str]) -> dict[str, Path]:
    """Returns the directories of `DIR` and `NAME=DIR` by name. Raises InputError for a name that stands twice."""
    found: dict[str, Path] = {}
    for each in paths:
        name, equals, path = each.partition("=")
        if not equals or reading.expanded(each).exists():
            path = each
            name = reading.expanded(each).resolve().name
        if name in found:
            raise InputError(f"two models are called {name!r}: name one of them otherwise, as NAME=DIR")
        if not name or not path:
            raise InputError(f"{each!r}: DIR or NAME=DIR is needed")
        found[name] = Path(path)
    return found


def load_models(
    models: Sequence[str],
    adapters_: Sequence[str],
    compute_dtype: str | None,
    note: Callable[[str], None],
    kvps: Sequence[str] = (),
) -> dict[str, ServedModel]:
    """Loads models, adapters and KV predictions, whose requests share one copy of the weights that they are added to.

    Args:
        models: `DIR` or `NAME=DIR` each.
        adapters_, kvps: `NAME=DIR` each, or `NAME=DIR@MODEL` where there are several models.
        note: called with what a user should know of each.

    Raises:
        InputError: a directory cannot be loaded, has no tokenizer, or a name is missing or stands twice; a KV
            prediction is of another model.
    """
    directories = named(models)
    placed = {name: _placed(path, list(directories)) for name, path in named(adapters_).items()}
    predicted = {name: _placed(path, list(directories)) for name, path in named(kvps).items()}
    names = [*directories, *placed, *predicted]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"two of models, adapters and KV predictions are called {twice!r}: name one of them otherwise, as NAME=DIR"
        )
    served = {}
    for name, directory in directories.items():
        config = read_config(directory, with_tokenizer=True)
        prepare(directory)
        served[name] = _served(name, open_model(directory, compute_dtype, None, config), directory, None, None)
    for name, (adapter, base) in placed.items():
        prepare(directories[base], None, adapter)
        served[name] = _served(
            name, _adapted(served[base].loaded, adapter, directories[base]), directories[base], adapter, base
        )
    for name, (directory, base) in predicted.items():
        kvp, of = kvp_directory.load(directory, directories[base], served[base].loaded.model), served[base]
        created, loaded = int(directory.stat().st_mtime), replace(of.loaded, notes=(kvp.describe(),))
        served[name] = replace(of, name=name, base=base, created=created, loaded=loaded, kvp=kvp)
    for each in served.values():
        for remark in each.loaded.notes:
            note(f"{each.name}: {remark}")
    return served


def _placed(path: Path, models: Sequence[str]) -> tuple[Path, str]:
    """Returns the directory of an adapter or a KV prediction, and the name of its model."""
    text, at, base = str(path).rpartition("@")
    if at and base in models and not reading.expanded(path).exists():
        return reading.expanded(text), base
    if len(models) > 1:
        raise InputError(f"{path}: to which model does this belong? NAME=DIR@MODEL says it; {reading.listed(models)}")
    return reading.expanded(path), models[0]


def _served(name: str, loaded: Loaded, directory: Path, adapter: Path | None, base: str | None) -> ServedModel:
    assert loaded.tokenizer is not None
    directory = reading.expanded(directory)
    template = choose(directory, loaded.tokenizer, None, adapter)
    created = int((adapter or directory / "config.json").stat().st_mtime)
    grammars = GrammarCompiler(loaded.tokenizer, () if template is None else template.stop_ids)
    tools = ToolCaller(template, grammars)  # which renders the template: here, since it may take a second
    return ServedModel(name, loaded, template, base, saved_settings(directory), created, grammars, tools)


def _adapted(loaded: Loaded, directory: Path, model_directory: Path) -> Loaded:
    """Returns the model with an adapter beside it; `loaded` stays as it is, and its arrays are shared."""
    adapter = adapters.read(directory, loaded.model.config, reading.expanded(model_directory))
    arrays = {id(array): array for _, array in tree_flatten(loaded.model.parameters())}
    config = loaded.model.config
    model = copy.deepcopy(loaded.model, {**arrays, id(config): config})
    adapters.load(model, adapter)
    mx.eval(model.parameters())
    return replace(loaded, model=model, notes=(f"adapter {adapter.directory}: {adapter.describe()}",))
