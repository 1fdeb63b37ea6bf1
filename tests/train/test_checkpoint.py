"""Checkpoints: whole or not at all, exact, the right ones kept, damage and strangers named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from elm_mlx import directories, files
from elm_mlx.directories import checkpoints_of
from elm_mlx.errors import ElmError, InputError
from elm_mlx.train import checkpoint, metrics
from elm_mlx.train.checkpoint import Identity, RunProgress
from elm_mlx.train.metrics import METRICS

IDENTITY = Identity("model", "data", {"rank": 8, "betas": (0.9, 0.95)})
PARAMETERS = {"layers": [{}, {"weight": mx.array([1.5, -0.1])}], "norm": mx.ones((3,), mx.bfloat16)}
OPTIMIZER = {"step": mx.array(7, mx.uint64), "layers": [{}, {"weight": {"m": mx.zeros((2,))}}]}


def save(out: Path, step: int, **values: object) -> Path:
    progress = RunProgress(step=step, random=[[1, 2]], data={"epoch": 3}, loss_mean=0.1 + 0.2)
    return checkpoint.save(out, PARAMETERS, OPTIMIZER, replace(progress, **values), IDENTITY)


def restore(path: Path, identity: Identity = IDENTITY) -> tuple[Any, Any, RunProgress]:
    return checkpoint.restore(path, identity, PARAMETERS, OPTIMIZER)


def test_what_was_saved_is_read_to_the_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 40)
    parameters, optimizer, progress = restore(path)
    assert progress == RunProgress(step=40, random=[[1, 2]], data={"epoch": 3}, loss_mean=0.1 + 0.2)
    assert parameters["layers"][0] == {} and mx.array_equal(
        parameters["layers"][1]["weight"], PARAMETERS["layers"][1]["weight"]
    )
    assert parameters["norm"].dtype == mx.bfloat16 and optimizer["step"].dtype == mx.uint64


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
        checkpoint.prune(tmp_path, 2, best_step=20)
    assert [int(path.name[5:]) for path in checkpoints_of(tmp_path)] == [20, 40, 50]
    newest = checkpoint.to_resume(tmp_path, resume=True)
    assert newest is not None and newest.name == "step-00000050"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3, "nothing half removed is left"


def test_what_a_kill_left_of_one_that_was_written_goes(tmp_path: Path) -> None:
    save(tmp_path, 10)
    left = tmp_path / "checkpoints" / ".step-00000007.tmp-0123abcd"
    left.mkdir()
    (left / "parameters.safetensors").touch()
    others = tmp_path / "checkpoints" / ".step-00000007.tmp-mine"
    others.mkdir()
    with files.new_directory(checkpoint.directory(tmp_path, 9)):
        checkpoint.prune(tmp_path, 2, best_step=None)
        assert not left.exists() and others.exists(), "nobody's but a killed run's goes"
    assert [int(path.name[5:]) for path in checkpoints_of(tmp_path)] == [9, 10], "and one that is being written stays"


def test_one_in_passing_goes_with_the_next_and_takes_no_others_place(tmp_path: Path) -> None:
    for step in (10, 20, 25):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 3, best_step=None)
    save(tmp_path, 30)
    checkpoint.prune(tmp_path, 2, best_step=10, passing=25)
    assert [int(path.name[5:]) for path in checkpoints_of(tmp_path)] == [10, 20, 30]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_arrays", fail)
    with pytest.raises(ElmError, match="No space left"):
        save(tmp_path, 20)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("name", [directories.PARAMETERS, checkpoint.OPTIMIZER, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["absent", "cut", "empty"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 10)
    content = (path / name).read_bytes()
    (path / name).unlink()
    if damage != "absent":
        (path / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(InputError, match=name):
        restore(path)


def test_strangers_are_refused_by_what_differs(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    for identity, complaint in (
        (replace(IDENTITY, model="x"), "another model"), (replace(IDENTITY, data="x"), "other data"),
        (replace(IDENTITY, config={"rank": 8}), r"betas = \[0.9, 0.95\], not None"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=complaint):
            restore(path, identity)
    with pytest.raises(InputError, match=r"does not fit what is trained: layers.1.weight"):
        checkpoint.restore(path, IDENTITY, {**PARAMETERS, "layers": [{}, {"weight": mx.zeros((5,))}]}, OPTIMIZER)
    with pytest.raises(InputError, match=r"optimizer.safetensors: does not fit what is trained: norm"):
        checkpoint.restore(path, IDENTITY, PARAMETERS, {**OPTIMIZER, "norm": mx.zeros((5,))})
    state = json.loads((path / checkpoint.STATE).read_text())
    (path / checkpoint.STATE).write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        restore(path)


@pytest.mark.parametrize(
    ("part", "name", "values"),
    [
        ("progress", "step", [-1, 2.5, "3", None, True, 1 << 60]), ("progress", "tokens", ["x", -1, []]),
        ("progress", "skipped", [11, -1, "1"]),
        ("progress", "seconds", [float("nan"), "1", None]), ("progress", "loss_mean", [float("inf"), {}]),
        ("progress", "best_step", ["1", 2.0]), ("progress", "best_loss", ["1", [1.0]]),
        ("progress", "first_loss", ["1", [1.0], True]), ("progress", "valid_loss", ["1", {}]),
        ("progress", "data", [None, 7, "x", []]),
        ("progress", "random", [None, 3, [1, 2], [[1]], [[1, -2]], [[1, 2.0]], [[1, 1 << 32]], [{"a": 1, "b": 2}]]),
        ("identity", "config", [None, "x", [1]]),
    ],
)  # fmt: skip
def test_a_state_edited_by_hand_is_named(tmp_path: Path, part: str, name: str, values: list[object]) -> None:
    path = save(tmp_path, 10, best_step=5, best_loss=1.5)
    state = json.loads((path / checkpoint.STATE).read_text())
    for value in values:
        edited = state | {part: state[part] | {name: value}}
        (path / checkpoint.STATE).write_text(json.dumps(edited))
        with pytest.raises(InputError, match=rf"state\.json: {name} is damaged"):
            restore(path)
    for edited in ({}, {"format": 1}, state | {part: None}, state | {part: {"unknown": 1}}):
        (path / checkpoint.STATE).write_text(json.dumps(edited))
        with pytest.raises(InputError, match=r"state\.json: is not the state of a checkpoint"):
            restore(path)


def test_losses_of_a_model_that_has_come_apart_are_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 10, first_loss=2.0, valid_loss=math.inf)
    assert restore(path)[2].valid_loss == math.inf


def test_metrics_are_cut_back_with_what_a_kill_left(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 0.1 * step}) for step in range(1, 8)]
    (tmp_path / METRICS).write_text("\n".join(lines) + '\n{"step": 3, "lo')
    metrics.cut(tmp_path, 5)
    assert (tmp_path / METRICS).read_text().splitlines() == lines[:5]
    metrics.cut(tmp_path / "none", 5)
