"""What a training run shows as it goes."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from elm_mlx.callbacks import Report
from elm_mlx.cli import training_display
from elm_mlx.cli.training_display import TrainingDisplay, bar_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def update(step: int, seconds: float) -> Report:
    return Report(step=step, loss=3.0, tokens_per_second=100 / seconds, seconds=seconds, memory=1_000_000)


def test_the_time_that_is_left_is_not_that_of_a_single_slow_update(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_display, "_PAUSE", -1.0)
    with TrainingDisplay(100) as shown:
        for step in range(1, 50):
            shown.report(update(step, seconds=1.0))
        shown.report(update(50, seconds=11.0))
    left = [re.search(r", ([^,]*) left$", line) for line in capsys.readouterr().out.splitlines()]
    assert [match and match[1] for match in left[-2:]] == ["51 s", "1 min 40 s"]  # a tenth of 10 s more, 50 times


def test_a_first_update_that_waits_for_its_texts_is_no_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_display, "_PAUSE", -1.0)
    with TrainingDisplay(100) as shown:
        shown.ready(1.0, 100)
        shown.report(update(1, seconds=20.0))
        shown.report(update(2, seconds=2.0))
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith("1 min 39 s left")  # as the trial said
    assert "50 tokens/s" in second and second.endswith("3 min 16 s left")


def test_without_a_terminal_what_is_being_done_keeps_no_update_from_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Updates take 15 s, the first 12 of them for sampling, whose line comes 4 s before the update's, or less."""
    now = 0.0
    monkeypatch.setattr(training_display.time, "monotonic", lambda: now)
    with TrainingDisplay(4) as shown:
        for step in range(1, 4):
            for _ in range(12):
                now += 1
                shown.progress("sampling answers", 1, 128)
            now += 3
            shown.report(update(step, seconds=15.0))
    said = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [each for step in (1, 2, 3) for each in ("sampling answers", f"step {step} of 4")]


def test_the_share_of_the_machines_speed_is_shown_where_it_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_display, "_PAUSE", -1.0)
    for reached, text in ((None, "100 tokens/s, 1 MB"), (0.384, "100 tokens/s, 38% of matmul speed, 1 MB")):
        with TrainingDisplay(3) as shown:
            shown.report(replace(update(1, seconds=1.0), matmul_share=reached))
        assert text in capsys.readouterr().out


LORA = ["loss 4.351", "1,980 tokens/s", "32% of matmul speed", "637.4 MB"]
DPO = ["loss 0.352", "margin 1.23", "accuracy 0.75", "1,980 tokens/s", "32% of matmul speed", "637.4 MB"]


@pytest.mark.parametrize(
    ("told", "width", "shown"),
    [
        (LORA, 140, 4), (LORA, 80, 2), (LORA, 60, 1), (LORA, 34, 0),
        (DPO, 140, 6), (DPO, 80, 3), (DPO, 60, 2),
        (["reference of pairs: 12,345 of 20,000"], 64, 1),  # without a bar
    ],
)  # fmt: skip
def test_a_narrow_terminal_is_told_what_matters_most(told: list[str], width: int, shown: int) -> None:
    out = io.StringIO()
    Console(width=width, file=out).print(bar_line(width, 1_234, 10_000, told, "1:02:03"))
    (line,) = out.getvalue().splitlines()
    assert len(line) <= width
    assert line.startswith("1,234/10,000 ") and line.rstrip().endswith(" 1:02:03 left")
    assert ", ".join(told[:shown]) in line and not any(each in line for each in told[shown:])
    assert any(each in line for each in "━╸") == (width != 64)


def test_a_bar_says_what_is_done_and_after_it_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def line() -> str:
        out = io.StringIO()
        Console(width=100, file=out).print(shown._line(100))
        return " ".join(out.getvalue().replace("━", "").replace("╸", "").split())

    monkeypatch.setattr(sys, "stdout", Terminal())
    with TrainingDisplay(100) as shown:
        shown.progress("reading the model")
        assert line() == "0/100 reading the model -:--:-- left"
        shown.resumed(40)
        assert line() == "40/100 reading the model -:--:-- left"
        shown.ready(2.0, 60)
        shown.report(update(41, seconds=2.0))
        assert line() == "41/100 loss 3.000, 50 tokens/s, 1 MB 0:01:58 left"
        shown.progress("validating")
        assert line() == "41/100 validating 0:01:58 left"
        shown.report(Report(step=41, valid_loss=2.0))
        assert line() == "41/100 loss 3.000, 50 tokens/s, 1 MB 0:01:58 left"


def test_a_bar_at_its_end_says_that_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with TrainingDisplay(2) as shown:
        shown.ready(0.5, 2)
        shown.report(update(1, seconds=0.5))
        shown.report(update(2, seconds=0.5))
    written = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "time      about 1.0 s and validations, 0.5 s an update" in written
    last = [line for line in re.split(r"[\r\n]+", written) if line.startswith("2/2")][-1]
    assert last.rstrip().endswith("0:00:00 left")
