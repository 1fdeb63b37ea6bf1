"""Text to token ids and back, by a `tokenizer.json`: the byte-level and SentencePiece-like BPE of other families.

Knows that file, and what `tokenizer_config.json` says of BOS and EOS; encoding is the `tokenizers` library's, which
is imported only here. Decoding is ours, because text streams: every token is bytes, and a character is text when
its bytes are there. As elsewhere, text is never taken for control tokens, and an id past the last piece has no text.

The library is written in Rust: what it finds wrong it raises as a bare Exception, and what it did not expect is a
panic, which is no Exception in Python, and is written to stderr before.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.text.tokenizer import Detokenizer, Tokenizer, byte_of, check_token, check_unicode, read_settings

_SPACE = "\u2581"  # how a SentencePiece-like piece writes a space
_MAX_BYTES = 64 << 20  # of the file; the largest in the wild has 35 MB
_MAX_PIECES = 1 << 24  # the most in the wild are 262,144
_one_at_a_time = threading.Lock()
_PREFIXED = re.compile(r'"continuing_subword_prefix"\s*:\s*"[^"]')
_ESCAPED = re.compile(r"\\u00([4-7][0-9a-fA-F])")  # a letter, as JSON may write it and nobody does
_KNOWN = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}  # decoders


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: each byte as a character that is seen, itself where it is one."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(0x100) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(unseen)}


class BPETokenizer(Tokenizer):
    """A `tokenizer.json`. Made by `Tokenizer.load`.

    `bos_id` is what the tokenizer itself puts in front of a text, None where that is nothing, whatever it calls BOS.

    Raises:
        InputError: the file is no such tokenizer, or one that decodes in a way that is not known here.
    """

    bos_before_templates = False  # they were made for libraries that put none there

    def __init__(self, path: Path) -> None:
        self.path = path
        settings = read_settings(path.parent)
        with _panics_unseen(), _one_error(path, "no tokenizer that can be read"):
            self._read(path, settings)

    def _read(self, path: Path, settings: dict[str, Any]) -> None:
        self._encoder = _load(path)
        added = self._encoder.get_added_tokens_decoder()
        self._control = {token: entry for token, entry in added.items() if entry.special}
        self._added = {token: entry.content for token, entry in added.items()}
        self._encoder.encode_special_tokens = True  # as text
        self._later = _without_prefix(self._encoder)
        self._byte_level, self._strips = _decoding(path, self._encoder)
        self._alphabet = _byte_of_character() if self._byte_level else {}
        self._parts: dict[int, bytes] = {}
        self.vocab_size = max(self._encoder.get_vocab_size(), max(added, default=-1) + 1)
        if self.vocab_size > _MAX_PIECES:
            raise InputError(f"{path}: has a piece of the id {self.vocab_size - 1}, which no model has a row for")
        self.bos_id = self._bos(settings)
        self.eos_id = self.id_of(settings.get("eos_token"))
        self.unk_id = self.id_of(settings.get("unk_token"))
        self.eos_ids = () if self.eos_id is None else (self.eos_id,)

    @property
    def pieces(self) -> list[str]:
        return [self.piece_of(token) for token in range(self.vocab_size)]

    @property
    def control_ids(self) -> dict[str, int]:
        return {entry.content: token for token, entry in self._control.items()}

    @property
    def base_size(self) -> int:
        return int(self._encoder.get_vocab_size(with_added_tokens=False))

    def id_of(self, piece: str | None) -> int | None:
        try:
            return None if piece is None else self._encoder.token_to_id(piece)
        except UnicodeEncodeError:  # half a surrogate pair, as JSON can hold
            return None

    def piece_of(self, token: int) -> str:
        return self._encoder.id_to_token(token) or "" if check_token(token) < 1 << 32 else ""

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """BOS (unless unwanted, or the tokenizer puts none there), and then exactly the ids of the library.

        Raises:
            InputError: `text` holds half a surrogate pair, as Python makes of bytes that are no UTF-8; or as `checked`;
                or the tokenizer has no piece for it.
        """
        ids = self._ids(self._encoder, text)
        return self.checked([self.bos_id, *ids] if add_bos and self.bos_id is not None else ids)

    def encode_later(self, text: str) -> list[int]:
        """As of `Tokenizer`: without the space that some tokenizers put before the first run of a text."""
        return self.checked(self._ids(self._later, text))

    def _ids(self, encoder: Any, text: str) -> list[int]:
        check_unicode(text)
        with _one_error(self.path, "cannot encode a text"):
            ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        return ids

    def trimmed(self, parts: Sequence[str | int]) -> list[str | int]:
        """As of `Tokenizer`."""
        trimmed: list[str | int] = []
        for i, part in enumerate(parts):
            if isinstance(part, str):
                part = part.lstrip() if i and self._swallows(parts[i - 1], "rstrip") else part
                part = part.rstrip() if i + 1 < len(parts) and self._swallows(parts[i + 1], "lstrip") else part
            if part != "":
                trimmed.append(part)
        return trimmed

    def _swallows(self, part: str | int, side: str) -> bool:
        return isinstance(part, int) and part in self._control and bool(getattr(self._control[part], side))

    def decode(self, ids: Iterable[int]) -> str:
        """The text. Control tokens and ids past the last piece are silent, and bytes that are no UTF-8 become U+FFFD.

        Raises:
            InputError: an id is negative.
        """
        decoder = StreamingDecoder(self)
        numbers = ids.tolist() if hasattr(ids, "tolist") else ids
        return "".join([*(decoder.add(int(token)) for token in numbers), decoder.finish()])

    def detokenizer(self, prompt: Iterable[int] = ()) -> StreamingDecoder:
        """A decoder, fresh for each stream, of the tokens that follow `prompt`."""
        decoder = StreamingDecoder(self)
        for token in prompt:
            decoder.add(token)
        return decoder

    def _part(self, token: int) -> bytes:
        """What a token adds to a text."""
        part = self._parts.get(token)
        if part is None:
            part = self._parts[token] = b"" if token in self._control else self._bytes(token)
        return part

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self.piece_of(token)
        if self._byte_level:
            known = all(character in self._alphabet for character in piece)
            return bytes(self._alphabet[character] for character in piece) if known else piece.encode()
        if (byte := byte_of(piece)) is not None:
            return bytes([byte])
        return piece.replace(_SPACE, " ").encode()

    def _bos(self, settings: dict[str, Any]) -> int | None:
        """`add_bos_token` decides, or else what the file's own rules put before a text."""
        # Both always, so that a file that the library panics at does so here, where nobody sees it.
        with_rules = self._encoder.encode("a", add_special_tokens=True).ids
        without = self._encoder.encode("a", add_special_tokens=False).ids
        wanted = settings.get("add_bos_token")
        if isinstance(wanted, bool):
            return self.id_of(settings.get("bos_token")) if wanted else None
        if wanted is not None:
            settings_path = self.path.with_name("tokenizer_config.json")
            raise InputError(f"{settings_path}: add_bos_token is {str(wanted)[:60]}: true or false is needed")
        return with_rules[0] if with_rules[:1] != without[:1] else None


class StreamingDecoder(Detokenizer):
    """Tokens one by one in, text out as soon as its bytes are characters. Made by `BPETokenizer.detokenizer`."""

    def __init__(self, tokenizer: BPETokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips = tokenizer._strips  # one space, before the first text

    def add(self, token: int) -> str:
        return self._stripped(self._decoder.decode(self._tokenizer._part(token)))

    def finish(self) -> str:
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text


def _load(path: Path) -> Any:
    from tokenizers import Tokenizer as Encoder

    text = reading.text(path, _MAX_BYTES)
    if _PREFIXED.search(
        _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)
    ):  # some of which the library ends the process at, with no exception to catch
        raise InputError(
            f"{path}: marks pieces that continue a word, which is not supported: byte-level and "
            "SentencePiece-like BPE do not"
        )
    encoder = Encoder.from_str(text)
    encoder.no_truncation()
    encoder.no_padding()
    if any(_looks_like_control(entry) for entry in encoder.get_added_tokens_decoder().values()):
        values = json.loads(text)  # Phi-3's <|user|>, say: to the library it is a word like another
        for entry in values["added_tokens"]:
            entry["special"] = entry["special"] or _names_control(entry["content"])
        encoder = Encoder.from_str(json.dumps(values))
    return encoder


def _looks_like_control(entry: Any) -> bool:
    return not entry.special and _names_control(entry.content)


def _names_control(content: str) -> bool:
    return content.startswith("<|") and content.endswith("|>")


@contextmanager
def _one_error(path: Path, what: str) -> Iterator[None]:
    """Raises InputError for what the library raises: Exceptions of no public type, and panics."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: {what}: {reason}") from None


@contextmanager
def _panics_unseen() -> Iterator[None]:
    """Keeps what Rust writes of a panic off stderr: it goes past Python's, to the file itself."""
    with _one_at_a_time:  # or else one thread would keep what another has put there
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def _state(part: Any) -> list[dict[str, Any]]:
    """What a decoder or pre-tokenizer consists of, as in the file."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    nested: list[dict[str, Any]] | None = state.get("decoders", state.get("pretokenizers"))
    return [state] if nested is None else nested


def _decoding(path: Path, encoder: Any) -> tuple[bool, bool]:
    """Whether pieces are written in GPT-2's alphabet, and whether a text loses a space at its beginning."""
    steps = _state(encoder.decoder)
    kinds = [str(step.get("type")) for step in steps]
    odd = next((kind for kind in kinds if kind not in _KNOWN), None if kinds else "none")
    if odd is not None:
        raise InputError(f"{path}: decodes by {odd}, which is not supported: byte-level and SentencePiece-like BPE are")
    metaspace = any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)
    return "ByteLevel" in kinds, metaspace or "Strip" in kinds


def _without_prefix(encoder: Any) -> Any:
    """What encodes a text that follows another: without the space that some put before the first one only."""
    steps = _state(encoder.pre_tokenizer)
    if len(steps) != 1 or steps[0].get("type") != "Metaspace" or steps[0].get("prepend_scheme") != "first":
        return encoder
    from tokenizers import Tokenizer as Encoder
    from tokenizers.pre_tokenizers import Metaspace

    later = Encoder.from_str(encoder.to_str())
    later.encode_special_tokens = True
    later.pre_tokenizer = Metaspace(
        replacement=steps[0]["replacement"], prepend_scheme="never", split=steps[0]["split"]
    )
    return later
