"""One side of a comparison of trainers, in a process of its own: LoRA on a model and examples; figures as JSON.

    trainer.py PEER JOB

PEER is `ours`; `stock`, mlx-lm as it is installed and as its command makes batches; `equal`, the same with our BLAS and
weights in float32; or `sorted`, which is `equal` with similar lengths in a batch. (mlx-lm means to sort by length, but
measures a record by how many keys it has.) JOB is JSON:

    model       a model directory
    data        JSON lines of {"ids": […], "offset": where the answer begins}; ids, so that no template can differ
    adapter     the adapter's initial values; made by `ours` where the file is missing
    rows, length, packed    of a batch
    warmup, steps           updates before the clock runs, and while it does
    same        give mlx-lm our batches, for losses that can be compared
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RANK, SCALE, RATE = 8, 20.0, 1e-3
Job = dict[str, Any]


def ours(job: Job) -> dict[str, Any]:
    """Trains by elm-mlx. Returns tokens and seconds of the timed updates, and all losses."""
    from elm_mlx import load_model  # isort: skip  (its BLAS must come before MLX)
    from elm_mlx.store import adapters  # isort: skip  (its BLAS must come before MLX)
    import mlx.core as mx

    from elm_mlx.callbacks import Report, TrainingCallback
    from elm_mlx.train.checkpoint import Identity
    from elm_mlx.train.loop_settings import Schedule, Settings
    from elm_mlx.train.run import Run

    model = load_model(job["model"])
    adapters.attach(model, adapters.plan(model.config, rank=RANK, alpha=RANK * SCALE))
    if not Path(job["adapter"]).exists():
        mx.save_safetensors(job["adapter"], flat(model.trainable_parameters()))
    model.load_weights(job["adapter"], strict=False)
    steps, before = job["warmup"] + job["steps"], memory()
    settings = Settings(Schedule(RATE, steps, shape="constant"), clip=None, save_every=steps)
    reports: list[Report] = []
    callback = TrainingCallback()
    callback.report = reports.append
    with tempfile.TemporaryDirectory() as out:
        identity = Identity(model="", data="", config={})
        Run(model, batches(job), None, settings, Path(out), identity, callback=callback).train()
    timed = reports[job["warmup"] :]
    return {
        "tokens": sum(report.tokens for report in timed),
        "trained": sum(report.trained_tokens for report in timed),
        "seconds": sum(report.seconds for report in timed),
        "losses": [report.loss for report in reports],
        "before": before,
    }


def mlx_lm(job: Job, peer: str) -> dict[str, Any]:
    """Trains by mlx-lm's own trainer, as `peer` says. Returns the same."""
    if peer != "stock":
        import elm_mlx  # noqa: F401  (its BLAS must come before MLX)
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_map
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(job["model"]))
    if peer != "stock":
        model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    model.load_weights(job["adapter"], strict=False)
    mx.eval(model.parameters())
    before, clock = memory(), Clock(job["warmup"])

    def counted(**arguments: Any) -> Iterator[Any]:
        made = our_batches(job) if job["same"] else trainer.iterate_batches(**arguments)
        for batch, lengths in made:
            clock.counts.append((int((lengths[:, 1] - 1).sum()), int((lengths[:, 1] - lengths[:, 0]).sum())))
            yield batch, lengths

    steps = job["warmup"] + job["steps"]
    optimizer = optim.AdamW(RATE, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.0, bias_correction=True)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        trainer.train(
            model,
            optimizer,
            CacheDataset(Records(examples(job), measurable=peer == "sorted")),
            args=trainer.TrainingArgs(
                batch_size=job["rows"], iters=steps, steps_per_report=1, steps_per_save=steps + 1,
                max_seq_length=job["length"] + 1, adapter_file=f"{out}/adapters.safetensors",
            ),
            iterate_batches=counted,
            training_callback=clock,
        )  # fmt: skip
    return clock.result() | {"before": before}


class Records:
    """A data set for mlx-lm: dictionaries, or lists, whose length is the example's."""

    def __init__(self, made: list[dict[str, Any]], measurable: bool):
        self._made, self._measurable = made, measurable

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, at: int) -> Any:
        example = self._made[at]
        return [*example["ids"], example["offset"]] if self._measurable else example

    def process(self, example: Any) -> tuple[list[int], int]:
        return (example[:-1], example[-1]) if self._measurable else (example["ids"], example["offset"])


class Clock:
    """The callback of mlx-lm's trainer: times each update."""

    def __init__(self, warmup: int):
        self._warmup = warmup
        self._ends: list[float] = []
        self._losses: list[float] = []
        self.counts: list[tuple[int, int]] = []  # tokens and trained ones of each batch

    def on_train_loss_report(self, report: dict[str, Any]) -> None:
        self._ends.append(time.perf_counter())
        self._losses.append(report["train_loss"])

    def on_val_loss_report(self, report: dict[str, Any]) -> None:
        pass

    def result(self) -> dict[str, Any]:
        timed = self.counts[self._warmup : len(self._ends)]
        return {
            "tokens": sum(tokens for tokens, _ in timed),
            "trained": sum(trained for _, trained in timed),
            "seconds": self._ends[-1] - self._ends[self._warmup - 1],
            "losses": self._losses,
        }


def examples(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]


def batches(job: Job) -> Any:
    """Returns the batches that elm-mlx makes of the job's examples."""
    from elm_mlx.data.batches import Batches
    from elm_mlx.data.encoding import Example

    made = [
        Example(tuple(each["ids"]), tuple(i >= each["offset"] for i in range(len(each["ids"]))))
        for each in examples(job)
    ]
    return Batches(made, job["rows"], job["length"], packed=job["packed"])


def our_batches(job: Job) -> Iterator[Any]:
    """Unpacked batches as mlx-lm's loss takes them, of which it counts positions from a first to a last one."""
    import mlx.core as mx
    import numpy as np

    for batch in batches(job):
        first = batch.trained.argmax(axis=1) + 1
        last = batch.trained.shape[1] - batch.trained[:, ::-1].argmax(axis=1)
        ids = np.pad(batch.inputs, ((0, 0), (0, 1)))
        ids[:, 1:] = np.maximum(ids[:, 1:], batch.targets)  # an example's last token is a target alone
        yield mx.array(ids), mx.array(np.stack([first, last], axis=1))


def flat(tree: Any) -> dict[str, Any]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(tree))


def memory() -> int:
    """Bytes at most in use so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure starts from that of whatever process started this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    side, task = sys.argv[1], json.loads(sys.argv[2])
    figures = ours(task) if side == "ours" else mlx_lm(task, side)
    print(json.dumps(figures | {"memory": memory()}))
