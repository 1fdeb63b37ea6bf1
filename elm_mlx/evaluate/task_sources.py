"""Where a task's questions come from: a file of the user's, a directory of such files, or the hub's cache.

Knows names of files and how they are read; `tasks` knows what their records mean. Never downloads: what is missing is
said, with how to get it. Imports huggingface_hub and pyarrow only where they are needed.
"""

from __future__ import annotations

import bz2
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elm_mlx import reading
from elm_mlx.data import data_files
from elm_mlx.data.data_files import BadRecord
from elm_mlx.errors import InputError
from elm_mlx.evaluate import questions
from elm_mlx.evaluate.questions import SHAPES, BadQuestion, Question, has_shape, of_shape
from elm_mlx.evaluate.tasks import Chosen, Task

SUFFIXES = (*data_files.JSON, data_files.PARQUET)
HELLASWAG_TEXT = ("hellaswag_val_full.txt.bz2", "hellaswag_val_full.txt")

# What records on the hub have, of which nothing else is read.
_COLUMNS = (
    "activity_label", "answer", "answerKey", "article", "choice1", "choice2", "choices", "correct_answer", "ctx_a",
    "ctx_b", "distractor1", "distractor2", "distractor3", "endings", "goal", "label", "mc2_targets", "option1",
    "option2", "passage", "premise", "problems", "question", "sent_less", "sent_more", "sentence", "sol1", "sol2",
    "support", "text",
)  # fmt: skip

_SHARD = re.compile(r"-\d{5}-of-(\d{5})")
_FOLDERS_OF_NO_CONFIG = ("data", "default")


class Missing(Exception):
    """A task's data are not here; the text is how to get them."""


@dataclass(frozen=True)
class Source:
    """The questions of a task, all of them, in order.

    Attributes:
        examples: what examples are drawn from; the questions themselves where there is nothing else, None unread.
        where: the file or repository.
    """

    questions: list[Question]
    examples: list[Question] | None
    where: str


def is_file(name: str) -> bool:
    """Whether a task is named by its file."""
    return "/" in name or name.lower().endswith(SUFFIXES)


def task_of_file(path: Path) -> Task:
    """The task that a file of questions is. Examples come from `NAME.examples.jsonl` beside it, or from itself."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    name = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    from_itself = _beside(path.parent, name) is None
    return Task(name, of_shape, (), split=str(path), example_split=str(path), leaves_out=from_itself)


def metrics_of(questions: list[Question]) -> tuple[str, ...]:
    """What a file's questions can be measured by: its shape tells."""
    if all(len(question.requests()) == 1 for question in questions):
        return ("acc", "perplexity")
    return ("acc_norm", "acc") if all(len(question.contexts) == 1 for question in questions) else ("acc",)


def load(chosen: Chosen, data: Path | None) -> Source:
    """The questions of a task, and where it takes examples what they are drawn from.

    Args:
        data: a directory with files `TASK.jsonl`, which go before the hub's cache.

    Raises:
        Missing: there are none.
        InputError: a file is damaged, or holds something else.
    """
    task = chosen.task
    if task.dataset is None:
        path = Path(task.split)
        questions = _of_file(path, task)
        return Source(questions, _examples(chosen, path.parent, questions), str(path))
    local = None if data is None else _local(data, task.name)
    if local is not None:
        questions = _of_file(local, task)
        return Source(questions, _examples(chosen, local.parent, questions), str(local))
    questions = _of_hub(task, task.split)
    where = f"{task.dataset} (hub cache)"
    if not chosen.shots or task.example_split == task.split:
        return Source(questions, questions if chosen.shots else None, where)
    return Source(questions, _of_hub(task, task.example_split), where)


def _examples(chosen: Chosen, directory: Path, questions: list[Question]) -> list[Question] | None:
    """Beside the questions, or else where the task's own examples are."""
    task = chosen.task
    if not chosen.shots:
        return None
    path = _beside(directory, task.name)
    if path is not None:
        return _of_file(path, task)
    if task.split == task.example_split:
        return questions
    try:
        return _of_hub(task, task.example_split)
    except Missing as reason:
        raise Missing(f"no {task.name}.examples.jsonl is beside the questions, and {reason}") from None


def _beside(directory: Path, name: str) -> Path | None:
    """The file of a task's examples that lies beside its questions, if one does."""
    return next((path for s in SUFFIXES if (path := directory / f"{name}.examples{s}").is_file()), None)


def _local(data: Path, name: str) -> Path | None:
    if not data.is_dir():
        raise InputError(f"{data}: no such directory")
    names = [name + suffix for suffix in SUFFIXES] + (list(HELLASWAG_TEXT) if name == "hellaswag" else [])
    return next((data / each for each in names if (data / each).is_file()), None)


def _of_file(path: Path, task: Task) -> list[Question]:
    if path.name.endswith(HELLASWAG_TEXT):
        return list(_of_text(path))
    read: Callable[[Mapping[str, Any]], Question] = lambda record: (  # noqa: E731
        task.adopt(record) if has_shape(record) else task.read(record)
    )
    return _questions(_records(path), read, f"; a task's records are {SHAPES}, or as on the hub")


def _of_hub(task: Task, split: str) -> list[Question]:
    return _questions(_rows(task, split), task.read, "")


def _questions(
    records: Iterator[tuple[str, Any]], read: Callable[[Mapping[str, Any]], Question], hint: str
) -> list[Question]:
    found = []
    for where, record in records:
        try:
            if isinstance(record, BadRecord):
                raise BadQuestion(str(record))
            if not isinstance(record, dict):
                raise BadQuestion(f"is {data_files.kind_of(record)}, and not an object")
            found.append(read(record))
        except BadQuestion as error:
            raise InputError(f"{where}: {error}{hint}") from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, SyntaxError) as error:
            reason = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{where}: is no record of this task: {reason}; it has {data_files.keys_of(record)}"
            ) from None
    return found


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with where it stands; at least one."""
    empty = True
    if data_files.suffix_of(path, SUFFIXES) == data_files.PARQUET:
        for row, _, value in data_files.parquet(path, _COLUMNS):
            empty = False
            yield f"{path}, row {row + 1}", value
    else:
        for number, value in data_files.values(path):
            empty = False
            yield f"{path}, line {number}", value
    if empty:
        raise InputError(f"{path}: holds no questions")


def _of_text(path: Path) -> Iterator[Question]:
    """HellaSwag as text, six lines a question: context, index of the right ending, four endings."""
    data = reading.content(path, reading.TEXT_BYTES)
    if path.suffix == ".bz2":
        try:
            with bz2.open(io.BytesIO(data)) as unpacked:
                data = unpacked.read(reading.TEXT_BYTES + 1)
        except (OSError, EOFError) as error:
            raise InputError(f"{path}: damaged bzip2: {error}") from None
        if len(data) > reading.TEXT_BYTES:
            raise InputError(f"{path}: more than {reading.TEXT_BYTES >> 20} MB, unpacked")
    lines = reading.decoded(data, str(path)).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for start in range(0, len(lines), 6):
        question = lines[start : start + 6]
        if len(question) < 6 or question[1] not in ("0", "1", "2", "3"):
            raise InputError(f"{path}, line {start + 1}: no context, index and four endings, each on a line")
        context, right, *endings = question
        yield questions.hellaswag_adopted(context, endings, int(right))


def _rows(task: Task, split: str) -> Iterator[tuple[str, Any]]:
    """A split's records from the hub's cache. Raises Missing."""
    files = _split_files(_snapshot(task), task.config, split)
    if not files:
        of = f" of {task.config}" if task.config else ""
        raise Missing(f"{task.dataset}: the cached copy has no {split} split{of}; {_how(task)}")
    whole = max(int(found[1]) if (found := _SHARD.search(file.name)) else 1 for file in files)
    if len(files) < whole:
        raise Missing(f"{task.dataset}: the cached copy has {len(files)} of {whole} files of {split}; {_how(task)}")
    for file in files:
        yield from _records(file)


def _snapshot(task: Task) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    assert task.dataset is not None
    for revision in (None, "refs/convert/parquet"):
        try:
            return Path(snapshot_download(task.dataset, repo_type="dataset", revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            continue
    raise Missing(f"{task.dataset} is not in the hub's cache; {_how(task)}")


def _split_files(snapshot: Path, config: str | None, split: str) -> list[Path]:
    """A split's files: those whose name, or folder, is the split's, under the config's name where there is one.

    Of a repository with several configs the copy may hold others alone: a folder of another's name is not taken.
    """
    plain = {*_FOLDERS_OF_NO_CONFIG, split}
    named: list[tuple[Path, list[str]]] = []
    for path in sorted(snapshot.rglob("*")):
        relative = path.relative_to(snapshot).as_posix()
        if not relative.lower().endswith(SUFFIXES):
            continue
        parts = re.split(r"[/.]", relative)
        if any(part == split or re.split(r"[-_]", part)[0] == split or part.endswith(f"_{split}") for part in parts):
            named.append((path, parts))
    if config is not None:
        of_config = [(path, parts) for path, parts in named if any(config in part for part in parts)]
        named = of_config or [each for each in named if {*each[0].relative_to(snapshot).parts[:-1]} <= plain]
    found = [path for path, _ in named]
    return [path for path in found if path.parent == found[0].parent]


def _how(task: Task) -> str:
    get = f"hf download {task.dataset} --repo-type dataset"
    name = task.name if task.group is None else f"{task.group}_SUBJECT"
    return f"`{get}` fetches it, or --data names a directory with {name}.jsonl"
