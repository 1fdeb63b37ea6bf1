"""The results page, `docs/results.md`, and the README's table of speed, measured and written.

    python benchmarks/results.py [--python PYTHON] [--chat MODEL] [--only PART…] [--page] [--note TEXT]

PYTHON has PyTorch and llama-cpp-python, as docs/bench.md says; MODEL is SmolLM2-135M-Instruct in 4 bits. What is
missing is left out, and said.

What is measured is kept in `benchmarks/records/`, a file for each part, and page and table are written from what lies
there and in `benchmarks/machines/`: `--only` measures some parts anew, `--page` none. A section of the page is a title
and a function that makes Markdown of its files, or nothing where there are none. For another one add what it measures
to `PARTS`, and its function to `SECTIONS`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from speed import ENVIRONMENT, HEADER, ROOT, embedded_model, first_token

from elm_mlx.bench import results, runner, suites, tables
from elm_mlx.bench.results import Results, Row, Speeds
from elm_mlx.bench.sides import Programs
from elm_mlx.bench.suites import Suite
from elm_mlx.callbacks import OnProgress
from elm_mlx.files import write_json, write_text
from elm_mlx.reading import json_object

KEPT, MACHINES = ROOT / "benchmarks/records", ROOT / "benchmarks/machines"
PAGE, README = ROOT / "docs/results.md", ROOT / "README.md"
BEGIN, END = "<!-- benchmarks/results.py writes this -->\n", "<!-- to here -->\n"  # of the README's table
# Seen from the project's root, for the records travel.
MADE, EMBEDDED, CHAT = Path("build/results"), Path("build/classics"), Path("build/SmolLM2-135M-Instruct")
SEEDED, PAPERS = "OpenELM-270M", "Apple M2 Max"
OTHERS = ("mlx-lm", "pytorch", "llama.cpp")


def suite(name: str, model: str, precision: str, prompt: int, new: int, batch: int = 1, **more: object) -> Suite:
    """One case against all others."""
    case = suites.cases([model], [precision], [(prompt, new)], [batch])
    return replace(Suite(name, case, OTHERS, repeats=3), **more)


BITS = (8, 4, 2)
SPEED = {  # by their titles in the README's table
    "3.6M": suite("embedded", str(EMBEDDED), "stored", 128, 256, repeats=5),
    "270M, bfloat16": suite("270M", SEEDED, "bfloat16", 128, 32, repeats=5),
    "the same, longer": suite("270M-long", SEEDED, "bfloat16", 1024, 32),
    "the same, 8 texts at once": suite("270M-batch", SEEDED, "bfloat16", 128, 16, 8),
    "the same, mlx-lm as installed": suite(
        "270M-installed", SEEDED, "bfloat16", 128, 12, against=("mlx-lm-stock",), repeats=2, norms=False
    ),
    "270M, 4 bits": suite("270M-4bit", SEEDED, "4bit", 128, 32, against=("mlx-lm", "llama.cpp")),
    f"{CHAT.name}, 4 bits": suite("chat", str(CHAT), "stored", 512, 64, against=("mlx-lm", "llama.cpp"), norms=False),
    "the same, longer still": suite(
        "chat-long", str(CHAT), "stored", 6144, 32, against=("llama.cpp",), repeats=2, norms=False
    ),
}


def measure_speed(chosen: Suite, programs: Programs, note: str) -> None:
    """Measures a suite of `elm-mlx bench` into its record; one that was interrupted goes on."""
    if chosen.cases[0].model == str(CHAT) and not CHAT.is_dir():
        print(f"{chosen.name}: left out, for --chat does not say where {CHAT.name} is")
        return
    show: OnProgress = lambda what, done=0, total=0: print(what, flush=True)  # noqa: E731
    found = runner.run(chosen, programs, KEPT / f"{chosen.name}.json", note=note, on_note=print, on_progress=show)
    if not found.complete:
        sys.exit(130)


def measure_start(programs: Programs, note: str) -> None:
    """Measures the seconds from the start of the process to the first token, ten pairs."""
    write_json(KEPT / "start.json", {"table": f"{HEADER}\n{first_token(EMBEDDED, 10)}\n"})


def measure_scores(programs: Programs, note: str) -> None:
    """Scores the embedded model on books that were held out."""
    held_out = "examples/classics/held-out.jsonl.gz"
    command("eval", EMBEDDED, "--text", held_out, "--window", 256, "--out", MADE / "eval")
    write_json(KEPT / "eval.json", json_object(MADE / "eval/results.json"))


def measure_losses(programs: Programs, note: str) -> None:
    """Quantizes the embedded model to each width, and records what it loses."""
    for bits in BITS:
        command("quantize", EMBEDDED, MADE / f"{bits}-bit", "--bits", bits, "--overwrite")
        write_json(KEPT / f"{bits}-bit.json", json_object(MADE / f"{bits}-bit/quantization.json"))


def command(*words: object) -> None:
    """Runs `elm-mlx` with these words. Raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", "elm_mlx", *map(str, words)], env=ENVIRONMENT, check=True)


PARTS: dict[str, Callable[[Programs, str], None]] = {
    "start": measure_start,
    "eval": measure_scores,
    "quantize": measure_losses,
    **{each.name: partial(measure_speed, each) for each in SPEED.values()},
}


def measured() -> dict[str, Results]:
    """The speeds that were measured, by title."""
    paths = {title: KEPT / f"{each.name}.json" for title, each in SPEED.items()}
    return {title: results.load(path) for title, path in paths.items() if path.exists()}


def speed() -> str:
    """All parts that were measured on one machine, in one table."""
    found = [*measured().values()]
    return tables.markdown(merged(found)) if found else ""


def machines() -> str:
    """A line for each model of each machine whose file is there, and what a reader should know of the machine."""
    found = {path.name: results.load(path) for path in sorted(MACHINES.glob("*.json"))}
    lines = [
        "| machine | model | tokens | prompt, tokens/s | generation, tokens/s | naive RMSNorm | mlx-lm | PyTorch |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in found.values():
        name = ", ".join(each.machine[label] for label in ("processor", "vectors") if label in each.machine)
        lines += [_machine_line(name, row) for row in each.rows if row.figures]
    if all(each.machine["processor"] != PAPERS for each in found.values()):
        lines += [_machine_line(f"{PAPERS}, not measured yet", Row(case)) for case in suites.SUITES["m2max"].cases]
    notes = []
    for name, each in found.items():
        left_out = " ".join(line.removesuffix(".") + "." for line in tables.left_out(each))
        notes.append(f"- [{name}](../benchmarks/machines/{name}): {tables.measured_on(each)} {left_out}".rstrip())
    return "\n\n".join([MACHINES_INTRODUCTION.strip(), "\n".join(lines), "\n".join(notes)])


def _machine_line(machine: str, row: Row) -> str:
    ours = [tables.spread(row.spread("ours", figure)) for figure in ("prompt", "decode")]
    others = []
    for side in ("naive", "mlx-lm", "pytorch"):
        ratios = [ratio for figure in ("prompt", "decode") if (ratio := row.ratio(side, figure))]
        others.append(" and ".join(f"× {ratio.median:.2f}" for ratio in ratios))
    return f"| {machine} | {row.case.model} | {tables.tokens(row.case)} | {' | '.join([*ours, *others])} |"


def merged(found: list[Results]) -> Results:
    """One of several. Of the machine's speeds, the best of what was measured each time: others may have used it too."""
    if len({tuple(each.machine.items()) for each in found}) > 1:
        sys.exit(f"{KEPT}: holds results of several machines or versions; measure all of them anew")
    matmul = {
        dtype: max(each.speeds.matmul.get(dtype, 0.0) for each in found)
        for dtype in sorted({dtype for each in found for dtype in each.speeds.matmul})
    }
    speeds = Speeds(matmul, max(each.speeds.bandwidth for each in found))
    rows = [row for each in found for row in each.rows]
    norms = {(norm.dtype, norm.shape): norm for each in found for norm in each.norms}
    commits, notes = (
        dict.fromkeys(text for each in found if (text := getattr(each, name))) for name in ("commit", "note")
    )
    return replace(
        found[-1], commit=", ".join(commits), note="; ".join(notes), load=max(each.load for each in found),
        speeds=speeds, rows=rows, norms=[*norms.values()],
    )  # fmt: skip


def start() -> str:
    """Returns the section on the first token, empty where nothing is recorded."""
    path = KEPT / "start.json"
    return str(json_object(path)["table"]) if path.exists() else ""


def scores() -> str:
    """Returns the section on scores, empty where nothing is recorded."""
    path = KEPT / "eval.json"
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
    paths = [path for bits in BITS if (path := KEPT / f"{bits}-bit.json").exists()]
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
    ("Machines", machines),
    ("Speed", speed),
    ("Starting", start),
    ("Scores: `elm-mlx eval --window 256` on the embedded model", scores),
    ("Losses: `elm-mlx quantize` on the embedded model", losses),
]


def readme() -> str:
    """The README's table: our figures, and how many times as fast they are as the others'."""
    found = measured()
    if not found:
        return ""
    about = merged([*found.values()])
    versions = dict(tables.machine(about)[1])
    named = {side: suites.SIDES[side].split(",")[0] for side in OTHERS}
    named |= {side: f"{name} {versions[name].split(' ')[0]}" for side, name in named.items() if name in versions}
    lines = [f"| tokens a second | elm-mlx | {' | '.join(named.values())} |", "| --- |" + " ---: |" * (1 + len(named))]
    for title, each in found.items():
        for row in each.rows:
            many = f"{row.case.batch} × " if row.case.batch > 1 else ""
            lines.append(_readme_line(f"{title}: prompt of {many}{row.case.prompt:,}", row, "prompt"))
            lines.append(_readme_line("decode after it", row, "decode"))
    machine = f"{versions['processor']}, {versions['cores']} cores, {versions['system'].split(' ')[0]}"
    introduction = README_INTRODUCTION.format(machine=machine, mlx=versions["mlx"], when=about.when[:10])
    if path := start():
        _, _, ours, theirs, ratio, _, _ = (cell.strip() for cell in path.splitlines()[-1].split("|"))
        introduction += f"From the start of the process to the first token: {ours} s, mlx-lm {theirs} s (× {ratio}).\n"
    return f"{introduction}\n" + "\n".join(lines) + "\n"


def _readme_line(what: str, row: Row, figure: str) -> str:
    ours = row.spread("ours", figure)
    cells = [tables.number(ours.median) if ours else ""]
    for side in OTHERS:
        ratio = row.ratio(side, figure) or (row.ratio("mlx-lm-stock", figure) if side == "mlx-lm" else None)
        cells.append(f"× {ratio.median:.2f}" if ratio else "")
    return f"| {what} | {' | '.join(cells)} |"


def write_readme() -> None:
    """Writes the table between the README's marks again, if there is one."""
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    if table := readme():
        write_text(README, f"{before}{BEGIN}{table}{END}{rest.partition(END)[2]}")


README_INTRODUCTION = """Our figures, and how many times as fast they are as those of mlx-lm (given the same BLAS and
type), PyTorch, and llama.cpp (given the same weights): the median of pairs of runs, one right after the other.
`python benchmarks/results.py` measures yours, and wrote this and [docs/results.md](docs/results.md), where spreads
and roofline stand. This is an {machine}, MLX {mlx}, on {when}; no Mac was measured.
"""
MACHINES_INTRODUCTION = """
The paper's setting, `elm-mlx bench --suite m2max`, on each machine of which somebody has sent the file:
[bench.md](bench.md#a-machine-of-yours) says how. Behind our figures, how many times as fast they are as each of the
others', for the prompt and for generation: medians of pairs of runs.
"""
INTRODUCTION = """# Results

`python benchmarks/results.py` measures all of this again on your machine; [bench.md](bench.md) says how, and what the
columns mean. With `--page` it writes the page from the records in `benchmarks/records` and `benchmarks/machines`, which
hold every single measurement. The models are the embedded one (3.6M parameters, `classics`), OpenELM-270M with
seeded weights, and where `--chat` names it SmolLM2-135M-Instruct in 4 bits (groups of 32, the embedding in 8 bits).
"""


def page() -> str:
    """The page, from what was measured."""
    sections = [(title, text) for title, make in SECTIONS if (text := make())]
    return INTRODUCTION + "".join(f"\n## {title}\n\n{text.strip()}\n" for title, text in sections)


def main() -> None:
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="a Python that has PyTorch and llama-cpp-python")
    parser.add_argument("--chat", type=Path, help=f"the directory of {CHAT.name} in 4 bits")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="measure these parts alone")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--note", default="", help="what else a reader should know of the machine, kept with figures")
    given = parser.parse_args()
    began = time.monotonic()
    if not given.page:
        KEPT.mkdir(exist_ok=True)
        embedded_model(EMBEDDED)  # whatever lies there may be an earlier one
        if given.chat is not None:
            CHAT.unlink(missing_ok=True)
            CHAT.symlink_to(given.chat.resolve())
        for part in given.only:
            PARTS[part](Programs(python=given.python), given.note)
    write_text(PAGE, page())
    write_readme()
    print(f"wrote {PAGE} and {README} after {(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
