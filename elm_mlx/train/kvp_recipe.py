"""The recipe of a run of KV prediction: pretraining's texts, optimizer and run, and the weights of its losses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from elm_mlx.data.filters import Filters
from elm_mlx.data.text_sources import TextSource
from elm_mlx.errors import InputError
from elm_mlx.train.pretraining_recipe import Data, Optimizer, RunSettings, TextRecipe


@dataclass(frozen=True)
class LossWeights:
    """The weights of the three losses, of which the sum is minimized.

    Args:
        base: of the cross-entropy of the base that has predicted keys and values alone.
        auxiliary: of the auxiliary model's own cross-entropy.
        kv: of the distance of predicted keys and values from the base's own, summed over layers (default: 1 by the
            number of the base's layers).
    """

    base: float = 1.0
    auxiliary: float = 1.0
    kv: float | None = None

    def __post_init__(self) -> None:
        weights = [self.base, self.auxiliary, *([] if self.kv is None else [self.kv])]
        if not all(0 <= weight < math.inf for weight in weights) or (self.kv is not None and not any(weights)):
            raise InputError(f"the weights of losses are numbers from 0, and not all 0: {', '.join(map(str, weights))}")


@dataclass(frozen=True)
class KVPRecipe(TextRecipe):
    """A run of KV prediction. Vocabulary and context are the base's."""

    data: Data
    optimizer: Optimizer
    loss: LossWeights = field(default_factory=LossWeights)
    filters: Filters = field(default_factory=Filters)
    run: RunSettings = field(default_factory=RunSettings)


def preset(text: str = "data/*.jsonl.gz") -> KVPRecipe:
    """Returns a recipe for an hour or less on a small model; `text` is the path of what is trained on.

    The paper's for the 1.1B has 70,000 updates of 2 million tokens, and 1.2e-3 for the highest learning rate.
    """
    return KVPRecipe(
        Data((TextSource(text),), sequence_length=512, window=1 << 18, validation_rows=64),
        Optimizer(1e-3, steps=1_000),
        run=RunSettings(batch_size=4, accumulate=1, eval_every=100, save_every=100),
    )
