"""Generation: prefill of a prompt, decoding token by token, and where the text ends.

The public names are mlx-lm's.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from elm_mlx.device import peak_memory
from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.rows import PREFILL_STEP, Rows, predicted_prefill, prefill
from elm_mlx.inference.sampling import Choose, Process, Sampler, State
from elm_mlx.inference.speculation import MOST_DRAFTED, DraftFigures, Speculation, speculation_for
from elm_mlx.model.cache import KVCache, make_prompt_cache, shared_length
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.model.network import Model
from elm_mlx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Response:
    """One token, and the generation's figures after it.

    Attributes:
        text: the text that is final with this token; may be empty, or flush what earlier tokens held back.
        token: its id.
        logprob: natural logarithm of the model's own probability of it, before temperature and filters.
        finish_reason: None but for the last: "stop" (EOS or a stop string), "length" (`max_tokens`) or
            "context" (the model's context is full).
        cached_tokens: of the prompt, those that were in `prompt_cache` and not read again.
        predicted_tokens: of the prompt, those whose keys and values were predicted, and not computed by the model.
        drafts: how they fared so far; None where nothing is guessed.
        prompt_tps, generation_tps: tokens a second, of a prompt those that were read; the latter from when the second
            is asked for. time_to_first_token: seconds. peak_memory: bytes.
    """

    text: str
    token: int
    logprob: float
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int
    predicted_tokens: int
    generation_tokens: int
    drafts: DraftFigures | None
    prompt_tps: float
    generation_tps: float
    time_to_first_token: float
    peak_memory: int


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    sampler: Choose | None = None,
    logits_processors: Sequence[Process] = (),
    seed: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    stop_at_eos: bool = True,
    prefill_step: int = PREFILL_STEP,
    prompt_cache: list[KVCache] | None = None,
    cached: Sequence[int] | None = None,
    prompt_lookup: bool = False,
    draft_model: Model | None = None,
    num_draft_tokens: int = MOST_DRAFTED,
    kvp: KVPrediction | None = None,
) -> str:
    """Returns the whole text that `stream_generate` streams; all options are its."""
    responses = stream_generate(
        model, tokenizer, prompt,
        max_tokens=max_tokens, temp=temp, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
        sampler=sampler, logits_processors=logits_processors, seed=seed, stop=stop, stop_ids=stop_ids,
        stop_at_eos=stop_at_eos, prefill_step=prefill_step, prompt_cache=prompt_cache, cached=cached,
        prompt_lookup=prompt_lookup, draft_model=draft_model, num_draft_tokens=num_draft_tokens, kvp=kvp,
    )  # fmt: skip
    return "".join(response.text for response in responses)


def stream_generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    sampler: Choose | None = None,
    logits_processors: Sequence[Process] = (),
    seed: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    stop_at_eos: bool = True,
    prefill_step: int = PREFILL_STEP,
    prompt_cache: list[KVCache] | None = None,
    cached: Sequence[int] | None = None,
    prompt_lookup: bool = False,
    draft_model: Model | None = None,
    num_draft_tokens: int = MOST_DRAFTED,
    kvp: KVPrediction | None = None,
) -> Iterator[Response]:
    """Continues `prompt`, a token at a time.

    Args:
        tokenizer: None where the prompt is ids and no text is wanted.
        prompt: text, which gets BOS in front, or token ids as they are.
        max_tokens: at most so many; fewer where the context ends.
        temp, top_p, top_k, min_p, repetition_penalty: see `sampling.Sampler`.
        sampler: a function of the log-probabilities `(1, vocab)` that gives the next token `(1,)`, as mlx-lm's
            `make_sampler` makes them, in place of `temp`, `top_p`, `top_k`, `min_p` and `seed`.
        logits_processors: functions of the tokens so far, `prompt` and what followed, `(n,)` and of the logits
            `(1, vocab)` that give other logits, as mlx-lm's `make_logits_processors` makes them; before all else.
        seed: the same one gives the same tokens; None draws one.
        stop: strings that end the text; neither they nor EOS are part of it.
        stop_ids: tokens that end it beside EOS, such as a chat template's.
        stop_at_eos: False to go on past EOS, for measurements.
        prefill_step: prompt tokens computed in one pass.
        prompt_cache: from `make_prompt_cache`, empty or with what came before `prompt` in it. Between two tokens,
            and after the last, it holds the first `offset` of what was before, `prompt` and the tokens so far. One
            with a limit holds some of them, and the context does not end the text.
        cached: the ids in `prompt_cache`, where `prompt` is a whole text that may begin with them: what it does is not
            read again, but for the last piece of `prefill_step`, so that the text is, to the bit, the one that it
            would be without, where those ids were read in such pieces.
        prompt_lookup: guess that `prompt` and what followed are copied from, and verify several tokens in a pass over
            the model. The text is the same; where it copies it comes faster (see `speculation`).
        draft_model: a smaller model of the same vocabulary that guesses, in place of that.
        num_draft_tokens: guesses in a pass, at most; fewer where that pays better, and none where they don't. By
            more than 15 the text is that without them but for rounding.
        kvp: predicts the keys and values of `prompt` but for its last token, by a smaller model, in place of the model.
            The first token comes sooner, and the text is another: it is lossy. Not behind a filled `prompt_cache`.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, a prompt that does not fit the context,
            a setting out of range; guesses for a network whose state can't be taken back; a prediction for caches that
            hold a text or drop positions.
    """
    if sampler is not None and seed is not None:
        raise InputError("seed has no effect beside a sampler: call `mx.random.seed`")
    if tokenizer is None and stop:
        raise InputError("stop strings need a tokenizer")
    chosen = Sampler(temp, top_p, top_k, min_p, repetition_penalty, sampler, tuple(logits_processors))
    check_steps(max_tokens, prefill_step)
    caches = make_prompt_cache(model) if prompt_cache is None else prompt_cache
    used, endless = caches[0].length if cached is None else 0, caches[0].limit is not None
    if kvp is not None:
        check_predictable(caches)
    ids = encode_prompt(model, tokenizer, prompt, used, endless)
    room = sys.maxsize if endless else model.config.max_context_length - used - len(ids)
    ends = (*stop_ids, *(model.config.eos_token_ids if stop_at_eos else ()))
    text = TextStream(tokenizer, ids, stop, ends, max_tokens, room)
    state = chosen.start([ids], seed)
    speculation = speculation_for(model, prompt_lookup, draft_model, num_draft_tokens)

    def responses() -> Iterator[Response]:
        start, first, begun = time.perf_counter(), 0.0, 0.0
        kept = 0
        if cached is not None:
            kept = kept_length(caches[0], cached, ids, prefill_step)
            for cache in caches:
                cache.trim(cache.offset - kept)
        if kvp is None:
            logits = prefill(model, ids[kept:], caches, prefill_step, used + len(ids))
        else:
            logits = predicted_prefill(model, kvp, ids, caches, step=prefill_step)
        held = None if used else ids
        drawn = decode(model, caches, chosen, logits, state, min(max_tokens, room), held, speculation, ids)
        for count, (token, logprob) in enumerate(drawn, start=1):
            first = first or time.perf_counter()
            piece = text.add(token)
            elapsed = time.perf_counter() - begun
            yield Response(
                text=piece,
                token=token,
                logprob=logprob,
                finish_reason=text.finish_reason,
                prompt_tokens=len(ids),
                cached_tokens=kept,
                predicted_tokens=0 if kvp is None else len(ids) - 1,
                generation_tokens=count,
                drafts=None if speculation is None else speculation.figures,
                prompt_tps=(len(ids) - kept) / (first - start),
                generation_tps=(count - 1) / elapsed if count > 1 else 0.0,
                time_to_first_token=first - start,
                peak_memory=peak_memory() if text.finish_reason else 0,
            )
            if text.finish_reason is not None:
                return
            begun = begun or time.perf_counter()

    return responses()


def kept_length(cache: KVCache, cached: Sequence[int], ids: Sequence[int], step: int) -> int:
    """Returns how many of `ids` need not be read after `cached`, which `cache` holds: whole pieces of `step`.

    The rest is then read in the pieces that it would be in without, and so computed to the same bits. Of a state, which
    can't be cut back, all or none.
    """
    kept = shared_length(cache, cached, ids)
    return kept - kept % step if cache.is_trimmable() else kept


def check_predictable(caches: Sequence[KVCache]) -> None:
    """Raises InputError for caches that a KV prediction can't fill: those that hold a text, or drop positions."""
    if caches[0].length or caches[0].limit is not None:
        raise InputError("a KV prediction fills empty caches that keep all positions: leave out prompt_cache, or kvp")


def check_steps(max_tokens: int, prefill_step: int) -> None:
    """Raises InputError for a count that is not at least 1."""
    for name, value in (("max_tokens", max_tokens), ("prefill_step", prefill_step)):
        if value < 1:
            raise InputError(f"{name} is {value}: it must be 1 or more")


def encode_prompt(
    model: Model, tokenizer: Tokenizer | None, prompt: str | Sequence[int], used: int = 0, endless: bool = False
) -> list[int]:
    """Returns the prompt's ids, checked against the vocabulary and the context, of which `used` tokens are taken.

    An `endless` text has no context to fit.
    """
    config = model.config
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError(
                "a text needs a tokenizer, which the model's directory lacks: give the prompt as token ids"
            )
        ids = tokenizer.encode(prompt, add_bos=used == 0)
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise InputError("the prompt is empty")
    outside = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if outside is not None:
        raise InputError(f"token id {outside} is outside the vocabulary of {config.vocab_size}")
    if used + len(ids) >= config.max_context_length and not endless:
        before = f" after {used} already in the cache" if used else ""
        raise InputError(
            f"the prompt has {len(ids)} tokens{before}, and the model's context is {config.max_context_length}: "
            "there is no room for an answer"
        )
    return ids


def decode(
    model: Model,
    caches: list[KVCache],
    sampler: Sampler,
    logits: mx.array,
    state: State,
    max_tokens: int,
    ids: Sequence[int] | None = None,
    speculation: Speculation | None = None,
    text: Sequence[int] = (),
) -> Iterator[tuple[int, float]]:
    """Yields tokens and their log-probabilities, from the `logits` `(1, vocab)` that `prefill` returned.

    When a token comes it is in `caches` already, but for the first and the `max_tokens`th, or with `speculation` one
    that no draft had.

    Args:
        ids: those that were read; None where they are not known.
        speculation: makes drafts of `text`, the end of what was read.
    """
    if speculation is not None:
        rows = Rows(model)
        rows.join(caches, ids)
        for token, logprob in speculation.decode(rows, sampler, logits, state, max_tokens, text):
            yield token, checked(logprob)
        return
    tokens, logprobs, state = sampler(logits, state)
    mx.async_eval(tokens, logprobs, [cache.state for cache in caches])
    decoder = Decoder(model, sampler, caches, tokens, state, ids)
    for count in range(1, max_tokens + 1):
        current, current_logprobs = tokens, logprobs
        if 1 < count < max_tokens:
            tokens, logprobs = decoder.advance()  # runs while this token is read
        yield int(current.item()), checked(float(current_logprobs.item()))
        if count == 1 < max_tokens:  # only now, so that the first token does not wait until the step is traced
            tokens, logprobs = decoder.advance()


def checked(logprob: float) -> float:
    """Raises ElmError for the logarithm of a probability that is no number: then no text is one either."""
    if math.isnan(logprob):
        raise ElmError(
            "the model computes NaN: its weights are damaged, or overflow the type that is "
            "computed in; --compute-dtype float32 tells which"
        )
    return logprob


class Decoder:
    """One text that grows: a step for each token, launched without waiting for it.

    Choosing the token stays outside the compiled step: MLX compiles each new constant anew on a CPU, and every
    temperature is one.

    Args:
        caches: filled by `prefill`; written to, and always whole between two steps.
        tokens, state: the choice after what was read, `(1,)`, and the sampler's state after it.
        text: the ids in the caches; None where they are not known.
    """

    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        caches: list[KVCache],
        tokens: mx.array,
        state: State,
        text: Sequence[int] | None = None,
    ):
        self.rows = Rows(model)
        self.rows.join(caches, text)
        self.tokens = tokens
        self.state = state
        self._sampler = sampler

    def advance(self) -> tuple[mx.array, mx.array]:
        """Feeds the current token and launches, without waiting, the choice of the next: id and log-probability."""
        logits = self.rows.step(self.tokens)
        self.tokens, logprobs, self.state = self._sampler(logits, self.state)
        mx.async_eval(self.tokens, logprobs)
        return self.tokens, logprobs


class TextStream:
    """The answer to `prompt`: tokens in, text out, up to the first stop string, end token, or the last token allowed.

    Holds back what may be the beginning of a stop string, so that none of it is ever shown.

    Args:
        tokenizer: None where no text is wanted.
        stop: strings that end the text, and are no part of it.
        end_ids: tokens that end it.
        max_tokens, room: at most so many tokens; `room` is what the context leaves.

    Attributes:
        finish_reason: as in `Response`.

    Raises:
        InputError: a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        end_ids: Iterable[int] = (),
        max_tokens: int = sys.maxsize,
        room: int = sys.maxsize,
    ) -> None:
        stop = (stop,) if isinstance(stop, str) else stop  # a string is a sequence of strings, and never meant as one
        if any(not string for string in stop):
            raise InputError("a stop string is empty")
        self.finish_reason: str | None = None
        self._decoder = None if tokenizer is None else tokenizer.detokenizer(prompt)
        self._stop, self._ends = tuple(stop), frozenset(end_ids)
        self._left, self._limit = min(max_tokens, room), "length" if max_tokens <= room else "context"
        self._held = ""

    def add(self, token: int) -> str:
        """Returns the text that is final after `token`; all of the rest, where it is the last one."""
        self._left -= 1
        if token in self._ends:
            self.finish_reason = "stop"
            return self.finish()
        text = "" if self._decoder is None else self._cut(self._decoder.add(token))
        if self.finish_reason is None and not self._left:
            text += self.finish()
            self.finish_reason = self._limit
        return text

    def finish(self) -> str:
        """Returns what is left when the tokens end: bytes of an unfinished character, and what was held back."""
        text = "" if self._decoder is None else self._cut(self._decoder.finish())
        text, self._held = text + self._held, ""
        return text

    def _cut(self, text: str) -> str:
        text = self._held + text
        found = [at for at in (text.find(string) for string in self._stop) if at >= 0]
        if found:
            self._held, self.finish_reason = "", "stop"
            return text[: min(found)]
        keep = max((overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, string: str) -> int:
    """Returns the length of the longest end of `text` that begins `string`."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
