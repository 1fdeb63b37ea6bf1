"""Rollouts: several answers sampled to each of several prompts, with the log-probability of every token as drawn.

Answers share the steps of a continuous batch (`rows`): one that ends makes place for the next. A prompt is read once,
and all its answers begin behind it: of keys and values a row goes back to where the prompt ends, which takes no time,
so that a row keeps to its prompt as long as that has answers to begin.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from elm_mlx import device
from elm_mlx.errors import InputError
from elm_mlx.inference.generation import TextStream, check_steps, checked, encode_prompt
from elm_mlx.inference.rows import TOGETHER, Rows, prefill
from elm_mlx.model import ops
from elm_mlx.model.cache import KVCache, make_prompt_cache, row_capacity
from elm_mlx.model.network import Model
from elm_mlx.reading import check_seed
from elm_mlx.text.chat_template import Template
from elm_mlx.text.tokenizer import Tokenizer

_GPU_ROWS = 64  # of a step on a GPU, whose logits depend by rounding on how many there are
_BLOCK = 64  # tokens
_UNLIKELY = -1e30  # a logit of no token
_BELOW_1 = 1 - 2**-23  # a float32 times this is less than itself, however it is rounded
_CACHE_SHARE = 0.5  # of the free memory, at most, for all rows' keys and values


@dataclass(frozen=True)
class Rollout:
    """A sampled answer.

    Attributes:
        problem: the place of its prompt among those given.
        sample: its number among the answers to that prompt, from 0.
        tokens: as they were drawn, an end token too.
        logprobs: of each token the natural logarithm of its probability in the distribution that it was drawn from,
            computed in float32.
        text: without what ended it.
        finish_reason: "stop" (an end token or a stop string), "length" (`max_tokens`) or "context" (which is full).
    """

    problem: int
    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str


def prompt_ids(tokenizer: Tokenizer, template: Template | None, prompt: str) -> list[int]:
    """Returns the ids of a problem's prompt as `generate` reads it and fine-tuning learns it.

    By the chat template it is a user's message; without one, the text that the answer continues.
    """
    if template is None:
        return tokenizer.encode(prompt)
    return template.encode([{"role": "user", "content": prompt}])


def rollouts(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    samples: int,
    *,
    max_tokens: int,
    seed: int,
    temp: float = 1.0,
    numbers: Sequence[int] | None = None,
    template: Template | None = None,
    most_rows: int | None = None,
) -> Iterator[Rollout]:
    """Yields `samples` answers to each of `prompts`, as they end: each once, in an order that means nothing.

    An answer's tokens depend on `seed`, its prompt's number and its own alone: on a CPU, where a row's logits have the
    same bits in any company (see `rows`), exactly; else but for rounding.

    Args:
        prompts: token ids, as `prompt_ids` makes them.
        max_tokens: of an answer, at most; fewer where the context ends.
        temp: the temperature, above 0; no other filter changes the distribution.
        numbers: by which each prompt's luck is drawn; None for their places.
        template: whose end tokens and stop strings end an answer, beside the model's own end tokens.
        most_rows: answers in a step, at most; None for as many as are fastest.

    Raises:
        InputError: a prompt is empty or does not fit the context, or a setting is out of range; before anything is
            computed.
    """
    check_steps(max_tokens, 1)
    check_seed(seed)
    for name, value, least in (("samples", samples, 1), ("most_rows", most_rows, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}: it must be {least} or more")
    if not 0 < temp < math.inf:
        raise InputError(f"temp is {temp}: answers are drawn, so it must be a number above 0")
    ids = [encode_prompt(model, None, prompt) for prompt in prompts]
    batch = _RolloutBatch(model, len(ids) * samples if most_rows is None else most_rows, temp)
    ends = (*model.config.eos_token_ids, *(template.stop_ids if template is not None else ()))
    strings = template.stop_strings if template is not None else ()

    def answers(problem: int) -> list[_Answer]:
        prompt, number = ids[problem], problem if numbers is None else numbers[problem]
        room = model.config.max_context_length - len(prompt)
        return [
            _Answer(problem, sample, _key(seed, number, sample),
                    TextStream(tokenizer, prompt, strings, ends, max_tokens, room))
            for sample in range(samples)
        ]  # fmt: skip

    longest = max(map(len, ids), default=0) + max_tokens
    return batch.run(((prompt, answers(problem)) for problem, prompt in enumerate(ids)), longest)


@dataclass(eq=False)
class _Answer:
    """An answer as far as it is sampled. Its row holds all of it but the last token."""

    problem: int
    sample: int
    key: Sequence[int]  # of `mx.random`, of its next draw, as it gets a row
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""

    def add(self, token: int, logprob: float) -> bool:
        """Appends a token. Returns whether it is the last."""
        self.tokens.append(token)
        self.logprobs.append(checked(logprob))
        self.text += self.stream.add(token)
        return self.stream.finish_reason is not None

    def ended(self) -> Rollout:
        reason = self.stream.finish_reason
        assert reason is not None
        return Rollout(self.problem, self.sample, tuple(self.tokens), tuple(self.logprobs), self.text, reason)


@dataclass(eq=False)
class _ReadPrompt:
    """A prompt in caches of its own, and its answers that have a first token and no row yet."""

    ids: list[int]
    caches: list[KVCache]
    waiting: list[_Answer]


class _RolloutBatch:
    """The answers that are sampled together, each in a row; they begin as rows become free.

    Args:
        most_rows: at most; fewer where more are no faster, or their caches would fill the memory.
    """

    def __init__(self, model: Model, most_rows: int, temp: float) -> None:
        self._model, self._temp = model, temp
        self._most = min(most_rows, _GPU_ROWS if device.on_gpu() else TOGETHER)
        self._rows = Rows(model)
        self._answers: list[_Answer] = []  # of each row
        self._prompts: list[_ReadPrompt] = []  # of each row
        self._keys = mx.zeros((0, 2), mx.uint32)  # of each row
        self._open: list[_ReadPrompt] = []  # with answers that wait

    def run(self, unread: Iterator[tuple[list[int], list[_Answer]]], longest: int) -> Iterator[Rollout]:
        """Yields the answers to prompts as they end. With one of them no prompt is longer than `longest`."""
        yield from self._fill(unread, longest)
        while self._answers:
            logits = self._rows.step(mx.array([answer.tokens[-1] for answer in self._answers]))
            tokens, logprobs, self._keys = _drawn(logits, self._keys, self._temp)
            drawn = zip(self._answers, tokens.tolist(), logprobs.tolist(), strict=True)
            ended = [row for row, (answer, *token) in enumerate(drawn) if answer.add(*token)]
            for row in reversed(ended):
                yield self._answers[row].ended()
                prompt: _ReadPrompt | None = self._prompts[row]
                assert prompt is not None
                if not (prompt.waiting and self._rows.rewind(row, len(prompt.ids))):
                    self._open = [each for each in self._open if each.waiting]
                    prompt = (yield from self._read(unread)) or max(self._open, key=_left, default=None)
                    if prompt is None:
                        self._leave(row)
                        continue
                    self._rows.begin(row, prompt.caches, prompt.ids)
                self._take(row, prompt)

    def _fill(self, unread: Iterator[tuple[list[int], list[_Answer]]], longest: int) -> Iterator[Rollout]:
        """Begins the first answers, those of one prompt in rows beside each other. Yields those that are done."""
        prompts: list[_ReadPrompt] = []
        while len(prompts) < self._most and (prompt := (yield from self._read(unread))) is not None:
            prompts.append(prompt)
            if len(prompts) == 1:
                self._most = min(self._most, _fitting(prompt.caches, longest))
        left = [len(prompt.waiting) for prompt in prompts]
        for _ in range(min(self._most, sum(left))):
            left[left.index(max(left))] -= 1
        for prompt, rest in zip(prompts, left, strict=True):
            row, copies = len(self._answers), len(prompt.waiting) - rest
            if copies:
                self._rows.begin(row, prompt.caches, prompt.ids, copies)
            for _ in range(copies):
                self._take(len(self._answers), prompt)

    def _read(self, unread: Iterator[tuple[list[int], list[_Answer]]]) -> Generator[Rollout, None, _ReadPrompt | None]:
        """Reads prompts up to one with answers that wait, which is returned; yields those that one token ends."""
        for ids, answers in unread:
            caches = make_prompt_cache(self._model)
            logits = mx.repeat(prefill(self._model, ids, caches), len(answers), axis=0)
            keys = mx.array([answer.key for answer in answers], mx.uint32)
            tokens, logprobs, keys = _drawn(logits, keys, self._temp)
            waiting = []
            for answer, key, *drawn in zip(answers, keys.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
                answer.key = key
                if answer.add(*drawn):
                    yield answer.ended()
                else:
                    waiting.append(answer)
            if waiting:
                self._open.append(_ReadPrompt(ids, caches, waiting))
                return self._open[-1]
        return None

    def _take(self, row: int, prompt: _ReadPrompt) -> None:
        """Makes the next answer to a prompt that of a row, or of one more, where the prompt is already."""
        answer = prompt.waiting.pop(0)
        self._keys = mx.concatenate([self._keys[:row], mx.array([answer.key], mx.uint32), self._keys[row + 1 :]])
        self._answers[row : row + 1], self._prompts[row : row + 1] = [answer], [prompt]

    def _leave(self, row: int) -> None:
        """Removes a row. The last one takes its place."""
        self._rows.leave(row)
        last = self._keys[-1:]
        self._keys = mx.concatenate([self._keys[:row], last, self._keys[row + 1 :]])[:-1]
        self._answers[row], self._prompts[row] = self._answers[-1], self._prompts[-1]
        self._answers.pop()
        self._prompts.pop()


def _drawn(logits: mx.array, keys: mx.array, temp: float) -> tuple[mx.array, mx.array, mx.array]:
    """Draws from logits `(rows, vocab_size)`: tokens, their log-probabilities, `(rows,)`, and the next keys.

    First a block of tokens by what its probabilities sum to, and then one in it: so few exponentials are needed one by
    one, and the sums are of those that the log-probability is computed by. A row's draw depends on no other.
    """
    logits = logits.astype(mx.float32)
    if temp != 1:
        logits = logits / temp
    padded = mx.pad(logits, [(0, 0), (0, -logits.shape[-1] % _BLOCK)], constant_values=_UNLIKELY)
    blocks = padded.reshape(len(logits), -1, _BLOCK)
    log_sums = ops.logsumexp(blocks)
    pairs = mx.vmap(mx.random.split)(keys)
    chances = mx.vmap(lambda key: mx.random.uniform(shape=(2,), key=key))(pairs[:, 1])
    block = _index(log_sums, chances[:, :1])[:, None]
    within = _index(mx.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0], chances[:, 1:])
    tokens = block[:, 0] * _BLOCK + within
    logprobs = mx.take_along_axis(padded, tokens[:, None], axis=-1)[:, 0] - ops.logsumexp(log_sums)
    mx.async_eval(tokens, logprobs, pairs)
    return tokens, logprobs, pairs[:, 0]


def _index(logits: mx.array, chances: mx.array) -> mx.array:
    """Draws an index `(rows,)` from each row of logits by a chance `(rows, 1)` from 0 up to 1."""
    reached = mx.cumsum(ops.weights(logits), axis=-1)
    # The first that goes beyond the chance's share of all: it has a weight, since the share is less than all.
    return (reached <= mx.minimum(chances, _BELOW_1) * reached[:, -1:]).sum(axis=-1)


def _left(prompt: _ReadPrompt) -> int:
    return len(prompt.waiting)


def _fitting(caches: Sequence[KVCache], longest: int) -> int:
    """Returns for how many texts of `longest` tokens there is memory, by caches of one; at least 1."""
    free = device.available_memory()
    if free is None:
        return _GPU_ROWS
    each = sum(cache.nbytes for cache in caches) * row_capacity(longest) / caches[0].capacity
    return max(1, int(_CACHE_SHARE * free / (2 * each)))  # twice, while they grow or move


def _key(seed: int, number: int, sample: int) -> tuple[int, int]:
    """Returns the key of `mx.random` by which an answer is drawn."""
    digest = hashlib.sha256(f"{seed}/{number}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
