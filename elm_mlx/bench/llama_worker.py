"""The llama.cpp side, by the Python bindings of its library, set as its own `llama-bench` sets it.

    PYTHON llama_worker.py GGUF

Reads and prints the lines that `side_worker` does. PYTHON has llama-cpp-python, in an environment of its own: this
project doesn't need it.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np

TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by llama.cpp's names; others have no better one
Tokens = list[tuple[int, int, int, bool]]  # each its text, position and id, and whether a token is chosen after it


def cores() -> int:
    """Physical cores, on a Mac the fast ones: llama.cpp's own number of threads."""
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        if sys.platform == "darwin":
            return int(subprocess.check_output(["sysctl", "-n", "hw.perflevel0.physicalcpu"], timeout=5))
        siblings = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
        if found := len({path.read_text() for path in siblings}):
            return found
    return os.cpu_count() or 1


class LlamaModel:
    """A loaded model, and greedy text of it."""

    def __init__(self, path: str):
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self._model:
            sys.exit(f"llama.cpp cannot read {path}")
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def about(self) -> dict[str, Any]:
        commit, package = api._lib.ggml_commit, metadata.version("llama-cpp-python")
        commit.restype = ctypes.c_char_p
        text = ctypes.create_string_buffer(200)
        api.llama_model_desc(self._model, text, len(text))  # such as "llama 135M Q4_1"
        stored = text.value.decode().split()[-1]
        return {
            "name": f"llama.cpp {commit().decode().removesuffix('-dirty')} (llama-cpp-python {package})",
            "dtype": TYPES.get(stored, stored),
            "parameters": api.llama_model_n_params(self._model),
            "notes": [api.llama_print_system_info().decode().strip(" |")],
        }

    def measure(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        length = len(prompts[0])
        last = length - 1
        read = [(row, at, token, at == last) for row, ids in enumerate(prompts) for at, token in enumerate(ids)]
        with self._context(len(prompts), length + new) as context:
            size = api.llama_n_batch(context)
            pieces = [LlamaBatch(read[at : at + size]) for at in range(0, len(read), size)]
            reset_peak()
            times = [time.perf_counter()]
            chosen = [token for piece in pieces for token in self._chosen(context, piece)]
            times.append(time.perf_counter())
            text = [*chosen]
            for at in range(length, length + new - 1):
                chosen = self._chosen(context, LlamaBatch([(row, at, token, True) for row, token in enumerate(chosen)]))
                times.append(time.perf_counter())
                text += chosen
        first, rest = times[1] - times[0], times[-1] - times[1]
        decode = len(prompts) * (new - 1) / rest if new > 1 else 0.0
        return {"first": first, "prompt": len(read) / first, "decode": decode, "memory": peak(), "text": text}

    @contextmanager
    def _context(self, texts: int, positions: int) -> Iterator[Any]:
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = texts * positions, texts
        settings.n_threads = settings.n_threads_batch = cores()
        context = api.llama_init_from_model(self._model, settings)
        if not context:
            raise MemoryError("llama.cpp has no room for so many positions")
        try:
            yield context
        finally:
            api.llama_free(context)

    def _chosen(self, context: Any, piece: LlamaBatch) -> list[int]:
        """Computes a piece, and returns the likeliest tokens after those that are asked."""
        if api.llama_decode(context, piece.batch):
            raise MemoryError("llama.cpp could not compute a piece of the text")
        logits = (api.llama_get_logits_ith(context, place) for place in piece.asked)
        return [int(np.ctypeslib.as_array(each, (self.vocab_size,)).argmax()) for each in logits]


class LlamaBatch:
    """Tokens of one call, as llama.cpp takes them."""

    def __init__(self, tokens: Tokens):
        self.asked = [place for place, token in enumerate(tokens) if token[3]]
        self.batch = api.llama_batch_init(len(tokens), 0, 1)
        self.batch.n_tokens = len(tokens)
        for place, (row, at, token, asked) in enumerate(tokens):
            self.batch.token[place], self.batch.pos[place], self.batch.logits[place] = token, at, asked
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, row

    def __del__(self) -> None:
        api.llama_batch_free(self.batch)


def reset_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int | None:
    """The most that the process held, where the system says so and no GPU holds more."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return None if api.llama_supports_gpu_offload() else held


def main() -> None:
    network = LlamaModel(sys.argv[1])
    print(json.dumps(network.about()), flush=True)
    size = network.vocab_size
    for line in sys.stdin:
        asked = json.loads(line)
        # As `suites.prompt_ids`, which this cannot import.
        prompts = [
            [1] + [3 + (i * 7919 + row * 104_729 + 37) % max(1, size - 3) for i in range(asked["prompt"] - 1)]
            for row in range(asked["batch"])
        ]
        try:
            answer = network.measure(prompts, asked["new"])
        except MemoryError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
