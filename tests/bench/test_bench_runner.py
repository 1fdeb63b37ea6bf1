"""The order of things, with sides that only count: in turn, warmed up, kept when interrupted, reasons given."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elm_mlx import device
from elm_mlx.bench import machine, results, runner, sides
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
