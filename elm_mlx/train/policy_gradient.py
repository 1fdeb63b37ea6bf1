"""The policy gradient of sampled answers: each token's log-probability, weighted by how much better its answer was.

Group-relative (GRPO, arXiv 2402.03300): an answer is compared with the others to the same prompt, so nothing else has
to be learnt to know what could be expected. Its reward less their mean is the advantage of all its tokens. The loss is
a mean over the tokens of all answers of an update (DAPO, arXiv 2503.14476, equation 8), not of each answer first, or
long answers would count less a token. There is no KL term, and so no reference model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from elm_mlx.data.batches import Batch
from elm_mlx.train.loss import Head, HeadObjective, Positions, losses_only, summed_loss

CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # how far a token's ratio may move before its gradient ends (DAPO, section 3.1)
_GRAIN = 8  # rows are as long as a multiple of this, or of an eighth of their length, for few shapes to compile
_ROW = 1024  # positions of a row with several answers, some
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


Group = tuple[tuple[int, ...], dict[WeighedAnswer, int]]  # a prompt, and answers to it, each with how often it came


@dataclass(frozen=True)
class AnswerBatch(Batch):
    """A batch whose rows have a prompt and answers to it each; the answers' tokens are trained.

    Attributes:
        advantages: (batch, length) float32: of the targets that are trained; else 0.
        logprobs: (batch, length) float32: of those, as they were drawn; else 0.
        copies: (batch, length) float32: how often each of those was drawn; else 0.
    """

    advantages: npt.NDArray[np.float32]
    logprobs: npt.NDArray[np.float32]
    copies: npt.NDArray[np.float32]

    def rows(self, at: slice) -> AnswerBatch:
        batch = super().rows(at)
        own = {name: getattr(self, name)[at] for name in ("advantages", "logprobs", "copies")}
        return AnswerBatch(**vars(batch), **own)

    @classmethod
    def of(cls, groups: Sequence[Group], rows: int) -> AnswerBatch:
        """Returns a batch of `rows` rows, of which the last are padding where there are fewer groups.

        A row begins with its prompt but for the last token. The answers follow, each behind that token and at the
        positions that it would have alone.
        """
        longest = max(map(_length, groups))
        grain = max(_GRAIN, 1 << max(0, (longest - 1).bit_length() - 4))
        shape = (rows, -(-longest // grain) * grain)
        inputs, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
        advantages, logprobs, copies = (np.zeros(shape, np.float32) for _ in range(3))
        for row, (prompt, answers) in enumerate(groups):
            end = first = len(prompt) - 1
            inputs[row, :first], segments[row, :first], positions[row, :first] = prompt[:-1], -1, range(first)
            for number, (answer, times) in enumerate(answers.items(), start=1):
                own = slice(end, end := end + len(answer.tokens))
                inputs[row, own], targets[row, own] = (prompt[-1], *answer.tokens[:-1]), answer.tokens
                segments[row, own], positions[row, own] = number, range(first, first + len(answer.tokens))
                advantages[row, own], logprobs[row, own] = answer.advantage, answer.logprobs
                copies[row, own] = times
        alone = max(len(answers) for _, answers in groups) == 1
        return cls(
            inputs, targets, copies > 0, None if alone else segments, sum(map(_length, groups)), advantages, logprobs,
            copies, positions=None if alone else positions,
        )  # fmt: skip


def batches_of(answers: Sequence[WeighedAnswer], most: int, together: bool = True) -> list[AnswerBatch]:
    """Returns batches of up to `most` answers each, rows of similar length together.

    Answers to a prompt share a row, in which it is read once, as long as that pays; and of those that are the same
    there is one.

    Args:
        together: the network can read several answers to a prompt in a row.
    """
    groups: dict[tuple[int, ...], Counter[WeighedAnswer]] = defaultdict(Counter)
    for answer in answers:
        groups[answer.prompt][answer] += 1
    # Where answers are longer than prompts, attention to the longer rows takes more than is gained.
    share = together and sum(len(each.tokens) - len(each.prompt) for each in answers) <= 0
    rows: list[Group] = []
    for prompt, found in groups.items():
        parts = _rows_of(prompt, found, most) if share else len(found)
        counted = [*found.items()]
        rows += [(prompt, dict(counted[part::parts])) for part in range(parts)]
    rows.sort(key=_length)
    size = most // max((len(found) for _, found in rows), default=1)
    return [AnswerBatch.of(rows[start : start + size], size) for start in range(0, len(rows), size)]


def _length(group: Group) -> int:
    prompt, answers = group
    return len(prompt) - 1 + sum(len(answer.tokens) for answer in answers)


def _rows_of(prompt: Sequence[int], answers: Collection[WeighedAnswer], most: int) -> int:
    """Returns the number of rows that a prompt and its answers are in, up to `most` in each."""
    tokens = sum(len(answer.tokens) for answer in answers)
    by_length = -(-tokens // max(1, _ROW - len(prompt)))
    return min(len(answers), max(-(-len(answers) // most), by_length))


def group_advantages(rewards: npt.NDArray[np.float64], by_deviation: bool = False) -> npt.NDArray[np.float64]:
    """Returns the advantage of each answer of a group, `(answers,)`: its reward less the group's mean.

    Args:
        by_deviation: divided by the rewards' standard deviation too, as in the first GRPO. Groups that nearly all
            answers of are right, or wrong, then count more (arXiv 2503.20783, section 3.1).
    """
    above = rewards - rewards.mean()
    return above / (rewards.std(ddof=1) + _LEAST_DEVIATION) if by_deviation else above


class PolicyGradient(HeadObjective):
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
        assert isinstance(batch, AnswerBatch)
        return int(batch.copies.sum())

    def arrays(self, batch: Batch) -> tuple[mx.array, ...]:
        """Returns `where`, `targets` and `weights` as `Positions`, and for each position its advantage and log q."""
        assert isinstance(batch, AnswerBatch)
        at = Positions.of(batch.targets, batch.trained)
        padding = (0, at.where.shape[0] - at.count)
        weights, advantages, logprobs = (
            mx.array(np.pad(each[batch.trained], padding)) for each in (batch.copies, batch.advantages, batch.logprobs)
        )
        return at.where, at.targets, weights, advantages, logprobs

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
