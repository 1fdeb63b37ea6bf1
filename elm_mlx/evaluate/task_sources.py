"""The sources of a task's questions: a file of the user's, a directory of such files, or the hub's cache.

Nothing is downloaded: what is missing is named, with the command that gets it.
"""

from __future__ import annotations

import bz2
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elm_mlx import reading
from elm_mlx.data import data_files
from elm_mlx.data.bad_record import BadRecord, keys_of, kind_of
from elm_mlx.data.data_files import RECORDS as SUFFIXES
from elm_mlx.data.messages import unpacked
from elm_mlx.errors import InputError
from elm_mlx.evaluate.questions import SHAPES, Question, has_shape, hellaswag_adopted, of_shape
from elm_mlx.evaluate.tasks import Chosen, Task

HELLASWAG_TEXT = ("hellaswag_val_full.txt.bz2", "hellaswag_val_full.txt")

# The keys of the hub's records that are read.
_COLUMNS = (
    "activity_label", "answer", "answerKey", "article", "choice1", "choice2", "choices", "correct_answer", "ctx_a",
    "ctx_b", "distractor1", "distractor2", "distractor3", "endings", "goal", "label", "mc2_targets", "option1",
    "option2", "passage", "premise", "problems", "question", "sent_less", "sent_more", "sentence", "sol1", "sol2",
    "support", "text",
)  # fmt: skip
_SHARD = re.compile(r"-\d{5}-of-(\d{5})")
_FOLDERS_OF_NO_CONFIG = ("data", "default")


class Missing(Exception):
    """A task's data are not here; the text says how to get them."""


@dataclass(frozen=True)
class TaskSource:
    """The questions of a task, all of them, in order.

    Attributes:
        examples: the pool of few-shot examples; None where none are wanted.
        where: the file or repository.
    """

    questions: list[Question]
    examples: list[Question] | None
    where: str


def is_file(name: str) -> bool:
    """Tells a task that is named by its file from one of `tasks`."""
    return "/" in name or name.lower().endswith(SUFFIXES)


def task_of_file(path: Path) -> Task:
    """The task that a file of questions is. Examples come from `NAME.examples.jsonl` beside it, or from itself."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    name = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    from_itself = _first_file(path.parent, f"{name}.examples") is None
    return Task(name, of_shape, (), split=str(path), example_split=str(path), leaves_out=from_itself)


def metrics_of(questions: Sequence[Question]) -> tuple[str, ...]:
    """The metrics that a file's questions can be measured by, which depend on their shape."""
    if all(len(question.requests()) == 1 for question in questions):
        return ("acc", "perplexity")
    return ("acc_norm", "acc") if all(len(question.contexts) == 1 for question in questions) else ("acc",)


def load(chosen: Chosen, data: Path | None) -> TaskSource:
    """Reads the questions of a task, and the pool of its few-shot examples.

    Args:
        data: a directory with files `TASK.jsonl`, which go before the hub's cache.

    Raises:
        Missing: there are none.
        InputError: a file is damaged, or holds something else.
    """
    task = chosen.task
    if task.dataset is not None and data is not None and not data.is_dir():
        raise InputError(f"{data}: no such directory")
    if task.dataset is None:
        path: Path | None = Path(task.split)
    else:
        others = HELLASWAG_TEXT if task.name == "hellaswag" else ()
        path = None if data is None else _first_file(data, task.name, others)
    questions = _of_hub(task, task.split) if path is None else _of_file(path, task)
    where = f"{task.dataset} (hub cache)" if path is None else str(path)
    if not chosen.shots:
        return TaskSource(questions, None, where)
    beside = None if path is None else _first_file(path.parent, f"{task.name}.examples")
    if beside is not None:
        return TaskSource(questions, _of_file(beside, task), where)
    if task.example_split == task.split:
        return TaskSource(questions, questions, where)
    try:
        return TaskSource(questions, _of_hub(task, task.example_split), where)
    except Missing as reason:
        if path is None:
            raise
        raise Missing(f"no {task.name}.examples.jsonl is beside the questions, and {reason}") from None


def _first_file(directory: Path, name: str, others: Sequence[str] = ()) -> Path | None:
    names = (*(name + suffix for suffix in SUFFIXES), *others)
    return next((directory / each for each in names if (directory / each).is_file()), None)


def _of_file(path: Path, task: Task) -> list[Question]:
    if path.name.endswith(HELLASWAG_TEXT):
        return list(_of_text(path))

    def read(record: Mapping[str, Any]) -> Question:
        return task.adopt(record) if has_shape(record) else task.read(record)

    return _questions([path], read, f"; a task's records are {SHAPES}, or as on the hub")


def _questions(paths: Sequence[Path], read: Callable[[Mapping[str, Any]], Question], hint: str = "") -> list[Question]:
    found, tables = [], all(path.name.lower().endswith(data_files.CSV) for path in paths)
    for where, record in data_files.read_all(paths, _COLUMNS):
        try:
            if isinstance(record, BadRecord):
                raise record
            if not isinstance(record, dict):
                raise BadRecord(f"is {kind_of(record)}, not an object")
            found.append(read(_of_texts(record) if tables else record))
        except BadRecord as error:
            raise InputError(f"{where}: {error}{hint}") from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, SyntaxError) as error:
            reason = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
            keys = keys_of(record)
            raise InputError(f"{where}: is not a record of this task: {reason}; it has {keys}") from None
    return found


def _of_texts(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record whose values are texts, as a table has them: of choices the JSON of a list, and the number of one."""
    made = {key: unpacked(value) if key in ("choices", "context_options") else value for key, value in record.items()}
    gold = made.get("gold")
    return made | ({"gold": int(gold)} if isinstance(gold, str) and re.fullmatch("[0-9]{1,9}", gold) else {})


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
            raise InputError(f"{path}: more than {reading.limit_size(reading.TEXT_BYTES)}, unpacked")
    lines = reading.decoded(data, str(path)).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for start in range(0, len(lines), 6):
        question = lines[start : start + 6]
        if len(question) < 6 or question[1] not in ("0", "1", "2", "3"):
            raise InputError(f"{path}, line {start + 1}: needs a context, an index and four endings, each on a line")
        context, right, *endings = question
        yield hellaswag_adopted(context, endings, int(right))


def _of_hub(task: Task, split: str) -> list[Question]:
    """A split's questions from the hub's cache. Raises Missing."""
    name = task.name if task.group is None else f"{task.group}_SUBJECT"
    get = f"hf download {task.dataset} --repo-type dataset"
    how = f"`{get}` fetches it, or --data names a directory with {name}.jsonl"
    snapshot = _snapshot(task)
    if snapshot is None:
        raise Missing(f"{task.dataset} is not in the hub's cache; {how}")
    files = _split_files(snapshot, task.config, split)
    if not files:
        of = f" of {task.config}" if task.config else ""
        raise Missing(f"{task.dataset}: the cached copy has no {split} split{of}; {how}")
    whole = max(int(found[1]) if (found := _SHARD.search(file.name)) else 1 for file in files)
    if len(files) < whole:
        raise Missing(f"{task.dataset}: the cached copy has {len(files)} of {whole} files of {split}; {how}")
    return _questions(files, task.read)


def _snapshot(task: Task) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    assert task.dataset is not None
    for revision in (None, "refs/convert/parquet"):
        try:
            return Path(snapshot_download(task.dataset, repo_type="dataset", revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            continue
    return None


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
