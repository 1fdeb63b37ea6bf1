"""The process that tries grammars before another process compiles them: llguidance is native code, and a schema that
crashes it, or keeps it busy without end, shall end nothing but this.

It imports nothing of this package but is run as a file by itself. It reads a JSON object a line: `vocabulary`, a name;
`tokens`, where the name is new, with the bytes of each token as Latin-1 and `ends`, those that end a text; and
`grammar`, llguidance's Lark. Each grammar is compiled in a fork, which then writes a few texts by it at random. It
answers by a line: `{"reason": …}`, llguidance's error or null, or `{"ended": …}`, the fork's exit code or signal.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SECONDS = 2.0  # of computing
TOKEN_SECONDS = 0.5  # of computing, for one token
WAITING = 10  # times as long by the clock, on a busy machine
STACK = 256 << 20  # bytes, of which only those are taken that are touched: 10 KB for each of up to 5,000 references
# What follows in a text is computed by threads that have 8 MB. How deep a text is nested makes no difference to
# llguidance; what a schema makes of it is tried with a thirty-second of that.
TEXT_STACK = 256 << 10
MEMORY = (512 << 20) + STACK  # of the fork, this process' own included; macOS does not limit it
# llguidance's own limits leave a hostile schema seconds, of one token even, and hundreds of megabytes.
MAX_LEXER_STATES, MAX_GRAMMAR_SIZE = 50_000, 50_000
_TEXTS, _TOKENS = 4, 16  # that are written by a grammar

_stack_lock = threading.Lock()


def main() -> None:
    """Arguments: where to import from."""
    sys.path += sys.argv[1:]
    from llguidance import LLTokenizer, TokenizerWrapper

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabularies: dict[str, LLTokenizer] = {}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "tokens" in request:
            tokens = Tokens([token.encode("latin-1") for token in request["tokens"]], request["special"])
            made = LLTokenizer(TokenizerWrapper(tokens), eos_token=request["ends"] or None)
            vocabularies[request["vocabulary"]] = made
        child = os.fork()
        if child == 0:
            for timer, seconds in ((signal.ITIMER_PROF, SECONDS), (signal.ITIMER_REAL, WAITING * SECONDS)):
                signal.setitimer(timer, seconds)  # whose signals end the process
            most = resource.getrlimit(resource.RLIMIT_DATA)[1]
            memory = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
            _write({"reason": _fault(vocabularies[request["vocabulary"]], request["grammar"])})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            _write({"ended": os.waitstatus_to_exitcode(status)})


class Tokens:
    """A vocabulary as llguidance's TokenizerWrapper takes it: every token's bytes, and text to tokens."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int]) -> None:
        self.tokens, self.special_token_ids = list(tokens), list(special)
        self.eos_token_id: int | None = None
        controls = {*special}
        self._id_of = {content: i for i, content in enumerate(tokens) if content and i not in controls}
        self._longest = max(map(len, self._id_of), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Returns tokens that write `text`, the longest first. May not raise: the caller is Rust."""
        ids, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._id_of), None)
            if end is None:
                break
            ids.append(self._id_of[text[start:end]])
            start = end
        return ids


def compiled(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """Returns the matcher of a grammar, which may be one with an error.

    It is made with a stack on which the compiler may call itself as deep as a schema's references lead, thousands of
    levels: llguidance knows no limit of that, and an overflow of the stack ends the process.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, max_grammar_size=MAX_GRAMMAR_SIZE, verbose_errors=False)
    return _on_stack(STACK, lambda: LLMatcher(vocabulary, grammar, limits=limits, log_level=0))


def _on_stack(size: int, work: Callable[[], Any]) -> Any:
    """Returns the result of `work` in a thread with a stack of `size` bytes. Raises what it raises."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # a panic of llguidance's
            results.append(error)

    with _stack_lock:
        before = threading.stack_size(size)
        try:
            thread = threading.Thread(target=run)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def _fault(vocabulary: LLTokenizer, grammar: str) -> str | None:
    """Returns what is wrong with a grammar; None where texts can be written by it. Some show it at a token only."""
    try:
        matcher = compiled(vocabulary, grammar)
        fault: str | None = _on_stack(TEXT_STACK, lambda: _fault_in_texts(matcher))
    except BaseException as error:  # a panic
        return str(error) or type(error).__name__
    return fault


def _fault_in_texts(matcher: LLMatcher) -> str | None:
    """Writes a few texts at random. Returns what is wrong with one; None for nothing."""
    draw = random.Random(0)
    for _ in range(_TEXTS):
        text = matcher.deep_copy()
        for _ in range(_TOKENS):
            if text.is_error():
                return str(text.get_error())
            if text.is_stopped():
                break
            began = time.process_time()
            mask = text.compute_logit_bias()
            start = draw.randrange(len(mask))
            turned = mask[start:] + mask[:start]
            text.consume_token((start + len(turned) - len(turned.lstrip(b"\0"))) % len(mask))
            if time.process_time() - began > TOKEN_SECONDS:
                return "it takes too much time at a token"
    return None


def _write(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
