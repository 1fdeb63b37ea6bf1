"""The Hugging Face hub: repositories of models and data sets, what its cache holds of them, downloads that resume.

Cache, token, endpoint and `HF_HUB_OFFLINE` are huggingface_hub's, and so is the layout of the cache: `refs` lead from a
branch to a commit, `snapshots` hold a commit's files as links to `blobs`. What is cached is found without the network,
and without importing more of huggingface_hub than its settings: a start does not wait for it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from elm_mlx import files
from elm_mlx.callbacks import OnProgress
from elm_mlx.errors import ElmError, InputError
from elm_mlx.reading import listed

_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^:]+))?(?::(?P<file>[^:]+))?")
_GGUF = ".gguf"
_FILES = (".pt", ".pth", ".bin", ".safetensors", _GGUF)  # a path, then, and no repository
_MAIN = "main"
_LARGE = 8 << 20  # bytes; smaller files are not worth resuming
_PIECE = 1 << 20  # bytes that are written at once
_TRIES = 5  # in a row that bring nothing
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Repository:
    """A repository: `OWNER/NAME`, at a branch, tag or commit; None is the branch main.

    Attributes:
        file: of a model's, the GGUF file that is meant, or a part of its name such as Q8_0.
    """

    name: str
    revision: str | None = None
    kind: Literal["model", "dataset"] = "model"
    file: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        file = "" if self.file is None else f":{self.file}"
        return f"{'hub:' if self.kind == 'dataset' else ''}{self.name}{revision}{file}"

    def means(self, name: str) -> bool:
        """Returns whether `file` is the path `name`, its last part, or words of it: Q4_K is no word of Q4_K_M."""
        file = (self.file or "").lower()
        if file.endswith(_GGUF):
            return f"/{name.lower()}".endswith(f"/{file}")
        return re.search(rf"(?<![a-z0-9_]){re.escape(file)}(?![a-z0-9_])", name.lower()) is not None

    @property
    def folder(self) -> Path:
        """The repository's folder in the hub's cache, which may not be there."""
        return cache() / f"{self.kind}s--{self.name.replace('/', '--')}"


@dataclass(frozen=True)
class Contents:
    """What a repository holds at a commit: the sizes of its files in bytes, by name; no name leads out of it."""

    commit: str
    sizes: Mapping[str, int]


def repository(text: str) -> Repository | None:
    """Returns the model's repository that `OWNER/NAME[@REVISION][:FILE]` names; None where it can be none."""
    found = _NAME.fullmatch(text)
    if found is None or Path(found["name"]).suffix.lower() in _FILES:
        return None
    return Repository(found["name"], found["revision"], file=found["file"])


def cache() -> Path:
    """Returns the hub's cache: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or in `~/.cache/huggingface`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def offline() -> bool:
    """Returns whether `HF_HUB_OFFLINE` keeps the hub from being asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def snapshot(of: Repository) -> Path | None:
    """Returns the directory of the revision in the hub's cache, all of it or some; None where nothing of it is there.

    A branch is at the commit that it had when it was last downloaded.
    """
    revision = of.revision or _MAIN
    try:
        commit = (of.folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    found = of.folder / "snapshots" / commit
    return found if re.fullmatch(r"[\w.-]+", commit) and found.is_dir() else None


def owner_of(directory: Path) -> Repository | None:
    """Returns the repository, and the commit, whose snapshot in a hub's cache `directory` is; None if it is none."""
    snapshots = directory.absolute().parent
    owner, _, name = snapshots.parent.name.removeprefix("models--").partition("--")
    if snapshots.name != "snapshots" or not snapshots.parent.name.startswith("models--") or not name:
        return None
    return Repository(f"{owner}/{name}", directory.name)


def contents(of: Repository) -> Contents:
    """Asks the hub for a repository's files; where it must not be asked, the cache.

    Raises:
        InputError: the hub has no such repository or revision, or wants a login.
        ElmError: the hub cannot be reached; or must not be, and the cache has nothing of the repository.
    """
    if offline():
        cached = snapshot(of)
        if cached is None:
            raise ElmError(f"{of}: is not in the hub's cache, and HF_HUB_OFFLINE keeps it from being downloaded")
        return cached_contents(cached)
    with _explained(of):
        from huggingface_hub import HfApi

        about: Any = HfApi().repo_info(
            of.name, revision=of.revision, repo_type=of.kind, files_metadata=True, timeout=30
        )
    sizes = {each.rfilename: each.size or 0 for each in about.siblings or ()}
    inside = {name: size for name, size in sizes.items() if name[:1] != "/" and ".." not in PurePosixPath(name).parts}
    return Contents(about.sha or of.revision or _MAIN, inside)


def cached_contents(directory: Path) -> Contents:
    """Returns what a snapshot in the hub's cache holds."""
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return Contents(directory.name, {name: path.stat().st_size for name, path in paths.items()})


def has_gguf_alone(names: Iterable[str]) -> bool:
    """Returns whether the files of a repository hold weights as GGUF, and in no other layout."""
    kinds = {Path(name).suffix.lower() for name in names}
    return _GGUF in kinds and not kinds & {*_FILES[:-1]}


def gguf_file(of: Repository, names: Iterable[str]) -> str:
    """Returns the GGUF file that `OWNER/NAME:FILE` means among a repository's; without FILE the only one.

    Raises:
        InputError: there is none, or several, which are named; or it is in parts.
    """
    files = sorted(name for name in names if name.lower().endswith(_GGUF) and "mmproj" not in name.lower())
    wholes = list(dict.fromkeys(_PART.sub("", name) for name in files))
    found = wholes if of.file is None else [name for name in wholes if of.means(name)]
    stem = os.path.commonprefix([name[: -len(_GGUF)] for name in wholes])  # noqa: RUF071 (it is of names)
    stem = stem[: max(map(stem.rfind, "-._/")) + 1] if len(wholes) > 1 else ""
    short = [name[len(stem) : -len(_GGUF)] for name in found or wholes]  # as Q4_K_M, where that says it
    if not files:
        raise InputError(f"{of}: {of.name} holds no GGUF file")
    if len(found) != 1:
        which = "several of them" if found else "none of them"
        several = f"holds {listed(short, most=40)} as GGUF: " + (f"{of.file} is {which}; " if of.file else "")
        raise InputError(f"{of}: {several}name one, as {of.name}:{short[0]}")
    if found[0] not in files:
        raise InputError(
            f"{of}: {found[0]} is in parts: download them by `hf download {of.name}`, join them by llama.cpp's "
            "`llama-gguf-split --merge`, and convert what that makes by `elm-mlx convert`"
        )
    return found[0]


def download(
    of: Repository, found: Contents, names: list[str], what: str = "download", on_progress: OnProgress | None = None
) -> Path:
    """Brings files of a repository into the hub's cache, but for those that are there.

    What an interrupted download leaves of a large file stays in the cache, and the next one goes on from there; where
    the hub names a file's SHA-256, what has come is compared with it.

    Args:
        what: what is downloaded, for `on_progress`, which is called with bytes. By default a terminal shows a bar, as
            with huggingface_hub, and by its settings.

    Returns:
        The directory of the commit's snapshot.

    Raises:
        InputError: the hub wants a login, or its terms to be accepted.
        ElmError: the hub cannot be reached, the disk has no room, or another process downloads the same file.
    """
    directory = of.folder / "snapshots" / found.commit
    wanted = [name for name in names if not (directory / name).exists()]
    total = sum(found.sizes[name] for name in wanted)
    if not wanted:
        with suppress(ElmError):  # a cache that others may write to
            _refer(of, found.commit)  # or nothing is known of the name where the hub cannot be asked
        return directory
    kept = sum(each.stat().st_size for each in (of.folder / "blobs").glob("*.incomplete"))
    files.check_room(of.folder, max(0, total - kept))
    done = 0
    with _watched(of, on_progress) as progress:
        for name in wanted:
            size, before = found.sizes[name], done

            def show(count: int, before: int = before) -> None:
                progress(what, before + count, total)

            show(0)
            with _explained(of):
                if size > _LARGE:
                    _fetch_large(of, found.commit, name, size, show)
                _fetch(of, found.commit, name)
            done += size
            show(size)
    _refer(of, found.commit)
    return directory


@contextmanager
def _watched(of: Repository, on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """Yields the callback, or one that draws huggingface_hub's bar, if there is a terminal."""
    if on_progress is not None:
        yield on_progress
        return
    from huggingface_hub import utils

    draw_bar: Any = utils.tqdm  # type: ignore[attr-defined]
    with draw_bar(desc=str(of), unit="B", unit_scale=True, disable=None) as bar:

        def draw(what: str, done: int = 0, total: int = 0, /) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield draw


def _fetch(of: Repository, commit: str, name: str) -> None:
    """Downloads a file, or links to it where its blob is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        hf_hub_download(of.name, name, revision=commit, repo_type=of.kind)
    finally:
        if shown:  # they are the whole process's, and others download too
            enable_progress_bars()


def _refer(of: Repository, commit: str) -> None:
    """Notes which commit a branch or tag is at, as huggingface_hub does."""
    revision = of.revision or _MAIN
    if revision != commit:
        ref = of.folder / "refs" / revision
        if ref.exists() and ref.read_text("utf-8").strip() == commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(ref, commit)


def _fetch_large(of: Repository, commit: str, name: str, size: int, show: Callable[[int], None]) -> None:
    """Brings a file to its place among the blobs, in as many runs as it takes; huggingface_hub itself begins anew."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(of.name, name, revision=commit, repo_type=of.kind)
    about = get_hf_file_metadata(url, timeout=30)
    if not about.etag or about.size != size:
        return  # huggingface_hub's own download says what is wrong
    blob = of.folder / "blobs" / about.etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    with files.hold(blob, beside=True):
        if blob.exists():
            return
        part = blob.with_name(f"{blob.name}.incomplete")
        with part.open("ab+") as file:
            digest = hashlib.sha256()
            file.seek(0)
            while piece := file.read(_PIECE):
                digest.update(piece)
            for piece in _pieces(url, file, size, show):
                digest.update(piece)
            os.fsync(file.fileno())
            came = file.tell()
        if came != size or (_SHA256.fullmatch(about.etag) and digest.hexdigest() != about.etag):
            part.unlink()
            raise ElmError(f"{of}: {name} came damaged, and is not kept: the same command downloads it again")
        part.replace(blob)


def _pieces(url: str, file: BinaryIO, size: int, show: Callable[[int], None]) -> Iterator[bytes]:
    """Writes what is missing of a file behind what is there, and yields it; tries again where a connection breaks."""
    failures = 0
    while (start := file.tell()) < size:
        show(start)
        try:
            for piece in _stream(url, start):
                file.write(piece)
                yield piece
                show(file.tell())
                failures = 0
        except Exception as error:
            file.flush()
            failures += 1
            if not _may_pass(error) or failures == _TRIES:
                raise
            time.sleep(failures)
        else:
            if file.tell() == start:
                return  # nothing comes, and nothing is wrong: too short, as its size will show


def _stream(url: str, start: int) -> Iterator[bytes]:
    """Yields the bytes at `url` from `start` on."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
        hf_raise_for_status(response)
        skipped = 0 if response.status_code == 206 else start  # a server that knows no ranges begins anew
        for piece in response.iter_bytes(_PIECE):
            known, skipped = skipped, max(0, skipped - len(piece))
            if known < len(piece):
                yield piece[known:]


def _may_pass(error: Exception) -> bool:
    """Returns whether a download may go on after an error: of the network, or of a server that is busy."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return not (isinstance(error, OSError) and error.errno) and not isinstance(error, (ElmError, ValueError))


@contextmanager
def _explained(of: Repository) -> Iterator[None]:
    """Raises what huggingface_hub and the network say in the block as one line about the repository."""
    try:
        yield
    except (ElmError, KeyboardInterrupt):
        raise
    except Exception as error:  # of huggingface_hub, or of the network library of the day
        raise _in_one_line(of, error) from None


def _in_one_line(of: Repository, error: Exception) -> ElmError:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what the hub said, which it wraps
    status = getattr(getattr(error, "response", None), "status_code", None)
    path, folder, what = ("no such directory, nor is it", "", "repository")
    if of.kind == "dataset":
        path, folder, what = "not", "datasets/", "data set"
    if isinstance(error, errors.GatedRepoError):
        page = f"{_endpoint()}/{folder}{of.name}"
        return InputError(f"{of}: is gated: accept its terms at {page}, and log in by `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{of}: the hub has no such revision of {of.name}")
    if isinstance(error, errors.RepositoryNotFoundError):
        where = f"{path} in the hub's cache, and {_endpoint()} has no such {what}"
        return InputError(f"{of}: {where} (or it is private: `hf auth login`)")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{of}: is no name that a {what} could have")
    if status in (401, 403):
        return InputError(f"{of}: the hub refuses access ({status}): `hf auth login` with a token that may read it")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ElmError(
            f"{of.folder}: the disk is full; what has come is kept, and the same command goes on from there"
        )
    if isinstance(error, OSError) and error.errno and error.filename:
        return ElmError(f"{error.filename}: {error.strerror}")
    detail: Any = f"it answers {status}" if status else " ".join(str(error).split())[:200] or type(error).__name__
    return ElmError(
        f"{of}: not in the hub's cache, and {_endpoint()} cannot be reached ({detail}): the same command goes on "
        "when it can"
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
