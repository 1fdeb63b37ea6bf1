"""The policy gradient of sampled answers: each token's log-probability, weighted by how much better its answer was.

Group-relative (GRPO, arXiv 2402.03300): an answer is compared with the others to the same prompt, so nothing else has
to be learnt to know what could be expected. Its reward less their mean is the advantage of all its tokens. The loss is
a mean over the tokens of all answers of an update (DAPO, arXiv 2503.14476, equation 8), not of each answer first, or
long answers would count less a token. There is no KL term, and so no reference model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from elm_mlx.data.batches import Batch
from elm_mlx.train.loss import Head, Positions, losses_only, summed_loss

CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # how far a token's ratio may move before its gradient ends (DAPO, section 3.1)
_GRAIN = 8  # rows are as long as a multiple of this, or of an eighth of their length, for few shapes to compile
_LEAST_DEVIATION = 1e-4  # of rewards, that advantages are divided by
_MOST_DIFFERENCE = 20.0  # of log-probabilities, of which ratios are still numbers


@dataclass(frozen=True)
class WeighedAnswer:
    """A sampled answer, and the weight of its tokens in the loss.

    Attributes:
        prompt: the prompt's ids.
        tokens: as they were drawn.
        logprobs: of each, as it was drawn.
        advantage: of every token.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: float


@dataclass(frozen=True)
class AnswerBatch(Batch):
    """A batch whose rows are an answer each, after its prompt; the answer's tokens are trained.

    Attributes:
        advantages: (batch,) float32.
        logprobs: (batch, length) float32: of the targets that are trained, as they were drawn; else 0.
    """

    advantages: npt.NDArray[np.float32]
    logprobs: npt.NDArray[np.float32]

    def rows(self, at: slice) -> AnswerBatch:
        batch = super().rows(at)
        return AnswerBatch(**vars(batch), advantages=self.advantages[at], logprobs=self.logprobs[at])

    @classmethod
    def of(cls, answers: Sequence[WeighedAnswer], rows: int) -> AnswerBatch:
        """Returns a batch of `rows` rows, of which the last are padding where there are fewer answers."""
        longest = max(len(answer.prompt) + len(answer.tokens) - 1 for answer in answers)
        grain = max(_GRAIN, 1 << max(0, (longest - 1).bit_length() - 4))
        shape = (rows, -(-longest // grain) * grain)
        inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        trained, logprobs = np.zeros(shape, np.bool_), np.zeros(shape, np.float32)
        advantages, tokens = np.zeros(rows, np.float32), 0
        for row, answer in enumerate(answers):
            ids, first = (*answer.prompt, *answer.tokens), len(answer.prompt) - 1
            own = slice(first, len(ids) - 1)
            inputs[row, : own.stop], targets[row, : own.stop] = ids[:-1], ids[1:]
            trained[row, own], logprobs[row, own], advantages[row] = True, answer.logprobs, answer.advantage
            tokens += own.stop
        return cls(inputs, targets, trained, None, tokens, advantages, logprobs)


def batches_of(answers: Sequence[WeighedAnswer], rows: int) -> list[AnswerBatch]:
    """Returns batches of so many answers each, those of similar length together."""
    ordered = sorted(answers, key=lambda answer: len(answer.prompt) + len(answer.tokens))
    return [AnswerBatch.of(ordered[start : start + rows], rows) for start in range(0, len(ordered), rows)]


def group_advantages(rewards: npt.NDArray[np.float64], by_deviation: bool = False) -> npt.NDArray[np.float64]:
    """Returns the advantage of each answer of a group, `(answers,)`: its reward less the group's mean.

    Args:
        by_deviation: divided by the rewards' standard deviation too, as in the first GRPO. Groups that nearly all
            answers of are right, or wrong, then count more (arXiv 2503.20783, section 3.1).
    """
    above = rewards - rewards.mean()
    return above / (rewards.std(ddof=1) + _LEAST_DEVIATION) if by_deviation else above


class PolicyGradient:
    """The objective whose units are the answers' tokens.

    The first update after sampling is made by the policy that sampled: a token's loss is -A log p, whose value is
    taken as -A, of a ratio of 1. Where more than one update is made by the same answers, p is held against the
    probability q that the token was drawn with: the loss is -min(r A, clip(r, 0.8, 1.28) A), with r = p / q (PPO,
    arXiv 1707.06347, equation 7; limits that differ, DAPO, equation 10).

    Args:
        repeated: answers serve several updates.
    """

    def __init__(self, repeated: bool = False) -> None:
        self.repeated = repeated
        self.measures: tuple[str, ...] = ("clipped",) if repeated else ()

    def count(self, batch: Batch) -> int:
        """Its answers' tokens."""
        return int(batch.trained.sum())

    def arrays(self, batch: Batch) -> tuple[mx.array, ...]:
        """Returns `where`, `targets` and `weights` as `Positions`, and for each position its advantage and log q."""
        assert isinstance(batch, AnswerBatch)
        at = Positions.of(batch.targets, batch.trained)
        found = np.flatnonzero(batch.trained)
        padding = (0, at.where.shape[0] - at.count)
        advantages = np.pad(batch.advantages[found // batch.trained.shape[1]], padding)
        logprobs = np.pad(batch.logprobs.reshape(-1)[found], padding)
        return at.where, at.targets, at.weights, mx.array(advantages), mx.array(logprobs)

    def sums(
        self, gradients: bool, head: Head, hidden: mx.array, at: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        """Returns the tokens' summed loss, and of answers that serve again how many tokens are clipped, `(1,)`."""
        where, targets, weights, advantages, before = at
        if self.repeated:
            now = -losses_only(head, hidden, (where, targets))
            ratios = mx.exp(mx.clip(now - before, -_MOST_DIFFERENCE, _MOST_DIFFERENCE))
            clipped = mx.where(advantages > 0, ratios > 1 + CLIP_HIGH, ratios < 1 - CLIP_LOW) & (advantages != 0)
            gains = mx.minimum(ratios * advantages, mx.clip(ratios, 1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)
            slopes = mx.where(clipped, 0, ratios * advantages) * weights  # of the gain, by the log-probability
            measures = (clipped * weights).sum()[None]
        else:
            gains, slopes, measures = advantages, advantages * weights, mx.zeros(0)
        loss = -(gains * weights).sum()
        if not gradients:
            return loss, measures
        weighted = summed_loss(head, hidden, (where, targets, slopes))
        # The value of one with the gradient of the other.
        return loss + (weighted - mx.stop_gradient(weighted)), measures
