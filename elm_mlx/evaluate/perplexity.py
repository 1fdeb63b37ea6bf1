"""Text in windows: each token is predicted once, from at least so many tokens before it.

Bits a byte are for comparing models whose tokenizers differ: the bytes are the text's own. Knows files of text and
how windows slide; nothing of models.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from elm_mlx import reading
from elm_mlx.data import data_files
from elm_mlx.data.data_files import BadRecord
from elm_mlx.errors import InputError
from elm_mlx.evaluate import tokens
from elm_mlx.evaluate.scores import Score
from elm_mlx.evaluate.tokens import Encoder, Scored
from elm_mlx.text.tokenizer import check_unicode


@dataclass(frozen=True)
class Text:
    """Windows over all documents of a file.

    Attributes:
        windows: each with what is scored in it.
        documents: which document each window is of.
        bytes: of each document, in UTF-8.
        digest: of all the documents, whatever the tokenizer.
    """

    windows: list[Scored]
    documents: list[int]
    bytes: list[int]
    digest: str


def read(path: Path, tokenizer: Encoder, window: int, stride: int) -> Text:
    """A `.txt` file as one document, `.jsonl` as one for each object with a `text`; packed ones too.

    Args:
        window: tokens read at once.
        stride: tokens scored in each window but the first; all before them is context.

    Raises:
        InputError: the file cannot be read, holds no text, or the stride does not fit the window.
    """
    if not 1 <= stride <= window:
        raise InputError(f"--stride {stride}: must lie between 1 and the window, {window}")
    windows: list[Scored] = []
    documents: list[int] = []
    sizes: list[int] = []
    state = hashlib.blake2b(digest_size=8)
    for number, document in enumerate(_documents(path)):
        data = document.encode()
        sizes.append(len(data))
        state.update(len(data).to_bytes(8, "little") + data)
        for scored in slide(tokens.begun(document, tokenizer), window, stride):
            windows.append(scored)
            documents.append(number)
    if not windows:
        raise InputError(f"{path}: holds no text")
    return Text(windows, documents, sizes, state.hexdigest())


def slide(ids: Sequence[int], window: int, stride: int) -> Iterator[Scored]:
    """Windows over `ids`: all but the first id is scored once, and no more than `window` are read for it."""
    end = 1
    while end < len(ids):
        scored = min(stride if end > 1 else window, len(ids) - end)
        end += scored
        start = max(0, end - 1 - window)
        yield Scored(list(ids[start:end]), end - start - scored)


def shares(text: Text, logprobs: Sequence[float]) -> list[float]:
    """Each document's part in `bits_per_byte`, times their number: values whose mean it is; of one alone nothing.

    Two models' can be compared document by document, as they share the bytes.
    """
    nats = _by_document(text, logprobs)
    count, total = len(nats), sum(text.bytes)
    return [-each / math.log(2) * count / total for each in nats] if count > 1 else []


def bits_per_byte(text: Text, logprobs: Sequence[float]) -> Score:
    """Over all documents; the standard error is over documents as the units that vary, where there are several."""
    nats = _by_document(text, logprobs)
    total = sum(text.bytes)
    value = -sum(nats) / total / math.log(2)
    count = len(nats)
    if count < 2:
        return Score(value, None, count)
    # Of a ratio of sums, to first order.
    rest = [-each / math.log(2) - value * size for each, size in zip(nats, text.bytes, strict=True)]
    return Score(value, math.sqrt(count / (count - 1) * sum(each**2 for each in rest)) / total, count)


def perplexity(text: Text, logprobs: Sequence[float]) -> Score:
    """Of the model's own tokens: not to be compared between tokenizers."""
    tokens = sum(len(each.ids) - each.start for each in text.windows)
    return Score(math.exp(min(700.0, -sum(logprobs) / tokens)), None, len(text.bytes))


def _by_document(text: Text, logprobs: Sequence[float]) -> list[float]:
    nats = [0.0] * len(text.bytes)
    for document, value in zip(text.documents, logprobs, strict=True):
        nats[document] += value
    return nats


def _documents(path: Path) -> Iterator[str]:
    suffix = data_files.suffix_of(path, (*data_files.TEXT, *data_files.JSON))
    if suffix in data_files.TEXT:
        with data_files.opened(path) as file:
            yield reading.decoded(data_files.whole(path, file), str(path))
        return
    for number, value in data_files.values(path):
        if isinstance(value, BadRecord):
            raise InputError(f"{path}, line {number}: {value}")
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise InputError(f"{path}, line {number}: no object with a text `text`")
        try:
            check_unicode(value["text"])
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        yield value["text"]
