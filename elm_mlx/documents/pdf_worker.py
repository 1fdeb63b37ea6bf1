"""The process that reads one PDF, by pypdf: a file from anywhere may cost it time and memory without end.

It imports nothing of this package and is run as a file by itself. It reads the PDF from standard input and writes a
JSON object: `title` and `pages`, the text of each, or `problem`. It ends by SIGPROF where a page takes PAGE_SECONDS of
computing or the file FILE_SECONDS, and by an exit code where there is too much memory or text.
"""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import signal
import sys
import time

PAGE_SECONDS, FILE_SECONDS = 20.0, 300.0  # of computing
MOST_PAGES = 10_000
MOST_TEXT = 64 << 20  # characters

TOO_MUCH_MEMORY, TOO_MUCH_TEXT = 3, 4  # exit codes


def main() -> None:
    """Arguments: seconds of a page; bytes of data, 0 where they are watched from outside; where to import from."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    sys.path += sys.argv[3:]
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it writes of every damage that it can go past
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))
    if memory:
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    end = time.process_time() + FILE_SECONDS

    def begin_page() -> None:
        signal.setitimer(signal.ITIMER_PROF, max(1e-3, min(seconds, end - time.process_time())))

    answer: dict[str, object]
    try:
        begin_page()
        document = pypdf.PdfReader(io.BytesIO(sys.stdin.buffer.read()))
        if document.is_encrypted and not document.decrypt(""):
            raise ValueError("is encrypted")
        title = str((document.metadata.title if document.metadata else None) or "")
        pages: list[str] = []
        size = 0
        for page in document.pages[:MOST_PAGES]:
            begin_page()
            pages.append(page.extract_text())
            size += len(pages[-1])
            if size > MOST_TEXT:
                os._exit(TOO_MUCH_TEXT)
        answer = {"title": title[:1000], "pages": pages}
        begin_page()
    except MemoryError:
        os._exit(TOO_MUCH_MEMORY)
    except ValueError as error:
        answer = {"problem": str(error)[:200] or "is damaged"}
    except Exception as error:  # a damaged file ends in errors of all kinds
        answer = {"problem": f"cannot be read as a PDF: {type(error).__name__}: {error}"[:200]}
    try:
        sys.stdout.write(json.dumps(answer))
        sys.stdout.flush()
    except MemoryError:
        os._exit(TOO_MUCH_MEMORY)
    os._exit(0)  # what a huge document is made of is not taken apart


if __name__ == "__main__":
    main()
