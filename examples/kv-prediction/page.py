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
from pathlib import Path
from typing import Any

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

from pages import fill, recorded  # noqa: E402

PROMPTS, SCORED = (128, 512, 2048), 64  # tokens of a prompt, and of what follows it
ANSWER = 1856, 1984  # of the longest prompt's positions, those that an earlier answer would have
SHARES = (0.75, 0.5, 0.25)  # of the base's layers, or of a prompt
SMALL = "small"
AUXILIARIES = (*map(str, SHARES), SMALL)  # shares of the base's layers, and a model of its own
LEAST = 1 / 16  # of a prompt, to show what the rest of it is worth
KINDS = {
    "own": "an auxiliary trained to go on by itself", "alone": "the auxiliary of a prediction, alone",
    "fit": "KV prediction, maps fitted", "kvp": "KV prediction, trained",
}  # fmt: skip
Measured = dict[str, Any]  # of a length of prompt: see `scores` of run.py


def main() -> None:
    results = recorded(HERE / "results.json")
    fill(HERE / "README.md", *tables(results))
    if importlib.util.find_spec("matplotlib"):
        plot(results, HERE / "quality.png")


def sooner(found: dict[str, dict[str, list[float]]], length: int, name: str) -> float:
    """How many times as soon the first token comes as when the base reads its prompt: the median of pairs."""
    own, name = found[str(length)], name.replace("fit", "kvp").replace("own", "alone")
    return statistics.median(base / one for base, one in zip(own["base/1"], own[name], strict=True))


def rows(results: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Measured]]]]:
    """Yields of each variant what it is, its name among the times, and what each seed gave."""
    quality = results["quality"]
    for share, seeds in quality["base"].items():
        part = "" if share == "1" else f", of the prompt's last {100 * float(share):.3g} %"
        yield f"the base{part}", f"base/{share}", list(seeds.values())
    for kind, what in KINDS.items():
        for name, seeds in quality.get(kind, {}).items():
            yield f"{what}, {layers(results, name)}", f"{kind}/{name}", list(seeds.values())


def layers(results: dict[str, Any], name: str) -> str:
    """What an auxiliary is."""
    if name != SMALL:
        return f"{100 * float(name):g} % of the layers"
    parameters = results["parameters"]
    return f"another model, {100 * parameters[name] / parameters['base']:.0f} % of the parameters"


def quality_table(results: dict[str, Any]) -> str:
    """By the length of the prompt: bits a byte more than the base's, and how soon the first token comes."""
    headers = ["", *map(str, PROMPTS), *(f"as soon, {length}" for length in PROMPTS)]
    lines = [f"| {' | '.join(headers)} |", "| --- " + "| ---: " * (len(headers) - 1) + "|"]
    for what, name, found in rows(results):
        values = [lost_bits(found, whole(results), length) for length in PROMPTS]
        if name == "base/1":
            values = [f"{bits(found[0][str(length)]):.4f}" for length in PROMPTS]
        ratios = [f"{sooner(results['times'], length, name):.2f} ×" for length in PROMPTS]
        lines.append(f"| {what} | {' | '.join([*values, *ratios])} |")
    return "\n".join(lines)


def bits(measured: Measured) -> float:
    """Bits a byte over all passages."""
    return sum(measured["nats"]) / math.log(2) / measured["bytes"]


def whole(results: dict[str, Any]) -> dict[str, Measured]:
    """What the base gave that reads all of its prompts."""
    return results["quality"]["base"]["1"]["0"]


def lost_bits(seeds: Sequence[dict[str, Measured]], base: dict[str, Measured], length: int = PROMPTS[-1]) -> str:
    """Bits a byte more than the base's, with how far 95 % of other passages would reach, and the seeds' deviation."""
    theirs, size = base[str(length)]["nats"], math.log(2) * base[str(length)]["bytes"]
    more = [[one - least for one, least in zip(each[str(length)]["nats"], theirs, strict=True)] for each in seeds]
    means = [statistics.mean(passage) for passage in zip(*more, strict=True)]
    reach = 1.96 * statistics.stdev(means) * len(means) ** 0.5 / size
    spread = f" ({statistics.stdev([sum(each) / size for each in more]):.4f})" if len(seeds) > 1 else ""
    return f"{sum(means) / size:+.4f} ± {reach:.4f}{spread}"


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
    known = [
        f"{cell([100 * value for value in seeds.values()], '0f')} % ({layers(results, name)})"
        for name, seeds in results["quality"].get("drafts", {}).items()
    ]
    return f"\n\nOf the base's greedy tokens the trained auxiliary guesses {', '.join(known)}." if known else ""


def turns_table(results: dict[str, Any]) -> str:
    """Bits a byte more than the base's after the longest prompt, all predicted or with an answer that is kept."""
    lines = ["|  | all predicted | the answer kept |", "| --- | ---: | ---: |"]
    for what, name, found in rows(results):
        kind, auxiliary = name.split("/")
        turns = results["quality"].get(f"{kind}, answer kept", {}).get(auxiliary, {})
        if turns:
            kept = lost_bits(list(turns.values()), whole(results))
            lines.append(f"| {what} | {lost_bits(found, whole(results))} | {kept} |")
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

    Points beside a line are those of the auxiliary that is no part of the base.
    On the right without the auxiliaries by themselves, which are far above.
    """
    from matplotlib.figure import Figure

    length = PROMPTS[-1]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    found = [(name, [bits(each[str(length)]) for each in seeds]) for _, name, seeds in rows(results)]
    kinds = {"base": "the base, of the prompt's last part"} | KINDS
    for axes, shown in zip(figure.subplots(1, 2), (list(kinds), ["base", "fit", "kvp"]), strict=True):
        for kind in shown:
            label, colour = kinds[kind], f"C{list(kinds).index(kind)}"
            same = [(name, seeds) for name, seeds in found if name.split("/")[0] == kind]
            own = [(1 / sooner(results["times"], length, name), seeds) for name, seeds in same]
            points = [(x, one) for x, seeds in own for one in seeds]
            if own:
                means = [
                    (x, statistics.mean(seeds))
                    for (x, seeds), (name, _) in zip(own, same, strict=True)
                    if SMALL not in name
                ]
                axes.plot(*zip(*means, strict=True), "-", color=colour, label=label)
                axes.plot(*zip(*points, strict=True), ".", color=colour)
        axes.set(xlabel=f"time to the first token after {length} tokens, of the base's", ylabel="bits a byte, held out")
        if "own" in shown:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
