"""The order of things, with sides that only count: in turn, warmed up, kept when interrupted, reasons given."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elm_mlx import device
from elm_mlx.bench import conditions, machine, results, runner, sides
from elm_mlx.bench.conditions import Conditions
from elm_mlx.bench.results import Speeds
from elm_mlx.bench.runner import run
from elm_mlx.bench.sides import Programs, Unavailable
from elm_mlx.bench.suites import About, Case, Figures, Measured, Suite
from elm_mlx.errors import InputError

Log = list[tuple[Any, ...]]


class Counting:
    """A side whose speed is how often it was asked, and which writes its name's length over and over."""

    def __init__(self, name: str, log: Log, death: Callable[[str, int], BaseException | None]):
        self.name, self.about, self._log, self._death = name, About(name, "float32", flops=100), log, death
        self._asked, self._alive = 0, True

    def measure(self, case: Case) -> Measured:
        self._asked += 1
        self._log.append((self.name, case.prompt, case.new))
        error = self._death(self.name, self._asked)
        if error is not None:
            self._alive = not isinstance(error, Unavailable) or "one text" in str(error)
            raise error
        figures = Figures(1.0 / self._asked, float(self._asked), float(self._asked), 10**6)
        return figures, [1, len(self.name)] * (case.new // 2)

    def alive(self) -> bool:
        return self._alive

    def close(self) -> None:
        self._log.append((self.name, "closed"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Log]:
    def install(death: Callable[[str, int], BaseException | None] = lambda name, asked: None) -> Log:
        log: Log = []

        def start(name: str, path: Path, dtype: str | None, programs: Programs) -> Counting:
            if name == "pytorch":
                raise Unavailable("not installed")
            log.append((name, "started", dtype))
            return Counting(name, log, death)

        monkeypatch.setattr(sides, "start", start)
        monkeypatch.setattr(runner, "_PAUSE", 0.0)
        monkeypatch.setattr(machine, "measure", lambda dtype: Speeds({dtype: 1e9}, 1e9))
        return log

    return install


def suite(model: Path, *, cases: int = 1, **more: Any) -> Suite:
    made = tuple(Case(str(model), "stored", 16 + i, 20) for i in range(cases))
    return Suite("small", made, **{"against": ("naive", "pytorch"), "repeats": 2, "norms": False, **more})


def test_sides_take_turns_after_a_first_one_that_does_not_count(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path
) -> None:
    log, rows = counted(), []
    found = run(suite(tiny_model_dir), Programs(), tmp_path / "out" / "a.json", on_row=rows.append)
    assert log == [
        ("ours", "started", None), ("naive", "started", "float32"), ("ours", 16, 8), ("naive", 16, 8), ("ours", 16, 20),
        ("naive", 16, 20), ("ours", 16, 20), ("naive", 16, 20), ("ours", "closed"), ("naive", "closed"),
    ]  # fmt: skip
    (row,) = found.rows
    assert rows == [row] and found.complete and row.skipped == {"pytorch": "not installed"}
    assert [each.prompt for each in row.figures["ours"]] == [2.0, 3.0] and row.alike == {"naive": 1}
    assert found.speeds == Speeds({"float32": 1e9}, 1e9) and found.machine["cores"]
    assert results.load(tmp_path / "out" / "a.json") == found


def test_an_interrupt_keeps_what_was_measured(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path
) -> None:
    log = counted(lambda name, asked: KeyboardInterrupt() if asked == 5 else None)
    found = run(suite(tiny_model_dir, cases=3), Programs(), tmp_path / "a.json")
    assert not found.complete and [row.case.prompt for row in found.rows] == [16]
    assert log[-2:] == [("ours", "closed"), ("naive", "closed")]
    assert results.load(tmp_path / "a.json") == found


def test_the_same_command_goes_on_amid_a_case(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path
) -> None:
    counted(lambda name, asked: KeyboardInterrupt() if (name, asked) == ("naive", 6) else None)
    asked, path = suite(tiny_model_dir, cases=3, repeats=3), tmp_path / "a.json"
    first = run(asked, Programs(), path, note="on a desk")
    assert [len(row.figures["naive"]) for row in first.rows] == [3] and not first.rows[0].done(
        replace(asked, repeats=4)
    )
    counted(lambda name, asked: KeyboardInterrupt() if (name, asked) == ("naive", 4) else None)
    second = run(asked, Programs(), path)
    assert [len(row.figures["naive"]) for row in second.rows] == [3, 2] and second.note == "on a desk"
    log, said = counted(), []
    third = run(asked, Programs(), path, on_note=said.append)
    assert third.complete and third.when == first.when and all(row.done(asked) for row in third.rows)
    assert [[figures.prompt for figures in row.figures["ours"]] for row in third.rows] == [
        [2, 3, 4],
        [2, 3, 2],
        [4, 5, 6],
    ]
    assert [prompt for name, prompt, *_ in log if name == "ours" and prompt not in ("started", "closed")] == [
        17
    ] * 2 + [18] * 4
    assert [len(row.conditions) for row in third.rows] == [2, 3, 2]
    assert said[-1] == f"{path} has 1 of 3 cases, and is gone on with; remove it to measure anew"
    assert results.load(path) == third


@pytest.mark.parametrize("change", ["suite", "commit", "machine", "complete", "gguf"])
def test_what_is_another_run_is_measured_anew(
    counted: Callable[..., Log], change: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, path = suite(tiny_model_dir, cases=2), tmp_path / "a.json"
    counted(lambda name, count: KeyboardInterrupt() if count == 5 and change != "complete" else None)
    run(asked, Programs(), path)
    if change == "suite":
        asked = replace(asked, against=("naive",))
    elif change in ("commit", "machine"):
        other = {"commit": lambda: "0" * 40, "describe": lambda: {"processor": "another", "cores": "2"}}
        name = {"commit": "commit", "machine": "describe"}[change]
        monkeypatch.setattr(machine, name, other[name])
    log = counted()
    assert run(asked, Programs(gguf=tmp_path / "other.gguf") if change == "gguf" else Programs(), path).complete
    assert [prompt for name, prompt, *_ in log if name == "ours" and isinstance(prompt, int)] == [16] * 3 + [17] * 3


def test_a_mac_that_is_hot_cools_before_each_case(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heat, waited = iter(["heavy", "moderate", "nominal", None, "heavy", *["heavy"] * 1000]), []
    monkeypatch.setattr(conditions, "heat", lambda: next(heat))
    monkeypatch.setattr(runner, "_LOOK", 0.001)
    monkeypatch.setattr(runner, "_COOLING", 0.05)
    counted()
    found = run(
        suite(tiny_model_dir, cases=3),
        Programs(),
        tmp_path / "a.json",
        on_progress=lambda what, *_: waited.append(what),
    )
    assert found.complete  # the third case waited in vain
    cooling = [number for number, what in enumerate(waited) if what.startswith("waiting until")]
    assert len(cooling) > 2 and cooling[1] == cooling[0] + 1


def test_the_machines_state_and_speed_are_kept_before_and_after_each_case(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted()
    speeds = iter([4e9, 5e9, 3e9])
    monkeypatch.setattr(machine, "measure", lambda dtype: Speeds({dtype: next(speeds)}, 1e9))
    monkeypatch.setattr(conditions, "read", lambda: Conditions("2026-01-02T03:04:05+00:00", "battery"))
    said: list[str] = []
    found = run(suite(tiny_model_dir, cases=2), Programs(), tmp_path / "a.json", on_note=said.append)
    first, second = found.rows
    assert [each.matmul for each in (*first.conditions, *second.conditions)] == [4e9, 5e9, 5e9, 3e9]
    assert found.speeds.matmul == {"float32": 5e9}
    assert {"it ran on battery, at least for a time", "its own matmul speed fell to 60% of its best between cases"} <= {
        *found.warnings
    }
    assert "the machine may be slower than it can be: it ran on battery, at least for a time" in said


def test_a_side_that_dies_is_left_out_from_then_on(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path
) -> None:
    counted(lambda name, asked: Unavailable("was killed") if (name, asked) == ("naive", 2) else None)
    found = run(suite(tiny_model_dir, cases=2), Programs(), tmp_path / "a.json")
    for row in found.rows:
        assert set(row.figures) == {"ours"} and len(row.figures["ours"]) == 2
        assert row.skipped == {"pytorch": "not installed", "naive": "was killed"}


def test_a_side_that_cannot_do_a_case_does_the_next(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path
) -> None:
    counted(lambda name, asked: Unavailable("takes one text at a time") if (name, asked) == ("naive", 1) else None)
    first, second = run(suite(tiny_model_dir, cases=2), Programs(), tmp_path / "a.json").rows
    assert "naive" in first.skipped and set(second.figures) == {"ours", "naive"}


def test_what_does_not_fit_is_a_row_with_a_reason(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = counted()
    monkeypatch.setattr(device, "available_memory", lambda: 10**9)
    big = Case("OpenELM-3B", "bfloat16", 16, 4)
    asked = Suite("small", (big, *suite(tiny_model_dir).cases), ("naive",), 1, norms=False)
    first, second = run(asked, Programs(), tmp_path / "a.json").rows
    assert first.case == big and re.match("would take about (7|14)", first.skipped["ours"]) and not first.figures
    assert second.figures and ("ours", "started", None) in log


def test_a_case_longer_than_the_context_is_left_out(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path
) -> None:
    counted()
    long = Case(str(tiny_model_dir), "stored", 500, 20)
    (row,) = run(Suite("small", (long,), ("naive",), 1, norms=False), Programs(), tmp_path / "a.json").rows
    assert row.skipped["ours"] == "longer than the model's context of 512 tokens" and not row.figures


def test_what_was_measured_before_stays_until_there_is_something_new(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path
) -> None:
    counted()
    path = tmp_path / "a.json"
    kept = run(suite(tiny_model_dir), Programs(), path)
    long = Case(str(tiny_model_dir), "stored", 500, 20)
    assert not run(Suite("small", (long,), (), 1, norms=False), Programs(), path).measured
    assert results.load(path) == kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_norms_are_measured_for_each_shape_once(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path
) -> None:
    counted()
    found = run(suite(tiny_model_dir, cases=2, norms=True), Programs(), tmp_path / "a.json")
    assert [norm.shape for norm in found.norms] == [(1, 1, 64), (1, 16, 64), (1, 17, 64)]
    assert all(len(norm.fused) == len(norm.naive) > 1 for norm in found.norms)


def test_nothing_is_started_for_a_place_that_cannot_be_written(
    counted: Callable[..., Log], tiny_model_dir: Path, tmp_path: Path
) -> None:
    log = counted()
    (tmp_path / "a.json").mkdir()
    with pytest.raises(Exception, match=r"a\.json"):
        run(suite(tiny_model_dir), Programs(), tmp_path / "a.json")
    with pytest.raises(InputError, match="nowhere"):
        run(Suite("small", (Case("nowhere", "stored", 1, 1),), ()), Programs(), tmp_path / "b.json")
    assert log == [] and not (tmp_path / "b.json").exists()


def test_scratch_is_removed(counted: Callable[..., Log], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(lambda name, asked: KeyboardInterrupt())
    monkeypatch.setattr(runner.measured_models, "prepare", lambda model, precision, scratch: _written(scratch))
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    asked = Suite("small", (Case("OpenELM-270M", "bfloat16", 8, 2),), (), 1, norms=False)
    assert not run(asked, Programs(), tmp_path / "a.json").complete
    assert not any((tmp_path / "temporary").iterdir())


def _written(scratch: Path) -> Path:
    (scratch / "model.safetensors").write_bytes(b"weights")
    return scratch


def test_a_gguf_is_one_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    case = Case(str(tiny_model_dir), "stored", 16, 4)
    two = Suite("small", (case, Case("OpenELM-270M", "4bit", 16, 4)), ("llama.cpp",))
    with pytest.raises(InputError, match=r"--gguf .*a\.gguf: is one model"):
        run(two, Programs(gguf=tmp_path / "a.gguf"), tmp_path / "a.json")
