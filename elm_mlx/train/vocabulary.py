"""A SentencePiece vocabulary trained on raw text: BPE with byte fallback, by the rules of Llama 2's tokenizer.

A file is read once, as a stream; memory holds the sample, and while SentencePiece works some five times
as much. Equal data, seed and settings give equal bytes, on any machine.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from elm_mlx.data import data_files, packed_files
from elm_mlx.data.bad_record import BadRecord, text_of
from elm_mlx.data.text_sources import SUFFIXES
from elm_mlx.directories import check_file
from elm_mlx.errors import ElmError, InputError
from elm_mlx.files import new_file
from elm_mlx.text import sentencepiece_file
from elm_mlx.text.tokenizer import Tokenizer

# One line in a hundred is for measuring, up to a megabyte.
_HELD_OUT, _HELD_OUT_BYTES = 0.01, 1_000_000
# SentencePiece passes over lines that are longer, so longer ones are cut.
_LINE_BYTES = 4192
# As in Llama 2's model file. The number of threads is SentencePiece's own: it stands in the file and must not depend
# on the machine.
_SETTINGS = {
    "model_type": "bpe", "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True,
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": True,
    "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "max_sentence_length": _LINE_BYTES,
}  # fmt: skip


@dataclass(frozen=True)
class LineSample:
    """Lines of UTF-8 drawn from data, in the order in which they stand there.

    Attributes:
        lines: to train on.
        held_out: to measure on; none of them is among `lines`, though its like may be.
        texts, nbytes: in the data, before anything was drawn.
        bad: of each record that is not whole, where it stands and what is wrong.
    """

    lines: Sequence[bytes] = field(repr=False)
    held_out: Sequence[bytes] = field(repr=False)
    texts: int
    nbytes: int
    bad: tuple[str, ...]


@dataclass(frozen=True)
class Measure:
    """A tokenizer measured on some lines.

    Attributes:
        nbytes: of the lines.
        tokens: without BOS.
        byte_tokens: those that stand for a single byte, as no piece had the character.
        returned: how many lines are the same once encoded and decoded.
    """

    lines: int
    nbytes: int
    tokens: int
    byte_tokens: int
    returned: int

    @property
    def bytes_per_token(self) -> float:
        return self.nbytes / self.tokens if self.tokens else 0.0


def sample(files: Sequence[Path], *, max_bytes: int = 100_000_000, seed: int = 0, skip_bad: bool = False) -> LineSample:
    """Draws lines from data, each with the same chance, until `max_bytes` are full.

    Args:
        files: JSON lines or a JSON array of `{"text": …}`, Parquet with such a column, or text; all but Parquet
            may be packed by gzip or Zstandard.
        skip_bad: leave out records that are not whole, and name them; otherwise the first is an error.

    Raises:
        InputError: a file cannot be read, or holds a record that is not whole; or there is no text.
        ElmError: Parquet, and pyarrow is not installed.
    """
    if max_bytes < 1:
        raise InputError(f"--max-bytes {max_bytes}: must be 1 or more")
    for path in files:
        if not path.is_file():
            what = "is a directory: name the files in it" if path.is_dir() else "no such file"
            raise InputError(f"{path}: {what}")
    draw = random.Random(seed).random
    chosen, held_out = _Reservoir(max_bytes), _Reservoir(_HELD_OUT_BYTES)
    texts = nbytes = 0
    bad: list[str] = []
    for path in files:
        for where, value in _texts(path):
            try:
                text = _utf8(value)
            except BadRecord as error:
                if not skip_bad:
                    raise InputError(f"{where}: {error}; --skip-bad leaves such records out") from None
                bad.append(f"{where}: {error}")
                continue
            texts += 1
            nbytes += len(text)
            for line in _lines(text):
                lot = draw()
                (held_out if lot < _HELD_OUT else chosen).add(lot, line)
    if not chosen.nbytes:
        raise InputError(f"{', '.join(map(str, files)) or 'no file'}: no text to train on")
    return LineSample(chosen.lines(), held_out.lines(), texts, nbytes, tuple(bad))


def train(
    sample: LineSample, path: Path, *, vocab_size: int, character_coverage: float = 0.99995, overwrite: bool = False
) -> Tokenizer:
    """Trains a vocabulary and writes it as SentencePiece's model file, whole or not at all.

    Ids are Llama's: 0 unknown, 1 BOS, 2 EOS, then 256 bytes, merges in their order, single characters.

    Args:
        vocab_size: the number of all of these.
        character_coverage: the share of the sample's characters that get a piece of their own; the rarest are spelt
            in bytes.
        overwrite: replace the file that is there.

    Raises:
        InputError: the sample cannot give so many pieces, or needs more.
        ElmError: the file cannot be written, or SentencePiece fails otherwise.
    """
    check_destination(path, overwrite)
    if vocab_size < 1:
        raise InputError(f"--vocab-size {vocab_size}: must be 1 or more")
    if not 0.98 <= character_coverage <= 1:  # SentencePiece's own limits
        raise InputError(f"--character-coverage {character_coverage:g}: must be from 0.98 to 1")
    data = _trained(sample.lines, vocab_size, character_coverage)
    with new_file(path) as file:
        file.write(data)
    return Tokenizer.load(path)


def check_destination(path: Path, overwrite: bool) -> None:
    """Raises InputError where no file can be written, before hours of work rather than after."""
    check_file(path, overwrite)
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no directory {path.parent}")


def measure(tokenizer: Tokenizer, lines: Sequence[bytes]) -> Measure:
    """Encodes and decodes every line."""
    byte_ids = {
        token
        for token, piece in enumerate(sentencepiece_file.read(tokenizer.path).pieces())
        if piece.type == sentencepiece_file.BYTE
    }
    tokens = byte_tokens = returned = 0
    for line in lines:
        text = line.decode("utf-8")
        ids = tokenizer.encode(text, add_bos=False)
        tokens += len(ids)
        byte_tokens += sum(token in byte_ids for token in ids)
        returned += tokenizer.decode(ids) == text
    return Measure(len(lines), sum(map(len, lines)), tokens, byte_tokens, returned)


class _Reservoir:
    """Keeps the lines with the lowest random numbers, as many as fit."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bound = limit, 1.0
        self._heap: list[tuple[float, int, bytes]] = []  # the highest lot on top
        self._seen = 0
        self.nbytes = 0

    def add(self, lot: float, line: bytes) -> None:
        self._seen += 1
        if lot >= self._bound:
            return
        heappush(self._heap, (-lot, self._seen, line))
        self.nbytes += len(line)
        while self.nbytes > self._limit:
            highest, _, dropped = heappop(self._heap)
            self._bound = -highest  # nor is there room, from now on, for any higher one: length gives no advantage
            self.nbytes -= len(dropped)

    def lines(self) -> list[bytes]:
        return [line for _, _, line in sorted(self._heap, key=lambda entry: entry[1])]


def _texts(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields each text in the file with its place, as `_utf8` takes them; of a text file, each line."""
    if data_files.suffix_of(path, SUFFIXES) in data_files.TEXT:
        with packed_files.open_file(path) as file:
            yield from ((f"{path}, line {line}", data) for line, data in packed_files.lines(path, file))
    else:
        yield from ((where, value) for _, where, value in data_files.read(path, ("text",)))


def _utf8(value: Any) -> bytes:
    """Returns a line, or the text of a record. Raises BadRecord."""
    try:
        if not isinstance(value, bytes):
            return text_of(value, "text").encode("utf-8")
        value.decode("utf-8")
        return value
    except UnicodeEncodeError as error:
        raise BadRecord(f"not valid Unicode: character {error.start + 1} is half of a surrogate pair") from None
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start + 1} of the line") from None


def _lines(text: bytes) -> Iterator[bytes]:
    """Yields the lines of a text that are not blank; long ones cut at a space, or else between characters."""
    for line in text.split(b"\n"):
        line = line.removesuffix(b"\r")
        while len(line) > _LINE_BYTES:
            end = line.rfind(b" ", 1, _LINE_BYTES + 1)
            begin = end + 1
            if end < 0:
                end = _LINE_BYTES
                while line[end] & 0xC0 == 0x80:
                    end -= 1
                begin = end
            if line[:end].strip():
                yield line[:end]
            line = line[begin:]
        if line.strip():
            yield line


def _trained(lines: Sequence[bytes], vocab_size: int, character_coverage: float) -> bytes:
    """Trains a vocabulary and returns the model file's bytes."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=written, vocab_size=vocab_size,
            character_coverage=character_coverage, minloglevel=2, **_SETTINGS,
        )  # fmt: skip
    except (RuntimeError, OSError, ValueError) as error:
        raise _explained(" ".join(str(error).split()), vocab_size) from None
    return written.getvalue()


def _explained(reason: str, vocab_size: int) -> ElmError:
    """Returns SentencePiece's reason in the words of the command's options."""
    asked = f"--vocab-size {vocab_size}"
    if most := re.search(r"Please set it to a value <= (\d+)", reason):
        return InputError(
            f"{asked}: the data gives at most {most[1]} pieces; give --vocab-size {most[1]} or less (a megabyte of "
            "text does with 4096), or more data"
        )
    if least := re.search(r"smaller than required_chars\. -?\d+ vs (\d+)", reason):
        return InputError(
            f"{asked}: control pieces, 256 bytes and the data's characters are {least[1]}; ask for more, or lower "
            "--character-coverage"
        )
    return ElmError(f"{asked}: SentencePiece failed: {reason}")
