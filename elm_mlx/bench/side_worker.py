"""One side of a comparison, in a process of its own: a model is loaded, and measured as often as is asked.

    python -m elm_mlx.bench.side_worker SIDE MODEL DTYPE [KVP]

SIDE is `ours`, `naive`, `prompt-lookup`, `kvp`, `mlx-lm` or `mlx-lm-stock`; DTYPE is the type to compute in, or `-` for
the side's choice; KVP is the directory of the KV prediction. Prints `About` as a line of JSON, and then for each line
with a `prompt`, `new`, `batch` and `kv_bits` one with its `Figures` and the `text`, or an `error`. `mlx-lm-stock` wants
`ELM_MLX_BLAS=off` in its environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from elm_mlx import device
from elm_mlx.bench.suites import About, Figures, Measured, prompt_ids
from elm_mlx.errors import ElmError
from elm_mlx.model import roofline
from elm_mlx.model.cache import KVCache, make_prompt_cache
from elm_mlx.model.config import Config
from elm_mlx.model.network import Model
from elm_mlx.safetensors_file import read_header, weight_files
from elm_mlx.version import __version__


class Ours:
    """This package, by the functions that `generate` calls; or with RMSNorm written out, with prompt lookup, or a KV
    prediction."""

    def __init__(
        self, path: Path, dtype: str | None, naive: bool = False, lookup: bool = False, kvp: Path | None = None
    ):
        from elm_mlx.model.network import NaiveRMSNorm, RMSNorm
        from elm_mlx.store.loading import open_model

        loaded = open_model(path, dtype)
        self.model, self.vocab_size, self._lookup = loaded.model, loaded.model.config.vocab_size, lookup
        self._kvp, notes = None, loaded.notes
        if kvp is not None:
            from elm_mlx.store import kvp_directory

            self._kvp = kvp_directory.load(kvp, path, loaded.model)
            notes += (self._kvp.describe(),)
        norms = [module for _, module in loaded.model.named_modules() if type(module) is RMSNorm] if naive else []
        if naive and not norms:
            raise ElmError("the model has no RMSNorm of elm-mlx's")
        for module in norms:
            module.__class__ = NaiveRMSNorm
        self.about = describe(loaded.model, path, f"elm-mlx {__version__}", notes)

    def measure(self, prompts: list[list[int]], new: int, kv_bits: int | None) -> Measured:
        caches = make_prompt_cache(self.model, kv_bits)
        if len(prompts) > 1:
            if self._lookup:
                raise ElmError("guesses for one text at a time")
            return measure_steps(prompts, new, self._batch(prompts, new, caches))
        figures, text = measure_steps(prompts, new, self._one(prompts[0], new, caches))
        drafts = self._drafts
        return replace(figures, per_pass=None if drafts is None else 1 + drafts.accepted / drafts.passes), text

    def _one(self, prompt: list[int], new: int, caches: list[KVCache]) -> Iterator[list[int]]:
        from elm_mlx.inference.generation import stream_generate

        for response in stream_generate(
            self.model,
            None,
            prompt,
            max_tokens=new,
            stop_at_eos=False,
            prompt_lookup=self._lookup,
            prompt_cache=caches,
            kvp=self._kvp,
        ):
            self._drafts = response.drafts
            yield [response.token]

    def _batch(self, prompts: list[list[int]], new: int, caches: list[KVCache]) -> Iterator[list[int]]:
        from elm_mlx.inference.batch import prefill_each
        from elm_mlx.inference.rows import PREFILL_STEP
        from elm_mlx.inference.sampling import Sampler

        sampler = Sampler(0.0)
        logits, rows = prefill_each(self.model, prompts, PREFILL_STEP, caches, kvp=self._kvp)
        tokens, _, state = sampler(logits, sampler.start(prompts, 0))
        yield tokens.tolist()
        tokens, _, state = sampler(rows.step(tokens), state)
        for left in reversed(range(new - 1)):
            current = tokens
            if left:
                tokens, _, state = sampler(rows.step(current), state)
                mx.async_eval(tokens)
            yield current.tolist()


class MlxLm:
    """mlx-lm's own model and loop. `equal` computes in the type that this package would."""

    def __init__(self, path: Path, dtype: str | None, equal: bool):
        from mlx_lm.utils import dequantize_model, load_model

        model, values = load_model(path)
        if equal and dtype is not None:
            if dtype == "float32" and not device.on_gpu():
                model = dequantize_model(model)
            wanted = device.DTYPES[dtype]
            model.update(tree_map(lambda array: _cast(array, wanted), model.parameters()))
            mx.eval(model.parameters())
        self.model, self.vocab_size = model, int(values["vocab_size"])
        self.about = About(f"mlx-lm {metadata.version('mlx-lm')}", computed_in(model))

    def measure(self, prompts: list[list[int]], new: int, kv_bits: int | None) -> Measured:
        from mlx_lm.generate import batch_generate, generate_step

        if len(prompts) == 1:
            steps = generate_step(mx.array(prompts[0]), self.model, max_tokens=new, kv_bits=kv_bits)
            return measure_steps(prompts, new, ([int(token)] for token, _ in steps))
        if kv_bits is not None:
            raise ElmError("mlx-lm quantizes the keys and values of one text alone")
        tokenizer = SimpleNamespace(eos_token_ids=(), decode=lambda ids: "")
        reset_peak()
        stats = batch_generate(self.model, tokenizer, prompts, max_tokens=new).stats
        return Figures(stats.prompt_time, stats.prompt_tps, stats.generation_tps, device.peak_memory()), []


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def measure_steps(prompts: list[list[int]], new: int, steps: Iterator[list[int]]) -> Measured:
    """Measures steps that each give one token of every prompt."""
    reset_peak()
    times, text = [], []
    start = time.perf_counter()
    for tokens in steps:
        times.append(time.perf_counter())
        text += tokens
    if len(times) != new:
        raise ElmError(f"{len(times)} tokens were generated, not {new}")
    first, rest = times[0] - start, times[-1] - times[0]
    decode = len(prompts) * (new - 1) / rest if new > 1 else 0.0
    return Figures(first, sum(map(len, prompts)) / first, decode, device.peak_memory()), text


def describe(model: Model, path: Path, name: str, notes: tuple[str, ...]) -> About:
    """Returns the sizes and costs of a model that was loaded from `path`."""
    config, dtype = model.config, computed_in(model)
    cost, size = roofline.Cost.of(config), device.DTYPES[dtype].size
    return About(
        name, dtype, config.parameters, stored_bytes(path, config), config.kv_bytes_per_token(size), sum(cost.linear),
        sum(cost.attention), cost.head, cost.unread,
        any(getattr(module, "rounds", False) for module in model.modules()), notes,
    )  # fmt: skip


def computed_in(model: nn.Module) -> str:
    """Returns the type of a model's logits, which are not computed for it."""
    return str(model(mx.array([[1]])).dtype).removeprefix("mlx.core.")


def stored_bytes(path: Path, config: Config) -> int:
    """Returns the bytes of a directory's weights that a decode step needs, as they are stored there: all but an
    embedding that is no head, for it is looked up."""
    entries = [entry for file in weight_files(path) for entry in read_header(file)]
    skipped = () if config.share_input_output_layers else ("embed",)
    return sum(entry.end - entry.begin for entry in entries if not any(word in entry.name for word in skipped))


def reset_peak() -> None:
    """Resets the peak of memory, where the system can."""
    mx.clear_cache()
    if device.on_gpu():
        mx.reset_peak_memory()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    side, path, dtype = sys.argv[1], Path(sys.argv[2]), None if sys.argv[3] == "-" else sys.argv[3]
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints
    if side in ("ours", "naive", "prompt-lookup", "kvp"):
        kvp = Path(sys.argv[4]) if side == "kvp" else None
        worker: Ours | MlxLm = Ours(path, dtype, side == "naive", side == "prompt-lookup", kvp)
    else:
        worker = MlxLm(path, dtype, equal=side == "mlx-lm")
    print(json.dumps(asdict(worker.about)), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [prompt_ids(asked["prompt"], worker.vocab_size, row) for row in range(asked["batch"])]
        try:
            figures, text = worker.measure(prompts, asked["new"], asked["kv_bits"])
            answer = asdict(figures) | {"text": text}
        except ElmError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    try:
        main()
    except ElmError as error:
        sys.exit(str(error))
