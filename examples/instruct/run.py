"""Teach the model of examples/classics to follow an instruction, and measure it: `python examples/instruct/run.py`.

Every step of training and writing is a command of elm-mlx's, which is printed before it runs; what stands between
them, questions, pairs and the check, is plain Python in this folder. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
CLASSICS = HERE.parent / "classics"
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
import scores  # noqa: E402
from command import elm  # noqa: E402
from pairs import pairs  # noqa: E402
from scores import Answer  # noqa: E402

TEMPERATURE = 0.7  # of answers that are drawn
TRIES = 8  # answers to each practice question
SHOTS = 4  # examples before a question to the model as it was


def main() -> None:
    parser = argparse.ArgumentParser(description="SFT, then DPO, on a task that a program checks.")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="a directory as cut.py makes it")
    parser.add_argument("--out", type=Path, default=Path("build/instruct"), help="where everything is written")
    parser.add_argument("--iters", type=int, help="updates of SFT and of DPO, for a shorter run")
    arguments = parser.parse_args()
    out, shorter = arguments.out, [] if arguments.iters is None else ["--iters", arguments.iters]
    base, sft, taught, dpo, tuned = (out / name for name in ("base", "sft", "taught", "dpo", "tuned"))
    lessons = texts.read(arguments.data / "train.jsonl.gz")
    practice = texts.read(arguments.data / "practice.jsonl.gz")
    held_out = texts.read(arguments.data / "held-out.jsonl.gz")

    convert = [CLASSICS / "checkpoint_average.pt", base, "--tokenizer", CLASSICS / "tokenizer.model", "--overwrite"]
    elm("convert", *convert)
    train("lora", base, arguments.data, sft, HERE / "sft.yaml", shorter)
    elm("fuse", base, sft, taught, "--overwrite")

    prompts = write(out / "practice.jsonl", (question for question in practice for _ in range(TRIES)))
    tries = answers(taught, prompts, TEMPERATURE, out / "tries.jsonl")
    train("dpo", taught, write_pairs(tries, out / "pairs"), dpo, HERE / "dpo.yaml", shorter)
    elm("fuse", taught, dpo, tuned, "--overwrite")

    prompts = write(out / "held-out.jsonl", held_out)
    examples = "".join(lesson["prompt"] + lesson["completion"] + "\n" for lesson in lessons[:SHOTS])
    shown = write(out / "shown.jsonl", ({"prompt": examples + question["prompt"]} for question in held_out))
    given = {
        (name, temperature): answers(model, file, temperature, out / "answers" / f"{label}-{temperature}.jsonl")
        for name, model, file, label in (
            ("as it was", base, prompts, "base"),
            ("as it was, after examples", base, shown, "shown"),
            ("after SFT", taught, prompts, "sft"),
            ("after DPO", tuned, prompts, "dpo"),
        )
        for temperature in (0, TEMPERATURE)
    }
    new = {question["prompt"] for question in held_out if question["new"]}
    report(given, new, base, [lesson["completion"] for lesson in lessons])


def report(
    given: Mapping[tuple[str, float], Sequence[Answer]], new: set[str], base: Path, sentences: Sequence[str]
) -> None:
    """Print the tables of the README, and of each model what it answered to the first questions."""
    before, after = given["after SFT", TEMPERATURE], given["after DPO", TEMPERATURE]
    written = {"the lessons": sentences[: len(before)]}
    written |= {name: [answer.text for answer in of_model] for (name, heat), of_model in given.items() if heat}
    for table in (scores.passing(given, new), scores.parts(given), scores.nature(written, base, set(sentences))):
        print("\n" + "\n".join(table), flush=True)
    print("\n| asked | after SFT | after DPO |\n| --- | --- | --- |")
    for first, second in islice(zip(before, after, strict=True), 12):
        print(f"| {first.question.strip()} | {first} | {second} |")


def train(command: str, model: Path, data: Path, run: Path, config: Path, shorter: list[object]) -> None:
    """A run of `elm-mlx lora` or `dpo`, or the rest of it, and its curves."""
    resume = ["--resume"] if (run / "checkpoints").exists() else []
    elm(command, model, "--data", data, "--out", run, "--config", config, *shorter, *resume)
    elm("report", run)


def answers(model: Path, prompts: Path, temperature: float, to: Path) -> list[Answer]:
    """Returns `model`'s answer to each of `prompts`; those of an earlier run, if the file `to` is there."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if not to.exists():
        how = ["--max-tokens", 48, "--temp", temperature, "--seed", 1, "--json"]
        elm("generate", model, "--prompts", prompts, *how, to=to)
    return scores.read(to)


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
