"""Grammars: an answer satisfies its schema, by the judgement of jsonschema; hostile schemas; llguidance's limits."""

from __future__ import annotations

import json
import math
import queue
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import other_models
import pytest
import tiny
from jsonschema import Draft202012Validator

from elm_mlx import stream_generate
from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference import grammar as grammars
from elm_mlx.inference import grammar_worker
from elm_mlx.inference.engine import Engine
from elm_mlx.inference.grammar import Grammar, GrammarCompiler
from elm_mlx.inference.requests import Failed, Generated, Request
from elm_mlx.inference.sampling import Sampler
from elm_mlx.store.loading import Loaded
from elm_mlx.text.tokenizer import Tokenizer

Schema = dict[str, Any]

PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "größe": {"type": ["number", "null"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b c", "é"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE: Schema = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["value"],
            "additionalProperties": False,
        }
    },
}
# Schema, values that satisfy it, values that do not.
CASES: dict[str, tuple[Schema, list[Any], list[Any]]] = {
    "nested": (
        {"type": "object", "properties": {"one": PERSON}, "required": ["one"]},
        [{"one": {"name": "Zoë 🦜", "age": 3, "größe": 1.5, "tags": ["é", "a"]}}, {"one": {"name": "x", "age": 120}}],
        [{"one": {"name": "", "age": 3}}, {"one": {"name": "x", "age": 121}}, {"one": {"name": "x"}}, {}],
    ),
    "optional and closed": (PERSON, [{"name": "\"\\\n", "age": 0}], [{"name": "x", "age": 1, "more": 1}, [], "x"]),
    "free names": (
        {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
        [{}, {"a": 1}, {"b c": -3, "日本": 0}],
        [{"a": "b"}, {"a": 1, "b": 2, "c": 3}],
    ),
    "names by pattern": (
        {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}}, "additionalProperties": False},
        [{"x1": True}, {}],
        [{"y1": True}, {"x1": 3}],
    ),
    "array": (
        {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 3},
        [["a"], ["abc", "", "日本語"]],
        [[], ["abcd"], ["a"] * 4, [1]],
    ),
    "tuple": (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "items": False, "minItems": 2},
        [[3, "x"]],
        [[3], [3, "y"], [3, "x", 1]],
    ),
    "enum": ({"enum": ["a\"b", 3, None, {"k": [1]}]}, ["a\"b", 3, None, {"k": [1]}], ["a", 4, {}]),
    "number": (
        {"type": "number", "exclusiveMinimum": -1.5, "maximum": 20},
        [-1.25, 0, 20, 3.75],
        [-1.5, -2, 20.5, 21, "3"],
    ),
    "multiple": ({"type": "integer", "multipleOf": 7, "minimum": 0}, [0, 7, 70], [1, 8, -7]),
    "pattern": ({"type": "string", "pattern": "^[A-Z]{2}-\\d+$"}, ["AB-1", "XY-123"], ["A-1", "AB-", "xAB-1", 3]),
    "unanchored": ({"type": "string", "pattern": "b+c"}, ["bc", "abbcd"], ["b", "cb"]),
    "reference": (TREE, [{"value": 1, "next": {"value": 2, "next": {"value": 3}}}], [{"value": 1, "next": {}}]),
    "any of": (
        {"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"t": {"const": 1}}, "required": ["t"]}]},
        [5, {"t": 1}],
        ["5", {"t": 2}, {}],
    ),
    "one of": (
        {"oneOf": [
            {"type": "object", "properties": {"k": {"const": kind}, "v": of}, "required": ["k", "v"]}
            for kind, of in (("int", {"type": "integer"}), ("text", {"type": "string"}))
        ]},
        [{"k": "int", "v": 3}, {"k": "text", "v": "3"}],
        [{"k": "int", "v": "3"}, {"k": "other", "v": 3}],
    ),
    "all of": (
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]}, [3, 9], [2, 10],
    ),
    "format": ({"type": "string", "format": "date"}, ["2024-02-29"], ["2024-13-01"]),
    "anything": ({}, [None, [1, {"a": "b"}], "x", -2.5e-3], []),
}  # fmt: skip
HOSTILE: dict[str, Schema] = {
    "counts in counts": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "many counts": {"anyOf": [{"type": "string", "pattern": f"^{i}[a-z]{{999}}$"} for i in range(99)]},
    "names by counts": {"type": "object", "patternProperties": {"^(.{100}){1000}$": {}}},
    "product of choices": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"{i} {j}": {"const": j}}} for j in range(8)]}
            for i in range(8)
        ]
    },
    "itself": {"$ref": "#"},
    "itself and more": {"allOf": [{"$ref": "#"}, {"type": "object"}]},
    "large": {"enum": [f"value {i}" for i in range(20_000)]},
    "wide": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    "prime": {"multipleOf": 982_451_653},
    "product of primes": {"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 1009}]},
}


@pytest.fixture(scope="module", params=["sentencepiece", *other_models.TEMPLATES])
def tokenizer(
    request: pytest.FixtureRequest, tiny_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "sentencepiece":
        return Tokenizer.load(tiny_tokenizer_file)
    folder = tmp_path_factory.mktemp("bpe")
    other_models.write_tokenizer(folder, request.param)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def allowed(state: grammars.GrammarState) -> list[int]:
    bias = state.bias()
    assert bias.dtype == mx.float32
    values = bias.tolist()
    assert set(values) <= {0.0, -float("inf")}
    return [token for token, value in enumerate(values) if value == 0]


def takes(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether allowed tokens spell `text`, and then may end."""
    state, left = grammar.start(), text.encode()
    while left:
        fitting = [token for token in allowed(state) if left.startswith(tokenizer.bytes_of(token) or b"\0")]
        if not fitting:
            return False
        token = max(fitting, key=lambda token: len(tokenizer.bytes_of(token)))
        left = left[len(tokenizer.bytes_of(token)) :]
        state.accept(token)
    return not {*tokenizer.eos_ids}.isdisjoint(allowed(state))


def walk(grammar: Grammar, tokenizer: Tokenizer, draw: random.Random, most: int = 200) -> str | None:
    """Returns a text of allowed tokens, drawn at random; None for one that does not end within `most`."""
    state, decoder, text = grammar.start(), tokenizer.detokenizer([tokenizer.encode("\n")[0]]), ""
    closing = {token for token in range(tokenizer.vocab_size) if tokenizer.bytes_of(token)[:1] in (b'"', b"}", b"]")}
    for _ in range(most):
        tokens = allowed(state)
        if not {*tokenizer.eos_ids}.isdisjoint(tokens) and (len(tokens) == 1 or draw.random() < 0.5):
            return text + decoder.finish()
        assert not (state.finished and {*tokens} - {*tokenizer.eos_ids})
        inner = [token for token in tokens if token not in tokenizer.eos_ids]
        ends = [token for token in inner if token in closing]
        token = draw.choice(ends if ends and draw.random() < 0.5 else inner)
        state.accept(token)
        text += decoder.add(token)
    return None


@pytest.mark.parametrize("name", CASES)
def test_what_satisfies_a_schema_can_be_written_and_nothing_else(
    name: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    schema, good, bad = CASES[name]
    judge, grammar = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER), None
    grammar = compiler.json_schema(schema)
    for value in good:
        for spaced in ({}, {"separators": (",", ":")}, {"indent": 2}):
            text = json.dumps(value, ensure_ascii=False, **spaced)
            assert judge.is_valid(value) and takes(grammar, tokenizer, text), text
    for value in bad:
        assert not judge.is_valid(value) and not takes(grammar, tokenizer, json.dumps(value, ensure_ascii=False)), value


@pytest.mark.parametrize("name", CASES)
def test_whatever_is_written_satisfies_the_schema(name: str, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema, draw = CASES[name][0], random.Random(name)
    grammar = compiler.json_schema(schema)
    texts = [text for _ in range(6) if (text := walk(grammar, tokenizer, draw)) is not None]
    assert texts or name == "unanchored"  # which chance does not come to
    for text in texts:
        Draft202012Validator(schema).validate(json.loads(text))


def drawn(draw: random.Random, depth: int = 0) -> tuple[Schema, Callable[[], Any]]:
    """Returns a random schema, and what draws values that mostly satisfy it."""
    leaves: list[tuple[Schema, Callable[[], Any]]] = [
        ({"type": "string", "maxLength": 4}, lambda: 'aé"\n日'[: draw.randint(0, 5)]),
        ({"type": "integer", "minimum": -3, "maximum": 40}, lambda: draw.randint(-4, 41)),
        ({"type": "number", "exclusiveMaximum": 2.5}, lambda: draw.choice([-1.25, 0, 2.25, 2.5, 3])),
        ({"type": "boolean"}, lambda: draw.choice([True, False, None])),
        ({"enum": ["x", 1, None]}, lambda: draw.choice(["x", 1, None, "y"])),
        ({"type": "string", "pattern": "^[ab]+$"}, lambda: draw.choice(["a", "ba", "", "c"])),
    ]
    kind = draw.randint(0, 5 if depth == 3 else 8)
    if kind < 6:
        return leaves[kind]
    if kind == 6:
        items, value = drawn(draw, depth + 1)
        schema: Schema = {"type": "array", "items": items, "minItems": draw.randint(0, 1), "maxItems": 2}
        return schema, lambda: [value() for _ in range(draw.randint(0, 3))]
    if kind == 7:
        inner = [drawn(draw, depth + 1) for _ in range(2)]
        return {"anyOf": [schema for schema, _ in inner]}, lambda: draw.choice(inner)[1]()
    fields = {name: drawn(draw, depth + 1) for name in draw.sample(["a", "b c", "ü", 'd"', "e"], draw.randint(1, 3))}
    schema = {
        "type": "object",
        "properties": {name: schema for name, (schema, _) in fields.items()},
        "required": [name for name in fields if draw.random() < 0.5],
        "additionalProperties": False,
    }
    return schema, lambda: {name: value() for name, (_, value) in fields.items() if draw.random() < 0.8}


@pytest.mark.parametrize("seed", range(12))
def test_random_values_can_be_written_where_they_satisfy_a_random_schema(
    seed: int, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    draw = random.Random(seed)
    schema, value = drawn(draw)
    grammar, judge = compiler.json_schema(schema), Draft202012Validator(schema)
    for _ in range(6):
        one = value()
        text = json.dumps(one, ensure_ascii=False)
        assert takes(grammar, tokenizer, text) == judge.is_valid(one), (schema, text)
    if (written := walk(grammar, tokenizer, draw)) is not None:
        judge.validate(json.loads(written))


def test_any_object_and_nothing_else(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiler.json_object()
    assert takes(grammar, tokenizer, '{"a": [1, {"b": null}], "</s>": "<|im_end|>"}')
    for text in ("[]", "3", '{"a": }', ' {"a": 1}', '{"a": 1} ', "{'a': 1}", '{"a": 1,}', '{"a": "\\ud800"}'):
        assert not takes(grammar, tokenizer, text), text


def test_white_space_has_an_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiler.json_object()
    assert takes(grammar, tokenizer, '{\n    "a": 1\n}') and takes(grammar, tokenizer, '{ "a" : 1 }')
    for text in ('{\n\n"a": 1}', '{  "a": 1}', '{"a":\t1}', "{\n" + 17 * " " + '"a": 1}'):
        assert not takes(grammar, tokenizer, text), text


def test_a_text_ends_by_any_of_its_end_tokens(tiny_tokenizer: Tokenizer) -> None:
    state = GrammarCompiler(tiny_tokenizer, end_ids=(7, 9, 100_000)).json_schema({"const": 1}).start()
    assert {7, 9}.isdisjoint(allowed(state)) and not state.finished
    state.accept(*[token for token in allowed(state) if tiny_tokenizer.bytes_of(token) == b"1"])
    assert {*allowed(state)} == {7, 9, *tiny_tokenizer.eos_ids} and state.finished
    state.accept(9)
    assert {*allowed(state)} == {7, 9, *tiny_tokenizer.eos_ids} and state.finished


def test_the_bias_has_the_models_width(tiny_tokenizer_file: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer_file)
    whole = GrammarCompiler(tokenizer).json_object().start().bias()
    assert whole.shape == (tokenizer.vocab_size,)
    tokenizer.rows = tokenizer.vocab_size + 24
    wider = GrammarCompiler(tokenizer).json_object().start().bias()
    assert wider.shape == (tokenizer.rows,) and mx.array_equal(wider[:-24], whole)
    assert wider[-24:].tolist() == [-float("inf")] * 24
    tokenizer.rows = 300
    assert mx.array_equal(GrammarCompiler(tokenizer).json_object().start().bias(), whole[:300])


def test_a_random_model_answers_by_the_schema(tiny_tokenizer_file: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer_file)
    model = tiny.random_model(tiny.scaled_config(tokenizer.vocab_size + 8))
    tokenizer.rows = model.config.vocab_size
    grammar, reasons = GrammarCompiler(tokenizer).json_schema(PERSON), []
    for seed in range(8):
        options: dict[str, Any] = {"temp": 1.0, "seed": seed, "repetition_penalty": 1.3} if seed else {}
        answer = [*stream_generate(
            model, tokenizer, "Who?", max_tokens=120, logits_processors=[grammar.start()], **options
        )]  # fmt: skip
        reasons.append(answer[-1].finish_reason)
        if reasons[-1] == "stop":
            Draft202012Validator(PERSON).validate(json.loads("".join(response.text for response in answer)))
    assert {*reasons} <= {"stop", "length"} and "stop" in reasons


def test_answers_of_an_engine_are_held_each_to_its_own(tiny_tokenizer_file: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer_file)
    model = tiny.random_model(tiny.scaled_config(tokenizer.vocab_size + 8))
    tokenizer.rows = model.config.vocab_size
    compiler, events = GrammarCompiler(tokenizer), queue.Queue[tuple[int, Any]]()
    schemas: list[Schema | None] = [PERSON, None, CASES["array"][0], {"enum": ["yes", "no"]}]
    ids, texts = tokenizer.encode("Who?"), [""] * 4
    engine = Engine({"tiny": Loaded(model, tokenizer, "float32", ())}, max_memory=1 << 34, prefix_bytes=1 << 20)
    try:
        for row, schema in enumerate(schemas):
            held = None if schema is None else compiler.json_schema(schema)
            sampler = Sampler(temp=1.0)
            request = Request("tiny", tuple(ids), 80, sampler, seed=row, stop_ids=tokenizer.eos_ids, grammar=held)
            engine.submit(request, lambda event, row=row: events.put((row, event)))  # type: ignore[misc]
        reasons: dict[int, str] = {}
        while len(reasons) < len(schemas):
            row, event = events.get(timeout=60)
            assert not isinstance(event, Failed), event.error
            if isinstance(event, Generated):
                texts[row] += event.text
                reasons |= {row: event.finish_reason} if event.finish_reason else {}
    finally:
        engine.close(1)
    for row, schema in enumerate(schemas):
        state = [] if schema is None else [compiler.json_schema(schema).start()]
        options: dict[str, Any] = {"temp": 1.0, "seed": row, "logits_processors": state, "stop_ids": tokenizer.eos_ids}
        assert texts[row] == "".join(
            each.text for each in stream_generate(model, tokenizer, ids, max_tokens=80, **options)
        )
        if schema is not None and reasons[row] == "stop":
            Draft202012Validator(schema).validate(json.loads(texts[row]))
    assert reasons[3] == "stop"


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, '"not"'),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, '"uniqueItems"'),
        ({"if": {}, "then": {"minLength": 3}}, '"if", "then"'),
        ({"type": "array", "contains": {"type": "integer"}}, '"contains"'),
        ({"type": "string", "format": "tomorrow"}, "tomorrow"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-ahead"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "http://localhost:1/schema"}, "http://localhost:1/schema"),
        ({"$ref": "file:///etc/passwd"}, "file:///etc/passwd"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        ({"type": "thing"}, "thing"),
        ({"enum": []}, "Unsatisfiable"),
        ({"enum": [1, -(1 << 63)]}, "-9.22337e+18"),
        ({"items": {"minimum": 7 - (1 << 63), "maximum": 9 - (1 << 63)}}, "-9.22337e+18"),
        ({"const": float("nan")}, "not JSON compliant"),
        ({"const": "\ud800"}, "hex escape"),
    ],
)
def test_what_is_not_supported_is_named(schema: Schema, named: str, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError) as error:
        GrammarCompiler(tiny_tokenizer).json_schema(schema)
    assert named in str(error.value) and "\n" not in str(error.value) and "start:" not in str(error.value)


def test_a_schema_is_an_object_of_bounded_depth(tiny_tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tiny_tokenizer)
    deep: Schema = {}
    for _ in range(300):
        deep = {"items": deep}
    for schema in (True, None, 3, [], "{}", deep):
        with pytest.raises(InputError, match="the schema"):
            compiler.json_schema(schema)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_in_bounded_time(name: str, tiny_tokenizer: Tokenizer) -> None:
    start = time.process_time()
    with pytest.raises(InputError):
        GrammarCompiler(tiny_tokenizer).json_schema(HOSTILE[name])
    assert time.process_time() - start < 3


@pytest.mark.parametrize("keyword", ["$ref", "allOf", "items"])
def test_references_lead_as_deep_as_they_may(keyword: str, tiny_tokenizer: Tokenizer) -> None:
    """Each is a call within a call to llguidance, and an overflow of the stack would end the process."""

    def to(number: int) -> Schema:
        there = {"$ref": f"#/$defs/d{number}"}
        return {"$ref": there, "allOf": {"allOf": [there]}, "items": {"type": "array", "items": there}}[keyword]

    defs = {f"d{number}": to(number + 1) for number in range(1500)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**defs, "d1500": {"const": 1}}}
    grammar = GrammarCompiler(tiny_tokenizer).json_schema(schema)
    assert takes(grammar, tiny_tokenizer, "[]" if keyword == "items" else "1")


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_a_text_may_be_nested_as_deep_as_it_is_long(opening: str, closing: str, tiny_tokenizer: Tokenizer) -> None:
    """With the stack that a schema is tried with, a thirty-second of what a server's threads have."""
    nested = {"type": "array", "items": {"$ref": "#"}}
    within: Schema = {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}
    grammar = GrammarCompiler(tiny_tokenizer).json_schema({"anyOf": [nested, within, {"type": "null"}]})
    text = opening * 10_000 + "null" + closing * 10_000
    tokens = tiny_tokenizer.encode_amid(text)

    def write() -> bool:
        state = grammar.start()
        for number, token in enumerate(tokens):
            if number % 500 == 0:
                assert state.bias()[token].item() == 0
            state.accept(token)
        return state.finished

    assert grammar_worker._on_stack(grammar_worker.TEXT_STACK, write)


def test_what_crashes_or_never_ends_is_an_error_and_the_next_grammar_is_compiled(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that are known, once nothing looks for them before they are compiled."""
    compiler = GrammarCompiler(tiny_tokenizer)
    monkeypatch.setattr(grammars, "_LEAST", -math.inf)
    monkeypatch.setattr(grammars, "_MAX_MULTIPLE", math.inf)
    for schema, why in (({"enum": [-(1 << 63)]}, "ends the process"), ({"multipleOf": 7919 * 7907}, "more than 2 s")):
        with pytest.raises(InputError, match=why):
            compiler.json_schema(schema)
        started = time.monotonic()
        with pytest.raises(InputError, match=why):
            compiler.json_schema(schema)
        assert time.monotonic() - started < 1  # it is not tried again
        assert compiler.json_object()


def test_the_process_that_tries_grammars_may_end(tiny_tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tiny_tokenizer)
    compiler.json_schema({"const": "a"})
    process = grammars._trials._process
    assert process is not None
    process.kill()
    process.wait()
    compiler.json_schema({"const": "b"})
    with pytest.raises(InputError, match='"not"'):
        compiler.check('start: %json {"not": {}}')


def test_grammars_are_kept_and_few(tiny_tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tiny_tokenizer)
    first = compiler.json_object()
    assert compiler.json_object() is first
    for number in range(2, grammars._MAX_CACHED + 1):
        compiler.json_schema({"const": number})
    assert compiler.json_object() is first
    compiler.json_schema({"const": 0})
    compiler.json_schema({"const": 1})
    assert compiler.json_object() is first and len(compiler._grammars) == grammars._MAX_CACHED


def test_what_other_texts_left_in_the_lexer_ends_no_text(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of one grammar share its automaton, which is built as they go, and may grow to a limit."""
    monkeypatch.setattr(grammar_worker, "MAX_LEXER_STATES", 3000)
    draw, anew = random.Random(0), []
    grammar = GrammarCompiler(tiny_tokenizer).json_schema({"type": "string", "pattern": "^[ab]*a[ab]{30}$"})
    compile_anew = grammar._compile
    monkeypatch.setattr(grammar, "_compile", lambda: anew.append(1) or compile_anew())
    for _ in range(30):
        text = json.dumps("".join(draw.choices("ab", k=60)) + "a" + "".join(draw.choices("ab", k=30)))
        assert takes(grammar, tiny_tokenizer, text)
    assert anew


def test_a_text_that_takes_too_much_ends_in_an_error(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_worker, "MAX_LEXER_STATES", 1000)
    grammar = GrammarCompiler(tiny_tokenizer).json_schema({"type": "string", "pattern": "^[ab]*a[ab]{200}$"})
    draw = random.Random(0)
    with pytest.raises(ElmError, match=r"cannot hold to the schema after \d+ tokens: lexer error"):
        takes(grammar, tiny_tokenizer, json.dumps("".join(draw.choices("ab", k=2000))))


class PanicException(BaseException):  # as pyo3 calls it
    pass


def test_a_panic_of_native_code_ends_one_text(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panicking:
        def compute_logit_bias(self) -> bytes:
            raise PanicException("index out of bounds")

        def consume_token(self, token: int) -> None:
            raise PanicException("index out of bounds")

    state = GrammarCompiler(tiny_tokenizer).json_object().start()
    monkeypatch.setattr(state, "_matcher", Panicking())
    for act in (state.bias, lambda: state.accept(5)):
        with pytest.raises(InputError, match="index out of bounds"):
            act()


def test_a_token_that_may_not_follow_is_an_error(tiny_tokenizer: Tokenizer) -> None:
    state = GrammarCompiler(tiny_tokenizer).json_object().start()
    wrong = next(token for token in range(10, 300) if token not in allowed(state))
    with pytest.raises(ElmError, match="after 0 tokens"):
        state.accept(wrong)


def test_llguidance_is_asked_for_by_name(tiny_tokenizer: Tokenizer, without: Callable[[str], None]) -> None:
    without("llguidance")
    with pytest.raises(ElmError, match=r"pip install 'elm-mlx\[grammar\]'"):
        GrammarCompiler(tiny_tokenizer).json_object()
