"""The schedule at its corners, AdamW and Adafactor against their formulas, decay, and the limit on the norm."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from elm_mlx.errors import InputError
from elm_mlx.train.optimizer import clipped, global_norm, make_optimizer
from elm_mlx.train.settings import Schedule


def test_cosine_goes_up_in_a_line_and_down_to_its_end() -> None:
    rate = Schedule(peak=1.0, steps=101, warmup=10, shape="cosine", end=0.1, start=0.0)
    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(10) == 1.0 and rate(100) == pytest.approx(0.1) and rate(500) == pytest.approx(0.1)
    assert rate(55) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)


def test_linear_constant_and_no_warmup() -> None:
    linear, constant = Schedule(2.0, 11, shape="linear", end=0.0), Schedule(2.0, 11, 2, "constant", start=1.0)
    assert [linear(step) for step in (0, 5, 10)] == pytest.approx([2.0, 1.0, 0.0])
    assert [constant(step) for step in (0, 1, 2, 99)] == pytest.approx([1.5, 2.0, 2.0, 2.0])
    assert Schedule(1.0, 1)(0) == Schedule(1.0, 5, 5)(4) == 1.0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"shape": "step"}, "no learning rate schedule 'step'"), ({"peak": 0.0}, "above 0"),
        ({"peak": math.nan}, "above 0"), ({"warmup": 11}, "warm-up of 11"), ({"steps": 0}, "at least 1 update, not 0"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(options: dict[str, float], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Schedule(**{"peak": 1.0, "steps": 10} | options)  # type: ignore[arg-type]


def test_adamw_is_its_formula_and_decays_matrices_alone() -> None:
    draw = np.random.default_rng(0)
    start = {"matrix": draw.normal(size=(5, 7)), "norm": draw.normal(size=(7,))}
    ours = {name: mx.array(value.astype(np.float32)) for name, value in start.items()}
    optimizer = make_optimizer("adamw", weight_decay=0.1)
    optimizer.init(ours)
    m, v = ({name: np.zeros_like(value) for name, value in start.items()} for _ in range(2))
    for step in range(1, 6):
        rate = 0.01 * step
        grads = {name: draw.normal(size=value.shape) for name, value in start.items()}
        optimizer.state["learning_rate"] = mx.array(rate)
        ours = optimizer.apply_gradients({n: mx.array(g.astype(np.float32)) for n, g in grads.items()}, ours)
        for name, grad in grads.items():
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.95 * v[name] + 0.05 * grad**2
            if name == "matrix":
                start[name] = start[name] * (1 - rate * 0.1)
            start[name] -= rate * (m[name] / (1 - 0.9**step)) / (np.sqrt(v[name] / (1 - 0.95**step)) + 1e-8)
    for name, value in start.items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-4, atol=1e-6)


def test_adafactor_is_mlxs_at_a_given_rate_and_decays_matrices_alone() -> None:
    draw = np.random.default_rng(1)
    start = {"matrix": mx.array(draw.normal(size=(5, 7))), "norm": mx.array(draw.normal(size=(7,)))}
    grads = {name: mx.array(draw.normal(size=value.shape)) for name, value in start.items()}
    ours, theirs = make_optimizer("adafactor", 0.5), optim.Adafactor(0.01, relative_step=False, scale_parameter=False)
    ours.init(start)
    ours.state["learning_rate"] = mx.array(0.01)
    mine, reference = ours.apply_gradients(grads, start), theirs.apply_gradients(grads, start)
    np.testing.assert_allclose(mine["norm"], reference["norm"], rtol=1e-5)
    np.testing.assert_allclose(mine["matrix"], reference["matrix"] - start["matrix"] * 0.01 * 0.5, rtol=1e-4, atol=1e-6)


def test_clipping_scales_all_by_one_number() -> None:
    grads = {"a": mx.array([3.0]), "b": [mx.array([[4.0]])]}
    norm = global_norm(grads)
    assert norm.item() == pytest.approx(5.0)
    cut = clipped(grads, norm, 1.0)
    assert cut["a"].item() == pytest.approx(0.6, rel=1e-5) and cut["b"][0].item() == pytest.approx(0.8, rel=1e-5)
    assert clipped(grads, norm, 6.0)["a"].item() == 3.0


def test_the_norm_of_16_bit_gradients_does_not_overflow() -> None:
    assert global_norm({"a": mx.full((4,), 300.0, mx.float16)}).item() == pytest.approx(600.0)


def test_other_names_and_values_are_refused() -> None:
    with pytest.raises(InputError, match="no optimizer 'sgd'; there are adamw, adafactor"):
        make_optimizer("sgd", 0.0)
    with pytest.raises(InputError, match="weight decay"):
        make_optimizer("adamw", -1.0)
