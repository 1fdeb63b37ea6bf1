"""Tables and plot of what run.py measured: `python examples/fragility/page.py [LOSSES]`.

Without a file it makes those of this folder's page again, from losses.json beside it. Knows numbers alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

from pages import fill, recorded  # noqa: E402
from spread import cell, interval  # noqa: E402

FULL = 16  # bits of what is not quantized
PARAMETERS = 66_880
ROW_TOKENS = 8 * 256  # of an update, as in recipe.toml
COLOURS = {8: "#999999", 4: "#0072B2", 3: "#009E73", 2: "#D55E00"}  # Okabe and Ito's
WAYS = {"rounded": "rounded", "adapter": "rounded, with LoRA", "learned": "scales learned (DWQ)"}
Losses = dict[tuple[int, int], dict[int, dict[str, float]]]  # by steps and bits: by seed: by way


def main() -> None:
    losses = recorded(HERE / "losses.json", read)
    fill(HERE / "README.md", tables(losses))
    if importlib.util.find_spec("matplotlib"):
        plot(losses, HERE / "fragility.png")


def read(path: Path) -> Losses:
    losses: Losses = {}
    for name, measured in json.loads(path.read_text("utf-8")).items():
        _, steps, _, seed, _, bits = name.split("-")
        losses.setdefault((int(steps), int(bits)), {})[int(seed)] = measured
    return dict(sorted(losses.items(), key=lambda item: (item[0][0], -item[0][1])))


def added(losses: Losses, steps: int, bits: int, way: str) -> list[float]:
    """Nats that quantizing costs, for each seed: with an adapter, over the whole model with an adapter."""
    against = "adapter" if way == "adapter" else "rounded"
    seeds, whole = losses[steps, bits], losses[steps, FULL]
    return [
        one[way] - whole[seed][against] for seed, one in seeds.items() if way in one and against in whole.get(seed, {})
    ]


def measured(losses: Losses) -> list[str]:
    """The ways that there is anything of."""
    return [way for way in WAYS if any(way in one for seeds in losses.values() for one in seeds.values())]


def tables(losses: Losses) -> str:
    """One for each way, a row for each training: means over seeds with their 95 % intervals, and what came back."""
    widths = sorted({bits for _, bits in losses if bits != FULL}, reverse=True)
    lines = []
    for way in measured(losses):
        heads = " | ".join(f"{bits} bits" for bits in widths)
        lines += [
            f"| {WAYS[way]}: tokens a parameter | seeds | loss in full | {heads} |",
            "| " + " | ".join(["---:"] * (3 + len(widths))) + " |",
        ]
        for steps in dict.fromkeys(steps for steps, _ in losses):
            full = [one[way] for one in losses[steps, FULL].values() if way in one]
            full = full or [one["rounded"] for one in losses[steps, FULL].values()]
            cells = [came_back(losses, steps, bits, way) if (steps, bits) in losses else "" for bits in widths]
            lines.append(f"| {tokens(steps):.2g} | {len(full)} | {cell(full)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def came_back(losses: Losses, steps: int, bits: int, way: str) -> str:
    """What is added, and the share of what rounding adds that is gone, where that is more than noise."""
    left, cost = added(losses, steps, bits, way), added(losses, steps, bits, "rounded")
    if not left:
        return ""
    share = 1 - statistics.fmean(left) / statistics.fmean(cost)
    noise = way == "rounded" or statistics.fmean(cost) < 5e-3
    return cell(left) + ("" if noise else f" ({share:.0%} back)")


def tokens(steps: int) -> float:
    """Tokens a parameter of a training."""
    return steps * ROW_TOKENS / PARAMETERS


def plot(losses: Losses, path: Path) -> None:
    """A panel for each way: what quantizing adds by tokens a parameter; a line a width, a point a seed."""
    from matplotlib.figure import Figure

    ways = measured(losses)
    figure = Figure(figsize=(1.5 + 3.5 * len(ways), 3.6), layout="constrained")
    panels = figure.subplots(1, len(ways), sharex=True, sharey=True, squeeze=False)[0]
    for axes, way in zip(panels, ways, strict=True):
        for width in sorted({bits for _, bits in losses if bits != FULL}, reverse=True):
            by_steps = {steps: added(losses, steps, bits, way) for steps, bits in losses if bits == width}
            by_steps = {steps: each for steps, each in by_steps.items() if each}
            if not by_steps:
                continue
            colour = COLOURS[width]
            means = [interval(each)[0] for each in by_steps.values()]
            axes.plot([*map(tokens, by_steps)], means, color=colour, marker="o", label=f"{width} bits")
            for steps, each in by_steps.items():
                axes.plot([tokens(steps)] * len(each), each, ".", color=colour, alpha=0.4)
        axes.set(xlabel="tokens a parameter", xscale="log", title=WAYS[way])
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss added, nats a token")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
