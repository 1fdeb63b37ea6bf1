"""The directory that a MODEL means: itself, or a repository's in the hub's cache, downloaded or converted if need be.

Of a repository comes what is read here and no more: config, tokenizer, chat templates and one set of weights; never
code. What MLX opens is used where it lies. A checkpoint of an OpenELM as Apple published it, without a tokenizer, or in
PyTorch's files, is converted once, into a cache of our own, and so is a GGUF file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from elm_mlx import files, hub, reading
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.directories import CARRIED, TEMPLATES, nearest
from elm_mlx.errors import ElmError, InputError
from elm_mlx.hub import Contents, Repository
from elm_mlx.model.config import MODEL_TYPE, read_config
from elm_mlx.safetensors_file import INDEX, weight_files

_CONFIG = "config.json"
_TORCH, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Apple's repositories have no tokenizer; their model cards name this one's.
_LLAMA_2 = Repository("meta-llama/Llama-2-7b-hf")
_SENTENCEPIECE = "tokenizer.model"
_CARD = "README.md"  # whose licence goes with what `export` makes


def directory_of(
    model: str | Path, on_progress: OnProgress | None = None, on_note: Callable[[str], None] = lambda text: None
) -> Path:
    """Returns the model directory that `model` names: a path, or `OWNER/NAME[@REVISION][:FILE]` on the hub.

    FILE is a GGUF file of the repository, or a part of its name. A path that is there wins. A repository that the
    hub's cache holds is used as it is there, and the hub is not asked; else it is downloaded. What is neither is
    returned as it is: whoever reads its config says what is wrong.

    Args:
        on_progress: called with "download" or "write" and bytes. By default a terminal shows huggingface_hub's bar.
        on_note: called with lines that a user should know of: that something is downloaded, or converted.

    Raises:
        InputError: the hub has no such repository or revision, refuses it, or it holds no model that is read here.
        ElmError: the hub cannot be reached; the disk is full; another process downloads it.
    """
    path = reading.expanded(model)
    repository = hub.repository(str(model))
    if repository is None or path.exists():
        return path
    snapshot = hub.snapshot(repository)
    made = _converted(repository, snapshot)
    if made is not None:
        return made
    if repository.file is not None or snapshot is None or not is_whole(snapshot):
        found = _contents(repository, snapshot)
        if repository.file is not None or hub.has_gguf_alone(found.sizes):
            return _convert_gguf(repository, found, on_progress, on_note)
        snapshot = _downloaded(repository, found, on_progress, on_note)
    if opens(snapshot):
        return snapshot
    return _convert(repository, snapshot, on_progress, on_note)


def name_of(directory: Path) -> str:
    """Returns what a model directory is called: its own name, or `OWNER/NAME` of one that comes from the hub."""
    directory = Path(os.path.abspath(reading.expanded(directory)))  # noqa: PTH100 (links of a cache stay)
    owner = hub.owner_of(directory)
    if owner is not None:
        return owner.name
    if directory.parent.parent == conversions():
        return directory.parent.name.replace("--", "/", 1)
    return directory.name


def conversions() -> Path:
    """Returns the directory of what was converted: in `XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "elm-mlx", "models")


def is_whole(snapshot: Path) -> bool:
    """Returns whether a snapshot has config, all weights and, but for an OpenELM's, a tokenizer.

    Small files are downloaded before weights, so that those are there that the repository has.
    """
    try:
        if not (snapshot / _CONFIG).exists():
            return False
        openelm = _is_openelm(snapshot)
        if openelm and _torch_files(snapshot):
            return True
        weight_files(snapshot)
    except InputError:
        return False
    return openelm or any((snapshot / name).exists() for name in ("tokenizer.json", _SENTENCEPIECE))


def _torch_files(snapshot: Path) -> bool:
    """Returns whether all of a snapshot's weights are there in PyTorch's files."""
    if (snapshot / _TORCH_INDEX).exists():
        return all((snapshot / name).exists() for name in _named(snapshot / _TORCH_INDEX))
    return (snapshot / _TORCH).exists()


def _is_openelm(snapshot: Path) -> bool:
    return reading.json_object(snapshot / _CONFIG).get("model_type", MODEL_TYPE) == MODEL_TYPE


def opens(snapshot: Path) -> bool:
    """Returns whether the snapshot is a model directory as it is; of an OpenELM only with a tokenizer."""
    if not _is_openelm(snapshot):
        return True  # or what hinders it is said by whoever opens it
    from elm_mlx.store.describe import describe

    try:
        describe(snapshot)
    except InputError:
        return False
    return (snapshot / _SENTENCEPIECE).exists()


def _downloaded(
    repository: Repository, found: Contents, on_progress: OnProgress | None, on_note: Callable[[str], None]
) -> Path:
    """Downloads what is needed of a repository: the config, which is checked, then small files, then weights."""
    if _CONFIG not in found.sizes:
        raise InputError(f"{repository}: {_no_model(repository, found.sizes)}")
    snapshot = hub.download(repository, found, [_CONFIG], on_progress=no_progress)
    if not _is_openelm(snapshot):
        read_config(snapshot)  # before its weights come
    small = [name for name in (INDEX, _TORCH_INDEX) if name in found.sizes]
    small += [name for name in found.sizes if name in (*CARRIED, _CARD) or _is_template(name)]
    snapshot = hub.download(repository, found, small, on_progress=no_progress)
    weights = _weights(repository, snapshot, found)
    total = sum(found.sizes[name] for name in weights if not (snapshot / name).exists())
    if total:
        on_note(_TO_COME.format(repository, reading.byte_size(total)))
    return hub.download(repository, found, weights, on_progress=on_progress)


_TO_COME = "{}: {} are downloaded into the hub's cache"


def _contents(repository: Repository, before: Path | None) -> Contents:
    """Returns what the repository holds: a GGUF file that is in the cache is found there."""
    if before is not None and (repository.file is not None or hub.offline()):
        cached = hub.cached_contents(before)
        with suppress(InputError):
            hub.gguf_file(repository, cached.sizes)
            return cached
    try:
        if hub.offline():
            part = "only a part of it is" if before is not None else "it is not"
            raise ElmError(
                f"{repository}: no such directory, {part} in the hub's cache, and HF_HUB_OFFLINE keeps it from being "
                "downloaded"
            )
        return hub.contents(repository)
    except ElmError as error:
        near = nearest(Path(repository.name))
        if near is None:
            raise
        raise type(error)(f"{error}; did you mean the directory {near}?") from None


def _is_template(name: str) -> bool:
    return any(fnmatchcase(name, f"{folder}/*.jinja") for folder in TEMPLATES)


def _weights(repository: Repository, snapshot: Path, found: Contents) -> list[str]:
    """Chooses one set of weights: repositories hold the same ones in several layouts.

    Raises:
        InputError: there is none that is read here.
    """
    names: set[str] = set()
    if (snapshot / INDEX).exists():
        names = _named(snapshot / INDEX)
    elif "model.safetensors" in found.sizes:
        names = {"model.safetensors"}
    else:
        names = {name for name in found.sizes if fnmatchcase(name, "model*.safetensors") and "/" not in name}
    if not names and _is_openelm(snapshot):
        if (snapshot / _TORCH_INDEX).exists():
            names = _named(snapshot / _TORCH_INDEX)
        elif _TORCH in found.sizes:
            names = {_TORCH}
    absent = sorted(names - found.sizes.keys())
    if absent:
        raise InputError(f"{repository}: its index names {absent[0]}, which the repository does not hold")
    if not names:
        raise InputError(f"{repository}: {_no_model(repository, found.sizes)}")
    return sorted(names)


def _named(index: Path) -> set[str]:
    """Returns the names of files in an index of weights, all of them in its own directory."""
    weight_map = reading.json_object(index).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or any(name != Path(name).name for name in names):
        raise InputError(f"{index}: holds no weight_map of names of files")
    return names


def _no_model(repository: Repository, sizes: Mapping[str, int]) -> str:
    """Says what a repository without weights that are read here holds, and what can be done with that."""
    if "adapter_config.json" in sizes:
        return (
            f"an adapter, not a model: `hf download {repository.name} --local-dir DIR`, then MODEL with --adapter DIR"
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in sizes):
        return "holds weights in PyTorch's files alone, which are read of an OpenELM only; safetensors are needed"
    return f"holds no model in safetensors; it holds {reading.listed(sorted(sizes)) or 'nothing'}"


def _place(name: str, commit: str, file: str | None = None) -> Path:
    """Returns the directory of a conversion, which bears the name of the file that was named."""
    last = commit if file is None else f"{commit}--{file.replace('/', '--')}"
    return conversions() / name.replace("/", "--") / last


def commit_and_file(made: Path) -> tuple[str, str]:
    """Returns what a conversion was made of: a commit, and the file of it that was named, if one was."""
    commit, _, file = made.name.partition("--")
    return commit, file


def _converted(repository: Repository, snapshot: Path | None) -> Path | None:
    """Returns what was converted of the revision; where the hub's cache has none of it, the last that was."""
    wanted = snapshot.name if snapshot is not None else repository.revision
    made = sorted(_place(repository.name, "").glob("*"), key=lambda each: each.stat().st_mtime, reverse=True)
    for each in made:
        commit, file = commit_and_file(each)
        meant = repository.means(file) if repository.file is not None and file else repository.file == (file or None)
        if wanted in (None, commit) and meant and (each / _CONFIG).exists():
            return each
    return None


def _convert(
    repository: Repository, snapshot: Path, on_progress: OnProgress | None, on_note: Callable[[str], None]
) -> Path:
    """Converts a snapshot, with Llama 2's tokenizer where it has none, into the cache of conversions."""
    import elm_mlx_convert
    from elm_mlx_convert.sources import open_source

    own = (snapshot / _SENTENCEPIECE).exists()
    if not own and (snapshot / "tokenizer.json").exists():
        raise InputError(
            f"{repository}: has a tokenizer.json of its own and no {_SENTENCEPIECE}, which an OpenELM's tokenizer is "
            f"read from; `elm-mlx convert {repository} DST --tokenizer FILE` takes the one that you name"
        )
    made = _place(repository.name, snapshot.name)
    made.parent.mkdir(parents=True, exist_ok=True)
    with files.hold(made, beside=True):
        if (made / _CONFIG).exists():
            return made
        tokenizer = None if own else _llama_tokenizer(repository)
        source = replace(open_source(snapshot), label=repository.name, revision=snapshot.name)
        on_note(f"{repository}: is converted, once, into {made}" + ("" if own else ", with Llama 2's tokenizer"))
        done = elm_mlx_convert.convert(source, made, tokenizer=tokenizer, on_progress=on_progress or no_progress)
        for warning in done.warnings:
            on_note(f"{repository}: {warning}")
    return made


def _convert_gguf(
    repository: Repository, found: Contents, on_progress: OnProgress | None, on_note: Callable[[str], None]
) -> Path:
    """Downloads a GGUF file, and converts it into the cache of conversions."""
    import elm_mlx_convert

    file = hub.gguf_file(repository, found.sizes)
    made = _place(repository.name, found.commit, repository.file and file)
    made.parent.mkdir(parents=True, exist_ok=True)
    with files.hold(made, beside=True):
        if (made / _CONFIG).exists():
            return made
        if not (repository.folder / "snapshots" / found.commit / file).exists():
            on_note(_TO_COME.format(repository, reading.byte_size(found.sizes[file])))
        path = hub.download(repository, found, [file], on_progress=on_progress) / file
        on_note(f"{repository}: {file} is converted, once, into {made}")
        elm_mlx_convert.convert(path, made, on_progress=on_progress or no_progress)
    return made


def _llama_tokenizer(repository: Repository) -> Path:
    """Returns Llama 2's SentencePiece model, downloaded where the hub's cache has none. Raises InputError."""
    try:
        cached = hub.snapshot(_LLAMA_2)
        if cached is not None and (cached / _SENTENCEPIECE).exists():
            return cached / _SENTENCEPIECE
        if hub.offline():
            raise ElmError("it is not in the hub's cache, and HF_HUB_OFFLINE is set")
        return hub.download(_LLAMA_2, hub.contents(_LLAMA_2), [_SENTENCEPIECE]) / _SENTENCEPIECE
    except ElmError as error:
        raise InputError(
            f"{repository}: has no tokenizer of its own, and Llama 2's, which it was trained with, cannot be had "
            f"({error}); `elm-mlx convert {repository.name} DST --tokenizer FILE` takes one that you have"
        ) from None
