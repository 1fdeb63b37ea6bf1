"""The disk fills, the process is killed or interrupted, two run at once: the old or the new, whole, and no litter."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gguf_models
import numpy as np
import pytest
import tiny as models
from checkpoints import read, save_pt, save_tokenizer, snapshot, tiny, weights

from elm_mlx import files
from elm_mlx.errors import ElmError
from elm_mlx_convert import convert, export_gguf

CONFIG = tiny()

# `elm-mlx`, so slow at writing that a signal meets it there.
SLOW = """
import time
import elm_mlx_convert.destination as destination
cast_blocks = destination.cast_blocks
def slowly(*arguments):
    for block in cast_blocks(*arguments):
        time.sleep(0.02)
        yield block
destination.cast_blocks = slowly
from elm_mlx.cli import main
main()
"""

# Writes one source as GGUF, then the other, until it is killed.
GGUF_FOREVER = """
import sys
from elm_mlx_convert import export_gguf
print("ready", flush=True)
while True:
    for source in sys.argv[2:]:
        export_gguf(source, sys.argv[1], overwrite=True)
"""

# Converts one source, then the other, to one place, until it is killed.
FOREVER = """
import sys
from elm_mlx_convert import convert, export_gguf
print("ready", flush=True)
while True:
    for source in sys.argv[2:]:
        convert(source, sys.argv[1], overwrite=True)
"""


@pytest.fixture
def sources(tmp_path: Path, request: pytest.FixtureRequest) -> list[Path]:
    """Two checkpoints of one shape, as PyTorch's files or as GGUF."""
    if getattr(request, "param", "pt") == "gguf":
        return [_gguf(tmp_path / "in", seed) for seed in (1, 2)]
    save_tokenizer(tmp_path / "in")
    return [save_pt(tmp_path / "in" / f"{seed}.pt", weights(CONFIG, seed)) for seed in (1, 2)]


def _gguf(directory: Path, seed: int) -> Path:
    model = models.random_model(models.scaled_config(320), seed)
    models.write_directory(directory / "made", model, models.train_tokenizer())
    gguf_models.write(directory / "made", directory / f"{seed}.gguf", ["F16", "F32"])
    shutil.rmtree(directory / "made")
    return directory / f"{seed}.gguf"


BOTH_KINDS = pytest.mark.parametrize("sources", ["pt", "gguf"], indirect=True)


def entries(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


@BOTH_KINDS
def test_killed_at_any_moment(tmp_path: Path, sources: list[Path]) -> None:
    """SIGKILL at 20 random moments of a process that replaces one model by another without a pause."""
    complete = []
    for number, source in enumerate(sources):
        convert(source, tmp_path / f"expected{number}")
        complete.append(snapshot(tmp_path / f"expected{number}"))
        shutil.rmtree(tmp_path / f"expected{number}")
    out = tmp_path / "out"
    convert(sources[0], out)
    choose = random.Random(11)
    left = set()
    for _ in range(20):
        command = [sys.executable, "-c", FOREVER, str(out), *map(str, sources)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(choose.uniform(0.02, 0.12))
            process.send_signal(signal.SIGKILL)
        assert snapshot(out) in complete
        left |= {name for name in entries(tmp_path) if name.startswith(".out.tmp-")}
        assert len(entries(tmp_path)) <= 3  # the source, the destination, and one that the next run removes
    assert left, "no kill met a conversion halfway"
    convert(sources[1], out, overwrite=True)
    assert entries(tmp_path) == ["in", "out"]
    assert snapshot(out) == complete[1]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_interrupted(tmp_path: Path, sources: list[Path], sent: signal.Signals, code: int) -> None:
    out = tmp_path / "out"
    convert(sources[0], out)
    before = snapshot(out)
    command = [sys.executable, "-c", SLOW, "convert", str(sources[1]), str(out), "--overwrite"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not any(tmp_path.glob(".out.tmp-*/model.safetensors")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert snapshot(out) == before
    if sent == signal.SIGINT:
        assert entries(tmp_path) == ["in", "out"]
    convert(sources[0], out, overwrite=True)
    assert entries(tmp_path) == ["in", "out"]


def test_two_at_once(tmp_path: Path, sources: list[Path]) -> None:
    out = tmp_path / "out"
    convert(sources[0], out)
    command = [sys.executable, "-c", SLOW, "convert"]
    running = [subprocess.Popen([*command, str(source), str(out), "--overwrite"]) for source in sources * 2]
    assert [process.wait() for process in running] == [0] * 4
    assert entries(tmp_path) == ["in", "out"]
    norms = [weights(CONFIG, seed)["transformer.norm.weight"] for seed in (1, 2)]
    found = (read(out)["transformer.norm.weight"].astype(np.uint32) << 16).view(np.float32)
    assert any(np.allclose(found, norm, rtol=0.01) for norm in norms)
    assert read(out).keys() == CONFIG.shapes().keys()


@BOTH_KINDS
def test_a_limit_on_the_size_of_files(tmp_path: Path, sources: list[Path]) -> None:
    """A real process whose writes fail halfway."""
    out = tmp_path / "out"
    convert(sources[0], out)
    before = snapshot(out)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "-m", "elm_mlx", "convert", str(sources[1]), str(out), "--overwrite"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"elm-mlx: {out}: cannot be written: File too large; nothing was changed\n"
    assert snapshot(out) == before
    assert entries(tmp_path) == ["in", "out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system needs Linux and root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(small_disk: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out = small_disk / "out"
    with pytest.raises(ElmError, match=r"out: needs \d+(\.\d)? MB, and \d+(\.\d)? MB are free"):
        convert(sources[0], out)
    monkeypatch.setattr(files, "free_bytes", lambda path: 1 << 40)
    convert(sources[0], out)
    before = snapshot(out)
    with pytest.raises(ElmError, match=r"disk/out.*: cannot be written: No space left on device; nothing was changed"):
        convert(sources[1], out, overwrite=True, dtype="float32")
    assert snapshot(out) == before
    assert entries(small_disk) == ["out"]


def test_a_gguf_file_is_whole_when_its_writer_is_killed(tmp_path: Path, sources: list[Path]) -> None:
    out, complete = tmp_path / "out.gguf", []
    for source in sources:
        export_gguf(source, out, overwrite=True)
        complete.append(out.read_bytes())
    choose = random.Random(11)
    for _ in range(6):
        command = [sys.executable, "-c", GGUF_FOREVER, str(out), *map(str, sources)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(choose.uniform(0.05, 0.3))
            process.send_signal(signal.SIGKILL)
        assert out.read_bytes() in complete
    export_gguf(sources[0], out, overwrite=True)
    assert entries(tmp_path) == ["in", "out.gguf"]


def test_a_limit_on_the_size_of_files_leaves_the_gguf_file_that_was_there(tmp_path: Path, sources: list[Path]) -> None:
    out = tmp_path / "out.gguf"
    export_gguf(sources[0], out)
    before = out.read_bytes()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "-m", "elm_mlx", "export", str(sources[1]), str(out), "--overwrite"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"elm-mlx: {out}: cannot be written: File too large; nothing was changed\n"
    assert out.read_bytes() == before
    assert entries(tmp_path) == ["in", "out.gguf"]


def test_a_full_disk_has_no_gguf_file(small_disk: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ElmError, match=r"out\.gguf: needs \d+(\.\d)? MB, and \d+(\.\d)? MB are free"):
        export_gguf(sources[0], small_disk / "out.gguf")
    assert not (small_disk / "out.gguf").exists()
