"""Questions of the three shapes: what is scored after what, and what is no question."""

from __future__ import annotations

import pytest

from elm_mlx.data.bad_record import BadRecord
from elm_mlx.evaluate import questions
from elm_mlx.evaluate.questions import Question, choices, continuation, has_shape, of_shape, partial


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
        ({"query": "q", "choices": ["a"], "gold": True}, "`gold` is not a whole number"),
        ({"query": "q", "choices": ["a"]}, "`gold` is missing"),
        ({"query": "q", "choices": [], "gold": 0}, "`choices` is not a list of strings"),
        ({"query": "q", "choices": ["a", 3], "gold": 0}, "`choices` is not a list of strings"),
        ({"query": 3, "choices": ["a"], "gold": 0}, "`query` holds no text"),
        ({"context": "c", "continuation": " "}, "`continuation` holds no text"),
        ({"context_options": ["a", "b"], "continuation": "c", "gold": -1}, "counted from 0, of 2"),
        ({"text": "t"}, "it has `text`"),
        ({}, "it has nothing"),
    ],
)
def test_what_is_no_question_is_said(record: dict[str, object], reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        of_shape(record)


def test_the_example_shows_the_first_right_choice() -> None:
    assert choices("Q:", ["a", "b", "c"], [1, 2]).example == "Q: b"
    assert partial(["x", "y"], "z", 0).example == "x z"
    assert continuation("a", "b", shown=" b").example == "a  b"


def test_arc_from_the_hub_and_from_json_lines() -> None:
    found = questions.arc(
        {"question": "What is ice?", "choices": {"text": ["fire", "water"], "label": ["1", "2"]}, "answerKey": "2"}
    )
    assert found.requests()[1] == ("Question: What is ice?\nAnswer:", " water")
    assert found.right == (1,)
    assert questions.arc_adopted({"query": "Question: What is ice?", "choices": ["fire", "water"], "gold": 1}) == found


def test_boolq() -> None:
    found = questions.boolq({"passage": "Ice floats.", "question": "does ice float", "label": 1})
    assert found.requests() == [
        ("Ice floats.\nQuestion: does ice float?\nAnswer:", " no"),
        ("Ice floats.\nQuestion: does ice float?\nAnswer:", " yes"),
    ]
    record = {"query": "Passage: Ice floats.\nQuestion: does ice float?", "choices": ["no", "yes"], "gold": 1}
    assert questions.boolq_adopted(record) == found
    with pytest.raises(BadRecord, match="not a passage with a question"):
        questions.boolq_adopted(record | {"query": "Ice floats."})


def test_copa_has_two_spaces_and_small_letters() -> None:
    found = questions.copa(
        {"premise": "It rained. ", "question": "effect", "choice1": "We ran.", "choice2": "We sang.", "label": 0}
    )
    assert found.requests()[0] == ("It rained therefore", "  we ran.")
    assert found.lengths == (8, 9)
    record = {"query": "It rained, therefore", "choices": ["we ran.", "we sang."], "gold": 0}
    assert questions.copa_adopted(record) == found
    with pytest.raises(BadRecord, match="because"):
        questions.copa_adopted(record | {"query": "It rained"})


def test_crows_pairs_reads_nothing_before() -> None:
    found = questions.crows_pairs({"sent_more": "A", "sent_less": "B"})
    assert found.requests() == [("", "A"), ("", "B")]
    assert found.example == "A"


def test_hellaswag_is_tidied_and_its_second_half_capitalised() -> None:
    found = questions.hellaswag(
        {
            "activity_label": "Sport",
            "ctx_a": "[header] How to run [title] Wear shoes.  They help.",
            "ctx_b": "the man",
            "endings": [" runs. ", "sits [step] down", "a", "b"],
            "label": "0",
        }
    )
    assert found.contexts == ("Sport: How to run. Wear shoes. They help. The man",)
    assert found.continuations[:2] == (" runs.", " sits down")


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("Roof: A man sits. he", "Roof: A man sits. He"),
        ("Roof: Is it hot? the old man", "Roof: Is it hot? The old man"),
        ("Roof: the man", "Roof: The man"),
        ("Health: How to sleep. Lie down.", "Health: How to sleep. Lie down."),
        ("Health: It is well. then you can sleep.", "Health: It is well. then you can sleep."),
    ],
)
def test_hellaswag_as_text_gets_its_capital_back(context: str, expected: str) -> None:
    assert questions.hellaswag_adopted(context, ["a", "b", "c", "d"], 0).contexts == (expected,)


def test_lambada_asks_for_the_last_word_and_shows_two_spaces() -> None:
    found = questions.lambada({"text": "He said yes\nand no"})
    assert found.requests() == [("He said yes\nand", " no")]
    assert found.example == "He said yes\nand  no"
    assert questions.lambada_adopted({"context": "He said yes\nand", "continuation": "no"}) == found


def test_mmlu() -> None:
    found = questions.mmlu({"question": " Two? ", "choices": ["1", "2", "3", "4"], "answer": 1})
    assert found.contexts == ("Two?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",)
    assert found.continuations == (" A", " B", " C", " D")


def test_piqa() -> None:
    found = questions.piqa({"goal": "boil water", "sol1": "heat it", "sol2": "cool it", "label": 0})
    assert found.requests()[0] == ("Question: boil water\nAnswer:", " heat it")
    record = {"query": "Question: boil water\n", "choices": ["heat it", "cool it"], "gold": 0}
    assert questions.piqa_adopted(record) == found


def test_race_shows_the_answers_to_all_but_the_last() -> None:
    problems = [
        {"question": "The king was  _  .", "options": ["old", "young", "ill", "dead"], "answer": "A"},
        {"question": "Where?", "options": ["here", "there", "far", "near"], "answer": "C"},
        {"question": "Why?", "options": ["love", "hate", "money", "war"], "answer": "D"},
    ]
    found = questions.race({"article": "Once.", "problems": repr(problems)})
    assert found.contexts == ("Article: Once.\n\nThe king was old\nQuestion: Where?\nAnswer: far\nWhy?",)
    assert found.continuations[3] == " war"
    assert found.right == (3,)


def test_sciq_puts_the_right_answer_last() -> None:
    record = {"support": " Ice.", "question": "What?", "distractor1": "a", "distractor2": "b", "distractor3": "c"}
    found = questions.sciq(record | {"correct_answer": "d"})
    assert found.requests()[3] == ("Ice.\nQuestion: What?\nAnswer:", " d")
    assert found.right == (3,)


def test_truthfulqa_has_six_questions_before_its_own() -> None:
    targets = {"choices": ["yes", "no", "maybe"], "labels": [1, 0, 1]}
    found = questions.truthfulqa({"question": "Is it?", "mc2_targets": targets})
    assert found.contexts[0].count("\n\nQ: ") == 6
    assert found.contexts[0].startswith("Q: What is human life expectancy in the United States?\nA: Human life")
    assert found.contexts[0].endswith("held in Barcelona, Spain.\n\nQ: Is it?\nA:")
    assert found.right == (0, 2)


def test_winogrande_scores_the_rest_after_each_name() -> None:
    record = {"sentence": "Ann helped Eve since _ was kind.", "option1": "Ann", "option2": "Eve", "answer": "1"}
    found: Question = questions.winogrande(record)
    assert found.requests() == [
        ("Ann helped Eve since Ann", " was kind."),
        ("Ann helped Eve since Eve", " was kind."),
    ]
    assert found.right == (0,)
