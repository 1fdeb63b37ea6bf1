"""Questions of the three shapes: what is scored after what, and what is no question."""

from __future__ import annotations

import pytest

from elm_mlx.evaluate.questions import BadQuestion, choices, continuation, has_shape, of_shape, partial


def test_choices_follow_one_context_after_a_space() -> None:
    question = of_shape({"query": "Two and two are", "choices": ["five", "four"], "gold": 1})
    assert question.requests() == [("Two and two are", " five"), ("Two and two are", " four")]
    assert question.requests("One is 1.\n\n")[1] == ("One is 1.\n\nTwo and two are", " four")
    assert (question.right, question.lengths) == ((1,), (4, 4))
    assert question.example == "Two and two are four"


def test_one_continuation_follows_several_contexts() -> None:
    question = of_shape({"context_options": ["the cat", "the dog"], "continuation": "barked.", "gold": 1})
    assert question.requests() == [("the cat", " barked."), ("the dog", " barked.")]
    assert question.example == "the dog barked."


def test_a_continuation_by_itself() -> None:
    question = of_shape({"context": "Once upon a", "continuation": "time"})
    assert question.requests() == [("Once upon a", " time")]
    assert question.example == "Once upon a time"


def test_shapes_are_told_by_their_keys() -> None:
    assert has_shape({"query": "", "choices": []})
    assert has_shape({"context": "", "continuation": ""})
    assert not has_shape({"question": "", "choices": {}, "answerKey": "A"})
    assert not has_shape({"query": "alone"})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"query": "q", "choices": ["a"], "gold": 1}, "of 1"),
        ({"query": "q", "choices": ["a"], "gold": True}, "`gold` is no whole number"),
        ({"query": "q", "choices": ["a"]}, "`gold` is missing"),
        ({"query": "q", "choices": [], "gold": 0}, "`choices` is no list of texts"),
        ({"query": "q", "choices": ["a", 3], "gold": 0}, "`choices` is no list of texts"),
        ({"query": 3, "choices": ["a"], "gold": 0}, "`query` is no text"),
        ({"context": "c", "continuation": " "}, "`continuation` is no text"),
        ({"context_options": ["a", "b"], "continuation": "c", "gold": -1}, "counted from 0, of 2"),
        ({"text": "t"}, "it has `text`"),
        ({}, "it has nothing"),
    ],
)
def test_what_is_no_question_is_said(record: dict[str, object], reason: str) -> None:
    with pytest.raises(BadQuestion, match=reason):
        of_shape(record)


def test_the_example_shows_the_first_right_choice() -> None:
    assert choices("Q:", ["a", "b", "c"], [1, 2]).example == "Q: b"
    assert partial(["x", "y"], "z", 0).example == "x z"
    assert continuation("a", "b", shown=" b").example == "a  b"
