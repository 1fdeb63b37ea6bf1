"""SentencePiece models of any kind, trained in a moment."""

from __future__ import annotations

import io
import random
from pathlib import Path

import sentencepiece

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"

BYTES = {"model_type": "bpe", "byte_fallback": True}
EXACT = {**BYTES, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
WORDS = "the quick brown fox jumps over lazy dogs while and 漢字 かな naïve café 12 345 </s> 😀"


def train(path: Path, **options: object) -> Path:
    """A SentencePiece model of 400 pieces, trained in a moment."""
    words = WORDS.split()
    choice = random.Random(0).choice
    lines = [" ".join(choice(words) + choice(["", ",", "."]) for _ in range(12)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=400, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path
