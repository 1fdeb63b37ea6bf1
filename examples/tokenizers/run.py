"""What a larger vocabulary buys, and what it costs: `python examples/tokenizers/run.py`.

Bytes of text in a token, by vocabularies that exist and by one that is trained here and cut to many sizes; the share
of an OpenELM's parameters that are the embedding; and the speed of the 270M with seeded weights and a larger head.
Nothing is downloaded. Prints tables, and writes `results.json`, of which page.py makes the page.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import elm_mlx  # noqa: E402, F401  before MLX, for its BLAS

# isort: split
import mlx.core as mx  # noqa: E402
from page import tables  # noqa: E402

from elm_mlx.inference.generation import decode, prefill  # noqa: E402
from elm_mlx.inference.sampling import Sampler  # noqa: E402
from elm_mlx.model.cache import make_prompt_cache  # noqa: E402
from elm_mlx.model.config import PRESETS, ModelConfig  # noqa: E402
from elm_mlx.model.network import Model, initialize  # noqa: E402
from elm_mlx.text.tokenizer import Tokenizer  # noqa: E402

ROOT = Path(__file__).parents[2]
SIZES = (1024, 2048, 4096, 8192, 16_384, 32_000, 49_152, 65_536, 98_304, 128_256)
HEADS = (32_000, 49_152, 128_256)  # Llama 2's, SmolLM2's, Llama 3's
# How Llama 3 and its like cut a text into words before they merge bytes.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Texts = dict[str, list[str]]  # what it is -> its documents
PROMPT, ANSWER, ROUNDS = 128, 24, 3


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare vocabularies by bytes a token, parameters and speed.")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="texts and tokenizers")
    parser.add_argument("--out", type=Path, default=Path("build/tokenizers"), help="where everything is written")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="vocabularies to cut from the trained one")
    parser.add_argument("--no-speed", action="store_true", help="measure no speed")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, held_out = texts(arguments.shared)
    found = compression(arguments.shared, train, held_out, sorted(arguments.sizes), arguments.out)
    result: dict[str, Any] = {
        "bytes_per_token": found,
        "embedding_share": shares(),
        "weights_per_token": {name: {str(size): shape(name, size).parameters for size in HEADS} for name in PRESETS},
        "weights_per_byte": weights(found),
    }
    if not arguments.no_speed:
        result["speed"] = speed()
    results = arguments.out / "results.json"
    results.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print("\n\n".join(["", *tables(result), f"python {HERE / 'page.py'} {results} makes the page of it"]))


def texts(shared: Path) -> tuple[list[Path], Texts]:
    """Files to train a vocabulary on, and texts that none of them holds; of what comes with the project, little."""
    code = [path.read_text("utf-8") for path in sorted((ROOT / "elm_mlx").rglob("*.py"))]
    plays = ROOT / "examples" / "shakespeare" / "data"
    if not shared.exists():
        return [plays / "train.jsonl"], {"plays": list(records(plays / "valid.jsonl")), "code": code}
    return [shared / "classics" / "train.jsonl.gz", shared / "shakespeare" / "train.jsonl"], {
        "stories": list(records(shared / "classics" / "valid.jsonl")),
        "plays": list(records(shared / "shakespeare" / "valid.jsonl")),
        "passages": list(records(shared / "eval" / "boolq.jsonl", "query")),
        "code": code,
    }


def records(path: Path, key: str = "text") -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        yield from (json.loads(line)[key] for line in lines)


def compression(
    shared: Path, train: Sequence[Path], held_out: Texts, sizes: Sequence[int], out: Path
) -> dict[str, dict[str, float]]:
    """Vocabulary -> text -> bytes a token. Of the trained one, the name says its size."""
    existing = {
        "Llama 2, 32,000": shared / "tokenizer" / "llama2.model",
        "SmolLM2, 49,152": shared / "smollm2-135m-instruct" / "tokenizer.json",
    }
    found = {name: measured(path, held_out) for name, path in existing.items() if path.exists()}
    whole = trained(train, sizes[-1], out / "whole.json")
    most = Tokenizer.load(whole).vocab_size
    for size in (*(size for size in sizes if size < most), most):
        found[f"trained, {size:,}"] = measured(cut(whole, size, out / f"bpe-{size}.json"), held_out)
    return found


def trained(files: Sequence[Path], size: int, path: Path) -> Path:
    """A byte-level BPE of `size` pieces, or as many as occur twice; made once."""
    if path.exists():
        return path
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Encoder

    encoder = Encoder(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    encoder.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    encoder.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    start = time.perf_counter()
    encoder.train_from_iterator((text for file in files for text in records(file)), trainer)
    print(f"trained {encoder.get_vocab_size():,} pieces in {time.perf_counter() - start:.0f} s", flush=True)
    encoder.save(str(path))
    return path


def cut(whole: Path, size: int, path: Path) -> Path:
    """The first `size` pieces of a trained vocabulary: what training would have ended at."""
    values = json.loads(whole.read_text("utf-8"))
    model = values["model"]
    model["vocab"] = {piece: token for piece, token in model["vocab"].items() if token < size}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    path.write_text(json.dumps(values), "utf-8")
    return path


def measured(path: Path, held_out: Texts) -> dict[str, float]:
    tokenizer = Tokenizer.load(path)
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in held_out.items()}
    counts = {
        name: sum(len(tokenizer.encode(text, add_bos=False)) for text in texts) for name, texts in held_out.items()
    }
    each = {name: sizes[name] / counts[name] for name in held_out}
    prose = [name for name in held_out if name != "code"]
    return {**each, "prose": sum(sizes[name] for name in prose) / sum(counts[name] for name in prose)}


def shares() -> dict[str, dict[str, float]]:
    """Model -> vocabulary -> share of its parameters in the embedding, which is the head too."""
    return {
        name: {
            str(size): size * config.model_dim / config.parameters for size in HEADS for config in [shape(name, size)]
        }
        for name in PRESETS
    }


def shape(name: str, vocab_size: int) -> ModelConfig:
    return ModelConfig.preset(name, vocab_size)


def weights(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Model -> vocabulary trained here -> weights read to write a byte of prose: all of them, for each token."""
    sizes = {name: int(name.rpartition(", ")[2].replace(",", "")) for name in found if name.startswith("trained")}
    return {
        model: {str(size): shape(model, size).parameters / found[name]["prose"] for name, size in sizes.items()}
        for model in PRESETS
    }


def speed() -> dict[str, dict[str, float]]:
    """Vocabulary -> milliseconds of processor time a token of the 270M in float32: medians of rounds that take turns.

    Not of time: that says something on a machine with nothing else to do alone. OPENBLAS_NUM_THREADS=1 makes it exact.
    """
    models = {size: Model(shape("OpenELM-270M", size)) for size in HEADS}
    first = models[HEADS[0]]
    initialize(first, 0)
    for size in HEADS[1:]:  # all but the embedding is the same
        models[size].transformer.layers = first.transformer.layers
        embedding = models[size].transformer.token_embeddings
        embedding.weight = mx.random.normal(embedding.weight.shape) * 0.03
        mx.eval(models[size].parameters())
    rounds: dict[int, list[tuple[float, float]]] = {size: [] for size in HEADS}
    for _ in range(ROUNDS + 1):
        for size, model in models.items():
            rounds[size].append(timed(model))
    return {
        str(size): {
            "prompt": 1e3 * statistics.median(read for read, _ in of_size[1:]) / PROMPT,  # the first warms up
            "decode": 1e3 * statistics.median(written for _, written in of_size[1:]) / (ANSWER - 1),
        }
        for size, of_size in rounds.items()
    }


def timed(model: Model) -> tuple[float, float]:
    """Seconds of processor time for the prompt, and for the tokens after the first."""
    caches, sampler = make_prompt_cache(model), Sampler()
    ids = [(i * 7919) % HEADS[0] for i in range(PROMPT)]
    start = time.process_time()
    logits = prefill(model, ids, caches)
    mx.eval(logits)
    read = time.process_time() - start
    tokens = decode(model, caches, sampler, logits, sampler.start([ids], 0), ANSWER)
    next(tokens)
    start = time.process_time()
    for _ in islice(tokens, ANSWER - 1):
        pass
    return read, time.process_time() - start


if __name__ == "__main__":
    main()
