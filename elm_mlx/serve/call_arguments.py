"""The arguments of a call as models write them: a JSON object, Python's keywords, or each between tags of its own.

Each of the three is read as it comes, into JSON whose values have the types of the function's schema, and has a
grammar that holds a model to this schema.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.inference.generation import overlap
from elm_mlx.inference.grammar import MAX_SCHEMA, schema_text
from elm_mlx.reading import load_json, short

Schema = Mapping[str, Any]
Piece = tuple[str, str | None]  # what is final of the arguments as JSON; the text behind them, None before their end

_LONGEST_NAME = 200  # characters of a parameter's name
_DEFINITIONS = frozenset(("$defs", "definitions"))
_NOTES = _DEFINITIONS | {"title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id"}
_OF_OBJECT = _NOTES | {"type", "properties", "required", "additionalProperties"}
_OF_TEXT = _NOTES | {"type", "minLength", "maxLength"}
_TYPES = frozenset(("string", "integer", "number", "boolean", "null", "object", "array"))
_MOST_DIGITS = 100  # of a whole number
_MOST_BRANCHES = 50  # of an `anyOf`, whose types are looked at


class Brackets:
    """Finds where brackets close, in a text that comes in pieces; those within quotes do not count.

    Args:
        quotes: the characters that quote.
        depth: brackets that are open before the text.
    """

    def __init__(self, quotes: str = '"', depth: int = 0) -> None:
        self._quotes, self._depth, self._quote, self._escaped = quotes, depth, "", False

    def find(self, text: str, start: int = 0, separator: str = "") -> int | None:
        """Returns where the outermost bracket closes in `text[start:]`, which is new, or `separator` stands within it
        alone; None where neither has come."""
        for at in range(start, len(text)):
            character = text[at]
            if self._escaped:
                self._escaped = False
            elif self._quote:
                self._escaped = character == "\\"
                self._quote = "" if character == self._quote else self._quote
            elif character in self._quotes:
                self._quote = character
            elif character in "([{":
                self._depth += 1
            elif character in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    return at
            elif character == separator and self._depth == 1:
                return at
        return None


@dataclass(frozen=True)
class JSONObject:
    """Arguments as a JSON object."""

    def reader(self, schema: Schema, held: bool) -> JSONReader:
        return JSONReader()

    def rules(self, name: str, schema: Schema) -> list[str]:
        """Returns the grammar of arguments: rules in llguidance's Lark, the first of them called `name`.

        Raises:
            InputError: `schema` cannot be held to in this notation.
        """
        return [f"{name}: %json {schema_text(schema)}"]


class JSONReader:
    """Reads a JSON object as it comes."""

    def __init__(self) -> None:
        self._brackets = Brackets()

    def add(self, text: str) -> Piece:
        """Takes more of the text. Raises ValueError where it is none of arguments."""
        end = self._brackets.find(text)
        return (text, None) if end is None else (text[: end + 1], text[end + 1 :])


@dataclass(frozen=True)
class Keywords:
    """Arguments as Python's keywords: `city='Rome', days=[1, 2]`. Their values are JSON or Python's literals."""

    def reader(self, schema: Schema, held: bool) -> KeywordReader:
        return KeywordReader(schema, held)

    def rules(self, name: str, schema: Schema) -> list[str]:
        """As `JSONObject.rules`."""
        parameters, free = _parameters(schema, r"[^\s=()\[\]{},'\"]+")
        if free is not None:
            each = f'{name.upper()}_NAME "=" {name}_value'
            return [
                f'{name}: ({each} (", " {each})*)?',
                f"{name.upper()}_NAME: /[A-Za-z_][A-Za-z0-9_]{{0,63}}/",
                f"{name}_value: {' | '.join(_keyword_values(free))}",
            ]
        rules, first, more = [], list[str](), ""  # alternatives for the first that is written; what follows any
        for number, (key, value, required) in reversed([*enumerate(parameters)]):
            here = f"{name}_{number}"
            rules += [
                f"{here}: {_quoted(key + '=')} ({' | '.join(_keyword_values(value))})",
                f"{here}_first: {here} {more}",
            ]
            rules.append(f'{here}_more: (", " {here}){"" if required else "?"} {more}')
            first, more = [f"{here}_first", *([] if required else first)], f"{here}_more"
        needed = any(required for _, _, required in parameters)
        return [f"{name}: ({' | '.join(first) or _quoted('')}){'' if needed else '?'}", *rules]


def _keyword_values(schema: Schema) -> list[str]:
    """Returns alternatives for a value that satisfies `schema`: JSON, and what Python writes in another way."""
    found, constraints = [f"%json {schema_text(schema)}"], schema.keys() - _NOTES
    if constraints <= {"type", "enum", "const"} and (words := _words(schema)) is not None:
        texts = [
            json.dumps(word, ensure_ascii=False)[1:-1].replace('\\"', '"') for word in words if isinstance(word, str)
        ]
        return [*found, *(_quoted("'" + text.replace("'", "\\'") + "'") for text in texts)]
    if schema.get("type") == "boolean":
        return [*found, '"True"', '"False"']
    if schema.get("type") == "string" and schema.keys() <= _OF_TEXT:
        return [*found, rf"/'([^'\\\x00-\x1f]|\\['\\nt]){_count(schema)}'/"]
    return found


class KeywordReader:
    """Reads the keywords of a call as they come, up to the bracket that closes them.

    Args:
        held: a grammar holds the text to the form, so that a value which is no literal is one nested too deep: a text.
    """

    def __init__(self, schema: Schema, held: bool) -> None:
        self._held, self._pairs = held, _Pairs(schema)
        self._text, self._brackets = "", Brackets("\"'", depth=1)

    def add(self, text: str) -> Piece:
        """As `JSONReader.add`."""
        said, start = "", len(self._text)
        self._text += text
        while (at := self._brackets.find(self._text, start, ",")) is not None:
            argument, mark = self._text[:at], self._text[at]
            if argument.strip():
                key, equals, written = argument.partition("=")
                if not equals or not key.strip() or mark not in ",)":
                    raise ValueError("an argument is `name=value`")
                said += self._pairs.add(key.strip(), self._value(written.strip(), self._pairs.types(key.strip())))
            if mark != ",":
                return said + self._pairs.end(), self._text[at:]
            self._text, start = self._text[at + 1 :], 0
        return said, None

    def _value(self, written: str, types: frozenset[str]) -> Any:
        """Returns the value of a literal, as a text or as what its text says where the schema has it so."""
        try:
            value = _literal(written)
        except ValueError:
            if self._held:
                return written
            raise
        if _fits(value, types):
            return value
        if isinstance(value, str):
            with suppress(ValueError):
                inner = _literal(value)
                return inner if _fits(inner, types) else value
        return written if types == {"string"} else value


@dataclass(frozen=True)
class TaggedParameters:
    """Arguments between tags, `opening NAME middle VALUE closing` each. A text stands as it is, other values as JSON.

    Attributes:
        opening, middle, closing: such as `<parameter=`, `>\\n` and `\\n</parameter>\\n`.
    """

    opening: str
    middle: str
    closing: str

    def reader(self, schema: Schema, held: bool) -> TagReader:
        return TagReader(self, schema, held)

    def rules(self, name: str, schema: Schema) -> list[str]:
        """As `JSONObject.rules`."""
        end = self.closing.rstrip()
        behind = _quoted(self.closing[len(end) :])
        parameters, free = _parameters(schema, r"[^<>\s\"]+")

        def value(rule: str, each: Schema) -> list[str]:
            """Returns the rules of a value with the end of it."""
            alternatives = _tagged_values(each, end)
            texts = [
                f"{rule}_{place}{'[lazy]' if one.startswith('/') else ''}: {one}"
                for place, one in enumerate(alternatives)
            ]
            return [f"{rule}: ({' | '.join(f'{rule}_{place}' for place in range(len(texts)))}) {behind}", *texts]

        if free is not None:
            named = f"{_quoted(self.opening)} {name.upper()}_NAME {_quoted(self.middle)} {name}_0"
            return [
                f"{name}: ({named})*",
                f"{name.upper()}_NAME: /[A-Za-z_][A-Za-z0-9_-]{{0,63}}/",
                *value(f"{name}_0", free),
            ]
        parts = [
            f"({_quoted(self.opening + key + self.middle)} {name}_{number}){'' if required else '?'}"
            for number, (key, _, required) in enumerate(parameters)
        ]
        values = [rule for number, (_, each, _) in enumerate(parameters) for rule in value(f"{name}_{number}", each)]
        return [f"{name}: {' '.join(parts) or _quoted('')}", *values]


def _tagged_values(schema: Schema, end: str, inner: bool = False) -> list[str]:
    """Returns alternatives for a value that satisfies `schema`, each with `end`. A lazy regular expression is a text.

    Args:
        inner: `schema` is one of those that another allows.

    Raises:
        InputError: the schema says of a text what cannot be held to here.
    """
    schema = _resolved(schema)
    types, constraints = _types(schema), schema.keys() - _NOTES
    if constraints <= {"type", "enum", "const"} and (words := _words(schema)) is not None:
        texts = [word if isinstance(word, str) else json.dumps(word) for word in words]
        if any(end in each for each in texts):
            raise InputError(f"a value has {end.strip()!r} in it, which ends it in this model's calls")
        return [_quoted(each + end) for each in texts]
    if "string" not in types:
        return [f"%json {schema_text(schema)} {_quoted(end)}"]
    if constraints <= {"type"} or (types == {"string"} and schema.keys() <= _OF_TEXT):
        closing = re.escape(end).replace("\\\n", r"\n").replace("/", r"\/")
        return [rf"/(.|\n){_count(schema)}{closing}/"]
    branches = schema.get("anyOf", schema.get("oneOf"))
    if len(constraints) == 1 and isinstance(branches, list) and not inner:
        found = [one for each in branches for one in _tagged_values({**_shared(schema), **_mapping(each)}, end, True)]
        free = [one for one in found if one.startswith("/")]
        if not free:
            return found
        if all(_mapping(each).keys() - _NOTES <= {"type"} for each in branches):
            return free[:1]  # which the others are within, too
    raise InputError(f"{', '.join(sorted(constraints - {'type'}))} of a text: not supported in this model's calls")


class TagReader:
    """Reads tagged parameters as they come, up to what is none. Texts are given on in pieces.

    Args:
        held: a grammar holds the text to the form, so that only all of `closing` ends a value. Else its tag does.
    """

    def __init__(self, form: TaggedParameters, schema: Schema, held: bool) -> None:
        self._form, self._pairs, self._text = form, _Pairs(schema), ""
        tag = form.closing.strip()
        self._end, self._spaces = (form.closing.rstrip(), "") if held else (tag, form.closing.partition(tag)[0])
        self._new_line = form.middle.endswith("\n")
        self._begins = re.compile(
            rf"{re.escape(form.opening)}([^<>\n]{{1,{_LONGEST_NAME}}}?){re.escape(form.middle.rstrip())}"
        )
        self._name: str | None = None  # of the parameter whose value comes
        self._in_pieces = False  # its text is given on as it comes, and has begun

    def add(self, text: str) -> Piece:
        """As `JSONReader.add`."""
        self._text += text
        said = ""
        while True:
            if self._name is None:
                ahead, opening = self._text.lstrip(), self._form.opening
                if opening.startswith(ahead):
                    return said, None
                if not ahead.startswith(opening):
                    return said + self._pairs.end(), self._text
                found = self._begins.match(ahead)
                if found is None:
                    if len(ahead) > _LONGEST_NAME + len(opening + self._form.middle):
                        raise ValueError("a parameter without its name")
                    return said, None
                if found.end() == len(ahead) and self._new_line:
                    return said, None
                behind = ahead[found.end() :]
                self._name, self._text = found[1], behind.removeprefix("\n") if self._new_line else behind
            at = self._text.find(self._end)
            if at < 0:
                said += self._piece()
                return said, None
            value, self._text = self._text[:at].removesuffix(self._spaces), self._text[at + len(self._end) :]
            if self._in_pieces:
                said += _inner(value) + '"'
            else:
                said += self._pairs.add(self._name, _tagged_value(value, self._pairs.types(self._name)))
            self._name, self._in_pieces = None, False

    def _piece(self) -> str:
        """Returns what of a text is no part of its end, whatever comes; nothing of other values."""
        assert self._name is not None
        if not self._in_pieces:
            if self._pairs.has(self._name) or self._pairs.types(self._name) != {"string"}:
                return ""
            begun = self._pairs.begin(self._name) + '"'
        else:
            begun = ""
        self._in_pieces = True
        kept = overlap(self._text, self._spaces + self._end)
        piece, self._text = self._text[: len(self._text) - kept], self._text[len(self._text) - kept :]
        return begun + _inner(piece)


def _tagged_value(written: str, types: frozenset[str]) -> Any:
    """Returns the value that a text means by the types of its schema: itself, where no other can be read from it."""
    if types != {"string"}:
        try:
            value = _literal(written)
        except ValueError:
            return written
        if not isinstance(value, str) and _fits(value, types):
            return value
    return written


ArgumentReader = JSONReader | KeywordReader | TagReader


class _Pairs:
    """Writes the members of a JSON object as they come. Of a name that comes twice the first counts."""

    def __init__(self, schema: Schema) -> None:
        self._schema, self._names = schema, set[str]()

    def types(self, name: str) -> frozenset[str]:
        """Returns the JSON types that the schema has for a parameter."""
        properties = _mapping(self._schema.get("properties"))
        found = properties.get(name, self._schema.get("additionalProperties"))
        return _types({**_shared(self._schema), **_mapping(found)})

    def has(self, name: str) -> bool:
        return name in self._names

    def begin(self, name: str) -> str:
        mark = ", " if self._names else "{"
        self._names.add(name)
        return f"{mark}{json_text(name)}: "

    def add(self, name: str, value: Any) -> str:
        return "" if name in self._names else self.begin(name) + json_text(value)

    def end(self) -> str:
        return "}" if self._names else "{}"


def json_text(value: Any) -> str:
    """Returns a value as JSON. Raises ValueError for what JSON has no number for."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(value) if re.search("[\ud800-\udfff]", text) else text  # half a character goes by its escape


def _inner(text: str) -> str:
    return json_text(text)[1:-1]


_TOKEN = re.compile(r""""((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|([A-Za-z_]\w*)|([()"'])|,(?=\s*[\])}])""", re.DOTALL)
_ESCAPE = re.compile(r'\\(?:(["\\/bfnrt]|u[0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))|(["\x00-\x1f])', re.DOTALL)
_WORDS = {"true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null"}


def _literal(written: str) -> Any:
    """Returns the value of a literal as Python or JSON writes it, a tuple as a list.

    Raises:
        ValueError: it is none, or none that a program could handle.
    """

    def escape(found: re.Match[str]) -> str:
        kept, code, other, plain = found.groups()
        if kept or plain:
            return found[0] if kept else json.dumps(plain)[1:-1]
        return f"\\u00{code}" if code else other if other == "'" else "\\\\" + json.dumps(other)[1:-1]

    def as_json(found: re.Match[str]) -> str:
        double, single, word, bracket = found.groups()
        if word is not None:
            return _WORDS.get(word, word)
        if bracket is not None:
            return {"(": "[", ")": "]"}[bracket]  # KeyError: a quote that is not closed
        text = single if double is None else double
        return "" if text is None else f'"{_ESCAPE.sub(escape, text)}"'

    try:
        text = _TOKEN.sub(as_json, written)
    except KeyError:
        raise ValueError("a quote is not closed") from None
    return load_json(text, DECODER)


def _bounded(number: str) -> float:
    """Returns a number, the largest of floats for one beyond them."""
    return max(-sys.float_info.max, min(sys.float_info.max, float(number)))


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


# Of values that can be written as JSON again, whatever number a model writes.
DECODER = json.JSONDecoder(
    parse_float=_bounded,
    parse_int=lambda digits: int(digits) if len(digits) <= _MOST_DIGITS else _bounded(digits),
    parse_constant=_no_number,
)


def _kind(value: Any) -> str:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    return kinds.get(type(value), "null")


def _fits(value: Any, types: frozenset[str]) -> bool:
    kind = _kind(value)
    return kind in types or (kind == "integer" and "number" in types)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shared(schema: Schema) -> Schema:
    """Returns what references within a schema lead to."""
    return {key: schema[key] for key in _DEFINITIONS & schema.keys()}


def _resolved(schema: Schema) -> Schema:
    """Returns a schema in place of a reference to one of its definitions; any value, where there is no such."""
    for _ in range(20):
        if "$ref" not in schema:
            return schema
        found = re.fullmatch(r"#/(\$defs|definitions)/([^/~%]+)", str(schema["$ref"]))
        there = _mapping(_mapping(schema.get(found[1])).get(found[2])) if found else {}
        schema = {**{key: value for key, value in schema.items() if key != "$ref"}, **there}
    return {}


def _types(schema: Schema, inner: bool = False) -> frozenset[str]:
    """Returns the JSON types that a schema allows, as far as it says so at its top."""
    schema = _resolved(schema)
    if (words := _words(schema)) is not None:
        return frozenset(map(_kind, words))
    said = schema.get("type")
    if isinstance(said, (str, list)):
        return frozenset([said] if isinstance(said, str) else map(str, said))
    branches = schema.get("anyOf", schema.get("oneOf"))
    if inner or not isinstance(branches, list) or not 0 < len(branches) <= _MOST_BRANCHES:
        return _TYPES
    return frozenset().union(*(_types({**_shared(schema), **_mapping(each)}, inner=True) for each in branches))


def _words(schema: Schema) -> list[Any] | None:
    """Returns the values that a schema names; None where it names none."""
    words = [schema["const"]] if "const" in schema else schema.get("enum")
    return words if isinstance(words, list) and words else None


def _count(schema: Schema) -> str:
    """Returns the length of a schema's texts as regular expressions have it."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    for value in (least, most):
        if value != "" and (not isinstance(value, int) or value < 0):
            raise InputError(f"the schema has the length {short(value)}: a whole number is needed")
    return f"{{{least},{most}}}" if least or most != "" else "*"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Lark quotes as JSON


def _parameters(schema: Schema, names: str) -> tuple[list[tuple[str, Schema, bool]], Schema | None]:
    """Returns parameters, each its name, schema and whether it is required; or the schema of any that are free.

    Args:
        names: a regular expression of those that can be written.

    Raises:
        InputError: the schema says more of its object than its properties, or has a name that cannot be written.
    """
    if unknown := sorted(schema.keys() - _OF_OBJECT):
        raise InputError(
            f"cannot hold to the schema: {unknown[0]} of all arguments: not supported in this model's calls"
        )
    others = schema.get("additionalProperties", True)
    properties, required = _mapping(schema.get("properties")), schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise InputError(f"the schema: required is {short(required)}: a list of names is needed")
    definitions, repeated = _shared(schema), 0

    def alone(value: Any) -> Schema:
        """Returns the schema of a property as one that stands by itself."""
        nonlocal repeated
        if value is not True and not isinstance(value, Mapping):
            raise InputError(f"the schema of a parameter is {short(value)}: an object is needed")
        text = json.dumps(value)
        if '"$ref"' not in text:
            return _mapping(value)
        text += json.dumps(definitions)
        if re.search(r'"\$ref": "(?!#/\$defs/|#/definitions/)', text):
            raise InputError(
                "cannot hold to the schema: a $ref to anything but $defs: not supported in this model's calls"
            )
        repeated += len(text)
        if repeated > MAX_SCHEMA:
            raise InputError("the schema's $defs are too large: each parameter that refers to them has them again")
        return {**_mapping(value), **definitions}

    if not properties and not required and others is not False:
        return [], alone(others)
    keys = dict.fromkeys((*properties, *required))
    if bad := next((key for key in keys if not re.fullmatch(names, key) or len(key) > _LONGEST_NAME), None):
        raise InputError(f"the parameter {short(bad)} cannot be written in this model's calls")
    return [(key, alone(properties.get(key, others)), key in required) for key in keys], None
