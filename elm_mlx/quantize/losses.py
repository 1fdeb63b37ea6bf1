"""Losses of a quantized model: perplexity, Kullback-Leibler divergence, flipped tokens; and speed.

Two models' logits on the same text are compared. Those of the first wait on the disk, so that one model at a time is in
memory.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.errors import InputError
from elm_mlx.inference.generation import stream_generate
from elm_mlx.model.ops import kl_divergences
from elm_mlx.store.loading import Loaded
from elm_mlx.text.excerpts import Excerpt

WINDOW = 512  # tokens that see each other
MOST_TOKENS = 4096
_PROMPT, _ANSWER, _WARM = 128, 72, 8
_MADE_UP = 128  # ids where there is no tokenizer
_REPEATS, _SECONDS = 5, 5.0  # of measuring speed


@dataclass(frozen=True)
class TextRow:
    """Ids that a model reads, `(length,)`, and those that follow each."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class QuantizationLosses:
    """The losses of a quantized model, against the one that it was made of.

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
    """Throughput in tokens a second."""

    prompt: float
    decode: float


def rows(ids: Sequence[int], bos_id: int | None, window: int, most: int = MOST_TOKENS) -> list[TextRow]:
    """Cuts the first `most` of `ids` in windows that each begin with BOS, which `ids` has not; None is no BOS."""
    found = []
    for start in range(0, min(len(ids), most), window):
        part = tuple(ids[start : min(start + window, most)])
        read = part if bos_id is None else (bos_id, *part)
        if len(read) > 1:
            found.append(TextRow(read[:-1], read[1:]))
    return found


def text_ids(text: Excerpt, loaded: Loaded) -> list[int]:
    """Encodes a text, without BOS. Raises InputError where the model has no tokenizer, or the text is empty."""
    if loaded.tokenizer is None:
        raise InputError("the model has no tokenizer and so reads no text: only --bits, --mode and --dtype work")
    found = loaded.tokenizer.encode(text.content, add_bos=False)
    if len(found) < 2:
        raise InputError(f"{text.name}: holds no text")
    return found


def text_rows(text: Excerpt, loaded: Loaded, window: int, most: int = MOST_TOKENS) -> list[TextRow]:
    """Encodes `text` in rows, at most `most` tokens of it; made-up ids where there is no tokenizer."""
    config = loaded.model.config
    window = min(window, config.max_context_length)
    if loaded.tokenizer is None:
        return rows([(i * 7919) % config.vocab_size for i in range(_MADE_UP)], None, window)
    return rows(text_ids(text, loaded), loaded.tokenizer.bos_id, window, most)


def log_softmax(model: nn.Module, row: TextRow) -> mx.array:
    """Returns the log-probabilities of the token after each position, `(length, vocab_size)`, in float32."""
    logits = model(mx.array([row.inputs]))[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Reference:
    """A model's log-probabilities, kept on the disk: those of 4,096 positions and 128,000 tokens are 2 GB."""

    def __init__(self, values: np.memmap, rows: Sequence[TextRow]):
        self._values, self._rows = values, tuple(rows)
        self.positions = len(values)

    def __iter__(self) -> Iterator[tuple[TextRow, mx.array]]:
        start = 0
        for row in self._rows:
            yield row, mx.array(self._values[start : start + len(row.inputs)])
            start += len(row.inputs)


@contextmanager
def reference(
    model: nn.Module, rows: Sequence[TextRow], folder: Path, on_progress: OnProgress = no_progress
) -> Iterator[Reference]:
    """Computes `model`'s log-probabilities on `rows`, in a nameless file on `folder`'s disk until the block ends."""
    done, total = 0, sum(len(row.inputs) for row in rows)
    with tempfile.TemporaryFile(dir=folder) as file:
        for row in rows:
            found = np.array(log_softmax(model, row))
            file.write(found.data)  # and not through the mapping, where a full disk is a signal that kills
            done += len(found)
            on_progress("reading", done, total)
        file.flush()
        del model  # the caller may want to be rid of it
        yield Reference(np.memmap(file, np.float32, "r", shape=(total, found.shape[1])), rows)


def compare(
    before: Reference, model: nn.Module, on_text: bool, on_progress: OnProgress = no_progress
) -> QuantizationLosses:
    """Measures the losses of `model`. A NaN anywhere in its logits makes `kl_mean` one."""
    found: list[np.ndarray] = []
    nats, flips, done = np.zeros(2), 0, 0  # summed; of the model before and after
    for row, old in before:
        new = log_softmax(model, row)
        found.append(np.array(kl_divergences(old, new), np.float64))
        flips += int((old.argmax(axis=-1) != new.argmax(axis=-1)).sum().item())
        targets = mx.array(row.targets)[:, None]
        nats -= [np.array(mx.take_along_axis(each, targets, -1), np.float64).sum() for each in (old, new)]
        done += len(row.inputs)
        on_progress("comparing", done, before.positions)
    each = np.concatenate(found)
    perplexities = [math.exp(min(float(value), 700.0)) for value in nats / each.size]
    return QuantizationLosses(
        tokens=each.size,
        perplexity_before=perplexities[0] if on_text else None,
        perplexity_after=perplexities[1] if on_text else None,
        kl_mean=float(each.mean()),
        kl_p99=float(np.percentile(each, 99)),
        kl_max=float(each.max()),
        flipped=flips / each.size,
    )


def speed(loaded: Loaded) -> Speed:
    """Measures a short prompt and answer: the median of five after one that does not count, of fewer if slow."""
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
