"""`elm-mlx index`: an index of documents, for `generate`, `chat` and `serve` to answer from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from elm_mlx.cli.screen import ProgressBar, counted, line, note
from elm_mlx.reading import expanded

_NAMED = 10  # files that are left out, one by one


def index(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The documents: text, Markdown, HTML, PDF, code.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The index to make, or to bring up to date.")],
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Static embeddings, a directory or OWNER/NAME on the hub: find by vectors too. (default: words alone)",
        ),
    ] = None,
) -> None:
    """Index documents, for --docs of generate, chat and serve to answer from. Only what has changed is read again."""
    from elm_mlx.documents.indexing import index_documents

    vectors = None
    with ProgressBar("bytes") as progress:
        if embeddings is not None:
            from elm_mlx.documents.static_embeddings import StaticEmbeddings, embeddings_directory

            vectors = StaticEmbeddings(embeddings_directory(embeddings, progress))
    with ProgressBar("items") as progress:
        report = index_documents(directory, out, vectors, progress)
    for each in report.left_out[:_NAMED]:
        note(f"{each.path}: left out: {each.why}")
    if len(report.left_out) > _NAMED:
        reasons = Counter(each.why for each in report.left_out[_NAMED:])
        note(f"and {counted(sum(reasons.values()), 'file')} more: {'; '.join(reasons)}")
    line(
        f"{counted(report.files, 'file')}: {report.added} new, {report.changed} changed, {report.unchanged} as before, "
        f"{report.removed} gone | {counted(report.passages, 'passage')} | {expanded(out)}"
    )
