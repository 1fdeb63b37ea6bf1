"""What an answer says in the end."""

from __future__ import annotations

import pytest

from elm_mlx.problems.final_line import blocks, final_line, last_block, number, numbers


@pytest.mark.parametrize(
    "answer",
    [
        "82", " 82 ", "82.", "82\n", "\r\n82\r\n", "47 + 35 = 82", "So, 47 + 35 equals 82.", "It is equal to 82",
        "The answer is 82.", "Answer: 82", "**82**",
        "**82**.", "First 47, then 35.\nSo it is **82.**", "1\n2\n82", "=82", "082",
        "`82`", "$82$", "\\boxed{82}", "It is $\\boxed{82}$.", "$47 + 35 = \\boxed{82}$", "So $47 + 35 = 82$.",
        "**Answer:** 82", "**Answer: `82`.**", "<answer>82</answer>", "Answer:\n82",
        "It is not 81, it is 82", "Not 81: it equals 82", "Is it 81? It is not. It is 82",
        "81 is wrong; the answer is 82", "```\n82\n```", "*82*", "82...",
    ],
)  # fmt: skip
def test_a_number_is_read(answer: str) -> None:
    assert number(answer) == 82


@pytest.mark.parametrize(
    "answer",
    [
        "", " ", ".", "*", "82 or 83", "81 82", "82\nno", "82!", "is not 82", "８２", "八", "²", "1,23", "8 2", "8_2",
        "+82", "--82", "- 82", "0x52", "82.0", "8.2e1", "1" * 41, "9" * 100_001, "=" * 99_999, " " * 200_000,
        "<answer>82</answer> or 83", "<answer>82", "82</answer> 83", "<answer></answer>", "Answer: ",
        "x is not equal to 82", "It is not: 82", "The answer is **not**: 82", "It isn't: 82", "The wrong answer is 82",
        "Wrong: 82", "This is not the answer: 82", "81 != 82", "81 <= 82", "81 >= 82", "x /= 82", "81 ~= 82",
        "82\0", "\u200b82", "\\boxed{82} or 83", "\\boxed{81}\\boxed{82}", "$81$82$", "`" * 400 + "8`2", "{82}",
    ],
)  # fmt: skip
def test_what_is_not_one_number(answer: str) -> None:
    assert number(answer) is None


STATED = [
    f"{subject} {verb} 82" for subject in ("it", "that it", "the answer", "that the answer", "that my result")
    for verb in ("is", "is:", "equals", "is equal to")
]  # fmt: skip


@pytest.mark.parametrize(
    "denial",
    [
        "It is not true", "It can't be", "It cannot be", "I don't think", "I do **not** believe", "I never said",
        "It would be a mistake to say", "It is wrong to claim", "It wouldn't be right to say", "It is false",
    ],
)  # fmt: skip
def test_a_statement_in_a_denial_is_not_read(denial: str) -> None:
    assert [number(f"{denial} {stated}") for stated in STATED] == [None] * len(STATED)


@pytest.mark.parametrize(
    "before",
    [
        "I think", "It is safe to say", "I have no doubt", "I made a mistake, and now", "I made a mistake:",
        "Never mind:", "That is not right.", "It isn't hard:", "It can't be 81, so", "Not 81:", "If 81 is wrong then",
        "If it is not then", "81 is false so", "81 is incorrect;",
    ],
)  # fmt: skip
def test_a_statement_after_a_denial_of_something_else_is_read(before: str) -> None:
    assert [number(f"{before} {stated}") for stated in STATED] == [82] * len(STATED)


@pytest.mark.parametrize(
    "answer", ["Those not yet closed are: 82", "The one that is not prime is 82", "What isn't in the list is 82"]
)
def test_an_answer_that_is_described_by_what_it_is_not_is_read(answer: str) -> None:
    assert number(answer) == 82


def test_numbers_with_signs_and_groups() -> None:
    assert number("It is -1,234,567.") == -1234567


def test_a_list_of_numbers() -> None:
    for answer in ("3, 5, 9", "3 5 9", "[3, 5, 9]", "Sorted: 3,5,9.", "(3, 5, 9)", "These are 3, 5, 9"):
        assert numbers(answer) == [3, 5, 9]
    for answer in ("", "3, 5, nine", "3,, 5", "3; 5", ","):
        assert numbers(answer) is None


def test_the_last_line_that_is_not_blank() -> None:
    assert final_line("a\n b \n\n") == "b"
    assert final_line("a" * 1001) is None


def test_the_last_block_counts() -> None:
    assert last_block("a") == "a"
    assert last_block("```\na\n```\n```\nb\n```") == "b"
    assert last_block("```\na\n```\n```\nb") == "b"
    assert last_block("```\na\n```\nafter") == "a"
    assert last_block("x" * 100_001) is None
    assert blocks("```\na\n```\n```\nb") == ["a", "b"] and blocks("```") == [""] and blocks("a") == ["a"]
