"""Chat templates: a conversation as token ids, by OpenELM-instruct's template or the one that comes with a model.

A control token comes from the template alone: its name in a message is text, whoever wrote it.

A template makes *parts*: runs of text, and ids of control tokens between them. Each run is encoded by itself, as
Llama's tokenizer in Hugging Face's libraries does ("legacy" behaviour, which the instruct models were trained
with): after `</s>`, a newline is the two tokens `▁` and `<0x0A>`.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from elm_mlx import files, reading
from elm_mlx.directories import TEMPLATES
from elm_mlx.errors import InputError
from elm_mlx.reading import json_object_if_there
from elm_mlx.text import jinja
from elm_mlx.text.jinja import TemplateInput
from elm_mlx.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]  # functions as OpenAI's API describes them
Part = str | int
NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})

ROLES = ("system", "user", "assistant")
OPENELM_INSTRUCT, NONE = "openelm-instruct", "none"
FILE_NAME = "chat_template.jinja"
_MAX_BYTES = 1 << 20  # of a template's file; the longest in the wild has 30 KB

# `OpenELMInstruct` in Jinja, to be written beside a model for mlx-lm and transformers; the ids are the same.
OPENELM_INSTRUCT_JINJA = r"""{{ bos_token }}
{%- if messages[0]['role'] != 'system' %}{{ '<|system|>\n' + eos_token + '\n' }}{% endif %}
{%- for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""


class Template(ABC):
    """A chat template, with the tokenizer of its model.

    Attributes:
        stop_ids: the tokens that end an answer.
        stop_strings: texts that end one, where the model goes on to the next turn by itself. Not part of it.
        roles: whose messages it takes.
    """

    roles: tuple[str, ...] = ROLES
    takes_tools = False
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def reads(self, variable: str) -> bool:
        """Returns whether a variable of this name, such as `enable_thinking`, may make a difference."""
        return False

    @abstractmethod
    def parts_of(self, conversations: Sequence[TemplateInput]) -> list[list[Part]]:
        """Returns each conversation as runs of text and control tokens, BOS first where the tokenizer has one.

        Args:
            conversations: all with tools, for a template that `takes_tools`, or none; with variables that it `reads`.

        Raises:
            InputError: the template does not take one of them.
        """

    def encode(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> list[int]:
        """Returns the ids of the conversation, exactly one BOS in front.

        Args:
            messages: each with a `role` of `roles` and its `content`; an assistant's may have `tool_calls`.
            add_generation_prompt: end with the text that makes the model answer.
            tools: functions that the model may call, of a template that `takes_tools`.
            variables: further ones of the template, those that it `reads`.

        Raises:
            InputError: there is no message, or one is malformed, or the template does not take it.
        """
        messages = check_messages(messages, self.roles)
        (parts,) = self.parts_of([TemplateInput(messages, add_generation_prompt, tools, variables)])
        return self.tokenizer.encode_parts(parts)

    def extend(self, ids: Sequence[int], messages: Messages) -> list[int]:
        """`encode(messages)`, beginning with `ids` wherever the template allows, so that a cache of them serves on.

        An answer's text, encoded, need not give the ids that the model chose, and templates may rewrite what
        was said. Where the template closes an answer with a control token and leaves what came before alone,
        the result is `ids`, that token unless `ids` end with it, and the new message. Otherwise it is
        `encode(messages)`, of which a cache may still share a beginning.

        Args:
            ids: the conversation up to and with its last answer, in the ids that the model saw and chose.
            messages: the same, and one new message.

        Raises:
            InputError: as `encode`.
        """
        messages = check_messages(messages)
        if len(messages) < 3 or messages[-2]["role"] != "assistant":
            return self.encode(messages)
        conversations = ((messages, True), (messages[:-2], True), (messages[:-1], False))
        after, asked, answered = self.parts_of([TemplateInput(*each) for each in conversations])
        # Some close a whole conversation by more than an answer in it.
        same = next((i for i, (a, b) in enumerate(zip(answered, after, strict=False)) if a != b), len(answered))
        end = max((i for i, part in enumerate(after[:same]) if isinstance(part, int)), default=-1)
        if len(_controls(after[: end + 1])) <= len(_controls(asked)):
            return self.tokenizer.encode_parts(after)
        said = list(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)
        return said + self.tokenizer.encode_parts(after[end:])


class PlainTemplate(Template):
    """A template without Jinja, which writes each conversation by itself and knows neither tools nor variables."""

    def parts_of(self, conversations: Sequence[TemplateInput]) -> list[list[Part]]:
        return [self._parts(each.messages, each.add_generation_prompt) for each in conversations]

    @abstractmethod
    def _parts(self, messages: Messages, add_generation_prompt: bool) -> list[Part]:
        """Returns one conversation, as `parts_of` does several."""


class OpenELMInstruct(PlainTemplate):
    """The template of the OpenELM-instruct models, which is the alignment handbook's for zephyr.

    A conversation without a system message gets an empty one, as in their training.
    """

    stop_strings = tuple(f"\n<|{role}|>\n" for role in ROLES)

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise InputError(f"{tokenizer.path}: has no BOS or no EOS, and the template {OPENELM_INSTRUCT} needs both")
        self._bos, self._eos = tokenizer.bos_id, tokenizer.eos_id
        self.stop_ids = _unique(*tokenizer.eos_ids, self._eos)

    def _parts(self, messages: Messages, add_generation_prompt: bool) -> list[Part]:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        parts: list[Part] = [self._bos]
        newline = ""
        for message in messages:
            parts += [f"{newline}<|{message['role']}|>\n{message['content']}", self._eos]
            newline = "\n"
        return [*parts, "\n<|assistant|>\n" if add_generation_prompt else "\n"]


class JinjaTemplate(Template):
    """A template that came with a model.

    BOS is put in front where the template doesn't write it (in Hugging Face's libraries it is then missing), unless
    the tokenizer is one that was made for those.

    Args:
        source: Jinja text.
        where: its file, for messages.
        names: the texts of `bos_token`, `eos_token` and their like, for the template to write.
        tool_source: Jinja text for conversations with tools, of a model that has one of its own for them.

    Raises:
        InputError: `source` is no Jinja.
        LimitError: it does not stay within the limits of `jinja`.
    """

    roles = (*ROLES, "tool")

    def __init__(
        self, tokenizer: Tokenizer, source: str, where: str, names: Mapping[str, str], tool_source: str | None = None
    ) -> None:
        super().__init__(tokenizer)
        if not source.strip():
            raise InputError(f"{where}: the chat template is blank ({jinja.INSTEAD})")
        self.source, self._where, self._names = source, where, dict(names)
        self.tool_source = tool_source or source
        self._ids = tokenizer.control_ids
        self._first, self._last = {name[0] for name in self._ids}, {name[-1] for name in self._ids}
        self._pattern = tokenizer.names_of_controls()
        self.stop_ids, self.stop_strings = self._ends()

    def reads(self, variable: str) -> bool:
        return re.search(rf"\b{re.escape(variable)}\b", self.source + self.tool_source) is not None

    def parts_of(self, conversations: Sequence[TemplateInput]) -> list[list[Part]]:
        mark = self._unused_character(conversations)
        shielded = [
            each._replace(messages=self._shielded(each.messages, mark), tools=self._shielded(each.tools, mark))
            for each in conversations
        ]
        differing = [i for i, (one, other) in enumerate(zip(conversations, shielded, strict=True)) if one != other]
        rendered = self._render([*conversations, *(shielded[i] for i in differing)])
        for text in rendered:
            if isinstance(text, jinja.Refusal):
                raise text
        split = [self._split(text) for text in rendered if isinstance(text, str)]
        for i, safe in zip(differing, split[len(conversations) :], strict=True):
            if _controls(split[i]) != _controls(safe):  # a message holds the name of a control token
                split[i] = [part if isinstance(part, int) else part.replace(mark, "") for part in safe]
        return [self._begun(parts) for parts in split[: len(conversations)]]

    @cached_property
    def takes_tools(self) -> bool:  # type: ignore[override]
        """Returns whether the template shows the model the functions that it may call."""
        function = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": function}]
        system, question = {"role": "system", "content": "!"}, {"role": "user", "content": "?"}
        messages = ([question], [system, question])
        without, told = (
            self._render([TemplateInput(each, True, given) for each in messages]) for given in (None, tools)
        )
        return any(isinstance(b, str) and a != b for a, b in zip(without, told, strict=True))

    def _begun(self, parts: list[Part]) -> list[Part]:
        bos = self.tokenizer.bos_id if self.tokenizer.bos_before_templates else None
        parts = self.tokenizer.trimmed(parts)
        return parts if bos is None or parts[:1] == [bos] else [bos, *parts]

    def _render(self, conversations: Sequence[TemplateInput]) -> list[str | jinja.Refusal]:
        """Renders conversations of which all have tools, or none."""
        source = self.tool_source if any(each.tools for each in conversations) else self.source
        return jinja.render(source, self._where, conversations, self._names)

    def _split(self, text: str) -> list[Part]:
        parts: list[Part] = []
        start = 0
        for match in self._pattern.finditer(text):
            parts += [text[start : match.start()], self._ids[match[0]]]
            start = match.end()
        return [part for part in (*parts, text[start:]) if part != ""]

    def _shielded(self, value: Any, mark: str) -> Any:
        """Returns messages or tools with the texts in them shielded, but for words that templates compare."""
        if isinstance(value, str):
            return self._shield(value, mark)
        if isinstance(value, Mapping):
            return {
                name if name.isidentifier() else self._shield(name, mark): (
                    inner
                    if name in ("role", "type") and isinstance(inner, str) and inner.isidentifier()
                    else self._shielded(inner, mark)
                )
                for name, inner in value.items()
            }
        return (
            type(value)(self._shielded(inner, mark) for inner in value) if isinstance(value, (list, tuple)) else value
        )

    def _shield(self, content: str, mark: str) -> str:
        """`content` with `mark`s in it, so that no name of a control token can begin, end or lie in it.

        They stand after each first character of a name and before each last one, and after the content's own
        first character should all of it be the middle of a name. So none is beyond the space at its ends,
        where the template could not trim it.
        """
        marked = {ord(c): mark * (c in self._last) + c + mark * (c in self._first) for c in self._first | self._last}
        text = content.translate(marked)
        word = content.strip()
        if word and any(word in name for name in self._ids):
            at = text.index(word[0]) + 1
            text = text[:at] + mark + text[at:]
        return text

    def _unused_character(self, values: Any) -> str:
        used = {*self.source, *"".join(self._ids), *json.dumps(values, ensure_ascii=False, default=dict)}
        return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)

    def _ends(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Finds the ends of an answer: what the template writes after one, a control token or else text."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "\uf8ff"}
        following = {"role": "user", "content": "\uf8fe"}
        eos_ids = self.tokenizer.eos_ids
        closed, followed = ([question, answer], False), ([question, answer, following], False)
        for text in self._render([TemplateInput(*closed), TemplateInput(*followed)]):
            if isinstance(text, jinja.Refusal):  # one that wants more of a conversation, say a system message
                continue
            ending = self._split(text.rpartition("\uf8ff")[2].partition("\uf8fe")[0])
            written = [part for part in ending if isinstance(part, int) or part.strip()]
            if written:
                end = written[0]
                return (_unique(*eos_ids, end), ()) if isinstance(end, int) else (eos_ids, (end.rstrip(),))
        return eos_ids, ()


def check_messages(messages: Messages, roles: Sequence[str] = ROLES) -> Messages:
    """Returns `messages`. Raises InputError unless each has a `role` of `roles` and a text as `content`."""
    if not messages:
        raise InputError("a conversation needs a message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise InputError(f"message {number}: an object with strings `role` and `content` is needed")
        if message.get("role") not in roles:
            raise InputError(f"message {number}: role is {message.get('role')!r}, not one of {', '.join(roles)}")
        if not isinstance(message.get("content"), str):
            raise InputError(f"message {number}: content is not a string")
    return messages


def choose(
    directory: Path, tokenizer: Tokenizer, override: str | None = None, adapter: Path | None = None
) -> Template | None:
    """Returns the chat template of the model in `directory`; None for a base model, which just continues a text.

    Args:
        override: `openelm-instruct`, `none`, or a file of Jinja text, in place of the directory's own.
        adapter: the directory of one that is in the model; the template that it was trained by goes before the model's.

    Raises:
        InputError: the template cannot be read, or does not go with the tokenizer.
    """
    directory = reading.expanded(directory)
    source, where = source_of(directory, override, adapter)
    if source is None:
        return None
    if source == OPENELM_INSTRUCT_JINJA:  # the same ids, without Jinja
        return OpenELMInstruct(tokenizer)
    own = override is None and Path(where).is_relative_to(directory)
    with_tools = tool_use_source(directory) if own else None
    return JinjaTemplate(tokenizer, source, where, _names(directory, tokenizer), with_tools)


def prepare(directory: Path, override: str | None = None, adapter: Path | None = None) -> bool:
    """Returns True where `choose` will find a template, and starts the process that renders it beside other work.

    Raises:
        InputError: the template cannot be read.
    """
    source, _ = source_of(directory, override, adapter)
    if source not in (None, OPENELM_INSTRUCT_JINJA):
        jinja.start()
    return source is not None


def source_of(directory: Path, override: str | None = None, adapter: Path | None = None) -> tuple[str | None, str]:
    """Returns the Jinja text that `choose` takes, if any, and its file. Raises InputError as `choose`."""
    if override is not None:
        return read_source(override), override
    if adapter is not None:
        source, where = own_source(adapter)
        if source is not None:
            return (source if source.strip() else None), where
    return own_source(directory)


def record(adapter: Path, source: str | None) -> None:
    """Writes the template that an adapter was trained by into its directory; an empty one says that there was none.

    Raises:
        ElmError: it cannot be written.
    """
    files.write_text(adapter / FILE_NAME, source or "")


def adopt(directory: Path, adapter: Path) -> str | None:
    """Makes the template that an adapter was trained by the one of a model directory, which it was merged into.

    Returns:
        Its file; None where the adapter's directory has none, and the model's own stays.

    Raises:
        InputError: a template cannot be read.
        ElmError: it cannot be written.
    """
    source, where = own_source(adapter)
    if source is None:
        return None
    others = (path for folder in TEMPLATES for path in (directory / folder).glob("*.jinja"))
    replaced = [path for path in others if path.stem == "default" or not source.strip()]
    for path in (directory / FILE_NAME, directory / "chat_template.json", *replaced):
        path.unlink(missing_ok=True)
    settings = directory / "tokenizer_config.json"
    values = json_object_if_there(settings)
    if values.pop("chat_template", None) is not None:
        files.write_json(settings, values)
    if source.strip():
        files.write_text(directory / FILE_NAME, source)
    return where


def read_source(name: str) -> str | None:
    """Returns the Jinja text that `name` means: `openelm-instruct`, or a file; None for `none`. Raises InputError."""
    if name == NONE:
        return None
    if name == OPENELM_INSTRUCT:
        return OPENELM_INSTRUCT_JINJA
    path = reading.expanded(name)
    if not path.is_file():
        raise InputError(f"{name}: not a chat template: give {OPENELM_INSTRUCT}, {NONE}, or a file of Jinja text")
    return reading.text(path, _MAX_BYTES)


def source_for(model_name: str) -> str | None:
    """Returns the Jinja text for a checkpoint by its name: OpenELM's instruct models say it there."""
    return OPENELM_INSTRUCT_JINJA if "instruct" in model_name.lower() else None


def own_source(directory: Path, option: str = "--template") -> tuple[str | None, str]:
    """Returns the directory's Jinja text, if it has one, and its file, found as transformers finds it.

    Args:
        option: by which the caller takes another one, for messages.

    Raises:
        InputError: there is one, and it cannot be used.
    """
    directory = reading.expanded(directory)
    instead = jinja.INSTEAD.replace("--template", option)
    folders = [directory / name for name in TEMPLATES]
    for path in (*(folder / "default.jinja" for folder in folders), directory / FILE_NAME):
        if os.path.lexists(path):  # a link to nowhere is an error too
            return reading.text(path, _MAX_BYTES), str(path)
    for folder in folders:
        names = sorted(path.stem for path in folder.glob("*.jinja"))
        if names:
            raise InputError(f"{folder}: holds {', '.join(names)}, and no default ({instead})")
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = directory / name
        values = json_object_if_there(path)
        value = values.get("chat_template")
        if value is not None or (path.stem == "chat_template" and path.exists()):  # the file is there for nothing else
            try:
                return _default(value), str(path)
            except ValueError as error:
                raise InputError(f"{path}: chat_template {error} ({instead})") from None
    return None, ""


def tool_use_source(directory: Path) -> str | None:
    """Returns the Jinja text for conversations with tools, of a directory that has one beside its default.

    Raises:
        InputError: its file cannot be read.
    """
    for path in (directory / folder / "tool_use.jinja" for folder in TEMPLATES):
        if os.path.lexists(path):
            return reading.text(path, _MAX_BYTES)
    value = json_object_if_there(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):  # of names and templates, which `own_source` has checked
        value = {entry["name"]: entry.get("template") for entry in value}
    text = value.get("tool_use") if isinstance(value, dict) else None
    return text if isinstance(text, str) and len(text) <= _MAX_BYTES else None


def _default(value: Any) -> str:
    """Returns the text that a JSON file's `chat_template` means: itself, or the default of several.

    Raises:
        ValueError: it means none; says why.
    """
    if isinstance(value, list) and all(isinstance(e, dict) and isinstance(e.get("name"), str) for e in value):
        value = {entry["name"]: entry.get("template") for entry in value}
    if isinstance(value, dict) and value and "default" not in value:
        raise ValueError(f"holds {', '.join(sorted(value))}, and no default")
    text = value.get("default") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError("is neither a string nor a list of objects with strings as name and template")
    if len(text) > _MAX_BYTES:
        raise ValueError(f"has more than {_MAX_BYTES >> 20} MB, which no template needs")
    return text


def _names(directory: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the texts of a template's `bos_token`, `eos_token` and their like, of the directory or the tokenizer."""
    pieces = tokenizer.control_ids
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names = {name: piece for name, token in ids.items() for piece in pieces if pieces[piece] == token}
    for name, value in json_object_if_there(directory / "tokenizer_config.json").items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            names[name] = text
    return names


def _controls(parts: Sequence[Part]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]


def _unique(*ids: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))
