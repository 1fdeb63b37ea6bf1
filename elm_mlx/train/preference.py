"""Preference losses (DPO and others): how much more likely the chosen answer of a pair has become than the rejected.

A pair's loss depends on its tokens through two sums alone. So the log-probabilities are computed first, by a pass
through the head that keeps nothing; the loss's derivative by each sum is then the weight of all of that answer's
tokens in an ordinary cross-entropy, whose gradient is the pair's. The network below the head runs once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

import mlx.core as mx
import numpy as np

from elm_mlx.data.batches import Batch, PairBatch
from elm_mlx.errors import InputError
from elm_mlx.train.loss import Head, HeadObjective, Positions, losses_only, summed_loss
from elm_mlx.train.settings import PreferenceLoss

LOSSES = get_args(PreferenceLoss)
_CERTAIN = -1e-6  # a mean log-probability beyond which odds are all alike


@dataclass(frozen=True)
class Preferring(HeadObjective):
    """A loss of pairs.

    In terms of the ratio r, an answer's log-probability less the reference's, and the margin m, the chosen answer's
    r less the rejected one's:

    - sigmoid: -log sigmoid(beta m). DPO, arXiv 2305.18290, equation 7.
    - hinge: max(0, 1 - beta m). SLiC's loss on DPO's ratios, arXiv 2309.06657.
    - ipo: (m - 1 / (2 beta))², arXiv 2310.12036, equation 17, with the log-probabilities divided by their answer's
      number of tokens, as in TRL: or long answers would have to differ as little as short ones.
    - orpo: -p + beta (-log sigmoid(log odds of chosen - log odds of rejected)), arXiv 2403.07691, equations 3 to 7,
      where p is the chosen answer's mean log-probability and the odds are those of exp of each one's mean. There is
      no reference. (TRL's p covers the prompt as well; the paper's, and this, the answer alone.)

    An answer's reward is beta r; under ORPO, beta times its mean log-probability. `measures` are of the two
    rewards, their difference, and whether that is above 0.

    It is an `Objective` whose units are pairs.

    Raises:
        InputError: there is no such loss, or `beta` is not above 0.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    measures: ClassVar[tuple[str, ...]] = ("chosen_reward", "rejected_reward", "margin", "accuracy")

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InputError(f"loss of pairs {self.loss!r} is not one of {', '.join(LOSSES)}")
        if not 0 < self.beta < math.inf:
            raise InputError(f"beta, of the loss of pairs, must be above 0, not {self.beta}")

    @property
    def needs_reference(self) -> bool:
        return self.loss != "orpo"

    def __call__(self, policy: mx.array, reference: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        """Returns the losses `(pairs,)`, differentiable in `policy`, and the rewards `(pairs, 2)`.

        Args:
            policy: `(pairs, 2)`: summed log-probabilities of chosen and rejected answers.
            reference: as `policy`; ORPO has no use for it.
            lengths: `(pairs, 2)`: their tokens.
        """
        if self.loss == "orpo":
            mean = policy / lengths
            certain = mx.minimum(mean, _CERTAIN)
            odds = certain - mx.log(-mx.expm1(certain))
            return _softplus(odds[:, 1] - odds[:, 0]) * self.beta - mean[:, 0], self.beta * mean
        ratios = policy - reference
        if self.loss == "ipo":
            ratios = ratios / lengths
        margins = ratios[:, 0] - ratios[:, 1]
        return self._of_margin(margins), self.beta * ratios

    def count(self, batch: Batch) -> int:
        """Its pairs."""
        assert isinstance(batch, PairBatch)
        return int((batch.pairs >= 0).sum())

    def arrays(self, batch: Batch) -> tuple[mx.array, ...]:
        assert isinstance(batch, PairBatch)
        return positions(batch)

    def sums(
        self, gradients: bool, head: Head, hidden: mx.array, at: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        """Returns the sum of the pairs' losses, and the measures' sums, `(4,)`, as `Objective.sums` does."""
        loss, measures, slopes = self._summed(*log_probabilities(head, hidden, at), at)
        if not gradients:
            return loss, measures
        where, targets, weights, answers, *_ = at
        weighted = summed_loss(head, hidden, (where, targets, -slopes[answers] * weights))
        # The value of one with the gradient of the other.
        return loss + (weighted - mx.stop_gradient(weighted)), measures

    def _summed(
        self, sums: mx.array, lengths: mx.array, at: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Returns the summed loss, the measures' sums, and the derivative of the loss by each of `sums`."""
        real, reference = at[4].reshape(-1, 2)[:, 0], at[5].reshape(-1, 2)
        counted = mx.maximum(lengths, 1).reshape(-1, 2)

        def loss(sums: mx.array) -> tuple[mx.array, mx.array]:
            losses, rewards = self(sums.reshape(-1, 2), reference, counted)
            return (losses * real).sum(), rewards

        (total, rewards), slopes = mx.value_and_grad(loss)(sums)
        margins = rewards[:, 0] - rewards[:, 1]
        measures = mx.stack([rewards[:, 0], rewards[:, 1], margins, (margins > 0).astype(mx.float32)])
        return total, (measures * real).sum(axis=1), slopes

    def _of_margin(self, margins: mx.array) -> mx.array:
        if self.loss == "sigmoid":
            return _softplus(-self.beta * margins)
        if self.loss == "hinge":
            return mx.maximum(0, 1 - self.beta * margins)
        return mx.square(margins - 1 / (2 * self.beta))


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, mx.zeros_like(x))


def positions(batch: PairBatch) -> tuple[mx.array, ...]:
    """Returns what `Preferring.sums` and `log_probabilities` take as `at`.

    Returns:
        where, targets, weights: as `Positions`.
        answers: `(n,)` int32: for each position its answer's place in `real` and `reference`.
        real: `(rows * most * 2,)` float32: 1, or 0 where there is no such answer.
        reference: as `real`: log-probabilities.
    """
    at = Positions.of(batch.targets, batch.trained)
    assert batch.segments is not None
    row_answers = batch.pairs.shape[1] * 2
    first = np.arange(len(batch.inputs))[:, None] * row_answers
    answers = (first + np.maximum(batch.segments - 1, 0)).reshape(-1)[np.flatnonzero(batch.trained)]
    padded = np.pad(answers, (0, at.where.shape[0] - at.count)).astype(np.int32)
    real = np.repeat(batch.pairs.reshape(-1) >= 0, 2).astype(np.float32)
    return (
        at.where, at.targets, at.weights, mx.array(padded), mx.array(real), mx.array(batch.reference.reshape(-1)),
    )  # fmt: skip


def log_probabilities(head: Head, hidden: mx.array, at: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
    """Returns the sum of each answer's log-probabilities, and its number of tokens, both `(answers,)`. No gradient.

    Args:
        hidden: `(batch, length, model_dim)`.
        at: of `positions`.
    """
    where, targets, weights, answers, real, _ = at
    losses, nothing = losses_only(head, hidden, (where, targets)), mx.zeros_like(real)
    return nothing.at[answers].add(-losses * weights), nothing.at[answers].add(weights)
