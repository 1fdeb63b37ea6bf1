"""Files and directories that appear whole or not at all: success, failure, crashes, rivals."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from elm_mlx import files, reading
from elm_mlx.errors import ElmError, InputError
from elm_mlx.files import (
    LOCK,
    free_bytes,
    hold,
    new_directory,
    new_file,
    remove_abandoned,
    write_json,
    write_json_lines,
    write_text,
)


def fill(path: Path, content: str, *, replace: bool = False) -> None:
    with new_directory(path, replace=replace) as directory:
        (directory / "a").write_text(content)
        (directory / "sub").mkdir()
        (directory / "sub" / "b").write_text(content)


def content(path: Path) -> tuple[str, str]:
    return (path / "a").read_text(), (path / "sub" / "b").read_text()


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_a_home_directory_is_put_for_its_sign_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, path in {
        "~": tmp_path, "~/a": tmp_path / "a", Path("~/a"): tmp_path / "a", "a~": Path("a~"), "a/~": Path("a/~"),
        "./~/a": tmp_path / "~" / "a", ".//~": tmp_path / "~", "~of-nobody/a": Path("~of-nobody/a"), "": Path(),
    }.items():  # fmt: skip
        assert reading.expanded(name) == path == reading.expanded(reading.expanded(name))
    monkeypatch.setenv("HOME", "~")
    assert reading.expanded("~/a") == Path("~/a")


def test_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with new_file(path) as file:
        file.write(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half"
    write_text(path, "other")
    assert path.read_text() == "other"
    assert names(tmp_path) == ["x.json"]


def test_json_is_read_again_whatever_its_texts_hold(tmp_path: Path) -> None:
    values = {"text": "naïve ▁ 日本 \x00\n\u2028", "half of a pair": "\ud800 and \udcff", "\udfff": [1, None, 2.5]}
    write_json(tmp_path / "a.json", values)
    assert reading.json_object(tmp_path / "a.json") == values
    written = (tmp_path / "a.json").read_text("utf-8")
    assert "naïve ▁ 日本" in written and written.endswith("}\n")
    write_json_lines(tmp_path / "a.jsonl", [values, {}, values])
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").open("rb")] == [values, {}, values]


def test_file_stays_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_file_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_directory_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "for" / "it"
    fill(path, "new")
    assert content(path) == ("new", "new")
    assert names(path.parent) == ["it"]
    assert path.stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_failed_block_leaves_nothing_not_even_parents(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "a" / "b") as directory:
        (directory / "x").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_existing_needs_replace(tmp_path: Path) -> None:
    path = tmp_path / "d"
    fill(path, "old")
    with pytest.raises(InputError, match="exists already"):
        fill(path, "new")
    fill(path, "new", replace=True)
    assert content(path) == ("new", "new")
    assert names(tmp_path) == ["d"]
    with pytest.raises(ZeroDivisionError), new_directory(path, replace=True):
        raise ZeroDivisionError
    assert content(path) == ("new", "new")


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        fill(tmp_path / "f", "new", replace=True)
    with pytest.raises(ElmError, match="Not a directory"):
        fill(tmp_path / "f" / "d", "new")
    assert (tmp_path / "f").read_text() == "mine"


def test_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", "new", replace=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == ("new", "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_parent_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ElmError, match="Permission denied"):
        fill(tmp_path / "d", "new")


def test_what_is_put_into_a_directory_while_its_successor_is_made_stays(tmp_path: Path) -> None:
    fill(tmp_path / "model", "old")
    with files.new_directory(tmp_path / "model", replace=True) as made:
        (made / "a").write_text("new")
        (tmp_path / "model" / "notes.txt").write_text("mine")
        (tmp_path / "model" / "folder").mkdir()
        (tmp_path / "model" / "folder" / "more.txt").write_text("mine too")
        (tmp_path / "model" / "link").symlink_to("notes.txt")
    assert (tmp_path / "model" / "a").read_text() == "new"
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model" / "folder" / "more.txt").read_text() == "mine too"
    assert (tmp_path / "model" / "link").readlink() == Path("notes.txt")
    assert names(tmp_path) == ["model"]


def test_what_another_writer_has_put_in_its_place_meanwhile_is_none_of_it(tmp_path: Path) -> None:
    fill(tmp_path / "model", "old")
    with files.new_directory(tmp_path / "model", replace=True) as made:
        (made / "a").write_text("first")
        with files.new_directory(tmp_path / "model", replace=True) as other:
            (other / "index").write_text("second")
    assert names(tmp_path / "model") == ["a"]


def test_someone_elses_directory_made_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with pytest.raises(ElmError, match="by another process"), new_directory(path):
        fill(path, "theirs")
    assert content(path) == ("theirs", "theirs")
    assert names(tmp_path) == ["d"]


def test_two_writers_at_once_leave_one_complete(tmp_path: Path) -> None:
    path = tmp_path / "d"
    fill(path, "old")
    with new_directory(path, replace=True) as first:
        with new_directory(path, replace=True) as second:
            for directory, text in ((first, "first"), (second, "second")):
                (directory / "a").write_text(text)
                (directory / "sub").mkdir()
                (directory / "sub" / "b").write_text(text)
            assert first != second
        assert content(path) == ("second", "second")
    assert content(path) == ("first", "first")
    assert names(tmp_path) == ["d"]


def test_litter_of_the_dead_goes_and_work_of_the_living_stays(tmp_path: Path) -> None:
    path = tmp_path / "d"
    (tmp_path / ".d.tmp-0123abcd").mkdir()
    (tmp_path / ".d.tmp-0123abcd" / "half").write_text("x")
    (tmp_path / ".d.tmp-89abcdef").write_text("x")
    bystanders = [".d.tmp-mine", "d.tmp-0123abcd", ".e.tmp-0123abcd"]
    for name in bystanders:
        (tmp_path / name).mkdir()
    (tmp_path / ".d.tmp-aaaaaaaa").symlink_to(tmp_path / ".d.tmp-mine")
    with new_directory(path) as alive:
        remove_abandoned(path)
        assert alive.is_dir()
    assert names(tmp_path) == sorted([*bystanders, ".d.tmp-aaaaaaaa", "d"])


def test_full_disk_says_so(tmp_path: Path) -> None:
    path = tmp_path / "d"
    fill(path, "old")
    message = r"d: cannot be written: No space left.*nothing was changed"
    with pytest.raises(ElmError, match=message), new_directory(path, replace=True):
        raise OSError(errno.ENOSPC, "whatever")
    assert content(path) == ("old", "old")
    assert names(tmp_path) == ["d"]


def test_errors_within_do_not_name_the_temporary(tmp_path: Path) -> None:
    for kind in (ElmError, InputError):
        with pytest.raises(kind) as caught, new_directory(tmp_path / "d") as directory:
            raise kind(f"{directory}/a: is bad")
        assert str(caught.value) == f"{tmp_path}/d/a: is bad"
    with pytest.raises(InputError, match="elsewhere"), new_directory(tmp_path / "d"):
        raise InputError("elsewhere")


def test_file_size_limit_is_met_as_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(ElmError, match="File too large"), new_file(path) as file:
            file.write(b"x" * (1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_free_bytes_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "not" / "there")
    status = os.statvfs(tmp_path)
    assert 0 <= free <= status.f_blocks * status.f_frsize


def test_without_swap_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_swap", lambda first, second: False)
    fill(tmp_path / "d", "old")
    fill(tmp_path / "d", "new", replace=True)
    assert content(tmp_path / "d") == ("new", "new")
    assert names(tmp_path) == ["d"]


def test_killed_between_two_renames_is_mended_by_the_next_call(tmp_path: Path) -> None:
    path = tmp_path / "d"
    fill(path, "old")
    path.rename(tmp_path / ".d.old-0123abcd")
    (tmp_path / ".d.tmp-0123abcd").mkdir()
    with pytest.raises(InputError, match="exists already"):
        fill(path, "new")
    assert content(path) == ("old", "old")
    assert names(tmp_path) == ["d"]


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.EBADF, "no locks here")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / ".d.tmp-0123abcd").mkdir()
    fill(tmp_path / "d", "old")
    fill(tmp_path / "d", "new", replace=True)
    monkeypatch.setattr(files, "_swap", lambda first, second: False)
    fill(tmp_path / "d", "newer", replace=True)
    assert content(tmp_path / "d") == ("newer", "newer")
    assert names(tmp_path) == [".d.tmp-0123abcd", "d"]


@pytest.mark.parametrize(
    ("platform", "libc", "expected"),
    [
        ("darwin", {"renamex_np": 0}, True),
        ("darwin", {"renamex_np": errno.ENOTSUP}, False),
        ("linux", {"renameat2": 0}, True),
        ("linux", {"renameat2": errno.EINVAL}, False),
        ("linux", {}, False),
    ],
)
def test_each_systems_swap(
    monkeypatch: pytest.MonkeyPatch, platform: str, libc: dict[str, int], expected: bool
) -> None:
    calls: list[tuple[object, ...]] = []

    def function(code: int) -> object:
        def call(*arguments: object) -> int:
            calls.append(arguments)
            ctypes.set_errno(code)
            return -1 if code else 0

        return call

    fake = SimpleNamespace(**{name: function(code) for name, code in libc.items()})
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: fake)
    assert files._swap(Path("/a"), Path("/b")) is expected
    flags = {"renamex_np": (b"/a", b"/b", 2), "renameat2": (-100, b"/a", -100, b"/b", 2)}
    assert calls == [flags[name] for name in libc]


def test_swap_that_is_refused_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        files._swap(tmp_path / "a", tmp_path / "b")


KILLED = """
import sys
from pathlib import Path
from elm_mlx.files import new_directory
path, text = Path(sys.argv[1]), "new" * 1000
print("ready", flush=True)
while True:
    with new_directory(path, replace=True) as directory:
        (directory / "a").write_text(text)
        (directory / "sub").mkdir()
        (directory / "sub" / "b").write_text(text)
"""


def test_killed_at_any_moment_leaves_it_complete(tmp_path: Path) -> None:
    """SIGKILL at 25 random moments of a process that does nothing but replace the directory."""
    path = tmp_path / "d"
    choose = random.Random(3)
    fill(path, "old")
    for _ in range(25):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(choose.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        first, second = content(path)
        assert first == second
        assert first in ("old", "new" * 1000)
    fill(path, "last", replace=True)
    assert content(path) == ("last", "last")
    assert names(tmp_path) == ["d"]


def test_a_file_keeps_its_mode_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "private"
    write_text(path, "one")
    path.chmod(0o600)
    write_text(path, "two")
    assert path.read_text() == "two" and path.stat().st_mode & 0o777 == 0o600


HOLDS = """import sys, time
from pathlib import Path
from elm_mlx.files import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_directory_is_held_by_one_process_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    out, link = tmp_path / "made" / "out", tmp_path / "link"
    link.symlink_to(out)
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        for name in (out, link):
            with pytest.raises(ElmError, match=f"{name}: process {process.pid} is writing to it; wait"), hold(name):
                pass
        process.kill()
    assert names(out) == [LOCK]
    with hold(out):
        assert (out / LOCK).read_text() == f"{os.getpid()}\n"
        (out / "made").touch()
    assert names(out) == ["made"]


def test_a_hold_leaves_no_directory_that_nothing_was_written_to(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    with hold(tmp_path / "x", beside=True):
        assert names(tmp_path) == [".x.lock"]
    assert names(tmp_path) == []
    with pytest.raises(ElmError, match="null/x: cannot be written: Not a directory"), hold(Path("/dev/null/x")):
        pass


def test_a_holder_that_ends_just_now_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file was opened before it was removed, and locked after: another one may already hold a new file."""
    flock = files.fcntl.flock

    def after_its_end(*arguments: int) -> None:
        monkeypatch.undo()
        (tmp_path / LOCK).unlink()
        flock(*arguments)

    monkeypatch.setattr(files.fcntl, "flock", after_its_end)
    with hold(tmp_path), pytest.raises(ElmError, match=f"process {os.getpid()} is writing"), hold(tmp_path):
        pass


def test_a_hold_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with hold(tmp_path), hold(tmp_path):
        pass
    assert names(tmp_path) == []


def test_lines_are_appended_read_back_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    with files.JsonLinesFile(path) as record:
        record.append({"a": 1}, {"b": "é\ud800"})
    path.write_bytes(path.read_bytes() + b'{"torn')
    with files.JsonLinesFile(path) as record:
        lines = list(record.read(100))
        assert [json.loads(line) for line in lines[:2]] == [{"a": 1}, {"b": "é\ud800"}] and lines[2:] == [b'{"torn']
        record.cut(len(lines[0]))
        record.append({"c": 2})
    assert path.read_bytes() == b'{"a": 1}\n{"c": 2}\n'


def test_lines_that_cannot_be_appended_are_an_error_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(ElmError, match="missing/x: cannot be written"):
        files.JsonLinesFile(tmp_path / "missing" / "x")
    full = Path("/dev/full")
    if full.exists():
        with (
            pytest.raises(ElmError, match="/dev/full: cannot be written: No space left"),
            files.JsonLinesFile(full) as it,
        ):
            it.append({"a": 1})
