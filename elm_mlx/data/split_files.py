"""Splits: the files that a path means, by split and shard, whatever people, mlx-lm and the hub call them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from elm_mlx.data.bad_record import few
from elm_mlx.data.data_files import DOCUMENTS, RECORDS, TEXT, suffix_of
from elm_mlx.errors import InputError
from elm_mlx.reading import expanded

SPLITS = ("train", "valid", "test")
_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "valid")
# A shard's number: `00000-of-00002`, with the hash that the hub's uploads had for years, or just `3`.
_NUMBER = r"(?P<number>\d+)(?:[-_.]of[-_.](?P<count>\d+))?(?:-[0-9a-f]{16})?"
# A split, perhaps with more to it (`train_sft`); and the name of a file in a split's folder.
_STEM = re.compile(rf"(?P<split>{'|'.join(_NAMES)})(?P<variant>(?:[-_.].*?)??)(?:[-_.]{_NUMBER})?", re.IGNORECASE)
_SHARD = re.compile(rf"(?:(?P<variant>.*?)[-_.])?{_NUMBER}", re.IGNORECASE)
# What is written beside data, about them.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "README.md")
_DEPTH = 3  # folders below the directory: data/default/train


@dataclass(frozen=True)
class Name:
    """The split and shard in a file's name.

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
class SplitFiles:
    """The files of one split, in order.

    Attributes:
        missing: a line about shards that are not there.
    """

    paths: list[Path]
    missing: str | None = None


def name_of(path: Path, suffix: str) -> Name | None:
    """Reads the name of a file that ends with `suffix`; None where it names no split."""
    found = _STEM.fullmatch(path.name[: -len(suffix)])
    return None if found is None else _named(_NAMES[found["split"].lower()], found["variant"].lower(), found)


def is_held_out(path: Path, suffix: str) -> bool:
    """Tells whether a file below a directory of raw text is by its or a folder's name of another split than train."""
    if any(_NAMES.get(folder.lower(), "train") != "train" for folder in path.parts[:-1]):
        return True
    name = name_of(path, suffix)
    # A text file may well be called test_of_time.txt, and records are not.
    return name is not None and name.split != "train" and not (suffix in TEXT and name.variant[:1] == "_")


def find(path: str | Path, suffixes: Sequence[str] = RECORDS, split: str | None = None) -> dict[str, SplitFiles]:
    """Finds the files that a path means, by split, `train` first. A file is `train`.

    Of a directory they are its own files and those in folders `train`, `validation` and so on; or, where it has none to
    train on, those of the one folder below it that does, such as the hub's `data`. Where no data file is in it, its
    text files and those below are, each a record, by the folders of splits that they lie in.

    Args:
        split: its files alone, as `train`: by the name that they have, `test` or `train_sft`.

    Raises:
        InputError: there are none to train on, or two that could both be; it names them.
    """
    path = expanded(path)
    if path.is_file():
        suffix_of(path, (*suffixes, *DOCUMENTS))
        return {"train": SplitFiles([path])}
    if not path.is_dir():
        raise InputError(f"{path}: {_absent(path)}")
    below = [path]
    for _ in range(_DEPTH):
        having = [(folder, found) for folder in below if (found := _to_train_on(folder, suffixes, split))]
        if len(having) > 1:
            both = " and ".join(str(folder.relative_to(path)) for folder, _ in having[:2])
            raise InputError(f"{path}: {both} both hold data to train on; pass one of them")
        if having:
            folder, found = having[0]
            return {name: _together(folder, name, found[name]) for name in SPLITS if name in found}
        below = [each for folder in below for each in _entries(folder) if each.is_dir() and os.access(each, os.R_OK)]
    texts = {} if split is not None or any(_below(path, suffixes)) else _texts(path)
    if "train" in texts:
        return texts
    shown = (
        f"{each.name}, {_absent(each)}" if each.is_symlink() and not each.exists() else each.name + "/" * each.is_dir()
        for each in _entries(path)
    )
    there, wanted = few(shown), split or "train"
    plain = [suffix for suffix in suffixes if suffix.count(".") == 1]
    raise InputError(
        f"{path}: holds no {wanted}{f', {wanted}'.join(plain)}; to train on one file alone, pass it"
        + (f" (it holds {there})" if there else "")
    )


def _absent(path: Path) -> str:
    """Says what is at a path where neither a file nor a directory is."""
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which is not there"
    return "neither a file nor a directory" if path.exists() else "no such file or directory"


def _to_train_on(folder: Path, suffixes: Sequence[str], split: str | None) -> dict[str, list[_Found]]:
    """The files of a folder's splits, where there are any to train on: of `split` alone, as `train`."""
    asked = None if split is None else _STEM.fullmatch(split)
    if split is not None and asked is None:  # a name of no split that is known here
        of_it = re.compile(rf"{re.escape(split)}(?:[-_.]{_NUMBER})?", re.IGNORECASE)
        named = ((file, of_it.fullmatch(file.name[: -len(suffix)])) for file, suffix in _data(folder, suffixes))
        files = [_Found(file, _named("train", "", found), folder) for file, found in named if found is not None]
        return {"train": files} if files else {}
    by_split = _by_split(folder, suffixes)
    if asked is not None:
        files = by_split.get(_NAMES[asked["split"].lower()], [])
        by_split = {"train": [each for each in files if each.name.variant == asked["variant"].lower()]}
    return by_split if by_split.get("train") else {}


def _texts(root: Path) -> dict[str, SplitFiles]:
    """The text files below a folder, by split: that of the uppermost folder called like one, or of their own name."""
    found: dict[str, list[Path]] = {}
    for file in _below(root, DOCUMENTS):
        suffix = suffix_of(file, DOCUMENTS)
        folders = (_NAMES.get(folder.lower()) for folder in file.relative_to(root).parts[:-1])
        name = name_of(file, suffix)
        own = name.split if name is not None and not name.variant else "train"
        found.setdefault(next(filter(None, folders), own), []).append(file)
    return {split: SplitFiles(found[split]) for split in SPLITS if split in found}


@dataclass(frozen=True)
class _Found:
    """A file of a split, its name, and the folder that it was found in, or whose name is the split's."""

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
        split = _NAMES.get(folder.name.lower())
        if split is None or not folder.is_dir():
            continue
        for file, suffix in _data(folder, suffixes, deep=True):
            name = name_of(file, suffix)
            if name is None or name.variant:  # train/test-questions.jsonl is of train, and train/test.jsonl is not
                stem = file.name[: -len(suffix)]
                shard = _SHARD.fullmatch(stem)
                name = Name(split, stem) if shard is None else _named(split, shard["variant"] or "", shard)
            found.setdefault(name.split, []).append(_Found(file, name, folder))
    return found


def _named(split: str, variant: str, found: re.Match[str]) -> Name:
    number, count = (None if found[key] is None else int(found[key]) for key in ("number", "count"))
    return Name(split, variant, number, count)


def _together(root: Path, split: str, found: list[_Found]) -> SplitFiles:
    """Those of a split that belong together. Raises InputError where two don't."""
    if any(each.place == root and not each.name.variant for each in found):
        # train.jsonl, where train_old.jsonl lies beside it
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
    return SplitFiles([each.file for each in found], _missing(found))


def _missing(found: Sequence[_Found]) -> str | None:
    """A line about shards that are not there, if any."""
    counts = {each.name.variant: each.name.count for each in found if each.name.count is not None}
    here = {(each.name.variant, each.name.number) for each in found if each.name.count is not None}
    gone = ((name, number) for name, count in counts.items() for number in range(count))
    missing = few(f"{number:05}" for name, number in gone if (name, number) not in here)
    present = f"{len(here):,} of {sum(counts.values()):,} shards are here, {found[0].file.name} first"
    return f"{present}; missing: {missing}" if missing else None


def _data(folder: Path, suffixes: Sequence[str], deep: bool = False) -> Iterator[tuple[Path, str]]:
    """The data files in a folder, `deep` in those below it too, each with its suffix."""
    for entry in _entries(folder):
        if deep and entry.is_dir():
            yield from _data(entry, suffixes)
        elif entry.name.lower().endswith(tuple(suffixes)) and entry.name not in _ABOUT and entry.is_file():
            yield entry, suffix_of(entry, suffixes)


def _below(root: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """The files below a folder, however deep, in order; nothing hidden."""
    for file in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if file.name.lower().endswith(tuple(suffixes)) and file.name not in _ABOUT and not hidden and file.is_file():
            yield file


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder, sorted; nothing hidden, as `.DS_Store` and `._train.jsonl` are."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
