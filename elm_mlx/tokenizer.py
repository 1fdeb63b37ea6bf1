"""Text to token ids and back; text that streams. What a tokenizer is, and the one by SentencePiece.

Knows a SentencePiece model and nothing of models, prompts or templates. Imports sentencepiece alone; the other
kind, by a `tokenizer.json`, is `bpe`'s.

Text is never taken for control tokens: `</s>` in it is four characters. Whoever wants a control token puts its
id in, as `template` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from elm_mlx import families, files, spm
from elm_mlx.errors import InputError

FILE_NAME = "tokenizer.model"

_SPACE = "\u2581"  # how a piece writes a space
_REPLACEMENT = "\ufffd"


class Tokenizer(ABC):
    """Text to token ids and back. Made by `Tokenizer.load`.

    Attributes:
        path: the file it was read from.
        vocab_size: the number of pieces.
        bos_id, eos_id, unk_id: None where the model has no such piece, or puts none before a text.
        eos_ids: the ids that end a text; just `eos_id` unless set, say from a model's config.
        bos_before_templates: whether BOS goes before a conversation whose template writes none.
    """

    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eos_ids: tuple[int, ...]
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
            from elm_mlx.bpe import BPETokenizer

            return BPETokenizer(path)
        return SentencePieceTokenizer(spm.read(path))

    @property
    @abstractmethod
    def pieces(self) -> list[str]:
        """Every piece as its file writes it, by id."""

    @property
    @abstractmethod
    def control_ids(self) -> dict[str, int]:
        """The pieces without text, by name: `<s>`, `</s>` and their like."""

    @abstractmethod
    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """The ids of a text, BOS in front unless unwanted. Raises InputError where it is no valid Unicode."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text; control tokens are silent. Raises InputError for an id outside the vocabulary."""

    @abstractmethod
    def detokenizer(self, prompt: Iterable[int] = ()) -> Detokenizer:
        """A decoder, fresh for each stream, of the tokens that follow `prompt`."""

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Runs of text, each encoded by itself, and ids of control tokens between them. No BOS is added."""
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self.encode_later(part) if i else self.encode(part, add_bos=False)
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
        """The text that is final now that `token` has come. Raises InputError for one outside the vocabulary."""

    @abstractmethod
    def finish(self) -> str:
        """The rest: U+FFFD for the bytes of a character that was not completed."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, model: spm.ModelFile) -> None:
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
        texts: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
        return texts

    @property
    def control_ids(self) -> dict[str, int]:
        """The pieces without text, by name: `<s>`, `</s>` and their like."""
        flags = self._processor.is_control(list(range(self.vocab_size)))
        return {self._processor.id_to_piece(token): token for token, flag in enumerate(flags) if flag}

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """BOS (unless unwanted, or the model has none), and then exactly SentencePiece's ids.

        Raises:
            InputError: `text` holds half a surrogate pair, as Python makes of bytes that are no UTF-8.
        """
        ids: list[int] = self._processor.encode(check_unicode(text), out_type=int)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text, exactly SentencePiece's; `ids` may be an array.

        Control pieces are silent, the unknown piece reads ` ⁇ `, the space that `encode` puts before a text
        goes again, and bytes that are no UTF-8 become U+FFFD, one each.

        Raises:
            InputError: an id lies outside the vocabulary.
        """
        numbers = [int(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        for token in numbers:
            self._check(token)
        text: str = self._processor.decode(numbers)
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
            self._check(token)
            part = self._processor.id_to_piece(token)
            if self._processor.is_byte(token):
                part = int(part[3:5], 16)  # <0xE2>
            elif self._processor.is_control(token):
                part = ""
            elif token == self.unk_id:
                part = self._model.unknown_surface
            self._parts[token] = part
        return part

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise InputError(f"token {token} is outside the vocabulary: {self.path} has {self.vocab_size} pieces")


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
            InputError: it lies outside the vocabulary.
        """
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
    """SentencePiece's message without its source line."""
    return str(error).partition(": ")[2].rpartition("] ")[2].strip(" .") or "it is damaged"
