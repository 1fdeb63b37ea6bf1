"""What is chosen of a record: right answers once, and pairs in which no answer comes twice."""

from __future__ import annotations

from elm_mlx.problems.checked_task import Verdict
from elm_mlx.selfplay.answer_record import RecordedAnswer, RecordedProblem
from elm_mlx.selfplay.chosen_answers import ChosenAnswers

VERDICTS = {"+": Verdict.RIGHT, "-": Verdict.WRONG, "?": Verdict.UNREADABLE}


def problem(number: int, *answers: str, prompt: str = "") -> RecordedProblem:
    """Answers as `+text`, `-text`, `?text`, or `…text` for one without an end."""
    made = tuple(
        RecordedAnswer(each[1:], VERDICTS.get(each[0], Verdict.UNREADABLE), 1, each[0] != "…") for each in answers
    )
    return RecordedProblem(number, 1, prompt or f"problem {number}", 0, made)


def chosen(*problems: RecordedProblem) -> ChosenAnswers:
    found = ChosenAnswers()
    found.add(problems, {"model": "m"})
    return found


def test_right_answers_once_for_each_prompt() -> None:
    found = chosen(
        problem(0, "+4", "-5", "+4", "+ 4\n", "+four"), problem(1, "+4"), problem(2, "+4", "+5", prompt="problem 0")
    )
    kept = [(each["prompt"], each["completion"]) for each in found.examples]
    assert kept == [("problem 0", "4"), ("problem 0", "four"), ("problem 1", "4"), ("problem 0", "5")]
    assert found.duplicates == 3


def test_each_line_says_how_it_came_about() -> None:
    found = chosen(problem(7, "-5", "+4"))
    about = {"model": "m", "difficulty": 1, "problem": 7}
    assert found.examples[0]["source"] == about | {"sample": 1, "verdict": "right"}
    assert found.pairs[0]["source"] == about | {"samples": [1, 0], "verdicts": ["right", "wrong"]}


def test_no_answer_is_in_two_pairs_and_wrong_ones_come_before_unreadable_ones() -> None:
    found = chosen(problem(0, "+a", "+b", "+c", "?what", "-x", "-x"), problem(1, "+a", "-y", "-z"), problem(2, "-a"))
    pairs = [(each["prompt"], each["chosen"], each["rejected"]) for each in found.pairs]
    assert pairs == [("problem 0", "a", "x"), ("problem 0", "b", "what"), ("problem 1", "a", "y")]


def test_what_was_cut_off_or_is_empty_is_in_nothing() -> None:
    found = chosen(problem(0, "+a", "…a long answ", "- ", "?"), problem(1, "…4", "-5"))
    assert [each["completion"] for each in found.examples] == ["a"] and not found.pairs


def test_later_problems_are_compared_with_all_before() -> None:
    found = chosen(problem(0, "+4"))
    found.add([problem(9, "+4", prompt="problem 0"), problem(10, "+6")], {"model": "n"})
    assert [each["completion"] for each in found.examples] == ["4", "6"] and found.duplicates == 1
