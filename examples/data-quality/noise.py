"""Noise for a clean corpus, made by program: copies, scans read badly, and boilerplate, a third of it each.

Knows texts alone; the same seed gives the same noise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

_COPIED = 12  # documents that the copies are of: a crawl has a few pages thousands of times
_LENGTHS = 1_500, 6_000  # characters of a document, as ../books.py cuts them
# What an optical reader may take for a letter: one of these.
_MISREAD = {
    "e": "co", "a": "os", "o": "0ce", "l": "1I|", "i": "lj1", "h": "bli", "n": "ru", "t": "fr", "s": "5S", "c": "e(",
    "r": "n", "u": "ii", "b": "h6", "g": "q9", "f": "t", "d": "cl", "y": "v", "v": "y", "w": "vv", "m": "rn", ".": ",",
    ",": ".'", "I": "l1", "S": "5", "B": "8", "T": "'1",
}  # fmt: skip
_NAMES = (
    "Amber", "Baker", "Carter", "Dawson", "Ellis", "Foster", "Grant", "Harper", "Irving", "Jarvis", "Keller",
    "Lawson", "Mercer", "Norton",
)  # fmt: skip
_THINGS = (
    "account", "basket", "catalogue", "delivery", "download", "gallery", "guide", "journal", "login", "member",
    "news", "order",
)  # fmt: skip
_PLACES = (
    "About us", "All categories", "Back to top", "Contact", "Home", "Help", "Next page", "Previous page", "Search",
    "Sign in", "Site map",
)  # fmt: skip
_LEGAL = (
    "Copyright (c) {year} {name} Media Ltd. All rights reserved.",
    "By using this site you accept our terms of use and our privacy policy, last changed on {day}/{month}/{year}.",
    "This site uses cookies to improve your {thing}. Accept all | Reject all | Settings",
    "No part of this publication may be reproduced in any form without written permission of {name} & Sons.",
    'The {thing} is provided "as is", without warranty of any kind, express or implied.',
    "Subscribe to our {thing} today and save {number}%! Offer ends {day}/{month}/{year}.",
    "Customers who bought this {thing} also bought: {name}, {thing}, no. {number}, {number}.99 EUR. Add to {thing}",
    "Page {number} of {number} | Printed on {day}/{month}/{year} | ISBN 0-{number}-{number}-X",
    "You are here: Home > {thing} > {name} > {thing} no. {number}",
    "For questions about your {thing} write to {thing}@{name}.example or call 0{number} {number}{number}.",
)


def with_noise(documents: Sequence[str], share: float, seed: int) -> list[tuple[str, str]]:
    """Returns all the documents and as much noise that `share` of the characters are noise, mixed.

    Each with its kind: clean, copy, copy with a changed line, scan, boilerplate.
    """
    draw = random.Random(seed)
    wanted = share / (1 - share) * sum(map(len, documents))
    copied = draw.sample(documents, _COPIED)
    kinds: list[tuple[str, float, Callable[[], str]]] = [
        ("copy", 1 / 6, lambda: draw.choice(copied)),
        ("changed copy", 1 / 6, lambda: changed(draw.choice(copied), draw)),
        ("scan", 1 / 3, lambda: misread(draw.choice(documents), draw)),
        ("boilerplate", 1 / 3, lambda: boilerplate(draw)),
    ]
    mixed = [("clean", text) for text in documents]
    for kind, part, make in kinds:
        length = 0
        while length < part * wanted:
            text = make()
            mixed.append((kind, text))
            length += len(text)
    draw.shuffle(mixed)
    return mixed


def changed(text: str, draw: random.Random) -> str:
    """A copy with a line of its own before it, so that no two are equal."""
    return (
        f"Retrieved {draw.randint(1, 28)}/{draw.randint(1, 12)}/20{draw.randint(10, 29)}, {draw.random():.6f}\n{text}"
    )


def misread(text: str, draw: random.Random) -> str:
    """A scan's text: letters misread, spaces lost and won, lines broken; 5 to 20 % of the characters are hit."""
    rate = draw.uniform(0.05, 0.2)
    return "".join(_characters(text, rate, draw))


def _characters(text: str, rate: float, draw: random.Random) -> Iterator[str]:
    for character in text:
        if draw.random() >= rate:
            yield character
        elif character == " ":
            yield draw.choice(("", "", "  ", "\n", "-\n"))
        elif character in _MISREAD:
            yield draw.choice(_MISREAD[character])
        else:
            yield draw.choice(("", "~", "^", " ", character.swapcase()))


def boilerplate(draw: random.Random) -> str:
    """Menus, notices, offers and lists of prices, without end."""
    wanted, lines, length = draw.randint(*_LENGTHS), [], 0
    while length < wanted:
        if draw.random() < 0.3:
            line = " | ".join(draw.sample(_PLACES, draw.randint(3, 8)))
        else:
            line = draw.choice(_LEGAL)
            while "{" in line:
                line = line.replace("{year}", str(draw.randint(1998, 2029)), 1)
                line = line.replace("{month}", str(draw.randint(1, 12)), 1).replace(
                    "{day}", str(draw.randint(1, 28)), 1
                )
                line = line.replace("{name}", draw.choice(_NAMES), 1).replace("{thing}", draw.choice(_THINGS), 1)
                line = line.replace("{number}", str(draw.randint(2, 99)), 1)
        lines.append(line)
        length += len(line) + 1
    return "\n".join(lines)
