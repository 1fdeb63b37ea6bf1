"""One round of synthesis: answers sampled into a record beside the data, and the data made of what is right in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elm_mlx import directories, files, reading
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.errors import ElmError, InputError
from elm_mlx.selfplay.answer_record import AnswerRecord, RecordedProblem
from elm_mlx.selfplay.answer_sampling import Sampling
from elm_mlx.selfplay.chosen_answers import ChosenAnswers

RECORD = ".answers"  # behind the name of the data, its record's


@dataclass(frozen=True)
class Synthesized:
    """What a round sampled, and chose of it. `known`: how many of the problems were in the record before."""

    problems: list[RecordedProblem]
    chosen: ChosenAnswers
    known: int


def record_of(out: Path) -> Path:
    """Returns where the record of a data file is."""
    return out.with_name(out.name + RECORD)


def synthesize(
    sampling: Sampling,
    samples: int,
    out: Path,
    pairs: Path | None = None,
    *,
    overwrite: bool = False,
    progress: OnProgress = no_progress,
) -> Synthesized:
    """Samples `samples` answers, of whole problems, and writes `out` and, if asked for, `pairs`.

    The record is kept: the same call goes on from it where it was stopped or killed, and one for more samples adds to
    it.

    Args:
        overwrite: begin anew, and replace files that are there.

    Raises:
        InputError: a file that is there was not made of the record.
        ElmError: as `Sampling.sample`; no answers to a problem are right and wrong, so that there is no pair.
    """
    record = record_of(out)
    for path in filter(None, (out, pairs)):
        directories.check_file(path, overwrite or record.exists())
    count = -(-samples // sampling.asked.answers)
    with AnswerRecord(record, sampling.identity, anew=overwrite) as kept:
        known = ChosenAnswers()
        known.add(kept.problems, sampling.source)
        if not overwrite:
            _check_made_of(out, record, known.examples)
            if pairs is not None:
                _check_made_of(pairs, record, known.pairs)
        before = min(count, len(kept.problems))
        problems = sampling.sample(kept, count, progress)
        chosen = ChosenAnswers()
        chosen.add(problems, sampling.source)
        if pairs is not None and not chosen.pairs:
            raise ElmError(
                f"{pairs}: no problem was answered both rightly and wrongly, so there is no pair; sample harder or "
                "easier ones, or more"
            )
        written = {out: (chosen.examples, known.examples)}
        if pairs is not None:
            written[pairs] = chosen.pairs, known.pairs
        if not overwrite:
            for path, (lines, earlier) in written.items():
                _check_made_of(path, record, max(lines, earlier, key=len), to_end=True)
        for path, (lines, _) in written.items():
            files.write_json_lines(path, lines)
    return Synthesized(problems, chosen, before)


def _check_made_of(path: Path, record: Path, lines: Sequence[Mapping[str, Any]], *, to_end: bool = False) -> None:
    """Raises InputError where a file is there that does not begin as `lines` do: those of the same record, or of less
    or more of it, do so. With `to_end` one with more lines is refused, too: someone has added them."""
    if not path.exists():
        return
    with reading.opened(path) as file:
        for line in lines:
            there = file.readline()
            if there and there != files.json_line(line):
                raise InputError(
                    f"{path}: exists already, and not of what {record.name} holds; pass --overwrite to "
                    "begin anew and replace it, or choose another"
                )
        if to_end and file.readline():
            raise InputError(
                f"{path}: goes on after what {record.name} holds; move those lines into a file of their own, "
                "or pass --overwrite to begin anew and replace it"
            )
