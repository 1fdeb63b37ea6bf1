"""Both answers to each question, by saying what the machine is."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from elm_mlx import device
from elm_mlx.device import Computation
from elm_mlx.errors import InputError

GIGABYTE = 10**9
STORED = [mx.float32, mx.bfloat16, mx.float16]


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
    assert how.dtype == mx.float32 and how.unpack is packed
    assert how.note == f"{kind} weights computed in float32, faster on a CPU (1.00 GB)"


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
    for gpu in (True, False):
        monkeypatch.setattr(device, "on_gpu", lambda gpu=gpu: gpu)
        for stored in STORED:
            how = device.computation(stored, 10**12, packed, name)
            assert how == Computation(device.DTYPES[name], unpack=packed and name == "float32" and not gpu)


@pytest.mark.parametrize("name", ["float64", "int8", "bf16", "", "FLOAT32"])
def test_another_type_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"no compute dtype '{name}'; there are float32, float16, bfloat16"):
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
    def read(path: Path, *args: object, **options: object) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert device.available_memory() == expected


def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10**7 < device.peak_memory() < 10**12  # Python and MLX alone take some 50 MB
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    assert device.peak_memory() == mx.get_peak_memory()
