"""Little of the books that the examples measure on, and their loss, computed in the plainest way."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np

from elm_mlx.model.network import Model
from elm_mlx.text.tokenizer import Tokenizer

BOOKS = Path(__file__).parents[1] / "examples" / "classics" / "held-out.jsonl.gz"


def write_beginnings(path: Path, *lengths: int) -> Path:
    """Writes the first characters of the held-out books, so many of each."""
    books = gzip.decompress(BOOKS.read_bytes()).decode().splitlines()
    with path.open("w", encoding="utf-8") as file:
        for book, length in zip(map(json.loads, books), lengths, strict=True):
            file.write(json.dumps(book | {"text": book["text"][:length]}) + "\n")
    return path


def plain_loss(model: Model, tokenizer: Tokenizer, text: str, length: int) -> tuple[float, float]:
    """Returns nats a token and bits a byte, window by window, the softmax taken in float64."""
    ids, nats = np.array(tokenizer.encode(text, add_bos=True)), []
    for start in range(0, len(ids) - 1, length):
        inputs, targets = ids[start : start + length], ids[start + 1 : start + length + 1]
        logits = np.array(model(mx.array(inputs[: len(targets)])[None])[0], np.float64)
        logprobs = logits - logits.max(-1, keepdims=True)
        logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
        nats.extend(-logprobs[np.arange(len(targets)), targets])
    return float(np.mean(nats)), sum(nats) / math.log(2) / len(tokenizer.decode(ids[1:]).encode())
