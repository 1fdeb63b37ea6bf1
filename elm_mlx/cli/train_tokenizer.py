"""`elm-mlx train-tokenizer DATA… --out FILE`: a vocabulary from raw text."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elm_mlx.cli.screen import byte_size, counted, say

if TYPE_CHECKING:
    from elm_mlx.text.tokenizer import Tokenizer
    from elm_mlx.train.vocabulary import LineSample, Measure

_SHOWN = 5  # bad records


def train_tokenizer(
    files: Annotated[
        list[Path], typer.Argument(metavar="DATA...", help="JSON lines or Parquet with `text`, or .txt; .gz of these.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The SentencePiece model to write.")],
    vocab_size: Annotated[int, typer.Option(metavar="N", help="Pieces, with 3 controls and 256 bytes.")] = 32_000,
    max_bytes: Annotated[int, typer.Option(metavar="N", help="Bytes of text to sample for training.")] = 100_000_000,
    seed: Annotated[int, typer.Option(help="The same seed draws the same sample.")] = 0,
    character_coverage: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of characters with a piece of their own; the rest is bytes.")
    ] = 0.99995,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure this tokenizer on the same lines too.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad records out; the first are named.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file at --out.")] = False,
) -> None:
    """Train a tokenizer on raw text: SentencePiece BPE with byte fallback, as Llama 2's."""
    from elm_mlx.text.tokenizer import Tokenizer
    from elm_mlx.train import vocabulary

    other = None if compare is None else Tokenizer.load(compare)
    vocabulary.check_destination(out, overwrite)
    with _interruptible():
        sample = vocabulary.sample(files, max_bytes=max_bytes, seed=seed, skip_bad=skip_bad)
        _print_sample(sample, len(files))
        start = time.perf_counter()
        tokenizer = vocabulary.train(
            sample, out, vocab_size=vocab_size, character_coverage=character_coverage, overwrite=overwrite
        )
        say("trained", f"{tokenizer.vocab_size:,} pieces in {time.perf_counter() - start:.1f} s")
        if sample.held_out:
            _print_measure("measured", vocabulary.measure(tokenizer, sample.held_out), tokenizer)
            if other is not None:
                _print_measure("compared", vocabulary.measure(other, sample.held_out), other)
    say("wrote", str(out))


def _print_sample(sample: LineSample, files: int) -> None:
    say("read", f"{byte_size(sample.nbytes)} of text, {counted(sample.texts, 'record')} in {counted(files, 'file')}")
    for line in sample.bad[:_SHOWN]:
        say("bad", line)
    if len(sample.bad) > _SHOWN:
        say("bad", f"{len(sample.bad) - _SHOWN:,} more")
    say("sample", f"{byte_size(sum(map(len, sample.lines)))}, {counted(len(sample.lines), 'line')}")
    held_out = f"{byte_size(sum(map(len, sample.held_out)))}, {counted(len(sample.held_out), 'line')}, for measuring"
    say("held out", held_out if sample.held_out else "nothing: there are too few lines")


def _print_measure(name: str, measure: Measure, tokenizer: Tokenizer) -> None:
    share = measure.byte_tokens / max(1, measure.tokens)
    say(name, f"{measure.bytes_per_token:.3f} bytes a token (bytes alone: 1), {share:.2%} of the tokens are bytes")
    say("", f"{tokenizer.path}; {measure.returned:,} of {measure.lines:,} lines decode to themselves")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the process at once: SentencePiece works for minutes without a look at Python's signals."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
