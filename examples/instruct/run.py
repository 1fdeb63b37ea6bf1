"""Teach the model of examples/classics to follow an instruction, and measure it: `python examples/instruct/run.py`.

Every step of training and writing is a command of elm-mlx's, which is printed before it runs; what stands between
them, questions, pairs and the check, is plain Python in this folder. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import measure
import task
from measure import Answer
from pairs import pairs

HERE = Path(os.path.relpath(Path(__file__).parent))
CLASSICS = HERE.parent / "classics"
TRIES = 8  # answers to each practice question
SHOTS = 4  # examples before a question to the model as it was


def main() -> None:
    parser = argparse.ArgumentParser(description="SFT, then DPO, on a task that a program checks.")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="a directory as cut.py makes it")
    parser.add_argument("--out", type=Path, default=Path("build/instruct"), help="where everything is written")
    parser.add_argument("--iters", type=int, help="updates of SFT and of DPO, for a shorter run")
    parser.add_argument(
        "--questions", type=int, help="to practise and to measure by, so many of each, for a shorter run"
    )
    arguments = parser.parse_args()
    out, shorter = arguments.out, [] if arguments.iters is None else ["--iters", arguments.iters]
    base, sft, dpo, tuned = (out / name for name in ("base", "sft", "dpo", "tuned"))
    with gzip.open(arguments.data / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        lessons = [json.loads(line) for line in file]
    words = json.loads((arguments.data / "words.json").read_text("utf-8"))
    asked = task.Questions(*(questions[: arguments.questions] for questions in task.questions(words)))

    convert = [CLASSICS / "checkpoint_average.pt", base, "--tokenizer", CLASSICS / "tokenizer.model", "--overwrite"]
    elm("convert", *convert)
    train("lora", base, arguments.data, sft, HERE / "sft.yaml", shorter)

    prompts = write(out / "practice.jsonl", ({"prompt": question} for question in asked.practice for _ in range(TRIES)))
    tries = answers(sft, prompts, 1, out / "tries.jsonl")
    train("dpo", sft, write_pairs(tries, out / "pairs"), dpo, HERE / "dpo.yaml", shorter)
    elm("fuse", sft, dpo, tuned, "--overwrite")

    tests = [*asked.test, *asked.new]
    prompts = write(out / "test.jsonl", ({"prompt": question} for question in tests))
    examples = "".join(lesson["prompt"] + lesson["completion"] + "\n" for lesson in lessons[:SHOTS])
    shown = write(out / "shown.jsonl", ({"prompt": examples + question} for question in tests))
    given = {
        (name, temperature): answers(model, file, temperature, out / "answers" / f"{label}-{temperature}.jsonl")
        for name, model, file, label in (
            ("as it was", base, prompts, "base"),
            ("as it was, after examples", base, shown, "shown"),
            ("after SFT", sft, prompts, "sft"),
            ("after DPO", tuned, prompts, "dpo"),
        )
        for temperature in (0, 1)
    }
    report(given, set(asked.test), base, [lesson["completion"] for lesson in lessons])


def report(
    given: Mapping[tuple[str, int], Sequence[Answer]], old: set[str], base: Path, sentences: Sequence[str]
) -> None:
    """Print the tables of the README, and of each model what it answered to the first questions."""
    texts = {"the lessons": sentences[: len(given["after SFT", 1])]}
    texts |= {name: [answer.text for answer in of_model] for (name, heat), of_model in given.items() if heat}
    for table in (measure.passing(given, old), measure.parts(given), measure.nature(texts, base, set(sentences))):
        print("\n" + "\n".join(table), flush=True)
    print("\n| asked, at temperature 1 | after SFT | after DPO |\n| --- | --- | --- |")
    for before, after in islice(zip(given["after SFT", 1], given["after DPO", 1], strict=True), 6):
        print(f"| {before.question.strip()} | {before} | {after} |")


def elm(*arguments: object, to: Path | None = None) -> None:
    """Run a command of elm-mlx's; end as it does where it fails. What is in the file `to` isn't made again."""
    words = [str(argument) for argument in arguments]
    print("\n$ elm-mlx", shlex.join(words), *(["  >", to] if to else []), flush=True)
    command = [sys.executable, "-m", "elm_mlx", *words]
    if to is None:
        code = subprocess.run(command).returncode
    elif to.exists():
        print(f"{to} is there", flush=True)
        return
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        unfinished = to.with_suffix(".unfinished")
        with unfinished.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file).returncode
    if code:
        sys.exit(code)
    if to is not None:
        unfinished.replace(to)


def train(command: str, model: Path, data: Path, run: Path, config: Path, shorter: list[object]) -> None:
    """A run of `elm-mlx lora` or `dpo`, or the rest of it, and its curves."""
    resume = ["--resume"] if (run / "checkpoints").exists() else []
    elm(command, model, "--data", data, "--out", run, "--config", config, *shorter, *resume)
    elm("report", run)


def answers(model: Path, prompts: Path, temperature: int, to: Path) -> list[Answer]:
    """What `model` says to each of `prompts`, up to the line's end."""
    how = ["--max-tokens", 48, "--stop", "\n", "--temp", temperature, "--seed", 1, "--json"]
    elm("generate", model, "--prompts", prompts, *how, to=to)
    return measure.read(to)


def write_pairs(tries: Sequence[Answer], directory: Path) -> Path:
    """Pairs of the SFT model's own answers; every tenth is set aside to choose the best checkpoint by."""
    records = list(pairs(tries, seed=0))
    if len(records) < 10:
        sys.exit(f"{len(records)} pairs: too few answers pass, or too few fail; ask more questions")
    passed = sum(answer.verdict.passes for answer in tries)
    print(f"\n{len(tries):,} answers, of which {passed:,} pass: {len(records):,} pairs to {directory}", flush=True)
    write(directory / "train.jsonl", (record for i, record in enumerate(records, 1) if i % 10))
    write(directory / "valid.jsonl", records[9::10])
    return directory


def write(path: Path, records: Iterable[Mapping[str, object]]) -> Path:
    """JSON lines, as all data of elm-mlx's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


if __name__ == "__main__":
    main()
