"""What the built-in judges call right: compared with a reading of the prompt by other means, and against attacks."""

from __future__ import annotations

import json
import random
import re
import time
from decimal import Decimal
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.problems.built_in import TASKS
from elm_mlx.problems.checked_task import Problem, Verdict

RIGHT, WRONG, UNREADABLE = Verdict.RIGHT, Verdict.WRONG, Verdict.UNREADABLE
SEEDS = range(150)


def problems(name: str) -> list[Problem]:
    task = TASKS[name]
    return [task.problem(level, seed) for level in range(1, task.difficulties + 1) for seed in SEEDS]


def verdict(name: str, made: Problem, answer: str) -> Verdict:
    return TASKS[name].judge(made, answer)


def test_arithmetic() -> None:
    for made in problems("arithmetic"):
        asked = re.fullmatch(r"What is ([0-9+*() -]+)\?\n", made.prompt)
        assert asked is not None
        result = eval(asked[1])
        assert made.solution == str(result)
        for answer in (f"{asked[1]} = {result}", f"The answer is {result}.", f"Let me see.\n\n**{result}**\n"):
            assert verdict("arithmetic", made, answer) is RIGHT, answer
        for answer in (str(result + 1), str(-result or 1), f"{result}0", f"{result}\n{result + 1}"):
            assert verdict("arithmetic", made, answer) is WRONG, answer
        for answer in (f"{result} or {result + 1}", " ".join(map(str, range(2000))), asked[1]):
            assert verdict("arithmetic", made, answer) is UNREADABLE, answer


def test_comparison() -> None:
    words = {"greater": max, "smaller": min, "the greatest": max, "the smallest": min}
    for made in problems("comparison"):
        asked = re.fullmatch(r"Which is ([a-z ]+), ([0-9., ]+) or ([0-9.]+)\?\n", made.prompt)
        assert asked is not None
        shown = [*asked[2].split(", "), asked[3]]
        values = [Decimal(each) for each in shown]
        assert len(set(values)) == len(values)
        right = shown[values.index(words[asked[1]](values))]
        assert made.solution == right
        assert verdict("comparison", made, f"The answer is {right}.") is RIGHT
        for each in shown:
            assert verdict("comparison", made, each) is (RIGHT if each == right else WRONG)
        for answer in (", ".join(shown), f"{right} {right}", "100000", asked[1]):
            assert verdict("comparison", made, answer) is UNREADABLE


def test_sorting() -> None:
    for made in problems("sorting"):
        asked = re.fullmatch(r"Sort from (smallest to largest|largest to smallest): ([0-9, ]+)\n", made.prompt)
        assert asked is not None
        shown = [int(each) for each in asked[2].split(", ")]
        right = sorted(shown, reverse=asked[1].startswith("largest"))
        assert made.solution == ", ".join(map(str, right))
        for answer in (" ".join(map(str, right)), f"Sorted: {right}.", f"{shown}\n{right}"):
            assert verdict("sorting", made, answer) is RIGHT
        mutants = [
            right[::-1],
            right[1:],
            [*right, right[-1]],
            [right[1], right[0], *right[2:]],
            shown,
            [],
            shown + right,
        ]
        for mutant in mutants:
            assert verdict("sorting", made, ", ".join(map(str, mutant))) is not RIGHT


def test_counting() -> None:
    counts = set()
    for made in problems("counting"):
        asked = re.fullmatch(r"How many times is the letter (.) in (?:this list:|the word) ([a-z ]+)\n", made.prompt)
        assert asked is not None
        count = asked[2].count(asked[1])
        counts.add(count)
        assert made.solution == str(count)
        assert verdict("counting", made, str(count + 1)) is WRONG
        assert verdict("counting", made, asked[2]) is UNREADABLE
    assert counts == set(range(max(counts) + 1))


def test_brackets() -> None:
    for made in problems("brackets"):
        asked = re.fullmatch(r"Write the brackets that close these: ([][(){}<> ]+)\n", made.prompt)
        assert asked is not None
        rest = (asked[1] + made.solution).replace(" ", "")
        while (less := re.sub(r"\(\)|\[\]|\{\}|<>", "", rest)) != rest:
            rest = less
        assert rest == ""
        right = made.solution.replace(" ", "")
        for answer in (right, f"{right}.", f"They are these.\n{right}\n", f"The brackets: {right}"):
            assert verdict("brackets", made, answer) is RIGHT
        for answer in (right[1:], right + right[-1], right[:-1] + "(", asked[1], asked[1] + right):
            assert verdict("brackets", made, answer) is not RIGHT
        assert verdict("brackets", made, f"The brackets after {right}") is UNREADABLE


def test_countdown() -> None:
    for made in problems("countdown"):
        asked = re.fullmatch(
            r"Make (\d+) from the numbers ([0-9, ]+) with ([-+*/, and]+)\. Use each number once\.\n", made.prompt
        )
        assert asked is not None
        target, numbers = int(asked[1]), [int(each) for each in asked[2].split(", ")]
        right = made.solution
        assert eval(right) == target
        assert sorted(int(each) for each in re.findall(r"\d+", right)) == sorted(numbers)
        assert set(re.sub(r"[0-9() ]", "", right)) <= set(asked[3])
        spaced = f"({right.replace(' ', '')})"
        for answer in (
            spaced,
            f"{right} = {target}.",
            f"First 1 + 1 = 2.\nAnswer: {right}",
            f"**{right}**",
            f"{target} = {right}",
        ):
            assert verdict("countdown", made, answer) is RIGHT, answer
        for answer in (
            f"{right} + 0",
            f"{right} = {target + 1}",
            f"{right} * 1",
            str(target),
            f"{target} + 0",
            "1 / 0",
        ):
            assert verdict("countdown", made, answer) is WRONG, answer
        for answer in (
            f"{right} + ",
            f"+{right}",
            f"-({right})",
            right.replace("0", "０") + "２",
            f"{right} = {right}",
        ):
            assert verdict("countdown", made, answer) is not RIGHT, answer
        assert verdict("countdown", made, f"{right}; {right}") is UNREADABLE


@pytest.mark.parametrize(
    "answer", ["2 ** 3", "7 // 2", "1_0 + 2", "0x10", "1e3", "3(4)", "(3, 4)", "3 if 4 else 5", "++3"]
)
def test_an_expression_has_four_operations(answer: str) -> None:
    made = Problem("", "", {"numbers": [2, 3], "target": 8, "signs": "+-*/"})
    assert verdict("countdown", made, answer) is UNREADABLE


def test_a_sign_that_was_not_offered() -> None:
    made = Problem("", "", {"numbers": [2, 3], "target": 6, "signs": "+-"})
    assert verdict("countdown", made, "2 * 3") is WRONG


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    "form",
    [
        "{}", "Answer: {}", "**Answer:** {}", "**Answer: {}**", "## Final answer: `{}`", "answer is {}.", "`{}`",
        "**{}**", "${}$", "<answer>{}</answer>", "Let me see.\n\n<answer>\n{}\n</answer>\n",
        "<answer>1</answer> No:\n<answer>Answer: {}</answer>", "So:\n```\n{}\n```\n",
        "<answer>```text\n{}\n```</answer>", "\\boxed{{{}}}",
    ],
)  # fmt: skip
def test_all_tasks_read_an_answer_in_one_way(name: str, form: str) -> None:
    """However models mark theirs; and a wrong one stays wrong."""
    task = TASKS[name]
    for made in (task.problem(level, seed) for level in range(1, task.difficulties + 1) for seed in range(3)):
        assert task.judge(made, form.format(made.solution)) is RIGHT
        assert task.judge(made, form.format("")) is not RIGHT
        assert task.judge(made, form.format(made.solution) + "\nor not") is not RIGHT or name in ("json", "python")


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("json", "python")])
@pytest.mark.parametrize(
    "form",
    [
        "The answer is not: {}", "It is not {}", "It isn't: {}", "The wrong answer is {}", "Not the answer: {}",
        "=> {}", "The answer is not \"{}\"", "<answer>not: {}</answer>", "**Not**: {}", "{} is wrong", "{} or {}",
        "I don't think the answer is: {}", "It would be a mistake to say: \"{}\"",
        "not = {}", "Answer: {} or something else", "! {}", "Wrong: \"{}\"", "It is not: \"It is: {}\"",
    ],
)  # fmt: skip
def test_what_is_denied_or_left_open_is_not_right(name: str, form: str) -> None:
    task = TASKS[name]
    for made in (task.problem(level, seed) for level in range(1, task.difficulties + 1) for seed in range(3)):
        assert task.judge(made, form.format(made.solution, made.solution)) is not RIGHT


@pytest.mark.parametrize("answer", ["=> ] )", "( [ < => ] )", "= > ] )"])
def test_an_arrow_closes_no_bracket(answer: str) -> None:
    assert verdict("brackets", Problem("", "", {"right": ">])"}), answer) is UNREADABLE


LONG = 1_000_000
ATTACKS = [
    *(each * LONG for each in ("1", " ", "\n", "=", "(", "[", "{", "-", "a", ".", ":", "is ", "**", "1 ", "1,")),
    *(each * LONG for each in ("1\n", "\\", '"', "`")),
    *(each * 33_000 for each in ("1", "(", "[", "-", "1, ", " .", "= ", "is:", "```\n", '{"a":')),
    *(each * 900 for each in ("1", "(", "[", "-", " ", ".", "=")),
    "1" * 199, "(" * 199, "-" * 198 + "1", "1+" * 99 + "1", "9*" * 99 + "9", "(" * 90 + "1" + ")" * 90,
    "\ud800", "\0", "\u2028",
    "١٢", "Ⅷ", "\u202e28", "inf", "nan", "1e999", "-0", "```", "```python\n```", "{}", "[]", "null", '""', "'", "==",
]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_every_text_has_a_verdict_soon(name: str) -> None:
    task = TASKS[name]
    made = task.problem(task.difficulties, 0)
    for answer in ATTACKS:
        began = time.process_time()
        assert task.judge(made, answer) is not RIGHT
        assert time.process_time() - began < 0.5, answer[:20]


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=150)
@given(st.data())
def test_no_text_breaks_a_judge(name: str, data: st.DataObject) -> None:
    task = TASKS[name]
    made = task.problem(data.draw(st.integers(1, task.difficulties)), data.draw(st.integers(0, 9)))
    pieces = st.sampled_from([*"0123456789+-*/()[]{}<>=:,.\"'`\n \\", "is", made.solution, made.prompt, "**", "\ud800"])
    answer = data.draw(st.text() | st.lists(pieces, max_size=30).map("".join))
    assert task.judge(made, answer) in Verdict


def test_json() -> None:
    for made in problems("json")[::3]:
        schema = json.loads(made.prompt.removeprefix("Write JSON that fits this schema: "))
        assert schema == made.facts["schema"]
        validator = jsonschema.Draft202012Validator(schema)
        validator.check_schema(schema)
        right = made.solution
        for answer in (
            f"```json\n{right}\n```",
            f"{right}.",
            json.dumps(json.loads(right), indent=2),
            f"Here:\n```\n{right}\n```",
        ):
            assert verdict("json", made, answer) is RIGHT, answer
        for answer in (
            f"{right}\n{right}",
            f"Here: {right}",
            right[:-1],
            right.replace('"', "'"),
            right[:-1] + "," + right[1:],
        ):
            assert verdict("json", made, answer) is UNREADABLE, answer
        draw = random.Random(right)
        for _ in range(10):
            mutant = mutated(json.loads(right), draw)
            expected = RIGHT if validator.is_valid(mutant) else WRONG
            assert verdict("json", made, json.dumps(mutant)) is expected, mutant
        assert verdict("json", made, json.dumps(schema)) is WRONG


def mutated(value: Any, draw: random.Random) -> Any:
    """`value` with one thing in it changed."""
    if isinstance(value, dict) and draw.random() < 0.8:
        key = draw.choice([*value])
        kind = draw.randrange(8)
        if kind == 0:
            return {each: inner for each, inner in value.items() if each != key}
        if kind == 1:
            return {**value, "other": 1}
        return {**value, key: mutated(value[key], draw)}
    if isinstance(value, list) and draw.random() < 0.7:
        return draw.choice([value[1:], value * 2, [*value, None], [mutated(each, draw) for each in value], value[::-1]])
    if isinstance(value, int) and draw.random() < 0.6:
        return draw.choice([value + 1, value - 1, float(value), value + 0.5, str(value), -value, value + 10**30])
    return draw.choice([None, True, False, 0, 1, "", "red", [], {}, [1], 1e308, str(value), "Red "])


@pytest.mark.parametrize(
    "answer", ["NaN", "[Infinity]", "1e999", "1" * 5000, "[" * 99, '{"a": 1, "a": 1}', "", "{]", "\ufeff{}"]
)
def test_what_is_no_json_that_fits(answer: str) -> None:
    schema = {"type": "integer", "minimum": 0, "maximum": 9}
    assert verdict("json", Problem("", "", {"schema": schema}), answer) is not RIGHT


def test_quotation() -> None:
    for made in problems("quotation"):
        asked = re.fullmatch(r"(.*)\nQuote the sentence (after the one )?with the word ([a-z]+)\.\n", made.prompt)
        assert asked is not None
        passage = re.split(r"(?<=[a-z]{3}[.!?]) (?=[A-Z])", asked[1])
        (found,) = (i for i, sentence in enumerate(passage) if asked[3] in sentence.lower())
        right = passage[found + (asked[2] is not None)]
        assert made.solution == right
        bare, other = right.removesuffix("."), next(each for each in passage if each != right)
        for answer in (
            f'"{right}"',
            f'"{bare}"',
            f'"{bare}".',
            f"'{right}'",
            f"*{right}*",
            f'**"{right}"**',
            bare,
            right.replace(" ", "  "),
            f"It is this one:\n\n{right}\n",
            f'The sentence is "{right}"',
            f"The sentence is: {right}",
            f'Here: "{right}"',
        ):
            assert verdict("quotation", made, answer) is RIGHT, answer
        mutants = [
            right.lower(),
            right[1:],
            right.replace(" ", ""),
            right.replace("e", "a", 1),
            f"The sentence is {right}",
            asked[1],
            f'"{right}" or "{other}"',
            f'"{right}" I think',
            f"{right}: {other}",
            f'It is not "{other}" but {right}',
            '"',
            '""',
        ]
        for answer in (*(each for each in passage if each != right), *mutants, right.rpartition(" ")[0]):
            assert verdict("quotation", made, answer) is WRONG, answer


def test_marks_stand_around_an_expression_and_join_no_digits() -> None:
    made = Problem("", "", {"numbers": [35, 2], "target": 37, "signs": "+-"})
    for answer in ("`35 + 2`", "$35 + 2 = 37$", "35 + 2 = **37**.", "**35 + 2** = 37", "Answer: **35 + 2**"):
        assert TASKS["countdown"].judge(made, answer) is RIGHT
    for answer in ("3**5 + 2", "3`5 + 2", "35 + 2 = 3**7"):
        assert TASKS["countdown"].judge(made, answer) is not RIGHT
