"""Passages: nothing of a text is lost or stands twice, lines are the file's, and headings bound them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.documents import text_blocks
from elm_mlx.documents.html_blocks import html_blocks
from elm_mlx.documents.passages import SIZE, passages_of
from elm_mlx.documents.text_blocks import TextBlock, markdown_blocks

LINES = st.sampled_from(
    ["", "", "   ", "a few words, and more of them", "x" * 300, "word " * 250, "- an item", "1. one", "| a | b |",
     "    code()", "```", "~~~", "def f(a):", "    return a", "class C:", "}", "Ein Satz. Noch einer! Und 漢字。",
     "--", "a\tb"]
)  # fmt: skip
HEADED = st.one_of(LINES, st.sampled_from(["# One", "## Two ##", "### Three", "####", "===", "---", "#no heading"]))


def letters(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.c", "README"])
@settings(max_examples=60)
@given(st.lists(LINES, max_size=60))
def test_nothing_is_lost_and_lines_are_those_of_the_file(name: str, lines: list[str]) -> None:
    passages = passages_of(name, "\n".join(lines).encode())
    assert "".join(letters(each.text) for each in passages) == letters("\n".join(lines))
    for each in passages:
        assert len(each.text) <= 1.5 * SIZE
        assert letters(each.text) in letters("\n".join(lines[each.first - 1 : each.last]))
        assert lines[each.first - 1].strip() and lines[each.last - 1].strip()


@settings(max_examples=150)
@given(st.lists(HEADED, max_size=60))
def test_markdown_keeps_all_but_headings(lines: list[str]) -> None:
    passages = passages_of("a.md", "\n".join(lines).encode())
    together = "".join(letters(each.text) for each in passages)
    kept = iter(letters("\n".join(lines)))
    assert all(letter in kept for letter in together)  # in this order
    for each in passages:
        own = iter(letters("\n".join(lines[each.first - 1 : each.last])))
        assert all(letter in own for letter in letters(each.text))
    headed = {i for i, line in enumerate(lines) if "#" in line} | {
        i - 1 for i, line in enumerate(lines) if line in ("===", "---", "--")
    }
    for i, line in enumerate(lines):
        if i not in headed and letters(line).isalpha():
            assert letters(line) in together


def test_markdown_passages_are_under_their_headings() -> None:
    text = """Before.

# Title
One
line more.

## Sub ##

- a
- b

```python
# no heading

still code
```
Sub again
---------
### Deep
x

# Next

y
"""
    assert passages_of("a.md", text.encode()) == [
        TextBlock("Before.", 1, 1, ""),
        TextBlock("One\nline more.", 4, 5, "Title"),
        TextBlock("- a\n- b\n\n```python\n# no heading\n\nstill code\n```", 9, 16, "Title > Sub"),
        TextBlock("x", 20, 20, "Title > Sub again > Deep"),
        TextBlock("y", 24, 24, "Next"),
    ]


def test_a_long_text_without_spaces_is_divided_between_sentences() -> None:
    passages = passages_of("a.txt", ("龙井茶产于杭州，每年清明节前采摘的茶叶最为珍贵。" * 90).encode())
    assert len(passages) == 3 and all(each.text.endswith("。") for each in passages)


def test_python_is_divided_at_functions_and_classes() -> None:
    method = '    def {}(self):\n        """Says it."""\n' + "        print('a line of code')\n" * 12
    code = "import os\n\n\n@decorated\ndef first(a):\n    return a\n\n\nclass Big:\n    kind = 1\n\n"
    code += method.format("one") + "\n" + method.format("two") + "\n\nlast = 1\n"
    found = [(each.heading, each.first, each.last) for each in passages_of("a.py", code.encode())]
    assert found == [
        ("", 1, 1), ("def first", 4, 6), ("class Big", 9, 10), ("class Big > def one", 12, 25),
        ("class Big > def two", 27, 40), ("", 43, 43),
    ]  # fmt: skip


def test_code_of_other_languages_is_divided_where_functions_begin() -> None:
    code = "#include <a.h>\n\n/* Adds. */\nint add(int a)\n{\n    int b;\n\n    return a;\n}\n\n"
    code += "static void other(void) {\n}\n"
    assert [(each.heading, each.first, each.last) for each in passages_of("a.c", code.encode())] == [
        ("#include <a.h>", 1, 1), ("/* Adds. */", 3, 9), ("static void other(void)", 11, 12),
    ]  # fmt: skip


@pytest.mark.parametrize("code", ["def f(:\n  x\n", "(" * 5000, "x = 1\0\n", "'\\d'\n"])
def test_python_that_cannot_be_parsed_is_code_all_the_same(code: str) -> None:
    assert letters(
        "".join(each.text for each in passages_of("a.py", (code + "# \n").encode().replace(b"\0", b"")))
    ) == (letters(code.replace("\0", "") + "#"))


def test_a_binary_file_is_said_to_be_one() -> None:
    with pytest.raises(ValueError, match="is binary"):
        passages_of("a.txt", b"\x7fELF\0\0\1")


def headings(text: str, html: bool = False) -> list[tuple[str, str]]:
    return [(each.heading, each.text) for each in (html_blocks if html else markdown_blocks)(text)]


def test_headings_of_one_level_stand_beside_each_other_whatever_their_level_is() -> None:
    assert headings("## A\n\na\n\n## B\n\nb\n\n#### C\n\nc\n\n### D\n\nd") == [
        ("A", "a"), ("B", "b"), ("B > C", "c"), ("B > D", "d"),
    ]  # fmt: skip
    assert headings("<h2>A</h2>a<h2>B</h2>b<h4>C</h4>c<h3>D</h3>d", html=True) == [
        ("A", "a"), ("B", "b"), ("B > C", "c"), ("B > D", "d"),
    ]  # fmt: skip


def test_a_heading_with_nothing_below_it_is_a_passage() -> None:
    text = "# Questions\n\n## Is 42 supported?\n\n## Yes, it is\n\nIndeed.\n\n# The end"
    expected = [("Questions", "Is 42 supported?"), ("Questions > Yes, it is", "Indeed."), ("", "The end")]
    assert headings(text) == expected
    page = "<title>Page</title><h1>Questions</h1><h2>Is 42 supported?</h2><h2>Yes, it is</h2>Indeed.<h1>The end</h1>"
    assert headings(page, html=True) == expected


def test_what_only_looks_like_a_heading_or_a_fence() -> None:
    assert headings("---\ntitle: A\ntags:\n- cats\n---\nText") == [("", "title: A\ntags:\n- cats"), ("", "Text")]
    assert headings("# T\n\n- cats\n---\nText")[0] == ("T", "- cats\n---\nText")
    assert headings("> said\n---\nText")[0] == ("", "> said\n---\nText")
    assert headings("---\n\nText") == [("", "---"), ("", "Text")], "a line, and no settings"
    assert headings("```make``` builds it.\n\n# B\n\nb") == [("", "```make``` builds it."), ("B", "b")]


@pytest.mark.parametrize(
    ("line", "heading"),
    [
        ("# a", "a"), ("# a #", "a"), ("# a##", "a##"), ("# a # b ##\t", "a # b"), ("#\t", ""), ("## ##", ""),
        ("# #a", "#a"), ("# a \\#", "a \\#"), (f"# a{' ' * 1_000_000}x", "a x"), (f"# {'#' * 1_000_000}x", "#" * 200),
        ("# " + "a # " * 250_000, ("a # " * 50)),
    ],
)  # fmt: skip
def test_headings_of_markdown(line: str, heading: str) -> None:
    """In time that grows with their length: the long ones would take hours."""
    assert [each.heading for each in markdown_blocks(f"{line}\n\ntext")] == [heading]


def test_python_that_is_too_long_to_parse_is_divided_as_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_blocks, "_MOST_PARSED", 40)
    for length in (40, 41):
        source = f"import os\n\n\ndef f():\n    return os{' ' * length}"[:length]
        headings = [each.heading for each in passages_of("a.py", source.encode())]
        assert headings == (["", "def f"] if length == 40 else ["import os", "def f()"])
