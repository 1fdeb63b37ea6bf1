"""The tasks: where their data are, their few-shot examples, their metrics; and the paper's suites of them.

Everything is as in LM Evaluation Harness 0.4.13. The paper used its commit dc90fec, which differs in two places that
matter: MMLU's name on the hub, and a bug in RACE's prompts (task version 2), mended since (version 3).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.evaluate import questions as ask
from elm_mlx.evaluate.questions import Question, of_shape

_SEED = 1234  # the harness' own


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        read: makes a question of a record as the hub has it.
        adopt: makes the same question of a record of one of the three shapes.
        metrics: the first is what the paper reports, and what a mean is taken of.
        dataset, config: on the hub; None for a file of the user's.
        split: that of the questions; `example_split` is the few-shot examples', the same where there is no other.
        leaves_out: draw one example more than is shown, so that the question itself can be left out. The harness
            does so where neither the examples' split nor a test split is named, which changes the draws.
        first_examples: take the split's first examples, rather than draw some for each question.
        description: stands before everything else.
        shots: how many examples, whatever is asked for.
        group: the group that this is a part of, which is reported as one.
    """

    name: str
    read: Callable[[Mapping[str, Any]], Question]
    metrics: tuple[str, ...]
    dataset: str | None = None
    config: str | None = None
    split: str = "test"
    example_split: str = "train"
    leaves_out: bool = False
    first_examples: bool = False
    description: str = ""
    adopt: Callable[[Mapping[str, Any]], Question] = of_shape
    shots: int | None = None
    group: str | None = None


@dataclass(frozen=True)
class Chosen:
    """A task and how many few-shot examples stand before each of its questions."""

    task: Task
    shots: int = 0

    @property
    def key(self) -> str:
        """The name of its results: `arc_challenge@25`."""
        return f"{self.task.name}@{self.shots}" if self.shots else self.task.name

    def contexts(self, questions: Sequence[Question], pool: Sequence[Question] | None) -> list[str]:
        """Returns what stands before each of the task's first questions: description, and examples with answers.

        One generator draws for one question after the other, as in the harness, so the first N questions have the
        same examples whether or not others follow.

        Raises:
            InputError: `pool` has too few to draw from.
        """
        task, shots = self.task, self.shots
        if not shots:
            return [task.description] * len(questions)
        assert pool is not None
        count = shots + task.leaves_out
        if len(pool) < count:
            raise InputError(f"{task.name}: needs {count} few-shot examples, and there are {len(pool)}")
        draw = random.Random(_SEED)
        texts = []
        for question in questions:
            drawn = pool[:shots] if task.first_examples else [pool[i] for i in draw.sample(range(len(pool)), count)]
            if task.leaves_out:
                drawn = [each for each in drawn if each != question]
            texts.append(task.description + "".join(f"{each.example}\n\n" for each in drawn[:shots]))
        return texts


_SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)  # fmt: skip
_MMLU = [
    Task(
        f"mmlu_{subject}", ask.mmlu, ("acc",), "cais/mmlu", subject, example_split="dev", first_examples=True,
        description="The following are multiple choice questions (with answers) about "
        f"{subject.replace('_', ' ')}.\n\n",
        group="mmlu",
    )
    for subject in _SUBJECTS
]  # fmt: skip
_ARC = Task("arc_easy", ask.arc, ("acc_norm", "acc"), "allenai/ai2_arc", "ARC-Easy", adopt=ask.arc_adopted)

TASKS: dict[str, Task] = {
    task.name: task
    for task in [
        _ARC,
        replace(_ARC, name="arc_challenge", config="ARC-Challenge"),
        Task("boolq", ask.boolq, ("acc",), "aps/super_glue", "boolq", "validation", leaves_out=True,
            adopt=ask.boolq_adopted),
        Task("copa", ask.copa, ("acc",), "aps/super_glue", "copa", "validation", leaves_out=True,
            adopt=ask.copa_adopted),
        Task("crows_pairs_english", ask.crows_pairs, ("pct_stereotype", "likelihood_diff"),
            "jannalu/crows_pairs_multilingual", "english", example_split="test"),
        Task("hellaswag", ask.hellaswag, ("acc_norm", "acc"), "Rowan/hellaswag", None, "validation", leaves_out=True),
        Task("lambada_openai", ask.lambada, ("acc", "perplexity"), "EleutherAI/lambada_openai", "default",
            example_split="test", adopt=ask.lambada_adopted),
        Task("piqa", ask.piqa, ("acc_norm", "acc"), "baber/piqa", None, "validation", leaves_out=True,
            adopt=ask.piqa_adopted),
        Task("race", ask.race, ("acc",), "EleutherAI/race", "high", example_split="test"),
        Task("sciq", ask.sciq, ("acc_norm", "acc"), "allenai/sciq"),
        Task("truthfulqa_mc2", ask.truthfulqa, ("mc2",), "truthfulqa/truthful_qa", "multiple_choice", "validation",
            example_split="validation", shots=0),
        Task("winogrande", ask.winogrande, ("acc",), "allenai/winogrande", "winogrande_xl", "validation",
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
    """The tasks of a suite. Raises InputError for an unknown name."""
    if name not in SUITES:
        raise InputError(f"suite {name!r} is not one of {', '.join(SUITES)}")
    return [chosen for task, shots in SUITES[name].items() for chosen in named(task, shots)]


def named(name: str, shots: int | None = None) -> list[Chosen]:
    """A task, or the tasks of a group, with so many examples, unless the task sets its own number.

    Raises:
        InputError: there is no such task.
    """
    if name not in TASKS and name not in GROUPS:
        known = [*(task.name for task in TASKS.values() if task.group is None), *GROUPS]
        raise InputError(
            f"task {name!r} is not one of {', '.join(sorted(known))}, nor a .jsonl file of questions; "
            "--harness takes those of lm_eval"
        )
    found = [TASKS[each] for each in GROUPS.get(name, [name])]
    return [Chosen(task, task.shots if task.shots is not None else shots or 0) for task in found]


def report_names(asked: Sequence[tuple[str, str | None, int]]) -> list[str]:
    """The name to report each task, group and number of shots by: the group's where all its parts are there."""
    there: dict[tuple[str | None, int], set[str]] = {}
    for name, group, shots in asked:
        there.setdefault((group, shots), set()).add(name)
    return [
        group if group is not None and set(GROUPS.get(group, ())) <= there[group, shots] else name
        for name, group, shots in asked
    ]
