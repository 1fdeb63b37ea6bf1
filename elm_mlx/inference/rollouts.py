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
from elm_mlx.inference.sampling import Sampler, State
from elm_mlx.model.cache import KVCache, make_prompt_cache, row_capacity
from elm_mlx.model.network import Model
from elm_mlx.reading import check_seed
from elm_mlx.text.chat_template import Template
from elm_mlx.text.tokenizer import Tokenizer

_GPU_ROWS = 64  # of a step on a GPU, whose logits depend by rounding on how many there are
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
        self._sampler = Sampler(temp=1.0)  # by logits that were divided by `temp`, so that log-probabilities are too
        self._rows = Rows(model)
        self._answers: list[_Answer] = []  # of each row
        self._prompts: list[_ReadPrompt] = []  # of each row
        self._keys = mx.zeros((0, 2), mx.uint32)  # of each row
        self._open: list[_ReadPrompt] = []  # with answers that wait

    def run(self, unread: Iterator[tuple[list[int], list[_Answer]]], longest: int) -> Iterator[Rollout]:
        """Yields the answers to prompts as they end. With one of them no prompt is longer than `longest`."""
        while len(self._answers) < self._most:
            prompt = yield from self._waiting(unread)
            if prompt is None:
                break
            self._most = min(self._most, _fitting(prompt.caches, longest))
            self._take(len(self._answers), prompt)
        while self._answers:
            logits = self._rows.step(mx.array([answer.tokens[-1] for answer in self._answers]))
            tokens, logprobs, self._keys = self._draw(logits, self._keys)
            drawn = zip(self._answers, tokens.tolist(), logprobs.tolist(), strict=True)
            ended = [row for row, (answer, *token) in enumerate(drawn) if answer.add(*token)]
            for row in reversed(ended):
                yield self._answers[row].ended()
                own = self._prompts[row]
                if own.waiting and self._rows.rewind(row, len(own.ids)):
                    self._take(row, own, begun=True)
                    continue
                prompt = yield from self._waiting(unread)
                if prompt is None:
                    self._leave(row)
                else:
                    self._take(row, prompt)

    def _waiting(
        self, unread: Iterator[tuple[list[int], list[_Answer]]]
    ) -> Generator[Rollout, None, _ReadPrompt | None]:
        """Returns a prompt with an answer that waits, one that is read only now if there is one; None without any.

        Yields the answers that their first token ends.
        """
        for ids, answers in unread:
            caches = make_prompt_cache(self._model)
            logits = mx.repeat(prefill(self._model, ids, caches), len(answers), axis=0)
            tokens, logprobs, keys = self._draw(logits, mx.array([answer.key for answer in answers], mx.uint32))
            prompt = _ReadPrompt(ids, caches, [])
            for answer, token, logprob, key in zip(
                answers, tokens.tolist(), logprobs.tolist(), keys.tolist(), strict=True
            ):
                answer.key = key
                if answer.add(token, logprob):
                    yield answer.ended()
                else:
                    prompt.waiting.append(answer)
            if prompt.waiting:
                self._open.append(prompt)
                return prompt
        self._open = [prompt for prompt in self._open if prompt.waiting]
        return max(self._open, key=lambda prompt: len(prompt.waiting), default=None)

    def _take(self, row: int, prompt: _ReadPrompt, begun: bool = False) -> None:
        """Begins an answer in a row, or the next one; where it has `begun` it holds the prompt already."""
        if not begun:
            self._rows.begin(row, prompt.caches, prompt.ids)
        answer = prompt.waiting.pop(0)
        key = mx.array([answer.key], mx.uint32)
        self._keys = mx.concatenate([self._keys[:row], key, self._keys[row + 1 :]])
        self._answers[row:] = [answer, *self._answers[row + 1 :]]
        self._prompts[row:] = [prompt, *self._prompts[row + 1 :]]

    def _leave(self, row: int) -> None:
        """Removes a row. The last one takes its place."""
        self._rows.leave(row)
        last = self._keys[-1:]
        self._keys = mx.concatenate([self._keys[:row], last, self._keys[row + 1 :]])[:-1]
        self._answers[row], self._prompts[row] = self._answers[-1], self._prompts[-1]
        self._answers.pop()
        self._prompts.pop()

    def _draw(self, logits: mx.array, keys: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Draws from logits `(rows, vocab_size)`: tokens, their log-probabilities, `(rows,)`, and the next keys."""
        logits = logits.astype(mx.float32)
        tokens, logprobs, state = self._sampler(logits if self._temp == 1 else logits / self._temp, State(keys))
        assert state.key is not None
        mx.async_eval(tokens, logprobs, state.key)
        return tokens, logprobs, state.key


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
