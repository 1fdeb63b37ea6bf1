"""The tasks: where their data are, how many examples they take, what is measured; and the paper's suites of them.

Everything is as in LM Evaluation Harness 0.4.13. The paper used its commit dc90fec, which differs in two places that
matter: MMLU's name on the hub, and a bug in RACE's prompts (task version 2), mended since (version 3).

Knows names and figures; `prompts` knows what is asked. Knows nothing of files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.evaluate import questions
from elm_mlx.evaluate.questions import Question, of_shape

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        read: a record as the hub has it to a question.
        adopt: a record of one of the three shapes to the question that the harness asks.
        metrics: what is measured; the first is what the paper reports, and what a mean is taken of.
        dataset, config: on the hub; None for a file of the user's.
        split: what is asked; `example_split` is where examples come from, the same where there is no other.
        leaves_out: one more example is drawn than is shown, so that the question itself can be left out. The
            harness does so where neither the examples' split nor a test split is named, which draws others.
        first_examples: examples are the split's first, rather than drawn for each question.
        description: what stands before all.
        shots: how many examples, whatever is asked for.
        group: of which this is a part, the mean over whose questions is told.
    """

    name: str
    read: Callable[[Record], Question]
    metrics: tuple[str, ...]
    dataset: str | None = None
    config: str | None = None
    split: str = "test"
    example_split: str = "train"
    leaves_out: bool = False
    first_examples: bool = False
    description: str = ""
    adopt: Callable[[Record], Question] = of_shape
    shots: int | None = None
    group: str | None = None


@dataclass(frozen=True)
class Chosen:
    """A task and how many examples stand before each of its questions."""

    task: Task
    shots: int = 0

    @property
    def key(self) -> str:
        """What tells its results from others': `arc_challenge@25`."""
        return f"{self.task.name}@{self.shots}" if self.shots else self.task.name


_ARC = Task("", questions.arc, ("acc_norm", "acc"), "allenai/ai2_arc", adopt=questions.arc_adopted)
_SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios",
    "nutrition", "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)  # fmt: skip
_ABOUT = "The following are multiple choice questions (with answers) about"
_MMLU = [
    Task(
        f"mmlu_{subject}", questions.mmlu, ("acc",), "cais/mmlu", subject, example_split="dev", first_examples=True,
        description=f"{_ABOUT} {subject.replace('_', ' ')}.\n\n",
        group="mmlu",
    )
    for subject in _SUBJECTS
]  # fmt: skip

TASKS: dict[str, Task] = {
    task.name: task
    for task in [
        replace(_ARC, name="arc_easy", config="ARC-Easy"),
        replace(_ARC, name="arc_challenge", config="ARC-Challenge"),
        Task(
            "boolq", questions.boolq, ("acc",), "aps/super_glue", "boolq", "validation", leaves_out=True,
            adopt=questions.boolq_adopted,
        ),
        Task(
            "copa", questions.copa, ("acc",), "aps/super_glue", "copa", "validation", leaves_out=True,
            adopt=questions.copa_adopted,
        ),
        Task("crows_pairs_english", questions.crows_pairs, ("pct_stereotype", "likelihood_diff"),
            "jannalu/crows_pairs_multilingual", "english", example_split="test"),
        Task("hellaswag", questions.hellaswag, ("acc_norm", "acc"), "Rowan/hellaswag", None, "validation",
            leaves_out=True),
        Task("lambada_openai", questions.lambada, ("acc", "perplexity"), "EleutherAI/lambada_openai", "default",
            example_split="test", adopt=questions.lambada_adopted),
        Task("piqa", questions.piqa, ("acc_norm", "acc"), "baber/piqa", None, "validation", leaves_out=True,
            adopt=questions.piqa_adopted),
        Task("race", questions.race, ("acc",), "EleutherAI/race", "high", example_split="test"),
        Task("sciq", questions.sciq, ("acc_norm", "acc"), "allenai/sciq"),
        Task("truthfulqa_mc2", questions.truthfulqa, ("mc2",), "truthfulqa/truthful_qa", "multiple_choice",
            "validation", example_split="validation", shots=0),
        Task("winogrande", questions.winogrande, ("acc",), "allenai/winogrande", "winogrande_xl", "validation",
            leaves_out=True),
        *_MMLU,
    ]
}  # fmt: skip
GROUPS: dict[str, list[str]] = {"mmlu": [task.name for task in _MMLU]}

# The paper's tables 4a, 4b and 4c: tasks with the number of examples.
SUITES: dict[str, dict[str, int]] = {
    "zero-shot": dict.fromkeys(
        ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "sciq", "winogrande"), 0
    ),
    "openllm": {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5},
    "llm360": {
        "arc_challenge": 25, "crows_pairs_english": 25, "hellaswag": 10, "mmlu": 5, "piqa": 0, "race": 0,
        "truthfulqa_mc2": 0, "winogrande": 5,
    },
}  # fmt: skip


def suite(name: str) -> list[Chosen]:
    """The tasks of a suite. Raises InputError for a name that is none."""
    if name not in SUITES:
        raise InputError(f"no suite {name!r}; there are {', '.join(SUITES)}")
    return [chosen for task, shots in SUITES[name].items() for chosen in named(task, shots)]


def shown_as(asked: Sequence[tuple[str, str | None, int]]) -> list[str]:
    """What each task, group and number of shots is shown as: the group where all its parts are there, else the task."""
    there: dict[tuple[str | None, int], set[str]] = {}
    for name, group, shots in asked:
        there.setdefault((group, shots), set()).add(name)
    return [
        group if group is not None and set(GROUPS.get(group, ())) <= there[group, shots] else name
        for name, group, shots in asked
    ]


def named(name: str, shots: int | None = None) -> list[Chosen]:
    """A task, or the tasks of a group, with so many examples, unless the task says how many.

    Raises:
        InputError: there is no such task.
    """
    if name not in TASKS and name not in GROUPS:
        known = [*(task.name for task in TASKS.values() if task.group is None), *GROUPS]
        raise InputError(
            f"no task {name!r}; there are {', '.join(sorted(known))}, any .jsonl file of questions, "
            "and with --harness those of lm_eval"
        )
    found = [TASKS[each] for each in GROUPS.get(name, [name])]
    return [Chosen(task, task.shots if task.shots is not None else shots or 0) for task in found]


_SEED = 1234  # the harness' own
_BETWEEN = "\n\n"


def before(chosen: Chosen, questions: Sequence[Question], pool: Sequence[Question] | None) -> list[str]:
    """What stands before each of a task's first questions: its description, and examples with their answers.

    Draws are made one question after the other from one generator, so the first N questions have the same examples
    whether or not others follow.

    Raises:
        InputError: there are too few to draw from.
    """
    task, shots = chosen.task, chosen.shots
    if not shots:
        return [task.description] * len(questions)
    assert pool is not None
    wanted = shots + task.leaves_out
    if len(pool) < wanted:
        raise InputError(f"{task.name}: {wanted} examples are to be drawn, and there are {len(pool)}")
    draw = random.Random(_SEED)
    texts = []
    for question in questions:
        drawn = list(pool[:shots]) if task.first_examples else [pool[i] for i in draw.sample(range(len(pool)), wanted)]
        if task.leaves_out:
            drawn = [each for each in drawn if each != question]
        texts.append(task.description + "".join(each.example + _BETWEEN for each in drawn[:shots]))
    return texts
