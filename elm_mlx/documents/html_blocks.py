"""The text of a page of HTML: paragraphs, list items and rows of tables under their headings, with their lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

from elm_mlx.documents.text_blocks import Headings, TextBlock

_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_UNSEEN = frozenset(("script", "style", "template", "noscript", "svg", "math", "iframe", "object", "nav", "select"))
_BLOCKS = frozenset(
    (
        "address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "dialog", "div", "dl", "dt",
        "fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "html", "li", "main", "ol", "p", "pre",
        "section", "summary", "table", "tbody", "tfoot", "thead", "title", "tr", "ul", *_HEADINGS,
    )
)  # fmt: skip
_MOST_UNCLOSED = 10  # signs `<` of a page that open nothing: for each, Python's parser looks through all that is left
_DEEPEST = 500  # elements within each other
_TAG = re.compile(r"<[^<>]*>?")


def html_blocks(text: str) -> Iterator[TextBlock]:
    """Yields the blocks of a page. Scripts, styles and menus are left out, and no mark-up is too broken."""
    page = _Page()
    for _ in range(_MOST_UNCLOSED):
        page.feed(text)
        left = page.rawdata
        if not left.startswith("<"):
            break
        page.rawdata, text = "", f"&lt;{left[1:]}"
    else:
        page.rawdata = _TAG.sub(" ", text)
    page.close()
    page.end_block()
    yield from page.blocks
    yield from page.headings.left_alone()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[TextBlock] = []
        self.headings = Headings()
        self._pieces: list[str] = []
        self._begun = False  # the block has text
        self._first = self._last = 1
        self._unseen: list[str] = []  # elements that are open, of which nothing is shown
        self._in_title = False
        self._heading = 0  # the level of the heading that is open; the title's is 1
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _UNSEEN:
            self._unseen += [tag] * (len(self._unseen) < _DEEPEST)
        elif tag in _BLOCKS:
            self.end_block()
            self._heading = 1 if tag == "title" else _HEADINGS.get(tag, 0)
            self._in_title = tag == "title"
            self._pre += tag == "pre"
            if tag == "li":
                self._pieces.append("- ")
        elif tag == "br":
            self._pieces.append("\n")
        elif tag in ("td", "th") and self._begun:
            self._pieces.append(" | ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._unseen:
            del self._unseen[self._unseen.index(tag) :]
        elif tag in _BLOCKS:
            self.end_block()
            self._pre = max(0, self._pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._unseen:
            return
        if data.strip():
            line = self.getpos()[0]
            if not self._begun:
                self._first = line + data[: -len(data.lstrip())].count("\n")
            self._begun, self._last = True, line + data.rstrip().count("\n")
        self._pieces.append(data if self._pre else " ".join(f"a{data}a".split())[1:-1])

    def parse_html_declaration(self, i: int) -> int:
        try:
            return super().parse_html_declaration(i)
        except AssertionError:  # of some versions of Python, at `<![`
            return self.parse_bogus_comment(i)

    def end_block(self) -> None:
        """Takes what has come as a block, or as the heading that is open."""
        text = "".join(self._pieces).strip("\n" if self._pre else None)
        self._pieces, self._begun = [], False
        if self._heading:
            if text and not (self._heading == 1 and self.headings.path == text):
                self.blocks += self.headings.enter(self._heading, text, self._first)
                if self._in_title:  # which is of the page, and no part of its text
                    self.headings.alone = None
            self._heading = 0
        elif text.strip(" -|\n"):
            self.blocks.append(TextBlock(text, self._first, self._last, self.headings.path))
            self.headings.alone = None
