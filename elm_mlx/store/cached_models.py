"""The models in the hub's cache and in the cache of conversions: what each is, its size, its last use; and removal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elm_mlx import hub
from elm_mlx.errors import ElmError, InputError
from elm_mlx.store import model_names
from elm_mlx.store.describe import describe

SHOWN = 8  # digits of a commit


@dataclass(frozen=True)
class CachedModel:
    """A commit of a repository in a cache.

    Attributes:
        name: `OWNER/NAME`.
        commit: of the repository, also of what was converted.
        file: the GGUF file that it was made of, where one was named; else empty.
        converted: it lies in the cache of conversions, else in the hub's.
        nbytes: on disk; two commits in the hub's cache may share files.
        about: family and type of the weights, or why it cannot be run.
        runs: commands take it.
        used: when a file of it was last read, in seconds since 1970, as the file system notes it.
    """

    name: str
    commit: str
    file: str
    converted: bool
    nbytes: int
    about: str
    runs: bool
    used: float
    directory: Path


def cached_models() -> list[CachedModel]:
    """Returns the models of both caches, the one last used first. Raises ElmError where a cache cannot be read."""
    try:
        return sorted([*_of_hub(), *_converted()], key=lambda each: (-each.used, each.name, each.commit))
    except OSError as error:
        raise ElmError(f"{error.filename}: cannot be read: {error.strerror}") from None


def chosen(models: Sequence[CachedModel], name: str) -> list[CachedModel]:
    """Returns what `OWNER/NAME[@REVISION][:FILE]` means among them: all of it, of one commit, or made of one file.

    Raises:
        InputError: it is not there.
    """
    asked = hub.repository(name)
    found = [each for each in models if asked is not None and each.name == asked.name]
    if asked is not None and asked.revision is not None:
        snapshot = hub.snapshot(asked)
        commit = asked.revision if snapshot is None else snapshot.name
        found = [each for each in found if each.commit == commit or _abbreviates(commit, each.commit)]
        if len({each.commit for each in found}) > 1:
            raise InputError(f"{name}: is the beginning of several commits; `elm-mlx models --json` has all of each")
    if asked is not None and asked.file is not None:
        found = [each for each in found if asked.means(each.file)]
    if not found:
        raise InputError(
            f"{name}: not in the hub's cache, and not converted from there; `elm-mlx models` lists what is"
        )
    return found


def _abbreviates(start: str, commit: str) -> bool:
    return len(start) >= SHOWN and commit.startswith(start)


def remove(models: Sequence[CachedModel]) -> None:
    """Removes models from their caches, with what was begun to be downloaded of a repository that goes as a whole.

    Raises:
        ElmError: a file cannot be removed.
    """
    from huggingface_hub import scan_cache_dir

    try:
        commits = [each.commit for each in models if not each.converted]
        if commits:
            scan_cache_dir(hub.cache()).delete_revisions(*commits).execute()
        for each in models:
            if each.converted:
                shutil.rmtree(each.directory)
                if not any(each.directory.parent.iterdir()):
                    each.directory.parent.rmdir()
            elif each.directory.exists():  # huggingface_hub logs what it cannot remove, and goes on
                raise ElmError(f"{each.directory}: cannot be removed")
    except OSError as error:
        raise ElmError(f"{error.filename}: cannot be removed: {error.strerror}") from None


def _of_hub() -> list[CachedModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(hub.cache()).repos
    except CacheNotFound:
        return []
    return [
        CachedModel(
            repository.repo_id, revision.commit_hash, "", False, revision.size_on_disk, *_about(revision.snapshot_path),
            repository.last_accessed, revision.snapshot_path,
        )
        for repository in repositories
        if repository.repo_type == "model"
        for revision in repository.revisions
    ]  # fmt: skip


def _converted() -> list[CachedModel]:
    found = []
    for directory in model_names.conversions().glob("*/*"):
        if not (directory / "config.json").exists():  # being written, or a lock
            continue
        stats = [file.stat() for file in directory.rglob("*") if file.is_file()]
        size, used = sum(each.st_size for each in stats), max(each.st_atime for each in stats)
        name = model_names.name_of(directory)
        commit, file = model_names.commit_and_file(directory)
        found.append(CachedModel(name, commit, file, True, size, *_about(directory), used, directory))
    return found


def _about(directory: Path) -> tuple[str, bool]:
    """Returns what a directory holds, in words, and whether commands take it."""
    names = [path.name for path in directory.iterdir()]
    if "config.json" not in names:
        if "adapter_config.json" in names:
            return "an adapter", False
        gguf = hub.has_gguf_alone(names)
        return ("GGUF, converted when it is used" if gguf else "no model"), gguf
    try:
        if not model_names.is_whole(directory):
            return "incomplete", False
        if not model_names.opens(directory):
            return "OpenELM, converted when it is used", True
        about = describe(directory)
    except InputError as error:
        where, _, why = str(error).partition(": ")  # the path of a snapshot is long, and says nothing here
        return (why if str(directory) in where else str(error)), False
    return f"{about.family}, {about.dtype.partition(', scales')[0]}", True
