"""Both answers to each question, by saying what the machine is."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from elm_mlx import blas, device
from elm_mlx.device import Computation
from elm_mlx.errors import InputError
from elm_mlx.store import loading

GIGABYTE = 10**9
STORED = [mx.float32, mx.bfloat16, mx.float16]


@pytest.fixture(params=[False, True], ids=["no reader", "reader"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Products that read weights as they are stored, or none, whatever this machine has."""
    monkeypatch.setattr(blas, "reads_stored", lambda: request.param)
    return bool(request.param)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    monkeypatch.setattr(device, "available_memory", lambda: 10 * GIGABYTE)


def test_the_device_is_the_one_that_mlx_defaults_to() -> None:
    assert device.on_gpu() is (mx.default_device().type == mx.gpu)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("stored", STORED)
def test_a_gpu_computes_in_what_is_stored(stored: mx.Dtype, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda: 0)
    assert device.computation(stored, 10**12, packed) == Computation(stored)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("stored", "packed", "kind"),
    [(mx.bfloat16, False, "bfloat16"), (mx.float16, False, "float16"), (mx.bfloat16, True, "quantized"),
     (mx.float32, True, "quantized")],
)  # fmt: skip
def test_a_cpu_widens_and_says_so(stored: mx.Dtype, packed: bool, kind: str) -> None:
    how = device.computation(stored, 250_000_000, packed)
    assert how.dtype == mx.float32 and how.unpack is packed and not how.as_stored
    assert how.note == f"{kind} weights computed in float32, faster on a CPU (1.00 GB)"


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("packed", [True, False])
def test_a_cpu_reads_weights_as_they_are_stored_where_it_can(reader: bool, packed: bool) -> None:
    for parameters in (250_000_000, 10**12):  # however little memory there is
        how = device.computation(mx.bfloat16, parameters, packed, None, 500_000_000)
        assert how.as_stored is reader
        if reader:
            kind = "quantized" if packed else "bfloat16"
            note = f"{kind} weights computed in float32, read as they are stored (0.50 GB)"
            assert how == Computation(mx.float32, as_stored=True, note=note)
    assert not device.computation(mx.bfloat16, 1, packed, "float32", 2).as_stored
    on_request = device.computation(mx.bfloat16, 1, packed, "bfloat16", 2)
    assert on_request.as_stored is (reader and not packed)
    assert on_request.rounds is (on_request.as_stored and blas.rounds_rows())
    if on_request.as_stored:
        how = "prompts in bfloat16" if on_request.rounds else "which this processor multiplies faster"
        assert on_request.note == f"bfloat16 weights computed in float32, {how}, read as they are stored (0.00 GB)"
    half = device.computation(mx.float16, 1, packed, "float16", 2)
    assert half.as_stored is (reader and not packed) and not half.rounds
    assert not device.computation(mx.float16, 1, packed, "bfloat16", 2).as_stored
    assert not device.computation(mx.bfloat16, 1, packed).as_stored
    assert device.computation(mx.float32, 1, False, None, 4) == Computation(mx.float32)


@pytest.mark.usefixtures("gpu", "reader")
def test_a_gpu_reads_nothing_in_another_way() -> None:
    assert device.computation(mx.bfloat16, 10**6, True, None, 10**6) == Computation(mx.bfloat16)
    assert not device.computation(mx.bfloat16, 10**6, True, "float32", 10**6).as_stored


@pytest.mark.usefixtures("cpu")
def test_float32_is_nothing_to_talk_about() -> None:
    assert device.computation(mx.float32, 10**12) == Computation(mx.float32)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(("parameters", "widened"), [(2 * 10**9, True), (2 * 10**9 + 1, False), (10**12, False)])
def test_a_cpu_widens_only_into_four_fifths_of_the_free_memory(parameters: int, widened: bool) -> None:
    for packed in (True, False):
        how = device.computation(mx.bfloat16, parameters, packed)
        assert (how.dtype == mx.float32) is widened
        assert how.unpack is (packed and widened)
        assert how.note is not None
        assert ("slowly" in how.note and "10.0 GB of memory that are free" in how.note) is not widened


@pytest.mark.usefixtures("cpu")
def test_where_the_system_does_not_say_what_is_free_weights_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda: None)
    assert device.computation(mx.bfloat16, 10**12).dtype == mx.float32


@pytest.mark.parametrize("name", device.DTYPES)
@pytest.mark.parametrize("packed", [True, False])
def test_what_is_asked_for_goes_before_all(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = f"computing in {name} by MLX's loops, which is slow on a CPU: leave out --compute-dtype there"
    for gpu in (True, False):
        monkeypatch.setattr(device, "on_gpu", lambda gpu=gpu: gpu)
        for stored in STORED:
            how = device.computation(stored, 10**12, packed, name)
            note = None if gpu or name == "float32" else slow
            assert how == Computation(device.DTYPES[name], unpack=packed and name == "float32" and not gpu, note=note)


@pytest.mark.parametrize("name", ["float64", "int8", "bf16", "", "FLOAT32"])
def test_another_type_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"compute dtype '{name}' is not one of float32, float16, bfloat16"):
        device.computation(mx.float32, 1, requested=name)


def test_a_gpu_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert device.compile_hindrance() is None


@pytest.mark.usefixtures("cpu")
def test_a_cpu_compiles_only_where_nobody_else_can_put_a_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert device.compile_hindrance() is None
    made = tmp_path / "mlx" / mx.__version__ / "cpu"
    assert made.is_dir() and not made.stat().st_mode & 0o077
    for path in (made, made.parent, made.parent.parent):
        path.chmod(0o777)
        assert device.compile_hindrance() == f"{path} is not this user's alone"
        path.chmod(0o700)
    assert device.compile_hindrance() is None
    made.rmdir()
    made.symlink_to(tmp_path)
    assert device.compile_hindrance() == f"{made} is not this user's alone"
    monkeypatch.setattr(device.os, "getuid", lambda: 12345)
    assert "is not this user's alone" in str(device.compile_hindrance())
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert "No such file" in str(device.compile_hindrance())


def test_free_memory_is_less_than_there_is() -> None:
    free = device.available_memory()
    if free is None:
        pytest.skip("this system does not say")
    assert 0 < free < 2**50


def only_files(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Lets the system have no other files than these."""

    def read(path: Path, *args: object, **options: object) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   4000 kB\n"}, 4_096_000),
        ({"/proc/meminfo": "MemAvailable: 4000 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}, 4_096_000),
        (
            {
                "/proc/meminfo": "MemAvailable: 4000 kB\n",
                "/sys/fs/cgroup/memory.max": "3000000\n",
                "/sys/fs/cgroup/memory.current": "1700000\n",
                "/sys/fs/cgroup/memory.stat": "anon 900000\ninactive_file 700000\n",
            },
            2_000_000,  # cached files make room
        ),
        (
            {
                "/proc/meminfo": "MemAvailable: 4000 kB\n",
                "/sys/fs/cgroup/memory.max": "3000000\n",
                "/sys/fs/cgroup/memory.current": "5000000\n",
                "/sys/fs/cgroup/memory.stat": "anon 5000000\n",
            },
            0,
        ),
        ({"/proc/meminfo": "MemTotal: 9 kB\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_limit_counts(
    files: dict[str, str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_files(monkeypatch, files)
    assert device.available_memory() == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4 kB\n"}, 9216),
        ({"/proc/meminfo": "MemTotal: 9 kB\n", "/sys/fs/cgroup/memory.max": "9000\n"}, 9000),
        ({"/proc/meminfo": "MemTotal: 9 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}, 9216),
        ({}, None),
    ],
)
def test_all_memory_is_the_machines_or_the_containers(
    files: dict[str, str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_files(monkeypatch, files)
    assert device.total_memory() == expected


def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10**7 < device.peak_memory() < 10**12  # Python and MLX alone take some 50 MB
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    assert device.peak_memory() == mx.get_peak_memory()


class Mac:
    """What MLX and the system say of a Mac with 16 GB, of which Metal recommends 12; and what is asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.active = self.cache = self.cleared = 0
        self.wired: list[int] = []
        self.figures = {"memory_size": 16 * GIGABYTE, "max_recommended_working_set_size": 12 * GIGABYTE}
        self.footprint: int | None = 5 * GIGABYTE
        monkeypatch.setattr(device.sys, "platform", "darwin")
        monkeypatch.setattr(device, "on_gpu", lambda: True)
        monkeypatch.setattr(device.ctypes, "CDLL", lambda _: self)
        for name, function in {
            "device_info": lambda _: self.figures,
            "get_active_memory": lambda: self.active,
            "get_cache_memory": lambda: self.cache,
            "set_wired_limit": self.wired.append,
            "clear_cache": self.clear,
        }.items():
            monkeypatch.setattr(mx, name, function)

    def clear(self) -> None:
        self.cleared += 1

    def proc_pid_rusage(self, pid: int, flavor: int, words: Any) -> int:
        """Fills in struct rusage_info_v4: two words of a UUID; the 29th figure is ri_lifetime_max_phys_footprint."""
        if self.footprint is None:
            return -1
        assert (pid, flavor) == (os.getpid(), 4)
        words._obj[2 + 28] = self.footprint
        return 0


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Mac:
    return Mac(monkeypatch)


def test_a_mac_says_by_metal_what_there_is_and_what_is_left(mac: Mac) -> None:
    assert (device.total_memory(), device.available_memory()) == (16 * GIGABYTE, 12 * GIGABYTE)
    mac.active = 4 * GIGABYTE
    assert device.available_memory() == 8 * GIGABYTE
    mac.active = 13 * GIGABYTE
    assert device.available_memory() == 0
    mac.figures = {}
    assert device.total_memory() is None and device.available_memory() is None


def test_a_macs_peak_is_its_footprint(mac: Mac) -> None:
    assert device.peak_memory() == 5 * GIGABYTE
    mac.footprint = None
    assert device.peak_memory() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    ("model", "wired"), [(1, 0), (6, 0), (7, 7 * GIGABYTE + (2 << 30)), (11, 12 * GIGABYTE), (40, 12 * GIGABYTE)]
)
def test_a_large_model_is_wired_with_a_margin_and_never_more_than_metal_allows(
    model: int, wired: int, mac: Mac, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.wire(model * GIGABYTE)
    assert mac.wired == [wired]
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    device.wire(model * GIGABYTE)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(device.sys, "platform", "linux")
    device.wire(model * GIGABYTE)
    assert len(mac.wired) == 1, "nowhere but on Metal"


def test_freed_buffers_are_given_back_where_memory_is_nearly_full(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    mac.active, mac.cache = 5 * GIGABYTE, 4 * GIGABYTE
    device.trim_cache()
    assert mac.cleared == 0
    mac.cache = 5 * GIGABYTE
    device.trim_cache()
    assert mac.cleared == 1
    monkeypatch.setattr(device.sys, "platform", "linux")
    device.trim_cache()
    assert mac.cleared == 1


def test_an_opened_model_is_wired_by_its_size(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    asked: list[int] = []
    monkeypatch.setattr(device, "wire", asked.append)
    model = loading.load(tiny_model_dir, "float32")[0]
    assert asked == [4 * model.config.parameters]
