"""Questions as token ids: what is read, and from where on it is scored.

Knows a tokenizer's `encode` and how the harness cuts text into context and continuation. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from elm_mlx.errors import InputError


class Encoder(Protocol):
    """As much of a tokenizer as is needed."""

    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str, add_bos: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Scored:
    """Ids of which those from `start` on are scored; `start` is at least 1."""

    ids: list[int]
    start: int


def encode(requests: Sequence[tuple[str, str]], tokenizer: Encoder, context: int) -> list[Scored]:
    """Each pair of context and continuation, BOS in front, cut from the left to what the model can read.

    The context's spaces at its end go to the continuation; then both are encoded together, and the context alone: what
    the whole has past the context's number of tokens is scored, after the context's own tokens (which where a token
    spans the border are not the whole's).

    Args:
        context: tokens that the model can read at once. The last one scored is never read.

    Raises:
        InputError: a continuation is longer than that, or has no tokens.
    """
    known: dict[str, list[int]] = {}
    return [_encode(text, after, tokenizer, context, known) for text, after in requests]


def begun(text: str, tokenizer: Encoder) -> list[int]:
    """A text's ids, and before them what the first is predicted from, as in the harness: BOS, or else EOS."""
    ids, first = tokenizer.encode(text), _first(tokenizer)
    return ids if first is None or ids[:1] == [first] else [first, *ids]


def _first(tokenizer: Encoder) -> int | None:
    return tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id


def _encode(text: str, after: str, tokenizer: Encoder, context: int, known: dict[str, list[int]]) -> Scored:
    bare = text.rstrip()
    if text == "":
        first = _first(tokenizer)
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
        raise InputError(f"an answer of {len(scored)} tokens, and the model reads {context} at once: {after[:60]!r}")
    ids = (read + scored)[-(context + 1) :]
    return Scored(ids, len(ids) - len(scored))


def digest(sequences: Sequence[Scored]) -> str:
    """What tells an item's ids, and what of them is scored, from any other's."""
    state = hashlib.blake2b(digest_size=8)
    for each in sequences:
        state.update(array("q", [len(each.ids), each.start, *each.ids]).tobytes())
    return state.hexdigest()
