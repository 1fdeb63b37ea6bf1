"""A `tokenizer.json`, and text to ids and back by it: the byte-level and SentencePiece-like BPE of other families.

Encoding is the `tokenizers` library's, which is imported only here. Decoding is ours, because text streams: every token
is bytes, and a character is text when its bytes are there.

The library is written in Rust: what it finds wrong it raises as a bare Exception, and what it did not expect is a
panic, which is no Exception in Python, and is written to stderr before.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.text.sentencepiece_file import SPACE, byte_of, check_token

_MAX_BYTES = 64 << 20  # of the file; the largest in the wild has 35 MB
_MAX_PIECES = 1 << 24  # the most in the wild are 262,144
_one_at_a_time = threading.Lock()
_PREFIXED = re.compile(r'"continuing_subword_prefix"\s*:\s*"[^"]')
_ESCAPED = re.compile(r"\\u00([4-7][0-9a-fA-F])")  # a letter, as JSON may write it and nobody does
_KNOWN = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}  # decoders


def _byte_of_character() -> dict[str, int]:
    """Returns GPT-2's alphabet: each byte as a visible character, itself where it is one."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(0x100) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(unseen)}


class JSONEncoding:
    """Text to ids and back by a `tokenizer.json`.

    `bos_id` is what the tokenizer itself puts in front of a text, None where that is nothing, whatever it calls BOS.

    Args:
        settings: what `tokenizer_config.json` says.

    Attributes: those of `Tokenizer` that are called so, and
        swallowing: control tokens that take white space beside them, each with the side ("lstrip", "rstrip").

    Raises:
        InputError: the file is no such tokenizer, or one that decodes in a way that is not known here.
    """

    bos_before_templates = False  # they were made for libraries that put none there

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        with _panics_unseen(), _one_error(path, "no tokenizer that can be read"):
            self._read(path, settings)

    def _read(self, path: Path, settings: dict[str, Any]) -> None:
        self._encoder = _load(path)
        added = self._encoder.get_added_tokens_decoder()
        control = {token: entry for token, entry in added.items() if entry.special}
        self.control_ids = {entry.content: token for token, entry in control.items()}
        sides = ("lstrip", "rstrip")
        self.swallowing = {(token, side) for token, entry in control.items() for side in sides if getattr(entry, side)}
        self._parts = {token: b"" if token in control else entry.content.encode() for token, entry in added.items()}
        self._encoder.encode_special_tokens = True  # as text
        self._later = _without_prefix(self._encoder)
        self._byte_level, self.strips = _decoding(path, self._encoder)
        self._alphabet = _byte_of_character() if self._byte_level else {}
        self.vocab_size = max(self._encoder.get_vocab_size(), max(added, default=-1) + 1)
        if self.vocab_size > _MAX_PIECES:
            raise InputError(f"{path}: has a piece of the id {self.vocab_size - 1}, which no model has a row for")
        self.base_size = int(self._encoder.get_vocab_size(with_added_tokens=False))
        self.bos_id = self._bos(settings)
        self.eos_id, self.unk_id = (self._named(settings, name) for name in ("eos_token", "unk_token"))

    def id_of(self, piece: str) -> int | None:
        token: int | None = self._encoder.token_to_id(piece)
        return token

    def piece_of(self, token: int) -> str:
        return self._encoder.id_to_token(token) or "" if check_token(token) < 1 << 32 else ""

    def encode(self, text: str, first: bool = True) -> list[int]:
        with _one_error(self.path, "cannot encode a text"):
            encoder = self._encoder if first else self._later
            ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        decoder = self.decoder()
        return "".join([*map(decoder.add, ids), decoder.finish()])

    def decoder(self) -> ByteDecoder:
        return ByteDecoder(self)

    def bytes_of(self, token: int) -> bytes:
        """Returns what a token adds to a text."""
        part = self._parts.get(token)
        if part is None:
            part = self._parts[token] = self._bytes(self.piece_of(token))
        return part

    def _bytes(self, piece: str) -> bytes:
        if self._byte_level:
            known = all(character in self._alphabet for character in piece)
            return bytes(self._alphabet[character] for character in piece) if known else piece.encode()
        byte = byte_of(piece)
        return piece.replace(SPACE, " ").encode() if byte is None else bytes([byte])

    def _named(self, settings: dict[str, Any], name: str) -> int | None:
        try:
            return self.id_of(settings[name]) if name in settings else None
        except UnicodeEncodeError:  # half a surrogate pair, as JSON can hold
            return None

    def _bos(self, settings: dict[str, Any]) -> int | None:
        """`add_bos_token` decides, or else what the file's own rules put before a text."""
        # Both always, so that a file that the library panics at does so here, where nobody sees it.
        with_rules = self._encoder.encode("a", add_special_tokens=True).ids
        without = self._encoder.encode("a", add_special_tokens=False).ids
        wanted = settings.get("add_bos_token")
        if isinstance(wanted, bool):
            return self._named(settings, "bos_token") if wanted else None
        if wanted is not None:
            settings_path = self.path.with_name("tokenizer_config.json")
            raise InputError(f"{settings_path}: add_bos_token is {str(wanted)[:60]}: true or false is needed")
        return with_rules[0] if with_rules[:1] != without[:1] else None


class ByteDecoder:
    """Streams text as soon as its bytes are characters, see `Tokenizer.detokenizer`."""

    def __init__(self, encoding: JSONEncoding) -> None:
        self._part = encoding.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips = encoding.strips  # one space, before the first text

    def add(self, token: int) -> str:
        return self._stripped(self._decoder.decode(self._part(token)))

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
    if any(
        not entry.special and _names_control(entry.content) for entry in encoder.get_added_tokens_decoder().values()
    ):
        values = json.loads(text)  # Phi-3's <|user|>, say: to the library it is a word like another
        for entry in values["added_tokens"]:
            entry["special"] = entry["special"] or _names_control(entry["content"])
        encoder = Encoder.from_str(json.dumps(values))
    return encoder


def _names_control(content: str) -> bool:
    return content[:2] in ("<|", "<\uff5c") and content[-2:] in ("|>", "\uff5c>")  # DeepSeek's are as wide as Han


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
    """Returns the steps of a decoder or pre-tokenizer, as in the file."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    nested: list[dict[str, Any]] | None = state.get("decoders", state.get("pretokenizers"))
    return [state] if nested is None else nested


def _decoding(path: Path, encoder: Any) -> tuple[bool, bool]:
    """Returns two flags: pieces are written in GPT-2's alphabet; a text loses a space at its beginning."""
    steps = _state(encoder.decoder)
    kinds = [str(step.get("type")) for step in steps]
    odd = next((kind for kind in kinds if kind not in _KNOWN), None if kinds else "none")
    if odd is not None:
        raise InputError(f"{path}: decodes by {odd}, which is not supported: byte-level and SentencePiece-like BPE are")
    metaspace = any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)
    return "ByteLevel" in kinds, metaspace or "Strip" in kinds


def _without_prefix(encoder: Any) -> Any:
    """Returns the encoder of a text after another: without the space that some put before the first one only."""
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
