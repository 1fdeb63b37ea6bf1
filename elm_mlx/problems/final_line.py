"""What an answer says in the end: its last line, and the number or the words there; or its last block of code.

A model may write its way to an answer before it, so only the last line with anything in it counts. There the answer
stands alone, or after the last `=`, `:`, `is`, `equals` or `equal to`; a final dot, Markdown's marks or TeX's around it
(`**`, `$`, `\\boxed{}`, code) do not matter. What else the text says is not read: whoever writes down every possible
answer has given the last one. Digits are ASCII's.
"""

from __future__ import annotations

import re
import textwrap

LONGEST = 100_000  # characters of an answer that is read; a longer one says nothing

_WITHIN_LINE = 1000  # characters of the last line; nothing that is asked for is as long
_AROUND = (("**", "**"), ("`", "`"), ("$", "$"), ("\\boxed{", "}"))  # how models mark their answers
_DIGITS = 40  # of a number: Python refuses to convert some thousands
_STATES = re.compile(r"=|:|\b(?:is|equals|equal to)\b")
_GROUPED = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")


def final_line(answer: str) -> str | None:
    """Returns the last line that is not blank, without spaces around it; None where none is, or it is too long."""
    if len(answer) > LONGEST:
        return None
    line = answer.strip().rpartition("\n")[2].strip()
    return line if 0 < len(line) <= _WITHIN_LINE else None


def said(answer: str) -> str | None:
    """Returns what the final line states: all of it, or what follows the last `=`, `:`, `is` and so on; or None."""
    line = final_line(answer)
    if line is None:
        return None
    line = _bare(line)
    *_, stated = _STATES.split(line)
    return _bare(stated) or None


def number(answer: str) -> int | None:
    """Returns the whole number that the final line states, `1,234` being one; None where it states none."""
    stated = said(answer)
    return None if stated is None else whole(stated)


def numbers(answer: str) -> list[int] | None:
    """Returns the whole numbers that the final line states as a list, with commas or spaces between them, or None."""
    stated = said(answer)
    if stated is None:
        return None
    found = [whole(each) for each in re.split(r"\s*,\s*|\s+", stated.strip("[]() "))]
    return None if None in found else [each for each in found if each is not None]


def whole(text: str) -> int | None:
    """Returns a decimal whole number; None for anything else."""
    digits = text.removeprefix("-")
    if _GROUPED.fullmatch(digits):
        digits = digits.replace(",", "")
    if not 0 < len(digits) <= _DIGITS or not digits.isascii() or not digits.isdigit():
        return None
    return int(digits) * (-1 if text.startswith("-") else 1)


def last_block(answer: str) -> str | None:
    """Returns an answer's last block between lines of ```, or all of it, dedented; None where it is too long."""
    return next(reversed(blocks(answer)), None)


def blocks(answer: str) -> list[str]:
    """Returns an answer's blocks between lines of ```, or all of it as one, dedented; none where it is too long."""
    if len(answer) > LONGEST:
        return []
    lines = answer.split("\n")
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    if not fences:
        return [_flush(answer)]
    pairs = zip(fences[::2], [*fences[1::2], len(lines)], strict=False)
    return [_flush("\n".join(lines[begin + 1 : end])) for begin, end in pairs]


def _flush(text: str) -> str:
    return textwrap.dedent(text).strip()


def _bare(text: str) -> str:
    """Returns a text without the final dot and marks around it."""
    while True:
        bare = text.strip().removesuffix(".").strip()
        for begin, end in _AROUND:
            bare = bare.removeprefix(begin).removesuffix(end)
        if bare == text:
            return bare
        text = bare
