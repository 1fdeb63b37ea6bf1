"""Filters of raw text: by length, repetition, symbols, likeness. Each can be off; each has a name for what it drops."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass

from elm_mlx.errors import InputError

_RUN = 5  # words

# Why a document is left out, in the order in which that is asked.
DUPLICATE, SHORT, REPETITIVE, SYMBOLS, FEW_TOKENS = "duplicate", "short", "repetitive", "symbols", "few tokens"
UNLIKE = "unlike"
REASONS = (DUPLICATE, SHORT, REPETITIVE, SYMBOLS, FEW_TOKENS, UNLIKE)


@dataclass(frozen=True)
class Filters:
    """The raw text that is kept, by default as OpenELM's was where the paper says.

    Args:
        nfc: bring text into Unicode's normal form C.
        duplicates: leave out a document whose text, in normal form C, an earlier one has.
        min_chars: leave out texts of fewer characters. Empty ones always are.
        max_repetition: leave out texts with a larger `repetition`; None for none.
        max_symbols: leave out texts with a larger share of `symbols`; None for none.
        min_tokens: leave out texts of fewer tokens, BOS and EOS not counted.
        like: trusted texts, a source's path, that those which are kept are to be like.
        like_share: of what the other filters keep of each source, the share that is kept, the most alike.
    """

    nfc: bool = True
    duplicates: bool = True
    min_chars: int = 200
    max_repetition: float | None = 0.3
    max_symbols: float | None = 0.3
    min_tokens: int = 256
    like: str | None = None
    like_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("min_chars", "min_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("max_repetition", "max_symbols"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name} must be from 0 to 1, not {value}")
        if not 0 < self.like_share <= 1:
            raise InputError(f"like_share must be above 0 and at most 1, not {self.like_share}")

    def normalized(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def objection(self, text: str) -> str | None:
        """Returns the reason to leave the text out, as far as it needs no tokens; None to keep it."""
        if len(text) < self.min_chars or not text.strip():
            return SHORT
        if self.max_repetition is not None and repetition(text) > self.max_repetition:
            return REPETITIVE
        if self.max_symbols is not None and symbols(text) > self.max_symbols:
            return SYMBOLS
        return None


def repetition(text: str) -> float:
    """Returns the share of runs of five words that occurred before in the text; without spaces, as in Chinese, 0."""
    words = text.split()
    runs = len(words) - _RUN + 1
    if runs < 1:
        return 0.0
    return 1 - len(set(zip(*(words[i:] for i in range(_RUN)), strict=False))) / runs


def symbols(text: str) -> float:
    """Returns the share of characters, white space not counted, that are punctuation, symbols or controls."""
    counts = Counter(text)
    visible = sum(count for character, count in counts.items() if not character.isspace())
    odd = (count for c, count in counts.items() if unicodedata.category(c)[0] in "PSC" and not c.isspace())
    return sum(odd) / visible if visible else 0.0


def text_hash(text: str) -> int:
    """Hashes a text to 64 bits, never 0; the same for all its Unicode forms."""
    data = unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
