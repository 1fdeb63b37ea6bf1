"""Our scores and speed against LM Evaluation Harness' through mlx-lm, on the same questions and the same machine.

    python benchmarks/harness.py PYTHON MODEL --data DIR

PYTHON is one that has `lm_eval` and `mlx-lm`, in an environment of its own. DIR holds the tasks as JSON lines (ARC,
BoolQ, COPA, HellaSwag, LAMBADA, PIQA, WinoGrande); those that it lacks are asked a few made-up questions. The harness
reads each task's questions, in the hub's own form, by its own definition of the task, examples included. What both
sides ask must be the same to the character, what they choose the same to the question. Sides take turns, and speed is
questions a second of scoring alone, tokenizing included, as a ratio from one run.

    --items N       questions of each task (40)
    --rounds N      of turns (3)
    --stock         also mlx-lm as it is installed, with its slow BLAS and the weights as stored
    --prompts       compare what is asked and chosen, once, and no speed
    --served        once with the harness' `local-completions`, which asks `elm-mlx serve`, and no speed; MODEL has a
                    tokenizer that transformers reads, and PYTHON has transformers and `lm_eval[api]`
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from serve import OURS, Server
from speed import ENVIRONMENT, machine

from elm_mlx.evaluate.questions import Question
from elm_mlx.evaluate.task_sources import load
from elm_mlx.evaluate.tasks import GROUPS, TASKS, Chosen

SHOTS = {"arc_challenge": 3, "crows_pairs_english": 3, "hellaswag": 2, "winogrande": 5, "mmlu_anatomy": 5}
TASK_FILES = {
    "arc_easy": "arc/arc_easy.yaml", "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "copa": "super_glue/copa/default.yaml", "crows_pairs_english": "crows_pairs/crows_pairs_english.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml", "lambada_openai": "lambada/lambada_openai.yaml", "piqa": "piqa/piqa.yaml",
    "race": "race/race.yaml", "sciq": "sciq/sciq.yaml", "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "winogrande": "winogrande/default.yaml", "mmlu_anatomy": "mmlu/default/mmlu_anatomy.yaml",
}  # fmt: skip
TOLERANCE = 2e-3  # nats over a whole answer, float32 in another order


def hub_record(name: str, question: Question) -> dict[str, Any]:
    """A question of a local file as the hub has it: what the harness' definition of the task reads."""
    context, right = question.contexts[0], question.right[0]
    texts = [text[1:] for text in question.continuations]
    bare = context.removeprefix("Question: ").removesuffix("\nAnswer:")
    if name.startswith("arc"):
        return {"question": bare, "choices": {"text": texts, "label": list("ABCDE")[: len(texts)]},
                "answerKey": "ABCDE"[right]}  # fmt: skip
    if name == "boolq":
        passage, _, asked = context.removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
        return {"passage": passage, "question": asked, "label": right}
    if name == "copa":
        premise, _, connector = context.rpartition(" ")
        kind = {"because": "cause", "therefore": "effect"}[connector]
        return {"premise": premise + ".", "question": kind, "choice1": texts[0].strip(), "choice2": texts[1].strip(),
                "label": right}  # fmt: skip
    if name == "hellaswag":
        label, _, rest = context.partition(": ")
        ctx_a, dot, ctx_b = rest.rpartition(". ")
        if rest[-1:] in ".!?" or not dot or ctx_b != ctx_b.capitalize():
            ctx_a, dot, ctx_b = rest, "", ""
        return {"activity_label": label, "ctx_a": ctx_a + dot.strip(), "ctx_b": ctx_b.lower(), "endings": texts,
                "label": str(right)}  # fmt: skip
    if name == "lambada_openai":
        return {"text": f"{context} {texts[0]}"}
    if name == "piqa":
        return {"goal": bare, "sol1": texts[0], "sol2": texts[1], "label": right}
    assert name == "winogrande"
    first, second = question.contexts
    start = next(at for at, (a, b) in enumerate(zip(first + " ", second + "  ", strict=False)) if a != b)
    return {"sentence": f"{first[:start]}_ {texts[0]}", "option1": first[start:], "option2": second[start:],
            "answer": str(right + 1)}  # fmt: skip


def made_up(name: str, number: int) -> dict[str, Any]:
    """A record of a task that has no local file, different for each number."""
    options = [f"{word} {number}" for word in ("a red house", "the sea", "nobody", "an old king’s café")]
    if name == "race":
        problems = [
            {"question": "The story happened in  _  .", "options": options, "answer": "B"},
            {"question": "Who was there?", "options": options, "answer": "C"},
            {"question": f"What did chapter {number} say?", "options": options, "answer": "ABCD"[number % 4]},
        ]
        return {"article": f"Once, in the year {1000 + number}, there was a king.", "problems": repr(problems)}
    if name == "sciq":
        return {"support": "" if number % 3 else f" Water boils at {number} degrees.", "question": f"What is {number}?",
                "distractor1": options[0], "distractor2": options[1], "distractor3": options[2],
                "correct_answer": options[3]}  # fmt: skip
    if name == "truthfulqa_mc2":
        return {"question": f"Is {number} a number?", "mc2_targets": {"choices": options, "labels": [1, 1, 0, 0]}}
    if name == "crows_pairs_english":
        return {"sent_more": f"The {number} old men sang badly.", "sent_less": f"The {number} young men sang badly."}
    return {"question": f" What is {number} and one? ", "choices": options, "answer": number % 4}


def write_job(directory: Path, data: Path, names: list[str], items: int) -> None:
    """Each task's questions and examples, in the hub's form, and the harness' definitions pointed at them."""
    (directory / "tasks").mkdir()
    for name in names:
        task = TASKS[name]
        try:
            found = load(Chosen(task), data).questions
            records = [hub_record(name, question) for question in found[: items + 40]]
        except Exception as error:  # no such file
            print(f"{name}: made-up questions ({type(error).__name__})", file=sys.stderr)
            records = [made_up(name, number) for number in range(items + 40)]
        files = {"asked": directory / f"{name}.jsonl", "shown": directory / f"{name}.examples.jsonl"}
        own = task.example_split == task.split  # examples are other questions of the same split
        for file, chosen in zip(
            files.values(), (records[:items], records[:items] if own else records[items:]), strict=True
        ):
            file.write_text("".join(json.dumps(record) + "\n" for record in chosen))
        splits = {task.split: str(files["asked"])} | ({} if own else {task.example_split: str(files["shown"])})
        for split in {"train", "validation", "test", "dev"} - set(splits):
            splits[split] = str(files["shown"])
        lines = [f"include: LM_EVAL/tasks/{TASK_FILES[name]}", f"task: elm_{name}", "dataset_path: json",
                 "dataset_name: null", f"dataset_kwargs: {json.dumps({'data_files': splits})}"]  # fmt: skip
        (directory / "tasks" / f"elm_{name}.yaml").write_text("\n".join(lines) + "\n")


def run(python: str, peer: str, job: Path) -> dict[str, Any]:
    """Runs `harness_worker.py` for `peer` in a process of `python`, offline, and returns its answer."""
    root = Path(__file__).parents[1]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(root), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(job.parent / "hub"), "TOKENIZERS_PARALLELISM": "false"}
    worker = [python, str(root / "benchmarks" / "harness_worker.py"), peer, str(job)]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{peer} failed:\n{done.stderr[-3000:]}")
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def check(peer: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[bool, str]:
    """Returns whether both asked the same and chose the same, and that in words."""
    texts = [
        number for number, (a, b) in enumerate(zip(first["requests"], second["requests"], strict=True))
        if list(map(list, a)) != list(map(list, b))
    ]  # fmt: skip
    if texts:
        number = texts[0]
        return False, f"{len(texts)} asked otherwise: {first['requests'][number]!r}, {second['requests'][number]!r}"
    pairs = list(zip(first["logprobs"], second["logprobs"], strict=True))
    if peer in ("equal", "stock") and any(text != text.rstrip() for each in first["requests"] for text, _ in each):
        # mlx-lm's wrapper does not score the spaces at a context's end, which are the same for all choices.
        pairs = [([a - one[0] for a in one], [b - other[0] for b in other]) for one, other in pairs]
    far = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    chosen = sum(best(one) != best(other) for one, other in pairs)
    greedy = sum(a != b for a, b in zip(first["greedy"], second["greedy"], strict=True))
    scores = {key: (first["scores"][key], second["scores"][key]) for key in first["scores"] if key in second["scores"]}
    renamed = {"mc2": "acc"}  # as the harness calls it
    scores |= {a: (first["scores"][a], second["scores"][b]) for a, b in renamed.items() if a in first["scores"]}
    same = all(abs(a - b) < 1e-4 * max(1, abs(b)) for a, b in scores.values())
    shown = ", ".join(f"{key} {a:.4f}" + ("" if abs(a - b) < 1e-4 * max(1, abs(b)) else f" and {b:.4f}")
                      for key, (a, b) in scores.items())  # fmt: skip
    words = f"{len(pairs)} questions, {chosen} chosen otherwise, log-probabilities within {far:.1e}, {shown}"
    return same and not chosen and not greedy and far < TOLERANCE, words


def best(values: list[float]) -> int:
    """Returns the index of the greatest value, the first of several."""
    return max(range(len(values)), key=values.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python")
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASK_FILES))
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--prompts", action="store_true")
    parser.add_argument("--served", action="store_true")
    given = parser.parse_args()
    names = given.tasks.split(",")
    assert not set(names) & set(GROUPS), "name a group's tasks"
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_job(directory, given.data, names, given.items)
        find = [given.python, "-c", "import lm_eval, pathlib; print(pathlib.Path(lm_eval.__file__).parent)"]
        home = subprocess.run(find, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        for file in (directory / "tasks").iterdir():
            file.write_text(file.read_text().replace("LM_EVAL", home))
        job = directory / "job.json"
        shots = {name: SHOTS.get(name, 0) for name in names}
        work = {"model": str(given.model.resolve()), "directory": temporary, "tasks": shots}
        job.write_text(json.dumps(work))
        print(machine())
        if given.served:
            with Server(OURS, given.model.resolve()) as server:
                job.write_text(json.dumps({**work, "url": server.url}))
                compare(given.python, job, shots, 1, ["served"], False)
            return
        peers = ["equal", "encoded", "handed"] if given.prompts else ["equal", "stock"] if given.stock else ["equal"]
        compare(given.python, job, shots, 1 if given.prompts else given.rounds, peers, not given.prompts)


def compare(python: str, job: Path, shots: dict[str, int], rounds: int, others: list[str], speed: bool) -> None:
    """Ask all peers in turn; print task by task what agrees, and how fast each was."""
    peers: list[tuple[str, str]] = [("ours", sys.executable), *((peer, python) for peer in others)]
    answers: dict[str, list[dict[str, Any]]] = {peer: [] for peer, _ in peers}
    for _ in range(rounds):
        for peer, interpreter in peers:
            answers[peer].append(run(interpreter, peer, job))
    alike = True
    for name in shots:
        for peer in (peer for peer in others if peer != "stock"):
            same, words = check(peer, answers["ours"][0][name], answers[peer][0][name])
            alike &= same
            print(f"{name:<20} {shots[name]:>2} shots  {'the same' if same else 'DIFFERENT':<9} {peer:<7} {words}")
    if speed:
        tell_speed(shots, answers, others)
    if not alike:
        sys.exit("not the same scores")


def tell_speed(names: Iterable[str], answers: Mapping[str, list[dict[str, Any]]], peers: list[str]) -> None:
    """Questions a second, and ratios: by the clock, and by the processors' time, which others' work changes less."""

    def rate(peer: str, name: str, clock: str) -> float:
        return statistics.median(len(each[name]["requests"]) / each[name][clock] for each in answers[peer])

    columns = " ".join(f"{peer:>10} {'ratio':>6} {'by processor':>12}" for peer in peers)
    print(f"{'questions/s':<20} {'ours':>10} {columns}")
    for name in names:
        ours, used = rate("ours", name, "seconds"), rate("ours", name, "processor")
        cells = [
            f"{rate(peer, name, 'seconds'):>10.1f} {ours / rate(peer, name, 'seconds'):>6.1f} "
            f"{used / rate(peer, name, 'processor'):>12.1f}"
            for peer in peers
        ]
        print(f"{name:<20} {ours:>10.1f} {' '.join(cells)}")


if __name__ == "__main__":
    main()
