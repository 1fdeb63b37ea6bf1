"""The process that renders chat templates, by Jinja as transformers sets it up.

Templates come with a model from anywhere, so the kernel holds the limits of this process, and no template can change
them. It imports nothing of this package and is run as a file by itself, to start in a few dozen milliseconds.

It reads a JSON object a line, and answers by one:

- `source`: Jinja text, or null for the one before; and `conversations`: for each of them the template's variables.
- `rendered`: for each a text, or a `{"reason", "line"}` that the template raised; or `invalid`, such a reason of the
  source itself.

It ends when its input does, or without an answer where a limit is exceeded; its exit code then says which.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

# Exit codes; what takes too long is ended by SIGALRM.
TOO_MUCH_MEMORY, TOO_MUCH_TEXT = 3, 4

# Characters that templates write by themselves (the longest known have 20,000 with their tools), and for each byte that
# they are given: `tojson` makes six of one.
OWN_TEXT, TEXT_PER_BYTE = 100_000, 8

_REASON = 300  # characters of it that are shown


def main() -> None:
    """Arguments: seconds for an answer; bytes of data, 0 where they are watched from outside; where to import from."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    sys.path += sys.argv[3:]
    environment = _environment()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory:
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    gc.freeze()
    _write({})
    template: Any = None
    try:
        for line in sys.stdin.buffer:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            request = json.loads(line)
            if request["source"] is not None:
                template = _attempt(lambda: environment.from_string(request["source"]))  # noqa: B023
            if isinstance(template, dict):
                _write({"invalid": template})
            else:
                rendered = [_attempt(lambda: template.render(each)) for each in request["conversations"]]  # noqa: B023
                if sum(len(text) for text in rendered if isinstance(text, str)) > OWN_TEXT + TEXT_PER_BYTE * len(line):
                    os._exit(TOO_MUCH_TEXT)
                _write({"rendered": rendered})
            signal.setitimer(signal.ITIMER_REAL, 0)
    except MemoryError:
        os._exit(TOO_MUCH_MEMORY)


def _write(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _attempt(work: Callable[[], Any]) -> Any:
    """Returns the result of `work`, or its error as an object: a template can raise anything."""
    try:
        return work()
    except MemoryError:
        raise
    except Exception as error:
        text = " ".join(str(error)[: 10 * _REASON].split())[:_REASON]
        line = getattr(error, "lineno", None)
        return {"reason": text or type(error).__name__, "line": line if isinstance(line, int) else None}


def _environment() -> Any:
    """Jinja as transformers sets it up."""
    from jinja2 import nodes, parser
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says, for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A block of its own: what is set in it is not set after it.
            return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

        def said(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: object, ensure_ascii: bool = False, indent: int | None = None,
        separators: tuple[str, str] | None = None, sort_keys: bool = False,
    ) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


if __name__ == "__main__":
    main()
