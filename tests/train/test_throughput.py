"""What an update costs, against multiples of a forward pass and counts by hand; and that a run tells its share."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import runs
import tiny

from elm_mlx.callbacks import Report
from elm_mlx.data.batches import Batch
from elm_mlx.model import roofline
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.roofline import Cost
from elm_mlx.store import adapters
from elm_mlx.train.throughput import Meter, seen, update_cost

CONFIG = tiny.scaled_config(runs.VOCAB)
FORWARD = Cost.of(CONFIG)


def test_all_weights_are_three_forward_passes_and_layers_four_where_they_are_computed_again() -> None:
    assert update_cost(CONFIG, None, False).forward(7, 28, 5) == 3 * FORWARD.forward(7, 28, 5)
    again = update_cost(CONFIG, adapters.Adapter("full"), True)
    assert again.forward(7, 28, 5) == 4 * FORWARD.forward(7, 28, 0) + 3 * FORWARD.forward(0, 0, 5)
    # PaLM's six operations for each weight and token.
    big = ModelConfig.preset("OpenELM-1_1B")
    weights = sum(a * b for name, (a, b) in ((n, s) for n, s in big.shapes().items() if len(s) == 2))
    assert update_cost(big, None, False).forward(1, 0, 1) == 6 * weights


def test_an_adapter_adds_its_own_products_and_needs_no_gradients_of_weights() -> None:
    adapter = adapters.plan(CONFIG, rank=4)
    own = [0] * CONFIG.num_layers
    for name, shape in CONFIG.shapes().items():
        if name.endswith("proj.weight") or "proj_" in name:
            own[int(name.split(".")[2])] += 2 * 4 * sum(shape)
    cost = update_cost(CONFIG, adapter, False)
    assert cost.linear == tuple(2 * flops + 3 * extra for flops, extra in zip(FORWARD.linear, own, strict=True))
    assert cost.attention == tuple(3 * flops for flops in FORWARD.attention)
    assert cost.head == 2 * FORWARD.head


def test_no_way_back_goes_below_the_first_adapted_layer() -> None:
    adapter = adapters.plan(CONFIG, rank=4, num_layers=1)
    for again in (False, True):
        cost = update_cost(CONFIG, adapter, again)
        assert cost.linear[:-1] == FORWARD.linear[:-1] and cost.attention[:-1] == FORWARD.attention[:-1]
        assert cost.linear[-1] > (2 + again) * FORWARD.linear[-1]
    embedding = adapters.plan(CONFIG, rank=4, num_layers=1, targets=["token_embeddings", "qkv_proj"])
    assert update_cost(CONFIG, embedding, False).linear[0] == 2 * FORWARD.linear[0] + 3 * 2 * 4 * CONFIG.model_dim


def test_a_head_that_alone_is_adapted_needs_no_way_back_at_all() -> None:
    untied = tiny.scaled_config(runs.VOCAB, share_input_output_layers=False)
    forward, cost = Cost.of(untied), update_cost(untied, adapters.plan(untied, rank=2, targets=["lm_head"]), False)
    assert cost.linear == forward.linear
    assert cost.head == forward.head + 3 * 2 * 2 * (untied.vocab_size + untied.model_dim)


def test_a_token_sees_its_own_text_alone() -> None:
    for packed in (True, False):
        batch = next(runs.batches(packed, size=3))
        expected = 0
        for row in range(3):
            if batch.segments is None:
                lengths = [np.flatnonzero(batch.inputs[row] | batch.targets[row]).max() + 1]
            else:
                lengths = [(batch.segments[row] == n).sum() for n in range(1, batch.segments[row].max() + 1)]
            expected += sum(sum(range(1, int(length) + 1)) for length in lengths)
        assert seen(batch) == expected


def test_rows_of_padding_see_nothing() -> None:
    empty = np.zeros((2, 4), np.int32)
    assert seen(Batch(empty, empty, empty > 0, None, 0)) == 0
    assert seen(Batch(empty, empty, empty > 0, empty, 0)) == 0


def test_a_run_tells_its_share_and_its_losses_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = []
    monkeypatch.setattr(roofline, "matmul_speed", lambda dtype: speeds.append(dtype) or 1e12)
    runs.run(tmp_path / "plain", runs.settings(6))
    meter, options = Meter(runs.model().config), runs.settings(6, accumulate=2)
    runs.run(tmp_path / "plain2", options)
    runs.run(tmp_path / "metered", options, meter=meter)
    assert runs.losses(tmp_path / "metered") == runs.losses(tmp_path / "plain2")
    assert speeds == [mx.float32]
    lines = [json.loads(line) for line in (tmp_path / "metered" / "metrics.jsonl").read_text().splitlines()]
    updates, source = [line for line in lines if "loss" in line], runs.batches()
    assert len(updates) == 6
    for line in updates:
        batches = [next(source) for _ in range(2)]
        flops = sum(3 * FORWARD.forward(batch.tokens, seen(batch), int(batch.trained.sum())) for batch in batches)
        assert line["matmul_share"] == pytest.approx(flops / line["seconds"] / 1e12)
    plain = (tmp_path / "plain" / "metrics.jsonl").read_text()
    assert "matmul_share" not in plain
    assert not any("matmul_share" in line for line in lines if "valid_loss" in line)


def test_a_run_goes_on_to_the_bit_with_or_without_one(tmp_path: Path) -> None:
    def stop(report: Report) -> None:
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    runs.run(tmp_path / "whole", trained=runs.model_with_dropout())
    halves, meter = tmp_path / "halves", Meter(runs.model().config)
    assert runs.run(halves, trained=runs.model_with_dropout(), meter=meter, on_report=stop).interrupted
    runs.run(halves, trained=runs.model_with_dropout(), resume=True)
    assert runs.losses(halves) == runs.losses(tmp_path / "whole")


def test_a_speed_that_was_measured_too_low_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that others used at the beginning."""
    flops = 3 * FORWARD.forward(10, 55, 10)
    speeds = [flops / 4, flops / 2, flops * 2, flops * 9]
    monkeypatch.setattr(roofline, "matmul_speed", lambda dtype: speeds.pop(0))
    row = np.ones((1, 10), np.int32)
    meter = Meter(CONFIG)
    assert meter.share(1.0) is None  # nothing was measured
    meter.measure(mx.float32)
    told = []
    for _ in range(4):
        meter.add(Batch(row, row, row > 0, None, 10))
        told.append(meter.share(1.0))
    assert told == [None, 0.5, 0.5, 0.5]
    assert speeds == [flops * 9]


def test_the_machine_is_not_measured_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(roofline, "matmul_speed", lambda dtype: tried.append(dtype) or 1.0)
    row = np.ones((1, 10), np.int32)
    meter = Meter(CONFIG)
    meter.measure(mx.float32)
    for _ in range(20):
        meter.add(Batch(row, row, row > 0, None, 10))
        assert meter.share(1.0) is None
    assert len(tried) == 6
