"""Questions and texts as token ids: a continuation is scored after its context, a text in windows.

Questions are cut into context and continuation as LM Evaluation Harness cuts them. A text's perplexity is that of the
model's own tokens; bits per byte compare models whose tokenizers differ, for the bytes are the text's own.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from elm_mlx import reading
from elm_mlx.data import data_files, packed_files
from elm_mlx.data.bad_record import BadRecord, text_of
from elm_mlx.errors import InputError
from elm_mlx.evaluate.scores import Score
from elm_mlx.text.tokenizer import Tokenizer, check_unicode


@dataclass(frozen=True)
class Scored:
    """Token ids, scored from index `start` on, which is at least 1."""

    ids: list[int]
    start: int


def encode(requests: Sequence[tuple[str, str]], tokenizer: Tokenizer, context: int) -> list[Scored]:
    """Encodes pairs of context and continuation, BOS in front, cut from the left to what the model can read.

    Spaces at the context's end go to the continuation. The whole and the context are encoded, and the tokens of the
    whole past the context's number of them are scored, after the context's own tokens (which are not the whole's where
    a token spans the border).

    Args:
        context: tokens that the model can read at once; the last one that is scored is never read.

    Raises:
        InputError: a continuation is longer than that, or has no tokens.
    """
    known: dict[str, list[int]] = {}  # contexts, which choices share
    first = _first(tokenizer)
    found = []
    for text, after in requests:
        bare = text.rstrip()
        if text == "":
            read = [] if first is None else [first]
            scored = tokenizer.encode(after, add_bos=False)
            if not read or (scored and scored[0] == first):
                read, scored = scored[:1], scored[1:]
        else:
            if bare not in known:
                known[bare] = tokenizer.encode(bare)
            read = known[bare]
            scored = tokenizer.encode(text + after)[len(read) :]
        if not scored or not read:
            raise InputError(f"nothing to score in {after[:60]!r} after {text[-60:]!r}")
        if len(scored) > context:
            raise InputError(
                f"an answer of {len(scored)} tokens exceeds the model's context of {context}: {after[:60]!r}"
            )
        ids = (read + scored)[-(context + 1) :]
        found.append(Scored(ids, len(ids) - len(scored)))
    return found


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encodes a text after the token that predicts its first one, as the harness: BOS, or else EOS."""
    ids, first = tokenizer.encode(text), _first(tokenizer)
    return ids if first is None or ids[:1] == [first] else [first, *ids]


def _first(tokenizer: Tokenizer) -> int | None:
    return tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id


def digest(sequences: Sequence[Scored]) -> str:
    """A hash of an item's ids and of which of them are scored."""
    state = hashlib.blake2b(digest_size=8)
    for each in sequences:
        state.update(array("q", [len(each.ids), each.start, *each.ids]).tobytes())
    return state.hexdigest()


@dataclass(frozen=True)
class TextWindows:
    """Windows over all documents of a file. `logprobs` below has the summed log-probability of each window.

    Attributes:
        documents: the number of each window's document.
        bytes: of each document, in UTF-8.
        digest: a hash of all the documents, whatever the tokenizer.
    """

    windows: list[Scored]
    documents: list[int]
    bytes: list[int]
    digest: str

    def bits_per_byte(self, logprobs: Sequence[float]) -> Score:
        """Returns bits per byte over all documents; the standard error is over documents, where there are several."""
        nats, total, count = self._by_document(logprobs), sum(self.bytes), len(self.bytes)
        value = -sum(nats) / total / math.log(2)
        if count < 2:
            return Score(value, None, count)
        # Of a ratio of sums, to first order.
        rest = [-each / math.log(2) - value * size for each, size in zip(nats, self.bytes, strict=True)]
        return Score(value, math.sqrt(count / (count - 1) * sum(each**2 for each in rest)) / total, count)

    def shares(self, logprobs: Sequence[float]) -> list[float]:
        """Returns each document's part in `bits_per_byte`, which is their mean; empty for one document.

        Two models' can be compared document by document, as they share the bytes.
        """
        nats, total, count = self._by_document(logprobs), sum(self.bytes), len(self.bytes)
        return [-each / math.log(2) * count / total for each in nats] if count > 1 else []

    def perplexity(self, logprobs: Sequence[float]) -> Score:
        """Returns the perplexity of the model's own tokens, which cannot be compared between tokenizers."""
        scored = sum(len(each.ids) - each.start for each in self.windows)
        return Score(math.exp(min(700.0, -sum(logprobs) / scored)), None, len(self.bytes))

    def _by_document(self, logprobs: Sequence[float]) -> list[float]:
        nats = [0.0] * len(self.bytes)
        for document, value in zip(self.documents, logprobs, strict=True):
            nats[document] += value
        return nats


def read_text(path: Path, tokenizer: Tokenizer, window: int, stride: int) -> TextWindows:
    """Reads a `.txt` file as one document, `.jsonl` as one for each object with a `text`; packed ones too.

    Args:
        window: tokens read at once.
        stride: tokens scored in each window but the first; all before them is context.

    Raises:
        InputError: the file cannot be read, holds no text, or the stride does not fit the window.
    """
    if not 1 <= stride <= window:
        raise InputError(f"--stride {stride}: must lie between 1 and the window, {window}")
    found = TextWindows([], [], [], "")
    state = hashlib.blake2b(digest_size=8)
    for number, document in enumerate(_documents(path)):
        data = document.encode()
        found.bytes.append(len(data))
        state.update(len(data).to_bytes(8, "little") + data)
        for scored in slide(encode_text(document, tokenizer), window, stride):
            found.windows.append(scored)
            found.documents.append(number)
    if not found.windows:
        raise InputError(f"{path}: holds no text")
    return TextWindows(found.windows, found.documents, found.bytes, state.hexdigest())


def slide(ids: Sequence[int], window: int, stride: int) -> Iterator[Scored]:
    """Windows over `ids`: all but the first id is scored once, and no more than `window` are read for it."""
    end = 1
    while end < len(ids):
        scored = min(stride if end > 1 else window, len(ids) - end)
        end += scored
        start = max(0, end - 1 - window)
        yield Scored(list(ids[start:end]), end - start - scored)


def _documents(path: Path) -> Iterator[str]:
    suffix = data_files.suffix_of(path, (*data_files.TEXT, *data_files.RECORDS))
    if suffix in data_files.TEXT:
        with packed_files.open_file(path) as file:
            yield reading.decoded(packed_files.read_whole(path, file), str(path))
        return
    for where, value in data_files.read_all([path], ("text",)):
        try:
            text = text_of(value, "text")
            check_unicode(text)
        except (BadRecord, InputError) as error:
            raise InputError(f"{where}: {error}") from None
        yield text
