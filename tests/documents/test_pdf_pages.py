"""The text of PDFs, which the test writes itself, and of files that only call themselves so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pdf_files import pdf

from elm_mlx.documents import pdf_pages
from elm_mlx.documents.indexing import index_documents
from elm_mlx.documents.passages import passages_of
from elm_mlx.documents.retrieval import DocumentIndex
from elm_mlx.documents.text_blocks import TextBlock
from elm_mlx.text import child_process


def test_pages_and_the_title() -> None:
    assert passages_of("a.PDF", pdf("First page", "Second page", title="A report")) == [
        TextBlock("First page\nSecond page", 1, 2, "A report")
    ]
    assert [(each.first, each.last) for each in passages_of("a.pdf", pdf("one " * 180, "two " * 180))] == [
        (1, 1),
        (2, 2),
    ]


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "cannot be read"), (b"no pdf", "cannot be read"), (pdf("a")[:300], "cannot be read"), (pdf(""), "no text")],
)
def test_what_cannot_be_read_is_said(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        passages_of("a.pdf", data)


BUSY = b"BT /F1 12 Tf " + b"72 720 Td (a) Tj " * 60_000 + b"ET"
HUGE = b"BT /F1 12 Tf (" + b"a" * 30_000_000 + b") Tj ET"


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("limits", "stream", "why"),
    [
        ({"SECONDS": 0.2}, BUSY, r"takes more than 0.2 s for a page"),
        ({"MEMORY": 120 << 20}, HUGE, "needs more than 120 MB"),
    ],
)
def test_a_hostile_pdf_is_left_out_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool, limits: dict[str, float], stream: bytes, why: str
) -> None:
    monkeypatch.setattr(child_process, "KERNEL_LIMITS_MEMORY", kernel and child_process.KERNEL_LIMITS_MEMORY)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.pdf").write_bytes(pdf(stream=stream))
    (tmp_path / "notes" / "b.pdf").write_bytes(pdf("banana"))
    with monkeypatch.context() as context:
        for name, value in limits.items():
            context.setattr(pdf_pages, name, value)
        report = index_documents(tmp_path / "notes", tmp_path / "notes.db")
    assert report.added == 1 and [each.path for each in report.left_out] == ["a.pdf"]
    assert re.match(why, report.left_out[0].why) and "\n" not in report.left_out[0].why
    again = index_documents(tmp_path / "notes", tmp_path / "notes.db")  # which does not try it once more
    assert again.unchanged == 1 and again.left_out == report.left_out


def test_a_process_that_somebody_ended_says_nothing_of_its_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, out = tmp_path / "notes", tmp_path / "notes.db"
    notes.mkdir()
    (notes / "a.pdf").write_bytes(pdf("apple"))
    index_documents(notes, out)
    (notes / "a.pdf").write_bytes(pdf("banana"))
    with monkeypatch.context() as context:
        context.setattr(pdf_pages, "_read", lambda *_: (_ for _ in ()).throw(ChildProcessError("signal 9")))
        report = index_documents(notes, out)
        assert [each.why for each in report.left_out] == ["signal 9"]
        assert len(DocumentIndex(out).search("apple")) == 1, "what was read before stays"
    assert index_documents(notes, out).changed == 1
    assert len(DocumentIndex(out).search("banana")) == 1


def test_a_pdf_that_is_deflated_is_read() -> None:
    assert [each.text for each in passages_of("a.pdf", pdf(stream=b"BT /F1 12 Tf 72 720 Td (pear) Tj ET"))] == ["pear"]


def test_a_pdf_waits_for_pypdf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: Callable[[str], None]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.pdf").write_bytes(pdf("apple", "banana " * 200))
    out = tmp_path / "notes.db"
    with monkeypatch.context() as context:
        without("pypdf")
        assert "pip install 'elm-mlx[pdf]'" in index_documents(tmp_path / "notes", out).left_out[0].why
        context.undo()
    monkeypatch.undo()
    assert index_documents(tmp_path / "notes", out).added == 1
    assert [each.place for each in DocumentIndex(out).search("apple")] == ["a.pdf, page 1"]
