"""`elm-mlx serve` under attack: damaged requests, clients that leave, many questions, and what it keeps of them.

    python benchmarks/serve_attacked.py MODEL                 10,000 requests, 500 clients, 2,000 questions
    python benchmarks/serve_attacked.py MODEL --requests 1000 --clients 100 --seed 7

MODEL is a model with a chat template. The server runs in a process of its own, whose memory and descriptors are read
before and after. Exit code 1 where an answer is none that a client could read, or the next question is not answered as
before, or something is kept. Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import serve_attacks

_GROWTH = 64 << 20  # bytes that the process may grow by after the first tenth: pieces of caches of other sizes


def main() -> int:
    """Runs what the command line asks for. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    command = [sys.executable, "-m", "elm_mlx", "serve", f"m={given.model}", "--port", "0", "--kv-cache-bytes", "64MB"]
    with tempfile.NamedTemporaryFile("r") as log, Path(log.name).open("w") as errors:
        with subprocess.Popen(command, stderr=errors) as process:
            try:
                failed = _attacked(_port(log, process), process.pid, given, log)
            finally:
                process.terminate()
        print(f"exit code {process.returncode}")
        return 1 if failed or process.returncode else 0


def _port(log: IO[str], process: subprocess.Popen[bytes]) -> int:
    """Waits until the server listens. Returns its port."""
    while process.poll() is None:
        found = re.search(r"at http://\S+:(\d+)/", log.read())
        if found:
            return int(found[1])
        log.seek(0)
        time.sleep(0.05)
    log.seek(0)
    raise SystemExit(log.read())


def _attacked(port: int, process: int, given: argparse.Namespace, log: IO[str]) -> bool:
    """Prints what happens. Returns whether anything is wrong."""
    before = _answer(port)
    print(f"{'':34} {'seconds':>8} {'memory MB':>10} {'descriptors':>11}")
    start, statuses, wrong, sizes = time.monotonic(), Counter[int](), list[str](), []
    for part, count in enumerate((given.requests // 10, given.requests - given.requests // 10)):
        found, faults = serve_attacks.attack(port, "m", "m", count, given.seed + part)
        statuses += found
        wrong += faults
        sizes.append(_row(f"{sum(statuses.values()):,} damaged requests", start, port, process))
    for part, count in enumerate((given.clients // 5, given.clients - given.clients // 5)):
        asyncio.run(serve_attacks.leave(port, "m", count, given.seed + part))
        sizes.append(_row(f"{count} clients left", start, port, process))
    for part, count in enumerate((given.questions // 5, given.questions - given.questions // 5)):
        for number in range(count):
            _answer(port, f"Who is {part} {number}?")
        sizes.append(_row(f"{count:,} questions in a row", start, port, process))
    print(f"answers by status: {dict(sorted(statuses.items()))}; {len(wrong)} that no client could read")
    for each in wrong[:20]:
        print(f"    {each[:300]}")
    same = _answer(port) == before
    print(f"the next question is answered {'as before' if same else 'OTHERWISE'}")
    log.seek(0)
    defects = [line for line in log if "a bug in elm-mlx" in line or "Traceback" in line]
    print(f"defects in the log: {len(defects)}", *defects[:5], sep="\n    ")
    grown = max(last - first for (first, _), (last, _) in zip(sizes[::2], sizes[1::2], strict=True))
    return bool(wrong or defects or not same or grown > _GROWTH or sizes[-1][1] > sizes[0][1])


def _row(name: str, start: float, port: int, process: int) -> tuple[int, int]:
    """Prints a row, once the server is at rest. Returns the memory and the descriptors of its process."""
    deadline = time.monotonic() + 60
    while not serve_attacks.at_rest(port):
        if time.monotonic() > deadline:
            raise SystemExit("the engine does not come to rest")
        time.sleep(0.1)
    time.sleep(1)
    status = Path(f"/proc/{process}/status").read_text()
    memory = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))
    descriptors = len([*Path(f"/proc/{process}/fd").iterdir()])
    print(f"{name:34} {time.monotonic() - start:8.1f} {memory / 1e6:10.1f} {descriptors:11}", flush=True)
    return memory, descriptors


def _answer(port: int, question: str = "Who?") -> str:
    asked = {"model": "m", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 20}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


if __name__ == "__main__":
    sys.exit(main())
