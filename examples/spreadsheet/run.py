"""A spreadsheet of questions and answers becomes a model for Ollama: `python examples/spreadsheet/run.py MODEL`.

Every step but the count at the end is a command of elm-mlx's, which is printed before it runs. Run again, it goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

from command import elm  # noqa: E402

CLASSICS = HERE.parent / "classics"


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach a chat model what a spreadsheet says, and give it to Ollama.")
    parser.add_argument("model", type=Path, nargs="?", help="a chat model; the project's small one by default")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="a directory with train, valid and test .csv")
    parser.add_argument("--out", type=Path, default=Path("build/spreadsheet"), help="where everything is written")
    parser.add_argument("--iters", type=int, help="updates, for a shorter run")
    arguments = parser.parse_args()
    out, model = arguments.out, arguments.model
    run, fused = out / "run", out / "fused"
    out.mkdir(parents=True, exist_ok=True)

    chats: list[object] = []
    if model is None:  # one that has never seen a question: it shows how it goes
        model, chats = out / "base", ["--template", "openelm-instruct"]
        elm("convert", CLASSICS / "checkpoint_average.pt", model, "--overwrite")
    elm("data", arguments.data, "--model", model, *chats)
    shorter = [] if arguments.iters is None else ["--iters", arguments.iters]
    resume = ["--resume"] if (run / "checkpoints").exists() else []
    layers = ["--num-layers", -1] if chats else []  # it has fewer than lora.yaml asks for
    how = ["--config", HERE / "lora.yaml", *chats, *layers, *shorter, *resume]
    elm("lora", model, "--data", arguments.data, "--out", run, *how)
    elm("fuse", model, run, fused, "--overwrite")

    asked = rows(arguments.data / "test.csv")
    questions = out / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": question}) + "\n" for question, _ in asked), "utf-8")
    table = [
        "| questions of test.csv, in other words than train.csv's | answered as the sheet does |",
        "| --- | ---: |",
    ]
    for name, which, options in (("before", model, chats), ("after", fused, [])):
        to = out / f"{name}.jsonl"
        elm("generate", which, "--prompts", questions, *options, "--temp", 0, "--max-tokens", 40, "--json", to=to)
        said = [json.loads(line)["text"].strip() for line in to.read_text("utf-8").splitlines()]
        right = sum(answer == wanted for answer, (_, wanted) in zip(said, asked, strict=True))
        table.append(f"| {name} | {right} of {len(asked)} |")
    print("", *table, sep="\n", flush=True)

    ollama = out / "ollama"
    ollama.mkdir(exist_ok=True)
    elm("export", fused, ollama / "tool-library.gguf", "--modelfile", "--verify", "--overwrite")


def rows(path: Path) -> list[tuple[str, str]]:
    """Questions and answers of a sheet."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [(row["Question"], row["Answer"]) for row in csv.DictReader(file, delimiter=";")]


if __name__ == "__main__":
    main()
