"""What a SentencePiece model file says of itself, read without protobuf.

Knows protobuf's wire format and the few fields that matter here. Knows nothing of tokenizing: that is the
sentencepiece library's, which keeps the normalizer's settings and the pieces' types to itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elm_mlx import reading
from elm_mlx.errors import InputError

# ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# TrainerSpec.ModelType
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4

# The largest in the wild (256,000 pieces) has 4 MB. What is far above is something else, say the weights.
MAX_BYTES = 64 << 20

Value = int | tuple[int, int]  # a number, or from where to where bytes lie


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; `score` orders merges (BPE) or is a log probability (unigram)."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class ModelFile:
    """A model file's own description. Absent fields have the defaults of SentencePiece's format.

    Args:
        data: the file's bytes.
        vocab_size: the number of pieces.
        charsmap: SentencePiece's compiled normalization rules; empty for the identity.
        denormalizes: decoded text is rewritten by rules, too.
    """

    path: Path
    data: bytes = field(repr=False)
    vocab_size: int
    model_type: int
    byte_fallback: bool
    whitespace_as_suffix: bool
    unknown_surface: str
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    charsmap: bytes = field(repr=False)
    denormalizes: bool

    def pieces(self) -> list[Piece]:
        """Every piece, by id. Raises InputError when one is malformed."""
        try:
            fields = _fields(self.data, 0, len(self.data))
            return [_piece(self.data, *span) for number, span in fields if number == 1 and isinstance(span, tuple)]
        except _Malformed as error:
            raise InputError(f"{self.path}: not a SentencePiece model: {error}") from None


def read(path: Path) -> ModelFile:
    """The description that the file at `path` holds; pieces are counted, and parsed when asked for.

    Raises:
        InputError: it is missing, cut short, or no SentencePiece model.
    """
    data = reading.content(path, MAX_BYTES)
    if data[:1] != b"\n":  # the tag of the first piece
        raise InputError(f"{path}: {'not a SentencePiece model' if data else 'empty'}")
    try:
        return _parse(path, data)
    except _Malformed as error:
        raise InputError(f"{path}: not a whole SentencePiece model: {error}; fetch it again") from None


def _parse(path: Path, data: bytes) -> ModelFile:
    vocab_size, position = _skip_pieces(data)
    messages: dict[int, dict[int, Value]] = {}
    for number, value in _fields(data, position, len(data)):
        if number == 1:
            vocab_size += 1
        elif number in (2, 3, 5) and isinstance(value, tuple):
            messages.setdefault(number, {}).update(_fields(data, *value))
    # SentencePiece itself takes a file without them, and then tokenizes by other rules than it was trained with.
    if 2 not in messages or 3 not in messages:
        raise _Malformed(f"it breaks off at byte {len(data)}, before the settings that follow the pieces")
    trainer, normalizer, denormalizer = messages[2], messages[3], messages.get(5, {})
    return ModelFile(
        path=path,
        data=data,
        vocab_size=vocab_size,
        model_type=_number(trainer, 3, UNIGRAM),
        byte_fallback=bool(_number(trainer, 35, 0)),
        whitespace_as_suffix=bool(_number(trainer, 24, 0)),
        unknown_surface=_bytes(data, trainer.get(44), " \u2047 ".encode()).decode("utf-8", "replace"),
        add_dummy_prefix=bool(_number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1)),
        escape_whitespaces=bool(_number(normalizer, 5, 1)),
        charsmap=_bytes(data, normalizer.get(2), b""),
        denormalizes=_bytes(data, denormalizer.get(2), b"") != b"",
    )


def _skip_pieces(data: bytes) -> tuple[int, int]:
    """How many pieces the file opens with, and where they end: ten thousands, nearly all under 128 bytes."""
    count = position = 0
    try:
        while data[position] == 0x0A and (size := data[position + 1]) < 0x80:
            position += 2 + size
            count += 1
    except IndexError:
        raise _Malformed(f"it breaks off at byte {len(data)}") from None
    return count, position


def _piece(data: bytes, start: int, stop: int) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for number, value in _fields(data, start, stop):
        if number == 1 and isinstance(value, tuple):
            text = data[slice(*value)]
        elif number == 2 and isinstance(value, int):
            score = struct.unpack("<f", (value & 0xFFFFFFFF).to_bytes(4, "little"))[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    try:
        return Piece(text.decode("utf-8"), score, kind)
    except UnicodeDecodeError:
        raise _Malformed(f"the piece at byte {start} is no UTF-8") from None


class _Malformed(Exception):
    """The bytes are no protobuf message."""


def _fields(data: bytes, position: int, stop: int) -> Iterator[tuple[int, Value]]:
    """Each field's number and value in the message at `data[position:stop]`."""
    while position < stop:
        key, position = _varint(data, position, stop)
        value: Value
        if key & 7 == 0:
            value, position = _varint(data, position, stop)
        elif key & 7 == 2:
            size, start = _varint(data, position, stop)
            position = start + size
            value = (start, position)
        elif key & 7 in (1, 5):
            size = 8 if key & 7 == 1 else 4
            value = int.from_bytes(data[position : position + size], "little")
            position += size
        else:
            raise _Malformed(f"there is no such field as at byte {position}")
        if position > stop:
            raise _Malformed(f"it breaks off at byte {stop}")
        yield key >> 3, value


def _varint(data: bytes, position: int, stop: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= stop:
            raise _Malformed(f"it breaks off at byte {stop}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Malformed(f"there is no number at byte {position}")


def _number(message: dict[int, Value], number: int, default: int) -> int:
    value = message.get(number, default)
    return default if isinstance(value, tuple) else value


def _bytes(data: bytes, value: Value | None, default: bytes) -> bytes:
    return data[slice(*value)] if isinstance(value, tuple) else default
