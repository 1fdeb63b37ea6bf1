"""The answers of one model that an engine decodes together: they join and leave between two steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from elm_mlx.inference.drafts import DraftSource, ModelDrafts, PromptLookup
from elm_mlx.inference.generation import checked
from elm_mlx.inference.prefix_tree import BLOCK
from elm_mlx.inference.requests import Failed, Generated, OpenRequest, ScoredToken
from elm_mlx.inference.rows import Rows
from elm_mlx.inference.sampling import joined
from elm_mlx.inference.speculation import DraftPace
from elm_mlx.model import ops
from elm_mlx.model.cache import KVCache, make_prompt_cache, row_capacity, row_slots
from elm_mlx.model.network import Model
from elm_mlx.store.loading import Loaded


class ContinuousBatch:
    """The answers of one model that are being decoded, and the step that they share.

    An answer that is alone may have guesses verified in its step, as in `speculation`; when others join, the step's
    rows are theirs.

    Args:
        drafted: tokens that are guessed for a step at most; 0 for none.
        draft_model: guesses them; None for prompt lookup.

    Attributes:
        answers: in the order of `rows`.
        logits: `(rows, vocab_size)`, of each answer's next token.
        new_caches: makes empty caches for a text.
        drafts: guesses that were verified since the start, and those of them that were right.
    """

    def __init__(
        self, loaded: Loaded, kv_bits: int | None = None, drafted: int = 0, draft_model: Model | None = None
    ) -> None:
        self.model: Model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.rows = Rows(loaded.model)
        self.answers: list[OpenRequest] = []
        self.logits: mx.array | None = None
        self._chosen: tuple[list[OpenRequest], mx.array, mx.array, dict[int, tuple[mx.array, mx.array]]] | None = None
        self.new_caches = partial(make_prompt_cache, loaded.model, kv_bits)
        self._position_bytes, self._state_bytes = _cache_bytes(self.model, self.new_caches())
        self.drafts = (0, 0)
        self._drafted = 0 if self.keeps_states else drafted
        self._pace = DraftPace(drafted) if self._drafted else None
        self._model_drafts = (
            ModelDrafts(draft_model, self.model.config.vocab_size)
            if draft_model is not None and self._drafted
            else None
        )
        self._draft_position_bytes, self._draft_context = 0, 0
        if draft_model is not None and self._drafted:
            self._draft_position_bytes, _ = _cache_bytes(draft_model, make_prompt_cache(draft_model))
            self._draft_context = draft_model.config.max_context_length
        self._drafted_for: OpenRequest | None = None  # whose text the draft model has
        self._stepped = False  # the last launch was a step of one answer
        self._reported: float | None = None  # when the token before such a step was

    def bytes_of(self, lengths: Sequence[int]) -> int:
        """Returns what the caches of rows take that grow to `lengths`, and the draft model's for one of them."""
        if not lengths:
            return 0
        slots, capacity = row_slots(len(lengths)), row_capacity(max(lengths))
        states = sum(1 + length // BLOCK for length in lengths)  # those after each block are kept for the prefix tree
        drafts = row_capacity(min(max(lengths), self._draft_context)) * self._draft_position_bytes
        return slots * capacity * self._position_bytes + states * self._state_bytes + drafts

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the prefix tree."""
        return BLOCK * self._position_bytes + self._state_bytes

    @property
    def keeps_states(self) -> bool:
        """Returns whether the network keeps states in place of keys and values."""
        return self._state_bytes > 0

    def name(self, length: int) -> tuple[int, bool]:
        """Returns what texts of `length` have in common: this model, and how it rotates them."""
        switch = self.model.config.rope_switch
        return id(self), switch is not None and length > switch

    def lengths(self) -> list[int]:
        """Returns how long each text may become."""
        return [answer.prompt_tokens + answer.most for answer in self.answers]

    def join(self, task: OpenRequest, logits: mx.array) -> None:
        """Adds a row: the prompt of `task` is in its caches, and `logits` `(1, vocab_size)` follow it."""
        self.rows.join(task.caches, task.ids)
        task.caches, self._reported = [], None
        if self._pace is not None and task.grammar is None:
            task.drafts = PromptLookup() if self._model_drafts is None else self._model_drafts
        self.answers.append(task)
        self.logits = logits if self.logits is None else mx.concatenate([self.logits, logits])

    def launch(self, leaving: Callable[[OpenRequest, int], None]) -> None:
        """Chooses every row's next token, and computes the logits after it, without waiting.

        `leaving` is called for the rows whose last token this is, before they are removed.
        """
        tokens, logprobs, tops = self._choose()
        self._chosen = (list(self.answers), tokens, logprobs, tops)
        self._stepped = False
        if self._pace is not None and len(self.answers) == 1 and self._verify(self._pace, self.answers[0]):
            return
        launched: list[Any] = [tokens, logprobs, tops]
        kept = self.remove([row for row, answer in enumerate(self.answers) if answer.left == 1], leaving)
        if self.answers:
            fed = tokens if len(kept) == tokens.size else tokens[mx.array(kept)]
            self.logits = self.rows.step(fed)
            self._stepped = len(self.answers) == 1
            if self.keeps_states:
                for row, (answer, length) in enumerate(zip(self.answers, self.rows.lengths, strict=True)):
                    answer.keep_state(self.rows.caches, row, length)
                # Snapshots too, or they would hold on to what they are cut from.
                launched += [cache.state for cache in self.rows.caches], [answer.snapshots for answer in self.answers]
            launched.append(self.logits)
        mx.async_eval(launched)

    def deliver(self) -> tuple[int, list[OpenRequest]]:
        """Reports the tokens that `launch` chose, while what it launched is running. Returns their number, and
        the answers that end."""
        assert self._chosen is not None
        answers, tokens, logprobs, tops = self._chosen
        ended: list[OpenRequest] = []
        count = 0
        for row, (answer, token, logprob) in enumerate(zip(answers, tokens.tolist(), logprobs.tolist(), strict=True)):
            if answer.over:
                continue
            count += 1
            try:
                likeliest = ranked(*(array.tolist() for array in tops[row])) if row in tops else ()
                finished = _deliver(answer, ScoredToken(token, checked(logprob), likeliest))
            except Exception as error:
                answer.emit(Failed(error))
                finished = True
                answer.ids = []  # nothing of it is worth keeping
            if finished:
                answer.over = True
                ended.append(answer)
        self._chosen = None
        if self._pace is not None:
            self._time(self._pace)
        return count, ended

    def _verify(self, pace: DraftPace, answer: OpenRequest) -> bool:
        """Verifies guesses behind the token of the only answer that was just chosen, if any are worth it.

        Those that are right are chosen with it. Returns False where nothing was fed.
        """
        if answer.drafts is None:
            return False
        source = self._read_on(answer, answer.drafts)
        most = min(self._drafted, answer.left - 1, self.rows.together() - 1)
        if not pace.choose(source.offers(most + 1)[1:]):  # as far as it is known without waiting
            return False
        assert self._chosen is not None
        parts = [self._chosen[1:3]]
        fed, (answers, _, _, tops) = parts[0][0].tolist(), self._chosen
        source.add(fed[0])
        count = pace.choose(source.offers(most))
        if not count:
            return False
        begun, length = time.perf_counter(), self.rows.lengths[0]
        guesses = source.draft(count, answer.request.sampler, answer.state).tolist()
        logits = self.rows.look_ahead(mx.array([*fed, *guesses]))
        for place, guess in enumerate(guesses):
            self.logits, before = logits[place : place + 1], answer.state
            token, logprob, top = self._choose()
            if int(token.item()) != guess:
                answer.state = before  # it is chosen again, as the next token
                break
            if 0 in top:
                tops[len(parts)] = top[0]
            parts.append((token, logprob))
        else:
            self.logits = logits[count:]
        self.rows.resize(length + len(parts))
        tokens, logprobs = (mx.concatenate(arrays) for arrays in zip(*parts, strict=True))
        self._chosen = (answers * len(parts), tokens, logprobs, tops)
        self.drafts = self.drafts[0] + count, self.drafts[1] + len(parts) - 1
        if not self.rows.traced:
            pace.took(1 + count, time.perf_counter() - begun)
        self._reported = None
        return True

    def _read_on(self, answer: OpenRequest, source: DraftSource) -> DraftSource:
        """Has the source of an answer's guesses read all of its text."""
        if source is self._model_drafts and answer is not self._drafted_for:
            source.begin(answer.ids)
            self._drafted_for = answer
        for token in answer.ids[len(source) :]:
            source.add(token)
        return source

    def _time(self, pace: DraftPace) -> None:
        """Takes the time since the token before, where the step of an only answer was all that it waited for."""
        now = time.perf_counter()
        if self._reported is not None and not self.rows.traced:
            pace.took(1, now - self._reported)
        self._reported = now if self._stepped else None

    def remove(self, rows: Sequence[int], leaving: Callable[[OpenRequest, int], None]) -> list[int]:
        """Removes rows. Returns the former places of those that are left, in their order now."""
        order = list(range(len(self.answers)))
        for row in sorted(rows, reverse=True):
            leaving(self.answers[row], row)
            self.rows.leave(row)
            for places in (order, self.answers):
                places[row] = places[-1]  # type: ignore[assignment]
                places.pop()
        if not order:
            self.logits = None
        elif rows and self.logits is not None:
            self.logits = self.logits[mx.array(order)]
        return order

    def reset(self) -> list[OpenRequest]:
        """Empties the batch, whatever state it is in. Returns the answers that were in it, or wait for a last token."""
        chosen = [] if self._chosen is None else self._chosen[0]
        answers = [*self.answers, *(answer for answer in chosen if answer not in self.answers)]
        self.answers, self.rows, self.logits, self._chosen = [], Rows(self.model), None, None
        self._reported = self._drafted_for = None
        return answers

    def _choose(self) -> tuple[mx.array, mx.array, dict[int, tuple[mx.array, mx.array]]]:
        """Returns tokens and log-probabilities `(rows,)`, and by row the likeliest tokens and theirs, where wanted."""
        assert self.logits is not None
        logits = self.logits.astype(mx.float32)
        tops = {
            row: top_tokens(logits[row], answer.request.top_logprobs)
            for row, answer in enumerate(self.answers)
            if answer.request.top_logprobs
        }
        order: list[int] = []
        parts = []
        for rows in self._alike():
            answers = [self.answers[row] for row in rows]
            picked = logits if len(rows) == len(self.answers) else logits[mx.array(rows)]
            biases = [answer.bias for answer in answers if answer.bias is not None]
            token, logprob, state = answers[0].request.sampler(
                picked, joined([answer.state for answer in answers]), mx.stack(biases) if biases else None
            )
            for place, answer in enumerate(answers):
                answer.state = state.row(place)
            order += rows
            parts.append((token, logprob))
        if len(parts) == 1:
            return *parts[0], tops
        tokens, logprobs = (mx.concatenate(arrays) for arrays in zip(*parts, strict=True))
        back = mx.array(sorted(range(len(order)), key=order.__getitem__))
        return tokens[back], logprobs[back], tops

    def _alike(self) -> list[list[int]]:
        """Returns the rows in groups, in each of which one call of a sampler chooses for all."""
        groups: list[list[int]] = []
        for row, answer in enumerate(self.answers):
            group = next((group for group in groups if self.answers[group[0]].chooses_as(answer)), None)
            if group is None:
                groups.append([row])
            else:
                group.append(row)
        return groups


def _cache_bytes(model: Model, caches: list[KVCache]) -> tuple[int, int]:
    """Returns the bytes of a position in empty caches of a text, and of a text's state."""
    mx.eval(model.transformer(mx.array([[0]]), caches), [cache.state for cache in caches])
    per_row = sum(cache.nbytes for cache in caches)
    return (per_row // caches[0].capacity, 0) if caches[0].is_trimmable() else (0, per_row)


def _deliver(answer: OpenRequest, scored: ScoredToken) -> bool:
    """Reports a token. Returns whether it is the last."""
    answer.ids.append(scored.token)
    text, stream = answer.stream.add(scored.token), answer.stream
    if answer.grammar is not None and stream.finish_reason is None:
        answer.grammar.accept(scored.token)
        if answer.grammar.finished:
            text, stream.finish_reason = text + stream.finish(), "stop"
        else:
            answer.bias = answer.grammar.bias()
    answer.emit(Generated(text, scored, stream.finish_reason))
    return stream.finish_reason is not None


def top_tokens(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Returns ids and log-probabilities of the `count` likeliest tokens of logits `(..., vocab_size)`, in no order."""
    count = min(count, logits.shape[-1])
    ids = mx.argpartition(-logits, count - 1, axis=-1)[..., :count]
    chosen = mx.take_along_axis(logits, ids, axis=-1)
    return ids, chosen - ops.logsumexp(logits)[..., None]


def ranked(ids: list[int], logprobs: list[float]) -> tuple[tuple[int, float], ...]:
    """Returns tokens with their log-probabilities, likeliest first."""
    return tuple(sorted(zip(ids, logprobs, strict=True), key=lambda pair: (-pair[1], pair[0])))
