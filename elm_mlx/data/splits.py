"""What the names of data files say: of which split each is, and which of its shards; and a directory's files by split.

Knows the names that people, mlx-lm and the Hugging Face hub write. Opens no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

from elm_mlx.data import file_formats
from elm_mlx.errors import InputError

SPLITS = ("train", "valid", "test")
_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "valid")
# A split, perhaps with more to it (`train_sft`), and a shard's number: `-00000-of-00002`, with the hash that the hub's
# uploads had for years, or just `_3`.
_STEM = re.compile(
    rf"(?P<split>{'|'.join(_NAMES)})(?P<variant>(?:[-_.].*?)??)"
    r"(?:[-_.](?P<number>\d+)(?:[-_.]of[-_.](?P<count>\d+))?(?:-[0-9a-f]{16})?)?",
    re.IGNORECASE,
)
_SHARD = re.compile(
    r"(?:(?P<variant>.*?)[-_.])?(?P<number>\d+)(?:[-_.]of[-_.](?P<count>\d+))?(?:-[0-9a-f]{16})?", re.IGNORECASE
)
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # written beside data
_DEPTH = 3  # folders below the directory: data/default/train
_LISTED = 5  # files, where what is needed is not there


@dataclass(frozen=True)
class Name:
    """What a file's name says.

    Attributes:
        split: one of SPLITS.
        variant: what else it is called, `_sft`; mostly empty.
        number, count: of a shard: which it is, and of how many.
    """

    split: str
    variant: str = ""
    number: int | None = None
    count: int | None = None


@dataclass(frozen=True)
class Files:
    """The files of one split, in order.

    Attributes:
        missing: what is told where shards of it are not there.
    """

    paths: list[Path]
    missing: str | None = None


def name_of(path: Path, suffix: str) -> Name | None:
    """What the name of a file that ends with `suffix` says; None where it names no split."""
    found = _STEM.fullmatch(path.name[: -len(suffix)])
    if found is None:
        return None
    return Name(_NAMES[found["split"].lower()], found["variant"].lower(), *_numbers(found))


def is_held_out(path: Path, suffix: str) -> bool:
    """Whether a file, relative to a directory of raw text, is by its name or a folder's of another split than train."""
    if any(folder_split(folder) not in (None, "train") for folder in path.parts[:-1]):
        return True
    name = name_of(path, suffix)
    # A text file may well be called test_of_time.txt, and records are not.
    return name is not None and name.split != "train" and not (suffix in file_formats.TEXT and name.variant[:1] == "_")


def folder_split(name: str) -> str | None:
    """The split whose files a folder of that name holds, if it is one's."""
    return _NAMES.get(name.lower())


def find(directory: Path, suffixes: Sequence[str]) -> dict[str, Files]:
    """The splits in a directory, `train` first: its own files and those in folders `train`, `validation` and so on;
    or, where it has none to train on, those of the one folder below it that does, such as the hub's `data`.

    Raises:
        InputError: there are none to train on, or two of which nobody can say which is meant; it names them.
    """
    below = [directory]
    for _ in range(_DEPTH):
        having = [(folder, found) for folder in below if "train" in (found := _by_split(folder, suffixes))]
        if len(having) > 1:
            both = " and ".join(str(folder.relative_to(directory)) for folder, _ in having[:2])
            raise InputError(f"{directory}: {both} both hold data to train on; pass one of them")
        if having:
            folder, found = having[0]
            return {split: _files(folder, split, found[split]) for split in SPLITS if split in found}
        below = [each for folder in below for each in _entries(folder) if each.is_dir() and os.access(each, os.R_OK)]
    there = [each.name for each in _entries(directory)]
    listed = ", ".join(there[:_LISTED]) + (", …" if len(there) > _LISTED else "")
    raise InputError(
        f"{directory}: holds no train{', train'.join(suffixes)}; to train on one file alone, pass it"
        + (f" (it holds {listed})" if there else "")
    )


@dataclass(frozen=True)
class _Found:
    """A file of a split, what its name says, and the folder that it was found in, or whose name is the split's."""

    file: Path
    name: Name
    place: Path


def _by_split(root: Path, suffixes: Sequence[str]) -> dict[str, list[_Found]]:
    """The data files in a folder, and in the folders of splits in it."""
    found: dict[str, list[_Found]] = {}
    for file, suffix in _data(root, suffixes):
        if name := name_of(file, suffix):
            found.setdefault(name.split, []).append(_Found(file, name, root))
    for folder in _entries(root):
        split = folder_split(folder.name)
        if split is not None and folder.is_dir():
            for file, suffix in _data(folder, suffixes, deep=True):
                name = name_of(file, suffix)
                if name is None or name.variant:  # train/test-questions.jsonl is of train, and train/test.jsonl is not
                    name = _name_in(split, file.name[: -len(suffix)])
                found.setdefault(name.split, []).append(_Found(file, name, folder))
    return found


def _name_in(split: str, stem: str) -> Name:
    """What the name of a file in a split's folder says: `part-00003`, or anything."""
    found = _SHARD.fullmatch(stem)
    return Name(split, stem) if found is None else Name(split, found["variant"] or "", *_numbers(found))


def _files(root: Path, split: str, found: list[_Found]) -> Files:
    """Those of a split that belong together. Raises InputError where two don't."""
    if any(each.place == root and not each.name.variant for each in found):
        # train.jsonl is meant where train_old.jsonl lies beside it
        found = [each for each in found if each.place != root or not each.name.variant]
    found = sorted(found, key=lambda each: (each.name.variant, each.name.number or 0, each.file))
    for one, other in pairwise(found):
        shards = one.name.count == other.name.count and one.name.number != other.name.number
        if one.name.variant != other.name.variant:
            together = one.place != root  # in a split's folder all are of it
        else:
            together = shards and (one.place != root or one.name.number is not None)
        if not together or one.place != other.place:
            both = " and ".join(str(each.file.relative_to(root)) for each in (one, other))
            raise InputError(f"{root}: {both} are of the same split, {split}; keep one, or pass a file")
    return Files([each.file for each in found], _missing(found))


def _missing(found: Sequence[_Found]) -> str | None:
    """What is told of shards that are not there."""
    counts = {each.name.variant: each.name.count for each in found if each.name.count is not None}
    here = {(each.name.variant, each.name.number) for each in found if each.name.count is not None}
    gone = ((name, number) for name, count in counts.items() for number in range(count))
    listed = [f"{number:05}" for name, number in islice((each for each in gone if each not in here), _LISTED + 1)]
    if not listed:
        return None
    shown = ", ".join([*listed[:_LISTED], *(["…"] if len(listed) > _LISTED else [])])
    return f"{len(here):,} of {sum(counts.values()):,} shards are here, {found[0].file.name} first; missing: {shown}"


def _data(folder: Path, suffixes: Sequence[str], deep: bool = False) -> Iterator[tuple[Path, str]]:
    """The data files in a folder, `deep` in those below it too, each with the suffix that tells."""
    for entry in _entries(folder):
        if deep and entry.is_dir():
            yield from _data(entry, suffixes)
        elif entry.name.lower().endswith(tuple(suffixes)) and entry.name not in _ABOUT and entry.is_file():
            yield entry, file_formats.suffix_of(entry, suffixes)


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing hidden, as `.DS_Store` and `._train.jsonl` are."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None


def _numbers(found: re.Match[str]) -> tuple[int | None, int | None]:
    number, count = (None if found[name] is None else int(found[name]) for name in ("number", "count"))
    return number, count
