"""How much more a text is like trusted ones than like the corpus that it comes from, by pairs of adjacent tokens.

Pairs are hashed to 65,536 numbers, and counted among trusted texts and among a sample of the corpus. A text's score is
the mean over its pairs of the logarithm of how much more frequent each is among the trusted: the difference of two
cross-entropies, by which Moore and Lewis (2010) select what a language model is trained on, and the importance weight
of hashed n-grams of DSIR (Xie et al., 2023, arXiv 2302.03169, section 3), over the text's length. So it is a linear
classifier whose weights need no training: counts give them, and the same files the same ones on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

SAMPLE_BYTES = 2 << 20  # of trusted texts, and of each source
READ_BYTES = 256 << 20  # of a source, over which its sample is spread
_BUCKETS = 1 << 16
_PRIOR = 0.1  # how much counts are drawn towards what both have in common: no pair weighs more than 3 nats
_UNIT = 1 << 10  # weights are whole numbers of this part of a nat: sums are exact, in whatever order they are made

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]  # of each bucket


class Likeness:
    """Scores texts as token ids, and accepts as large a share of the corpus as it was made for.

    Args:
        trusted: texts such as the model is to learn from, one or more.
        corpus: a sample of the source, two texts or more.
        share: of the corpus' texts that are to be kept, above 0, at most 1.
    """

    def __init__(self, trusted: Sequence[Ids], corpus: Sequence[Ids], share: float) -> None:
        self._wanted, self._common = _counts(trusted), _counts(corpus)
        self._counted = {_digest(ids) for ids in corpus}
        self._weights = _weights(self._wanted, self._common, self._wanted.sum(), self._common.sum())
        scores = sorted(map(self.score, corpus), reverse=True)
        self._least = scores[max(1, round(share * len(scores))) - 1]

    def score(self, ids: Ids) -> float:
        """Returns nats a pair: above 0 for what is more like the trusted texts, 0 where there is no pair.

        A text of the sample is left out of the corpus' counts for that: it would look more like the corpus than others.
        """
        pairs = _pairs(ids)
        weights = self._weights[pairs]
        if _digest(ids) in self._counted:
            others = self._common[pairs] - np.bincount(pairs, minlength=_BUCKETS)[pairs]
            weights = _weights(self._wanted[pairs], others, self._wanted.sum(), self._common.sum() - len(pairs))
        return int(weights.sum()) / (_UNIT * max(1, len(pairs)))

    def accepts(self, ids: Ids) -> bool:
        return self.score(ids) >= self._least


def spread(contents: Iterable[bytes | str]) -> list[bytes | str]:
    """Returns at most SAMPLE_BYTES of texts, every first, second, fourth… of the first READ_BYTES."""
    kept: list[bytes | str] = []
    every, size, read = 1, 0, 0
    for number, content in enumerate(contents):
        if number % every == 0:
            kept.append(content)
            size += len(content)
        while size > SAMPLE_BYTES and len(kept) > 2:
            kept, every = kept[::2], 2 * every
            size = sum(map(len, kept))
        read += len(content)
        if read > READ_BYTES:
            break
    return kept


def _pairs(ids: Ids) -> npt.NDArray[np.uint32]:
    """Returns the number of each pair of adjacent tokens, from 0 to 65,535: the upper half of a product's 32 bits."""
    tokens = ids.astype(np.uint32)
    return (tokens[:-1] * np.uint32(0x9E3779B1) + tokens[1:] * np.uint32(0x85EBCA77)) >> np.uint32(16)


def _counts(texts: Sequence[Ids]) -> Counts:
    counts = np.zeros(_BUCKETS, np.int64)
    for ids in texts:
        counts += np.bincount(_pairs(ids), minlength=_BUCKETS)
    return counts


def _weights(wanted: Counts, common: Counts, of_wanted: int, of_common: int) -> Counts:
    """Returns each pair's logarithm, in _UNIT, from counts and what these sum up to over all pairs."""
    p, q = wanted / max(1, of_wanted), common / max(1, of_common)
    both = _PRIOR * (p + q) / 2
    ratios = np.divide(p + both, q + both, out=np.ones(len(p)), where=both > 0)
    return np.rint(_UNIT * np.log(ratios)).astype(np.int64)


def _digest(ids: Ids) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
