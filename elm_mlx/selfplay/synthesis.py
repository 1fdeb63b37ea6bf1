"""One round of synthesis: answers sampled into a record beside the data, and the data made of what is right in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elm_mlx import directories, files
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.errors import ElmError
from elm_mlx.selfplay.answer_record import AnswerRecord, RecordedProblem
from elm_mlx.selfplay.answer_sampling import Sampling
from elm_mlx.selfplay.chosen_answers import ChosenAnswers

RECORD = ".answers"  # behind the name of the data, its record's


@dataclass(frozen=True)
class Synthesized:
    """What a round sampled, and chose of it."""

    problems: list[RecordedProblem]
    chosen: ChosenAnswers


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
        InputError: the files there are of something else.
        ElmError: as `Sampling.sample`; two answers to a problem are never right and wrong, so that there is no pair.
    """
    record = record_of(out)
    known = record.exists()
    for path in filter(None, (out, pairs)):
        directories.check_file(path, overwrite or known)
    if overwrite:
        record.unlink(missing_ok=True)
    count = -(-samples // sampling.asked.answers)
    with AnswerRecord(record, sampling.identity) as kept:
        problems = sampling.sample(kept, count, progress)
        chosen = ChosenAnswers()
        chosen.add(problems, sampling.source)
        if pairs is not None and not chosen.pairs:
            raise ElmError(
                f"{pairs}: no problem was answered both rightly and wrongly, so there is no pair; sample harder or "
                "easier ones, or more"
            )
        files.write_json_lines(out, chosen.examples)
        if pairs is not None:
            files.write_json_lines(pairs, chosen.pairs)
    return Synthesized(problems, chosen)
