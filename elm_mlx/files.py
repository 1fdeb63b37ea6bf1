"""Files and directories that appear whole, or not at all.

Knows how to write beside a path and then move into place, so that whoever opens the path at any
instant, after a crash too, finds the old content complete or the new. Knows nothing of what is written.

A temporary entry is a sibling called `.NAME.tmp-XXXXXXXX`, locked (flock) by the process that writes it.
The kernel drops the lock when that process dies, however it dies; so what can be locked is litter, and the
next writer to the same path removes it. A directory that is filled bit by bit is held by one process in the same way.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from elm_mlx.errors import ElmError, InputError
from elm_mlx.reading import byte_size

# What the kernel answers when it or the file system cannot swap two names.
_CANNOT_SWAP = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # which a caller's own writing meets
_RENAME_EXCHANGE = 2  # Linux, renameat2(2)
_RENAME_SWAP = 2  # macOS, renamex_np(2)
_AT_FDCWD = -100
_OTHER_BYTES = 16 << 20  # of a model directory: config, tokenizer and records of the largest vocabulary
_SYNC_SECONDS = 5.0  # between two times that appended lines are put on the disk
LOCK = ".lock"  # in a directory that a process holds, with its number


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path`, replacing what was there, when the block ends without an exception.

    Raises:
        ElmError: it cannot be written. `path` is then as it was.
    """
    path = Path(os.path.realpath(path))
    with _failures_named(path):
        remove_abandoned(path)
        temporary, lock = _make_locked(path, lambda name: os.close(os.open(name, os.O_CREAT | os.O_EXCL, 0o666)))
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
    try:
        with _failures_named(path, *_FULL), temporary.open("wb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        with _failures_named(path):
            temporary.replace(path)
            _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        _unlock(lock)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8 as the whole of `path`, atomically. Raises ElmError."""
    with new_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON object as the whole of `path`, atomically. Raises ElmError."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    with new_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # half a surrogate pair, as JSON says it


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """JSON objects, each a line, as the whole of `path`, atomically. Raises ElmError."""
    with new_file(path) as file:
        file.writelines(map(json_line, lines))


def json_line(values: Mapping[str, Any]) -> bytes:
    """A JSON object as a line, half a surrogate pair as JSON says it."""
    return (json.dumps(values, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


class JsonLinesFile:
    """A file that lines of JSON are appended to, open between `with` and its end.

    They are on the disk some seconds later, and at the end, so that a crash leaves whole lines and perhaps a torn last
    one.

    Raises:
        ElmError: it cannot be opened, or a line not written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise ElmError(f"{path}: cannot be written: {error.strerror}") from None
        self._synced = time.monotonic()

    def __enter__(self) -> JsonLinesFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # A second error would hide the first one.
        with nullcontext() if error is None else suppress(OSError), self._file:
            self._sync_now()

    def read(self, most: int) -> Iterator[bytes]:
        """Yields the lines that are there, of `most` bytes each at most, a torn last one too."""
        self._file.seek(0)
        while line := self._file.readline(most):
            yield line

    def cut(self, size: int) -> None:
        """Forgets what comes after so many bytes."""
        if self._file.seek(0, os.SEEK_END) > size:
            self._file.truncate(size)

    def append(self, *lines: Mapping[str, Any]) -> None:
        """Appends objects, a line each."""
        try:
            self._file.write(b"".join(map(json_line, lines)))
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync_now()
        except OSError as error:
            raise ElmError(f"{self._path}: cannot be written: {error.strerror}; what is there is kept") from None

    def _sync_now(self) -> None:
        self._file.flush()
        _sync(self._file.fileno())
        self._synced = time.monotonic()


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty directory to fill that becomes `path` when the block ends without an exception.

    Everything in it is flushed to the disk before it takes its name. With `replace`, a directory that is
    there changes places with it in one step of the kernel, and is then removed, but for what was put into it
    since the block began; a symbolic link stays, and what it points to is replaced. Where neither kernel nor
    file system can swap names (not on ext4, XFS, btrfs, tmpfs, APFS), two renames follow each other: a crash
    exactly between them leaves no `path`, and the next call for it puts the old one back first.

    Raises:
        InputError: `path` exists and `replace` was not asked for, or it is no directory.
        ElmError: it cannot be written. `path` is then as it was.
    """
    path = Path(os.path.realpath(path))
    with scratch_directory(path) as temporary:
        _check_free(path, replace)
        before, names = _identity(path), _names(path)
        yield temporary
        with _failures_named(path):
            if _identity(path) == before:  # else another writer has replaced it
                for name in _names(path) - names - _names(temporary):
                    _copy(path / name, temporary / name)
            _sync_tree(temporary)
            _move_into_place(temporary, path, replace)  # which leaves nothing in its place, or after a swap the old


@contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path`, on its disk, for what is needed only until the block ends.

    What a process that was killed leaves of it goes with the next writer to `path`.

    Raises:
        ElmError: it cannot be made.
    """
    path = Path(os.path.realpath(path))
    with _failures_named(path):
        made = _make_parents(path.parent)
        remove_abandoned(path)
        temporary, lock = _make_locked(path, os.mkdir)
    try:
        with _failures_named(path, *_FULL), _temporary_unnamed(temporary, path):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(lock)
        _remove_empty(made)


@contextmanager
def hold(directory: Path, *, beside: bool = False) -> Iterator[None]:
    """Keeps every other process from holding `directory` until the block ends; where it is missing, it is made.

    The kernel drops the lock with the process, however it dies. On a file system without locks nothing is kept out.

    Args:
        beside: lock a file beside the directory, and not `LOCK` in it: of one that is to appear whole.

    Raises:
        ElmError: another process holds it, which is named; or the lock cannot be written.
    """
    path = Path(os.path.realpath(directory))
    path = path.parent / f".{path.name}{LOCK}" if beside else path / LOCK
    with _failures_named(directory):
        made = _make_parents(path.parent)
        descriptor = _take(path, directory)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
        _remove_empty(made)


def remove_abandoned(path: Path) -> None:
    """Removes what writers to `path` that were killed have left beside it; what a live one writes stays.

    Raises:
        OSError: the directory cannot be read.
    """
    ours = re.compile(re.escape(f".{path.name}.") + "(tmp|old)-[0-9a-f]{8}")
    for entry in list(path.parent.iterdir()):
        match = ours.fullmatch(entry.name)
        if not match:
            continue
        try:
            lock = _lock(entry)
        except OSError:  # where locks do not work, nothing tells litter from work
            continue
        if lock is None:
            continue
        try:
            if match[1] == "old" and not os.path.lexists(path):
                entry.rename(path)  # killed between the two renames of a file system that cannot swap
            elif entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        finally:
            os.close(lock)


def free_bytes(path: Path) -> int:
    """Returns the bytes that this user may still write to the file system of `path`, or of its nearest parent."""
    path = Path(os.path.realpath(path))
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def check_room(path: Path, nbytes: int) -> None:
    """Raises ElmError where weights of `nbytes`, and the tokenizer, config and records beside them, do not fit."""
    needed, free = nbytes + _OTHER_BYTES, free_bytes(path)
    if needed > free:
        raise ElmError(f"{path}: needs {byte_size(needed)}, and {byte_size(free)} are free there")


def _check_free(path: Path, replace: bool) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, and a directory is to be written")
    if path.exists() and not replace:
        raise InputError(f"{path}: exists already")


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells a directory from another of its name; None where there is none."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_dev, status.st_ino


def _names(directory: Path) -> set[str]:
    """Of what is in it; of none, where it is missing."""
    return {entry.name for entry in directory.iterdir()} if directory.exists() else set()


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def _make_parents(directory: Path) -> list[Path]:
    """Makes `directory`. Returns what was made, innermost first."""
    missing = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    return missing


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        with suppress(OSError):  # not empty: what was to be written is there, or someone else is at home
            directory.rmdir()


def _make_locked(path: Path, make: Callable[[str], None]) -> tuple[Path, int | None]:
    """Makes an entry beside `path` under a free name, and locks it before anyone takes it for litter."""
    while True:
        entry = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
        try:
            make(str(entry))
        except FileExistsError:
            continue
        try:
            lock = _lock(entry)
        except OSError:  # a file system without locks: it works, only litter is not told from work there
            return entry, None
        if lock is not None:
            return entry, lock


def _lock(entry: Path) -> int | None:
    """Locks a file or directory. Returns the descriptor that holds the lock; None when it is taken or gone.

    Raises:
        OSError: it cannot be locked at all.
    """
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, entry):
            return descriptor
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _take(lock: Path, directory: Path) -> int:
    """Makes and locks the file `lock`, and writes this process's number to it. Returns the descriptor that holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.read(descriptor, 20).decode("ascii", "replace").strip()
            os.close(descriptor)
            who = f"process {number}" if number.isdigit() else "another process"
            raise ElmError(
                f"{directory}: {who} is writing to it; wait until it has ended, or choose another place"
            ) from None
        except OSError:  # a file system without locks
            pass
        if _is_at(descriptor, lock):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)  # its holder has ended just now, and removed it


def _is_at(descriptor: int, path: Path) -> bool:
    """Returns whether `path` still names the open file."""
    held = os.fstat(descriptor)
    try:
        named = path.lstat()
    except FileNotFoundError:
        return False
    return (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino)


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _move_into_place(temporary: Path, path: Path, replace: bool) -> None:
    if not os.path.lexists(path) or not replace:
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise ElmError(f"{path}: was made by another process meanwhile, and is kept as it is") from None
            raise
    elif not _swap(temporary, path):
        try:
            _rename_twice(temporary, path)
        except OSError as error:
            if error.errno == errno.EXDEV:  # overlayfs: it comes from a layer below
                raise ElmError(f"{path}: lies in a container image and cannot be replaced: choose another") from None
            raise
    _sync_directory(path.parent)


def _swap(first: Path, second: Path) -> bool:
    """Exchanges two names in one step. False where that does not exist."""
    libc = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        done = libc.renamex_np(a, b, _RENAME_SWAP)
    elif hasattr(libc, "renameat2"):
        done = libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE)
    else:
        return False
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_SWAP:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _rename_twice(temporary: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old-{temporary.name[-8:]}")
    lock = None
    with suppress(OSError):
        lock = _lock(path)  # so that nobody recovers it while we are alive
    try:
        path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            old.rename(path)
            raise
        _sync_directory(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        _unlock(lock)


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            if Path(folder, name).is_symlink():  # it lies in its folder
                continue
            descriptor = os.open(Path(folder, name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                _sync(descriptor)
            finally:
                os.close(descriptor)
        _sync_directory(Path(folder))


def _sync(descriptor: int) -> None:
    """Flushes a file to the disk itself: on macOS fsync alone stops at the drive's cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # a file system that does not know it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _temporary_unnamed(temporary: Path, path: Path) -> Iterator[None]:
    """Replaces `temporary` by `path` in errors of the block."""
    try:
        yield
    except ElmError as error:
        if str(temporary) not in str(error):
            raise
        raise type(error)(str(error).replace(str(temporary), str(path))) from None


@contextmanager
def _failures_named(path: Path, *codes: int) -> Iterator[None]:
    """Raises what the system refuses in the block, or of that `codes` alone, as an ElmError about `path`."""
    try:
        yield
    except OSError as error:
        if codes and error.errno not in codes:
            raise
        why = os.strerror(error.errno) if error.errno else error
        raise ElmError(f"{path}: cannot be written: {why}; nothing was changed") from None
