"""The estimate of memory: its parts by hand, what makes it grow, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_mlx.errors import InputError
from elm_mlx.model.config import ModelConfig
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


def _no_logits(parameters: object, rows: object) -> NoReturn:
    raise AssertionError


def test_the_losss_chunk_is_the_losss() -> None:
    for vocab_size in (512, 4096, 32_000, 128_256):
        chunk = loss.Head(_no_logits, vocab_size, {}).chunks(1 << 20)[0].stop
        assert chunk <= max(64, memory._CHUNK_LOGITS // vocab_size)
        assert chunk * 2 > memory._CHUNK_LOGITS // vocab_size


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


@given(layers=st.integers(1, CONFIG.num_layers))
def test_fewer_layers_on_the_way_back_keep_less(layers: int) -> None:
    found = estimate(replace(LOAD, layers=layers))
    assert estimate(replace(LOAD, layers=CONFIG.num_layers)) == estimate(LOAD)
    assert estimate(replace(LOAD, layers=layers - 1)).activations <= found.activations <= estimate(LOAD).activations
    assert estimate(replace(LOAD, layers=CONFIG.num_layers // 2)).activations < 0.9 * estimate(LOAD).activations


def advice(text: str) -> dict[str, str]:
    """What is said to help, and what each would take."""
    return dict(each.split(" would take ") for each in text.partition("free: ")[2].split("; "))  # type: ignore[misc]


def test_what_may_not_fit_is_told_with_what_helps() -> None:
    needed = estimate(LOAD).total
    assert check(LOAD, needed, 1) is None and check(LOAD, None, None) is None
    text = check(LOAD, needed // 2, None)
    assert text is not None
    assert f"about {needed / 1e9:.2f} GB may be too much for the {needed // 2 / 1e9:.2f} GB that are free: " in text
    smaller = {
        "--grad-checkpoint": replace(LOAD, grad_checkpoint=True),
        "--batch-size 1": replace(LOAD, rows=1),
        "--max-seq-length 128": replace(LOAD, length=128),
        "--num-layers 1": replace(LOAD, layers=1, trained=LOAD.trained // CONFIG.num_layers),
    }
    said = advice(text)
    assert said.keys() == smaller.keys(), "an adapter's moments are nothing, and all else helps"
    for name, load in smaller.items():
        assert said[name] == f"{estimate(load).total / 1e9:.2f} GB"
    full = replace(LOAD, full=True, trained=CONFIG.parameters, rows=1, length=128)
    assert advice(str(check(full, 10, None))).keys() == {
        "--optimizer adafactor", "--grad-checkpoint", "an adapter in place of --full"
    } - ({"--grad-checkpoint"} if estimate(full).activations < estimate(full).update else set())  # fmt: skip


def test_a_huge_batch_is_told_of_by_the_largest_that_fits() -> None:
    load = replace(LOAD, rows=1 << 17)
    fits = estimate(replace(load, rows=64)).total
    said = advice(str(check(load, fits, None)))
    assert said["--batch-size 64"] == f"{fits / 1e9:.2f} GB"
    full = replace(load, full=True, trained=CONFIG.parameters)
    said = advice(str(check(full, fits, None, memory.RECIPE)))
    assert any(name.startswith("run.batch_size=") for name in said)
    assert all("=" in name for name in said), "a recipe has keys, and no options"


def test_only_what_is_sure_not_to_fit_is_refused() -> None:
    """Weights, gradients and two moments: four times the weights in float32."""
    full = replace(LOAD, full=True, trained=CONFIG.parameters)
    least = 16 * CONFIG.parameters
    assert check(full, 1, least) is not None
    with pytest.raises(
        InputError, match=f"alone take {least / 1e9:.2f} GB, and the machine has {(least - 1) / 1e9:.1f}"
    ):
        check(full, 1, least - 1)
    assert "may be too much" in str(check(full, 1, least - 1, force=True))
    rows = replace(LOAD, rows=1 << 12)  # little to train, and far too much to keep for the way back
    twice = estimate(rows).total // 2
    assert check(rows, 1, twice + 1) is not None
    with pytest.raises(InputError, match=r"^the run takes about .*, and the machine has .*--batch-size 1 .*; --force"):
        check(rows, 1, twice - 1)
    assert "may be too much" in str(check(rows, 1, twice - 1, force=True))
    assert check(full, None, None) is None
