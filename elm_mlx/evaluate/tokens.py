"""Questions as token ids, cut into context and continuation as LM Evaluation Harness cuts them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from elm_mlx.errors import InputError


class TextEncoder(Protocol):
    """The part of a tokenizer that is needed here."""

    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str, add_bos: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Scored:
    """Token ids, scored from index `start` on, which is at least 1."""

    ids: list[int]
    start: int


def encode(requests: Sequence[tuple[str, str]], tokenizer: TextEncoder, context: int) -> list[Scored]:
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
                f"an answer of {len(scored)} tokens, and the model reads {context} at once: {after[:60]!r}"
            )
        ids = (read + scored)[-(context + 1) :]
        found.append(Scored(ids, len(ids) - len(scored)))
    return found


def begun(text: str, tokenizer: TextEncoder) -> list[int]:
    """Encodes a text after the token that predicts its first one, as the harness: BOS, or else EOS."""
    ids, first = tokenizer.encode(text), _first(tokenizer)
    return ids if first is None or ids[:1] == [first] else [first, *ids]


def _first(tokenizer: TextEncoder) -> int | None:
    return tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id


def digest(sequences: Sequence[Scored]) -> str:
    """A hash of an item's ids and of which of them are scored."""
    state = hashlib.blake2b(digest_size=8)
    for each in sequences:
        state.update(array("q", [len(each.ids), each.start, *each.ids]).tobytes())
    return state.hexdigest()
