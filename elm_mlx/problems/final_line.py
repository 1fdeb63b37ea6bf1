"""What an answer says in the end: its last line, and the number or the words there; or its last block of code.

All tasks read an answer in this one way. A model may write its way to an answer before it, so only what comes last
counts: what is between `<answer>` and `</answer>` where the text ends by those, then its last line with anything in it
but a fence of ```. There the answer stands alone, or after `Answer:`; numbers, expressions and brackets also after the
last `:`, `is` or `are`, and numbers after the last `=`, `equals` or `equal to`. A final dot, Markdown's marks or TeX's
around it (`**`, `$`, `\\boxed{}`, code) do not matter. A line that denies what it states (`is not: 82`, `I don't think
it is 82`) states nothing; other denials (`I doubt that it is 82`) are not known. What else the text says is not read:
whoever writes down every possible answer has given the last one. Digits are ASCII's.
"""

from __future__ import annotations

import re
import string
import textwrap

LONGEST = 100_000  # characters of an answer that is read; a longer one says nothing

_WITHIN_LINE = 1000  # characters of the last line; nothing that is asked for is as long
_BEGIN, _END = "<answer>", "</answer>"
_FENCE = "```"
_MARKS = f"*`${string.whitespace}"  # around an answer, or before it alone, where the other stands before a colon
_BOXED = "\\boxed{"
_DIGITS = 40  # of a number: Python refuses to convert some thousands
_LABEL = re.compile(r"[#*\s]*(?:the |my )?(?:final |correct |right )?answer[*\s]*(?::|\bis\b:?)", re.IGNORECASE)
_STATES = re.compile(r":|\b(?:is|are)\b")
_STATES_OR_EQUALS = re.compile(rf"{_STATES.pattern}|(?<![!<>/~])=|\bequal(?:s| to)\b")
_APART = r"[^\w.,;!?]*"  # what may stand between the words of a denial
_DENIES = re.compile(
    rf"(?:(?:\b(?:not|cannot|never)|n['’]t)\b(?:{_APART}(?!so\b|then\b)[a-z]+(?=\s+(?:it|that|the|my)\b))?"
    rf"|\b(?:wrong|incorrect|false|mistake(?=\s+to\b))\b){_APART}"
    r"(?:\b(?:an?|the|my|it|that|right|correct|final|answer|result|sentence|equals?|to(?:\s+[a-z]+)?|be|is|are)\b"
    rf"{_APART}){{0,9}}$",
    re.IGNORECASE,
)
_GROUPED = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")


def final_line(answer: str) -> str | None:
    """Returns what the last line has that is neither blank nor a fence, without its label and marks.

    None where there is no such line, or it is too long.
    """
    text = _offered(answer).rstrip().removesuffix(_FENCE)
    line = text.rstrip().rpartition("\n")[2].strip()
    return _unlabelled(line) or None if len(line) <= _WITHIN_LINE else None


def said(answer: str, *, equation: bool = False) -> str | None:
    """Returns what the final line states: all of it, or what follows the last `=`, `:`, `is` and so on; or None.

    Args:
        equation: `=` is part of what is stated.
    """
    line, begin = final_line(answer) or "", 0
    for match in (_STATES if equation else _STATES_OR_EQUALS).finditer(line):
        begin = match.end()
    return None if denied(line[:begin]) else _bare(line[begin:]) or None


def denied(before: str) -> bool:
    """Says whether the words `before` what is stated say that it is not the answer."""
    return _DENIES.search(before) is not None


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
    """Returns the last of an answer's `blocks`; None where it is too long."""
    return next(reversed(blocks(answer)), None)


def blocks(answer: str) -> list[str]:
    """Returns an answer's blocks between lines of ```, dedented; none where it is too long.

    Where there are no such lines, all of it is one, without its label and marks.
    """
    answer = _offered(answer)
    if not answer:
        return []
    lines = answer.split("\n")
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith(_FENCE)]
    if not fences:
        return [_unlabelled(_flush(answer))]
    pairs = zip(fences[::2], [*fences[1::2], len(lines)], strict=False)
    return [_flush("\n".join(lines[begin + 1 : end])) for begin, end in pairs]


def _offered(answer: str) -> str:
    """Returns what the text offers as its answer: what is in the tags that it ends by, or all; "" of a too long one."""
    if len(answer) > LONGEST:
        return ""
    text = answer.rstrip()
    return text.removesuffix(_END).rpartition(_BEGIN)[2] if text.endswith(_END) else answer


def _flush(text: str) -> str:
    return textwrap.dedent(text).strip()


def _unlabelled(text: str) -> str:
    bare = _bare(text)
    label = _LABEL.match(bare)
    return _bare(bare[label.end() :]) if label else bare


def _bare(text: str) -> str:
    """Returns a text without the final dot and marks around it."""
    while True:
        text = text.lstrip(_MARKS).rstrip(f".{_MARKS}")
        if not (text.startswith(_BOXED) and text.endswith("}")):
            return text
        text = text[len(_BOXED) : -1]
