"""The state of the machine while it is measured: its power, its heat, other work; as macOS's commands and Linux's files
tell it.

A laptop on battery, in Low Power Mode or hot is slower, and says so nowhere in its figures. Some Macs throttle while
all of this is nominal, so the machine's own speed is measured as well, again and again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

_SYS = Path("/sys")
_PATIENCE = 5.0  # seconds for a command of the system, which takes some milliseconds
_PRESSURE = "com.apple.system.thermalpressurelevel"  # what powermetrics shows, without its privileges
_LEVELS = ("nominal", "moderate", "heavy", "trapping", "sleeping")
_SOURCES = {"AC": "mains", "Battery": "battery", "UPS": "battery"}
_BUSY = 0.5  # of the cores, by other work
_STEADY = 0.85  # of its best, that a machine's speed stays above


@dataclass(frozen=True)
class Conditions:
    """The machine's state at one time; None for what the system doesn't say.

    Attributes:
        when: in UTC, as ISO 8601 writes it.
        power: "mains" or "battery".
        low_power: macOS's Low Power Mode, or Linux's profile `low-power`, is on.
        heat: macOS's thermal pressure: "nominal", "moderate", "heavy", "trapping" or "sleeping".
        throttled: how often heat has slowed the cores since the system started; Linux on Intel's processors.
        matmul, bandwidth: the machine's own speeds just then, in FLOP/s and bytes a second.
    """

    when: str
    power: str | None = None
    low_power: bool | None = None
    heat: str | None = None
    throttled: int | None = None
    matmul: float | None = None
    bandwidth: float | None = None


def read() -> Conditions:
    """Reads the machine's state, all but its speeds."""
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if sys.platform != "darwin":
        return Conditions(when, _supply(), _profile(), throttled=_throttled())
    source = re.search(r"drawing from '(\w+) Power'", said("pmset", "-g", "batt"))
    # `lowpowermode`, or with the High Power Mode of larger MacBooks `powermode`, of which 1 is low and 2 high.
    saving = re.search(r"^\s*(?:lowpowermode|powermode)\s+(\d)", said("pmset", "-g"), re.MULTILINE)
    power = _SOURCES.get(source[1]) if source else None
    return Conditions(when, power, saving[1] == "1" if saving else None, heat())


def heat() -> str | None:
    """The thermal pressure of a Mac; None elsewhere, or where it doesn't say."""
    words = said("notifyutil", "-g", _PRESSURE).split() if sys.platform == "darwin" else []
    known = len(words) == 2 and words[1].isdigit() and int(words[1]) < len(_LEVELS)
    return _LEVELS[int(words[1])] if known else None


def load() -> float:
    """Processes that run or wait, a mean of the last minute: of other programs, as long as ours are not among them."""
    return round(os.getloadavg()[0], 2)


def warnings(readings: Sequence[Conditions], load: float, cores: int | None) -> list[str]:
    """Returns the reasons why figures that were measured meanwhile may be lower than the machine's.

    Args:
        load: before anything was measured.
    """
    lines = []
    if any(each.power == "battery" for each in readings):
        lines.append("it ran on battery, at least for a time")
    if any(each.low_power for each in readings):
        lines.append("it saved power (Low Power Mode, or the profile low-power)")
    hot = [each.heat for each in readings if each.heat not in (None, _LEVELS[0])]
    if hot:
        lines.append(f"it was hot: thermal pressure {max(hot, key=lambda level: _LEVELS.index(str(level)))}")
    counts = [each.throttled for each in readings if each.throttled is not None]
    if counts and max(counts) > min(counts):
        lines.append(f"heat slowed the processor {max(counts) - min(counts):,} times")
    if cores and load > _BUSY * cores:
        lines.append(f"other programs ran when it began, a load of {load:g} on {cores} cores")
    speeds = [each.matmul for each in readings if each.matmul]
    if speeds and min(speeds) < _STEADY * max(speeds):
        lines.append(f"its own matmul speed fell to {min(speeds) / max(speeds):.0%} of its best between cases")
    return lines


def said(*command: str) -> str:
    """Returns what a command of the system prints; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace").strip()


def _supply() -> str | None:
    """Where the power comes from, on Linux: from a battery where no adapter is online, or where one discharges."""
    supplies = [*(_SYS / "class/power_supply").glob("*")]
    online = [_word(each / "online") for each in supplies if _word(each / "type") in ("Mains", "USB")]
    if any(online):
        return "mains" if "1" in online else "battery"
    own = [each for each in supplies if _word(each / "type") == "Battery" and _word(each / "scope") != "Device"]
    return "battery" if any(_word(each / "status") == "Discharging" for each in own) else None


def _profile() -> bool | None:
    profile = _word(_SYS / "firmware/acpi/platform_profile")
    return profile == "low-power" if profile else None


def _throttled() -> int | None:
    counts = [_word(path) for path in (_SYS / "devices/system/cpu").glob("cpu*/thermal_throttle/core_throttle_count")]
    numbers = [int(count) for count in counts if count.isdigit()]
    return sum(numbers) if numbers else None


def _word(path: Path) -> str:
    """Returns the word in a file of the kernel's; nothing where it cannot be read."""
    try:
        return path.read_text("utf-8").strip()
    except (OSError, ValueError):
        return ""
