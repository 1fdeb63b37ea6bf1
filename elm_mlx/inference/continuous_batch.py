"""The answers of one model that an engine decodes together: they join and leave between two steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from elm_mlx import device
from elm_mlx.inference.drafts import DraftSource, ModelDrafts, PromptLookup
from elm_mlx.inference.generation import checked
from elm_mlx.inference.prefix_tree import BLOCK
from elm_mlx.inference.requests import Failed, Generated, OpenRequest, ScoredToken
from elm_mlx.inference.rows import TOGETHER, Rows
from elm_mlx.inference.sampling import joined
from elm_mlx.inference.speculation import DraftPace
from elm_mlx.model import ops
from elm_mlx.model.cache import KVCache, make_prompt_cache, row_capacity, row_slots
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.model.network import Model
from elm_mlx.store.loading import Loaded


class ContinuousBatch:
    """The answers of one model that are being decoded, and the step that they share.

    Answers may have guesses verified in a step, as in `speculation`: a draft model's where one is alone, and of copies
    as many as make `TOGETHER` rows with the answers' own. The more join, the fewer are left.

    Args:
        drafted: tokens that are guessed for a step at most; 0 for none.
        draft_model: guesses them; None for prompt lookup.
        kvp: predicts what prompts leave in the caches; None where the model reads them.

    Attributes:
        answers: in the order of `rows`.
        logits: `(rows, vocab_size)`, of each answer's next token.
        new_caches: makes empty caches for a text.
        drafts: guesses that were verified since the start, and those of them that were right.
    """

    def __init__(
        self,
        loaded: Loaded,
        kv_bits: int | None = None,
        drafted: int = 0,
        draft_model: Model | None = None,
        kvp: KVPrediction | None = None,
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
        self._paces: dict[int, DraftPace] = {}  # by the number of answers
        self._model_drafts = (
            ModelDrafts(draft_model, self.model.config.vocab_size)
            if draft_model is not None and self._drafted
            else None
        )
        self._draft_position_bytes, self._draft_context = 0, 0
        if draft_model is not None and self._drafted:
            self._draft_position_bytes, _ = _cache_bytes(draft_model, make_prompt_cache(draft_model))
            self._draft_context = draft_model.config.max_context_length
        self.kvp = kvp
        self._own_position_bytes = 0 if kvp is None else _cache_bytes(kvp.auxiliary, self.new_own_caches())[0]
        self._drafted_for: OpenRequest | None = None  # whose text the draft model has
        self._stepped = False  # the last launch was a step of one token each
        self._reported: float | None = None  # when the tokens before such a step of the same answers were

    def bytes_of(self, lengths: Sequence[int]) -> int:
        """Returns what the caches of rows take that grow to `lengths`, and the smaller models' for one of them."""
        if not lengths:
            return 0
        slots, capacity = row_slots(len(lengths)), row_capacity(max(lengths))
        states = sum(1 + length // BLOCK for length in lengths)  # those after each block are kept for the prefix tree
        drafts = row_capacity(min(max(lengths), self._draft_context)) * self._draft_position_bytes
        own = capacity * self._own_position_bytes
        return slots * capacity * self._position_bytes + states * self._state_bytes + drafts + own

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the prefix tree."""
        return BLOCK * (self._position_bytes + self._own_position_bytes) + self._state_bytes

    def new_own_caches(self) -> list[KVCache]:
        """Makes empty caches for what the auxiliary model of a KV prediction reads; none without one."""
        return [] if self.kvp is None else make_prompt_cache(self.kvp.auxiliary)

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
        task.caches, task.own, self._reported = [], [], None
        if self._drafted and task.grammar is None:
            task.drafts = PromptLookup() if self._model_drafts is None else self._model_drafts
        self.answers.append(task)
        self.logits = logits if self.logits is None else mx.concatenate([self.logits, logits])

    def show_first(self, task: OpenRequest) -> tuple[int, list[OpenRequest]]:
        """Reports the first token of the answer that joined last, before it takes a step. Returns as `deliver`."""
        assert self.logits is not None and task.first is None
        token, logprob, tops = self._choose([task], self.logits[-1:])
        reported = self._report([task], token, logprob, tops)
        task.first = token, logprob
        return reported

    def launch(self, leaving: Callable[[OpenRequest, int], None]) -> None:
        """Chooses every row's next token, and computes the logits after it, without waiting.

        `leaving` is called for the rows whose last token this is, before they are removed.
        """
        assert self.logits is not None
        tokens, logprobs, tops = self._choose(self.answers, self.logits)
        self._chosen = (list(self.answers), tokens, logprobs, tops)
        self._stepped = False
        if self._drafted and self._verify():
            return
        launched: list[Any] = [tokens, logprobs, tops]
        kept = self.remove([row for row, answer in enumerate(self.answers) if answer.left == 1], leaving)
        if self.answers:
            fed = tokens if len(kept) == tokens.size else tokens[mx.array(kept)]
            self.logits = self.rows.step(fed)
            self._stepped = True
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
        reported = self._report(*self._chosen)
        self._chosen = None
        if self._drafted:
            self._time()
        return reported

    def _report(
        self, answers: Sequence[OpenRequest], tokens: mx.array, logprobs: mx.array, tops: dict[int, Any]
    ) -> tuple[int, list[OpenRequest]]:
        """Reports tokens, but for those that were. Returns their number, and the answers that end."""
        ended: list[OpenRequest] = []
        count = 0
        for row, (answer, token, logprob) in enumerate(zip(answers, tokens.tolist(), logprobs.tolist(), strict=True)):
            if answer.over:
                continue
            if answer.first is not None:
                answer.first = None
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
        return count, ended

    def _verify(self) -> bool:
        """Verifies guesses behind the tokens that were just chosen, of each answer as many, if any are worth it.

        Those that are right are chosen with them. Returns False where nothing was fed.
        """
        assert self._chosen is not None
        texts, lengths = len(self.answers), self.rows.lengths
        room = min(answer.left for answer in self.answers) - 1
        pace, most = self._pace(), min(self._most(), room, self.rows.together() - 1)
        if pace is None or most < 1:
            return False
        sources = [self._read_on(answer) for answer in self.answers]
        known = [source.offers(most + 1)[1:] if source is not None else () for source in sources]  # without waiting
        if not pace.choose(_likely(known)):
            return False
        _, tokens, logprobs, tops = self._chosen
        fed = tokens.tolist()
        offers: list[Sequence[float]] = []
        for source, token in zip(sources, fed, strict=True):
            if source is not None:
                source.add(token)
            offers.append(source.offers(most) if source is not None else ())
        count = pace.choose(_likely(offers))
        if not count:
            return False
        begun = time.perf_counter()
        guesses = []
        for answer, source, offered in zip(self.answers, sources, offers, strict=True):
            drafted = min(count, len(offered))
            made = (
                source.draft(drafted, answer.request.sampler, answer.state).tolist()
                if source is not None and drafted
                else []
            )
            guesses.append([*made, *[0] * (count - drafted)])  # which are not looked at
        logits = self.rows.look_ahead(mx.array([[token, *made] for token, made in zip(fed, guesses, strict=True)]))
        answers, parts, right = list(self.answers), [(tokens, logprobs)], [0] * texts
        going = [row for row in range(texts) if offers[row]]
        for place in range(count):
            going = [row for row in going if place < len(offers[row])]
            if not going:
                break
            before = [self.answers[row].state for row in going]
            at = mx.array([row * (1 + count) + place for row in going])
            token, logprob, top = self._choose([self.answers[row] for row in going], logits[at], behind=True)
            found, still = token.tolist(), []
            for index, row in enumerate(going):
                if found[index] != guesses[row][place]:
                    self.answers[row].state = before[index]  # it is chosen again, as the next token
                    continue
                right[row] += 1
                still.append(index)
                if index in top:
                    tops[len(answers) + len(still) - 1] = top[index]
            answers += [self.answers[going[index]] for index in still]
            if still:
                parts.append((token[mx.array(still)], logprob[mx.array(still)]))
            going = [going[index] for index in still]
        self.logits = logits[mx.array([row * (1 + count) + right[row] for row in range(texts)])]
        self.rows.resize([length + 1 + more for length, more in zip(lengths, right, strict=True)])
        self._chosen = (answers, *(mx.concatenate(arrays) for arrays in zip(*parts, strict=True)), tops)
        self.drafts = self.drafts[0] + sum(min(count, len(each)) for each in offers), self.drafts[1] + sum(right)
        if not self.rows.traced:
            pace.took(1 + count, time.perf_counter() - begun)
        self._reported = None
        return True

    def _most(self) -> int:
        """Returns how many guesses each answer may have in a step."""
        texts = len(self.answers)
        if texts == 1:
            return self._drafted
        if device.on_gpu() or self._model_drafts is not None:
            return 0
        return min(self._drafted, TOGETHER // texts - 1) if texts else 0

    def _pace(self) -> DraftPace | None:
        """Returns the pace of steps of so many answers; None where nothing is guessed."""
        texts, most = len(self.answers), self._most()
        if most < 1 or not any(answer.drafts is not None for answer in self.answers):
            return None
        if texts not in self._paces:
            self._paces[texts] = DraftPace(most)
        return self._paces[texts]

    def _read_on(self, answer: OpenRequest) -> DraftSource | None:
        """Returns the source of an answer's guesses, which has read what was fed; None where nothing is guessed."""
        source, length = answer.drafts, len(answer.ids) - (answer.first is not None)
        if source is None:
            return None
        if self._model_drafts is not None and answer is not self._drafted_for:
            source.begin(answer.ids[:length])
            self._drafted_for = answer
        for token in answer.ids[len(source) : length]:
            source.add(token)
        return source

    def _time(self) -> None:
        """Takes the time since the tokens before, where the step of the same answers was all that they waited for."""
        now, pace = time.perf_counter(), self._pace() if self._stepped else None
        if pace is not None and self._reported is not None and not self.rows.traced:
            pace.took(1, now - self._reported)
        self._reported = now if self._stepped else None

    def interrupt(self) -> None:
        """Has the time until the next tokens not be taken for a step's: something else is computed meanwhile."""
        self._reported = None

    def remove(self, rows: Sequence[int], leaving: Callable[[OpenRequest, int], None]) -> list[int]:
        """Removes rows. Returns the former places of those that are left, in their order now."""
        order = list(range(len(self.answers)))
        self._reported = None if rows else self._reported
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

    def _choose(
        self, answers: Sequence[OpenRequest], logits: mx.array, behind: bool = False
    ) -> tuple[mx.array, mx.array, dict[int, tuple[mx.array, mx.array]]]:
        """Returns tokens and log-probabilities `(rows,)`, and by row the likeliest tokens and theirs, where wanted.

        Args:
            behind: guesses are chosen, so what `show_first` has chosen of an answer stands before them.
        """
        logits = logits.astype(mx.float32)
        tops = {
            row: top_tokens(logits[row], answer.request.top_logprobs)
            for row, answer in enumerate(answers)
            if answer.request.top_logprobs
        }
        order: list[int] = []
        parts: list[tuple[mx.array, mx.array]] = []
        for rows in _alike(answers):
            group = [answers[row] for row in rows]
            order += rows
            if group[0].first is not None and not behind:
                parts.append(group[0].first)
                continue
            picked = logits if len(rows) == len(answers) else logits[mx.array(rows)]
            biases = [answer.bias for answer in group if answer.bias is not None]
            token, logprob, state = group[0].request.sampler(
                picked, joined([answer.state for answer in group]), mx.stack(biases) if biases else None
            )
            for place, answer in enumerate(group):
                answer.state = state.row(place)
            parts.append((token, logprob))
        if len(parts) == 1:
            return *parts[0], tops
        tokens, logprobs = (mx.concatenate(arrays) for arrays in zip(*parts, strict=True))
        back = mx.array(sorted(range(len(order)), key=order.__getitem__))
        return tokens[back], logprobs[back], tops


def _alike(answers: Sequence[OpenRequest]) -> list[list[int]]:
    """Returns the rows in groups, in each of which one call of a sampler chooses for all."""
    groups: list[list[int]] = []
    for row, answer in enumerate(answers):
        group = next((group for group in groups if answers[group[0]].chooses_as(answer)), None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return groups


def _likely(offers: Sequence[Sequence[float]]) -> list[float]:
    """Returns how likely each of several guesses is right where those before it are, of several texts together."""
    likely, before = [], float(len(offers))
    chances = [1.0] * len(offers)
    for place in range(max(map(len, offers), default=0)):
        if not before:
            break
        chances = [
            chance * offered[place] if place < len(offered) else 0.0
            for chance, offered in zip(chances, offers, strict=True)
        ]
        likely.append(sum(chances) / before)
        before = sum(chances)
    return likely


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
