"""Speculative decoding (Leviathan et al., 2023): one pass over the model verifies several tokens that were guessed.

The text is the one that there would be without it. At each position the model's own logits and the sampler choose, by
the random numbers and the history of that position; a guess that is what they chose saves a pass, and any other is
thrown away with all that follow it. So guesses matter to the text as far as a pass over several tokens rounds otherwise
than passes over one: on a CPU, where `Rows` says so, not at all.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx

from elm_mlx import device
from elm_mlx.errors import InputError
from elm_mlx.inference.drafts import DraftSource, ModelDrafts, PromptLookup, check_retractable, load_draft_model
from elm_mlx.inference.rows import Rows
from elm_mlx.inference.sampling import Sampler, State
from elm_mlx.model.config import read_config
from elm_mlx.model.network import Model
from elm_mlx.store.loading import Loaded

MOST_DRAFTED = 7  # with the token before them eight rows: sixteen, whose bits a CPU keeps too, gain hardly more
_ALLOWED = 31
_SIZES = (2, 4, 8, 16, 32)  # tokens in a pass: for each a step is compiled
_WORTH = 1.03  # times as fast, at least, or no guess is verified
_TIMES = 9  # passes of a size that are remembered
_FASTER = 0.8  # of what passes took: the machine does something else now
_FIRST = 3  # passes over one token that are measured before any over more
_COMPARED, _RUN = 2, 32  # and those later; passes over more, before the next of these
_PATIENCE, _MOST_PATIENCE = 64, 1024  # passes without a guess before one is tried again, though it seems to cost more


class _Choice(NamedTuple):
    """A token chosen and its log-probability, `(1,)`, and the sampler's state after it."""

    token: mx.array
    logprob: mx.array
    state: State


@dataclass(frozen=True)
class DraftFigures:
    """How the drafts of a text fared.

    Attributes:
        drafted, accepted: tokens that were guessed and verified, and those of them that were right.
        passes: of the model, over one token or several; the one that ended the prompt counts.
    """

    drafted: int
    accepted: int
    passes: int

    def __str__(self) -> str:
        share = f"{self.accepted} of {self.drafted} tokens right" if self.drafted else "none was worth it"
        return f"{share}, {1 + self.accepted / self.passes:.2f} tokens a pass"


class Speculation:
    """Drafts of a text verified by its model. It may serve several texts, one after the other.

    Args:
        source: makes the drafts.
        most: tokens of a draft, at most.
    """

    def __init__(self, source: DraftSource, most: int = MOST_DRAFTED) -> None:
        self._source, self._most = source, most
        self._pace = DraftPace(most)
        self._drafted = self._accepted = self._passes = 0

    @property
    def figures(self) -> DraftFigures:
        """How the drafts of the present text, or of the last one, fared."""
        return DraftFigures(self._drafted, self._accepted, self._passes)

    def decode(
        self, rows: Rows, sampler: Sampler, logits: mx.array, state: State, max_tokens: int, text: Sequence[int]
    ) -> Iterator[tuple[int, float]]:
        """Yields tokens and their log-probabilities. When one comes, the rows hold the text before it and perhaps it.

        Args:
            rows: with one text, as far as it was read.
            logits: `(1, vocab_size)` after it.
            state: the sampler's, then.
            text: the ids that drafts may be made of.
        """
        source, left = self._source, max_tokens
        source.begin(text)
        self._drafted = self._accepted = 0
        self._passes = 1
        choice = _Choice(*sampler(logits, state))
        running = piped = False  # the choice is not read yet; and the pass that it depends on was launched ahead
        mx.async_eval(choice.token, choice.logprob, [cache.state for cache in rows.caches])
        resumed = 0.0
        while left:
            ahead, traced = None, rows.traced
            if running and left > 1 and not self._worth(rows, left - 2, 1):
                ahead = self._step(rows, sampler, choice)  # runs while this token is read
            token, logprob = int(choice.token.item()), float(choice.logprob.item())
            if piped and not (traced or rows.traced):
                self._pace.took(1, time.perf_counter() - resumed)
            source.add(token)
            left -= 1
            yield token, logprob
            resumed = time.perf_counter()
            count = self._worth(rows, left - 1) if ahead is None else 0
            running, piped = not count, ahead is not None
            if count:
                before = self._accepted
                choice = yield from self._verify(rows, sampler, choice, count)
                left -= self._accepted - before
            elif left:
                choice = ahead or self._step(rows, sampler, choice)

    def _worth(self, rows: Rows, most: int, unread: int = 0) -> int:
        """Returns how many guesses to verify, up to `most`, after the token that was chosen, which may be `unread`."""
        most = max(0, min(self._most, most, rows.together() - 1))
        return self._pace.choose(self._source.offers(most + unread)[unread:])

    def _step(self, rows: Rows, sampler: Sampler, last: _Choice) -> _Choice:
        """Feeds the token that was chosen last, and launches, without waiting, the choice of the next."""
        choice = _Choice(*sampler(rows.step(last.token), last.state))
        mx.async_eval(choice.token, choice.logprob)
        self._passes += 1
        return choice

    def _verify(
        self, rows: Rows, sampler: Sampler, last: _Choice, count: int
    ) -> Generator[tuple[int, float], None, _Choice]:
        """Feeds the token that was chosen last, which is read, and guesses behind it.

        Yields those that are right. Returns the choice after them.
        """
        begun, length = time.perf_counter(), rows.lengths[0]
        draft = self._source.draft(count, sampler, last.state)
        logits = rows.look_ahead(mx.concatenate([last.token.astype(draft.dtype), draft])[None])
        self._passes += 1
        self._drafted += count
        choices, guesses = self._choices(sampler, logits, last.state), draft.tolist()
        for place, chosen in enumerate(choices):
            choice, token, logprob = chosen
            rows.resize([length + 1 + place])
            if place == count or token != guesses[place]:
                break
            self._accepted += 1
            rows.resize([length + 2 + place])
            self._source.add(token)
            paused = time.perf_counter()
            yield token, logprob
            begun += time.perf_counter() - paused
        if not rows.traced:
            self._pace.took(1 + count, time.perf_counter() - begun)
        return choice

    def _choices(self, sampler: Sampler, logits: mx.array, state: State) -> Iterator[tuple[_Choice, int, float]]:
        """Yields what the sampler chooses at each position, where it has chosen the guesses before, and reads it.

        On a CPU, or by a caller's function, a position is not looked at before that is known, if that matters to it.
        """
        if sampler.looks_at_logits_alone:
            tokens, logprobs, state = sampler(logits, state)
            mx.eval(tokens, logprobs)
            for place, read in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
                yield _Choice(tokens[place : place + 1], logprobs[place : place + 1], state), *read
            return

        def each() -> Iterator[_Choice]:
            choice = _Choice(logits, logits, state)
            for place in range(logits.shape[0]):
                choice = _Choice(*sampler(logits[place : place + 1], choice.state))
                yield choice

        choices = each()
        if device.on_gpu() and not sampler.has_callables:
            made = [*choices]
            mx.async_eval([choice[:2] for choice in made])
            choices = iter(made)
        for choice in choices:
            yield choice, int(choice.token.item()), float(choice.logprob.item())


@dataclass(frozen=True)
class DraftOptions:
    """Where drafts come from, as a command's options say.

    Attributes:
        directory: of a draft model; None for none.
        most: tokens of a draft, at most; None for the default.

    Raises:
        InputError: two sources are named, or a number without any; the draft model has no config.json that can be read.
    """

    prompt_lookup: bool
    directory: Path | None
    most: int | None

    def __post_init__(self) -> None:
        if self.most is not None and not self.prompt_lookup and self.directory is None:
            raise InputError("--num-draft-tokens is of guesses: --prompt-lookup or --draft-model makes them")
        _check(self.prompt_lookup, self.directory is not None, self.most or MOST_DRAFTED)
        if self.directory is not None:
            read_config(self.directory)

    @property
    def drafted(self) -> int:
        """Tokens of a draft, at most; 0 where nothing is guessed."""
        return (self.most or MOST_DRAFTED) if self.prompt_lookup or self.directory is not None else 0

    def load(self, loaded: Loaded) -> dict[str, Any]:
        """Returns the options of `stream_generate` and `Chat`. Raises InputError for a model of another vocabulary."""
        draft_model = None if self.directory is None else load_draft_model(self.directory, loaded)
        return {
            "prompt_lookup": self.prompt_lookup, "draft_model": draft_model,
            "num_draft_tokens": self.most or MOST_DRAFTED,
        }  # fmt: skip


def speculation_for(
    model: Model, prompt_lookup: bool = False, draft_model: Model | None = None, num_draft_tokens: int = MOST_DRAFTED
) -> Speculation | None:
    """Makes the speculation that is asked for; None where none is.

    Raises:
        InputError: both kinds of drafts are; the number is out of range; the draft model has another vocabulary; a
            network keeps a state that can't be taken back.
    """
    _check(prompt_lookup, draft_model is not None, num_draft_tokens)
    if not prompt_lookup and draft_model is None:
        return None
    check_retractable(model)
    return Speculation(
        PromptLookup() if draft_model is None else ModelDrafts(draft_model, model.config.vocab_size), num_draft_tokens
    )


def _check(prompt_lookup: bool, draft_model: bool, most: int) -> None:
    if prompt_lookup and draft_model:
        raise InputError("drafts come from the prompt or from a draft model: give one of the two")
    if not 1 <= most <= _ALLOWED:
        raise InputError(f"num_draft_tokens is {most}: it must be from 1 to {_ALLOWED}")


class DraftPace:
    """How many guesses are worth a pass, by what passes took and how likely guesses are right.

    Costs are learned on the way. A pass over up to twice as many tokens as were tried is thought to cost little more,
    and is tried where guesses are likely right; once it has cost more than it gained, it is tried again seldom. In a
    long run of such passes some go by over one token, for comparison.

    Args:
        most: tokens of a draft, at most.
    """

    def __init__(self, most: int = MOST_DRAFTED) -> None:
        self._sizes = {size for size in _SIZES if size <= most + 1} | {most + 1}
        self._times: dict[int, deque[float]] = {1: deque(maxlen=_TIMES)}
        self._needed = _FIRST  # passes over one token that are to be measured before any over more
        self._singles, self._patience = 0, _PATIENCE  # passes over one token in a row
        self._run, self._longest_run = 0, _RUN  # passes over more, since the last over one was measured

    def took(self, tokens: int, seconds: float) -> None:
        """Takes what a pass over so many tokens took, with the choice and the drafts of them."""
        if tokens == 1:
            self._singles += 1
            self._needed, self._run = max(0, self._needed - 1), 0
        else:
            if self._singles >= self._patience:  # it was tried again
                if seconds < _FASTER * median(self._times.pop(tokens, [0.0])):  # so the others may be faster, too
                    self._times = {1: self._times[1]}
                self._patience = min(2 * self._patience, _MOST_PATIENCE)
            elif self._run:
                self._patience = _PATIENCE
            self._singles, self._run = 0, self._run + 1
            if self._run == self._longest_run:
                self._needed, self._longest_run = _COMPARED, min(2 * self._longest_run, _MOST_PATIENCE)
        self._times.setdefault(tokens, deque(maxlen=_TIMES)).append(seconds)

    def choose(self, likely: Sequence[float]) -> int:
        """Returns how many guesses to verify, of which each is `likely` right if those before it are."""
        if not likely or self._needed:
            return 0
        costs = {size: median(times) for size, times in self._times.items()}
        reach = 2 * max(costs)  # what passes over more cost is not known before those over half as many are tried
        best, gain, expected, chance = 0, _WORTH, 1.0, 1.0
        for count, probability in enumerate(likely, start=1):
            chance *= probability
            expected += chance
            if count >= reach:
                break
            if count + 1 in self._sizes and (speed := expected * costs[1] / _cost(costs, count + 1)) > gain:
                best, gain = count, speed
        return best or int(self._singles >= self._patience)


def _cost(costs: dict[int, float], tokens: int) -> float:
    """Returns the seconds of a pass: measured, or as little as what passes over fewer took allows."""
    if tokens in costs:
        return costs[tokens]
    fewer = max(cost for size, cost in costs.items() if size < tokens)
    return max(fewer, costs[1] * (1 + 0.05 * (tokens - 1)))
