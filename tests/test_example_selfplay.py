"""The figures of examples/selfplay, by hand; and settings that its commands take."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from elm_mlx.train.settings import DpoSettings, GrpoSettings, LoraSettings

FOLDER = Path(__file__).parent.parent / "examples" / "selfplay"
sys.path.append(str(FOLDER))

import comparison  # noqa: E402


def test_a_gain_is_paired_by_problems() -> None:
    """Four problems of two answers: half a problem more is right in one run, and one and a half in the other."""
    before = [(0, 2), (1, 2), (2, 2), (1, 2)]
    runs = [[(1, 2), (1, 2), (2, 2), (1, 2)], [(1, 2), (2, 2), (2, 2), (2, 2)]]
    mean, low, high = comparison.gain(before, runs)
    assert mean == pytest.approx(25)  # points: of 4 problems, by 50, 25, 0 and 25
    by_problem, by_run = (25**2 + 0 + 25**2 + 0) / 3 / 4, 12.5**2 * 2 / 2
    half = 1.96 * math.sqrt(by_problem + by_run)
    assert (low, high) == pytest.approx((mean - half, mean + half))
    assert comparison.gain(before, [before])[0] == 0


def test_a_table_has_a_row_for_each_way() -> None:
    counts = {("after SFT", 0): [(4, 8), (0, 8)], ("one", 1): [(8, 8), (0, 8)], ("one", 2): [(8, 8), (4, 8)]}
    lines = comparison.table(counts, ["one"])
    assert lines[2].startswith("| after SFT | 25.0% (") and lines[2].endswith("| 25.0% | 50.0% |  |")
    assert lines[3].startswith("| one | 62.5% (") and "| 50.0%, 75.0% | 75.0% | +37.5 points (" in lines[3]


@pytest.mark.parametrize(("name", "kind"), [("rejection", LoraSettings), ("dpo", DpoSettings), ("grpo", GrpoSettings)])
def test_its_files_hold_options_of_the_commands(name: str, kind: type[LoraSettings]) -> None:
    assert yaml.safe_load((FOLDER / f"{name}.yaml").read_text()).keys() <= kind.options().keys()


def test_a_training_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has left an adapter, too."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.delitem(sys.modules, "command", raising=False)
    calls: list[tuple[object, ...]] = []
    stops = iter([SystemExit(130), None])

    def elm(*words: object) -> None:
        calls.append(words)
        (tmp_path / "sft" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sft" / "adapters.safetensors").touch()
        if (stop := next(stops)) is not None:
            raise stop

    train = runpy.run_path(str(FOLDER / "run.py"))["train"]
    monkeypatch.setitem(train.__globals__, "elm", elm)
    with pytest.raises(SystemExit):
        train("lora", tmp_path / "sft", "base")
    train("lora", tmp_path / "sft", "base")
    train("lora", tmp_path / "sft", "base")
    assert ["--resume" in words for words in calls] == [False, True]
