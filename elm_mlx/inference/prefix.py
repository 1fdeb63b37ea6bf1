"""The KV cache of a conversation: nothing that a text shares with the one before it is computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from elm_mlx.inference.generation import check_predictable, decode
from elm_mlx.inference.rows import prefill
from elm_mlx.inference.sampling import Sampler
from elm_mlx.inference.speculation import Speculation
from elm_mlx.model.cache import make_prompt_cache, shared_length
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.model.network import Model

READ_STEP = 128  # tokens read between two looks at whether to stop

Stopped = Callable[[], bool]


class PrefixCache:
    """The KV caches of one text that grows, and is sometimes cut back.

    Attributes:
        ids: exactly those whose keys and values the caches hold, whatever happened: an exception amid a step,
            of which nobody knows how much it has written, empties both. Caches with a limit may have dropped some.

    Args:
        kvp: predicts what is new of prompts, but for their last token. What the model has computed itself, as its
            answers, stays: it is better, and costs nothing. So a text depends on what was cached before it.

    Raises:
        InputError: as of `make_prompt_cache`; a prediction for caches with a limit.
    """

    def __init__(
        self,
        model: Model,
        kv_bits: int | None = None,
        max_kv_size: int | None = None,
        kvp: KVPrediction | None = None,
    ) -> None:
        self.model = model
        self.ids: list[int] = []
        self.caches = make_prompt_cache(model, kv_bits, max_kv_size)
        if kvp is not None:
            check_predictable(self.caches)
        self._kvp = kvp
        self._own = [] if kvp is None else make_prompt_cache(kvp.auxiliary)  # which hold the first of `ids`

    def clear(self) -> None:
        """Empties the caches."""
        self.ids = []
        self.caches = [cache.empty() for cache in self.caches]
        self._own = [cache.empty() for cache in self._own]

    @property
    def predicts(self) -> bool:
        """Returns whether prompts are predicted, but for their last token."""
        return self._kvp is not None

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def shared(self, prompt: Sequence[int]) -> int:
        """Returns the number of ids of `prompt` that need not be read, as `cache.shared_length`."""
        return shared_length(self.caches[0], self.ids, prompt)

    def read(self, prompt: Sequence[int], stopped: Stopped = lambda: False) -> mx.array | None:
        """Reads what is new of `prompt`. Returns the logits `(1, vocab)` after it; None if `stopped` said so before.

        Args:
            prompt: at least one id, no more than the context, all in the vocabulary.
        """
        logits = None
        with self._cleared_by_failure():
            start = self.shared(prompt)
            for cache in self.caches:
                cache.trim(len(self.ids) - start)
            for cache in self._own:
                cache.trim(max(0, cache.offset - start))
            del self.ids[start:]
            if self._kvp is not None and not self._catch_up(self._kvp, stopped):
                return None
            last = len(prompt) if self._kvp is None else len(prompt) - 1
            for at in range(start, last, READ_STEP):
                if stopped():
                    return None
                chunk = prompt[at : min(at + READ_STEP, last)]
                if self._kvp is None:
                    logits = prefill(self.model, chunk, self.caches, READ_STEP, len(prompt))
                else:
                    self._kvp.read(mx.array(chunk)[None], self._own, self.caches)
                mx.eval([cache.state for cache in (*self._own, *self.caches)])
                self.ids += chunk
            if self._kvp is not None:
                logits = prefill(self.model, prompt[-1:], self.caches)
                self.ids.append(prompt[-1])
        return logits

    def _catch_up(self, kvp: KVPrediction, stopped: Stopped) -> bool:
        """Has the auxiliary model read what the model has said itself. Returns False if `stopped` said so before."""
        for at in range(self._own[0].offset, len(self.ids), READ_STEP):
            if stopped():
                return False
            kvp.auxiliary.transformer(mx.array(self.ids[at : at + READ_STEP])[None], self._own)
            mx.eval([cache.state for cache in self._own])
        return True

    def decode(
        self,
        logits: mx.array,
        sampler: Sampler,
        seed: int,
        max_tokens: int,
        speculation: Speculation | None = None,
    ) -> Iterator[int]:
        """Yields the tokens after what was read, at most `max_tokens`; with `speculation` some of them together.

        Args:
            logits: from `read`. Nothing else may have been read since.
        """
        with self._cleared_by_failure():
            state = sampler.start([self.ids], seed)
            chosen: list[int] = []  # and not yet in the caches
            text = tuple(self.ids)
            drawn = decode(self.model, self.caches, sampler, logits, state, max_tokens, text, speculation, text)
            for token, _ in drawn:
                chosen.append(token)
                fed = self.caches[0].length - len(self.ids)
                self.ids += chosen[:fed]
                del chosen[:fed]
                yield token

    @contextmanager
    def _cleared_by_failure(self) -> Iterator[None]:
        try:
            yield
        except GeneratorExit:  # between two steps
            raise
        except BaseException:
            self.clear()
            raise
