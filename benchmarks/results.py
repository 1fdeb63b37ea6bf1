"""The results page, `docs/results.md`, measured and written: `python benchmarks/results.py`.

    python benchmarks/results.py [--python PYTHON] [--only PART…] [--page] [--note TEXT]

What is measured is kept in `build/results/`, a file for each part, and the page is written from what lies there:
`--only` measures some parts anew, `--page` none. PYTHON has PyTorch, if it is to be compared with.

A section of the page is a title and a function that makes Markdown of its files, or nothing where there are none. For
another one add what it measures to `PARTS`, and its function to `SECTIONS`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from speed import ENVIRONMENT, HEADER, ROOT, embedded_model, first_token

from elm_mlx.bench import results, runner, suites, tables
from elm_mlx.bench.results import Results, Speeds
from elm_mlx.bench.sides import Programs
from elm_mlx.bench.suites import Suite
from elm_mlx.callbacks import OnProgress
from elm_mlx.files import write_text

KEPT, PAGE = ROOT / "build/results", ROOT / "docs/results.md"
EMBEDDED, SEEDED = ROOT / "build/classics", "OpenELM-270M"
OTHERS = ("naive", "mlx-lm", "pytorch")


def suite(name: str, model: str, precision: str, prompt: int, new: int, batch: int = 1, **more: object) -> Suite:
    """One case against all others."""
    case = suites.cases([model], [precision], [(prompt, new)], [batch])
    return replace(Suite(name, case, OTHERS, repeats=5), **more)


BITS = (8, 4, 2)
SPEED = [
    suite("embedded", str(EMBEDDED), "stored", 128, 256),
    suite("270M", SEEDED, "bfloat16", 128, 32),
    suite("270M-long", SEEDED, "bfloat16", 1024, 16, repeats=3),
    suite("270M-batch", SEEDED, "bfloat16", 128, 16, 8, repeats=3),
    suite("270M-4bit", SEEDED, "4bit", 128, 32, against=("mlx-lm",), repeats=3),
    suite("270M-installed", SEEDED, "bfloat16", 128, 12, against=("mlx-lm-stock",), repeats=2, norms=False),
]


def measure_speed(chosen: Suite, programs: Programs) -> None:
    show: OnProgress = lambda what, done=0, total=0: print(what, flush=True)  # noqa: E731
    found = runner.run(chosen, programs, KEPT / f"{chosen.name}.json", on_progress=show)
    if not found.complete:
        sys.exit(130)


def measure_start(programs: Programs) -> None:
    write_text(KEPT / "start.md", f"{HEADER}\n{first_token(EMBEDDED, 10)}\n")


def measure_scores(programs: Programs) -> None:
    held_out = ROOT / "examples/classics/held-out.jsonl.gz"
    command("eval", EMBEDDED, "--text", held_out, "--window", 256, "--out", KEPT / "eval")


def measure_losses(programs: Programs) -> None:
    for bits in BITS:
        command("quantize", EMBEDDED, KEPT / f"{bits}-bit", "--bits", bits, "--overwrite")


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "elm_mlx", *map(str, words)], env=ENVIRONMENT, check=True)


PARTS: dict[str, Callable[[Programs], None]] = {
    "start": measure_start,
    "eval": measure_scores,
    "quantize": measure_losses,
    **{each.name: (lambda programs, each=each: measure_speed(each, programs)) for each in SPEED},  # type: ignore[misc]
}


def speed() -> str:
    """All parts that were measured on one machine, in one table."""
    found = [results.load(path) for each in SPEED if (path := KEPT / f"{each.name}.json").exists()]
    return tables.markdown(merged(found)) if found else ""


def merged(found: list[Results]) -> Results:
    """One of several. Of the machine's speeds, the best of what was measured each time: others may have used it too."""
    machines = {tuple(each.machine.items()) for each in found}
    if len(machines) > 1:
        sys.exit(f"{KEPT}: holds results of several machines or versions; measure all of them anew")
    matmul = {
        dtype: max(each.speeds.matmul.get(dtype, 0.0) for each in found)
        for dtype in sorted({dtype for each in found for dtype in each.speeds.matmul})
    }
    speeds = Speeds(matmul, max(each.speeds.bandwidth for each in found))
    rows = [row for each in found for row in each.rows]
    norms = {(norm.dtype, norm.shape): norm for each in found for norm in each.norms}
    return replace(found[-1], speeds=speeds, rows=rows, norms=[*norms.values()])


def start() -> str:
    path = KEPT / "start.md"
    return path.read_text("utf-8") if path.exists() else ""


def scores() -> str:
    path = KEPT / "eval/results.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text("utf-8"))
    lines = ["| model | on | figure | | standard error |", "| --- | --- | --- | ---: | ---: |"]
    for score in found["scores"]:
        error = "" if score["stderr"] is None else f"{score['stderr']:.3g}"
        name = Path(found["model"]).name
        lines.append(f"| {name} | {score['task']} | {score['metric']} | {score['value']:.4g} | {error} |")
    return f"Measured on: {found['machine']}.\n\n" + "\n".join(lines)


def losses() -> str:
    paths = [path for bits in BITS if (path := KEPT / f"{bits}-bit/quantization.json").exists()]
    lines = [
        "| bits a weight | size, MB | perplexity before | after | divergence, nats | 99th percentile | flipped |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for path in paths:
        found = json.loads(path.read_text("utf-8"))
        lost, size = found["losses"], found["bytes"]["after"] / 1e6
        perplexity = f"{lost['perplexity_before']:.2f} | {lost['perplexity_after']:.2f}"
        apart = f"{lost['kl_mean']:.3g} | {lost['kl_p99']:.3g} | {lost['flipped']:.1%}"
        lines.append(f"| {found['bits_per_weight']['after']:.2f} | {size:.1f} | {perplexity} | {apart} |")
    return f"Measured on: {found['machine']}.\n\n" + "\n".join(lines) if paths else ""


SECTIONS: list[tuple[str, Callable[[], str]]] = [
    ("Speed", speed),
    ("Starting", start),
    ("Scores: `elm-mlx eval` on the embedded model", scores),
    ("Losses: `elm-mlx quantize` on the embedded model", losses),
]

INTRODUCTION = """# Results

`python benchmarks/results.py` writes this page, and measures all of it again on your machine; [bench.md](bench.md) says
how, and what the columns mean. The models are the embedded one (3.6M parameters, `classics`) and OpenELM-270M with
seeded weights.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="a Python that has PyTorch")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="measure these parts alone")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--note", default="", help="what else a reader should know of the machine")
    given = parser.parse_args()
    if not given.page:
        KEPT.mkdir(parents=True, exist_ok=True)
        embedded_model(EMBEDDED)  # whatever lies there may be an earlier one
        for part in given.only:
            PARTS[part](Programs(python=given.python))
    sections = [(title, text) for title, make in SECTIONS if (text := make())]
    note = f"\n{given.note}\n" if given.note else ""
    write_text(PAGE, INTRODUCTION + note + "".join(f"\n## {title}\n\n{text.strip()}\n" for title, text in sections))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
