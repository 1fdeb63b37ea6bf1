"""The fuzz harness itself: each outcome is told from the others, and a case can be made again."""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import fuzzing
import pytest
from fuzzing import Kind, json_lines, json_values, raw_bytes, safetensors_header

from elm_mlx.errors import ElmError, InputError

VALUE = {"a": [1, 2.5, {"b": None}], "c": "text", "d": {"e": True}}


def kind(use: Callable[[Path], object]) -> Kind:
    return Kind("test", lambda path: (path / "a").write_bytes(b"good"), {"a": raw_bytes}, use)


def raising(error: BaseException) -> Callable[[Path], object]:
    def use(path: Path) -> None:
        raise error

    return use


def hold(path: Path) -> None:
    with mmap.mmap(-1, 100 << 20) as held:  # not from the heap, which may have room that was freed before
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (raising(ValueError("odd\nlines")), "ValueError at test_fuzzing.py:"),
        (raising(KeyboardInterrupt()), "KeyboardInterrupt at"),
        (raising(InputError(" ")), "an error that says nothing"),
        (lambda path: os.kill(os.getpid(), signal.SIGSEGV), "SIGSEGV"),
        (lambda path: os._exit(3), "the child ended with 3"),
        (lambda path: signal.pause(), "no end within"),
        (lambda path: [0 for _ in iter(int, 1)], "more than .* s"),
        (hold, "MB of memory"),
    ],
)
def test_what_is_wrong_is_told_and_the_rest_goes_on(
    use: Callable[[Path], object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "CPU_SECONDS", 0.2 if "more than" in says else 20)
    monkeypatch.setattr(fuzzing, "WALL_SECONDS", 1 if "no end" in says else 60)
    monkeypatch.setattr(fuzzing, "GROWTH_BYTES", 50 << 20)
    wrong = kind(use)
    there = Kind(wrong.name, wrong.write, wrong.damages, lambda path: use(path) if _drawn(path) else None)
    counts = fuzzing.run(there, cases=6)
    assert counts.ok + len(counts.wrong) == 6 and counts.ok and counts.wrong
    for what in counts.wrong.values():
        assert re.search(says, what), what


def _drawn(path: Path) -> bool:
    """Of some inputs, and not of others."""
    return sum((path / "a").read_bytes()) % 3 == 0


def test_answers_and_refusals_are_counted() -> None:
    assert fuzzing.run(kind(lambda path: 7), cases=5).ok == 5
    counts = fuzzing.run(kind(raising(ElmError("a line"))), cases=5)
    assert counts.refused == 5 and not counts.wrong and counts.peak > 1 << 20


def test_a_case_is_the_same_again_and_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"good")
    here = kind(lambda path: None)
    assert fuzzing.damaged(here, tmp_path, 1, 5) == fuzzing.damaged(here, tmp_path, 1, 5)
    assert len({fuzzing.damaged(here, tmp_path, 1, number)[1] for number in range(50)}) > 20

    def use(path: Path) -> None:
        (path / "left").touch(exist_ok=False)

    assert fuzzing.run(kind(use), cases=5).ok == 5


def test_damages_damage_and_are_mostly_still_what_they_were() -> None:
    draw = random.Random(0)
    text = json.dumps(VALUE).encode()
    header = len(text).to_bytes(8, "little") + text + b"data"
    changed = [json_values(text, draw) for _ in range(300)]
    assert sum(_is_json(each) for each in changed) > 250
    assert sum(not _is_json(each) or json.loads(each) != VALUE for each in changed) > 250
    assert len({*changed}) > 150
    assert sum(raw_bytes(text, draw) != text for _ in range(300)) > 250
    lines = [json_lines(text + b"\n" + text + b"\n", draw) for _ in range(300)]
    assert sum(_is_json(each.split(b"\n")[0]) for each in lines) > 150
    headers = [safetensors_header(header, draw) for _ in range(300)]
    assert all(each.endswith(b"data") for each in headers)
    assert sum(_is_json(each[8 : 8 + int.from_bytes(each[:8], "little")]) for each in headers) > 200


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode("utf-8", "surrogatepass"))
    except ValueError:
        return False
    return True
