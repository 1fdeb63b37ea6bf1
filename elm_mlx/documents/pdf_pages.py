"""The text of a PDF, a page at a time, by pypdf, which is an extra."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

from elm_mlx.documents.text_blocks import TextBlock

INSTALL = "PDF needs pypdf: pip install 'elm-mlx[pdf]'"
_MOST_PAGES = 10_000


def pdf_blocks(data: bytes) -> Iterator[TextBlock]:
    """Yields the text of each page; `first` and `last` of a block are its number.

    Raises:
        ImportError: pypdf is not installed.
        ValueError: it cannot be read; says why.
    """
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it writes of every damage that it can go past
    try:
        document = pypdf.PdfReader(io.BytesIO(data))
        if document.is_encrypted and not document.decrypt(""):
            raise ValueError("is encrypted")
        title = (document.metadata.title if document.metadata else None) or ""
        pages = [page.extract_text() for page in document.pages[:_MOST_PAGES]]
    except ValueError as error:
        raise ValueError(str(error)[:200] or "is damaged") from None
    except Exception as error:  # a damaged file ends in errors of all kinds
        raise ValueError(f"cannot be read as a PDF: {type(error).__name__}: {error}"[:200]) from None
    if not any(page.strip() for page in pages):
        raise ValueError("holds no text, such as a scan")
    heading = " ".join(str(title).split())[:200]
    for number, page in enumerate(pages, 1):
        text = page.encode("utf-8", "replace").decode().replace("\0", "").strip()
        for paragraph in text.split("\n\n"):
            if paragraph.strip():
                yield TextBlock(paragraph.strip("\n"), number, number, heading)
