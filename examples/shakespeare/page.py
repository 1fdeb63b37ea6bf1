"""Make the table of what run.py measured: `python examples/shakespeare/page.py`, from results.json beside it.

    python examples/shakespeare/page.py LOSSES NAME     takes over the `losses.json` of a run under a name first

Knows numbers alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

from pages import fill  # noqa: E402

RESULTS, TOKENS = HERE / "results.json", 41_063  # of the held-out play
Results = dict[str, dict[str, float]]  # nats a token, by what was trained on, and by model


def main() -> None:
    results: Results = json.loads(RESULTS.read_text("utf-8"))
    if len(sys.argv) > 1:
        path, name = sys.argv[1:]
        results[name] = json.loads(Path(path).read_text("utf-8"))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    fill(HERE / "README.md", table(results))


def table(results: Results) -> str:
    """Markdown: the loss before any training, and after each with the adapter and fused."""
    before = next(iter(results.values()))["before"]
    rows = [("before", before)]
    for name, losses in results.items():
        rows += [(f"after {name}, with the adapter", losses["with the adapter"]), ("the same, fused", losses["fused"])]
    lines = [f"| *Julius Caesar*, {TOKENS:,} tokens | loss, nats a token | perplexity |", "| --- | ---: | ---: |"]
    return "\n".join(lines + [f"| {name} | {loss:.4f} | {math.exp(loss):.1f} |" for name, loss in rows])


if __name__ == "__main__":
    main()
