"""The task, and the program that judges it: one plain sentence of a kind and a length, with a given beginning.

Knows text alone: no model, no files. `cut.py` cuts sentences that pass out of books, so that SFT teaches what
the check asks for.
"""

from __future__ import annotations

import re
from typing import NamedTuple

KINDS = {"statement": ".", "question": "?", "exclamation": "!"}
LENGTHS = {"short": range(4, 9), "long": range(11, 19)}  # words

_WORD = r"[A-Za-z]+(?:['-][A-Za-z]+)*"
_WORDS = re.compile(_WORD)
_BEGINNING = re.compile(rf"{_WORD} {_WORD}")
_PLAIN = re.compile(r"[A-Z][A-Za-z ,;'-]*[a-z][.!?]")  # no digits, no quotes, and only one end
_PROMPT = re.compile(rf"Write a (\w+) (\w+) that begins with: ({_WORD} {_WORD})\n\Z")


class Wish(NamedTuple):
    """A wish: one of LENGTHS, one of KINDS, and the sentence's first two words."""

    length: str
    kind: str
    beginning: str

    def prompt(self) -> str:
        """Returns the prompt that asks a model for it."""
        return f"Write a {self.length} {self.kind} that begins with: {self.beginning}\n"


class Verdict(NamedTuple):
    """The check's findings about an answer. `passes` wants all four."""

    sentence: bool
    kind: bool
    length: bool
    beginning: bool

    @property
    def passes(self) -> bool:
        return all(self)


def wish(prompt: str) -> Wish:
    """Returns the wish in `prompt`, in its last question where it has several. Raises ValueError where it has none."""
    if not (found := _PROMPT.search(prompt)):
        raise ValueError(f"no question: {prompt!r}")
    return Wish(*found.groups())


def wishes(sentence: str) -> Wish | None:
    """Returns the wish that `sentence` would answer; None where it fits no wish."""
    length = next((name for name, count in LENGTHS.items() if len(words(sentence)) in count), None)
    beginning = _BEGINNING.match(sentence)
    if not _PLAIN.fullmatch(sentence) or not length or not beginning:
        return None
    return Wish(length, next(name for name, end in KINDS.items() if sentence.endswith(end)), beginning[0])


def words(sentence: str) -> list[str]:
    """Its words; `half-way` and `it's` are one each."""
    return _WORDS.findall(sentence)


def check(answer: str, wish: Wish) -> Verdict:
    """Whether `answer` is a sentence, and of the kind, the length and with the beginning that were asked for.

    A sentence begins with a capital letter, ends with one of `.!?`, which stands nowhere else, and holds letters,
    spaces, commas, semicolons, apostrophes and hyphens. White space around the answer doesn't count.
    """
    answer = answer.strip()
    beginning = _BEGINNING.match(answer)
    return Verdict(
        sentence=bool(_PLAIN.fullmatch(answer)),
        kind=answer.endswith(KINDS[wish.kind]),
        length=len(words(answer)) in LENGTHS[wish.length],
        beginning=beginning is not None and beginning[0] == wish.beginning,
    )
