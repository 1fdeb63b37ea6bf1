"""Questions and their prompts, to the character those of LM Evaluation Harness 0.4.

`NAME(record)` makes a question of a record as the hub has it. `NAME_adopted(record)` makes it of one of the three
shapes of JSON lines (SHAPES), which other tools write with prompts of their own: those are taken apart again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elm_mlx.data.bad_record import BadRecord

SHAPES = "`query`/`choices`/`gold`, `context_options`/`continuation`/`gold` or `context`/`continuation`"

_PRIMER = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""  # before each of TruthfulQA's questions
_CONNECTORS = {"cause": "because", "effect": "therefore"}


@dataclass(frozen=True)
class Question:
    """One item of a task: choices whose log-probabilities are compared.

    Attributes:
        contexts: the text before each choice, or one for all choices.
        continuations: the text that is scored, with the space before it; one for each choice, or one for all.
        right: indices of the right choices.
        lengths: characters of each choice, without that space, which `acc_norm` divides by.
        example: context and right answer, as a few-shot example shows them.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    right: tuple[int, ...]
    lengths: tuple[int, ...]
    example: str

    def requests(self, before: str = "") -> list[tuple[str, str]]:
        """Returns context and continuation of each choice; `before`, the few-shot examples, precedes each context."""
        count = max(len(self.contexts), len(self.continuations))
        contexts = self.contexts * (count // len(self.contexts))
        continuations = self.continuations * (count // len(self.continuations))
        return [(before + context, text) for context, text in zip(contexts, continuations, strict=True)]


def choices(context: str, texts: Sequence[str], right: int | Sequence[int], space: str = " ") -> Question:
    """Choices that follow one context. An example shows the first of those that are right."""
    answers = (right,) if isinstance(right, int) else tuple(right)
    if not texts or any(not 0 <= answer < len(texts) for answer in answers):
        raise BadRecord(f"the right choice is number {list(answers)}, counted from 0, of {len(texts)}")
    example = context + space + texts[answers[0]]
    return Question((context,), tuple(space + text for text in texts), answers, tuple(map(len, texts)), example)


def partial(contexts: Sequence[str], continuation: str, right: int) -> Question:
    """Contexts that one continuation follows: "partial evaluation" (Trinh and Le, 2018)."""
    if not 0 <= right < len(contexts):
        raise BadRecord(f"the right context is number {right}, counted from 0, of {len(contexts)}")
    lengths = tuple(map(len, contexts))
    return Question(tuple(contexts), (" " + continuation,), (right,), lengths, f"{contexts[right]} {continuation}")


def continuation(context: str, text: str, shown: str | None = None) -> Question:
    """One text after one context, right where greedy decoding gives it. `shown` replaces it in examples."""
    return Question((context,), (" " + text,), (0,), (len(text),), f"{context} {text if shown is None else shown}")


def of_shape(record: Mapping[str, Any]) -> Question:
    """Makes a question of a record of one of the three shapes. Raises BadRecord."""
    if "context_options" in record:
        return partial(_texts(record, "context_options"), _text(record, "continuation"), _index(record))
    if "query" in record:
        return choices(_text(record, "query"), _texts(record, "choices"), _index(record))
    if "context" in record:
        return continuation(_text(record, "context"), _text(record, "continuation"))
    keys = ", ".join(f"`{key}`" for key in record) or "nothing"
    raise BadRecord(f"has none of the shapes {SHAPES}; it has {keys}")


def has_shape(record: Mapping[str, Any]) -> bool:
    """Tells a record of one of the three shapes from one as the hub has it."""
    shapes = ({"query", "choices"}, {"context_options", "continuation"}, {"context", "continuation"})
    return any(shape <= record.keys() for shape in shapes)


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or (key != "query" and not value.strip()):
        raise BadRecord(f"`{key}` holds no text" if key in record else f"`{key}` is missing")
    return value


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise BadRecord(f"`{key}` is not a list of strings" if key in record else f"`{key}` is missing")
    return value


def _index(record: Mapping[str, Any]) -> int:
    value = record.get("gold")
    if type(value) is not int:
        raise BadRecord("`gold` is not a whole number" if "gold" in record else "`gold` is missing")
    return value


def _query(record: Mapping[str, Any]) -> tuple[str, list[str], int]:
    if "query" not in record:
        raise BadRecord("has no `query` with `choices`")
    of_shape(record)
    return record["query"], record["choices"], record["gold"]


def arc(record: Mapping[str, Any]) -> Question:
    found = record["choices"]
    context = f"Question: {record['question']}\nAnswer:"
    return choices(context, found["text"], list(found["label"]).index(record["answerKey"]))


def arc_adopted(record: Mapping[str, Any]) -> Question:
    query, texts, right = _query(record)
    return choices(f"Question: {query.removeprefix('Question: ')}\nAnswer:", texts, right)


def boolq(record: Mapping[str, Any]) -> Question:
    context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return choices(context, ["no", "yes"], int(record["label"]))


def boolq_adopted(record: Mapping[str, Any]) -> Question:
    query, texts, right = _query(record)
    passage, found, question = query.removeprefix("Passage: ").rpartition("\nQuestion: ")
    if not found or texts != ["no", "yes"]:
        raise BadRecord("is not a passage with a question that no or yes answers")
    return boolq({"passage": passage, "question": question.removesuffix("?"), "label": right})


def copa(record: Mapping[str, Any]) -> Question:
    context = f"{record['premise'].strip()[:-1]} {_CONNECTORS[record['question']]}"
    # The harness' choices have a space of their own here: with the one before them two, in examples as well.
    texts = [f" {text[0].lower()}{text[1:]}" for text in (record["choice1"], record["choice2"])]
    return choices(context, texts, int(record["label"]))


def copa_adopted(record: Mapping[str, Any]) -> Question:
    query, texts, right = _query(record)
    for question, connector in _CONNECTORS.items():
        premise = query.removesuffix(f", {connector}")
        if premise != query:
            first, second = texts
            known = {"premise": f"{premise}.", "question": question, "label": right}
            return copa({**known, "choice1": first, "choice2": second})
    raise BadRecord("ends with neither `, because` nor `, therefore`")


def crows_pairs(record: Mapping[str, Any]) -> Question:
    """Neither is right: it is measured how often the first, the stereotype, is likelier."""
    return choices("", [record["sent_more"], record["sent_less"]], 0, space="")


def hellaswag(record: Mapping[str, Any]) -> Question:
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return choices(_tidy(context), [_tidy(ending) for ending in record["endings"]], int(record["label"]))


def hellaswag_adopted(context: str, endings: list[str], right: int) -> Question:
    """Capitalises the beginning of the last sentence, which the text file of llama.cpp's users does not."""
    start = max(context.rfind(end) + len(end) for end in (". ", "! ", "? ", ": "))
    begun = context[start:]
    if begun[:1].islower() and context[-1:] not in ".!?":
        context = context[:start] + begun.capitalize()
    return choices(context, endings, right)


def _tidy(text: str) -> str:
    """Removes the marks of WikiHow's pages."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def lambada(record: Mapping[str, Any]) -> Question:
    before, _, last = record["text"].rpartition(" ")
    return lambada_adopted({"context": before, "continuation": last})


def lambada_adopted(record: Mapping[str, Any]) -> Question:
    context, answer = of_shape(record).requests()[0]
    # The harness' answer begins with a space, and its examples have one more before each answer.
    return continuation(context, answer[1:], shown=answer)


def mmlu(record: Mapping[str, Any]) -> Question:
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", record["choices"], strict=True))
    return choices(f"{record['question'].strip()}\n{listed}\nAnswer:", list("ABCD"), int(record["answer"]))


def piqa(record: Mapping[str, Any]) -> Question:
    context = f"Question: {record['goal']}\nAnswer:"
    return choices(context, [record["sol1"], record["sol2"]], int(record["label"]))


def piqa_adopted(record: Mapping[str, Any]) -> Question:
    query, texts, right = _query(record)
    goal = query.removeprefix("Question: ").removesuffix("\n")
    return choices(f"Question: {goal}\nAnswer:", texts, right)


def race(record: Mapping[str, Any]) -> Question:
    """Asks the last of an article's questions; the others stand before it with their answers."""
    *answered, asked = ast.literal_eval(record["problems"])
    context = f"Article: {record['article']}\n\n"
    for problem in answered:
        question, answer = problem["question"], problem["options"]["ABCD".index(problem["answer"])]
        if question.endswith("  _  ."):
            context += f"{question[:-5]}{answer}\n"
        else:
            context += f"Question: {question}\nAnswer: {answer}\n"
    return choices(context + asked["question"], asked["options"][:4], "ABCD".index(asked["answer"]))


def sciq(record: Mapping[str, Any]) -> Question:
    context = f"{record['support'].lstrip()}\nQuestion: {record['question']}\nAnswer:"
    return choices(context, [record[key] for key in ("distractor1", "distractor2", "distractor3", "correct_answer")], 3)


def truthfulqa(record: Mapping[str, Any]) -> Question:
    targets = record["mc2_targets"]
    right = [number for number, label in enumerate(targets["labels"]) if label == 1]
    return choices(f"{_PRIMER}Q: {record['question']}\nA:", targets["choices"], right)


def winogrande(record: Mapping[str, Any]) -> Question:
    sentence = record["sentence"]
    gap = sentence.index("_")
    contexts = [sentence[:gap] + record[option] for option in ("option1", "option2")]
    return partial(contexts, sentence[gap + 1 :].strip(), int(record["answer"]) - 1)
