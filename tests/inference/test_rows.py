"""Texts that join, grow, are guessed, copied and leave at random: each has the logits that it has alone."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import mlx.core as mx
import pytest
import tiny

from elm_mlx import blas
from elm_mlx.inference.rows import TOGETHER, Rows, prefill
from elm_mlx.model.cache import KVCache, make_prompt_cache
from elm_mlx.model.network import Model

VOCAB = 320
LENGTHS = [1, 2, 17, 63, 64, 128, 250, 254, 255, 256, 257]  # of prompts: about where spans end and caches grow
to_the_bit = blas.OWN_FEW_ROWS in blas.status().name


@dataclass
class Text:
    """A prompt, the tokens after it, and the logits `(vocab_size,)` that rows gave after each of these."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logits: list[mx.array] = field(default_factory=list)

    def fed(self, token: int, logits: mx.array) -> None:
        self.tokens.append(token)
        self.logits.append(logits)

    def copy(self) -> Text:
        return replace(self, tokens=[*self.tokens], logits=[*self.logits])


def read(model: Model, ids: list[int]) -> list[KVCache]:
    caches = make_prompt_cache(model)
    prefill(model, ids, caches)
    return caches


class Traffic:
    """Some `Rows` of a model, and what stands in each."""

    def __init__(self, model: Model, seed: int) -> None:
        self._model, self._draw = model, random.Random(seed)
        self._batches: list[tuple[Rows, list[Text]]] = [(Rows(model), []), (Rows(model), [])]
        self.texts: list[Text] = []  # all that there were

    def move(self) -> None:
        """Does something to one of the rows."""
        rows, texts = self._draw.choice(self._batches)
        if not texts:
            self._join(rows, texts)
            return
        moves = [self._join, self._leave, self._step, self._step, self._look_ahead, self._look_ahead, self._part]
        self._draw.choice(moves)(rows, texts)

    def counted(self) -> bool:
        """Returns whether all caches end with the longest of their texts."""
        return all(cache.offset == max(rows.lengths) for rows, _ in self._batches for cache in rows.caches)

    def _ids(self, count: int) -> list[int]:
        return [self._draw.randrange(VOCAB) for _ in range(count)]

    def _add(self, rows: Rows, texts: list[Text], caches: list[KVCache], text: Text) -> None:
        rows.join(caches, [*text.prompt, *text.tokens])
        texts.append(text)
        self.texts.append(text)

    def _join(self, rows: Rows, texts: list[Text]) -> None:
        if len(texts) < TOGETHER:
            text = Text(self._ids(self._draw.choice(LENGTHS)))
            self._add(rows, texts, read(self._model, text.prompt), text)

    def _leave(self, rows: Rows, texts: list[Text]) -> None:
        row = self._draw.randrange(len(texts))
        rows.leave(row)
        texts[row] = texts[-1]
        texts.pop()

    def _step(self, rows: Rows, texts: list[Text]) -> None:
        for _ in range(self._draw.choice([1, 1, 4])):
            tokens = self._ids(len(texts))
            for text, token, logits in zip(texts, tokens, rows.step(mx.array(tokens)), strict=True):
                text.fed(token, logits)

    def _look_ahead(self, rows: Rows, texts: list[Text]) -> None:
        count = self._draw.randint(1, TOGETHER // len(texts))
        guesses, lengths = [self._ids(count) for _ in texts], [*rows.lengths]
        logits = rows.look_ahead(mx.array(guesses)).reshape(len(texts), count, -1)
        right = [self._draw.randint(1, count) for _ in texts]
        rows.resize([length + more for length, more in zip(lengths, right, strict=True)])
        for row, text in enumerate(texts):
            for place in range(right[row]):
                text.fed(guesses[row][place], logits[row, place])

    def _part(self, rows: Rows, texts: list[Text]) -> None:
        """Has a text go on among others too, by a copy of its caches of some kind."""
        row = self._draw.randrange(len(texts))
        caches = rows.copy(row)
        length, kind = rows.lengths[row], self._draw.randrange(5)
        if kind == 1:
            caches = [cache.empty() for cache in rows.caches]
            cut = self._draw.randrange(length)
            for own, cache in zip(rows.caches, caches, strict=True):
                ends = [(0, cut), (cut, length)] if cut else [(0, length)]
                cache.restore([own.block(row, *each) for each in ends], length)
        elif kind > 1 and len(texts) == 1:
            kinds = {2: copy.copy, 3: copy.deepcopy, 4: lambda cache: pickle.loads(pickle.dumps(cache))}
            caches = [kinds[kind](cache) for cache in rows.caches]
        others = [batch for batch in self._batches if len(batch[1]) < TOGETHER]
        if others:
            self._add(*self._draw.choice(others), caches, texts[row].copy())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("two_threads")
def test_each_text_has_the_logits_that_it_has_alone(seed: int) -> None:
    model = tiny.random_model(tiny.scaled_config(VOCAB))
    traffic = Traffic(model, seed)
    for _ in range(150):
        traffic.move()
        assert traffic.counted()
    assert len(traffic.texts) > 5 and sum(len(text.tokens) for text in traffic.texts) > 100
    for text in traffic.texts:
        if not text.tokens:
            continue
        rows, found = Rows(model), mx.stack(text.logits)
        rows.join(read(model, text.prompt), text.prompt)
        alone = mx.concatenate([rows.step(mx.array([token])) for token in text.tokens])
        assert not to_the_bit or mx.array_equal(found, alone)
        at_once = model(mx.array([[*text.prompt, *text.tokens]]))[0, len(text.prompt) :]
        assert mx.abs(found - at_once).max().item() < 1e-5 * (at_once.max() - at_once.min()).item()


def test_threads_that_begin_with_one_model_at_a_time() -> None:
    """What is made for the first text is made once, and serves all of them."""
    ids = list(range(3, 60))

    def begun(model: Model, start: threading.Barrier) -> mx.array:
        start.wait()
        rows = Rows(model)
        rows.join(read(model, ids), ids)
        logits = mx.concatenate([rows.step(mx.array([token])) for token in ids[:4]])
        mx.eval(logits)
        return logits

    for _ in range(20):
        model = tiny.random_model(tiny.scaled_config(VOCAB))
        start = threading.Barrier(3)
        with ThreadPoolExecutor(3) as threads:
            first, *others = [each.result() for each in [threads.submit(begun, model, start) for _ in range(3)]]
        assert all(mx.array_equal(first, other) for other in others)
