"""Answers in OpenAI's shapes: whole ones, the chunks of streams, log-probabilities, errors."""

from __future__ import annotations

import base64
import json
import math
import secrets
import struct
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from elm_mlx.documents.index_file import Passage
from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.requests import Busy, ScoredToken, TooLarge
from elm_mlx.serve.call_reader import Delta, whole_message
from elm_mlx.serve.request_fields import FieldError
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx.version import __version__

FINGERPRINT = f"elm-mlx-{__version__}"  # while it is the same, so is what a seed gives
DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"
_compact = json.JSONEncoder(separators=(",", ":")).encode  # `json.dumps` would make one for each token
LEFT = 499  # the status, in the log and the figures, of a request whose client left


class ErrorAnswer(Exception):
    """An answer that is an error: an HTTP status, and what OpenAI's clients parse of its body."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_answer(error: Exception) -> ErrorAnswer:
    """Returns the answer to a request that failed by `error`. What is nobody's input says no more than its kind."""
    if isinstance(error, ErrorAnswer):
        return error
    if isinstance(error, FieldError):
        return ErrorAnswer(400, str(error), param=error.param, code=error.code)
    if isinstance(error, Busy):
        return busy(str(error), error.retry_after)
    if isinstance(error, TooLarge):
        never = {"Retry-After": "60", "x-should-retry": "false"}  # OpenAI's clients try again unless the latter says so
        return ErrorAnswer(503, str(error), "server_error", code="out_of_memory", headers=never)
    if isinstance(error, InputError):
        return ErrorAnswer(400, str(error), param=getattr(error, "param", None))
    message = str(error) if isinstance(error, ElmError) else f"the server failed: {type(error).__name__}"
    return ErrorAnswer(500, message, "server_error")


def busy(message: str, retry_after: int) -> ErrorAnswer:
    """Returns the answer to a request that there is no room for now."""
    return ErrorAnswer(503, message, "server_error", code="overloaded", headers={"Retry-After": str(retry_after)})


def event(values: Mapping[str, Any]) -> str:
    """Returns a server-sent event. It is ASCII: some clients take U+2028 and its like for the end of a line."""
    return f"data: {_compact(values)}\n\n"


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Answer:
    """One choice of an answer, as it grows.

    Attributes:
        index: of the choice.
        tokens: the number of its tokens.
        finish_reason: in OpenAI's words; None before the end.
        deltas: what chunks would say, of a text completion too.
        scored: its tokens, where log-probabilities are wanted, and the echoed prompt's.
        places: where in the text each of them begins, for text completions.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens = 0
        self.finish_reason: str | None = None
        self.deltas: list[Delta] = []
        self.scored: list[ScoredToken] = []
        self.places: list[int] = []


class AnswerShape:
    """The shape that a completion's answers and chunks share: id, time, model, and kind.

    Args:
        chat: the answers are messages; else texts.
        likeliest: tokens reported beside each with log-probabilities; None for none.
        include_usage: chunks have a field `usage`.
        sources: passages of documents that the answers were given, in a field `sources` of the whole answer, and of a
            message's first chunk; None for no such field.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: str,
        chat: bool,
        likeliest: int | None,
        include_usage: bool,
        sources: Sequence[Passage] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.chat, self.likeliest, self.include_usage = chat, likeliest, include_usage
        named = None if sources is None else [each.values(number) for number, each in enumerate(sources, 1)]
        self._sources = {} if named is None else {"sources": named}
        identity = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._common = {
            "id": identity, "created": int(time.time()), "model": model, "system_fingerprint": FINGERPRINT,
        }  # fmt: skip

    def whole(self, answers: Sequence[Answer], counts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer that is not streamed."""
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(answer) for answer in answers]
        return {**self._common, "object": kind, "choices": choices, "usage": counts, **self._sources}

    def role(self, index: int) -> str:
        """Returns the first chunk of a message."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "finish_reason": None, "delta": delta, "logprobs": None}
        return self._chunk([choice], more=self._sources)

    def piece(
        self,
        index: int,
        delta: Delta,
        scored: Sequence[ScoredToken] = (),
        places: Sequence[int] = (),
        finish_reason: str | None = None,
    ) -> str:
        """Returns a chunk. `scored` and `places` as in `Answer`, of the tokens that came with it."""
        choice: dict[str, Any] = {"index": index, "finish_reason": finish_reason}
        choice |= {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice["logprobs"] = self._logprobs(scored, places) if scored else None
        return self._chunk([choice])

    def counted(self, counts: Mapping[str, Any]) -> str:
        """Returns the last chunk of a stream whose tokens are counted."""
        return self._chunk([], counts)

    def _chunk(
        self,
        choices: Sequence[Mapping[str, Any]],
        counts: Mapping[str, Any] | None = None,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        counted = {"usage": counts} if self.include_usage else {}
        return event({**self._common, "object": kind, "choices": choices, **counted, **more})

    def _choice(self, answer: Answer) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": answer.index, "finish_reason": answer.finish_reason}
        choice["logprobs"] = None if self.likeliest is None else self._logprobs(answer.scored, answer.places)
        if self.chat:
            return choice | {"message": {**whole_message(answer.deltas), "refusal": None}}
        return choice | {"text": "".join(delta.get("content", "") for delta in answer.deltas)}

    def _logprobs(self, scored: Sequence[ScoredToken], places: Sequence[int]) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._entry(each) for each in scored], "refusal": None}
        return {
            "tokens": [self.text_of(each.token) for each in scored],
            "token_logprobs": [_finite(each.logprob) for each in scored],
            "top_logprobs": [self._tops(each) for each in scored] if self.likeliest else None,
            "text_offset": list(places),
        }

    def _tops(self, scored: ScoredToken) -> dict[str, float | None] | None:
        """Returns the likeliest tokens by their texts, and the token itself; None for a prompt's first token."""
        if scored.logprob is None:
            return None
        tops: dict[str, float | None] = {}
        for token, logprob in (*scored.top, (scored.token, scored.logprob)):
            tops.setdefault(self.text_of(token), _finite(logprob))  # of two with one text the likelier
        return tops

    def _entry(self, scored: ScoredToken) -> dict[str, Any]:
        tops = scored.top[: self.likeliest or 0]
        return self._token(scored.token, scored.logprob) | {"top_logprobs": [self._token(*each) for each in tops]}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._tokenizer.bytes_of(token)
        return {"token": self.text_of(token), "logprob": _finite(logprob), "bytes": list(data) if data else None}

    def decoder(self, prompt: Sequence[int]) -> Any:
        """Returns what tells the text that each token after `prompt` adds."""
        return self._tokenizer.detokenizer(prompt)

    def text_of(self, token: int) -> str:
        """Returns a token's text; a control token's name; the bytes of what is a part of a character, as OpenAI's."""
        data = self._tokenizer.bytes_of(token)
        try:
            return data.decode() or self._tokenizer.piece_of(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def embeddings(model: str, vectors: Sequence[Sequence[float]], as_base64: bool, prompt_tokens: int) -> dict[str, Any]:
    """Returns the answer of `/v1/embeddings`; base64 holds float32, little end first."""
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if as_base64 else list(vector)}
        for index, vector in enumerate(vectors)
    ]
    counts = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "model": model, "usage": counts}


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI writes -9999 for what is as good as impossible."""
    return logprob if logprob is None or math.isfinite(logprob) else -9999.0
