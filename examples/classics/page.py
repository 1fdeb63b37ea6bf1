"""Make the table of what run.py measured: `python examples/classics/page.py [RESULTS]`.

Without a file it makes that of this folder's page again, from results.json beside it. Knows numbers alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

from pages import fill, recorded  # noqa: E402


def main() -> None:
    results = recorded(HERE / "results.json")
    fill(HERE / "README.md", table(results))


def table(results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: each model's loss on each book, nats a token and bits a byte."""
    titles = list(next(iter(results.values())))
    lines = [f"| | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
    for name, losses in results.items():
        lines.append(f"| {name} | {' | '.join(f'{nats:.4f}, {bits:.4f}' for nats, bits in losses.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
