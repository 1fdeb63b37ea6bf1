"""What a draft model gains by how often it is right: decoding with it and without, in turns of some tokens.

    python benchmarks/draft_model.py DRAFT_MODEL [--target MODEL] [--tokens N]

With `--target`, a trained model of the same vocabulary goes on from beginnings of held-out texts, greedy and drawn by
seeds: guesses are right as often as the two agree. Else the target is a larger model with seeded weights, which agrees
with nobody. It is made to say, by a sampler that knows it, a text of which a given share of tokens is what the draft
model would say there: so guesses are right as often, and both models' passes cost what they cost. Both sides' texts are
compared.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elm_mlx import load, load_model, stream_generate  # isort: skip  (its BLAS must come before MLX)
import mlx.core as mx
from speed import machine

from elm_mlx.bench.measured_models import write_seeded
from elm_mlx.inference.generation import Response
from elm_mlx.model.config import ModelConfig

TURN = 8  # tokens of one side, then of the other
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
HELD_OUT, PROMPT, TEXTS = Path(__file__).parents[1] / "examples/classics/held-out.jsonl.gz", 48, 6
TARGET: dict[str, Any] = {"num_layers": 12, "model_dim": 512, "head_dim": 64, "num_gqa_groups": 2}


class Said:
    """A sampler that says a given text, whatever the model finds likely."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = iter([*text, 0])  # the choice after the last is made ahead

    def __call__(self, logprobs: mx.array) -> mx.array:
        return mx.array([next(self._text)])


def race(plain: Iterator[Response], drafted: Iterator[Response]) -> tuple[list[float], Response]:
    """Lets two streams write in turns. Returns the seconds of each after its first token, and the last response."""
    streams, seconds, last = [plain, drafted], [0.0, 0.0], [next(plain), next(drafted)]
    tokens = [[response.token] for response in last]
    running = {0, 1}
    while running:
        for side in sorted(running):
            start = time.perf_counter()
            for _ in range(TURN):
                response = next(streams[side], None)
                if response is None:
                    running.discard(side)
                    break
                last[side] = response
                tokens[side].append(response.token)
            mx.synchronize()  # what was launched ahead is this side's
            seconds[side] += time.perf_counter() - start
    assert tokens[0] == tokens[1], "the texts differ"
    return seconds, last[1]


def text_of(draft: Any, prompt: list[int], count: int, share: float) -> list[int]:
    """Returns what the draft model says after `prompt`, where it is not wrong, and goes on from there."""
    said: list[int] = []
    chance = random.Random(3)
    while len(said) < count:
        run = [each.token for each in stream_generate(draft, None, [*prompt, *said], max_tokens=8, stop_at_eos=False)]
        right = next((at for at in range(8) if chance.random() > share), 8)
        said += [*run[:right], *([chance.randrange(3, draft.config.vocab_size)] if right < 8 else [])]
    return said[:count]


def beginnings(tokenizer: Any, count: int) -> list[list[int]]:
    """Returns the first tokens of lines here and there in held-out texts."""
    with gzip.open(HELD_OUT, "rt", encoding="utf-8") as lines:
        parts = "\n".join(json.loads(line)["text"] for line in lines).split("\n")
    step = len(parts) // (count + 1)
    return [tokenizer.encode("\n".join(parts[step * number :][:PROMPT]))[:PROMPT] for number in range(1, count + 1)]


def trained(target: Path, draft: Any, tokenizer: Any, tokens: int) -> None:
    """Prints what the draft model gains where `target` says what it says."""
    model = load_model(target)
    print(f"{machine()}; {model.config.parameters:,} parameters, drafts by {draft.config.parameters:,}")
    print("| text | plain, tokens/s | with drafts | ratio | spread | guesses right | tokens a pass |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: |")
    prompts = beginnings(tokenizer, TEXTS)
    for name, sampling in (("greedy", {}), ("temperature 0.8", {"temp": 0.8}), ("temperature 1", {"temp": 1.0})):
        pairs, figures = [], []
        for seed, prompt in enumerate([prompts[0], *prompts]):  # the first one twice: steps are traced
            settings = {"max_tokens": tokens, "stop_at_eos": False, **sampling, **({"seed": seed} if sampling else {})}
            seconds, last = race(
                stream_generate(model, None, prompt, **settings),
                stream_generate(model, None, prompt, draft_model=draft, **settings),
            )
            pairs.append(seconds)
            figures.append(last.drafts)
        ratios = [plain / drafted for plain, drafted in pairs[1:]]
        speeds = [TEXTS * (tokens - 1) / sum(each) for each in zip(*pairs[1:], strict=True)]
        drafted, accepted, passes = (
            sum(getattr(each, what) for each in figures[1:]) for what in ("drafted", "accepted", "passes")
        )
        print(
            f"| {name} | {speeds[0]:.0f} | {speeds[1]:.0f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} | {accepted / max(1, drafted):.0%} of {drafted} "
            f"| {1 + accepted / passes:.2f} |",
            flush=True,
        )


def main() -> None:
    """Prints a row for each share of right guesses, or what trained models gain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft_model", type=Path)
    parser.add_argument("--target", type=Path, help="a trained model of the same vocabulary")
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    draft, tokenizer = load(options.draft_model)
    if options.target is not None:
        trained(options.target, draft, tokenizer, options.tokens)
        return
    known = draft.config
    config = ModelConfig.scaled(vocab_size=known.vocab_size, max_context_length=known.max_context_length, **TARGET)
    prompt = tokenizer.encode("Once upon a time there was a king who had three daughters.")
    print(f"{machine()}; {config.parameters:,} parameters, drafts by {known.parameters:,}")
    print("| share that the draft model would say | plain, tokens/s | with drafts | ratio | drafts |")
    print("| ---: | ---: | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as name:
        target = load_model(write_seeded(config, Path(name, "target")))
        settings: dict[str, Any] = {"max_tokens": options.tokens, "stop_at_eos": False}
        for share in SHARES:
            said = text_of(draft, prompt, options.tokens, share)
            seconds, last = race(
                stream_generate(target, None, prompt, sampler=Said(said), **settings),
                stream_generate(target, None, prompt, sampler=Said(said), draft_model=draft, **settings),
            )
            speeds = " | ".join(f"{(options.tokens - 1) / each:.0f}" for each in seconds)
            print(f"| {share:.0%} | {speeds} | {seconds[0] / seconds[1]:.2f} | {last.drafts} |", flush=True)


if __name__ == "__main__":
    main()
