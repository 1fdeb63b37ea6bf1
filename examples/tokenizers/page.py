"""Make the tables and the plot of what run.py measured: `python examples/tokenizers/page.py [RESULTS]`.

Without a file it makes those of this folder's page again, from results.json beside it. Knows numbers alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

from pages import fill, recorded  # noqa: E402


def main() -> None:
    result = recorded(HERE / "results.json")
    fill(HERE / "README.md", *tables(result))
    if importlib.util.find_spec("matplotlib"):
        plot(result, HERE / "tokenizers.png")


def tables(result: dict[str, Any]) -> list[str]:
    """Bytes a token; what an embedding takes of a model; weights to read; speed, where measured; the best size."""
    kinds = list(next(iter(result["bytes_per_token"].values())))
    heads = [f"{int(size):,}" for size in next(iter(result["weights_per_token"].values()))]
    made = [
        table(
            ["bytes a token", *(f"{kind} (all but code)" if kind == "prose" else kind for kind in kinds)],
            [[name, *(f"{by[kind]:.2f}" for kind in kinds)] for name, by in result["bytes_per_token"].items()],
        ),
        table(
            ["embedding's share of the parameters", *heads],
            [[name, *(f"{share:.1%}" for share in by.values())] for name, by in result["embedding_share"].items()],
        ),
        table(
            [f"weights to read for a token, times those at {heads[0]}", *heads],
            [
                [name, *(f"{count / next(iter(by.values())):.2f}" for count in by.values())]
                for name, by in result["weights_per_token"].items()
            ],
        ),
    ]
    if "speed" in result:
        rows = [[f"{int(s):,}", f"{by['prompt']:.1f}", f"{by['decode']:.1f}"] for s, by in result["speed"].items()]
        made.append(table(["vocabulary", "128-token prompt", "decode"], rows))
    reads = result["weights_per_byte"]
    if sizes := [*next(iter(reads.values()))]:
        rows = []
        for name, by in reads.items():
            figures = {size: f"{by[size] / 1e6:,.0f}" for size in sizes}
            fewest = min(by, key=by.__getitem__)
            rows.append([name, *(f"**{text}**" if size == fewest else text for size, text in figures.items())])
        made.append(
            table(["million weights read to write a byte of prose", *(f"{int(size):,}" for size in sizes)], rows)
        )
    return made


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = f"| --- |{' ---: |' * (len(head) - 1)}"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def plot(result: dict[str, Any], path: Path) -> None:
    """Bytes a token, and weights read for a byte, by the size of the vocabulary."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = {name: by for name, by in result["bytes_per_token"].items() if name.startswith("trained")}
    sizes = [int(name.rpartition(", ")[2].replace(",", "")) for name in found]
    for kind in next(iter(result["bytes_per_token"].values())):
        if kind != "prose":
            (line,) = left.plot(sizes, [by[kind] for by in found.values()], marker=".", label=kind)
            for name, mark in (("Llama 2, 32,000", "s"), ("SmolLM2, 49,152", "^")):
                if name in result["bytes_per_token"]:
                    at = int(name.rpartition(", ")[2].replace(",", ""))
                    left.plot([at], [result["bytes_per_token"][name][kind]], mark, color=line.get_color(), mfc="none")
    left.set(xscale="log", xlabel="vocabulary", ylabel="bytes a token", title="□ Llama 2   △ SmolLM2   • trained here")
    left.legend()
    for model, by in result["weights_per_byte"].items():
        least = min(by.values(), default=1)
        right.plot([int(size) for size in by], [value / least for value in by.values()], marker=".", label=model)
    right.set(xscale="log", xlabel="vocabulary", ylabel="of the fewest", title="Weights read to write a byte")
    right.set_ylim(0.98, 1.6)
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter("")
    right.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
