"""An answer as it grows: tokens in, out the text to show, and at the end which of the tokens make the text.

Knows end marks, stop strings and white space; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence

from elm_mlx.inference.stopping import TextStream
from elm_mlx.text.tokenizer import Tokenizer


class Draft:
    """The answer to `prompt`.

    Attributes:
        tokens: all that came, an end mark too.
        text: what they say, up to an end mark or stop string; characters that were cut off are left out.
        ended: whether an end mark or stop string came.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop_ids: Sequence[int], stop_strings: Sequence[str]
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.ended = False
        self._cut = False  # by a stop string, so that what is held back is part of that
        self._tokenizer, self._prompt = tokenizer, prompt
        self._stream = TextStream(tokenizer, prompt, stop_strings)
        self._stop_ids = stop_ids

    def add(self, token: int) -> str:
        """What to show now: the text, without white space at its beginning."""
        self.tokens.append(token)
        if token in self._stop_ids:
            self.ended = True
            return self.finish()
        piece, self._cut = self._stream.add(token)
        self.ended = self._cut
        return self._shown(piece)

    def finish(self) -> str:
        """What to show when no more tokens come: the rest, but for the bytes of half a character."""
        rest = "" if self._cut else self._stream.finish().rstrip("\ufffd")
        self._cut = True
        return self._shown(rest)

    def ids(self) -> tuple[int, ...]:
        """Prompt and answer: the tokens that make `text`; none where a stop string begins amid a token."""
        decoder = self._tokenizer.detokenizer(self._prompt)
        length = count = 0
        while length < len(self.text):
            length += len(decoder.add(self.tokens[count]))
            count += 1
        return (*self._prompt, *self.tokens[:count]) if length == len(self.text) else ()

    def _shown(self, piece: str) -> str:
        shown = piece if self.text.strip() else piece.lstrip()
        self.text += piece
        return shown
