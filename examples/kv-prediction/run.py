"""What KV prediction costs and gains on a small model: `python examples/kv-prediction/run.py`.

The base is the project's small model, trained on with longer texts until it reads prompts of 2,048 tokens. Auxiliary
models of a quarter, a half and three quarters of its layers, and a small one of its own, are made to predict its keys
and values: by maps that are fitted and no more, and by training, from several seeds. On two books that nothing is
trained on it measures how well the base goes on after a prompt that was predicted, how well the auxiliary does alone,
and how well the base does that reads but the prompt's end, which is as soon done. Training is by commands of elm-mlx's,
which are printed before they run, but for the base's. All that is measured goes into `results.json`, from which page.py
makes the tables and the plot. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
from command import elm  # noqa: E402
from page import ANSWER, AUXILIARIES, LEAST, PROMPTS, SCORED, SHARES, Measured, tables  # noqa: E402

import elm_mlx  # noqa: E402

# isort: split
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from elm_mlx.cli.training_display import TrainingDisplay  # noqa: E402
from elm_mlx.directories import PREDICTION, checkpoints_of  # noqa: E402
from elm_mlx.inference.generation import stream_generate  # noqa: E402
from elm_mlx.inference.rows import predicted_prefill, prefill  # noqa: E402
from elm_mlx.model.cache import make_prompt_cache  # noqa: E402
from elm_mlx.model.kv_prediction import KVPrediction, kept_layers, pruned_map  # noqa: E402
from elm_mlx.model.network import Model, initialize  # noqa: E402
from elm_mlx.store import kvp_directory  # noqa: E402
from elm_mlx.text.tokenizer import Tokenizer  # noqa: E402
from elm_mlx.train import checkpoint, sections  # noqa: E402
from elm_mlx.train.kvp_training import pruned  # noqa: E402
from elm_mlx.train.pretraining import Pretraining  # noqa: E402
from elm_mlx.train.pretraining_recipe import Recipe  # noqa: E402

CLASSICS = HERE.parent / "classics"
CONTEXT = PROMPTS[-1] + SCORED
LENGTHS = 8_000, 32_000  # characters of a document: several rows
LONGER = (128, 512, 2000)  # tokens of a larger model's prompts
# The base goes on with rows as long as it is to read; a small auxiliary begins with such. Both learn by classics'
# recipe, but for these fields.
LONG_ROWS = [
    f"model.context={CONTEXT}",
    f"data.sequence_length={CONTEXT}",
    "data.validation_rows=4",
    "run.batch_size=1",
]
BASE = ["optimizer.lr=0.0003", "optimizer.steps=200", "optimizer.warmup=20"]
SMALL = ["model.num_layers=4", "model.model_dim=128", "optimizer.steps=400", "optimizer.warmup=40"]
Passage = tuple[list[int], list[int]]  # the ids before a place in a text, and those after it
Variant = tuple[Model, KVPrediction | None, float]  # what reads, what predicts, and of what share of the prompt


def main() -> None:
    parser = argparse.ArgumentParser(description="Train KV predictions for a small model, and measure them.")
    parser.add_argument(
        "--books", type=Path, default=CLASSICS / "extract.jsonl.gz", help='{"text": …} a line, a book each'
    )
    parser.add_argument("--out", type=Path, default=Path("build/kv-prediction"), help="where everything is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--auxiliaries", nargs="+", default=[*AUXILIARIES], help="shares of the base's layers, and small"
    )
    parser.add_argument("--steps", type=int, default=100, help="updates of each prediction, of 1,024 tokens")
    parser.add_argument("--passages", type=int, default=32, help="places in each book that are measured")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each time to the first token")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of the models' recipe, to be soon done"
    )
    parser.add_argument("--measure", action="store_true", help="train no prediction; measure times anew")
    parser.add_argument("--larger", type=Path, metavar="MODEL", help="measure the times of a larger model, and no more")
    arguments = parser.parse_args()
    if arguments.larger is not None:
        time_larger(arguments.larger, arguments.out / "larger.json", arguments.repeats)
        return
    results = measure(arguments)
    made = arguments.out / "results.json"
    made.write_text(json.dumps(results) + "\n", "utf-8")
    print("\n\n".join(["", *tables(results), f"python {HERE / 'page.py'} {made} makes the page of it"]))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures what is not there yet. Returns all of it."""
    out = arguments.out
    base, tokenizer = prepare(arguments)
    held_out = list(passages(tokenizer, arguments.passages))

    @functools.cache
    def likeliest(length: int) -> list[mx.array]:
        found = (
            logits_after((base, None, 1.0), prompt_of(before, length, tokenizer), after) for before, after in held_out
        )
        return [mx.argmax(logits, axis=-1) for logits in found]

    quality: dict[str, dict[str, dict[str, Any]]] = {}  # by what was measured, of which auxiliary or share, and seed

    def add(kind: str, name: str, seed: int, path: Path, measure: Callable[..., Any], *of: Any) -> None:
        found = kept(path, functools.partial(measure, *of, held_out, tokenizer))
        quality.setdefault(kind, {}).setdefault(name, {})[str(seed)] = found

    scored = functools.partial(scores, likeliest)
    variants: dict[str, Variant] = {f"base/{share:g}": (base, None, share) for share in (1.0, *SHARES, LEAST)}
    for share in (1.0, *SHARES, LEAST):
        add("base", f"{share:g}", 0, out / f"base-{share:g}.json", scored, (base, None, share))
    # One seed tells enough of what is only fitted, and of what an auxiliary learns on its own.
    seeds = arguments.seeds
    kinds = [("fit", 0), ("kvp", seeds[0]), ("own", seeds[0]), *(("kvp", seed) for seed in seeds[1:])]
    for (kind, seed), name in product(kinds, arguments.auxiliaries):
        directory = out / f"{kind}-{name}-seed-{seed}"
        if updates(directory) < (1 if kind == "fit" else arguments.steps):
            if arguments.measure:
                continue
            train(arguments, directory, kind, name, seed)
        kvp = kvp_directory.load(directory, out / "base", base)
        alone: Variant = (kvp.auxiliary, None, 1.0)
        if kind == "own":
            add("own", name, seed, directory / "scores-own.json", scored, alone)
            continue
        variants |= {f"kvp/{name}": (base, kvp, 1.0), f"alone/{name}": alone}
        add(kind, name, seed, directory / f"scores-{kind}.json", scored, (base, kvp, 1.0))
        add(f"{kind}, answer kept", name, seed, directory / "scores-turns.json", answer_kept, base, kvp)
        if kind == "kvp":
            add("alone", name, seed, directory / "scores-alone.json", scored, alone)
            add("drafts", name, seed, directory / "scores-drafts.json", right_guesses, base, kvp.auxiliary)
    path = out / "times.json"
    if arguments.measure or not path.exists():
        path.write_text(json.dumps(times(variants, held_out[0][0], PROMPTS, arguments.repeats)) + "\n", "utf-8")
    parameters = {"base": base.config.parameters}
    parameters |= {
        name: variants[f"alone/{name}"][0].config.parameters
        for name in arguments.auxiliaries if f"alone/{name}" in variants
    }  # fmt: skip
    found = {"quality": quality, "parameters": parameters, "times": json.loads(path.read_text("utf-8"))}
    larger = out / "larger.json"
    if larger.exists():
        found["larger"] = json.loads(larger.read_text("utf-8"))
    return found


def prepare(arguments: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """Writes the texts, and trains the base and the small model, where they are not there yet. Returns the base."""
    out = arguments.out
    if not (out / "data" / "train.jsonl").exists():
        texts.write_documents(arguments.books, out / "data", LENGTHS)
    if not (out / "converted").exists():
        given = ["--tokenizer", CLASSICS / "tokenizer.model"]
        elm("convert", CLASSICS / "checkpoint_average.pt", out / "converted", *given)
    pretrain(arguments, "base", BASE, functools.partial(begin_with, out / "converted"))
    pretrain(arguments, "small", SMALL)
    base, tokenizer = elm_mlx.load(out / "base")
    assert tokenizer is not None
    return base, tokenizer


def pretrain(
    arguments: argparse.Namespace, name: str, fields: Sequence[str], draw: Callable[[Model, int], None] = initialize
) -> None:
    """Trains a model on the longer texts, and goes on where that was stopped."""
    out, data = arguments.out / name, arguments.out / "data"
    paths = [
        f"tokenizer={CLASSICS / 'tokenizer.model'}", f"data.validation={data / 'watched.jsonl'}",
        f'data.sources=[{{path = "{data / "train.jsonl"}"}}]',
    ]  # fmt: skip
    recipe = sections.read(CLASSICS / "recipe.toml", Recipe, [*paths, *LONG_ROWS, *fields, *arguments.set])
    if checkpoint.directory(out, recipe.optimizer.steps).exists() and (out / "model.safetensors").exists():
        return
    print(f"\ntraining {out}", flush=True)
    with (
        Pretraining(recipe, out, resume=bool(checkpoints_of(out)), draw=draw) as run,
        TrainingDisplay(recipe.optimizer.steps) as shown,
    ):
        result = run.train(shown)
    if result.interrupted:
        sys.exit(130)


def begin_with(trained: Path, model: Model, seed: int) -> None:
    """Gives a model the weights of one that is trained, of the same shape."""
    model.update(elm_mlx.load_model(trained).parameters())


def updates(directory: Path) -> int:
    """Returns how many updates a prediction has had: one that was stopped is written too."""
    record = directory / PREDICTION
    return json.loads(record.read_text("utf-8"))["trained"]["updates"] if record.exists() else 0


def train(arguments: argparse.Namespace, directory: Path, kind: str, name: str, seed: int) -> None:
    """Trains a prediction, or the auxiliary on its "own"; one to "fit" by an update that changes nothing.

    Maps are fitted before the first update.
    """
    data = arguments.out / "data"
    fields = {
        "data.validation": data / "watched.jsonl",
        "data.sources": f'[{{path = "{data / "train.jsonl"}"}}]',
        "optimizer.steps": arguments.steps,
        "optimizer.warmup": arguments.steps // 10,
        "run.eval_every": arguments.steps,
        "run.seed": seed,
    }
    if kind == "fit":
        fields |= {"optimizer.steps": 1, "optimizer.warmup": 0, "optimizer.lr": 1e-9, "run.eval_every": 1}
    if kind == "own":
        fields |= {"loss.base": 0, "loss.kv": 0}
    sets = [word for field, value in fields.items() for word in ("--set", f"{field}={value}")]
    auxiliary = ["--aux", arguments.out / "small"] if name == "small" else ["--keep", name]
    resume = ["--resume"] if (directory / "checkpoints").exists() else []
    elm("kvp", arguments.out / "base", HERE / "recipe.toml", *auxiliary, "--out", directory, *sets, *resume)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Returns what `make` makes, which is kept in a file, and not made again where that is there."""
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(json.dumps(make()) + "\n", "utf-8")
        unfinished.replace(path)
    return json.loads(path.read_text("utf-8"))


def passages(tokenizer: Any, count: int) -> Iterator[Passage]:
    """Yields, of `count` places in each held-out book, the ids before it and those after it."""
    before = PROMPTS[-1] - 1
    for book in texts.read(CLASSICS / "held-out.jsonl.gz"):
        ids = tokenizer.encode(book["text"], add_bos=False)
        step = (len(ids) - before - SCORED) // count
        for at in range(before, before + count * step, step):
            yield ids[at - before : at], ids[at : at + SCORED]


def scores(
    likeliest: Callable[[int], list[mx.array]], variant: Variant, held_out: Sequence[Passage], tokenizer: Any
) -> dict[str, Measured]:
    """Scores the same tokens after prompts of each length, all of which end before them.

    Returns for each length `nats`, the loss summed over each passage's tokens; `bytes`, of all texts; `first`, the
    share of prompts after which the likeliest token is the base's, which `likeliest` gives; and `each`, the same of all
    tokens.
    """
    found: dict[str, Measured] = {}
    for length in PROMPTS:
        nats, size, first, each = [], 0, 0, 0
        for (before, after), theirs in zip(held_out, likeliest(length), strict=True):
            logits = logits_after(variant, prompt_of(before, length, tokenizer), after)
            nats.append(round(nn.losses.cross_entropy(logits, mx.array(after), reduction="sum").item(), 4))
            size += bytes_of(before, after, tokenizer)
            same = mx.argmax(logits, axis=-1) == theirs
            first, each = first + int(same[0].item()), each + int(same.sum().item())
        count = len(held_out)
        found[str(length)] = {"nats": nats, "bytes": size, "first": first / count, "each": each / count / SCORED}
    return found


def prompt_of(before: list[int], length: int, tokenizer: Any) -> list[int]:
    """Returns a prompt of `length` ids, which ends where a passage does, BOS in front."""
    return [tokenizer.bos_id, *before[len(before) - length + 1 :]]


def logits_after(variant: Variant, prompt: list[int], after: list[int]) -> mx.array:
    """Returns logits `(len(after), vocab)` of the tokens `after` a prompt, each behind those before it."""
    model, kvp, share = variant
    caches = make_prompt_cache(model)
    if share < 1:
        prompt = [prompt[0], *prompt[len(prompt) - round(share * len(prompt)) + 1 :]]
    first = prefill(model, prompt, caches) if kvp is None else predicted_prefill(model, kvp, prompt, caches)
    return mx.concatenate([first, model(mx.array([after[:-1]]), cache=caches)[0]])


def answer_kept(base: Model, kvp: KVPrediction, held_out: Sequence[Passage], tokenizer: Any) -> dict[str, Measured]:
    """Scores as `scores` after the longest prompt, of which the base reads the part `ANSWER`, as it has answers."""
    nats, size, (start, stop) = [], 0, ANSWER
    for before, after in held_out:
        ids = prompt_of(before, PROMPTS[-1], tokenizer)
        caches, own = make_prompt_cache(base), make_prompt_cache(kvp.auxiliary)
        predicted_prefill(base, kvp, ids[:start], caches, own)
        base(mx.array([ids[start:stop]]), cache=caches)
        kvp.auxiliary(mx.array([ids[start - 1 : stop]]), cache=own)
        kvp.read(mx.array([ids[stop:-1]]), own, caches)
        logits = base(mx.array([[ids[-1], *after[:-1]]]), cache=caches)[0]
        nats.append(round(nn.losses.cross_entropy(logits, mx.array(after), reduction="sum").item(), 4))
        size += bytes_of(before, after, tokenizer)
    return {str(PROMPTS[-1]): {"nats": nats, "bytes": size}}


def bytes_of(before: list[int], after: list[int], tokenizer: Any) -> int:
    """Counts the bytes of the text of ids behind others."""
    return len(tokenizer.decode([*before[-8:], *after]).encode()) - len(tokenizer.decode(before[-8:]).encode())


def right_guesses(base: Model, auxiliary: Model, held_out: Sequence[Passage], tokenizer: Any) -> float:
    """Returns the share of the base's greedy tokens that the auxiliary guesses, as a draft model does."""
    right = 0
    for before, _ in held_out:
        prompt = prompt_of(before, PROMPTS[0], tokenizer)
        told = stream_generate(base, None, prompt, max_tokens=SCORED, stop_at_eos=False)
        said = [response.token for response in told]
        guessed = mx.argmax(logits_after((auxiliary, None, 1.0), prompt, said), axis=-1)
        right += int((guessed == mx.array(said)).sum().item())
    return right / len(held_out) / SCORED


def time_larger(path: Path, out: Path, repeats: int) -> None:
    """Measures times of a model by predictions of random weights, whose values make no difference to them."""
    base = elm_mlx.load_model(path)
    layers = base.config.num_layers
    variants: dict[str, Variant] = {"base/1": (base, None, 1.0)}
    for keep in SHARES:
        kept_ones = kept_layers(layers, keep)
        kvp = KVPrediction(base, Model(pruned(base.config, kept_ones)), pruned_map(layers, kept_ones))
        mx.eval(kvp.parameters())
        variants[f"kvp/{keep:g}"] = (base, kvp, 1.0)
    longest = max(LONGER)
    ids = [1, *(3 + at * 7919 % (base.config.vocab_size - 3) for at in range(longest))]
    found = {"name": path.name, "times": times(variants, ids, LONGER, repeats)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found) + "\n", "utf-8")


def times(
    variants: dict[str, Variant], text: list[int], lengths: Sequence[int], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds to the first token, of each length of prompt and each variant: one after the other, in turns."""
    found: dict[str, dict[str, list[float]]] = {}
    for length in lengths:
        own: dict[str, list[float]] = {name: [] for name in variants}
        rounds = repeats * round((max(lengths) / length) ** 0.5)  # what is short is soon measured, and noisy
        for turn in range(-1, rounds):  # the first does not count
            for name, (model, kvp, share) in variants.items():
                prompt = text[len(text) - round(share * length) + 1 :] + text[:1]
                time.sleep(0.002)
                begun = time.perf_counter()
                next(stream_generate(model, None, prompt, max_tokens=1, kvp=kvp))
                if turn >= 0:
                    own[name].append(round(time.perf_counter() - begun, 6))
        found[str(length)] = own
    return found


if __name__ == "__main__":
    main()
