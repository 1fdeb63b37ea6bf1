"""The text of a PDF, a page at a time, by pypdf, which is an extra, in a process with limits, `pdf_worker`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from elm_mlx.documents import pdf_worker
from elm_mlx.documents.text_blocks import TextBlock
from elm_mlx.reading import printable
from elm_mlx.text import child_process

INSTALL = "PDF needs pypdf: pip install 'elm-mlx[pdf]'"
SECONDS = pdf_worker.PAGE_SECONDS
MEMORY = 1 << 30  # bytes that the process may take, of which the file may have a quarter

_POLL = 0.05  # seconds between looks at it, where the kernel limits no memory


def pdf_blocks(data: bytes) -> Iterator[TextBlock]:
    """Yields the text of each page; `first` and `last` of a block are its number.

    Raises:
        ImportError: pypdf is not installed.
        ValueError: it cannot be read, or not within limits of time, memory and text; says why.
        ElmError: the process does not start.
    """
    import pypdf  # noqa: F401  as the process will

    document = _read(data)
    if "problem" in document:
        raise ValueError(printable(document["problem"]))
    pages = document["pages"]
    if not any(page.strip() for page in pages):
        raise ValueError("holds no text, such as a scan")
    heading = " ".join(document["title"].split())[:200]
    for number, page in enumerate(pages, 1):
        text = page.encode("utf-8", "replace").decode().replace("\0", "").strip()
        for paragraph in text.split("\n\n"):
            if paragraph.strip():
                yield TextBlock(paragraph.strip("\n"), number, number, heading)


def _read(data: bytes) -> dict[str, Any]:
    """Returns what the process says of a PDF. Raises ValueError where it was ended."""
    watched = not child_process.KERNEL_LIMITS_MEMORY
    limits = [str(SECONDS), str(0 if watched else MEMORY)]
    command = [sys.executable, "-I", "-S", pdf_worker.__file__, *limits, *sys.path]
    process = child_process.start(command, "reads PDFs")
    unsent: bytes | None = data
    with process:
        try:
            while True:
                try:
                    written, _ = process.communicate(unsent, _POLL if watched else None)
                    break
                except subprocess.TimeoutExpired:
                    unsent = None  # it has been taken
                    if child_process.footprint(process.pid) > MEMORY:
                        raise ValueError(_reason(pdf_worker.TOO_MUCH_MEMORY)) from None
        except BaseException:
            process.kill()
            raise
    if (code := process.returncode) != 0:
        known = (-signal.SIGPROF, pdf_worker.TOO_MUCH_MEMORY, pdf_worker.TOO_MUCH_TEXT)
        raise (ValueError if code in known else ChildProcessError)(_reason(code))
    document: dict[str, Any] = json.loads(written)
    return document


def _reason(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"takes more than {SECONDS:g} s for a page, or {pdf_worker.FILE_SECONDS:g} s"
    if code == pdf_worker.TOO_MUCH_MEMORY:
        return f"needs more than {MEMORY >> 20} MB"
    if code == pdf_worker.TOO_MUCH_TEXT:
        return f"holds more than {pdf_worker.MOST_TEXT >> 20} million characters"
    return f"ended the process that read it ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
