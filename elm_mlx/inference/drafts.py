"""Drafts: guesses at the next tokens of a text, by what it said before or by a smaller model.

A draft is never trusted: `speculation` has the model verify it, and a wrong one costs time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.inference.rows import PREFILL_STEP, Rows, prefill
from elm_mlx.inference.sampling import Sampler, State
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.network import Model
from elm_mlx.store.loading import Loaded, open_model

SHORTEST, LONGEST = 2, 8  # tokens that must, and that need, occur again for what followed them to be guessed
_CANDIDATES = 32  # earlier places that are compared
_FEW = 8  # tokens that a step takes; more are read as a prompt is


class DraftSource(Protocol):
    """Guesses how a text goes on."""

    def __len__(self) -> int:
        """The number of tokens of the text so far."""

    def begin(self, text: Sequence[int]) -> None:
        """Takes another text, or the same one grown or cut."""

    def add(self, token: int) -> None:
        """Appends a token to the text."""

    def offers(self, most: int) -> Sequence[float]:
        """Returns how likely each of up to `most` guesses is right, where those before it are."""

    def draft(self, count: int, sampler: Sampler, state: State) -> mx.array:
        """Guesses the next tokens `(count,)`, at most as many as `offers` had.

        Args:
            sampler, state: what the text's next tokens are chosen by.
        """


class Share:
    """The share of guesses that were right, of the last thirty or so; `expected` before there are any."""

    def __init__(self, expected: float) -> None:
        self._right, self._all = 2 * expected, 2.0

    @property
    def value(self) -> float:
        return self._right / self._all

    def add(self, right: bool) -> None:
        self._right, self._all = 0.97 * self._right + right, 0.97 * self._all + 1


class PromptLookup:
    """Guesses that a text goes on as it did after the last place that ended like it: copies are foreseen.

    The place is the one that agrees in most tokens, `LONGEST` at most and `SHORTEST` at least, and the last of those.
    Where nothing agrees it costs a look into a dictionary. How often a guess was right is followed by the number of
    tokens that agree, whether it was verified or not.
    """

    def __init__(self) -> None:
        self._shares = [Share(1 - 1 / max(1, agreeing)) for agreeing in range(LONGEST + 1)]
        self.begin(())

    def __len__(self) -> int:
        return len(self._text)

    def begin(self, text: Sequence[int]) -> None:
        self._text: list[int] = []
        self._last: dict[tuple[int, int], int] = {}  # where the text went on after two tokens, the last time
        self._earlier: list[int] = []  # of each place, where it went on after the same two tokens before that
        for token in text:
            self._append(token)
        self._place, self._agreeing = self._find()

    def add(self, token: int) -> None:
        if self._agreeing:
            self._shares[self._agreeing].add(self._text[self._place] == token)
        self._append(token)
        self._place, self._agreeing = self._find()

    def offers(self, most: int) -> list[float]:
        agreeing = self._agreeing
        return [self._shares[min(agreeing + at, LONGEST)].value for at in range(most)] if agreeing else []

    def draft(self, count: int, sampler: Sampler, state: State) -> mx.array:
        return mx.array(self.guesses(count))

    def guesses(self, count: int) -> list[int]:
        """Returns the next tokens, as it guesses them."""
        period = len(self._text) - self._place  # a text that goes round in circles goes round again
        return [self._text[self._place + at % period] for at in range(count)]

    def _append(self, token: int) -> None:
        text, place = self._text, 0
        if len(text) >= SHORTEST:
            pair = (text[-2], text[-1])
            place = self._last.get(pair, 0)
            self._last[pair] = len(text)
        self._earlier.append(place)
        text.append(token)

    def _find(self) -> tuple[int, int]:
        """Returns the place that the text goes on from, and how many tokens before it agree: (0, 0) for none."""
        text = self._text
        if len(text) < SHORTEST:
            return 0, 0
        place, best = self._last.get((text[-2], text[-1]), 0), (0, 0)
        for _ in range(_CANDIDATES):
            if not place or best[1] == LONGEST:
                break
            agreeing = SHORTEST
            while agreeing < min(place, LONGEST) and text[place - 1 - agreeing] == text[-1 - agreeing]:
                agreeing += 1
            if agreeing > best[1]:
                best = place, agreeing
            place = self._earlier[place]
        return best


class ModelDrafts:
    """Guesses by a smaller model of the same vocabulary.

    It chooses as the verified model does, by the same random numbers: where both find the same tokens likely they draw
    the same one.

    Raises:
        InputError: the vocabularies differ in size, or the model keeps a state that can't be taken back.
    """

    def __init__(self, model: Model, vocab_size: int) -> None:
        if model.config.vocab_size != vocab_size:
            raise InputError(
                f"the draft model has {model.config.vocab_size:,} tokens and the model {vocab_size:,}: "
                "a draft needs a model of the same vocabulary"
            )
        check_retractable(model)
        self._model = model
        self._share = Share(0.7)
        self._text: list[int] = []
        self._rows = Rows(model)
        self._read_ids: list[int] = []  # of which the rows hold keys and values
        self._agreeing = 0  # so many of them, at least, are the text's
        self._made: mx.array | None = None  # the last guesses
        self._unjudged: list[int] = []  # those of them whose tokens have not come

    def __len__(self) -> int:
        return len(self._text)

    def begin(self, text: Sequence[int]) -> None:
        self._settle()
        self._text, self._agreeing, self._unjudged = list(text), 0, []

    def add(self, token: int) -> None:
        self._settle()
        if self._unjudged:
            right = token == self._unjudged.pop(0)
            self._share.add(right)
            self._unjudged = self._unjudged if right else []
        self._text.append(token)

    def offers(self, most: int) -> list[float]:
        return [self._share.value] * max(0, min(most, self._model.config.max_context_length - len(self._text)))

    def draft(self, count: int, sampler: Sampler, state: State) -> mx.array:
        try:
            logits = self._read(len(self._text) + count)
            guesses: list[mx.array] = []
            for at in range(count):
                logits = self._rows.step(guesses[-1]) if at else logits
                if sampler.has_callables:  # which may count how often they are called
                    guesses.append(mx.argmax(logits, axis=-1))
                else:
                    guess, _, state = sampler(logits, state)
                    guesses.append(guess)
                mx.async_eval(guesses[-1])
        except BaseException:
            self._forget()
            raise
        self._made = mx.concatenate(guesses)
        return self._made

    def _settle(self) -> None:
        """Reads the guesses that were made last, which by now are computed."""
        if self._made is not None:
            self._unjudged = self._made.tolist()
            self._read_ids += self._unjudged[:-1]  # the last one was not fed
            self._made = None

    def _read(self, length: int) -> mx.array:
        """Reads what is new of the text, which grows to `length`. Returns the logits `(1, vocab_size)` after it."""
        self._settle()
        if len(self._rows) and not self._rows.caches[0].suits(length):
            self._forget()
        rows, text = self._rows, self._text
        most = min(len(self._read_ids), len(text) - 1)  # the last one's logits are not kept
        while self._agreeing < most and self._read_ids[self._agreeing] == text[self._agreeing]:
            self._agreeing += 1
        kept = min(self._agreeing, most)
        new, self._read_ids, self._agreeing = text[kept:], [*text], len(text)
        if not len(rows):
            caches = make_prompt_cache(self._model)
            logits = prefill(self._model, new, caches, PREFILL_STEP, length)
            rows.join(caches, None)
            return logits
        rows.resize([kept])
        if len(new) <= _FEW:
            logits = rows.look_ahead(mx.array([new]))[-1:]
        else:
            logits = prefill(self._model, new, rows.caches, PREFILL_STEP, length)
        rows.resize([len(text)])
        return logits

    def _forget(self) -> None:
        self._rows = Rows(self._model)
        self._read_ids, self._agreeing, self._made, self._unjudged = [], 0, None, []


def check_retractable(model: Model) -> None:
    """Raises InputError for a network whose cache can't be cut back, as that of a rejected draft must be."""
    if not all(cache.is_trimmable() for cache in make_prompt_cache(model)):
        raise InputError(
            "drafts need a network whose cache can be cut back to before a wrong one, and this one keeps a state that "
            "cannot: leave out --prompt-lookup and --draft-model"
        )


def load_draft_model(directory: Path, *targets: Loaded) -> Model:
    """Loads the model that drafts for `targets`.

    Raises:
        InputError: it can't be read, or its vocabulary is another than that of one of them.
    """
    path = reading.expanded(directory)
    draft = open_model(path)
    for target in targets:
        _check_vocabulary(path, draft, target)
    return draft.model


def _check_vocabulary(path: Path, draft: Loaded, loaded: Loaded) -> None:
    own, its = loaded.model.config.vocab_size, draft.model.config.vocab_size
    if its != own:
        raise InputError(f"{path}: has {its:,} tokens and the model {own:,}: a draft needs the same vocabulary")
    if draft.tokenizer is not None and loaded.tokenizer is not None:
        pairs = zip_longest(draft.tokenizer.pieces, loaded.tokenizer.pieces)
        for number, (piece, expected) in enumerate(pairs):
            if piece != expected:
                raise InputError(
                    f"{path}: token {number} is {piece!r} and the model's {expected!r}: "
                    "a draft needs the same vocabulary"
                )
