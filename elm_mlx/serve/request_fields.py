"""The fields of requests: every one is parsed with its type and range, and what is not known is refused by its name.

Names and meanings are OpenAI's (platform.openai.com/docs/api-reference), with `top_k`, `min_p` and
`repetition_penalty` as other servers of open models have them. `null` counts as left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.reading import printable, short
from elm_mlx.serve.tool_calls import ToolsError, ToolUse, parse_tool_calls, parse_tool_use

MAX_ANSWERS = 16  # of a prompt
MAX_PROMPTS = 256  # of a request, and answers to all of them; evaluation sends many, of one token each to write
MAX_LIKELIEST = 20
MAX_STOPS = 64  # editors send words that end a completion by the dozen
MAX_STOP_LENGTH = 1000  # characters
MAX_MESSAGES = 2000
# Fields that say who asks or how fast it should go, and change no answer.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "cache_prompt",
)  # fmt: skip
# Fields that ask for nothing by one value, which clients send: any other is refused.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,), "suffix": ("",), "modalities": (["text"],), "verbosity": ("medium",),
}  # fmt: skip
_MEANT = {  # other servers' names
    "n_predict": "max_tokens", "max_new_tokens": "max_tokens", "repeat_penalty": "repetition_penalty",
    "functions": "tools", "function_call": "tool_choice", "num_ctx": "max_tokens",
}  # fmt: skip
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")  # of templates: what other fields say

_SETTINGS = {  # name: our name, lowest, highest, whether it counts
    "temperature": ("temp", 0, math.inf, False),
    "top_p": ("top_p", 0, 1, False),
    "top_k": ("top_k", -1, 1 << 31, True),
    "min_p": ("min_p", 0, 1, False),
    "repetition_penalty": ("repetition_penalty", 0, math.inf, False),
    "presence_penalty": ("presence_penalty", -2, 2, False),
    "frequency_penalty": ("frequency_penalty", -2, 2, False),
}
_ABOVE_ZERO = ("top_p", "repetition_penalty")
_HUGE = 1e300  # a whole number may be larger than any float


class FieldError(InputError):
    """A field of a request is at fault; `param` names it."""

    def __init__(self, param: str | None, message: str, code: str | None = None) -> None:
        super().__init__(f"{param}: {message}" if param else message)
        self.param = param
        self.code = code


@dataclass(frozen=True)
class Options:
    """The fields that chat and text completions share.

    Attributes:
        answers: `n`, of each prompt.
        max_tokens: None for the model's own.
        settings: of sampling, those that are given, by `Sampler`'s names.
        include_usage: a stream ends with a chunk that counts tokens.
    """

    model: str
    stream: bool
    include_usage: bool
    answers: int
    max_tokens: int | None
    stop: tuple[str, ...]
    seed: int | None
    settings: Mapping[str, float]
    logit_bias: Mapping[int, float]


@dataclass(frozen=True)
class ChatFields:
    """A request of `/v1/chat/completions`.

    Attributes:
        messages: as chat templates take them.
        tools: the functions to show the model; `tool_use` says how they are to be used.
        likeliest: tokens to report beside each, with log-probabilities; None for no log-probabilities at all.
        schema: of the JSON that the answer must be, unless it calls functions; None for any text.
        variables: for the chat template, by the fields that name them.
        documents: whether the answer is to be taken from the server's; None for wherever it has some.
    """

    options: Options
    messages: Sequence[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    tool_use: ToolUse
    likeliest: int | None
    schema: Mapping[str, Any] | None
    variables: Mapping[str, tuple[str, Any]]
    documents: bool | None = None

    @property
    def tools_field(self) -> str | None:
        """The first field that a model must take tools for; None where there is none."""
        if self.tools:
            return "tools"
        used = (i for i, each in enumerate(self.messages) if each["role"] == "tool" or "tool_calls" in each)
        return next((f"messages[{i}]" for i in used), None)


@dataclass(frozen=True)
class TextFields:
    """A request of `/v1/completions`: `prompts` are texts or ids. `likeliest` as in `ChatFields`."""

    options: Options
    prompts: Sequence[str | list[int]]
    echo: bool
    likeliest: int | None
    schema: Mapping[str, Any] | None


@dataclass(frozen=True)
class EmbeddingFields:
    """A request of `/v1/embeddings`: texts or ids, and whether the vectors come as base64."""

    model: str
    inputs: Sequence[str | list[int]]
    base64: bool


class _Body:
    """The fields of a request that have not been read yet."""

    def __init__(self, values: Any) -> None:
        if not isinstance(values, dict):
            raise FieldError(None, "the body is no JSON object")
        self._left = {name: value for name, value in values.items() if value is not None}
        for name in IGNORED:
            self._left.pop(name, None)

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str) or not value:
            raise FieldError(name, "is missing" if value is None else f"is {short(value)}: a text is needed")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise FieldError(name, f"is {short(value)}: true or false is needed")
        return value

    def flag_if_there(self, name: str) -> bool | None:
        return self.flag(name) if name in self._left else None

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        return None if value is None else _whole(name, value, low, high)

    def finish(self) -> None:
        """Raises FieldError for a field that nothing reads."""
        for name, values in _NEUTRAL.items():
            value = self.take(name, values[0])
            if value not in values:
                raise FieldError(name, f"is {short(value)}, which is not supported", "unsupported_parameter")
        for name in self._left:
            meant = f": {_MEANT[name]} is meant" if name in _MEANT else ""
            raise FieldError(printable(name)[:100], f"there is no such field{meant}", "unknown_parameter")


def parse_chat(values: Any) -> ChatFields:
    """Parses the body of a chat completion. Raises FieldError, which names the field."""
    body = _Body(values)
    messages = _messages(body.take("messages"))
    try:
        tools, use = parse_tool_use(body.take("tools"), body.take("tool_choice"), body.take("parallel_tool_calls"))
    except ToolsError as error:
        raise FieldError(error.param, str(error).removeprefix(f"{error.param}: ")) from None
    logprobs, top = body.flag("logprobs"), body.whole("top_logprobs", 0, MAX_LIKELIEST)
    if top and not logprobs:
        raise FieldError("top_logprobs", "needs logprobs true")
    schema = _schema(body.take("response_format"))
    variables = _variables(body.take("chat_template_kwargs", {}), body.take("reasoning_effort"))
    documents = body.flag_if_there("documents")
    options = _options(body, ("max_completion_tokens", "max_tokens"), schema is not None)
    body.finish()
    return ChatFields(options, messages, tools, use, (top or 0) if logprobs else None, schema, variables, documents)


def parse_text(values: Any) -> TextFields:
    """Parses the body of a text completion. Raises FieldError, which names the field."""
    body = _Body(values)
    prompts = _inputs("prompt", body.take("prompt"))
    echo, likeliest = body.flag("echo"), body.whole("logprobs", 0, MAX_LIKELIEST)
    schema = _schema(body.take("response_format"))
    options = _options(body, ("max_tokens",), schema is not None, least=0 if echo else 1)
    body.finish()
    if options.answers > 1 and len(prompts) * options.answers > MAX_PROMPTS:
        raise FieldError("n", f"makes {len(prompts) * options.answers} answers, and at most {MAX_PROMPTS} are given")
    return TextFields(options, prompts, echo, likeliest, schema)


def parse_embeddings(values: Any) -> EmbeddingFields:
    """Parses the body of a request for embeddings. Raises FieldError, which names the field."""
    body = _Body(values)
    model, inputs = body.text("model"), _inputs("input", body.take("input"))
    encoding = body.take("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise FieldError("encoding_format", f"is {short(encoding)}: float or base64 is needed")
    if body.take("dimensions") is not None:
        raise FieldError("dimensions", "cannot be chosen: vectors are as wide as the model", "unsupported_parameter")
    body.finish()
    return EmbeddingFields(model, inputs, encoding == "base64")


def _options(body: _Body, lengths: Sequence[str], held: bool, least: int = 1) -> Options:
    """Parses what chat and text completions share. `held`: the answer is JSON, which no stop string may cut."""
    stream, streaming = body.flag("stream"), body.take("stream_options", {})
    if not isinstance(streaming, dict) or not {*streaming} <= {"include_usage", "include_obfuscation"}:
        raise FieldError("stream_options", f"is {short(streaming)}: an object with include_usage is needed")
    if streaming and not stream:
        raise FieldError("stream_options", "needs stream true")
    include_usage = streaming.get("include_usage") or False
    if not isinstance(include_usage, bool):
        raise FieldError("stream_options.include_usage", f"is {short(include_usage)}: true or false is needed")
    given = [_length(name, each, least) for name in lengths if (each := body.take(name)) is not None]
    if len({*given}) > 1:
        raise FieldError(lengths[-1], f"is {given[1]}, and {lengths[0]} {given[0]}: give one of them")
    settings: dict[str, float] = {}
    for name, (ours, low, high, counts) in _SETTINGS.items():
        value = body.take(name)
        if value is not None:
            settings[ours] = _number(name, value, low, high, counts, name in _ABOVE_ZERO)
    stops = _stops(body.take("stop", []))
    if held and stops:
        raise FieldError("stop", "does not go with response_format: it could end the JSON before it is whole")
    if settings.get("top_k") == -1:  # as others write that all are kept
        settings["top_k"] = 0
    return Options(
        model=body.text("model"),
        stream=stream,
        include_usage=include_usage,
        answers=body.whole("n", 1, MAX_ANSWERS) or 1,
        max_tokens=given[0] if given else None,
        stop=stops,
        seed=body.whole("seed", -(1 << 63), (1 << 64) - 1),
        settings=settings,
        logit_bias=_bias(body.take("logit_bias", {})),
    )


def _messages(values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not values:
        raise FieldError("messages", "is missing" if values is None else "a list of at least one message is needed")
    if len(values) > MAX_MESSAGES:
        raise FieldError("messages", f"has {len(values)} messages, and at most {MAX_MESSAGES} are taken")
    return [_message(f"messages[{i}]", value) for i, value in enumerate(values)]


def _message(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(where, f"is {short(value)}: an object with role and content is needed")
    left = {name: each for name, each in value.items() if each is not None}
    role = left.pop("role", None)
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise FieldError(f"{where}.role", f"is {short(role)}: system, developer, user, assistant or tool is needed")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = left.pop("tool_calls", None) if role == "assistant" else None
    content = left.pop("content", "" if calls or role == "assistant" else None)
    message["content"] = _content(f"{where}.content", content)
    if calls:
        try:
            message["tool_calls"] = parse_tool_calls(f"{where}.tool_calls", calls)
        except ToolsError as error:
            raise FieldError(error.param, str(error).removeprefix(f"{error.param}: ")) from None
    for name in ("name", *(("tool_call_id",) if role == "tool" else ())):
        if name in left:
            if not isinstance(left[name], str):
                raise FieldError(f"{where}.{name}", f"is {short(left[name])}: a text is needed")
            message[name] = left.pop(name)
    for name in ("tool_calls", "tool_call_id", "function_call"):
        if name in left:
            raise FieldError(f"{where}.{name}", f"a message of the role {role} has none", "unknown_parameter")
    return {**left, **message}  # templates may read more, such as reasoning_content


def _content(where: str, value: Any) -> str:
    """Returns a message's text; parts of text are joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise FieldError(where, "is missing" if value is None else f"is {short(value)}: a text is needed")
    for i, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise FieldError(f"{where}[{i}]", 'an object {"type": "text", "text": …} is needed')
        if part["type"] != "text":
            raise FieldError(f"{where}[{i}].type", f"is {short(part['type'])}: the model reads text alone")
        if not isinstance(part.get("text"), str):
            raise FieldError(f"{where}[{i}].text", f"is {short(part.get('text'))}: a text is needed")
    return "".join(part["text"] for part in value)


def _variables(values: Any, effort: Any) -> dict[str, tuple[str, Any]]:
    """Returns the variables for a chat template: each its field's name, and its value."""
    if not isinstance(values, dict):
        raise FieldError("chat_template_kwargs", f"is {short(values)}: an object of a template's variables is needed")
    variables = {name: (f"chat_template_kwargs.{printable(name)[:100]}", value) for name, value in values.items()}
    for name, (field, _) in variables.items():
        if name in _OWN_VARIABLES or name.endswith("_token"):
            raise FieldError(field, "is no variable that may be chosen")
    if effort is not None:
        if not isinstance(effort, str) or variables.get("reasoning_effort", ("", effort))[1] != effort:
            raise FieldError("reasoning_effort", f"is {short(effort)}: one text is needed")
        variables["reasoning_effort"] = "reasoning_effort", effort
    return variables


def _length(name: str, value: Any, least: int) -> int:
    """Returns a number of tokens; -1, as others write it, is as many as the context leaves."""
    return 1 << 31 if value == -1 else _whole(name, value, least, 1 << 31)


def _inputs(name: str, value: Any) -> list[str | list[int]]:
    """Returns texts and lists of ids: one is given as it is, several in a list."""
    if value is None:
        raise FieldError(name, "is missing")
    values = value if isinstance(value, list) and value and not _is_id(value[0]) else [value]
    if len(values) > MAX_PROMPTS:
        raise FieldError(name, f"has {len(values)} texts, and at most {MAX_PROMPTS} are taken")
    for each in values:
        ids = isinstance(each, list) and each and all(map(_is_id, each))
        if not ids and not (isinstance(each, str) and each):
            raise FieldError(name, f"{short(each)}: a text, a list of token ids, or a list of those is needed")
    return values


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stops(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > MAX_STOPS:
        raise FieldError("stop", f"is {short(value)}: a text, or a list of at most {MAX_STOPS}, is needed")
    for each in values:
        if not isinstance(each, str) or not 0 < len(each) <= MAX_STOP_LENGTH:
            raise FieldError("stop", f"{short(each)}: a text of 1 to {MAX_STOP_LENGTH:,} characters is needed")
    return tuple(values)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > 1024:
        raise FieldError("logit_bias", f"is {short(value)}: an object of at most 1,024 token ids is needed")
    bias = {}
    for token, each in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise FieldError("logit_bias", f"{short(token)} is no token id")
        bias[int(token)] = _number(f"logit_bias.{token}", each, -100, 100)
    return bias


def _schema(value: Any) -> Mapping[str, Any] | None:
    """Returns the schema of a `response_format`; None where any text will do."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise FieldError("response_format.type", f"is {short(kind)}: text, json_object or json_schema is needed")
    named = value.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise FieldError("response_format.json_schema.schema", "a JSON schema, which is an object, is needed")
    return schema


def _number(name: str, value: Any, low: float, high: float, counts: bool = False, above: bool = False) -> float:
    if counts:
        return _whole(name, value, int(low), int(high))
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -_HUGE < value < _HUGE:
        raise FieldError(name, f"is {short(value)}: a number is needed")
    if not low <= value <= high or (above and value == low):
        least = f"above {low}" if above else f"at least {low}"
        most = "" if high == math.inf else f", at most {high}"
        raise FieldError(name, f"is {short(value)}: it must be {least}{most}")
    return float(value)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not _is_id(value):
        raise FieldError(name, f"is {short(value)}: a whole number is needed")
    if not low <= value <= high:
        most = "" if high >= 1 << 31 else f", at most {high}"
        raise FieldError(name, f"is {short(value)}: it must be at least {low}{most}")
    return int(value)
