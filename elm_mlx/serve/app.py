"""The server's routes: from the fields of a request to the engine, and back in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from elm_mlx.documents.grounding import grounded_ids
from elm_mlx.documents.index_file import Passage
from elm_mlx.documents.retrieval import DocumentIndex
from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.engine import Engine
from elm_mlx.inference.grammar import Grammar
from elm_mlx.inference.requests import Busy, Embedded, Failed, Request
from elm_mlx.inference.sampling import Sampler
from elm_mlx.reading import JSON_RECORDS, decoded, listed, load_json, printable
from elm_mlx.serve.answers import LEFT, AnswerShape, ErrorAnswer, embeddings, error_answer, event
from elm_mlx.serve.completions import PAUSE, OpenCompletion, Plan, putting_into
from elm_mlx.serve.metrics_page import metrics_text
from elm_mlx.serve.request_fields import ChatFields, FieldError, Options, parse_chat, parse_embeddings, parse_text
from elm_mlx.serve.served_models import ServedModel
from elm_mlx.text.chat_template import Messages, Template

PAGE = Path(__file__).parent / "page"
_PAGE_FILES = frozenset(path.name for path in PAGE.iterdir() if path.is_file())
CHAT_TOKENS, TEXT_TOKENS = 2048, 256  # of an answer, at most, where neither request nor model says
MAX_VALUES = 1 << 18  # in the body of a request
MAX_LOGPROBS = 1 << 20  # in an answer that is not streamed
_BEGINNING = 16  # characters for each token of the context, of a text that may be too long
_SEEDS = 1 << 64

Result = TypeVar("Result")


@dataclass(frozen=True)
class Service:
    """What the routes answer from: the engine, the models by their names in requests, and perhaps documents.

    `log_prompts` writes prompts into the log.
    """

    engine: Engine
    models: Mapping[str, ServedModel]
    log_prompts: bool = False
    documents: DocumentIndex | None = None

    def app(self) -> Starlette:
        """Returns the application, to be put behind `guard.Guard`."""
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/embeddings", self.embed, methods=["POST"]),
            Route("/{file}", self.page),
            Route("/", self.page),
        ]
        handlers: Mapping[Any, Any] = {
            **dict.fromkeys((ErrorAnswer, ElmError), _refuse),
            HTTPException: _no_route,
            ClientDisconnect: _client_left,
            Exception: _refuse,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, request: HTTPRequest) -> Response:
        """Answers that the server is there, and its engine works."""
        trouble = self.engine.trouble()
        if trouble is not None:
            raise ErrorAnswer(503, f"{trouble}: restart the server", "server_error", code="engine_failed")
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: HTTPRequest) -> Response:
        """Answers in Prometheus' text format."""
        text = metrics_text(self.engine.statistics(), request.state.outcomes)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def list_models(self, request: HTTPRequest) -> Response:
        """Lists the models."""
        return JSONResponse({"object": "list", "data": [_described(model) for model in self.models.values()]})

    async def show_model(self, request: HTTPRequest) -> Response:
        """Describes one model."""
        return JSONResponse(_described(self._model(request.path_params["name"])))

    async def page(self, request: HTTPRequest) -> Response:
        """Sends a file of the web chat."""
        name = request.path_params.get("file", "index.html")
        if name not in _PAGE_FILES:
            raise HTTPException(404)
        return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    async def chat(self, request: HTTPRequest) -> Response:
        """Answers a conversation: `/v1/chat/completions`."""
        fields = parse_chat(await _json(request))
        options, model = fields.options, self._model(fields.options.model)
        template = model.template
        if template is None:
            raise FieldError("model", f"{model.name} is a base model without a chat template: use /v1/completions")
        if (tools_field := fields.tools_field) is not None:
            await asyncio.to_thread(model.tools.check, tools_field)
        await self._check_beginning(model, "messages", "".join(each["content"] for each in fields.messages))
        variables = _read_variables(template, fields.variables)
        ids, sources = await asyncio.to_thread(self._encoded_chat, model, template, fields, variables)
        self._check_length(model, "messages", ids)
        grammar = await asyncio.to_thread(_grammar, model, fields.schema)
        if fields.tool_use.callable:
            grammar = await asyncio.to_thread(model.tools.grammar, fields.tool_use, fields.schema)
        if self.log_prompts:
            _log_said(request, template.tokenizer.decode(ids))
        plans = [
            Plan(
                self._request(model, options, ids, index, fields.likeliest, grammar, template=template),
                reader=model.tools.reader(fields.tool_use, grammar is not None) if fields.tool_use.callable else None,
            )
            for index in range(options.answers)
        ]
        return await self._answer(request, model, options, plans, fields.likeliest, chat=True, sources=sources)

    async def complete(self, request: HTTPRequest) -> Response:
        """Continues texts: `/v1/completions`."""
        fields = parse_text(await _json(request))
        options, model = fields.options, self._model(fields.options.model)
        grammar = await asyncio.to_thread(_grammar, model, fields.schema)
        plans = []
        for number, prompt in enumerate(fields.prompts):
            ids = await self._encoded(model, "prompt", prompt)
            text = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
            if self.log_prompts:
                _log_said(request, text)
            for index in range(options.answers):
                asked = self._request(model, options, ids, index, fields.likeliest, grammar, echo=fields.echo)
                plans.append(Plan(asked, number, text if fields.echo else ""))
        return await self._answer(request, model, options, plans, fields.likeliest, chat=False)

    async def embed(self, request: HTTPRequest) -> Response:
        """Answers with the mean of the last hidden states of each text: `/v1/embeddings`."""
        fields = parse_embeddings(await _json(request))
        model = self._model(fields.model)
        inputs = [await self._encoded(model, "input", each) for each in fields.inputs]
        vectors = await _while_connected(request, self._vectors(model, inputs))
        count = sum(map(len, inputs))
        request.state.tokens = f"{count} tokens"
        return JSONResponse(embeddings(model.name, vectors, fields.base64, count))

    async def _vectors(self, model: ServedModel, inputs: list[list[int]]) -> list[tuple[float, ...]]:
        vectors: list[tuple[float, ...]] = []
        for ids in inputs:  # one after the other, so that they take one place in the queue
            outcomes: asyncio.Queue[Embedded | Failed] = asyncio.Queue()
            while True:
                try:
                    ticket = self.engine.embed(model.name, ids, putting_into(outcomes))
                    break
                except Busy:
                    if not vectors:
                        raise
                    await asyncio.sleep(PAUSE)  # what has been read is not thrown away
            try:
                outcome = await outcomes.get()
            finally:
                ticket.cancel()
            if isinstance(outcome, Failed):
                raise outcome.error
            vectors.append(outcome.values)
        return vectors

    async def _answer(
        self,
        request: HTTPRequest,
        model: ServedModel,
        options: Options,
        plans: list[Plan],
        likeliest: int | None,
        chat: bool,
        sources: Sequence[Passage] | None = None,
    ) -> Response:
        if likeliest is not None and not options.stream:
            _check_logprobs(model, [plan.request for plan in plans], 1 + likeliest)
        shape = AnswerShape(model.tokenizer, model.name, chat, likeliest, options.include_usage, sources)
        completion = OpenCompletion(self.engine, plans, shape)
        completion.begin()

        def count() -> None:
            counts = completion.usage
            cached = counts["prompt_tokens_details"]["cached_tokens"]
            request.state.tokens = f"{counts['prompt_tokens']} ({cached} cached) + {counts['completion_tokens']} tokens"

        if options.stream:
            return EventStream(request, completion, count)
        try:
            return JSONResponse(await _while_connected(request, completion.whole()))
        finally:
            count()

    def _model(self, name: str) -> ServedModel:
        if name not in self.models:
            known = listed([*self.models])
            raise ErrorAnswer(404, f"no model {name[:100]!r}: there is {known}", param="model", code="model_not_found")
        return self.models[name]

    def _encoded_chat(
        self, model: ServedModel, template: Template, fields: ChatFields, variables: Mapping[str, Any]
    ) -> tuple[list[int], tuple[Passage, ...] | None]:
        """Returns the ids of a conversation, and the passages of documents in it; None where it goes without."""

        def encode(messages: Messages) -> list[int]:
            return template.encode(messages, True, fields.tools or None, variables)

        if fields.documents and self.documents is None:
            raise FieldError("documents", "the server has none: it needs --docs", "unsupported_parameter")
        if self.documents is None or fields.documents is False:
            return encode(fields.messages), None
        context = model.context_length
        limit = context - min(_most_tokens(model, fields.options, CHAT_TOKENS), context // 4)
        return grounded_ids(fields.messages, self.documents, template.tokenizer, encode, limit)

    async def _encoded(self, model: ServedModel, param: str, text: str | list[int]) -> list[int]:
        """Returns the ids of a text, or those that are given. Raises FieldError where the model cannot take them."""
        if isinstance(text, str):
            await self._check_beginning(model, param, text)
            text = await asyncio.to_thread(model.tokenizer.encode, text)
        _check_ids(model, param, text)
        self._check_length(model, param, text)
        return text

    async def _check_beginning(self, model: ServedModel, param: str, text: str) -> None:
        """Raises FieldError for a text whose beginning is too long: to encode megabytes would hold up all others."""
        beginning = text[: _BEGINNING * model.context_length]
        if len(beginning) < len(text):
            ids = await asyncio.to_thread(model.tokenizer.encode, beginning)
            self._check_length(model, param, ids, "more than ")

    def _check_length(self, model: ServedModel, param: str, ids: list[int], about: str = "") -> None:
        """Raises FieldError for a text that leaves no room in the context."""
        if len(ids) >= model.context_length:
            raise FieldError(
                param,
                f"{about}{len(ids):,} tokens, and the model's context is {model.context_length:,}: shorten the text",
                "context_length_exceeded",
            )

    def _request(
        self,
        model: ServedModel,
        options: Options,
        ids: list[int],
        index: int,
        likeliest: int | None,
        grammar: Grammar | None,
        template: Template | None = None,
        echo: bool = False,
    ) -> Request:
        """Returns what the engine is asked: an answer by `template`, whose marks end it, or how a text goes on."""
        settings: dict[str, Any] = {"temp": 1.0, **model.settings, **options.settings}
        settings.pop("max_tokens", None)
        max_tokens = _most_tokens(model, options, TEXT_TOKENS if template is None else CHAT_TOKENS)
        over = next((token for token in options.logit_bias if token >= model.loaded.model.config.vocab_size), None)
        if over is not None:
            raise FieldError("logit_bias", f"token {over} is none of the model's")
        return Request(
            model=model.name,
            ids=tuple(ids),
            max_tokens=max_tokens,
            sampler=Sampler(**settings, logit_bias=options.logit_bias),
            seed=None if options.seed is None else (options.seed + index) % _SEEDS,
            stop=(*(() if template is None else template.stop_strings), *options.stop),
            stop_ids=() if template is None else template.stop_ids,
            top_logprobs=likeliest or 0,
            prompt_logprobs=echo and (likeliest is not None or not max_tokens),
            grammar=grammar,
        )


class EventStream(Response):
    """Streams a completion's chunks, and ends it when the client leaves. `count` is called at the end."""

    def __init__(self, request: HTTPRequest, completion: OpenCompletion, count: Callable[[], None]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._request, self._completion, self._count = request, completion, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(chunks: AsyncIterator[str]) -> None:
            begun, last = False, b""
            try:
                async for chunk in chunks:
                    if not begun:
                        begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
            except Exception as error:
                if not begun:  # it has a status of its own
                    raise
                refusal = error_answer(error)
                self._request.state.outcome, last = refusal.status, event(refusal.body).encode()
            await send({"type": "http.response.body", "body": last})

        try:
            await _while_connected(self._request, write(self._completion.chunks()))
        except ClientDisconnect:
            self._request.state.outcome = LEFT
        finally:
            self._completion.cancel()
            self._count()


async def _while_connected(request: HTTPRequest, work: Awaitable[Result]) -> Result:
    """Awaits `work`, and cancels it when the client leaves. Raises ClientDisconnect then."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _json(request: HTTPRequest) -> Any:
    """Returns the body of a request. Raises ErrorAnswer where it is no JSON, or none that is taken."""
    body = await request.body()
    if body.count(b",") > MAX_VALUES:  # before memory is filled with them
        raise ErrorAnswer(400, f"the body has more than {MAX_VALUES:,} values")
    try:
        return await asyncio.to_thread(lambda: load_json(decoded(body, "the body"), JSON_RECORDS))
    except (ValueError, InputError) as error:
        raise ErrorAnswer(400, f"the body is no JSON: {printable(error)}") from None


def _most_tokens(model: ServedModel, options: Options, otherwise: int) -> int:
    """Returns the tokens of an answer, at most: the request's, or the model's own, or `otherwise`."""
    return int(model.settings.get("max_tokens", otherwise)) if options.max_tokens is None else options.max_tokens


def _log_said(request: HTTPRequest, text: str) -> None:
    request.state.said = f"{getattr(request.state, 'said', '')} {json.dumps(text)}".strip()


def _read_variables(template: Template, variables: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Returns the variables by name. Raises FieldError for one that makes no difference to the template."""
    read = {}
    for name, (field, value) in variables.items():
        if template.reads(name):
            read[name] = value
        elif (name, value) != ("reasoning_effort", "none"):  # which is what such a template's model does
            raise FieldError(field, "the model's chat template reads no such variable", "unsupported_parameter")
    return read


def _grammar(model: ServedModel, schema: Mapping[str, Any] | None) -> Grammar | None:
    if schema is None:
        return None
    try:
        return model.grammars.json_schema(schema)
    except ElmError as error:  # also that llguidance is not installed
        raise FieldError("response_format", str(error)) from None


def _check_ids(model: ServedModel, param: str, ids: list[int]) -> None:
    outside = next((each for each in ids if not 0 <= each < model.loaded.model.config.vocab_size), None)
    if outside is not None:
        raise FieldError(param, f"token {outside} is none of the model's {model.loaded.model.config.vocab_size:,}")


def _check_logprobs(model: ServedModel, requests: Sequence[Request], each: int) -> None:
    """Raises FieldError for answers with more log-probabilities than memory should be filled with."""
    most = 0
    for request in requests:
        room = model.context_length - len(request.ids)
        most += each * (min(request.max_tokens, room) + len(request.ids) * request.prompt_logprobs)
    if most > MAX_LOGPROBS:
        raise FieldError(
            "logprobs",
            f"could be {most:,} numbers, and an answer has at most {MAX_LOGPROBS:,}: ask for less at once, or stream",
        )


def _described(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "elm-mlx",
        "context_length": model.context_length,
        "kind": "base" if model.template is None else "chat",
        "tools": model.tools.form is not None,
        "base": model.base,
        "predicts_prompts": model.kvp is not None,
        "sampling": {"temperature" if name == "temp" else name: value for name, value in model.settings.items()},
    }


def _refuse(request: HTTPRequest, error: Exception) -> Response:
    refusal = error_answer(error)
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def _no_route(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return _refuse(
            request, ErrorAnswer(405, f"{request.url.path} takes no {request.method}", headers=error.headers)
        )
    return _refuse(request, ErrorAnswer(error.status_code, f"there is no {request.url.path[:100]}", code="not_found"))


def _client_left(request: HTTPRequest, error: Exception) -> Response:
    return Response(status_code=LEFT)  # nobody reads it
