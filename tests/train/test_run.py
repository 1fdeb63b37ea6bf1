"""Runs: they learn, count exactly, go on to the bit after any death, and refuse to go on with something else."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import runs
from mlx.utils import tree_flatten

from elm_mlx import device, directories
from elm_mlx.callbacks import Report, TrainingCallback
from elm_mlx.data.batches import Batch
from elm_mlx.directories import checkpoints_of
from elm_mlx.errors import ElmError, InputError
from elm_mlx.train import checkpoint
from elm_mlx.train import run as training
from elm_mlx.train.loop_settings import Schedule
from elm_mlx.train.run import Run
from elm_mlx.train.step import Step
from elm_mlx.train.throughput import Meter


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def close(mine: Any, reference: Any, tolerance: float = 1e-4) -> None:
    mine, reference = flat(mine), flat(reference)
    assert mine.keys() == reference.keys()
    for name, value in reference.items():
        scale = max(float(mx.abs(value).max()), 1e-3)
        np.testing.assert_allclose(mine[name], value, atol=tolerance * scale, err_msg=name)


def plain_gradients(model: Any, batch: Batch) -> tuple[mx.array, Any]:
    def loss(model: Any) -> mx.array:
        total = mx.array(0.0)
        for row in range(len(batch.inputs)):
            numbers = np.ones_like(batch.inputs[row]) if batch.segments is None else batch.segments[row]
            for number in range(1, numbers.max() + 1):
                own = numbers == number
                logits = model(mx.array(batch.inputs[row][own])[None])[0]
                each = nn.losses.cross_entropy(logits, mx.array(batch.targets[row][own]))
                total = total + (each * mx.array(batch.trained[row][own])).sum()
        return total

    return nn.value_and_grad(model, loss)(model)


@pytest.mark.parametrize("packed", [True, False])
def test_a_step_has_the_gradients_of_each_example_by_itself(packed: bool) -> None:
    model = runs.model()
    batch = next(runs.batches(packed, size=4))
    expected, truth = plain_gradients(model, batch)
    step = Step(model, runs.settings())
    loss, gradients, count = step.gradients(batch)
    assert count == batch.trained.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert step.loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    close(gradients, truth)


def test_recomputing_blocks_changes_nothing() -> None:
    batch = next(runs.batches())
    results = []
    for again in (False, True):
        model = runs.model()
        step = Step(model, runs.settings(grad_checkpoint=again))
        loss, gradients, _ = step.gradients(batch)
        step.apply(gradients, mx.array(1.0), 10, 1e-3)
        results.append((loss.item(), model.trainable_parameters()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    close(results[1][1], results[0][1])


def test_only_what_is_not_frozen_moves() -> None:
    model = runs.model()
    model.freeze()
    model.layers[1].ffn.unfreeze()
    before = flat(model.parameters())
    step = Step(model, runs.settings(optimizer="adafactor"))
    _, gradients, count = step.gradients(next(runs.batches()))
    step.apply(gradients, mx.array(1.0), count, 1e-2)
    moved = {name for name, value in flat(model.parameters()).items() if not mx.array_equal(value, before[name])}
    assert moved == {"transformer.layers.1.ffn.proj_1.weight", "transformer.layers.1.ffn.proj_2.weight"}


def test_parameters_stay_wide_where_the_computation_is_narrow() -> None:
    model = runs.model()
    step = Step(model, runs.settings(), compute_dtype=mx.bfloat16)
    before = flat(model.parameters())
    wide = Step(runs.model(), runs.settings()).gradients(next(runs.batches()))
    loss, gradients, count = step.gradients(next(runs.batches()))
    assert loss.item() == pytest.approx(wide[0].item(), rel=0.05) and loss.item() != wide[0].item()
    step.apply(gradients, mx.array(1.0), count, 1e-6)
    after = flat(model.parameters())
    assert all(value.dtype == mx.float32 for value in after.values())
    name = "transformer.layers.0.ffn.proj_1.weight"
    assert 0 < mx.abs(after[name] - before[name]).max().item() < 2e-6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_fills_up_under_a_run_is_said_with_its_file(tmp_path: Path) -> None:
    """It ends, and goes on from its last checkpoint, to the same losses, where there is room again."""
    out, path = tmp_path / "out", tmp_path / "out" / "metrics.jsonl"
    runs.run(tmp_path / "whole")

    def fill(report: Report) -> None:
        if report.step == 5 and report.loss is not None:
            path.rename(tmp_path / "kept")
            path.symlink_to("/dev/full")

    with pytest.raises(ElmError, match=r"metrics\.jsonl: cannot be written: No space left on device; --resume goes on"):
        runs.run(out, on_report=fill)
    path.unlink()
    (tmp_path / "kept").rename(path)
    runs.run(out, resume=True)
    values = [[json.loads(line) for line in (each / "metrics.jsonl").open()] for each in (tmp_path / "whole", out)]
    first, second = ([(v["step"], v.get("loss", v.get("valid_loss"))) for v in lines] for lines in values)
    assert first == second


def test_a_run_learns_and_leaves_its_metrics_and_checkpoints(tmp_path: Path) -> None:
    seen: list[Report] = []
    result = runs.run(tmp_path, runs.settings(60, eval_every=20, save_every=25, keep=1), on_report=seen.append)
    assert not result.interrupted and result.progress.step == 60
    updates = [report for report in seen if report.loss is not None]
    valid = [report.valid_loss for report in seen if report.valid_loss is not None]
    assert len(updates) == 60 and len(valid) == 4 and valid[-1] < valid[0] - 1
    assert updates[0].loss is not None and updates[-1].loss is not None and updates[-1].loss < updates[0].loss - 1
    assert result.progress.tokens == sum(report.tokens or 0 for report in updates)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [report.step for report in seen]
    assert lines[1]["learning_rate"] == pytest.approx(3e-3 / 2)
    assert {path.name for path in checkpoints_of(tmp_path)} == {result.last.name, result.best.name}  # type: ignore[union-attr]
    assert result.progress.best_loss == min(valid[1:])


def test_accumulated_batches_are_one_large_one(tmp_path: Path) -> None:
    """Token by token: batches of different counts have no more say than their tokens."""
    finals = []
    for size, accumulate in ((4, 1), (1, 4)):
        data, model = runs.examples(4), runs.model()
        runs.train(
            model, runs.batches(size=size, data=data, packed=False), None,
            runs.settings(5, accumulate=accumulate, rate=1e-3), tmp_path / str(size), runs.IDENTITY,
        )  # fmt: skip
        finals.append([loss for _, loss, _ in runs.losses(tmp_path / str(size))])
    np.testing.assert_allclose(finals[0], finals[1], rtol=1e-4)


def test_resuming_gives_the_losses_of_an_uninterrupted_run(tmp_path: Path) -> None:
    runs.run(tmp_path / "whole", trained=runs.model_with_dropout())

    def stop(report: Report) -> None:
        if report.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    result = runs.run(tmp_path / "halves", trained=runs.model_with_dropout(), on_report=stop)
    assert result.interrupted and result.last.name == "step-00000007"
    result = runs.run(tmp_path / "halves", trained=runs.model_with_dropout(), resume=True)
    assert not result.interrupted
    assert runs.losses(tmp_path / "halves") == runs.losses(tmp_path / "whole")
    whole, halves = (
        mx.load(str(checkpoints_of(tmp_path / name)[-1] / directories.PARAMETERS)) for name in ("whole", "halves")
    )
    assert all(mx.array_equal(halves[name], value) for name, value in whole.items())


def test_a_run_that_is_extended_has_the_losses_of_one_that_was_longer_at_first(tmp_path: Path) -> None:
    longer = runs.settings(schedule=Schedule(3e-3, 6, 2, extend=(5,)))
    runs.run(tmp_path / "whole", longer, trained=runs.model_with_dropout())
    first, out = runs.settings(schedule=Schedule(3e-3, 6, 2)), tmp_path / "parts"
    runs.run(out, first, trained=runs.model_with_dropout())

    def stop(report: Report) -> None:
        if report.step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    assert runs.run(out, longer, runs.model_with_dropout(), stop, resume=True).interrupted
    again = runs.settings(schedule=Schedule(3e-3, 6, 2, extend=(5, 5)))
    for options, complaint in ((again, "the run has 11 updates, and can be extended when it has ended"),
                               (first, r"was extended by \[5\] updates, not by \[\]")):  # fmt: skip
        with pytest.raises(InputError, match=complaint):
            runs.run(out, options, runs.model_with_dropout(), resume=True)
    result = runs.run(out, longer, runs.model_with_dropout(), resume=True)
    assert result.progress.step == 11 and not result.interrupted
    losses, whole = ([each for each in runs.losses(path) if each[2]] for path in (out, tmp_path / "whole"))
    assert losses == whole and len(losses) == 11  # of updates, which alone have gradients


@pytest.mark.parametrize("rate", [3e-3, 3.0])
def test_a_run_ends_early_where_validations_bring_nothing(rate: float, tmp_path: Path) -> None:
    """A ruinous rate is worse at each of them; a good one goes to its end."""
    options = runs.settings(rate=rate, eval_every=2, patience=2, spike=None)
    result = runs.run(tmp_path, options)
    steps = 12 if rate < 1 else 4
    assert result.progress.step == steps and not result.interrupted and result.early == (rate > 1)
    again = runs.run(tmp_path, options, resume=True)
    assert again.progress.step == steps and again.early == result.early
    if result.early:  # who has more patience goes on
        more = runs.run(tmp_path, runs.settings(rate=rate, eval_every=2, patience=3, spike=None), resume=True)
        assert more.early and more.progress.step == 6


def test_slow_updates_are_saved_by_the_clock_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint by the clock lasts until the next one; those by count are kept as they were."""
    runs.run(tmp_path / "whole", runs.settings(eval_every=100), runs.model_with_dropout())
    monkeypatch.setattr(training, "_SAVE_AFTER", -1.0)
    out, seen = tmp_path / "cut", []

    def note(report: Report) -> None:
        seen.append([int(path.name[5:]) for path in checkpoints_of(out)])
        if report.step == 9:
            raise RuntimeError("a power cut")

    options = runs.settings(eval_every=100)  # and a checkpoint every 3
    with pytest.raises(RuntimeError):
        runs.run(out, options, runs.model_with_dropout(), on_report=note)
    assert seen == [[], [], [1], [2], [3], [3, 4], [3, 5], [3, 6], [3, 6, 7], [3, 6, 8]]
    runs.run(out, options, runs.model_with_dropout(), resume=True)
    assert runs.losses(out) == runs.losses(tmp_path / "whole")


class Stopping(TrainingCallback):
    """Presses Ctrl-C where the run does a given thing. Remembers what it was told."""

    def __init__(self, at: str):
        self.at, self.told = at, list[Any]()

    def progress(self, what: str, done: int = 0, total: int = 0, /) -> None:
        self.told.append(what)
        if what == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def resumed(self, step: int) -> None:
        self.told.append(step)

    def ready(self, seconds: float, left: int) -> None:
        self.told.append(left)

    def report(self, report: Report) -> None:
        self.told.append(report)


PHASES = ["measuring an update", "measuring the machine", "validating"]


@pytest.mark.parametrize("at", PHASES)
def test_stopped_before_its_first_update_a_run_leaves_no_checkpoint(at: str, tmp_path: Path) -> None:
    callback = Stopping(at)
    meter = Meter(runs.model().config)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        runs.run(tmp_path, rehearsal=next(runs.batches()), meter=meter, callback=callback)
    assert not checkpoints_of(tmp_path) and signal.getsignal(signal.SIGINT) == before
    assert not any(isinstance(each, Report) for each in callback.told)
    runs.run(tmp_path, runs.settings(2))  # so the same command can begin it again
    assert [step for step, _, _ in runs.losses(tmp_path)] == [0, 1, 2, 2]


def test_a_run_tells_what_it_does_before_its_first_update(tmp_path: Path) -> None:
    callback = Stopping("nothing")
    meter, rehearsal = Meter(runs.model().config), next(runs.batches())
    runs.run(tmp_path, runs.settings(2), rehearsal=rehearsal, meter=meter, callback=callback)
    assert [each for each in callback.told if not isinstance(each, Report)] == [
        PHASES[0], 2, *PHASES[1:], "starting", "validating",
    ]  # fmt: skip


def test_a_resumed_run_says_where_and_can_be_stopped_before_its_first_update(tmp_path: Path) -> None:
    runs.run(tmp_path / "whole")

    def stop(report: Report) -> None:
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    runs.run(tmp_path / "cut", on_report=stop)
    callback = Stopping(PHASES[0])
    result = runs.run(tmp_path / "cut", resume=True, rehearsal=next(runs.batches()), callback=callback)
    assert callback.told[:2] == [5, PHASES[0]] and result.interrupted and result.last.name == "step-00000005"
    assert not runs.run(tmp_path / "cut", resume=True).interrupted
    assert runs.losses(tmp_path / "cut") == runs.losses(tmp_path / "whole")


def test_killed_at_random_moments_the_losses_are_those_of_a_run_that_lived(tmp_path: Path) -> None:
    steps, draw = 14, random.Random(5)

    def start(out: Path, how: str) -> subprocess.Popen[str]:
        command = [sys.executable, runs.__file__, str(out), str(steps), how]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    whole, out = tmp_path / "whole", tmp_path / "killed"
    reference = start(whole, "new")
    deaths = 0
    while deaths < 4:
        process = start(out, "resume" if checkpoints_of(out) else "new")
        assert process.stdout is not None
        lines = iter(process.stdout)
        for _ in range(draw.randint(2, 6)):
            next(lines, None)
        timer = threading.Timer(draw.random() * 0.05, process.kill)
        timer.start()
        _, errors = process.communicate()
        timer.cancel()
        assert process.returncode in (0, -signal.SIGKILL), errors
        deaths += process.returncode != 0
        if process.returncode == 0:
            break
    assert deaths >= 2
    last = start(out, "resume")
    assert last.wait(60) == 0, last.communicate()[1]
    assert reference.wait(60) == 0, reference.communicate()[1]
    assert [step for step, _, norm in runs.losses(whole) if norm] == list(range(1, steps + 1))
    assert runs.losses(out) == runs.losses(whole)


def test_another_model_data_or_setting_is_refused_by_name(tmp_path: Path) -> None:
    runs.run(tmp_path, runs.settings(3))

    def resume(identity: checkpoint.Identity = runs.IDENTITY, **options: Any) -> None:
        chosen = runs.settings(**{"steps": 3} | options)
        runs.train(runs.model(), runs.batches(), None, chosen, tmp_path, identity, resume=True)

    resume(eval_every=9, save_every=1, keep=7)
    with pytest.raises(InputError, match="trained from another model"):
        resume(replace(runs.IDENTITY, model="another"))
    with pytest.raises(InputError, match="trained on other data"):
        resume(replace(runs.IDENTITY, data="other"))
    with pytest.raises(InputError, match="trained with rank = 8, not 16"):
        resume(replace(runs.IDENTITY, config={"rank": 16}))
    with pytest.raises(InputError, match=r"learning rate's peak = 0.003, not 0.1"):
        resume(rate=0.1)
    with pytest.raises(InputError, match="accumulate = 1, not 2"):
        resume(accumulate=2)
    with pytest.raises(InputError, match="holds a run already"):
        runs.run(tmp_path)
    with pytest.raises(InputError, match="no checkpoint to resume from; without --resume"):
        runs.run(tmp_path / "nowhere", resume=True)


def test_every_process_takes_the_largest_seed(tmp_path: Path) -> None:
    run = Run(runs.model(), runs.batches(), None, runs.settings(2, seed=2**64 - 1), tmp_path, runs.IDENTITY)
    run._group = SimpleNamespace(rank=lambda: 1, size=lambda: 1)  # type: ignore[assignment]
    run._begin()
    assert mx.random.state[0].tolist() == [0, 0], "of the seed after it, which begins at 0 again"


def test_a_resumption_that_is_refused_leaves_the_metrics_as_they_were(tmp_path: Path) -> None:
    """Lines of updates after the last checkpoint, too: nothing has made them again."""
    runs.run(tmp_path, runs.settings(6))
    (newest,) = checkpoints_of(tmp_path)[-1:]
    shutil.rmtree(newest)
    kept, state = runs.losses(tmp_path), checkpoints_of(tmp_path)[-1] / checkpoint.STATE
    values = json.loads(state.read_text())
    for part, damaged in (("data", {"epoch": 0}), ("random", []), ("step", -1)):
        state.write_text(json.dumps(values | {"progress": values["progress"] | {part: damaged}}))
        with pytest.raises(InputError):
            runs.run(tmp_path, runs.settings(6), resume=True)
        assert runs.losses(tmp_path) == kept, part


class _Poisoned:
    """Batches of which some give a loss that is no number."""

    def __init__(self, model: Any, bad: set[int], inner: Any):
        self.model, self.bad, self.inner, self.number = model, bad, inner, 0
        self.norm = model.transformer.norm.weight

    def __next__(self) -> Batch:
        self.number += 1
        weight = self.model.transformer.norm.weight
        self.model.transformer.norm.weight = weight * mx.nan if self.number in self.bad else self.norm
        return next(self.inner)  # type: ignore[no-any-return]

    def state(self) -> Any:
        return self.inner.state()

    def resume(self, state: Any) -> None:
        raise AssertionError


def poisoned_run(out: Path, bad: set[int], **options: Any) -> Any:
    model = runs.model()
    model.freeze()
    model.layers[0].unfreeze()
    model.transformer.norm.unfreeze()
    return runs.train(
        model, _Poisoned(model, bad, runs.batches()), None, runs.settings(8, **options), out, runs.IDENTITY
    )


def test_a_loss_that_is_no_number_stops_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ElmError, match=r"step 5: the loss is nan.*last good checkpoint is .*step-00000003"):
        poisoned_run(tmp_path, {5})
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-00000003"]
    kept = mx.load(str(tmp_path / "checkpoints" / "step-00000003" / directories.PARAMETERS))
    assert all(mx.isfinite(value).all().item() for value in kept.values())


def test_skipping_leaves_the_update_out(tmp_path: Path) -> None:
    result = poisoned_run(tmp_path, {5, 6}, on_nan="skip")
    assert result.progress.step == 8 and result.progress.skipped == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["skipped"]] == [5, 6]


def test_skipping_for_ever_stops(tmp_path: Path) -> None:
    with pytest.raises(ElmError, match="step 10: the loss is nan"):
        model = runs.model()
        bad = set(range(1, 50))
        runs.train(model, _Poisoned(model, bad, runs.batches()), None,
                   runs.settings(40, on_nan="skip"), tmp_path, runs.IDENTITY)  # fmt: skip


class _Rising:
    """Counting downwards after `good` batches."""

    def __init__(self, inner: Any, good: int):
        self.inner, self.good = inner, good

    def __next__(self) -> Batch:
        self.good -= 1
        batch: Batch = next(self.inner)
        return batch if self.good >= 0 else replace(batch, targets=(batch.targets + 40) % runs.VOCAB)

    def state(self) -> Any:
        return self.inner.state()

    def resume(self, state: Any) -> None:
        raise AssertionError


def test_a_spike_is_told(tmp_path: Path) -> None:
    with pytest.raises(ElmError, match="step 31: the loss jumped to"):
        runs.train(runs.model(), _Rising(runs.batches(), 30), None,
                   runs.settings(40, schedule=Schedule(3e-3, 40), spike=1.0), tmp_path, runs.IDENTITY)  # fmt: skip


@pytest.mark.parametrize("at", [2, 3, 9])
def test_a_ruined_model_is_told_from_the_first_update_on(at: int, tmp_path: Path) -> None:
    """Not only once twenty losses are there to be compared with."""

    class Ruinous(_Rising):
        def __next__(self) -> Batch:
            batch = super().__next__()
            if self.good == -1:  # what an update at far too high a rate would have made of it
                head = model.transformer.token_embeddings
                head.weight = head.weight * 40
            return batch

    model = runs.model()
    with pytest.raises(ElmError, match=f"step {at}: the loss jumped to .*, from .*; .*a lower learning rate may help"):
        runs.train(model, Ruinous(runs.batches(), at - 1), None, runs.settings(12), tmp_path, runs.IDENTITY)
    assert [step for step, *_ in runs.losses(tmp_path)] == list(range(1, at))


def test_the_loss_of_few_tokens_may_scatter(tmp_path: Path) -> None:
    """Their mean says less: what is a spike of many tokens is none of one."""
    settings = runs.settings(3, spike=1.0)
    run = Run(runs.model(), runs.batches(), None, settings, tmp_path, runs.IDENTITY)
    run.progress.step, run.progress.loss_mean = 1, 4.0
    assert run._what_is_wrong(6.0, 1.0, 10_000) == "the loss jumped to 6.000, from 4.000"
    assert run._what_is_wrong(6.0, 1.0, 10) is None and run._what_is_wrong(7.0, 1.0, 10) is not None
    run.progress.step = 0
    assert run._what_is_wrong(60.0, 1.0, 10_000) is None, "the first loss has nothing to be compared with"


def test_the_base_counts_where_nothing_was_better(tmp_path: Path) -> None:
    """A rate far too high: no checkpoint is the best, and the loss before training is known."""
    reports: list[Report] = []
    options = runs.settings(8, rate=5.0, clip=None, spike=None)
    result = runs.run(tmp_path, options, on_report=reports.append)
    base, *others = [report.valid_loss for report in reports if report.valid_loss is not None]
    assert min(others) > base
    assert (result.best, result.progress.best_step, result.progress.best_loss) == (None, 0, base)
    assert result.harm == (others[-1], base)
    assert [report.step for report in reports if report.best] == [0]
    assert runs.run(tmp_path / "good").harm is None


def test_freed_buffers_are_looked_after_at_every_update_and_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[None] = []
    monkeypatch.setattr(device, "trim_cache", lambda: trimmed.append(None))
    runs.run(tmp_path, runs.settings(4))
    validations = 2 * len(list(runs.validation()))
    assert len(trimmed) == 4 + validations


def test_a_training_loss_that_rose_is_harm_where_nothing_is_validated(tmp_path: Path) -> None:
    for name, rate, harmful in (("bad", 5.0, True), ("good", 3e-3, False)):
        options = runs.settings(12, rate=rate, clip=None, spike=None)
        result = runs.train(runs.model(), runs.batches(), None, options, tmp_path / name, runs.IDENTITY)
        losses = [loss for _, loss, _ in runs.losses(tmp_path / name)]
        assert (result.harm is not None) == harmful == (np.mean(losses) > 1.5 * losses[0])
        if result.harm is not None:
            assert result.harm == pytest.approx((np.mean(losses), losses[0]))


def test_stopped_before_anything_was_compared_no_harm_is_told(tmp_path: Path) -> None:
    def stop(report: Report) -> None:
        if report.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    result = runs.run(tmp_path, runs.settings(12), on_report=stop)
    assert result.interrupted and result.best is None and result.harm is None


@pytest.mark.parametrize("processors", [1, 3])
def test_what_dropout_drops_does_not_depend_on_the_machine_that_goes_on(
    processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is cut into as many parts as before, each of which drops its own."""
    identity = replace(runs.IDENTITY, config={**runs.IDENTITY.config, "dropout": 0.2})

    def train(name: str, **options: Any) -> None:
        batches, settings = runs.batches(size=4), runs.settings(eval_every=100)
        runs.train(runs.model_with_dropout(), batches, None, settings, tmp_path / name, identity, **options)

    def stop(report: Report) -> None:
        if report.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(device, "most_parts", lambda *_: 2)
    train("whole")
    train("cut", callback=runs.Reports(stop))
    monkeypatch.setattr(device, "most_parts", lambda *_: processors)
    train("cut", resume=True)
    assert runs.losses(tmp_path / "cut") == runs.losses(tmp_path / "whole")
    train("other")
    assert runs.losses(tmp_path / "other") != runs.losses(tmp_path / "whole")
