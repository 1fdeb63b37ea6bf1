"""Trackers: what TensorBoard's own reader and a stand-in for wandb find of runs, resumed ones too."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import runs
from commands import Run
from training_runs import write_data

from elm_mlx.callbacks import Callbacks, Report, TrainingCallback
from elm_mlx.errors import InputError
from elm_mlx.train import trackers
from elm_mlx.train.settings import TrackerName


class Warnings(TrainingCallback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


def tracked(
    name: TrackerName, out: Path, stop_at: int | None = None, resume: bool = False, warnings: Warnings | None = None
) -> None:
    def stop(report: Report) -> None:
        if report.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    heard = Callbacks((runs.Reports(stop), warnings or Warnings()))
    with trackers.tracking([name], out, {"settings": {"rank": 8}}, heard) as callback:
        runs.run(out, runs.settings(), resume=resume, callback=callback)


def written(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Every column of a run's own metrics, the seconds of updates alone."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name not in ("step", "best") and (name != "seconds" or "loss" in line):
                found.setdefault(name, []).append((line["step"], value))
    return found


def check_tensorboard(out: Path) -> Any:
    """TensorBoard's reader has what the metrics have, each step once."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(out / "tensorboard")).Reload()
    expected = written(out)
    assert sorted(events.Tags()["scalars"]) == sorted(expected) and "loss" in expected
    for name, points in expected.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in points], name
        assert [value for _, value in found] == pytest.approx([float(value) for _, value in points], rel=1e-6), name
    return events


def test_tensorboard_reads_what_the_metrics_say(tmp_path: Path) -> None:
    """A run that goes back to a checkpoint has each step once."""
    tracked("tensorboard", tmp_path, stop_at=8)
    tracked("tensorboard", tmp_path, resume=True)
    events = check_tensorboard(tmp_path)
    assert events.Scalars("valid_loss") and events.Scalars("loss")
    assert '"rank": 8' in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_has_what_a_killed_run_had_not_written(tmp_path: Path) -> None:
    """Events wait for some seconds in the writer; of a run that was killed, none came to the file."""
    tracked("tensorboard", tmp_path, stop_at=8)
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:200])
    tracked("tensorboard", tmp_path, resume=True)
    check_tensorboard(tmp_path)


class Wandb(types.ModuleType):
    """As much of wandb as is called: what it was called with."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.begun: list[dict[str, Any]] = []
        self.logged: list[Mapping[str, float]] = []
        self.finished, self._fails_at = 0, fails_at

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **settings: Any) -> Wandb:
        self.begun.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: Mapping[str, float]) -> None:
        if values["step"] == self._fails_at:
            raise ConnectionError("no route to host")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_the_metrics_and_a_resumed_run_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracked("wandb", tmp_path, stop_at=8)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    tracked("wandb", tmp_path, resume=True)
    assert wandb.finished == 2 and [each["project"] for each in wandb.begun] == ["elm-mlx", "mine"]
    assert wandb.begun[0]["id"] == wandb.begun[1]["id"] and wandb.begun[0]["config"] == {"settings": {"rank": 8}}
    for name, points in written(tmp_path).items():
        assert {line["step"]: line[name] for line in wandb.logged if name in line} == dict(points)
    tracked("wandb", tmp_path / "other")
    assert wandb.begun[2]["id"] != wandb.begun[0]["id"]


def test_a_tracker_that_fails_is_told_once_and_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, warnings = Wandb(fails_at=5), Warnings()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracked("wandb", tmp_path, warnings=warnings)
    assert warnings.texts == ["wandb failed, and gets no more of this run: no route to host"]
    assert max(line["step"] for line in wandb.logged) == 4 and len(written(tmp_path)["loss"]) == 12


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named(name: TrackerName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"--report-to {name}: needs a package: pip install 'elm-mlx\[{name}\]'"):
        trackers.check([name])
    trackers.check([])


def test_from_the_command_line(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    (data / "valid.jsonl").rename(data / "test.jsonl")
    options = ("--data", data, "--out", out, "--iters", 2, "--batch-size", 2, "--report-to", "tensorboard")
    code, _, err = run("lora", tiny_model_dir, *options)
    assert code == 0 and len(list((out / "tensorboard").iterdir())) == 1, err
    assert run("lora", "--out", out, "--resume")[0] == 0  # it has ended, and is tested again
    assert [step for step, _ in written(out)["test_loss"]] == [2]
    check_tensorboard(out)
    shutil.rmtree(out / "tensorboard")
    code, _, err = run("lora", "--out", out, "--resume")
    assert code == 0 and len(list((out / "tensorboard").iterdir())) == 1, err
    assert json.loads((out / "run.json").read_text())["settings"]["report_to"] == ["tensorboard"]
    code, _, err = run("lora", "--out", out, "--resume", "--extend", 2)
    assert code == 0 and len(list((out / "tensorboard").iterdir())) == 2, err
    check_tensorboard(out)
    code, _, err = run("lora", tiny_model_dir, *options, "--report-to", "swanlab")
    assert code == 2 and "swanlab" in err
