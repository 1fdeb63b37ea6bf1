"""The estimate of memory: its parts by hand, what makes it grow, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_mlx.config import ModelConfig
from elm_mlx.errors import InputError
from elm_mlx.train import loss, memory
from elm_mlx.train.memory import Load, check, estimate

CONFIG = ModelConfig.preset("OpenELM-270M")
LOAD = Load(CONFIG, 4, 4, 1_000_000, False, 2, 512)


def test_parts_by_hand() -> None:
    found = estimate(LOAD)
    assert found.weights == 4 * CONFIG.parameters + 4_000_000
    assert found.training == 8_000_000  # two moments
    assert found.gradients == 4_000_000
    assert found.update == 10_000_000  # gradients, and one and a half of what replaces
    assert found.total == found.process + found.weights + found.training + found.activations
    full = estimate(replace(LOAD, full=True, trained=CONFIG.parameters, length=32))
    assert full.weights == 4 * CONFIG.parameters and full.update > full.activations
    assert full.total == full.process + full.weights + full.training + full.update


def test_gradients_are_each_parts_and_summed_over_batches() -> None:
    one = replace(LOAD, full=True, trained=CONFIG.parameters)
    copy, head = 4 * CONFIG.parameters, 2 * 4 * CONFIG.vocab_size * CONFIG.model_dim
    alone, two, several = (estimate(each) for each in (one, replace(one, parts=2), replace(one, accumulate=2)))
    assert (alone.gradients, two.gradients) == (copy, 2 * copy)
    assert two.activations - alone.activations == pytest.approx(head, abs=1), "each part adds up the head's"
    assert estimate(replace(one, parts=2, rows=1)) == estimate(replace(one, rows=1)), "a row is not cut"
    assert several.training - alone.training == copy and alone.update - several.update == copy
    assert several == estimate(replace(one, accumulate=8)), "one sum, of however many"


def test_activations_are_those_of_a_plain_count() -> None:
    """A uniform model of one layer, each array that goes into an operation with a derivative counted by hand."""
    config = ModelConfig.scaled(
        vocab_size=512, num_layers=1, model_dim=64, head_dim=16, num_gqa_groups=2, qkv_multipliers=1.0,
        ffn_multipliers=1.0, ffn_dim_divisor=64,
    )  # fmt: skip
    queries, keys = 4 * 16, 2 * 16
    norms_and_residuals, projected = 4 * 64, queries + 2 * keys
    normed_and_turned, attended, gated = 2 * (queries + keys), 2 * queries, 3 * 64
    kept = norms_and_residuals + projected + normed_and_turned + attended + gated
    one, two = (estimate(Load(config, 4, 4, 1000, False, 1, length)).activations for length in (4096, 8192))
    assert two - one == pytest.approx(1.12 * 1.45 * 4 * kept * 4096, abs=2)


def test_the_losss_chunk_is_the_losss() -> None:
    for vocab_size in (512, 4096, 32_000, 128_256):
        assert loss.chunk_size(1 << 20, vocab_size) <= max(64, memory._CHUNK_LOGITS // vocab_size)
        assert loss.chunk_size(1 << 20, vocab_size) * 2 > memory._CHUNK_LOGITS // vocab_size


@given(rows=st.integers(1, 64), length=st.integers(2, 4096), trained=st.integers(1, 10**8))
def test_more_of_anything_is_more(rows: int, length: int, trained: int) -> None:
    load = replace(LOAD, rows=rows, length=length, trained=trained)
    found = estimate(load)
    assert found.total < estimate(replace(load, trained=trained + 1000)).total
    assert estimate(replace(load, optimizer="adafactor")).total < found.total
    more = (replace(load, rows=rows + 1), replace(load, length=length + 1))
    less = (replace(load, grad_checkpoint=True), replace(load, value_bytes=2))
    for bigger in map(estimate, more):
        assert found.activations < bigger.activations and found.total <= bigger.total
    for smaller in map(estimate, less):
        assert smaller.activations < found.activations and smaller.total <= found.total


def test_what_does_not_fit_is_refused_with_what_helps() -> None:
    needed = estimate(LOAD).total
    check(LOAD, needed)
    check(LOAD, None)
    with pytest.raises(InputError) as caught:
        check(LOAD, needed // 2)
    text = str(caught.value)
    smaller = estimate(replace(LOAD, grad_checkpoint=True)).total
    assert f"about {needed / 1e9:.1f} GB, and {needed // 2 / 1e9:.1f} GB are free" in text
    assert f"--grad-checkpoint would take {smaller / 1e9:.1f} GB" in text
    assert "--batch-size 1 would take" in text and "--max-seq-length 256 would take" in text
    assert "adafactor" not in text, "an adapter's moments are nothing"
    full = replace(LOAD, full=True, trained=CONFIG.parameters, rows=1, length=128)
    with pytest.raises(InputError, match="an adapter in place of --full would take") as caught:
        check(full, 10)
    assert "--optimizer adafactor would take" in str(caught.value) and "--batch-size" not in str(caught.value)
