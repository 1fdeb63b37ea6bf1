"""Make the tables and the picture of what run.py measured: `python examples/kv-prediction/page.py [RESULTS]`.

Without a file it makes those of this folder's page again, from results.json beside it. Knows numbers alone.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

from pages import fill, recorded  # noqa: E402

PROMPTS, SCORED = (128, 256, 448), 64  # tokens of a prompt, and of what follows it
ANSWER = 256, 384  # of the longest prompt's positions, those that an earlier answer would have
SHARES = (0.75, 0.5, 0.25)  # of the base's layers, or of a prompt
LEAST = 1 / 16  # of a prompt, to show what the rest of it is worth
Measured = dict[str, Any]  # of a length of prompt: see `scores` of run.py


def main() -> None:
    results = recorded(HERE / "results.json")
    fill(HERE / "README.md", *tables(results))
    if importlib.util.find_spec("matplotlib"):
        plot(results, HERE / "quality.png")


def sooner(found: dict[str, dict[str, list[float]]], length: int, name: str) -> float:
    """How many times as soon the first token comes as when the base reads its prompt: the median of pairs."""
    own, name = found[str(length)], name.replace("fit", "kvp")
    return statistics.median(base / one for base, one in zip(own["base/1"], own[name], strict=True))


def rows(results: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Measured]]]]:
    """Yields of each variant what it is, its name among the times, and what each seed gave."""
    quality = results["quality"]
    yield "the base", "base/1", [quality["base/1"]]
    for share in (*SHARES, LEAST):
        yield f"the base, of the prompt's last {100 * share:.3g} %", f"base/{share:g}", [quality[f"base/{share:g}"]]
    kinds = ("alone", "the auxiliary alone"), ("fit", "KV prediction, maps fitted"), ("kvp", "KV prediction, trained")
    for (name, what), keep in product(kinds, results["keeps"]):
        found = [quality.get(f"{name}/{keep:g}/{seed}") for seed in results["seeds"]]
        if any(found):
            yield f"{what}, {100 * keep:g} % of the layers", f"{name}/{keep:g}", [each for each in found if each]


def quality_table(results: dict[str, Any]) -> str:
    """Bits a byte by the length of the prompt, what is lost after the longest, and how soon the first token comes."""
    headers = ["", *map(str, PROMPTS), f"more, {PROMPTS[-1]}", *(f"as soon, {length}" for length in PROMPTS)]
    lines = [f"| {' | '.join(headers)} |", "| --- " + "| ---: " * (len(headers) - 1) + "|"]
    for what, name, found in rows(results):
        values = [cell([bits(each[str(length)]) for each in found], "4f") for length in PROMPTS]
        ratios = [f"{sooner(results['times'], length, name):.2f} ×" for length in PROMPTS]
        lost = lost_bits(found, results["quality"]["base/1"])
        lines.append(f"| {what} | {' | '.join([*values, lost, *ratios])} |")
    return "\n".join(lines)


def bits(measured: Measured) -> float:
    """Bits a byte over all passages."""
    return sum(measured["nats"]) / math.log(2) / measured["bytes"]


def lost_bits(seeds: Sequence[dict[str, Measured]], base: dict[str, Measured]) -> str:
    """Bits a byte more than the base's after the longest prompt, with how far 95 % of other passages would reach."""
    length = str(PROMPTS[-1])
    whole = base[length]["nats"]
    more = [
        statistics.mean(nats) - theirs
        for *nats, theirs in zip(*(each[length]["nats"] for each in seeds), whole, strict=True)
    ]
    scale = len(more) / math.log(2) / base[length]["bytes"]
    if not any(more):
        return ""
    return f"{scale * statistics.mean(more):+.4f} ± {1.96 * scale * statistics.stdev(more) / len(more) ** 0.5:.4f}"


def agreement_table(results: dict[str, Any]) -> str:
    """How often the likeliest token is the base's: the first, and any of those that follow the text."""
    lines = [f"| % | {' | '.join(map(str, PROMPTS))} |", "| --- " + "| ---: " * len(PROMPTS) + "|"]
    for what, _, found in list(rows(results))[1:]:
        cells = [
            " / ".join(cell([100 * each[str(length)][kind] for each in found], "0f") for kind in ("first", "each"))
            for length in PROMPTS
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def drafts_line(results: dict[str, Any]) -> str:
    """How often the auxiliaries that are trained guess the base's next greedy token; empty where none is."""
    shares = {
        keep: [100 * value for seed in results["seeds"] if (value := results["quality"].get(f"drafts/{keep:g}/{seed}"))]
        for keep in results["keeps"]
    }
    known = [f"{cell(values, '0f')} % by {100 * keep:g} % of the layers" for keep, values in shares.items() if values]
    return f"\n\nOf the base's greedy tokens the trained auxiliary guesses {', '.join(known)}." if known else ""


def turns_table(results: dict[str, Any]) -> str:
    """Bits a byte more than the base's after the longest prompt, all predicted or with an answer that is kept."""
    quality, base = results["quality"], results["quality"]["base/1"]
    lines = ["|  | all predicted | the answer kept |", "| --- | ---: | ---: |"]
    for what, name, found in rows(results):
        kind, keep = name.split("/")
        turns = [quality.get(f"turns/{kind}/{keep}/{seed}") for seed in results["seeds"]]
        if any(turns):
            kept = lost_bits([each for each in turns if each], base)
            lines.append(f"| {what} | {lost_bits(found, base)} | {kept} |")
    return "\n".join(lines)


def larger_table(results: dict[str, Any]) -> str:
    """How soon the first token of the larger model comes, and the base's seconds."""
    found = results["larger"]["times"]
    lengths = [f"{int(length):,} tokens" for length in found]
    lines = [f"| prompts of | {' | '.join(lengths)} |", "| --- " + "| ---: " * len(found) + "|"]
    seconds = [f"{1000 * statistics.median(own['base/1']):,.0f} ms" for own in found.values()]
    lines.append(f"| {results['larger']['name']}, the base | {' | '.join(seconds)} |")
    for keep in SHARES:
        ratios = [f"{sooner(found, int(length), f'kvp/{keep:g}'):.2f} × as soon" for length in found]
        lines.append(f"| KV prediction, {100 * keep:g} % of the layers | {' | '.join(ratios)} |")
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> list[str]:
    more = [larger_table(results)] if "larger" in results else []
    return [quality_table(results), agreement_table(results) + drafts_line(results), turns_table(results), *more]


def cell(values: Sequence[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):.{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{form}}{spread}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Plots bits a byte by the time to the first token, after the longest prompt: a line a method, a point a seed.

    On the right without the auxiliary alone, which is far above.
    """
    from matplotlib.figure import Figure

    length = PROMPTS[-1]
    figure = Figure(figsize=(10, 4), layout="constrained")
    found = [(name, [bits(each[str(length)]) for each in seeds]) for _, name, seeds in rows(results)]
    kinds = {
        "alone": ("the auxiliary alone", "C1"), "base": ("the base, of the prompt's last part", "C7"),
        "fit": ("KV prediction, maps fitted", "C2"), "kvp": ("KV prediction, trained", "C0"),
    }  # fmt: skip
    for axes, shown in zip(figure.subplots(1, 2), (list(kinds), list(kinds)[1:]), strict=True):
        for kind in shown:
            label, colour = kinds[kind]
            same = [(name, seeds) for name, seeds in found if name.split("/")[0] == kind]
            own = [(1 / sooner(results["times"], length, name), seeds) for name, seeds in same]
            points = [(x, one) for x, seeds in own for one in seeds]
            if own:
                means = [(x, statistics.mean(seeds)) for x, seeds in own]
                axes.plot(*zip(*means, strict=True), "-", color=colour, label=label)
                axes.plot(*zip(*points, strict=True), ".", color=colour)
        axes.set(xlabel=f"time to the first token after {length} tokens, of the base's", ylabel="bits a byte, held out")
        if "alone" in shown:
            axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
