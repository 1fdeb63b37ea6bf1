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
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
_ITEM = re.compile(r"[-*+] |\d{1,9}[.)] ")
_NO_HEADING = re.compile(r" {0,3}(?:[-*+>]|\d{1,9}[.)])")  # how a list item or a quote begins
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
    headings = Headings()
    lines = text.split("\n")
    start, fence, number = 0, "", _front_matter(lines)
    if number:
        yield from trimmed(lines, 1, number - 1, "")
        start = number

    def block(end: int) -> Iterator[TextBlock]:
        for each in trimmed(lines, start, end, headings.path):
            headings.alone = None
            yield each

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
            yield from headings.enter(len(heading[1]), _unclosed(heading[2] or ""), number + 1)
            start = number + 1
        elif (
            (under := _UNDERLINE.fullmatch(line)) is not None
            and start == number - 1
            and lines[start].strip()
            and not _NO_HEADING.match(lines[start])
        ):
            yield from headings.enter(1 if under[1][0] == "=" else 2, lines[start], number)
            start = number + 1
        elif not line.strip():
            yield from block(number)
            start = number + 1
        elif _ITEM.match(line) and start < number:
            yield from block(number)
            start = number
        number += 1
    yield from block(len(lines))
    yield from headings.left_alone()


def _front_matter(lines: list[str]) -> int:
    """Returns the number of lines of settings between two of `---` at a file's beginning."""
    if lines[0].rstrip() != "---":
        return 0
    return next((end + 1 for end, line in enumerate(lines[1:], 1) if line.rstrip() in ("---", "...")), 0)


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


class Headings:
    """The headings above a place in a document.

    Attributes:
        alone: the level of the last one, and itself as a block, as long as nothing stands below it.
    """

    def __init__(self) -> None:
        self._open: list[tuple[int, str]] = []  # level and text, outermost first
        self.alone: tuple[int, TextBlock] | None = None

    @property
    def path(self) -> str:
        return SEPARATOR.join(text for _, text in self._open)

    def enter(self, level: int, text: str, line: int) -> Iterator[TextBlock]:
        """Puts a heading of a level, from 1, in place of those of its level and below. Yields one that was alone."""
        if self.alone is not None and level <= self.alone[0]:
            yield from self.left_alone()
        while self._open and self._open[-1][0] >= level:
            self._open.pop()
        self.alone, text = None, " ".join(text.split())[:_MOST_HEADING]
        if text:
            self.alone = level, TextBlock(text, line, line, self.path)
            self._open.append((level, text))

    def left_alone(self) -> Iterator[TextBlock]:
        """Yields the last heading, if nothing stands below it."""
        if self.alone is not None:
            yield self.alone[1]
        self.alone = None


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
