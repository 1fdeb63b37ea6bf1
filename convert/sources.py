"""Opens a checkpoint: what a path or name is, and its tensors, still on disk, by the names that it gives them.

Reads CoreNet's `.pt` (a state dict, or a training checkpoint around one), Hugging Face directories and hub
repositories (safetensors, `.bin`, sharded by an index), and MLX directories. The hub's cache, token, endpoint and
`HF_HUB_OFFLINE` are huggingface_hub's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from elm_mlx import hub
from elm_mlx.directories import PREDICTION, TEMPLATES, not_a_model
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.families import check_is_openelm
from elm_mlx.reading import expanded, json_object, listed
from elm_mlx_convert import torch_files
from elm_mlx_convert.tensors import LazyTensor, read_safetensors

# Where training loops keep the model's state dict; CoreNet's is the first.
_STATES = ("model_state_dict", "state_dict", "model")
_EMA = "ema_state_dict"

Tensors = dict[str, LazyTensor]

_NEEDED = ["*.safetensors", "*.safetensors.index.json"]
_OLDER = ["*.bin", "*.bin.index.json"]
_WELCOME = [
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json", *(f"{folder}/*.jinja" for folder in TEMPLATES),
]  # fmt: skip


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint that has been opened.

    Args:
        label: what it is called in messages and in the record: a file's or directory's name, a repository.
        kind: what it turned out to be, in words.
        directory: where a config or a tokenizer may lie beside the tensors.
        files: the ones that hold the tensors.
        tensors: by the file's own names.
        revision: the commit, for a repository on the hub.
    """

    label: str
    kind: str
    directory: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, LazyTensor]
    revision: str | None = None


def open_source(source: str | Path, *, revision: str | None = None, ema: bool = False) -> CheckpointSource:
    """Opens a checkpoint: a file, a directory, or the name of a hub repository, `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Args:
        revision: of a repository: a branch, tag or commit.
        ema: take the moving average that a training checkpoint holds, not the model itself.

    Raises:
        InputError: there is no such thing, or it is damaged or hostile: says what and where.
        ElmError: the hub cannot be reached.
    """
    if not str(source):  # an unset variable of a shell, say, which would be the current directory
        raise InputError("no source was named: SRC is empty")
    path = expanded(source)
    repository = named_repository(source)
    if repository is not None:
        repository = replace(repository, revision=repository.revision or revision)
        name, found = repository.name, contents(repository)
        check_is_openelm(fetch(repository, found, ["config.json"]), name)  # before all of it is downloaded
        weights = _NEEDED if _matching(found, ["*.safetensors"]) else _OLDER
        directory = fetch(repository, found, [*weights, *_WELCOME])
        return replace(_open_directory(directory, ema), label=name, directory=directory, revision=directory.name)
    if revision is not None:
        raise InputError(f"--revision {revision} is for a repository on the hub, but {path} is a path")
    if not path.exists():
        raise InputError(f"{path}: no such file or directory, and not the name of a repository")
    if path.is_dir() or path.suffix == ".safetensors":
        check_is_openelm(path if path.is_dir() else path.parent)
    return _open_directory(path, ema) if path.is_dir() else _open_file(path, ema)


def _open_file(path: Path, ema: bool) -> CheckpointSource:
    if path.suffix == ".safetensors":
        _refuse_ema(path, ema)
        tensors = read_safetensors(path)
        if not tensors:
            raise InputError(f"{path}: holds no tensors")
        return CheckpointSource(path.name, "safetensors file", path.parent, (path,), tensors)
    if is_gguf(path):
        raise InputError(f"{path}: is a GGUF file: `elm-mlx convert {path} DIR` makes a model directory of it first")
    kind, tensors = _state_dict(path, ema)
    return CheckpointSource(path.name, kind, path.parent, (path,), tensors)


def is_gguf(path: Path) -> bool:
    """Returns whether a file begins as GGUF does, or is called so."""
    named = path.suffix.lower() == ".gguf"
    if named or not path.is_file():  # of a pipe nothing would come
        return named
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:  # which whoever reads it says
        return False


def _open_directory(directory: Path, ema: bool) -> CheckpointSource:
    label = directory.resolve().name
    for index, reader, kind in (
        ("model.safetensors.index.json", read_safetensors, "safetensors in shards"),
        ("pytorch_model.bin.index.json", lambda path: _state_dict(path, False)[1], "PyTorch files in shards"),
    ):
        if (directory / index).is_file() and not (directory / "model.safetensors").is_file():
            _refuse_ema(directory, ema)
            files, tensors = _read_shards(directory / index, reader)
            return CheckpointSource(label, kind, directory, files, tensors)
    for name in ("model.safetensors", "weights.safetensors", "pytorch_model.bin"):  # the second is of Apple's MLX code
        if (directory / name).is_file():
            return replace(_open_file(directory / name, ema), label=label)
    checkpoints = sorted(directory.glob("*.pt"))
    if len(checkpoints) == 1:
        return _open_file(checkpoints[0], ema)
    if checkpoints:
        raise InputError(f"{directory}: holds {listed([c.name for c in checkpoints])}: name the one to convert")
    if (directory / PREDICTION).is_file():
        raise not_a_model(directory)
    raise InputError(f"{directory}: holds no model.safetensors, no pytorch_model.bin and no .pt file")


def _refuse_ema(path: Path, ema: bool) -> None:
    if ema:
        raise InputError(f"{path}: --ema is for a training checkpoint, which this is not")


def _state_dict(path: Path, ema: bool) -> tuple[str, Tensors]:
    """Returns in words what a PyTorch file is, and the state dict in it."""
    tree = torch_files.load(path)
    if not isinstance(tree, dict):
        what = tree.name if isinstance(tree, torch_files.Symbol) else type(tree).__name__
        raise InputError(f"{path}: holds a {what}, not a state dict: save model.state_dict()")
    kind = "PyTorch state dict"
    wanted = (_EMA,) if ema else _STATES
    key = next((key for key in wanted if isinstance(tree.get(key), dict)), None)
    if key is not None:
        kind = f"PyTorch training checkpoint, its {key}"
        if not ema and isinstance(tree.get(_EMA), dict):
            kind += " (--ema takes its ema_state_dict)"
        tree = tree[key]
    elif ema:
        raise InputError(f"{path}: has no {_EMA}, which --ema asks for; it holds {_keys(tree)}")
    tensors = {}
    for name, value in tree.items():
        if isinstance(value, LazyTensor) and isinstance(name, str):
            tensors[name] = value.renamed(name)
        elif isinstance(value, (LazyTensor, dict, list, tuple)):
            raise InputError(f"{path}: holds no state dict of named tensors, but {_keys(tree)}")
    if not tensors:
        raise InputError(f"{path}: holds no tensors, but {_keys(tree)}")
    return kind, tensors


def _keys(tree: dict[Any, Any]) -> str:
    return listed([str(key) for key in tree], most=5) if tree else "nothing"


def _read_shards(index: Path, reader: Callable[[Path], Tensors]) -> tuple[tuple[Path, ...], Tensors]:
    """Returns the files that an index names, and their tensors, each found in the file where the index puts it."""
    weight_map = json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map")
    files = []
    for name in sorted({name if isinstance(name, str) else repr(name) for name in weight_map.values()}):
        if name != Path(name).name or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise InputError(f"{index}: points to {name!r}: a file in the same directory is needed")
        files.append(index.parent / name)
        if not files[-1].is_file():
            raise InputError(f"{index}: names {name}, which is not there: was the download completed?")
    tensors: Tensors = {}
    for file in files:
        for name, tensor in reader(file).items():
            if weight_map.get(name) != file.name:
                raise InputError(f"{file}: holds {name!r}, which {index.name} does not put there")
            tensors[name] = tensor
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise InputError(f"{index}: names tensors that its files do not hold: {listed(missing)}")
    return tuple(files), tensors


def named_repository(source: str | Path) -> hub.Repository | None:
    """Returns the repository that `source` names; None where it is a path, or such a path is there."""
    return hub.repository(source) if isinstance(source, str) and not expanded(source).exists() else None


def contents(repository: hub.Repository) -> hub.Contents:
    """Asks for a repository's files, as `hub.contents`; where the hub cannot be reached, the cache."""
    try:
        return hub.contents(repository)
    except InputError:
        raise
    except ElmError:
        cached = hub.snapshot(repository)
        if cached is None:
            raise
        return hub.cached_contents(cached)


def fetch(repository: hub.Repository, found: hub.Contents, patterns: Iterable[str]) -> Path:
    """Brings the files that match into the hub's cache. Returns the snapshot's directory; raises as `hub.download`."""
    return hub.download(repository, found, _matching(found, patterns))


def _matching(found: hub.Contents, patterns: Iterable[str]) -> list[str]:
    """Returns the files that match a pattern, in its folder."""
    return [
        name
        for name in found.sizes
        if any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
    ]
