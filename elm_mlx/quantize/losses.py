"""What quantizing lost: perplexity, Kullback-Leibler divergence, flipped tokens, speed.

Knows two models' logits on the same text. Knows nothing of how one was made of the other.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from elm_mlx.errors import InputError
from elm_mlx.inference.generation import stream_generate
from elm_mlx.model.ops import kl_divergences
from elm_mlx.store.loading import Loaded
from elm_mlx.text.excerpts import Excerpt

Advance = Callable[[int], None]  # told of positions that were computed

WINDOW = 512  # tokens that see each other
MOST_TOKENS = 4096
_PROMPT, _ANSWER, _WARM = 128, 72, 8
_MADE_UP = 128  # ids where there is no tokenizer
_REPEATS, _SECONDS = 5, 5.0  # of measuring speed


@dataclass(frozen=True)
class Row:
    """Ids that a model reads, `(length,)`, and those that follow each."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Losses:
    """Of a quantized model, against the one that it was made of.

    Attributes:
        tokens: positions that were compared.
        perplexity_before, perplexity_after: of the text; None where made-up ids stood in for one.
        kl_mean, kl_p99, kl_max: divergence of the quantized model's next token from the other's, in nats.
        flipped: share of positions where another token is the likeliest.
    """

    tokens: int
    perplexity_before: float | None
    perplexity_after: float | None
    kl_mean: float
    kl_p99: float
    kl_max: float
    flipped: float


@dataclass(frozen=True)
class Speed:
    """Tokens a second."""

    prompt: float
    decode: float


def rows(ids: Sequence[int], bos_id: int | None, window: int, most: int = MOST_TOKENS) -> list[Row]:
    """The first `most` of `ids` in windows that each begin with BOS, which is not yet among them; None is no BOS."""
    found = []
    for start in range(0, min(len(ids), most), window):
        part = tuple(ids[start : min(start + window, most)])
        read = part if bos_id is None else (bos_id, *part)
        if len(read) > 1:
            found.append(Row(read[:-1], read[1:]))
    return found


def text_ids(text: Excerpt, loaded: Loaded) -> list[int]:
    """Without BOS. Raises InputError where the model has no tokenizer, or there is nothing to learn from."""
    if loaded.tokenizer is None:
        raise InputError("without a tokenizer there is no text to measure or learn by: only --bits, --mode and --dtype")
    found = loaded.tokenizer.encode(text.content, add_bos=False)
    if len(found) < 2:
        raise InputError(f"{text.name}: holds no text")
    return found


def text_rows(text: Excerpt, loaded: Loaded, window: int, most: int = MOST_TOKENS) -> list[Row]:
    """`text` as a model reads it, at most `most` tokens of it; made-up ids where there is no tokenizer."""
    config = loaded.model.config
    window = min(window, config.max_context_length)
    if loaded.tokenizer is None:
        made_up: Sequence[int] = [(i * 7919) % config.vocab_size for i in range(_MADE_UP)]
        return rows(made_up, None, window)
    return rows(text_ids(text, loaded), loaded.tokenizer.bos_id, window, most)


def log_softmax(model: nn.Module, row: Row) -> mx.array:
    """Log-probabilities of what follows each position, `(length, vocab_size)`, in float32."""
    logits = model(mx.array([row.inputs]))[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Reference:
    """A model's log-probabilities, kept on the disk: those of 4,096 positions and 128,000 tokens are 2 GB."""

    def __init__(self, values: np.memmap, rows: Sequence[Row]):
        self._values, self.rows = values, tuple(rows)

    def __iter__(self) -> Iterator[tuple[Row, mx.array]]:
        start = 0
        for row in self.rows:
            yield row, mx.array(self._values[start : start + len(row.inputs)])
            start += len(row.inputs)


@contextmanager
def reference(
    model: nn.Module, rows: Sequence[Row], folder: Path, advance: Advance = lambda count: None
) -> Iterator[Reference]:
    """What `model` says on `rows`, in a nameless file on `folder`'s disk until the block ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        for row in rows:
            found = np.array(log_softmax(model, row))
            file.write(found.data)  # and not through the mapping, where a full disk is a signal that kills
            advance(len(found))
        file.flush()
        del model  # the caller may want to be rid of it
        positions = sum(len(row.inputs) for row in rows)
        yield Reference(np.memmap(file, np.float32, "r", shape=(positions, found.shape[1])), rows)


def compare(before: Reference, model: nn.Module, on_text: bool, advance: Advance = lambda count: None) -> Losses:
    """`model`'s losses. A NaN anywhere in its logits makes `kl_mean` one."""
    found, flips = [], 0
    surprise_before = surprise_after = 0.0
    for row, old in before:
        new = log_softmax(model, row)
        found.append(np.array(kl_divergences(old, new), np.float64))
        flips += int((old.argmax(axis=-1) != new.argmax(axis=-1)).sum().item())
        surprise_before += _surprise(old, row)
        surprise_after += _surprise(new, row)
        advance(len(row.inputs))
    each = np.concatenate(found)
    return Losses(
        tokens=each.size,
        perplexity_before=_perplexity(surprise_before / each.size) if on_text else None,
        perplexity_after=_perplexity(surprise_after / each.size) if on_text else None,
        kl_mean=float(each.mean()),
        kl_p99=float(np.percentile(each, 99)),
        kl_max=float(each.max()),
        flipped=flips / each.size,
    )


def speed(loaded: Loaded) -> Speed:
    """Of a short prompt and a short answer: the median of five after one that does not count, of fewer if slow."""
    config = loaded.model.config
    ids = [(i * 7919) % config.vocab_size for i in range(min(_PROMPT, config.max_context_length // 2))]
    answer = min(_ANSWER, config.max_context_length - len(ids) - 1)
    warm = min(_WARM, answer // 2)
    found: list[Speed] = []
    begun = time.perf_counter()
    while len(found) < 2 or (len(found) <= _REPEATS and time.perf_counter() - begun < _SECONDS):
        start = 0.0
        for response in stream_generate(loaded.model, None, ids, max_tokens=answer, stop_at_eos=False):
            if response.generation_tokens == warm:  # before, the step was compiled
                start = time.perf_counter()
        found.append(Speed(response.prompt_tps, (answer - warm) / (time.perf_counter() - start)))
    return Speed(median(each.prompt for each in found[1:]), median(each.decode for each in found[1:]))


def _surprise(logprobs: mx.array, row: Row) -> float:
    """Nats of the row's targets, summed."""
    chosen = mx.take_along_axis(logprobs, mx.array(row.targets)[:, None], axis=-1)
    return -float(np.array(chosen, np.float64).sum())


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))
