"""`elm-mlx synthesize MODEL --task T`: training data of a model's own answers that a program judged right."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from elm_mlx.cli import options
from elm_mlx.cli.screen import ProgressBar, counted, duration, note, say, say_all, table
from elm_mlx.cli.training_display import TrainingDisplay
from elm_mlx.errors import InputError
from elm_mlx.reading import quoted

if TYPE_CHECKING:
    from elm_mlx.selfplay.answer_record import RecordedProblem
    from elm_mlx.selfplay.answer_sampling import SamplingSettings
    from elm_mlx.selfplay.rounds import RoundResult
    from elm_mlx.train.finetuning import Finetuning
    from elm_mlx.train.run import Result

PANELS = {
    "Problems": ("task", "difficulty", "held_out"),
    "Sampling": ("samples", "answers", "temp", "max_tokens", "seed", "template", "compute_dtype"),
    "Output": ("out", "pairs", "solutions", "measure", "as_json", "overwrite"),
    "Rounds": ("loop", "config"),
}
_MEASURED = 128  # held-out problems after each round
T = TypeVar("T")
_LABELS = 12  # columns
_SHOWN = 160  # characters of a prompt or answer


def synthesize(
    model: options.OptionalModelPath = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", metavar="TASK|FILE.py", help="The task to solve. (no default)")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="The data to write, with --loop the rounds' directory, with --measure its answers. (no default)",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers to sample; in each round of --loop. (no default)")
    ] = None,
    difficulty: Annotated[
        str | None, typer.Option(metavar="N|N-M", help="Difficulties to draw problems of. (default: all)")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Data whose prompts are not to be trained on; may be repeated."),
    ] = None,
    answers: Annotated[int, typer.Option(min=1, help="Answers to each problem.")] = 8,
    temp: Annotated[float, typer.Option(help="Temperature; above 0.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 128,
    seed: Annotated[int, typer.Option(help="The same seed draws the same problems and answers.")] = 0,
    template: options.ChatTemplate = None,
    compute_dtype: options.ComputeDtype = None,
    pairs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write pairs of a right and a wrong answer too, for dpo.")
    ] = None,
    solutions: Annotated[
        bool, typer.Option("--solutions", help="Write solutions of the task's program; no MODEL is needed.")
    ] = False,
    measure: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"pass@1 and pass@k on so many held-out problems. (default: none; with --loop {_MEASURED})",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For --measure: print JSON.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew, and replace the files that are there.")
    ] = False,
    loop: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Sample, train and begin again, K times. (default: once)")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For --loop: options of `lora`, as its --config takes them.")
    ] = None,
    adapter: options.AdapterPath = None,
) -> None:
    """Sample answers to problems that a program checks, and keep the right ones as data for lora, pairs for dpo; or do
    so and train, round by round."""
    if task is None:
        from elm_mlx.problems.built_in import TASKS

        raise InputError(f"--task is missing: {', '.join(TASKS)}, or a FILE.py")
    alone = loop is None and samples is None and measure is not None
    _refuse(
        ("--config", config is not None and loop is None, "has options of training, which --loop does"),
        *((name, solutions and value is not None, "--solutions writes what the task's program knows, without a model")
          for name, value in (("MODEL", model), ("--adapter", adapter), ("--pairs", pairs), ("--measure", measure),
                              ("--loop", loop))),
        ("MODEL", not solutions and model is None, "is missing; --solutions alone needs none"),
        ("--overwrite", overwrite and loop is not None, "a loop is gone on with, or begun in another --out"),
        ("--pairs", pairs is not None and loop is not None, "rounds train on right answers alone"),
        ("--measure", measure is not None and loop is None and not alone,
         "measures by itself, or within --loop; leave out --samples"),
        ("--pairs", pairs is not None and alone, "--measure writes no data; give --samples instead of it"),
        ("--json", as_json and not alone, "is for --measure by itself"),
    )  # fmt: skip
    held = tuple(held_out or ())
    if model is None:
        _write_solutions(task, difficulty, seed, _needed("--samples", samples), _needed("--out", out), held, overwrite)
        return
    from elm_mlx.selfplay.answer_sampling import SamplingSettings
    from elm_mlx.selfplay.synthesis import record_of

    asked = SamplingSettings(
        model, task, adapter, difficulty, answers, seed, temp, max_tokens, template, held, compute_dtype
    )
    try:
        if alone:
            _measure(asked, _needed("--measure", measure), out, overwrite, as_json)
        elif loop is not None:
            _loop(asked, loop, _needed("--samples", samples), measure or _MEASURED, _needed("--out", out), config)
        else:
            _synthesize(asked, _needed("--samples", samples), _needed("--out", out), pairs, overwrite)
    except KeyboardInterrupt:
        if out is not None:
            note(f"stopped; the same command goes on from what is in {out if loop or alone else record_of(out)}")
        raise


def _refuse(*cases: tuple[str, bool, str]) -> None:
    """Raises InputError for the first of options that is wrong, with why."""
    for name, wrong, why in cases:
        if wrong:
            raise InputError(f"{name}: {why}")


def _needed(name: str, value: T | None) -> T:
    if value is None:
        raise InputError(f"{name} is missing")
    return value


def _write_solutions(
    task: str, difficulty: str | None, seed: int, count: int, out: Path, held_out: Sequence[str], overwrite: bool
) -> None:
    from elm_mlx import directories, files
    from elm_mlx.problems.built_in import difficulties, load_task
    from elm_mlx.problems.solutions import solved_by_program
    from elm_mlx.selfplay.held_out_files import prompts_in

    directories.check_file(out, overwrite)
    known = load_task(task)
    lines = solved_by_program(known, difficulties(difficulty, known), seed, count, prompts_in(held_out))
    files.write_json_lines(out, lines)
    if len(lines) < count:
        note(f"the task has no more than {len(lines):,} problems to train on among these")
    say(
        "wrote",
        f"{out}: {counted(len(lines), 'solution')}; try: elm-mlx lora MODEL --data {quoted(out)} --out DIR",
        _LABELS,
    )


def _synthesize(asked: SamplingSettings, samples: int, out: Path, pairs: Path | None, overwrite: bool) -> None:
    from elm_mlx.selfplay.answer_sampling import Sampling
    from elm_mlx.selfplay.synthesis import record_of, synthesize

    options.directory_of(asked.model)  # with a bar: the rest finds it there
    sampling = Sampling(asked, note)
    begun = list[float]()  # when the model was read
    with ProgressBar("items") as progress:

        def show(what: str, parts: int = 0, total: int = 0, /) -> None:
            if total and not begun:
                begun.append(time.perf_counter())
            progress(what, parts, total)

        done = synthesize(sampling, samples, out, pairs, overwrite=overwrite, progress=show)
    seconds = time.perf_counter() - begun[0] if begun else 0.0
    _print_difficulties(done.problems, asked.answers)
    chosen = done.chosen
    whose = (
        "" if asked.adapter is None else f" --from {quoted(asked.adapter)}{' --full' if sampling.trains_all else ''}"
    )
    _print_examples(done.problems)
    say_all(
        [
            ("sampled", _speed(done.problems[done.known :], seconds)),
            ("answers", _verdicts(done.problems)),
            ("held out", f"{counted(sum(each.held_out for each in done.problems), 'problem')} drawn and passed over"),
            ("dropped", f"{counted(chosen.duplicates, 'duplicate')} of right answers"),
            ("wrote", f"{out}: {counted(len(chosen.examples), 'right answer')}; try: elm-mlx lora "
                      f"{quoted(asked.model)}{whose} --data {quoted(out)} --out DIR"),
            ("wrote", pairs and f"{pairs}: {counted(len(chosen.pairs), 'pair')}; try: elm-mlx dpo "
                                f"{quoted(asked.model)}{whose} --data {quoted(pairs)} --out DIR"),
            ("record", f"{record_of(out)}: all answers; the same command with more --samples adds to them"),
        ],
        _LABELS,
    )  # fmt: skip


def _measure(asked: SamplingSettings, count: int, out: Path | None, overwrite: bool, as_json: bool) -> None:
    from elm_mlx.selfplay.answer_record import AnswerRecord
    from elm_mlx.selfplay.answer_sampling import Sampling

    options.directory_of(asked.model)
    sampling = Sampling(asked, note)
    with ProgressBar("items") as progress:
        if out is None:
            solved = list(sampling.solve(sampling.held_out(count), progress))
        else:
            with AnswerRecord(out, sampling.measured_identity, anew=overwrite) as record:
                solved = sampling.measure(record, count, progress)
    if as_json:
        by_difficulty = [{"difficulty": level, **_rates(own)} for level, own in _by_difficulty(solved)]
        print(json.dumps({"of": sampling.identity, **_rates(solved), "by difficulty": by_difficulty}, indent=2))
        return
    _print_difficulties(solved, asked.answers)
    _print_examples(solved)
    _print_pass(solved, asked.answers, "measured")


def _rates(problems: Sequence[RecordedProblem]) -> dict[str, Any]:
    """Returns pass@1 and pass@k of problems with their intervals, and the answers by verdict, as JSON has them."""
    from elm_mlx.problems.pass_rates import pass_rate

    counts = [each.count for each in problems]
    rates = {f"pass@{k}": pass_rate(counts, k) for k in sorted({1, counts[0][1]})}
    shown = {name: {"rate": rate.rate, "low": rate.low, "high": rate.high} for name, rate in rates.items()}
    return {"problems": len(problems), **shown, "answers": dict(_counted_verdicts(problems))}


def _loop(asked: SamplingSettings, rounds: int, samples: int, measured: int, out: Path, config: Path | None) -> None:
    from elm_mlx.cli import training
    from elm_mlx.selfplay.answer_sampling import Sampling
    from elm_mlx.selfplay.rounds import Rounds
    from elm_mlx.train.settings import LoraSettings

    settings: Mapping[str, Any] = {} if config is None else training.settings_in(config, LoraSettings)
    options.directory_of(asked.model)
    done: list[RoundResult] = []
    told = set[str]()

    def tell_once(text: str) -> None:
        if text not in told:
            note(text)
        told.add(text)

    with Rounds(Sampling(asked, tell_once), samples, measured, out, settings) as loop, ProgressBar("items") as progress:

        def train(run: Finetuning) -> Result:
            progress.hide()
            shown = TrainingDisplay(
                run.settings.schedule.total, "valid" in run.splits, every=run.asked.reports.steps_per_report
            )
            result = training.train(run, shown, [], {}, False, {})
            if result.harm is not None:
                shown.warn(training.harmed(result, "learning-rate in the file of --config"))
            return result

        def say_sampled(number: int, problems: Sequence[RecordedProblem], examples: int) -> None:
            progress.hide()
            _print_examples(problems)
            say(f"round {number}", f"{_verdicts(problems)}; trains on {counted(examples, 'right answer')}", _LABELS)

        for result in loop.run(rounds, train, progress, say_sampled):
            progress.hide()
            done.append(result)
            _print_pass(result.held_out, asked.answers, "held out" if result.number else "start")
    _print_rounds(done, asked.answers)
    last = out / f"round-{rounds}" / "adapter"
    say("wrote", f"{out}; try: elm-mlx generate {quoted(asked.model)} --adapter {quoted(last)} --prompt …", _LABELS)


def _print_rounds(done: Sequence[RoundResult], answers: int) -> None:
    from elm_mlx.problems.pass_rates import pass_rate

    rows, ks = [], sorted({1, answers})
    for result in done:
        right, sampled = (sum(each.count[place] for each in result.sampled) for place in (0, 1))
        rates = [pass_rate([each.count for each in result.held_out], k) for k in ks]
        rows.append([
            str(result.number or "start"), f"{right / sampled:.1%}" if sampled else "", f"{result.examples:,}",
            *(cell for rate in rates for cell in (f"{rate.rate:.1%}", f"{rate.low:.1%} to {rate.high:.1%}")),
        ])  # fmt: skip
    table(("round", "right of sampled", "trained on", *(head for k in ks for head in (f"pass@{k}", "95 %"))), rows)


def _print_pass(problems: Sequence[RecordedProblem], answers: int, label: str) -> None:
    from elm_mlx.problems.pass_rates import pass_rate

    for k in sorted({1, answers}):
        rate = pass_rate([each.count for each in problems], k)
        say(label, f"{rate}, of {counted(len(problems), 'held-out problem')}", _LABELS)


def _print_difficulties(problems: Sequence[RecordedProblem], answers: int) -> None:
    """Prints a table: of each difficulty the problems, the share of right answers, and of problems solved at all."""
    from elm_mlx.problems.pass_rates import pass_rate

    rows, ks = [], sorted({1, answers})
    for difficulty, own in _by_difficulty(problems):
        rates = [pass_rate([each.count for each in own], k) for k in ks]
        rows.append([str(difficulty), f"{len(own):,}", *(f"{rate.rate:.1%}" for rate in rates), _verdicts(own)])
    table(("difficulty", "problems", *(f"pass@{k}" for k in ks), "answers"), rows, left=(2 + len(ks),))


def _by_difficulty(problems: Sequence[RecordedProblem]) -> list[tuple[int, list[RecordedProblem]]]:
    levels = sorted({each.difficulty for each in problems})
    return [(level, [each for each in problems if each.difficulty == level]) for level in levels]


def _print_examples(problems: Sequence[RecordedProblem]) -> None:
    """Prints a problem with an answer of each verdict that there is."""
    found: dict[str, tuple[str, str]] = {}
    for problem in problems:
        for answer in problem.answers:
            found.setdefault(answer.verdict.value if answer.ended else "no end", (problem.prompt, answer.text))
    for verdict, (prompt, text) in found.items():
        say(verdict, f"{_shortened(prompt)} → {_shortened(text)}", _LABELS)


def _speed(problems: Sequence[RecordedProblem], seconds: float) -> str:
    if not problems:
        return "nothing: all answers were in the record"
    answers = [answer for problem in problems for answer in problem.answers]
    tokens = sum(answer.tokens for answer in answers)
    took = f"{counted(tokens, 'token')} in {duration(seconds)}, {tokens / seconds:,.0f} tokens/s"
    return f"{counted(len(answers), 'answer')}, {took}"


def _verdicts(problems: Sequence[RecordedProblem]) -> str:
    return ", ".join(f"{count:,} {verdict}" for verdict, count in _counted_verdicts(problems).most_common())


def _counted_verdicts(problems: Sequence[RecordedProblem]) -> Counter[str]:
    answers = [answer for problem in problems for answer in problem.answers]
    return Counter(answer.verdict.value if answer.ended else "without an end" for answer in answers)


def _shortened(text: str) -> str:
    """The text on one line, its middle left out where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
