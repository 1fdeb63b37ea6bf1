"""Text to token ids and back; text that streams. What a tokenizer is, and the one by SentencePiece.

Knows a SentencePiece model and nothing of models, prompts or templates. Imports sentencepiece alone; the other
kind, by a `tokenizer.json`, is `bpe`'s.

Text is never taken for control tokens: `</s>` in it is four characters. Whoever wants a control token puts its
id in, as `template` does. An id past the last piece, as a padded embedding may give, has no text.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elm_mlx import files, reading
from elm_mlx.errors import InputError
from elm_mlx.model import families
from elm_mlx.text import sentencepiece_file

FILE_NAME = "tokenizer.model"

_SPACE = "\u2581"  # how a piece writes a space
_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")  # the later one counts


class Tokenizer(ABC):
    """Text to token ids and back. Made by `Tokenizer.load`.

    Attributes:
        path: the file it was read from.
        vocab_size: the number of pieces.
        bos_id, eos_id, unk_id: None where the model has no such piece, or puts none before a text.
        eos_ids: the ids that end a text, of which training writes the first; of a model's tokenizer those that
            `end_tokens` has joined.
        rows: how many tokens the model has, whose tokenizer it is; None where that is not known.
        bos_before_templates: whether BOS goes before a conversation whose template writes none.
    """

    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eos_ids: tuple[int, ...]
    rows: int | None = None
    bos_before_templates = True

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """From a model directory, or from a `tokenizer.model` or `tokenizer.json` itself.

        Raises:
            InputError: there is none, or it is cut short, or something else.
        """
        path = files.expanded(path)
        if path.is_dir():
            path = _file_of(path)
        if path.suffix == ".json":
            from elm_mlx.text.tokenizer_json import BPETokenizer

            return BPETokenizer(path)
        return SentencePieceTokenizer(sentencepiece_file.read(path))

    @property
    @abstractmethod
    def pieces(self) -> list[str]:
        """Every piece as its file writes it, by id."""

    @property
    @abstractmethod
    def control_ids(self) -> dict[str, int]:
        """The pieces without text, by name: `<s>`, `</s>` and their like."""

    @property
    @abstractmethod
    def base_size(self) -> int:
        """The number of pieces without those that were added behind them for their own sake, such as `[PAD]`."""

    @abstractmethod
    def id_of(self, piece: str) -> int | None:
        """The id of the piece that is written so; None where there is none."""

    @abstractmethod
    def piece_of(self, token: int) -> str:
        """How a piece is written; empty for an id that no piece has."""

    @abstractmethod
    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """The ids of a text, BOS in front unless unwanted.

        Raises:
            InputError: it is no valid Unicode, or uses a piece that the model has no row for.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text; control tokens and ids past the last piece are silent. Raises InputError for a negative id."""

    @abstractmethod
    def detokenizer(self, prompt: Iterable[int] = ()) -> Detokenizer:
        """A decoder, fresh for each stream, of the tokens that follow `prompt`."""

    def names_of_controls(self) -> re.Pattern[str]:
        """Finds the names of control tokens where they are written in a text, which encodes them as letters."""
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Runs of text, each encoded by itself, and ids of control tokens between them. No BOS is added."""
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids += self.checked([part])
            else:
                ids += self.encode_later(part) if i else self.encode(part, add_bos=False)
        return ids

    def checked(self, ids: list[int]) -> list[int]:
        """`ids`, of pieces. Raises InputError where the model has no row for one: its embedding may be the smaller."""
        if self.rows is not None and ids and (most := max(ids)) >= self.rows:
            raise InputError(f"{self.piece_of(most)!r} is token {most}, and the model knows {self.rows:,} tokens only")
        return ids

    def encode_later(self, text: str) -> list[int]:
        """The ids of a run of text that others or control tokens stand before."""
        return self.encode(text, add_bos=False)

    def trimmed(self, parts: Sequence[str | int]) -> list[str | int]:
        """`parts` without the white space that a control token beside it swallows; few tokenizers have such."""
        return list(parts)


class Detokenizer(ABC):
    """Tokens one by one in, text out as soon as it cannot change any more.

    What it returned so far, the prompt's included, is always a prefix of `decode` of all the tokens; after `finish`
    it is the whole. A prompt that ends amid a character leaves its bytes to the stream.
    """

    @abstractmethod
    def add(self, token: int) -> str:
        """The text that is final now that `token` has come. Raises InputError for a negative one."""

    @abstractmethod
    def finish(self) -> str:
        """The rest: U+FFFD for the bytes of a character that was not completed."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, model: sentencepiece_file.ModelFile) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model.data)
        except (RuntimeError, OSError, ValueError) as error:
            raise InputError(f"{model.path}: SentencePiece cannot load it: {_reason(error)}") from None
        if model.denormalizes:
            raise InputError(f"{model.path}: has rules that rewrite decoded text, which are not supported")
        self._model = model
        self._parts: dict[int, str | int] = {}
        self.path = model.path
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id = _known(self._processor.bos_id())
        self.eos_id = _known(self._processor.eos_id())
        self.unk_id = _known(self._processor.unk_id())
        self.eos_ids: tuple[int, ...] = () if self.eos_id is None else (self.eos_id,)

    @property
    def pieces(self) -> list[str]:
        """Every piece as SentencePiece writes it, by id."""
        return [self.piece_of(token) for token in range(self.vocab_size)]

    @property
    def control_ids(self) -> dict[str, int]:
        """The pieces without text, by name: `<s>`, `</s>` and their like."""
        flags = self._processor.is_control(list(range(self.vocab_size)))
        return {self.piece_of(token): token for token, flag in enumerate(flags) if flag}

    @property
    def base_size(self) -> int:
        """Up to the last piece that is neither a control token nor defined by a user."""
        added = (sentencepiece_file.CONTROL, sentencepiece_file.USER_DEFINED, sentencepiece_file.UNUSED)
        kinds = [piece.type for piece in self._model.pieces()]
        return next((size for size in range(len(kinds), 0, -1) if kinds[size - 1] not in added), 0)

    def id_of(self, piece: str) -> int | None:
        """As of `Tokenizer`."""
        try:
            token: int = self._processor.piece_to_id(piece.encode())
        except UnicodeEncodeError:  # half a surrogate pair, as JSON can hold
            return None
        return token if self.piece_of(token) == piece else None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """BOS (unless unwanted, or the model has none), and then exactly SentencePiece's ids.

        Raises:
            InputError: `text` holds half a surrogate pair, as Python makes of bytes that are no UTF-8; or as `checked`.
        """
        ids: list[int] = self._processor.encode(check_unicode(text), out_type=int)
        return self.checked([self.bos_id, *ids] if add_bos and self.bos_id is not None else ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text, exactly SentencePiece's; `ids` may be an array.

        Control pieces are silent, the unknown piece reads ` ⁇ `, the space that `encode` puts before a text
        goes again, and bytes that are no UTF-8 become U+FFFD, one each. Ids past the last piece are left out.

        Raises:
            InputError: an id is negative, or its piece damaged.
        """
        numbers = [int(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        try:
            text: str = self._processor.decode([token for token in numbers if self._known(token)])
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: has a piece that is no UTF-8; fetch it again") from None
        return text

    def detokenizer(self, prompt: Iterable[int] = ()) -> StreamingDecoder:
        """A decoder, fresh for each stream, of the tokens that follow `prompt`."""
        decoder = StreamingDecoder(self)
        for token in prompt:
            decoder.add(token)
        return decoder

    def _part(self, token: int) -> str | int:
        """What a token adds to a text: a piece, its spaces as SentencePiece writes them, or a byte."""
        part = self._parts.get(token)
        if part is None:
            part = self.piece_of(token)
            if self._processor.is_byte(token):
                part = part if (byte := byte_of(part)) is None else byte
            elif self._processor.is_control(token):
                part = ""
            elif token == self.unk_id:
                part = self._model.unknown_surface
            self._parts[token] = part
        return part

    def piece_of(self, token: int) -> str:
        """As of `Tokenizer`. Raises InputError for a piece that is no UTF-8."""
        if not self._known(token):
            return ""
        try:
            piece: str = self._processor.id_to_piece(token)
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: piece {token} is no UTF-8; fetch it again") from None
        return piece

    def _known(self, token: int) -> bool:
        """Whether there is such a piece. Raises InputError for a negative id."""
        return check_token(token) < self.vocab_size


class StreamingDecoder(Detokenizer):
    """SentencePiece's. A first `▁the` gives ` the` after a prompt that has text, and `the` after BOS alone."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer = tokenizer
        model = tokenizer._model
        self._strips_one = model.add_dummy_prefix or model.remove_extra_whitespaces
        self._strips_all = model.remove_extra_whitespaces
        self._at_start = True
        self._bytes = bytearray()  # the beginning of a character, 3 bytes at most

    def add(self, token: int) -> str:
        """The text that is final now that `token` has come; often, not always, that of the token.

        Raises:
            InputError: it is negative, or its piece damaged.
        """
        if not self._tokenizer._known(token):
            return ""
        part = self._tokenizer._part(token)
        if isinstance(part, int):
            self._bytes.append(part)
            return self._characters(more=True)
        text = self._characters(more=False) if self._bytes else ""
        if self._at_start and self._strips_one and part.startswith(_SPACE):
            part = part[1:]
            self._at_start = self._strips_all
        if part:
            self._at_start = False
        return text + part.replace(_SPACE, " ")

    def finish(self) -> str:
        """The rest: U+FFFD for each byte of a character that was not completed."""
        return self._characters(more=False)

    def _characters(self, more: bool) -> str:
        """Takes whole characters off the bytes; unless there will be `more`, all of them.

        A byte that can begin no character here is U+FFFD by itself, unlike in Python, which replaces a
        truncated character as one.
        """
        text = ""
        while self._bytes:
            size = _character_size(self._bytes[0])
            if more and len(self._bytes) < size and all(byte & 0xC0 == 0x80 for byte in self._bytes[1:]):
                break
            try:
                text += self._bytes[:size].decode("utf-8")
            except UnicodeDecodeError:
                text, size = text + _REPLACEMENT, 1
            del self._bytes[:size]
        if text:
            self._at_start = False
        return text


def check_unicode(text: str) -> bytes:
    """`text` in UTF-8. Raises InputError for half a surrogate pair, as Python makes of bytes that are no UTF-8."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise InputError(f"the text is no valid Unicode: character {error.start + 1} is {half}") from None


def check_token(token: int) -> int:
    """`token`. Raises InputError where it can be no id."""
    if token < 0:
        raise InputError(f"token {token} is outside the vocabulary")
    return token


def byte_of(piece: str) -> int | None:
    """The byte that a piece like `<0xE2>` stands for; None of another."""
    found = _BYTE.fullmatch(piece)
    return int(found[1], 16) if found else None


def read_settings(directory: Path) -> dict[str, Any]:
    """What a directory says of its tokenizer beside the tokenizer's own file; empty where it says nothing.

    Raises:
        InputError: a file is no JSON object, or names a special token by what is no text.
    """
    settings: dict[str, Any] = {}
    for path in (directory / name for name in _SETTINGS):
        values = reading.json_object_if_there(path)
        for name in ("bos_token", "eos_token", "unk_token"):
            value = values.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if not isinstance(text, str | None):
                raise InputError(f"{path}: {name} is {str(value)[:60]}: a token's text is needed")
            values[name] = text
        settings |= {name: value for name, value in values.items() if value is not None}
    return settings


def _file_of(directory: Path) -> Path:
    found = families.tokenizer_file(directory)
    if found is not None:
        return found
    if families.is_other(directory):
        raise InputError(f"{directory}: holds no tokenizer.json: copy the one of the model that it was made from")
    raise InputError(f"{directory}: holds no {FILE_NAME}; `elm-mlx convert --tokenizer` puts one there")


def _character_size(first: int) -> int:
    """How many bytes the UTF-8 character has that starts with the byte `first`; 1 where none does."""
    if first < 0xC2 or first > 0xF4:
        return 1
    return 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _known(token: int) -> int | None:
    return token if token >= 0 else None


def _reason(error: Exception) -> str:
    """SentencePiece's message without its source line; pieces are quoted in it, whatever they hold."""
    text = " ".join(str(error).split())
    return text.partition(": ")[2].rpartition("] ")[2].strip(" .")[:200] or "it is damaged"
