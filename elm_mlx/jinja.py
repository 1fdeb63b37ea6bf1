"""Chat templates in Jinja, as Hugging Face's libraries write and run them.

Knows the language, and that a template comes with a model from anywhere: it runs in Jinja's sandbox, its output
is bounded (its time is not), and whatever goes wrong in it is an error that names its file. Knows no tokens.
Importing this imports no Jinja.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from elm_mlx.errors import InputError

# Far above any context; a template that says more is broken or means harm.
MAX_OUTPUT = 4_000_000


class Renderer:
    """A template that has been read.

    Args:
        source: Jinja text.
        where: its file, for messages.

    Raises:
        InputError: it is no Jinja.
    """

    def __init__(self, source: str, where: str) -> None:
        self._where = where
        try:
            self._template = _environment().from_string(source)
        except Exception as error:
            raise self._failure(error) from None

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, **names: str) -> str:
        """The conversation as text. `names` are the template's further variables, `bos_token` and the like.

        Raises:
            InputError: the template refuses the conversation, does what it may not, or fails.
        """
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, **names}
        output: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(tools=None, documents=None, **variables):
                output.append(piece)
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise InputError(f"{self._where}: the chat template writes without end")
        except InputError:
            raise
        except Exception as error:  # a template can raise anything
            raise self._failure(error) from None
        return "".join(output)

    def _failure(self, error: Exception) -> InputError:
        line = f", line {error.lineno}" if isinstance(getattr(error, "lineno", None), int) else ""  # type: ignore[attr-defined]
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return InputError(f"{self._where}: the chat template fails{line}: {reason}")


def _environment() -> Any:
    """Jinja as Hugging Face's libraries set it up."""
    from jinja2 import nodes, parser
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says, for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
