"""Grammars: an answer is the JSON, or the tool call, that was asked for, because nothing else may be sampled.

llguidance compiles a JSON schema or a Lark grammar for one tokenizer, and says after each token which may follow. It is
the extra `grammar`, and imported where a grammar is first compiled. A schema comes from anywhere: its size, the time
and the memory that it may take have limits, and what is not supported of JSON Schema is an error that names it.

Between two tokens of JSON a grammar allows a space, or a new line and its indentation: small models are used to write
either, and could go on with white space without end.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from elm_mlx.errors import ElmError, InputError
from elm_mlx.reading import check_depth, printable
from elm_mlx.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA = 100_000  # characters of a schema as JSON
_MAX_CACHED = 16  # compiled grammars of one tokenizer, each of at most a few dozen megabytes
_SPACING = {"whitespace_pattern": r" |\n {0,16}"}  # once, wherever JSON may have white space
# llguidance's own limits leave a hostile schema seconds, of one token even, and hundreds of megabytes.
_MAX_LEXER_STATES, _MAX_GRAMMAR_SIZE = 50_000, 50_000
_MAX_PATTERNS = 10_000  # characters that a schema's patterns match, with what they count up to
_STACK = 256 << 20  # bytes, of which only those are taken that are touched: 10 KB for each of up to 5,000 references
_LEAST = -9e18  # llguidance ends the process at whole numbers near to the least of 64 bits
_MAX_MULTIPLE = 10_000  # of all that numbers are to be multiples of: an automaton has a state for each remainder


_stack_lock = threading.Lock()


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the last few. Any thread may.

    Args:
        end_ids: tokens that end a text beside the tokenizer's, such as a chat template's.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._end_ids = tuple(dict.fromkeys((*tokenizer.eos_ids, *end_ids)))
        self._grammars: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()  # one at a time, for the sake of memory

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """Returns the grammar of the JSON texts that satisfy `schema` (draft 2020-12).

        Raises:
            InputError: `schema` is none, is too large or too deep, allows nothing, or uses what is not supported.
            ElmError: llguidance is not installed.
        """
        return self.lark(f"start: %json {schema_text(schema)}")

    def json_object(self) -> Grammar:
        """Returns the grammar of any JSON object. Raises ElmError where llguidance is not installed."""
        return self.json_schema({"type": "object"})

    def lark(self, text: str) -> Grammar:
        """Returns the grammar of a text in llguidance's variant of Lark, which takes `%json` and `schema_text`.

        Raises:
            InputError: it is none, or takes too much time or memory.
            ElmError: llguidance is not installed.
        """
        with self._lock:
            grammar = self._grammars.get(text)
            if grammar is None:
                grammar = self._grammars[text] = Grammar(self, text)
                if len(self._grammars) > _MAX_CACHED:
                    self._grammars.popitem(last=False)
            self._grammars.move_to_end(text)
        return grammar

    @property
    def rows(self) -> int:
        """The number of the model's tokens, where it is known: else of the tokenizer's."""
        return self._tokenizer.rows or self._tokenizer.vocab_size

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        """The tokenizer as llguidance takes it. Raises ElmError where that is not installed."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise ElmError("structured output needs llguidance: pip install 'elm-mlx[grammar]'") from None
        tokens = _Tokens(self._tokenizer, self._end_ids)
        ends = [token for token in self._end_ids if token < len(tokens.tokens)]
        return LLTokenizer(TokenizerWrapper(tokens), eos_token=ends or None)


class Grammar:
    """A compiled grammar. Made by `GrammarCompiler`."""

    def __init__(self, compiler: GrammarCompiler, text: str) -> None:
        self.rows = compiler.rows
        self._vocabulary, self._text = compiler.vocabulary, text
        self._matcher = self._compile()
        probe = self._matcher.deep_copy()  # only the first tokens show that some are too large, or allow nothing
        for _ in range(2):
            probe.consume_token(next((i for i, allowed in enumerate(probe.compute_logit_bias()) if allowed), 0))
        self._check(probe)

    def start(self) -> GrammarState:
        """Returns the state before the first token of a text."""
        return GrammarState(self)

    def _compile(self) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES, max_grammar_size=_MAX_GRAMMAR_SIZE, verbose_errors=False
        )
        matcher = _deep(lambda: LLMatcher(self._vocabulary, self._text, limits=limits, log_level=0))
        self._check(matcher)
        return matcher

    def _check(self, matcher: LLMatcher) -> None:
        if matcher.is_error():
            raise InputError(f"cannot hold to the schema: {_reason(matcher)}")

    def matcher(self, tokens: Sequence[int] = (), anew: bool = False) -> LLMatcher:
        """Returns a matcher that has taken `tokens`.

        Copies share the states of their lexer, which grow with what is written, up to a limit: `anew` begins without.
        """
        if anew:
            self._matcher = self._compile()
        matcher = self._matcher.deep_copy()
        matcher.consume_tokens(list(tokens))
        return matcher


class GrammarState:
    """The state of one text in its grammar. Made by `Grammar.start`, for one text each.

    It is a logits processor, too: `stream_generate(…, logits_processors=[grammar.start()])`.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar, self._matcher = grammar, grammar.matcher()
        self._tokens: list[int] = []
        self._read = 0  # tokens that a processor has seen, the prompt's included

    @property
    def finished(self) -> bool:
        """True where only an end token may follow."""
        return self._matcher.is_stopped()

    def bias(self) -> mx.array:
        """Returns what to add to the logits of the next token: `(vocab,)`, float32, 0 or -inf.

        Raises:
            InputError: the grammar takes more than it may at this point of the text.
        """
        mask = self._matcher.compute_logit_bias()  # a byte a token, 0 for those that may not follow
        if self._failed():
            mask = self._matcher.compute_logit_bias()
            self._check()
        rows = self._grammar.rows
        bias = mx.where(mx.array(memoryview(mask)[:rows]) > 0, 0.0, -mx.inf)
        return bias if len(mask) >= rows else mx.pad(bias, (0, rows - len(mask)), constant_values=-mx.inf)

    def accept(self, token: int) -> None:
        """Takes the next token. Raises InputError for one that the grammar does not allow, or as `bias`."""
        self._matcher.consume_token(token)
        if self._failed():
            self._matcher.consume_token(token)
            self._check()
        self._tokens.append(token)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Takes those of `tokens` `(n,)` that are new since the first call, and adds the bias to `logits`."""
        if self._read:
            for token in tokens[self._read :].tolist():
                self.accept(token)
        self._read = tokens.size
        return logits + self.bias()

    def _failed(self) -> bool:
        """Returns True after an error. One of a lexer that other texts have filled is then mended, once."""
        if not self._matcher.is_error():
            return False
        if self._matcher.get_error().startswith("lexer"):
            self._matcher = self._grammar.matcher(self._tokens, anew=True)
        return True

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"cannot hold to the schema after {len(self._tokens)} tokens: {_reason(self._matcher)}")


class _Tokens:
    """A tokenizer as llguidance's TokenizerWrapper takes it: every token's bytes, and text to tokens."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        special = {
            *tokenizer.control_ids.values(),
            *end_ids,
            *(() if tokenizer.unk_id is None else (tokenizer.unk_id,)),
        }
        self.special_token_ids = sorted(token for token in special if token < tokenizer.vocab_size)
        self.tokens = [
            (tokenizer.piece_of(token).encode() if token in special else tokenizer.bytes_of(token))
            for token in range(tokenizer.vocab_size)
        ]
        self._id_of = {content: token for token, content in enumerate(self.tokens) if content and token not in special}
        self._longest = max(map(len, self._id_of), default=0)
        self.eos_token_id = next((token for token in end_ids if token < len(self.tokens)), None)
        self.bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        """Returns the tokens that a model would write `text` by, within a text. May not raise: the caller is Rust."""
        try:
            ids = self._tokenizer.encode_amid(text.decode())
        except InputError:  # a token that the model has no row for
            ids = []
        return ids if b"".join(self.tokens[token] for token in ids) == text else self._longest_first(text)

    def _longest_first(self, text: bytes) -> list[int]:
        """For a text that the tokenizer normalizes, say."""
        ids, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._id_of), None)
            if end is None:
                break
            ids.append(self._id_of[text[start:end]])
            start = end
        return ids


def _deep(work: Callable[[], Any]) -> Any:
    """Returns the result of `work`, which may call itself as deep as a schema's references lead: thousands of levels.

    llguidance knows no limit of that, and an overflow of the stack ends the process.
    """
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # a panic of llguidance's
            results.append(InputError(f"cannot hold to the schema: {printable(error)}"))

    with _stack_lock:
        before = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=run)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if isinstance(results[0], InputError):
        raise results[0]
    return results[0]


def schema_text(schema: Mapping[str, Any]) -> str:
    """Returns a JSON schema as it stands after `%json` in a Lark grammar.

    Raises:
        InputError: it is no JSON object, is too large or too deep, or uses what could not be held to.
    """
    if not isinstance(schema, Mapping):
        raise InputError("the schema is no JSON object")
    try:
        check_depth(schema)
        text = json.dumps({**schema, "x-guidance": _SPACING}, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"the schema: {error}") from None
    if len(text) > MAX_SCHEMA:
        raise InputError(f"the schema has {len(text):,} characters, and at most {MAX_SCHEMA:,} are compiled")
    if "x-guidance" in schema:
        raise InputError("the schema uses x-guidance, which is not supported")
    _check_values(schema)
    return text


def _check_values(schema: Any) -> None:
    """Raises InputError for values that a grammar cannot be held to, or that llguidance does not bound the cost of.

    A grammar does not know which names were written already, and the same one twice counts once: a least number of
    properties says nothing of free ones.
    """
    left, size, multiple = [schema], 0, 1
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            least, required = value.get("minProperties"), value.get("required")
            if isinstance(least, (int, float)) and least - len(required if isinstance(required, list) else ()) >= 2:
                raise InputError(f"the schema uses minProperties {least} without as many in required: not supported")
            named = value.get("patternProperties")
            texts = (value.get("pattern"), *(named if isinstance(named, Mapping) else ()))
            size += sum(_size(text) for text in texts if isinstance(text, str))
            multiple = math.lcm(multiple, _digits(value.get("multipleOf")))
            if multiple > _MAX_MULTIPLE:
                raise InputError(
                    f"the schema uses multipleOf {value['multipleOf']}: at most {_MAX_MULTIPLE:,} are supported, as "
                    "the least common multiple of all"
                )
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, (int, float)) and value < _LEAST:
            raise InputError(f"the schema holds the number {value:g}: at least {_LEAST:g} is supported")
    if size > _MAX_PATTERNS:
        raise InputError(
            f"the schema's patterns match {size:,} characters by counting, and at most {_MAX_PATTERNS:,} may be"
        )


def _digits(number: Any) -> int:
    """Returns a number without its decimal point: 125 for 12.5, 5 for 0.05; 1 for what is none."""
    if not isinstance(number, (int, float)) or not number:
        return 1
    _, digits, exponent = Decimal(repr(number + 0)).normalize().as_tuple()
    return int("".join(map(str, digits))) * 10 ** max(0, int(exponent))


_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)


def _size(pattern: str) -> int:
    """Returns how many characters a regular expression has once its counts, as in `a{3}`, are written out."""
    outer: list[int] = []
    size = last = 0
    for part in _PARTS.findall(pattern):
        if part == "(":
            outer.append(size)
            size = 0
        elif part == ")" and outer:
            last, size = size, outer.pop() + size
        elif part[0] == "{" and len(part) > 1:
            count = max((int(number) for number in re.findall(r"\d{1,9}", part)), default=1)
            size, last = size + last * (count - 1), last * count
        else:
            size, last = size + 1, 1
    return size + sum(outer)


def _reason(matcher: LLMatcher) -> str:
    """Returns llguidance's error on one line, without the grammar's source and advice on options of its own."""
    text = re.sub(r"\n +\d+ \| .*|<non-verbose/>|Enable 'coerce_one_of'.*", "", matcher.get_error(), flags=re.DOTALL)
    text = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: |json-schema:///", "", text)
    text = re.sub(r"Unimplemented keys: \[(.*)\]", r"\1: not supported", text)
    return printable("nothing satisfies it" if text.startswith("NoExtension") else " ".join(text.split()).rstrip("."))
