"""`elm-mlx eval MODEL`: scores on the paper's tasks, perplexity, and runs compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from elm_mlx import directories
from elm_mlx.cli import options
from elm_mlx.cli.screen import ProgressBar, bad_records_named, counted, line, name_bad, note, table, visible
from elm_mlx.errors import InputError
from elm_mlx.train.setting_fields import abouts
from elm_mlx.train.settings import DataSettings

if TYPE_CHECKING:
    from elm_mlx.evaluate.comparison import ScoreDifference
    from elm_mlx.evaluate.evaluation import Evaluation, EvaluationRequest

PANELS = {
    "Tasks": ("tasks", "suite", "data", "shots", "limit", "harness"),
    "Texts": ("text", "columns", "template", "skip_bad", "window", "stride"),
    "Results": ("out", "compare", "plot"),
}


_FOR_TEXT = ("columns", "template", "skip_bad", "window", "stride")


def eval(
    ctx: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL", help="A model directory, or OWNER/NAME on the hub; with --compare, directories of runs."
        ),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "-t",
            metavar="TASK,…",
            help="Names, NAME@SHOTS, or .jsonl files of questions; may be repeated. (default: the suite's)",
        ),
    ] = None,
    suite: Annotated[
        Literal["zero-shot", "openllm", "llm360"] | None,
        typer.Option(help="The tasks of one of the paper's tables. (default: zero-shot)"),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Bits per byte of texts, or of the answers in data: a file, a directory (its test, or else valid, or "
            "train), or hub:OWNER/NAME:SPLIT; may be repeated.",
        ),
    ] = None,
    columns: Annotated[list[str] | None, typer.Option(help=f"For --text: {abouts(DataSettings)['columns']}")] = None,
    template: options.ChatTemplate = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="For --text: leave bad records out.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A directory of TASK.jsonl files. (default: the Hugging Face hub's cache)"),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Few-shot examples before each question. (default: the suite's)")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N questions of each task. (default: all)")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="For --text: tokens read at once. (default: 2048, or the model's context)")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="For --text: tokens scored in each window. (default: half the window)")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The directory of the results. (default: evals/MODEL or evals/MODEL+ADAPTER)"),
    ] = None,
    adapter: options.AdapterPath = None,
    kvp: options.KvpPath = None,
    kv_bits: options.KvBits = None,
    compute_dtype: options.ComputeDtype = None,
    harness: Annotated[bool, typer.Option("--harness", help="Run tasks of lm_eval, which must be installed.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Compare the runs in these directories.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the scores into this file too; needs matplotlib.")] = None,
) -> None:
    """Score a model on the paper's tasks as LM Evaluation Harness does, or on text; or compare such runs."""
    if plot is not None:
        directories.check_file(plot, None, directories.PNG_MARK)
    if compare:
        why = "--compare scores nothing; it takes directories of runs"
        options.refuse_others(ctx, ["paths", "compare", "plot"], why)
        _compare(paths, plot)
        return
    if not text:
        options.refuse_given(ctx, _FOR_TEXT, "is for --text, which names what to read")
    if harness:
        options.refuse_given(ctx, ["plot"], "is for our own scores, and --harness prints its table")
    if len(paths) > 1:
        raise InputError("give one model directory; --compare takes several runs")
    if kvp is not None:
        options.check_kvp(adapter)
    from elm_mlx.evaluate import evaluation

    wanted = evaluation.EvaluationRequest(
        tasks=tasks or [], suite=suite, texts=[*(text or ())], columns=tuple(columns or ()), template=template,
        skip_bad=skip_bad, data=data, shots=shots, limit=limit, window=window, stride=stride,
    )  # fmt: skip
    if not harness:
        wanted.chosen()  # or what is no task is said only when the model is loaded
    opened = evaluation.Evaluation(
        options.directory_of(paths[0]), wanted, out, adapter=adapter, compute_dtype=compute_dtype, kv_bits=kv_bits,
        kvp=kvp,
    )  # fmt: skip
    for remark in opened.notes:
        note(remark)
    if harness:
        with ProgressBar() as progress:
            print(visible(opened.run_harness(progress)))
    else:
        _score(opened, wanted)
    line(f"wrote {opened.out}")
    if plot is not None:
        from elm_mlx.evaluate import comparison

        comparison.draw({paths[0].name: opened.results}, plot)
        line(f"wrote {plot}")


def _score(opened: Evaluation, wanted: EvaluationRequest) -> None:
    """Scores what is not scored yet, and prints all scores."""
    try:
        with bad_records_named(", ".join(map(str, wanted.texts))), ProgressBar() as progress:
            progress("reading")
            opened.run(progress)
    except KeyboardInterrupt:
        note(f"stopped; the same command goes on from {opened.out}")
        raise
    for name, text in opened.texts.items():
        name_bad(text.bad)
        for label, remark in text.remarks:
            note(f"{name}: {label}: {remark}")
    _print(opened)


def _print(done: Evaluation) -> None:
    from elm_mlx.evaluate.scores import format_score

    beside = any(row.published is not None for row in done.rows)
    headers = ["task", "shots", "questions", "metric", "score", *([f"{done.published}"] if beside else [])]
    rows = []
    before = None
    for row in done.rows:
        new = (row.name, row.shots) != before
        before = (row.name, row.shots)
        known = f"{row.published:.2f}" if row.published is not None else ""
        cells = [row.name, str(row.shots), f"{row.score.count:,}"] if new else ["", "", ""]
        rows.append([*cells, row.metric, format_score(row.metric, row.score), *([known] if beside else [])])
    if done.mean is not None:
        known = f"{done.published_mean:.2f}" if done.published_mean is not None else ""
        rows.append(["mean", "", "", "", format_score("acc", done.mean), *([known] if beside else [])])
    table(headers, rows, left=(0, 3))
    for key, (cut, count) in done.cut.items():
        questions = counted(count, "question")
        line(f"{key}: {cut:,} of {questions} exceed the model's context with their examples, and lack their beginning")
    for key, how in done.missing.items():
        line(f"not scored: {key}: {how}")
    if beside:
        line(f"published: {done.source}")
    if done.pace.items:
        rate = done.pace.items / done.pace.seconds
        line(f"{done.pace.items:,} items in {done.pace.seconds:.1f} s, {rate:,.1f} items/s")


def _compare(paths: list[Path], plot: Path | None) -> None:
    from elm_mlx.evaluate import comparison
    from elm_mlx.evaluate.score_record import read_results

    if len(paths) < 2:
        raise InputError("--compare takes two runs or more")
    runs: dict[str, Mapping[str, Any]] = {str(path): read_results(path) for path in paths}
    if len(runs) < len(paths):
        raise InputError("--compare: a run is named twice")
    names = list(runs)
    for other in names[1:]:
        line(f"{other} against {names[0]}")
        _print_differences(comparison.compare(runs[names[0]], runs[other]))
    if plot is not None:
        comparison.draw(runs, plot)
        line(f"wrote {plot}")


def _print_differences(differences: list[ScoreDifference]) -> None:
    from elm_mlx.evaluate.scores import SHARES

    rows = []
    for each in differences:
        factor = 100 if each.metric in SHARES else 1
        verdict = "" if each.p >= 0.05 else "better" if each.better else "worse"
        rows.append([
            each.task, str(each.shots), f"{each.count:,}", each.metric, f"{factor * each.first:.2f}",
            f"{factor * each.second:.2f}", f"{factor * each.value:+.2f}",
            f"{factor * each.low:+.2f} … {factor * each.high:+.2f}", f"{each.p:.2g}", verdict,
        ])  # fmt: skip
    headers = ("task", "shots", "questions", "metric", "first", "second", "difference", "95 % of resamples", "p", "")
    table(headers, rows, left=(0, 3, 9))
