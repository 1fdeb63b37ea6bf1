"""The state of a machine as macOS's commands and Linux's files tell it, what is made of it, and silent systems."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from elm_mlx.bench import conditions, machine
from elm_mlx.bench.conditions import Conditions

NOW = "2026-01-02T03:04:05+00:00"
PRESSURE = "notifyutil -g com.apple.system.thermalpressurelevel"
Answers = dict[str, str]  # what is printed, by the command's words
Install = Callable[[Answers], None]
# As a MacBook Pro prints them.
LAPTOP: Answers = {
    "pmset -g batt": "Now drawing from 'AC Power'\n -InternalBattery-0 (id=5308515)\t100%; charged; 0:00 remaining "
    "present: true",
    "pmset -g": "System-wide power settings:\nCurrently in use:\n standby              1\n lowpowermode         0\n"
    " sleep                1 (sleep prevented by powerd)",
    "notifyutil -g com.apple.system.thermalpressurelevel": "com.apple.system.thermalpressurelevel 0",
    "sysctl -n hw.model": "Mac14,6",
    "sysctl -n hw.perflevel0.physicalcpu": "8",
    "sysctl -n hw.memsize": "68719476736",
    "ioreg -r -d 1 -c AGXAccelerator": '+-o AGXAcceleratorG14X\n    {\n      "gpu-core-count" = 38\n'
    '      "model" = "Apple M2 Max"\n    }',
}  # fmt: skip


@pytest.fixture
def macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes this system say that it is macOS, with commands that print what is given, and fail at other words."""
    commands = tmp_path / "commands"
    commands.mkdir()
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "darwin")

    def install(answers: Answers) -> None:
        for name in ("pmset", "notifyutil", "sysctl", "ioreg"):
            cases = [
                f"{shlex.quote(words.removeprefix(f'{name} '))}) printf '%s\\n' {shlex.quote(text)} ;;"
                for words, text in answers.items()
                if words.split()[0] == name
            ]
            script = commands / name
            script.write_text('#!/bin/sh\ncase "$*" in\n' + "\n".join([*cases, "*) exit 1 ;;"]) + "\nesac\n")
            script.chmod(0o755)

    return install


def seen(reading: Conditions) -> Conditions:
    """A reading, at a time that tests know."""
    assert len(reading.when) == len(NOW) and reading.when.endswith("+00:00")
    return replace(reading, when=NOW)


def test_a_laptop_on_mains(macos: Install) -> None:
    macos(LAPTOP)
    assert seen(conditions.read()) == Conditions(NOW, "mains", low_power=False, heat="nominal")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [({"pmset -g batt": "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t54%; discharging"},
      {"power": "battery"}),
     ({"pmset -g batt": "Now drawing from 'UPS Power'"}, {"power": "battery"}),
     ({"pmset -g": "Currently in use:\n lowpowermode         1"}, {"low_power": True}),
     ({"pmset -g": "Currently in use:\n powermode            1"}, {"low_power": True}),
     ({"pmset -g": "Currently in use:\n powermode            2"}, {"low_power": False}),
     ({"pmset -g": "Currently in use:\n sleep                0"}, {"low_power": None}),
     ({PRESSURE: "com.apple.system.thermalpressurelevel 2"}, {"heat": "heavy"}),
     ({PRESSURE: "com.apple.system.thermalpressurelevel 17"}, {"heat": None}),
     ({PRESSURE: "not found"}, {"heat": None})],
)  # fmt: skip
def test_a_mac_that_is_slowed(macos: Install, answers: Answers, expected: dict[str, object]) -> None:
    macos(LAPTOP | answers)
    assert seen(conditions.read()) == replace(Conditions(NOW, "mains", False, "nominal"), **expected)  # type: ignore[arg-type]


def test_a_mac_that_says_nothing_or_hangs(macos: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    macos({})
    assert seen(conditions.read()) == Conditions(NOW)
    monkeypatch.setattr(conditions, "_PATIENCE", 0.2)
    hanging = tmp_path / "commands" / "pmset"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    began = time.monotonic()
    assert conditions.said("pmset", "-g") == "" and time.monotonic() - began < 20
    assert conditions.said(str(tmp_path / "no-such-command")) == ""


def test_a_macs_cores_and_memory_are_told(macos: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    macos(LAPTOP)
    monkeypatch.setattr(machine.device, "on_gpu", lambda: True)
    monkeypatch.setattr(machine.mx, "device_info", lambda: {"device_name": "Apple M2 Max", "memory_size": 68719476736})
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    told = machine.describe()
    assert {label: told[label] for label in ("processor", "model", "performance cores", "GPU cores", "memory")} == {
        "processor": "Apple M2 Max", "model": "Mac14,6", "performance cores": "8", "GPU cores": "38", "memory": "69 GB",
    }  # fmt: skip
    assert told["system"].startswith("macOS 26.1, ") and told["computes on"] == "GPU" and "BLAS" not in told
    macos({})
    assert not {"model", "performance cores", "GPU cores"} & {*machine.describe()}


def kernel(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


BATTERY = {"class/power_supply/BAT0/type": "Battery", "class/power_supply/BAT0/status": "Discharging"}
MOUSE = {f"class/power_supply/mouse/{name}": text for name, text in
         (("type", "Battery"), ("scope", "Device"), ("status", "Discharging"))}  # fmt: skip
ADAPTER = {"class/power_supply/AC/type": "Mains", "class/power_supply/AC/online": "1"}
UNPLUGGED = {"class/power_supply/AC/type": "Mains", "class/power_supply/AC/online": "0"}
PROFILE = "firmware/acpi/platform_profile"
THROTTLED = "devices/system/cpu/cpu{}/thermal_throttle/core_throttle_count"


@pytest.mark.parametrize(
    ("files", "expected"),
    [({}, {}), (ADAPTER | BATTERY, {"power": "mains"}), (UNPLUGGED | BATTERY, {"power": "battery"}),
     (BATTERY, {"power": "battery"}), (MOUSE, {}), (MOUSE | ADAPTER, {"power": "mains"}),
     ({PROFILE: "low-power"}, {"low_power": True}), ({PROFILE: "balanced"}, {"low_power": False}),
     ({THROTTLED.format(0): "3", THROTTLED.format(1): "4"}, {"throttled": 7})],
)  # fmt: skip
def test_linux_says_it_in_files(
    files: dict[str, str], expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions.sys, "platform", "linux")
    monkeypatch.setattr(conditions, "_SYS", kernel(tmp_path, files))
    assert seen(conditions.read()) == replace(Conditions(NOW), **expected)  # type: ignore[arg-type]


def test_what_slows_a_machine_is_named_and_nothing_else() -> None:
    calm = Conditions(NOW, "mains", False, "nominal", 5, matmul=1e12)
    assert conditions.warnings([calm, Conditions(NOW), replace(calm, matmul=0.9e12)], 1.0, 4) == []
    assert conditions.warnings([], 99.0, None) == []
    for slow, load, expected in (
        (replace(calm, power="battery"), 0.0, "it ran on battery, at least for a time"),
        (replace(calm, low_power=True), 0.0, "it saved power (Low Power Mode, or the profile low-power)"),
        (replace(calm, heat="heavy"), 0.0, "it was hot: thermal pressure heavy"),
        (replace(calm, throttled=1_205), 0.0, "heat slowed the processor 1,200 times"),
        (replace(calm, matmul=7e11), 0.0, "its own matmul speed fell to 70% of its best between cases"),
        (calm, 2.5, "other programs ran when it began, a load of 2.5 on 4 cores"),
    ):
        assert conditions.warnings([calm, slow], load, 4) == [expected]
    assert conditions.warnings([replace(calm, heat=each) for each in ("moderate", "trapping", "heavy")], 0.0, 4) == [
        "it was hot: thermal pressure trapping"
    ]
