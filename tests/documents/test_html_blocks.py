"""Pages of HTML as blocks of text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.documents.html_blocks import html_blocks
from elm_mlx.documents.text_blocks import TextBlock

PAGE = """<!doctype html><html><head><title>My page</title><script>var x = "<p>no</p>";</script>
<style>p { }</style></head><body><nav><a>menu</a></nav>
<h1>My page</h1>
<p>Hello <b>wor</b>ld,
second line &amp; more.<br>Third.</p>
<h2>Lists</h2><ul><li>one<li>two</ul>
<table><tr><th>a</th><th>b</th></tr>
<tr><td>1</td><td>2</td></tr></table>
<pre>
code  here
   indented
</pre>
<p>unclosed
"""


def test_blocks_headings_and_lines() -> None:
    assert list(html_blocks(PAGE)) == [
        TextBlock("Hello world, second line & more.\nThird.", 4, 5, "My page"),
        TextBlock("- one", 6, 6, "My page > Lists"),
        TextBlock("- two", 6, 6, "My page > Lists"),
        TextBlock("a | b", 7, 7, "My page > Lists"),
        TextBlock("1 | 2", 8, 8, "My page > Lists"),
        TextBlock("code  here\n   indented", 10, 11, "My page > Lists"),
        TextBlock("unclosed", 13, 13, "My page > Lists"),
    ]


TAGS = [
    "<p>", "</p>", "<h2>", "</h2>", "<script>", "</script>", "<nav>", "</div>", "<pre>", "<li>", "<td>", "<", "<!--",
    "&#0;", "&x;", "\n", "text ", "<![", "<![if ", "<!", "<?", "]]>", "-->", "<a x='", '"', "<nav", "</select", ">",
]  # fmt: skip


@settings(max_examples=80)
@given(st.lists(st.sampled_from(TAGS), max_size=25).map("".join) | st.text(max_size=60))
def test_no_page_is_too_broken(page: str) -> None:
    last = page.count("\n") + 1
    for block in html_blocks(page):
        assert block.text.strip() and 1 <= block.first <= block.last <= last


def test_what_is_never_closed_is_text() -> None:
    page = "<h1>A</h1>\n<p>one <a href='x\n<p>two\n<!-- three\n<p>four</p><![if five"
    assert [(each.text, each.first, each.heading) for each in html_blocks(page)] == [
        ("one <a href='x", 2, "A"),
        ("two <!-- three", 3, "A"),
        ("four", 5, "A"),
        ("<![if five", 5, "A"),
    ]


@pytest.mark.parametrize(
    "piece",
    ["<", "<a", "<a x='", "<a b=c", "<a x x", "</", "</a", "<!--", "<![CDATA[", "<![if ", "<?", "<nav>", "<p>", "<h1>",
     "<nav></select>", "<script>", "<pre>", "&", "<td>a", "<li>"],
)  # fmt: skip
def test_no_page_takes_long(piece: str) -> None:
    began = time.monotonic()
    list(html_blocks(piece * (400_000 // len(piece))))
    assert time.monotonic() - began < 5  # where the time grew by the square, minutes
