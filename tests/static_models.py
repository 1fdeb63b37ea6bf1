"""Static embeddings made by code, for tests: words of one meaning have one vector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_static_model(directory: Path, meanings: Sequence[Sequence[str]], width: int = 8, seed: int = 0) -> Path:
    """Writes embeddings in model2vec's layout: the words of each of `meanings` share a random vector."""
    from model2vec import StaticModel
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    draw = np.random.default_rng(seed)
    words, rows = ["[UNK]"], [np.zeros(width)]
    for meaning in meanings:
        vector = draw.normal(size=width)
        words += meaning
        rows += [vector] * len(meaning)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    StaticModel(np.array(rows, np.float32), tokenizer, normalize=True).save_pretrained(str(directory))
    return directory
