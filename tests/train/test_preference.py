"""Losses of pairs: worked by hand, by other formulas in float64, and as gradients of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
import runs
from mlx.utils import tree_flatten

from elm_mlx import device
from elm_mlx.data.batches import PairBatch, PairBatches
from elm_mlx.data.encoding import Example
from elm_mlx.errors import InputError
from elm_mlx.model.attention import Segments
from elm_mlx.model.network import Model
from elm_mlx.train.loss import Head, Parameters
from elm_mlx.train.preference import LOSSES, Preferring
from elm_mlx.train.step import Step

Array = npt.NDArray[np.float64]


def losses(preferring: Preferring, policy: Any, reference: Any, lengths: Any) -> tuple[list[float], list[list[float]]]:
    found, rewards = preferring(*(mx.array(np.array(each, np.float32)) for each in (policy, reference, lengths)))
    return found.tolist(), rewards.tolist()


class TestByHand:
    """Chosen: -10 against the reference's -12, four tokens. Rejected: -9 against -8, two tokens. The margin is 3."""

    policy, reference, lengths = [[-10.0, -9.0]], [[-12.0, -8.0]], [[4, 2]]

    def test_sigmoid(self) -> None:
        (loss,), rewards = losses(Preferring("sigmoid", 0.1), self.policy, self.reference, self.lengths)
        assert loss == pytest.approx(0.5543552, rel=1e-6)  # log(1 + exp(-0.3))
        assert rewards[0] == pytest.approx([0.2, -0.1])

    def test_sigmoid_where_nothing_has_changed(self) -> None:
        (loss,), rewards = losses(Preferring("sigmoid", 0.1), self.reference, self.reference, self.lengths)
        assert loss == pytest.approx(math.log(2)) and rewards == [[0, 0]]

    def test_hinge(self) -> None:
        assert losses(Preferring("hinge", 0.1), self.policy, self.reference, self.lengths)[0] == pytest.approx([0.7])
        assert losses(Preferring("hinge", 0.5), self.policy, self.reference, self.lengths)[0] == [0]

    def test_ipo_divides_by_tokens(self) -> None:
        # Ratios 2 / 4 and -1 / 2: a margin of 1, and 1 / (2 * 0.1) is 5.
        (loss,), rewards = losses(Preferring("ipo", 0.1), self.policy, self.reference, self.lengths)
        assert loss == pytest.approx(16) and rewards[0] == pytest.approx([0.05, -0.05])

    def test_orpo(self) -> None:
        # Probabilities a token of a half and a quarter: odds of 1 and 1/3, whose ratio's sigmoid is 3 / 4.
        policy = [[-4 * math.log(2), -2 * math.log(4)]]
        (loss,), rewards = losses(Preferring("orpo", 0.1), policy, [[0, 0]], self.lengths)
        assert loss == pytest.approx(math.log(2) - 0.1 * math.log(3 / 4))
        assert rewards[0] == pytest.approx([-0.1 * math.log(2), -0.1 * math.log(4)])


def orpo(policy: Array, reference: Array, lengths: Array, beta: float) -> Array:
    probability = np.exp(policy / lengths)
    odds = probability / (1 - probability)
    ratio = odds[:, 0] / odds[:, 1]
    return -policy[:, 0] / lengths[:, 0] - beta * np.log(ratio / (1 + ratio))


def margin(policy: Array, reference: Array) -> Array:
    chosen, rejected = policy.T
    return (chosen - rejected) - (reference[:, 0] - reference[:, 1])


# As published, in the order in which TRL's documentation has them, in float64.
FORMULAS: dict[str, Callable[[Array, Array, Array, float], Array]] = {
    "sigmoid": lambda policy, reference, lengths, beta: np.log1p(np.exp(-beta * margin(policy, reference))),
    "hinge": lambda policy, reference, lengths, beta: np.clip(1 - beta * margin(policy, reference), 0, None),
    "ipo": lambda policy, reference, lengths, beta: (
        margin(policy / lengths, reference / lengths) - 0.5 / beta
    ) ** 2,
    "orpo": orpo,
}  # fmt: skip


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.7])
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_derivatives_are_those_of_the_formulas(loss: str, beta: float) -> None:
    draw = np.random.default_rng(1)
    lengths = draw.integers(1, 40, (64, 2)).astype(np.float64)
    reference = -lengths * draw.uniform(0.1, 4, (64, 2))
    policy = reference + draw.normal(0, 2, (64, 2))
    policy = np.minimum(policy, -0.05 * lengths)
    formula, preferring = FORMULAS[loss], Preferring(loss, beta)
    found, _ = losses(preferring, policy, reference, lengths)
    np.testing.assert_allclose(found, formula(policy, reference, lengths, beta), rtol=2e-5, atol=1e-5)

    def total(policy: mx.array) -> mx.array:
        others = (mx.array(each.astype(np.float32)) for each in (reference, lengths))
        return preferring(policy, *others)[0].sum()

    slopes = np.array(mx.grad(total)(mx.array(policy.astype(np.float32))))
    for column in (0, 1):
        step = np.zeros((64, 2))
        step[:, column] = 1e-5
        above, below = (formula(policy + sign * step, reference, lengths, beta) for sign in (1, -1))
        np.testing.assert_allclose(slopes[:, column], (above - below) / 2e-5, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_extremes_are_numbers(loss: str) -> None:
    preferring = Preferring(loss, 0.5)
    policy = mx.array([[-1e-9, -4000.0], [-4000.0, -1e-9], [0.0, 0.0]])
    reference, lengths = mx.array([[-4000.0, 0.0], [0.0, -4000.0], [0.0, 0.0]]), mx.ones((3, 2))
    value, slopes = mx.value_and_grad(lambda policy: preferring(policy, reference, lengths)[0].sum())(policy)
    assert mx.isfinite(value).item() and mx.isfinite(slopes).all().item()


def test_what_makes_no_loss() -> None:
    with pytest.raises(InputError, match=r"^loss of pairs 'dpo' is not one of sigmoid, hinge, ipo, orpo$"):
        Preferring("dpo")
    with pytest.raises(InputError, match=r"^beta, of the loss of pairs, must be above 0, not 0$"):
        Preferring(beta=0)
    assert [Preferring(loss).needs_reference for loss in LOSSES] == [True, True, True, False]


def drawn(count: int) -> list[Example]:
    """Pairs that share their prompts."""
    draw, made = np.random.default_rng(5), []
    for _ in range(count):
        prompt = tuple(map(int, draw.integers(0, runs.VOCAB, draw.integers(2, 6))))
        for _ in range(2):
            answer = tuple(map(int, draw.integers(0, runs.VOCAB, draw.integers(1, 9))))
            made.append(Example(prompt + answer, (False,) * len(prompt) + (True,) * len(answer)))
    return made


def one_by_one(model: Model, pairs: list[Example]) -> tuple[mx.array, mx.array]:
    """Log-probabilities `(pairs, 2)` and tokens of answers, each in a forward pass of its own."""
    sums, lengths = [], []
    for example in pairs:
        marks = mx.array(example.trained[1:])
        nats = nn.losses.cross_entropy(model(mx.array([example.ids[:-1]]))[0], mx.array(example.ids[1:]))
        sums.append(-(nats * marks).sum())
        lengths.append(marks.sum())
    return mx.stack(sums).reshape(-1, 2), mx.stack(lengths).reshape(-1, 2)


def in_batch(model: Model, batch: PairBatch, preferring: Preferring, gradients: bool) -> Callable[[Parameters], Any]:
    def loss(parameters: Parameters) -> Any:
        model.update(parameters)
        hidden = model.transformer(mx.array(batch.inputs), None, Segments(mx.array(batch.segments)))
        return preferring.sums(gradients, Head.of(model), hidden, preferring.arrays(batch))

    return loss


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_has_the_loss_and_gradient_of_its_pairs_one_by_one(loss: str, packed: bool) -> None:
    model, pairs, preferring = runs.model(), drawn(7), Preferring(loss, 0.4)
    made = PairBatches(pairs, 4, 64, packed=packed)
    made.reference = np.random.default_rng(2).normal(-30, 4, (7, 2)).astype(np.float32)
    parameters = model.trainable_parameters()

    def plainly(parameters: Parameters, numbers: list[int]) -> mx.array:
        model.update(parameters)
        chosen = [pairs[2 * number + half] for number in numbers for half in (0, 1)]
        sums, lengths = one_by_one(model, chosen)
        return preferring(sums, mx.array(made.reference[numbers]), lengths)[0].sum()

    batch = next(made)
    assert isinstance(batch, PairBatch)
    numbers = batch.pairs[batch.pairs >= 0].tolist()
    assert len(numbers) >= 3 and (batch.pairs < 0).any()
    (value, measures), gradients = mx.value_and_grad(in_batch(model, batch, preferring, True))(parameters)
    wanted, wanted_gradients = mx.value_and_grad(plainly)(parameters, numbers)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    for (name, found), (_, expected) in zip(tree_flatten(gradients), tree_flatten(wanted_gradients), strict=True):
        scale = float(mx.abs(expected).max())
        assert float(mx.abs(found - expected).max()) <= 2e-4 * max(scale, 1e-3), name
    model.update(parameters)
    again, measured = in_batch(model, batch, preferring, False)(parameters)
    assert again.item() == value.item() and measured.tolist() == measures.tolist()


def test_measures_are_sums_over_pairs() -> None:
    model, pairs, preferring = runs.model(), drawn(7), Preferring("sigmoid", 0.4)
    made = PairBatches(pairs, 4, 64)
    made.reference = np.random.default_rng(2).normal(-30, 4, (7, 2)).astype(np.float32)
    batch = next(made)
    assert isinstance(batch, PairBatch)
    _, measures = in_batch(model, batch, preferring, False)(model.trainable_parameters())
    numbers = batch.pairs[batch.pairs >= 0]
    sums = np.array(one_by_one(model, pairs)[0])[numbers]
    rewards = 0.4 * (sums - made.reference[numbers])
    margins = rewards[:, 0] - rewards[:, 1]
    wanted = [rewards[:, 0].sum(), rewards[:, 1].sum(), margins.sum(), (margins > 0).sum()]
    assert 0 < wanted[3] < len(numbers)
    np.testing.assert_allclose(measures.tolist(), wanted, rtol=1e-4)


def test_logits_are_never_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss in chunks of 64 positions."""
    from elm_mlx.train import loss

    model, pairs, preferring = runs.model(), drawn(30), Preferring("ipo", 0.4)
    batch = next(PairBatches(pairs, 8, 128))
    assert isinstance(batch, PairBatch) and batch.trained.sum() > 130
    parameters = model.trainable_parameters()
    sizes: list[int] = []
    real = type(model).head

    def head(self: Model, rows: mx.array) -> mx.array:
        sizes.append(rows.shape[0])
        return real(self, rows)

    monkeypatch.setattr(type(model), "head", head)
    (whole, _), gradients = mx.value_and_grad(in_batch(model, batch, preferring, True))(parameters)
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 64 * runs.VOCAB)
    sizes.clear()
    (chunked, _), others = mx.value_and_grad(in_batch(model, batch, preferring, True))(parameters)
    assert max(sizes) == 64 and len(sizes) >= 6
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-5)
    for (name, found), (_, expected) in zip(tree_flatten(gradients), tree_flatten(others), strict=True):
        assert mx.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(mx.abs(expected).max())).item(), name


@pytest.mark.parametrize("processors", [1, 3])
def test_a_step_of_pairs_shared_out_by_rows_is_the_same(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "most_parts", lambda *_: processors)
    made = PairBatches(drawn(30), 5, 64)
    made.reference = np.random.default_rng(2).normal(-30, 4, (30, 2)).astype(np.float32)
    batch, model, preferring = next(made), runs.model(), Preferring("sigmoid", 0.4)
    assert isinstance(batch, PairBatch)
    step = Step(model, runs.settings(), objective=preferring)
    sums, gradients, count = step.gradients(batch)
    parameters = model.trainable_parameters()
    (value, measures), wanted = mx.value_and_grad(in_batch(model, batch, preferring, True))(parameters)
    model.update(parameters)
    assert count == (batch.pairs >= 0).sum() > 5
    np.testing.assert_allclose(sums.tolist(), [value.item(), *measures.tolist()], rtol=1e-4)
    np.testing.assert_allclose(step.loss(batch)[0].tolist(), sums.tolist(), rtol=1e-4)
    for (name, found), (_, expected) in zip(tree_flatten(gradients), tree_flatten(wanted), strict=True):
        assert mx.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(mx.abs(expected).max())).item(), name
