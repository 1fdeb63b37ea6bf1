"""Three ways to learn from one's own checked answers, compared: `python examples/selfplay/run.py`.

The demo model is taught to sort three numbers, not well, and then goes on by rejection sampling, DPO or GRPO, each with
as many sampled answers and three seeds. Every step is a command of elm-mlx's, which is printed before it runs. Run
again, it goes on where it was stopped; what is done is not done again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
CLASSICS = HERE.parent / "classics"
sys.path.append(str(HERE.parent))

import comparison  # noqa: E402
from command import elm  # noqa: E402

TASK = ["--task", "sorting", "--difficulty", 1]
TAUGHT = ["--full", "--learning-rate", 1e-3, "--batch-size", 4, "--max-seq-length", 256]
WAYS = ("rejection sampling", "DPO", "GRPO")
SEEDS = (1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="SFT, then rejection sampling, DPO and GRPO on a checked task.")
    parser.add_argument("--out", type=Path, default=Path("build/selfplay"), help="where everything is written")
    parser.add_argument("--rounds", type=int, default=40, help="of 128 sampled answers, for each way")
    parser.add_argument("--problems", type=int, default=256, help="held-out problems that all are measured on")
    parser.add_argument("--taught", type=int, default=130, help="updates of the first fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    out, rounds = arguments.out, arguments.rounds
    base, sft, solutions = out / "base", out / "sft", out / "solutions.jsonl"
    convert = [CLASSICS / "checkpoint_average.pt", base, "--tokenizer", CLASSICS / "tokenizer.model", "--overwrite"]
    if not base.exists():
        elm("convert", *convert)
    if not solutions.exists():
        elm("synthesize", *TASK, "--solutions", "--samples", 3000, "--out", solutions)
    train("lora", sft, base, "--data", solutions, "--iters", arguments.taught, *TAUGHT)
    runs = {("after SFT", 0): sft}
    for seed in arguments.seeds:
        at = out / f"seed-{seed}"
        at.mkdir(exist_ok=True)
        right, pairs = at / "right.jsonl", at / "pairs.jsonl"
        if not (right.exists() and pairs.exists()):
            sampled = ["--samples", 128 * rounds, "--answers", 8, "--max-tokens", 24, "--seed", seed]
            elm("synthesize", base, "--adapter", sft, *TASK, *sampled, "--out", right, "--pairs", pairs)
        common = ["--from", sft, "--full", "--seed", seed]
        rejection, dpo, grpo = (at / name for name in ("rejection", "dpo", "grpo"))
        train("lora", rejection, base, "--data", right, "--config", HERE / "rejection.yaml", *common)
        train("dpo", dpo, base, "--data", pairs, "--config", HERE / "dpo.yaml", *common)
        train("grpo", grpo, base, *TASK, "--config", HERE / "grpo.yaml", "--iters", 2 * rounds, *common)
        runs |= {(way, seed): run for way, run in zip(WAYS, (rejection, dpo, grpo), strict=True)}
    counts = {
        name: comparison.measured(
            base, run, "sorting", 1, arguments.problems, out / f"{run.relative_to(out)}.counts.json"
        )
        for name, run in runs.items()
    }
    print("\n" + "\n".join(comparison.table(counts, WAYS)))
    comparison.plot(counts, WAYS, out / "selfplay.png")
    elm("report", *(run for (way, _), run in runs.items() if way == "GRPO"), "--out", out / "grpo.html")


def train(command: str, run: Path, *options: object) -> None:
    """A training run, or the rest of it; nothing where it has ended: one that was stopped has left an adapter too."""
    ended = run.with_name(f"{run.name}.ended")
    if not ended.exists():
        resume = ["--resume"] if (run / "checkpoints").exists() else []
        elm(command, *options, "--out", run, *resume)
        ended.touch()


if __name__ == "__main__":
    main()
