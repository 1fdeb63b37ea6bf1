"""The text of PDFs, which the test writes itself, and of files that only call themselves so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from elm_mlx.documents.indexing import index_documents
from elm_mlx.documents.passages import passages_of
from elm_mlx.documents.retrieval import DocumentIndex
from elm_mlx.documents.text_blocks import TextBlock


def pdf(*pages: str, title: str = "") -> bytes:
    """A PDF of pages with a line of text each, as its standard (ISO 32000) has it."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects.append(f"<< /Title ({title}) >>")
    data, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{each}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(places) + 1} /Root 1 0 R "
    return data + f"{end}/Info {len(places)} 0 R >>\nstartxref\n{len(data)}\n%%EOF\n".encode()


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
