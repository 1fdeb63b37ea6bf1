"""Passages: a document's text in pieces of a few paragraphs, each with its headings and lines.

A kind's reader makes *blocks*: paragraphs, list items, fenced code, functions. A passage joins blocks that follow each
other under one heading while they have at most `SIZE` characters, about 200 tokens of English; a longer block is
divided at line ends, or else between sentences or words. So no passage goes beyond its heading, and nothing of a text
is lost or stands twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from elm_mlx.documents import document_files
from elm_mlx.documents.document_files import text_of
from elm_mlx.documents.text_blocks import TextBlock, code_blocks, markdown_blocks, python_blocks, text_blocks, trimmed

SIZE = 800  # characters of a passage, at most, unless its last block is short
_SHORT = SIZE // 4  # characters: what is left over of a section goes with the passage before

_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")


def passages_of(path: str, data: bytes) -> list[TextBlock]:
    """Returns the passages of a file by its name: Markdown, HTML, PDF, code, or else text.

    Raises:
        ValueError: the file cannot be read as what its name says; says why.
        ImportError: a PDF needs pypdf.
    """
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in document_files.PDF:
        from elm_mlx.documents.pdf_pages import pdf_blocks

        blocks: Iterable[TextBlock] = pdf_blocks(data)
    elif document_files.is_binary(data):
        raise ValueError("is binary")
    elif suffix in document_files.HTML:
        from elm_mlx.documents.html_blocks import html_blocks

        blocks = html_blocks(text_of(data, html=True))
    elif suffix in document_files.MARKDOWN:
        blocks = markdown_blocks(text_of(data))
    elif suffix in document_files.PYTHON:
        blocks = python_blocks(text_of(data))
    elif suffix in document_files.CODE:
        blocks = code_blocks(text_of(data))
    else:
        blocks = text_blocks(text_of(data))
    return list(joined(blocks))


def joined(blocks: Iterable[TextBlock]) -> Iterator[TextBlock]:
    """Yields passages: blocks that follow each other under one heading, as many as `SIZE` allows."""
    passage: TextBlock | None = None
    for block in (part for whole in blocks for part in _divided(whole)):
        together = passage is not None and passage.heading == block.heading
        if together and passage is not None:
            size = len(passage.text) + len(block.text)
            if size <= SIZE or (len(block.text) < _SHORT and size <= SIZE + _SHORT):
                apart = "\n" * max(1, min(2, block.first - passage.last))
                passage = replace(passage, text=passage.text + apart + block.text, last=block.last)
                continue
        if passage is not None:
            yield passage
        passage = block
    if passage is not None:
        yield passage


def _divided(block: TextBlock) -> Iterator[TextBlock]:
    """Yields a block in parts of at most `SIZE` characters, divided at line ends wherever lines are not longer."""
    if len(block.text) <= SIZE + _SHORT:
        yield block
        return
    lines = block.text.split("\n")
    counted = block.last - block.first + 1 == len(lines)  # or else, of HTML and PDF, lines are not the file's
    part: list[str] = []
    size, first = 0, 0
    for number, line in enumerate(lines):
        if part and size + len(line) > SIZE:
            yield from _part(block, part, first, counted)
            part, size, first = [], 0, number
        part.append(line)
        size += len(line) + 1
    yield from _part(block, part, first, counted)


def _part(block: TextBlock, lines: list[str], first: int, counted: bool) -> Iterator[TextBlock]:
    for part in trimmed(lines, 0, len(lines), block.heading):
        start = block.first + first
        place = (start + part.first - 1, start + part.last - 1) if counted else (block.first, block.last)
        for piece in _short_pieces(part.text):
            yield TextBlock(piece, *place, block.heading)


def _short_pieces(text: str) -> Iterator[str]:
    """Yields a text in pieces of at most `SIZE` characters: between sentences, or else words, or else anywhere."""
    if len(text) <= SIZE + _SHORT:
        if text.strip():
            yield text
        return
    start = 0
    while len(text) - start > SIZE:
        ends = [found.end() for found in _SENTENCE.finditer(text, start + SIZE // 2, start + SIZE)]
        end = ends[-1] if ends else text.rfind(" ", start + SIZE // 2, start + SIZE) + 1 or start + SIZE
        if piece := text[start:end].strip():
            yield piece
        start = end
    if piece := text[start:].strip():
        yield piece
