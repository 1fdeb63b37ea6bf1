"""Grammars: an answer is the JSON, or the tool call, that was asked for, because nothing else may be sampled.

llguidance compiles a JSON schema or a Lark grammar for one tokenizer, and says after each token which may follow. It is
the extra `grammar`, and imported where a grammar is first compiled. A schema comes from anywhere: its size, the time
and the memory that it may take have limits, and what is not supported of JSON Schema is an error that names it. What is
not known to crash native code, or to take it for ever, may do so yet: another process, `grammar_worker`, tries first.

Between two tokens of JSON a grammar allows a space, or a new line and its indentation: small models are used to write
either, and could go on with white space without end.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import re
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference import grammar_worker
from elm_mlx.reading import check_depth, printable
from elm_mlx.text import child_process
from elm_mlx.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA = 100_000  # characters of a schema as JSON
_MAX_VERDICTS = 1000  # that are remembered
_MAX_CACHED = 16  # compiled grammars of one tokenizer, each of at most a few dozen megabytes
_SPACING = {"whitespace_pattern": r" |\n {0,16}"}  # once, wherever JSON may have white space
_MAX_PATTERNS = 10_000  # characters that a schema's patterns match, with what they count up to
_LEAST = -9e18  # llguidance ends the process at whole numbers near to the least of 64 bits
_MAX_MULTIPLE = 10_000  # of all that numbers are to be multiples of: an automaton has a state for each remainder


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the last few. Any thread may.

    Args:
        end_ids: tokens that end a text beside the tokenizer's, such as a chat template's.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._end_ids = tuple(dict.fromkeys((*tokenizer.eos_ids, *end_ids)))
        self._grammars: OrderedDict[str, Grammar] = OrderedDict()
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()  # why a text cannot be held to, by its hash
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
                self._try(text)
                grammar = self._grammars[text] = Grammar(self, text)
                if len(self._grammars) > _MAX_CACHED:
                    self._grammars.popitem(last=False)
            self._grammars.move_to_end(text)
        return grammar

    def check(self, text: str) -> None:
        """Raises what `lark` does, without keeping a grammar."""
        with self._lock:
            self._try(text)

    def _try(self, text: str) -> None:
        """Raises InputError for a text that another process could not compile, or not in bounds."""
        key = hashlib.sha256(text.encode()).digest()
        if key not in self._verdicts:
            assert self.vocabulary  # where it cannot be had, that is not the text's fault
            self._verdicts[key] = _trials.fault(self.tokens, text)
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        if self._verdicts[key] is not None:
            raise InputError(f"cannot hold to the schema: {self._verdicts[key]}")

    @property
    def rows(self) -> int:
        """The number of the model's tokens, where it is known: else of the tokenizer's."""
        return self._tokenizer.rows or self._tokenizer.vocab_size

    @cached_property
    def tokens(self) -> _Tokens:
        """The tokens' bytes."""
        return _Tokens(self._tokenizer, self._end_ids)

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        """The tokenizer as llguidance takes it. Raises ElmError where that is not installed."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise ElmError("structured output needs llguidance: pip install 'elm-mlx[grammar]'") from None
        return LLTokenizer(TokenizerWrapper(self.tokens), eos_token=self.tokens.ends or None)


class Grammar:
    """A compiled grammar. Made by `GrammarCompiler`."""

    def __init__(self, compiler: GrammarCompiler, text: str) -> None:
        self.rows = compiler.rows
        self._vocabulary, self._text = compiler.vocabulary, text
        self._matcher = self._compile()

    def start(self) -> GrammarState:
        """Returns the state before the first token of a text."""
        return GrammarState(self)

    def _compile(self) -> LLMatcher:
        matcher = grammar_worker.compiled(self._vocabulary, self._text)
        if matcher.is_error():  # which only here has the tokenizer's own tokens
            raise InputError(f"cannot hold to the schema: {_reason(matcher.get_error())}")
        return matcher

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
        with _panics_as_errors():
            mask = self._matcher.compute_logit_bias()  # a byte a token, 0 for those that may not follow
            if self._failed():
                mask = self._matcher.compute_logit_bias()
                self._check()
        rows = self._grammar.rows
        bias = mx.where(mx.array(memoryview(mask)[:rows]) > 0, 0.0, -mx.inf)
        return bias if len(mask) >= rows else mx.pad(bias, (0, rows - len(mask)), constant_values=-mx.inf)

    def accept(self, token: int) -> None:
        """Takes the next token. Raises InputError for one that the grammar does not allow, or as `bias`."""
        with _panics_as_errors():
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
            raise InputError(
                f"cannot hold to the schema after {len(self._tokens)} tokens: {_reason(self._matcher.get_error())}"
            )


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Raises InputError for a panic of native code, which is no Exception: one text shall end, and no thread."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pyo3, which does not export it
            raise
        raise InputError(f"cannot hold to the schema: {printable(error)}") from None


class _Tokens(grammar_worker.Tokens):
    """A tokenizer as llguidance takes it, which writes a text as the tokenizer does wherever it can."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        special = {
            *tokenizer.control_ids.values(),
            *end_ids,
            *(() if tokenizer.unk_id is None else (tokenizer.unk_id,)),
        }
        count = tokenizer.vocab_size
        contents = [
            tokenizer.piece_of(token).encode() if token in special else tokenizer.bytes_of(token)
            for token in range(count)
        ]
        super().__init__(contents, sorted(token for token in special if token < count))
        self.ends = [token for token in end_ids if token < count]
        self.eos_token_id = next(iter(self.ends), None)
        # Of what the process needs: several models may have one vocabulary.
        self.name = hashlib.sha256(repr((contents, self.special_token_ids, self.ends)).encode()).hexdigest()

    def __call__(self, text: bytes) -> list[int]:
        """Returns the tokens that a model would write `text` by, within a text. May not raise: the caller is Rust."""
        try:
            ids = self._tokenizer.encode_amid(text.decode())
        except InputError:  # a token that the model has no row for
            ids = []
        return ids if b"".join(self.tokens[token] for token in ids) == text else super().__call__(text)


class _TrialProcess:
    """The process that tries grammars, from outside. One serves all tokenizers; where it has ended, another is made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: set[str] = set()  # vocabularies that it has

    def fault(self, tokens: _Tokens, grammar: str) -> str | None:
        """Returns why llguidance refuses a grammar, crashes at it or exceeds its bounds; None for a good one.

        Raises ElmError where the process does not start.
        """
        with self._lock:
            try:
                answer = self._ask(tokens, grammar)
            except (OSError, ValueError) as error:
                self.end()
                raise ElmError(f"the process that tries grammars has failed: {printable(error)}") from None
        if "ended" not in answer:
            return None if answer["reason"] is None else _reason(answer["reason"])
        slow = answer["ended"] in (-signal.SIGPROF, -signal.SIGALRM)
        return f"it takes more than {grammar_worker.SECONDS:g} s" if slow else "it ends the process that compiles it"

    def end(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        self._known.clear()
        if process is not None:
            child_process.end(process)

    def _ask(self, tokens: _Tokens, grammar: str) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self.end()
            command = [sys.executable, "-I", "-S", grammar_worker.__file__, *sys.path]
            self._process = child_process.start(command, "tries grammars")
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        request: dict[str, Any] = {"vocabulary": tokens.name, "grammar": grammar}
        if tokens.name not in self._known:
            contents = [content.decode("latin-1") for content in tokens.tokens]
            request |= {"tokens": contents, "special": tokens.special_token_ids, "ends": tokens.ends}
            self._known.add(tokens.name)
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer


_trials = _TrialProcess()
atexit.register(_trials.end)


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


def _reason(error: str) -> str:
    """Returns llguidance's error on one line, without the grammar's source and advice on options of its own."""
    text = re.sub(r"\n +\d+ \| .*|<non-verbose/>|Enable 'coerce_one_of'.*", "", error, flags=re.DOTALL)
    text = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: |json-schema:///", "", text)
    text = re.sub(r"Unimplemented keys: \[(.*)\]", r"\1: not supported", text)
    return printable("nothing satisfies it" if text.startswith("NoExtension") else " ".join(text.split()).rstrip("."))
