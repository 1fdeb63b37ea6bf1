"""A SentencePiece model: its file, and text to ids and back by it.

Encoding is the sentencepiece library's, which is imported only here. It keeps the normalizer's settings and the pieces'
types to itself, so the file is read here too, without protobuf.
"""

from __future__ import annotations

import codecs
import re
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

SPACE = "\u2581"  # how a piece writes a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Value = int | tuple[int, int]  # a number, or from where to where bytes lie


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; `score` orders merges (BPE) or is a log probability (unigram)."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class ModelFile:
    """The settings in a model file. Absent fields have the defaults of SentencePiece's format.

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
        """Returns every piece, by id. Raises InputError when one is malformed."""
        try:
            fields = _fields(self.data, 0, len(self.data))
            return [_piece(self.data, *span) for number, span in fields if number == 1 and isinstance(span, tuple)]
        except _Malformed as error:
            raise InputError(f"{self.path}: not a SentencePiece model: {error}") from None


def read(path: Path) -> ModelFile:
    """Reads the file at `path`. Its pieces are counted here, and parsed by `ModelFile.pieces`.

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


class SentencePieceEncoding:
    """Text to ids and back by a SentencePiece model.

    Attributes: those of `Tokenizer` that are called so.

    Raises:
        InputError: the file is missing, cut short, or no SentencePiece model.
    """

    bos_before_templates = True
    swallowing: frozenset[tuple[str | int, str]] = frozenset()

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path, self.model = path, read(path)
        self._processor = SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(self.model.data)
        except (RuntimeError, OSError, ValueError) as error:
            raise InputError(f"{path}: SentencePiece cannot load it: {_reason(error)}") from None
        if self.model.denormalizes:
            raise InputError(f"{path}: has rules that rewrite decoded text, which are not supported")
        self._parts: dict[int, str | bytes] = {}
        self.vocab_size: int = self._processor.vocab_size()
        special = (self._processor.bos_id(), self._processor.eos_id(), self._processor.unk_id())
        self.bos_id, self.eos_id, self.unk_id = (None if token < 0 else token for token in special)

    @property
    def control_ids(self) -> dict[str, int]:
        flags = self._processor.is_control(list(range(self.vocab_size)))
        return {self.piece_of(token): token for token, flag in enumerate(flags) if flag}

    @property
    def base_size(self) -> int:
        # Up to the last piece that is neither a control token nor defined by a user.
        kinds = [piece.type for piece in self.model.pieces()]
        added = (CONTROL, USER_DEFINED, UNUSED)
        return next((size for size in range(len(kinds), 0, -1) if kinds[size - 1] not in added), 0)

    def id_of(self, piece: str) -> int | None:
        token: int = self._processor.piece_to_id(piece.encode())
        return token if self.piece_of(token) == piece else None

    def piece_of(self, token: int) -> str:
        if check_token(token) >= self.vocab_size:
            return ""
        try:
            piece: str = self._processor.id_to_piece(token)
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: piece {token} is not UTF-8; fetch it again") from None
        return piece

    def encode(self, text: str, first: bool = True) -> list[int]:
        ids: list[int] = self._processor.encode(text.encode(), out_type=int)
        return ids

    def decode(self, ids: list[int]) -> str:
        try:
            text: str = self._processor.decode([token for token in ids if check_token(token) < self.vocab_size])
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: has a piece that is not UTF-8; fetch it again") from None
        return text

    def decoder(self) -> SentencePieceDecoder:
        return SentencePieceDecoder(self)

    def part(self, token: int) -> str | bytes:
        """Returns what a token adds to a text: a piece, its spaces as SentencePiece writes them, or a byte."""
        part = self._parts.get(token)
        if part is None:
            part = self._parts[token] = self._new_part(token)
        return part

    def bytes_of(self, token: int) -> bytes:
        part = self.part(token)
        return part if isinstance(part, bytes) else part.replace(SPACE, " ").encode()

    def _new_part(self, token: int) -> str | bytes:
        piece = self.piece_of(token)
        if token >= self.vocab_size:
            return b""
        if self._processor.is_byte(token):
            return piece if (byte := byte_of(piece)) is None else bytes([byte])
        if self._processor.is_control(token):
            return ""
        return self.model.unknown_surface if token == self.unk_id else piece


class SentencePieceDecoder:
    """Streams text, see `Tokenizer.detokenizer`.

    A first `▁the` gives ` the` after a prompt that has text, and `the` after BOS alone.
    """

    def __init__(self, encoding: SentencePieceEncoding) -> None:
        model = encoding.model
        self._part = encoding.part
        self._strips_one = model.add_dummy_prefix or model.remove_extra_whitespaces
        self._strips_all = model.remove_extra_whitespaces
        self._at_start = True
        self._amid_bytes = False
        self._bytes = codecs.getincrementaldecoder("utf-8")(_EACH_BYTE)

    def add(self, token: int) -> str:
        """Returns the text that is final now that `token` has come. Raises InputError for one that is negative."""
        part = self._part(token)
        text = ""
        if isinstance(part, bytes) or self._amid_bytes:
            self._amid_bytes = isinstance(part, bytes)
            text = self._bytes.decode(part) if isinstance(part, bytes) else self.finish()
            self._at_start = self._at_start and not text
            if isinstance(part, bytes):
                return text
        if self._at_start and self._strips_one and part.startswith(SPACE):
            part = part[1:]
            self._at_start = self._strips_all
        if part:
            self._at_start = False
        return text + part.replace(SPACE, " ")

    def finish(self) -> str:
        """Returns the rest: U+FFFD for each byte of a character that was not completed."""
        return self._bytes.decode(b"", final=True)


def check_token(token: int) -> int:
    """Returns `token`. Raises InputError for a negative one."""
    if token < 0:
        raise InputError(f"token {token} is outside the vocabulary")
    return token


def byte_of(piece: str) -> int | None:
    """Returns the byte that a piece like `<0xE2>` stands for; None of another."""
    found = _BYTE.fullmatch(piece)
    return int(found[1], 16) if found else None


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Puts U+FFFD for each byte of a truncated character, as SentencePiece does; Python puts one for all of them."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


_EACH_BYTE = "elm_mlx.replace_each_byte"
codecs.register_error(_EACH_BYTE, _replace_each_byte)


def _reason(error: Exception) -> str:
    """SentencePiece's message without its source line; pieces are quoted in it, whatever they hold."""
    text = " ".join(str(error).split())
    return text.partition(": ")[2].rpartition("] ")[2].strip(" .")[:200] or "it is damaged"


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
    """Returns the number of pieces at the beginning of the file, nearly all under 128 bytes, and where they end."""
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
        raise _Malformed(f"the piece at byte {start} is not UTF-8") from None


class _Malformed(Exception):
    """The bytes are no protobuf message."""


def _fields(data: bytes, position: int, stop: int) -> Iterator[tuple[int, Value]]:
    """Yields each field's number and value in the message at `data[position:stop]`."""
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
