"""The task, and the program that judges it: one plain sentence of the wanted kind and length, with the wanted word.

Knows text alone: no model, no files. `cut.py` cuts sentences that pass out of books, so that SFT teaches what
the check asks for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

KINDS = {"statement": ".", "question": "?", "exclamation": "!"}
LENGTHS = {"short": range(4, 9), "long": range(11, 19)}  # words
TESTS = 300  # questions of old words to measure by: what is left is practised

WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_PLAIN = re.compile(r"[A-Z][A-Za-z ,;'-]*[a-z][.!?]")  # no digits, no quotes, and only one end
_PROMPT = re.compile(r"Write a (\w+) (\w+) with the word ([\w'-]+)\.\n\Z")


class Wish(NamedTuple):
    """What is asked for: one of LENGTHS, one of KINDS, and a word in lower case."""

    length: str
    kind: str
    word: str

    def prompt(self) -> str:
        """What the model is asked."""
        return f"Write a {self.length} {self.kind} with the word {self.word}.\n"


class Verdict(NamedTuple):
    """What the check found of an answer. `passes` wants all four."""

    sentence: bool
    kind: bool
    length: bool
    word: bool

    @property
    def passes(self) -> bool:
        return all(self)


class Questions(NamedTuple):
    """Prompts. No question is in two of them, and no training asks for a word of `new`."""

    practice: list[str]
    test: list[str]
    new: list[str]


def wish(prompt: str) -> Wish:
    """What `prompt` asks for; its last question, where others stand before it. ValueError where it asks nothing."""
    if not (found := _PROMPT.search(prompt)):
        raise ValueError(f"no question: {prompt!r}")
    return Wish(*found.groups())


def words(sentence: str) -> list[str]:
    """Its words, in lower case; `fox's` and `half-way` are one word each, and no `fox`."""
    return WORD.findall(sentence.lower())


def check(answer: str, wish: Wish) -> Verdict:
    """Whether `answer` is a sentence, and of the kind, the length and with the word that were asked for.

    A sentence begins with a capital letter, ends with one of `.!?`, which stands nowhere else, and holds letters,
    spaces, commas, semicolons, apostrophes and hyphens. The word must stand as it was given, `Fox` for `fox`
    apart. White space around the answer doesn't count.
    """
    answer = answer.strip()
    found = words(answer)
    return Verdict(
        sentence=bool(_PLAIN.fullmatch(answer)),
        kind=answer.endswith(KINDS[wish.kind]),
        length=len(found) in LENGTHS[wish.length],
        word=wish.word in found,
    )


def questions(vocabulary: Mapping[str, Sequence[str]]) -> Questions:
    """All that can be asked with `old` and `new` words, shuffled; the same ones each time."""
    old, new = (
        [Wish(length, kind, word).prompt() for word in vocabulary[name] for kind in KINDS for length in LENGTHS]
        for name in ("old", "new")
    )
    draw = random.Random(0)
    draw.shuffle(old)
    draw.shuffle(new)
    return Questions(practice=old[TESTS:], test=old[:TESTS], new=new)
