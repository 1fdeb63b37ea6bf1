"""`elm-mlx serve` against `mlx_lm.server`: `python benchmarks/serve.py`.

Both serve the same float32 weights with the same BLAS, and clients that stream at once send them the same prompts, one
server right after the other: medians of the pairs' ratios count, as in `speed.py`. For each number of clients there are
new tokens a second of all together, and the 95th percentiles of the time to the first token and of the gap between two;
with seeds, at a temperature, too. Then `elm-mlx serve` alone: one stream against `elm-mlx generate`'s loop, and the
start of its process until it listens against loading the model.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import elm_mlx  # noqa: F401  (before MLX, for its BLAS)
from elm_mlx.bench import measured_models
from elm_mlx.model.config import ModelConfig

sys.path.insert(0, str(Path(__file__).parent))
from speed import BIN, ENVIRONMENT, embedded_model, machine

PROMPT, NEW, LONG = 40, 48, 160  # words, of three tokens each or so, and tokens; of one stream against `generate`
SMALL: dict[str, Any] = {"num_layers": 12, "model_dim": 384, "head_dim": 64, "max_context_length": 2048}
HEADER = (
    "| clients | seeds | tokens/s | mlx-lm | ratio | spread | first token p95, s | mlx-lm | gap p95, ms | mlx-lm |\n"
    "| ---: | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |"
)
OURS = [BIN / "elm-mlx", "serve"]
THEIRS = [sys.executable, "-c", "import elm_mlx; from mlx_lm.server import main; main()", "--model"]  # with our BLAS
LOAD = "import sys, elm_mlx; elm_mlx.load(sys.argv[1])"
GENERATE = (
    "import json, sys, time, elm_mlx\n"
    "model, tokenizer = elm_mlx.load(sys.argv[1])\n"
    "for line in sys.stdin:\n"
    "    prompt, new = json.loads(line)\n"
    "    stream = elm_mlx.stream_generate(model, tokenizer, prompt, max_tokens=new)\n"
    "    print([time.perf_counter() for response in stream if response.text], flush=True)\n"
)


class Process:
    """A program that answers a line of JSON with a line."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit("a process of the benchmark has ended")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()


class Server:
    """A server's process, from its start until it listens, and to the end of the block."""

    def __init__(self, command: Sequence[str | Path], model: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, start = f"http://127.0.0.1:{port}", time.perf_counter()
        self.process = subprocess.Popen(
            [*command, model, "--port", str(port)],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not self._listens():
            if self.process.poll() is not None:
                raise SystemExit(f"{command[-1]} ended with {self.process.returncode}")
            time.sleep(0.01)
        self.seconds = time.perf_counter() - start

    def _listens(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health") as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


class Load:
    """What clients ask of a server in one round, and the figures of its answers."""

    def __init__(
        self, clients: int, round_number: int, seeded: bool, words: Sequence[str], max_tokens: int = NEW
    ) -> None:
        draw = random.Random(f"{clients} {round_number} {seeded}")
        options = {"max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        self.bodies = [
            options
            | {"prompt": " ".join(draw.choices(words, k=PROMPT))}
            | ({"temperature": 0.8, "seed": draw.getrandbits(31)} if seeded else {"temperature": 0})
            for _ in range(clients)
        ]

    def measure(self, clients: Process, url: str, name: str) -> tuple[float, list[float], list[float]]:
        """Returns new tokens a second, the seconds to each first token, and those between two."""
        answers = clients.ask({"url": url, "bodies": [body | {"model": name} for body in self.bodies]})
        seconds = max(answer["came"][-1] for answer in answers) - min(answer["sent"] for answer in answers)
        firsts = [answer["came"][0] - answer["sent"] for answer in answers]
        gaps = [b - a for answer in answers for a, b in pairwise(answer["came"])]
        return sum(answer["tokens"] for answer in answers) / seconds, firsts, gaps


def p95(values: Sequence[float]) -> float:
    """Returns the 95th percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]


def compare(model: Path, rounds: int, counts: Sequence[int]) -> None:
    """Prints a row for each number of clients, greedy and with seeds: pairs of both servers, in turns."""
    words = [word for word in models_words() if word.isalpha()]
    clients = Process([sys.executable, Path(__file__).with_name("serve_clients.py")])
    with clients, Server(OURS, model) as mine, Server(THEIRS, model) as other:
        sides = ((mine.url, served_name(mine.url)), (other.url, "default_model"))
        for side in sides:  # compiled steps, and pages of memory
            Load(2, -1, False, words).measure(clients, *side)
        for seeded in (False, True):
            for count in counts:
                results = []
                for number in range(rounds):
                    load = Load(count, number, seeded, words)
                    order = sides if number % 2 == 0 else sides[::-1]
                    pair = [load.measure(clients, *side) for side in order]
                    results.append(pair if number % 2 == 0 else pair[::-1])
                print(row(count, seeded, results), flush=True)


def row(count: int, seeded: bool, results: Sequence[Sequence[tuple[float, list[float], list[float]]]]) -> str:
    """Returns a row of the table: median speeds and ratio, 95th percentiles of first tokens (s) and gaps (ms)."""
    speeds = [statistics.median(pair[side][0] for pair in results) for side in (0, 1)]
    ratios = [pair[0][0] / pair[1][0] for pair in results]
    firsts, gaps = (
        [p95([value for pair in results for value in pair[side][what]]) for side in (0, 1)] for what in (1, 2)
    )
    spread = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}"
    return (
        f"| {count} | {'yes' if seeded else 'no'} | {speeds[0]:.1f} | {speeds[1]:.1f} | {spread} "
        f"| {firsts[0]:.2f} | {firsts[1]:.2f} | {1e3 * gaps[0]:.0f} | {1e3 * gaps[1]:.0f} |"
    )


def alone(model: Path, rounds: int) -> None:
    """One stream against the loop of `generate`, by the median time a token, and the start against loading."""
    words = [word for word in models_words() if word.isalpha()]
    ratios, starts = [], []
    clients = Process([sys.executable, Path(__file__).with_name("serve_clients.py")])
    with clients, Process([sys.executable, "-c", GENERATE, model]) as loop, Server(OURS, model) as server:
        name = served_name(server.url)
        for number in range(-1, 2 * rounds):
            load = Load(1, number, False, words, LONG)
            _, _, gaps = load.measure(clients, server.url, name)
            ratios.append(statistics.median(gaps) / pace(loop.ask([load.bodies[0]["prompt"], LONG])))
    for _ in range(rounds):
        with Server(OURS, model) as server:
            starting = server.seconds
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", LOAD, model], env=ENVIRONMENT, check=True)
        starts.append(starting - (time.perf_counter() - start))
    print(f"\nOne stream takes {statistics.median(ratios[1:]):.3f} of the time a token of generate's loop takes "
          f"({min(ratios[1:]):.3f} to {max(ratios[1:]):.3f});")  # fmt: skip
    print(f"it listens {statistics.median(starts):.2f} s later than a process that loads the model is done.")


def pace(came: Sequence[float]) -> float:
    """Returns the median time between two tokens."""
    return statistics.median(b - a for a, b in pairwise(came))


def served_name(url: str) -> str:
    """Returns the name of the model that a server has."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        return str(json.load(answer)["data"][0]["id"])


def models_words() -> list[str]:
    """Words to make prompts of."""
    return (Path(__file__).parents[1] / "README.md").read_text("utf-8").split()


def write_model(config: ModelConfig, tokenizer: Path, directory: Path) -> Path:
    """Writes a model of seeded float32 weights, with the tokenizer in `tokenizer` and a piece for every other token."""
    measured_models.write_seeded(config, directory, "float32")
    pieces = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))
    vocabulary = pieces["model"]["vocab"]
    more = {f"\u2581w{number}": number for number in range(len(vocabulary), config.vocab_size)}
    vocabulary.update(more)
    (directory / "tokenizer.json").write_text(json.dumps(pieces), "utf-8")
    content = bytearray((tokenizer / "tokenizer.model").read_bytes())
    for piece in map(str.encode, more):  # ModelProto.pieces, SentencePiece.piece
        content += b"\x0a" + bytes([len(piece) + 2]) + b"\x0a" + bytes([len(piece)]) + piece
    (directory / "tokenizer.model").write_bytes(content)
    shutil.copy(tokenizer / "tokenizer_config.json", directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs of each load")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16], help="clients at once")
    parser.add_argument("--threads", type=int, help="BLAS threads of both; 1 where others use the machine too")
    parser.add_argument("--models", nargs="+", choices=("29M", "270M"), default=["29M", "270M"])
    options = parser.parse_args()
    if options.threads:
        ENVIRONMENT["OPENBLAS_NUM_THREADS"] = str(options.threads)
    print(
        f"{machine()}\n\nPrompts of {PROMPT} words, {NEW} new tokens, {options.rounds} rounds, "
        f"{options.threads or 'all'} BLAS threads.",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = embedded_model(Path(scratch) / "embedded")
        configs = {"29M": ModelConfig.scaled(vocab_size=32_000, **SMALL), "270M": ModelConfig.preset("OpenELM-270M")}
        for name in options.models:
            model = write_model(configs[name], tokenizer, Path(scratch) / name)
            print(f"\n{name}, seeded float32 weights\n\n{HEADER}", flush=True)
            compare(model, options.rounds, options.clients)
            alone(model, options.rounds)


if __name__ == "__main__":
    main()
