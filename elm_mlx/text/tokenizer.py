"""The tokenizer of a model: text to token ids and back, and the tokens that end a text.

It is read from a SentencePiece model (`sentencepiece_file`) or from a `tokenizer.json` (`tokenizer_json`). Text is
never taken for control tokens: `</s>` in it is four characters. Whoever wants a control token puts its id in, as
`chat_template` does. An id past the last piece, as a padded embedding may give, has no text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elm_mlx import reading
from elm_mlx.directories import TEMPLATES, no_tokenizer
from elm_mlx.errors import InputError
from elm_mlx.model.config import MODEL_TYPE, Config, tokenizer_file

if TYPE_CHECKING:  # one of the two is imported, where a tokenizer is loaded
    from elm_mlx.text.sentencepiece_file import SentencePieceDecoder, SentencePieceEncoding
    from elm_mlx.text.tokenizer_json import ByteDecoder, JSONEncoding

FILE_NAME = "tokenizer.model"

_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")  # the later one counts


class Tokenizer:
    """Text to token ids and back. Made by `Tokenizer.load`, or for a model by `read_vocabulary`.

    Attributes:
        path: the file it was read from.
        vocab_size: the number of pieces.
        bos_id, eos_id, unk_id: None where the model has no such piece, or puts none before a text.
        eos_ids: the ids that end a text, of which training writes the first; of a model's tokenizer all that the
            model's directory names.
        control_ids: the pieces without text, by name: `<s>`, `</s>` and their like.
        base_size: the number of pieces without those that were added behind them for their own sake, such as `[PAD]`.
        rows: the number of tokens of the model whose tokenizer it is; None where that is not known.
        bos_before_templates: whether BOS goes before a conversation whose template writes none.
    """

    def __init__(self, encoding: SentencePieceEncoding | JSONEncoding) -> None:
        self._encoding = encoding
        self.path: Path = encoding.path
        self.vocab_size: int = encoding.vocab_size
        self.bos_id: int | None = encoding.bos_id
        self.eos_id: int | None = encoding.eos_id
        self.unk_id: int | None = encoding.unk_id
        self.eos_ids: tuple[int, ...] = () if encoding.eos_id is None else (encoding.eos_id,)
        self.rows: int | None = None
        self.bos_before_templates: bool = encoding.bos_before_templates

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """Loads the tokenizer of a model directory, or a `tokenizer.model` or `tokenizer.json` itself.

        Raises:
            InputError: there is none, or it is cut short, or something else.
        """
        path = reading.expanded(path)
        if path.is_dir():
            model_type = reading.json_object_if_there(path / "config.json").get("model_type", MODEL_TYPE)
            found = tokenizer_file(path, str(model_type))
            if found is None:
                raise no_tokenizer(path, model_type == MODEL_TYPE)
            path = found
        if path.suffix == ".json":
            from elm_mlx.text.tokenizer_json import JSONEncoding

            return Tokenizer(JSONEncoding(path, read_settings(path.parent)))
        from elm_mlx.text.sentencepiece_file import SentencePieceEncoding

        return Tokenizer(SentencePieceEncoding(path))

    @property
    def control_ids(self) -> dict[str, int]:
        return self._encoding.control_ids

    @property
    def base_size(self) -> int:
        return self._encoding.base_size

    @property
    def pieces(self) -> list[str]:
        """Every piece as its file writes it, by id."""
        return [self.piece_of(token) for token in range(self.vocab_size)]

    def piece_of(self, token: int) -> str:
        """Returns how a piece is written; empty for an id that no piece has. Raises InputError for a negative id."""
        return self._encoding.piece_of(token)

    def id_of(self, piece: str) -> int | None:
        """Returns the id of the piece that is written so; None where there is none."""
        try:
            return self._encoding.id_of(piece)
        except UnicodeEncodeError:  # half a surrogate pair, as JSON can hold
            return None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Returns BOS, unless unwanted or the tokenizer puts none there, and then exactly the library's ids.

        Raises:
            InputError: `text` holds half a surrogate pair, as Python makes of bytes that are no UTF-8; or uses a piece
                that the model has no row for, or that the tokenizer lacks.
        """
        check_unicode(text)
        ids = self._encoding.encode(text)
        return self.checked([self.bos_id, *ids] if add_bos and self.bos_id is not None else ids)

    def encode_later(self, text: str) -> list[int]:
        """Encodes a run of text after another or a control token: without the space that some put before the first."""
        check_unicode(text)
        return self.checked(self._encoding.encode(text, first=False))

    def encode_amid(self, text: str) -> list[int]:
        """Encodes a text as it would be amid another: without the space that SentencePiece puts before any."""
        anchor = self.encode("\n", add_bos=False)
        ids = self.encode("\n" + text, add_bos=False)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self.encode(text, add_bos=False)

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Encodes runs of text, each by itself, with ids of control tokens between them. No BOS is added."""
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids += self.checked([part])
            else:
                ids += self.encode_later(part) if i else self.encode(part, add_bos=False)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, which may be an array. Control tokens and ids past the last piece are silent.

        Bytes that are no UTF-8 become U+FFFD. By SentencePiece, the unknown piece reads ` ⁇ `, and the space that
        `encode` puts before a text goes again.

        Raises:
            InputError: an id is negative, or its piece damaged.
        """
        return self._encoding.decode([int(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)])

    def bytes_of(self, token: int) -> bytes:
        """Returns the bytes that a token adds to a text that has begun: none for a control token."""
        return self._encoding.bytes_of(token)

    def detokenizer(self, prompt: Iterable[int] = ()) -> SentencePieceDecoder | ByteDecoder:
        """Returns a streaming decoder of the tokens that follow `prompt`: tokens one by one in, text out.

        `add` returns the text that cannot change any more, `finish` the rest: U+FFFD for the bytes of a character that
        was not completed. All that was returned so far, the prompt's included, begins `decode` of all the tokens, and
        after `finish` it is the whole. A prompt that ends amid a character leaves its bytes to the stream.
        """
        decoder = self._encoding.decoder()
        for token in prompt:
            decoder.add(token)
        return decoder

    def names_of_controls(self) -> re.Pattern[str]:
        """Finds the names of control tokens where they are written in a text, which encodes them as letters."""
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def checked(self, ids: list[int]) -> list[int]:
        """Returns `ids`. Raises InputError where the model has no row for one: its embedding may be the smaller."""
        if self.rows is not None and ids and (most := max(ids)) >= self.rows:
            raise InputError(f"{self.piece_of(most)!r} is token {most}, but the model has only {self.rows:,} tokens")
        return ids

    def trimmed(self, parts: Sequence[str | int]) -> list[str | int]:
        """Returns `parts` without the white space that a control token beside it swallows; few tokenizers have such."""
        swallowing = self._encoding.swallowing
        if not swallowing:
            return [*parts]
        trimmed: list[str | int] = []
        for i, part in enumerate(parts):
            if isinstance(part, str):
                part = part.lstrip() if i and (parts[i - 1], "rstrip") in swallowing else part
                part = part.rstrip() if i + 1 < len(parts) and (parts[i + 1], "lstrip") in swallowing else part
            if part != "":
                trimmed.append(part)
        return trimmed


@dataclass(frozen=True)
class Vocabulary:
    """A model directory's tokenizer and end tokens.

    Attributes:
        tokenizer: whose `rows` and `eos_ids` are the model's; None where the directory has none.
        end_ids: the tokens that end a text. Training writes the first.
        notes: on end tokens that the directory names and the model lacks.
    """

    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


def read_vocabulary(directory: Path, config: Config) -> Vocabulary:
    """Opens the tokenizer of the model in `directory`, whose `config` is read already, and collects its end tokens.

    They are one set for training, generation, chat and evaluation: all that the tokenizer, `config.json` and
    `generation_config.json` name, in that order. So the one that training writes is the tokenizer's own where it has
    one, as with Hugging Face's trainers.

    Raises:
        InputError: the tokenizer cannot be read, or is another model's; an end token is no number.
    """
    directory = reading.expanded(directory)
    file = tokenizer_file(directory, config.model_type)
    tokenizer = None if file is None else Tokenizer.load(file)
    named: list[tuple[int | None, Path]] = []
    if tokenizer is not None:
        # Some pieces may be added and never trained, such as `[PAD]`.
        if tokenizer.vocab_size > config.vocab_size and tokenizer.base_size > config.vocab_size:
            raise InputError(
                f"{file}: has {tokenizer.vocab_size} pieces, and the model {config.vocab_size}: "
                "it is another model's tokenizer"
            )
        tokenizer.rows = config.vocab_size
        name = read_settings(directory).get("eos_token")
        named = [(None if name is None else tokenizer.id_of(name), tokenizer.path), (tokenizer.eos_id, tokenizer.path)]
    generation = directory / "generation_config.json"
    its_ends = reading.Keys(str(generation), reading.json_object_if_there(generation)).token_ids("eos_token_id")
    for path, tokens in ((directory / "config.json", config.eos_token_ids), (generation, its_ends)):
        named += [(token, path) for token in tokens]
    ends = [(token, path) for token, path in named if token is not None]
    if not ends and config.model_type == MODEL_TYPE:
        ends = [(2, directory / "config.json")]  # OpenELM's default
    ids = tuple(dict.fromkeys(token for token, _ in ends if 0 <= token < config.vocab_size))
    notes = tuple(
        f"{path}: the end token {token} is outside the model's vocabulary of {config.vocab_size:,}, and is ignored"
        for token, path in ends
        if token not in ids
    )
    if tokenizer is not None:
        tokenizer.eos_ids = ids
        tokenizer.eos_id = tokenizer.eos_id if tokenizer.eos_id in ids else None
    return Vocabulary(tokenizer, ids, notes)


def read_settings(directory: Path) -> dict[str, Any]:
    """Reads what a directory says of its tokenizer beside the tokenizer's own file; empty where it says nothing.

    Raises:
        InputError: a file is no JSON object, or names a special token by what is no text.
    """
    settings: dict[str, Any] = {}
    for path in (directory / name for name in _SETTINGS):
        values = reading.json_object_if_there(path)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = values.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if not isinstance(text, str | None):
                raise InputError(f"{path}: {name} is {str(value)[:60]}: a token's text is needed")
            values[name] = text
        settings |= {name: value for name, value in values.items() if value is not None}
    return settings


def has_chat_template(directory: Path) -> bool:
    """Returns True where a model directory has files for chat templates, which `chat_template` then reads."""
    directory = reading.expanded(directory)
    if any(os.path.lexists(directory / name) for name in ("chat_template.jinja", "chat_template.json", *TEMPLATES)):
        return True
    return reading.json_object_if_there(directory / "tokenizer_config.json").get("chat_template") is not None


def check_unicode(text: str) -> bytes:
    """Returns `text` in UTF-8. Raises InputError for half a surrogate pair, as of bytes that are no UTF-8."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise InputError(f"the text is not valid Unicode: character {error.start + 1} is {half}") from None
