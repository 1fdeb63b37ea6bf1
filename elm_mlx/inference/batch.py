"""Batched generation: one decode step for several prompts at once.

Each prompt is read by itself, without padding, as in `generation`; only decoding is batched, so a row's text is that of
the prompt alone but for rounding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from elm_mlx.errors import InputError
from elm_mlx.inference.generation import TextStream, check_predictable, check_steps, checked, encode_prompt, kept_length
from elm_mlx.inference.rows import PREFILL_STEP, Rows, predicted_prefill, prefill
from elm_mlx.inference.sampling import Choose, Sampler
from elm_mlx.model.cache import KVCache, make_prompt_cache
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.model.network import Model
from elm_mlx.reading import check_seed
from elm_mlx.text.tokenizer import Tokenizer

BATCH_SIZE = 8  # prompts in one step: reading the weights once serves them all


@dataclass
class Completion:
    """The answer to one prompt; `finish_reason` as in `generation.Response`."""

    prompt_tokens: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


def generate_batch(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    sampler: Choose | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    prefill_step: int = PREFILL_STEP,
    batch_size: int = BATCH_SIZE,
    prompt_cache: list[KVCache] | None = None,
    cached: Sequence[int] = (),
    kvp: KVPrediction | None = None,
) -> Iterator[Completion]:
    """Yields a completion for each of `prompts`, in order, `batch_size` of them computed together.

    The settings mean what they do in `generation.stream_generate`. When tokens are drawn (`temp` above 0) a row's
    luck depends on its place among all prompts, so one prompt given many times is continued in as many ways. `sampler`
    gets the log-probabilities `(batch, vocab)` of the texts that still go on. `prompt_cache` holds the ids `cached`,
    and stays as it is: what a prompt begins with of them is not read again. `kvp` predicts what a prompt leaves in the
    caches, as there.

    Raises:
        InputError: as `stream_generate`, before anything is computed.
    """
    if sampler is not None and seed is not None:
        raise InputError("seed has no effect beside a sampler: call `mx.random.seed`")
    chosen = Sampler(temp, top_p, top_k, min_p, repetition_penalty, sampler)
    check_steps(max_tokens, prefill_step)
    check_seed(seed)
    if kvp is not None and prompt_cache is not None:
        check_predictable(prompt_cache)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: it must be 1 or more")
    config = model.config
    ids = [encode_prompt(model, tokenizer, prompt) for prompt in prompts]
    seeds = random.Random(seed)
    for start in range(0, len(ids), batch_size):
        group = ids[start : start + batch_size]
        streams = [
            TextStream(
                tokenizer, prompt, stop, (*stop_ids, *config.eos_token_ids), max_tokens,
                config.max_context_length - len(prompt),
            )
            for prompt in group
        ]  # fmt: skip
        yield from _complete(model, group, streams, chosen, seed, prefill_step, prompt_cache, cached, kvp)
        seed = None if seed is None else seeds.getrandbits(64)  # the next group's luck is its own


def _complete(
    model: Model,
    prompts: list[list[int]],
    streams: list[TextStream],
    sampler: Sampler,
    seed: int | None,
    prefill_step: int,
    prompt_cache: list[KVCache] | None,
    cached: Sequence[int],
    kvp: KVPrediction | None,
) -> list[Completion]:
    completions = [Completion(len(prompt)) for prompt in prompts]
    logits, rows = prefill_each(model, prompts, prefill_step, prompt_cache, cached, kvp)
    tokens, logprobs, state = sampler(logits, sampler.start(prompts, seed))
    active = list(zip(completions, streams, strict=True))
    while True:
        for (done, stream), token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
            done.tokens.append(token)
            done.logprobs.append(checked(logprob))
            done.text += stream.add(token)
            done.finish_reason = stream.finish_reason
        order = list(range(len(active)))
        for row in [row for row, (done, _) in enumerate(active) if done.finish_reason is not None][::-1]:
            rows.leave(row)
            order[row] = order[-1]
            order.pop()
        if not order:
            return completions
        if len(order) < len(active):
            kept = mx.array(order)
            tokens, state, active = tokens[kept], sampler.keep(state, kept), [active[row] for row in order]
        tokens, logprobs, state = sampler(rows.step(tokens), state)
        mx.async_eval(tokens, logprobs)


def prefill_each(
    model: Model,
    prompts: list[list[int]],
    prefill_step: int,
    prompt_cache: list[KVCache] | None = None,
    cached: Sequence[int] = (),
    kvp: KVPrediction | None = None,
) -> tuple[mx.array, Rows]:
    """Returns the logits `(batch, vocab_size)` after each prompt, and rows with all of them.

    What a prompt begins with of the ids `cached` is copied from `prompt_cache`. `kvp` predicts in place of reading.
    """
    rows, logits = Rows(model), []
    held = make_prompt_cache(model) if prompt_cache is None else prompt_cache
    read: dict[tuple[int, ...], tuple[mx.array, int]] = {}
    for row, prompt in enumerate(prompts):
        if tuple(prompt) not in read:
            kept = kept_length(held[0], cached, prompt, prefill_step)
            caches = [cache.single(0, kept) if kept else cache.empty() for cache in held]
            if kvp is None:
                after = prefill(model, prompt[kept:], caches, prefill_step, len(prompt))
            else:
                after = predicted_prefill(model, kvp, prompt, caches, step=prefill_step)
            read[tuple(prompt)] = after, row
            mx.eval(read[tuple(prompt)][0], [cache.state for cache in caches])
            rows.join(caches, prompt)
        else:  # one that is given several times, to be drawn from, is read once
            rows.join(rows.copy(read[tuple(prompt)][1]), prompt)
        logits.append(read[tuple(prompt)][0])
    return mx.concatenate(logits), rows
