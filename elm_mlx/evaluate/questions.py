"""What a task asks: texts to be scored after other texts, and which of them is right.

Knows the three shapes of a JSON-lines task. Knows nothing of particular tasks, of tokens and of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHAPES = "`query`/`choices`/`gold`, `context_options`/`continuation`/`gold` or `context`/`continuation`"


class BadQuestion(Exception):
    """A record that is no question; the text is the reason."""


@dataclass(frozen=True)
class Question:
    """One item of a task.

    Attributes:
        contexts: what is read before; one for all choices, or one for each.
        continuations: what is scored, with the space before it; one for all choices, or one for each.
        right: indices of the right choices.
        lengths: characters of each choice, without that space, which `acc_norm` divides by.
        example: context and right answer, as it stands before the questions of others.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    right: tuple[int, ...]
    lengths: tuple[int, ...]
    example: str

    def requests(self, before: str = "") -> list[tuple[str, str]]:
        """Pairs of context and continuation, one for each choice; `before` is what examples there are."""
        count = max(len(self.contexts), len(self.continuations))
        contexts = self.contexts * (count // len(self.contexts))
        continuations = self.continuations * (count // len(self.continuations))
        return [(before + context, text) for context, text in zip(contexts, continuations, strict=True)]


def choices(
    context: str, texts: Sequence[str], right: int | Sequence[int], space: str = " ", shown: int | None = None
) -> Question:
    """Choices that follow one context. `shown` is the one that examples show, where several are right."""
    answers = (right,) if isinstance(right, int) else tuple(right)
    if not texts or any(not 0 <= answer < len(texts) for answer in answers):
        raise BadQuestion(f"the right choice is number {list(answers)}, counted from 0, of {len(texts)}")
    answer = texts[answers[0] if shown is None else shown]
    return Question(
        (context,), tuple(space + text for text in texts), answers, tuple(map(len, texts)), context + space + answer
    )


def partial(contexts: Sequence[str], continuation: str, right: int) -> Question:
    """Contexts that one continuation follows: "partial evaluation" (Trinh and Le, 2018)."""
    if not 0 <= right < len(contexts):
        raise BadQuestion(f"the right context is number {right}, counted from 0, of {len(contexts)}")
    lengths = tuple(map(len, contexts))
    return Question(tuple(contexts), (" " + continuation,), (right,), lengths, f"{contexts[right]} {continuation}")


def continuation(context: str, text: str, shown: str | None = None) -> Question:
    """One text after one context: is it what the model would say? `shown` is what an example shows for it."""
    return Question((context,), (" " + text,), (0,), (len(text),), f"{context} {text if shown is None else shown}")


def of_shape(record: Mapping[str, Any]) -> Question:
    """A question of one of the three shapes. Raises BadQuestion."""
    if "context_options" in record:
        return partial(_texts(record, "context_options"), _text(record, "continuation"), _index(record))
    if "query" in record:
        return choices(_text(record, "query"), _texts(record, "choices"), _index(record))
    if "context" in record:
        return continuation(_text(record, "context"), _text(record, "continuation"))
    raise BadQuestion(
        f"is of none of the shapes {SHAPES}; it has {', '.join(f'`{key}`' for key in record) or 'nothing'}"
    )


def has_shape(record: Mapping[str, Any]) -> bool:
    """Whether a record is of one of the three shapes, rather than as the hub has it."""
    shapes = ({"query", "choices"}, {"context_options", "continuation"}, {"context", "continuation"})
    return any(shape <= record.keys() for shape in shapes)


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or (key != "query" and not value.strip()):
        raise BadQuestion(f"`{key}` is no text" if key in record else f"`{key}` is missing")
    return value


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise BadQuestion(f"`{key}` is no list of texts" if key in record else f"`{key}` is missing")
    return value


def _index(record: Mapping[str, Any]) -> int:
    value = record.get("gold")
    if type(value) is not int:
        raise BadQuestion("`gold` is no whole number" if "gold" in record else "`gold` is missing")
    return value
