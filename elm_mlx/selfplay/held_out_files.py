"""The prompts of data files that are not to be trained on, as those of an evaluation set. Imports no MLX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from elm_mlx.data import records
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.data.records import Conversation, Instruction, PlainText, Record
from elm_mlx.errors import InputError
from elm_mlx.problems.drawn_problems import normalized


def prompts_in(paths: Sequence[str]) -> frozenset[str]:
    """Returns the normalized prompts of data files: users' messages, instructions, and texts. Raises InputError."""
    found = set[str]()
    for path in paths:
        for split in records.read(path, paired=records.are_pairs(path)).values():
            for record in split.records:
                if isinstance(record, BadRecord):
                    raise InputError(f"--held-out: {record}")
                found.update(map(normalized, _prompts(record)))
    return frozenset(found)


def _prompts(record: Record) -> Iterator[str]:
    if isinstance(record, PlainText):
        yield record.text
    elif isinstance(record, Instruction):
        yield record.question
    else:
        asked = record.messages if isinstance(record, Conversation) else record.prompt
        if isinstance(asked, str):
            yield asked
        else:
            yield from (message["content"] for message in asked if message["role"] == "user")
