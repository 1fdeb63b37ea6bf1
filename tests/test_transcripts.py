"""What benchmarks/transcripts.py makes of a page: outputs replaced, dots kept, all else as it was."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

TRANSCRIPTS = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "transcripts.py"))


@pytest.mark.parametrize(
    ("old", "kept"),
    [
        ("…\n", "…\n"),
        ("a\n…\n", "1\n…\n"),
        ("…\nb\nc\n", "…\n4\n5\n"),
        ("a\n...\nb\n", "1\n…\n5\n"),
        ("a\nb\nc\n…\nd\n", "1\n2\n3\n…\n5\n"),
        ("a\nb\nc\n…\nd\ne\n", "1\n2\n3\n4\n5\n"),  # nothing is left to leave out
        ("…", "…\n"),
    ],
)
def test_as_much_is_left_out_as_was(old: str, kept: str) -> None:
    assert TRANSCRIPTS["shortened"]("1\n2\n3\n4\n5\n", old if old.endswith("\n") else f"{old}\n") == kept


def test_a_page_is_made_again(tmp_path: Path) -> None:
    page = """# A page
<!-- made by:
echo 'two  ' > note
-->
Before.

```console
$ cat note
one
$ seq 9
1
…
7
8
$ false
no longer said
```

```
$ cat sample
```
"""
    made = TRANSCRIPTS["remade"](page, tmp_path)
    assert made == page.replace("\none\n", "\ntwo\n").replace("7\n8\n", "8\n9\n").replace("no longer said\n", "")
    assert (tmp_path / "build" / "classics" / "model.safetensors").is_file()


def test_a_page_whose_needs_are_not_there_is_left_alone(tmp_path: Path) -> None:
    page = "# A page\n<!-- made by:\nln -s $SHARED/eval eval\n-->\n\n```console\n$ ls eval\n```\n"
    assert TRANSCRIPTS["remade"](page, tmp_path, tmp_path / "none") is None


def test_what_the_page_needs_and_cannot_be_made_is_said(tmp_path: Path) -> None:
    page = "# A page\n<!-- made by:\ncat nothing\ntrue\n-->\n\n```console\n$ ls\n```\n"
    with pytest.raises(SystemExit, match="cannot be made"):
        TRANSCRIPTS["remade"](page, tmp_path)
