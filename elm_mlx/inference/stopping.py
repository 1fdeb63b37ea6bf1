"""Where the text of an answer ends.

Knows text and stop strings; knows nothing of models. Holds back what may turn out to be the beginning
of a stop string, so that none of it is ever shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from elm_mlx.errors import InputError
from elm_mlx.text.tokenizer import Tokenizer


class TextStream:
    """The tokens that follow `prompt` in, text out, up to the first of the `stop` strings."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        stop = (stop,) if isinstance(stop, str) else stop  # a string is a sequence of strings, and never meant as one
        if any(not string for string in stop):
            raise InputError("a stop string is empty")
        self._decoder = tokenizer.detokenizer(prompt)
        self._stop = tuple(stop)
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """The text that is final after `token`, and whether a stop string has ended it."""
        return self._cut(self._decoder.add(token))

    def finish(self) -> str:
        """What is left when the tokens end: bytes of an unfinished character, and what was held back."""
        text, ended = self._cut(self._decoder.finish())
        return text if ended else text + self._held

    def _cut(self, text: str) -> tuple[str, bool]:
        text = self._held + text
        found = [at for at in (text.find(string) for string in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that begins `string`."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
