"""The blocks of a text: paragraphs, list items, fenced code, functions, each with its lines and headings."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

SEPARATOR = " > "  # between headings
_MOST_HEADING = 200  # characters of one heading
_MOST_PARSED = 1 << 19  # characters of Python: its tree may take 900 times as many bytes
_LARGE = 800  # characters of a class: beyond, each of its methods is a block of its own

_HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ITEM = re.compile(r"[-*+] |\d{1,9}[.)] ")
_CLOSING = re.compile(r"[)}\]>;,]*|end|else\b.*|\*/")


@dataclass(frozen=True)
class TextBlock:
    """A piece of a document.

    Attributes:
        text: without blank lines at its ends.
        first, last: its lines in the file, from 1; of a PDF its pages.
        heading: the headings above it, outermost first, joined by `SEPARATOR`; of code the definitions around it.
    """

    text: str
    first: int
    last: int
    heading: str = ""


def text_blocks(text: str) -> Iterator[TextBlock]:
    """Yields the paragraphs of a text, which blank lines divide."""
    yield from _paragraphs(text.split("\n"), 1, "")


def _paragraphs(lines: list[str], first: int, heading: str) -> Iterator[TextBlock]:
    start = None
    for number, line in enumerate((*lines, "")):
        if line.strip() and start is None:
            start = number
        elif not line.strip() and start is not None:
            yield TextBlock("\n".join(lines[start:number]), first + start, first + number - 1, heading)
            start = None


def markdown_blocks(text: str) -> Iterator[TextBlock]:
    """Yields paragraphs, list items, tables and fenced code under their headings, by CommonMark's rules for blocks."""
    headings: list[str] = []
    lines = text.split("\n")
    start, fence, number = 0, "", 0

    def block(end: int) -> Iterator[TextBlock]:
        yield from trimmed(lines, start, end, SEPARATOR.join(headings))

    while number < len(lines):
        line = lines[number]
        opened = _FENCE.match(line)
        if fence:
            if opened and opened[1].startswith(fence) and not line.strip(" \t" + fence[0]):
                fence = ""
                yield from block(number + 1)
                start = number + 1
        elif opened:
            yield from block(number)
            start, fence = number, opened[1]
        elif (heading := _HEADING.fullmatch(line)) is not None:
            yield from block(number)
            enter_heading(headings, len(heading[1]), _unclosed(heading[2] or ""))
            start = number + 1
        elif (under := _UNDERLINE.fullmatch(line)) is not None and start == number - 1 and lines[start].strip():
            enter_heading(headings, 1 if under[1][0] == "=" else 2, lines[start])
            start = number + 1
        elif not line.strip():
            yield from block(number)
            start = number + 1
        elif _ITEM.match(line) and start < number:
            yield from block(number)
            start = number
        number += 1
    yield from block(len(lines))


def _unclosed(heading: str) -> str:
    """Returns a heading's text without the signs `#` that may close it. A pattern for it would take quadratic time."""
    text = heading.rstrip(" \t")
    without = text.rstrip("#")
    return without if without[-1:] in ("", " ", "\t") else text


def trimmed(lines: list[str], start: int, end: int, heading: str) -> Iterator[TextBlock]:
    """Yields the block of the lines from index `start` to before `end`, without blank ones around; none of none."""
    written = [number for number in range(start, end) if lines[number].strip()]
    if written:
        first, last = written[0], written[-1]
        yield TextBlock("\n".join(lines[first : last + 1]), first + 1, last + 1, heading)


def enter_heading(headings: list[str], level: int, text: str) -> None:
    """Puts a heading of a level, from 1, in the place of those of its level and below."""
    del headings[level - 1 :]
    headings += [""] * (level - 1 - len(headings))
    headings.append(" ".join(text.split())[:_MOST_HEADING])
    while "" in headings:
        headings.remove("")


def python_blocks(text: str) -> Iterator[TextBlock]:
    """Yields functions, classes and what stands between them, under the classes around them."""
    if len(text) > _MOST_PARSED:
        yield from code_blocks(text)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on escapes in strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # another version's, or no Python
        yield from code_blocks(text)
        return
    lines = text.split("\n")
    yield from _definitions(tree.body, lines, 1, len(lines), ())


def _definitions(
    body: list[ast.stmt], lines: list[str], first: int, last: int, around: tuple[str, ...]
) -> Iterator[TextBlock]:
    """Yields the lines from `first` to `last`, each definition of `body` by itself."""
    heading = SEPARATOR.join(around)
    for statement in body:
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        start = min([statement.lineno, *(each.lineno for each in statement.decorator_list)])
        end = statement.end_lineno or start
        if start < first:  # on a line with what came before
            continue
        yield from _paragraphs(lines[first - 1 : start - 1], first, heading)
        word = "class" if isinstance(statement, ast.ClassDef) else "def"
        within = (*around, f"{word} {statement.name}")
        if word == "class" and sum(map(len, lines[start - 1 : end])) > _LARGE:
            yield from _definitions(statement.body, lines, start, end, within)
        else:
            yield TextBlock("\n".join(lines[start - 1 : end]), start, end, SEPARATOR.join(within))
        first = end + 1
    yield from _paragraphs(lines[first - 1 : last], first, heading)


def code_blocks(text: str) -> Iterator[TextBlock]:
    """Yields pieces of code of any language: each begins at a line without indentation after a blank line.

    That is where a function of most languages begins, its comment above it. Its first line is the heading.
    """
    lines = text.split("\n")
    starts = [
        number
        for number, line in enumerate(lines)
        if line.strip()
        and (number == 0 or not lines[number - 1].strip())
        and not line[0].isspace()
        and _CLOSING.fullmatch(line.strip()) is None
    ]
    for start, end in zip([0, *starts], [*starts, len(lines)], strict=True):
        named = next((line for line in lines[start:end] if line.strip(" \t/*#-;\"'")), "").strip()
        yield from trimmed(lines, start, end, named[:80].rstrip(" {:("))
