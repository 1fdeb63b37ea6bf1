"""Logits to the next token, as part of the graph: nothing waits for it.

Knows probabilities; knows nothing of text or of the network. A sampler's state (its random key, and the
tokens that a repetition penalty looks at) is arrays that go in and come out, so that the next step can be
launched before this one's token is read, and a seed reproduces a run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from elm_mlx.errors import InputError

State = tuple[mx.array, ...]
Choose = Callable[[mx.array], mx.array]  # log-probabilities (batch, vocab) -> tokens (batch,), as mlx-lm's samplers
Process = Callable[[mx.array, mx.array], mx.array]  # tokens so far (n,), logits (1, vocab) -> logits

PENALTY_WINDOW = 64  # tokens that a repetition penalty looks back on


@dataclass(frozen=True)
class Sampler:
    """How to choose. The order is: `processors`, repetition penalty, `top_k`, `top_p`, `min_p`, temperature.

    As in mlx-lm the filters look at the probabilities before temperature.

    Args:
        temp: 0 takes the likeliest token.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        top_k: keep this many; 0 keeps all.
        min_p: drop tokens less likely than this share of the likeliest.
        repetition_penalty: divide the logit of a token seen in the last 64, or multiply a negative one
            (Keskar et al., 2019); 1 does nothing.
        choose: does so in place of the settings that choose, by the log-probabilities that processors and penalty
            leave; it draws by `mx.random`'s own state.
        processors: change the logits, each what the one before it left; they are given the prompt and the tokens
            since, of a single row.

    Raises:
        InputError: names the setting that is out of range.
    """

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    choose: Choose | None = None
    processors: Sequence[Process] = ()

    def __post_init__(self) -> None:
        rules = (
            ("temp", 0 <= self.temp < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
        )
        for name, holds, range_ in rules:
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}: it must be {range_}")
        if self.choose is not None and (self.temp, self.top_p, self.top_k, self.min_p) != (0, 1, 0, 0):
            raise InputError("a sampler chooses by itself: temp, top_p, top_k and min_p have no place beside it")

    def start(self, prompts: Sequence[Sequence[int]], seed: int | None = None) -> State:
        """The state before the first token after `prompts`, one for each row. `seed` None draws one.

        Raises:
            InputError: the seed does not fit 64 bits.
        """
        check_seed(seed)
        state: State = ()
        if self.temp > 0:
            state += (mx.random.key(int.from_bytes(os.urandom(4), "big") if seed is None else seed),)
        if self.repetition_penalty != 1:
            # Short prompts are filled up with their own first token, which is BOS.
            rows = [[ids[0]] * (PENALTY_WINDOW - len(ids)) + list(ids[-PENALTY_WINDOW:]) for ids in prompts]
            state += (mx.array(rows),)
        if self.processors:
            (ids,) = prompts
            state += (mx.array(ids),)
        return state

    def __call__(self, logits: mx.array, state: State) -> tuple[mx.array, mx.array, State]:
        """Logits `(batch, vocab)` to tokens `(batch,)`, their log-probabilities `(batch,)` and the next state.

        The log-probability is the model's own, before penalty, filters and temperature.
        """
        logits = logits.astype(mx.float32)
        rest = list(state)
        key = rest.pop(0) if self.temp > 0 else None
        recent = rest.pop(0) if self.repetition_penalty != 1 else None
        so_far = rest.pop(0) if self.processors else None
        adjusted = logits
        for process in self.processors:
            adjusted = process(so_far, adjusted)
        if recent is not None:
            adjusted = self._penalize(adjusted, recent)
        if self.choose is not None:
            tokens = self.choose(adjusted - mx.logsumexp(adjusted, axis=-1, keepdims=True)).reshape(-1)
        elif key is None:
            tokens = mx.argmax(adjusted, axis=-1)
        else:
            key, draw = mx.random.split(key)
            tokens = self._draw(adjusted, draw)
        chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        logprobs = chosen - mx.logsumexp(logits, axis=-1)
        after: State = () if key is None else (key,)
        if recent is not None:
            after += (mx.concatenate([recent[:, 1:], tokens[:, None].astype(recent.dtype)], axis=-1),)
        if so_far is not None:
            after += (mx.concatenate([so_far, tokens.astype(so_far.dtype)]),)
        return tokens, logprobs, after

    def keep(self, state: State, rows: mx.array) -> State:
        """The state of these rows alone."""
        return tuple(part[rows] if part.ndim == 2 else part for part in state)

    def _penalize(self, logits: mx.array, recent: mx.array) -> mx.array:
        seen = mx.take_along_axis(logits, recent, axis=-1)
        seen = mx.where(seen > 0, seen / self.repetition_penalty, seen * self.repetition_penalty)
        return mx.put_along_axis(logits, recent, seen, axis=-1)

    def _draw(self, logits: mx.array, key: mx.array) -> mx.array:
        candidates = None  # ids of the columns, where they are no longer the whole vocabulary in order
        if 0 < self.top_k < logits.shape[-1]:
            candidates = mx.argpartition(-logits, self.top_k - 1, axis=-1)[:, : self.top_k]
            logits = mx.take_along_axis(logits, candidates, axis=-1)
        if self.top_p < 1:
            order = mx.argsort(-logits, axis=-1)
            logits = mx.take_along_axis(logits, order, axis=-1)
            candidates = order if candidates is None else mx.take_along_axis(candidates, order, axis=-1)
            probs = mx.softmax(logits, axis=-1)
            before = mx.cumsum(probs, axis=-1) - probs  # the likeliest has nothing before it, so it always stays
            logits = mx.where(before < self.top_p, logits, -mx.inf)
        if self.min_p > 0:
            logits = mx.where(logits >= logits.max(axis=-1, keepdims=True) + math.log(self.min_p), logits, -mx.inf)
        temp = min(max(self.temp, 1e-6), 1e6)  # as good as none, and as good as infinite: float32 takes no more
        drawn = mx.random.categorical(logits / temp, key=key)
        return drawn if candidates is None else mx.take_along_axis(candidates, drawn[:, None], axis=-1)[:, 0]


def sampler_from(settings: Mapping[str, float]) -> Sampler:
    """The Sampler that `settings` say by its fields' names; other names are passed over. Raises InputError."""
    values: dict[str, Any] = {name: settings[name] for name in Sampler.__dataclass_fields__ if name in settings}
    return Sampler(**values)


def check_seed(seed: int | None) -> None:
    """Raises InputError for a seed that does not fit 64 bits."""
    if seed is not None and not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}: it must be from 0 to 2**64 - 1")
