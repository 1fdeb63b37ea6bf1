"""Prompt lookup on work that copies and on work that does not: decoding with it and without, as ratios of pairs.

    python benchmarks/copying.py [MODEL…] [--pairs N] [--tokens N]

MODEL is a directory of a chat model, which is asked to write a list again with edits, to rename what stands in code, to
quote from a passage, and for free text; all of it made by program. Without one it is OpenELM-270M, whose weights are
made so that it writes a given text, for random ones would copy nothing: its layers compute what they always do and add
zeros, and the head leads from each token to the next. What it copies has an edit in every sixteenth place.

Both texts of a pair must be the same. Tokens a second are those of decoding.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from elm_mlx import load_model  # isort: skip  (its BLAS must come before MLX)
import mlx.core as mx
from speed import machine

from elm_mlx.inference.generation import Response, stream_generate
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.network import Model
from elm_mlx.store.loading import load
from elm_mlx.text.chat_template import choose

NAMES = ["Ada", "Bruno", "Clara", "David", "Edith", "Frank", "Greta", "Hugo", "Ida", "Jonas", "Klara", "Leo", "Marta"]
THINGS = ["lamps", "chairs", "ropes", "kettles", "clocks", "ladders", "mirrors", "brushes", "blankets", "baskets"]
TOWNS = ["Lisbon", "Bergen", "Turin", "Ghent", "Cork", "Basel", "Riga", "Porto", "Graz", "Malmo"]
EDITED = 16  # tokens from one edit to the next, in what the seeded model copies
Work = tuple[str, list[int]]  # what it is, and a prompt


def asked() -> Iterator[tuple[str, str]]:
    """Questions to a chat model, each with what kind of work it is."""
    draw = random.Random(7)
    pick = draw.choice
    orders = [
        f"{number}. {pick(NAMES)} from {pick(TOWNS)} ordered {draw.randint(2, 60)} {pick(THINGS)} on Tuesday."
        for number in range(1, 13)
    ]
    listed = "\n".join(orders)
    yield "a list with edits", f"Write this list again, word for word, but with Friday in place of Tuesday.\n\n{listed}"
    code = "\n\n".join(
        f"def count_{thing}(values):\n    total = 0\n    for value in values:\n"
        f"        if value.kind == '{thing}':\n            total += {draw.randint(2, 9)} * value.amount\n"
        "    return total"
        for thing in THINGS[:4]
    )
    yield (
        "code with a new name",
        f"Write this code again, word for word, but with result in place of total.\n\n{code}",
    )
    passage = " ".join(
        f"{name} moved to {pick(TOWNS)} in {draw.randint(1900, 1990)} and sold {pick(THINGS)} and {pick(THINGS)} there."
        for name in NAMES[:10]
    )
    yield "a quotation", f"{passage}\n\nQuote the whole passage above, word for word."
    yield "free text", "Write a story about a lighthouse keeper and a lost boat."
    yield "free text", "Explain how bread is made, step by step."


def chat_work(directory: Path) -> tuple[Model, list[Work]]:
    """Returns a chat model, and what it is asked by kind of work."""
    model, tokenizer = load(directory)
    template = choose(directory, tokenizer)
    return model, [(kind, template.encode([{"role": "user", "content": text}])) for kind, text in asked()]


def seeded_work(directory: Path) -> tuple[Model, list[Work]]:
    """Returns a 270M that writes a given text, made in `directory`, and prompts by kind of work."""
    config = ModelConfig.from_dict(ModelConfig.preset("OpenELM-270M").to_dict() | {"share_input_output_layers": False})
    order = list(range(3, config.vocab_size))
    random.Random(7).shuffle(order)
    tensors = {}
    for number, (name, shape) in enumerate(config.shapes().items()):
        values = mx.random.normal(shape, key=mx.random.key(number)) * shape[-1] ** -0.5
        if len(shape) == 1:
            values = mx.ones(shape)
        elif name.endswith(("out_proj.weight", "proj_2.weight")):
            values = mx.zeros(shape)
        tensors[name] = values.astype(mx.bfloat16)
        mx.eval(tensors[name])
    embedding, head = tensors["transformer.token_embeddings.weight"], tensors["lm_head.weight"]
    tensors["lm_head.weight"] = head.at[mx.array(order[1:] + order[:1])].add(embedding[mx.array(order)] * 8)
    mx.save_safetensors(str(directory / "model.safetensors"), tensors)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    text, others = order[1000:1256], iter(order[9000:])
    edited = [next(others) if place % EDITED == EDITED - 1 else token for place, token in enumerate(text)]
    return load_model(directory), [
        ("a text with edits", [1, *edited, order[999]]),
        ("free text", [1, *order[2000:2256], order[999]]),
    ]


def decoded(model: Model, prompt: list[int], tokens: int, lookup: bool) -> tuple[list[int], Response]:
    """Returns the ids that follow, and the last response."""
    responses = [*stream_generate(model, None, prompt, max_tokens=tokens, stop_at_eos=False, prompt_lookup=lookup)]
    return [each.token for each in responses], responses[-1]


def compared(model: Model, prompt: list[int], tokens: int, pairs: int) -> str:
    """Returns the cells of a line: tokens a second without and with, their ratio, and how guesses fared."""
    speeds, fared = [], None
    for turn in range(pairs + 1):  # the first doesn't count
        found = {}
        for lookup in (turn % 2 == 0, turn % 2 == 1):
            found[lookup] = decoded(model, prompt, tokens, lookup)
        (plain, without), (guessed, fast) = found[False], found[True]
        if plain != guessed:
            raise SystemExit("the text with guesses is another")
        fared = fast.drafts
        if turn:
            speeds.append((without.generation_tps, fast.generation_tps))
    ratios = [fast / plain for plain, fast in speeds]
    slow, fast = (statistics.median(side) for side in zip(*speeds, strict=True))
    spread = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}"
    return f"{slow:.1f} | {fast:.1f} | {spread} | {fared}"


def main() -> None:
    """Prints a row for each model and kind of work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", type=Path, help="chat models; without one, a 270M that writes a given text"
    )
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs")
    parser.add_argument("--tokens", type=int, default=192, help="new tokens of each run")
    given = parser.parse_args()
    print(f"{machine()}\n", flush=True)
    print("| model | work | plain, tokens/s | with lookup | ratio, median of pairs | spread | guesses |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for directory in given.models or [Path(scratch)]:
            model, works = chat_work(directory) if given.models else seeded_work(directory)
            for kind, prompt in works:
                name = directory.name if given.models else "270M"
                print(f"| {name} | {kind} | {compared(model, prompt, given.tokens, given.pairs)} |", flush=True)


if __name__ == "__main__":
    main()
