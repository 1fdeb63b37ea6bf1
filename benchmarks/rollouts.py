"""Several answers to one prompt sampled together, against one after the other, in pairs on the same prompts.

    python benchmarks/rollouts.py MODEL [MODEL ...] [--answers 16] [--tokens 64] [--seconds 10]

One after the other they are what `generate` makes of the prompt with a seed each. Printed are tokens a second of both,
and the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from elm_mlx import load, stream_generate
from elm_mlx.inference.rollouts import prompt_ids, rollouts
from elm_mlx.text.chat_template import choose

SUBJECTS = ("king", "queen", "dog", "cat", "man", "woman", "boy", "girl", "ship", "house", "tree", "stone", "book")
ALONE = 4  # answers of a pair's slow side


def measure(path: Path, answers: int, tokens: int, seconds: float) -> str:
    """Returns a line: tokens/s of answers together and one after the other, and the median ratio."""
    model, tokenizer = load(path)
    template = choose(path, tokenizer)
    prompts = [prompt_ids(tokenizer, template, f"Once upon a time there was a {each} who") for each in SUBJECTS]
    ends = () if template is None else template.stop_ids

    def together(number: int) -> float:
        started = time.perf_counter()
        prompt = prompts[number % len(prompts)]
        made = rollouts(model, tokenizer, [prompt], answers, max_tokens=tokens, seed=number, template=template)
        return sum(len(each.tokens) for each in made) / (time.perf_counter() - started)

    def apart(number: int) -> float:
        started, count, prompt = time.perf_counter(), 0, prompts[number % len(prompts)]
        for seed in range(ALONE):
            made = stream_generate(model, tokenizer, prompt, max_tokens=tokens, temp=1.0, seed=seed, stop_ids=ends)
            count += sum(1 for _ in made)
        return count / (time.perf_counter() - started)

    together(0), apart(0)  # compile
    until, pairs = time.perf_counter() + seconds, list[tuple[float, float]]()
    while time.perf_counter() < until or not pairs:
        pairs.append((together(len(pairs)), apart(len(pairs))))
    fast, slow = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    return f"{path}: {fast:,.0f} and {slow:,.0f} tokens/s, {ratio:.1f} times, in {len(pairs)} pairs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--answers", type=int, default=16, help="to a prompt, sampled together")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="that a model is measured for")
    arguments = parser.parse_args()
    for path in arguments.models:
        print(measure(path, arguments.answers, arguments.tokens, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
