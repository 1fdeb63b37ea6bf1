"""A directory made of another: what may be replaced, and what comes along; and what a path is that is no model.

Knows the names of files in a model directory, an adapter's and an export's, and what systems and downloads leave
beside them. Knows nothing of weights.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.reading import json_object, listed

CARRIED = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
# Folders of further chat templates, `NAME.jinja`, as transformers writes them beside the default one.
TEMPLATES = ("additional_chat_templates", "chat_templates")
_WHERE_FROM = (
    "`elm-mlx convert SRC DST` makes one of a checkpoint, and OWNER/NAME is a repository on the Hugging Face hub"
)
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # of an adapter, the first that is there


@dataclass(frozen=True)
class Kind:
    """A kind of directory, and so what `--overwrite` may replace.

    Attributes:
        name: for messages.
        mark: the file that makes a directory one.
        names: what else it may hold, as patterns.
    """

    name: str
    mark: str
    names: tuple[str, ...]


MODEL = Kind(
    "a model directory", "config.json",
    (
        *CARRIED, "conversion.json", "quantization.json", "README.md", "model*.safetensors",
        "model.safetensors.index.json",
    ),
)  # fmt: skip
ADAPTER = Kind(
    "an adapter", "adapter_config.json",
    ("adapters.safetensors", *PEFT_WEIGHTS, "chat_template.jinja", "README.md"),
)  # fmt: skip
EXPORT = Kind(
    "an export", "checkpoint.pt", ("config.yaml", "tokenizer.model", "chat_template.jinja", "generation_config.json")
)

PNG_METADATA, PNG_MARK = {"Software": "elm-mlx"}, b"Software\0elm-mlx"  # of pictures that may replace one another
PREDICTION = "kvp.json"  # in the directory of a KV Prediction

# In the directory of a training run: what the run is, and in each of its checkpoints the weights.
RUN_RECORD, PARAMETERS = "run.json", "parameters.safetensors"
_ADAPTER_RUNS = ("lora", "dpo", "grpo")  # commands whose runs leave no model of their own

# What systems and downloads put into any directory; nobody misses it.
_LITTER = (
    ".DS_Store", "._*", ".localized", "[Tt]humbs.db", "[Dd]esktop.ini", ".directory", ".gitattributes",
    "Icon\r",  # a folder's own icon on a Mac
)  # fmt: skip

# What `hf download --local-dir` keeps in `.cache`; the hub's own cache may lie there too, and is somebody's.
_DOWNLOADED = {"huggingface", *(f"huggingface/{name}" for name in ("download", ".gitignore", "CACHEDIR.TAG"))}


def check_destination(target: Path, kind: Kind, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Refuses to replace what is not plainly of that kind alone, or what one of `sources` lies in.

    Of a `target` that is a link, what it leads to would be replaced. Links in it are files like others: what they
    lead to stays.

    Raises:
        InputError: says which, and by name what is in the way.
    """
    try:
        if not target.exists():
            return
        if not target.is_dir():
            raise InputError(f"{target}: is a file, and a directory is to be written")
        if not overwrite:
            raise InputError(f"{target}: exists already; pass --overwrite to replace it, or choose another")
        foreign = _foreign(target, kind)
    except OSError as error:
        raise InputError(f"{target}: cannot be read: {error.strerror}") from None
    if foreign:
        raise InputError(f"{target}: is not just {kind.name}: it holds {listed(foreign)}; nothing was replaced")
    for source in sources:
        if _lies_in(source, target):
            raise InputError(f"{target}: holds the source, {source.name}, which is to be read: choose another")


def check_file(target: Path, overwrite: bool | None, mark: bytes | None = None) -> None:
    """Refuses to replace a file that is not plainly of the kind that is to be written.

    Args:
        overwrite: None where a command has no such option.
        mark: what has this in its first kilobyte is of the kind that is to be written, and needs no `overwrite`.

    Raises:
        InputError: says what is in the way.
    """
    if target.is_dir():
        raise InputError(f"{target}: is a directory, and a file is to be written")
    if target.exists() and not target.is_file():
        raise InputError(f"{target}: is not a regular file, and one is to be written")
    if target.exists() and not overwrite and not (mark and _is_marked(target, mark)):
        how = "" if overwrite is None else "pass --overwrite to replace it, or "
        raise InputError(f"{target}: exists already; {how}choose another")


def carry(source: Path, directory: Path) -> None:
    """Copies tokenizer, chat templates and settings.

    Raises:
        InputError: one is a link out of the model's directory.
        OSError: one cannot be copied.
    """
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(own_file(source / name), directory / name)
    carry_templates(source, directory)


def carry_templates(source: Path, directory: Path, default: bool = True) -> bool:
    """Copies the folders of further chat templates, and says whether there were any. Raises as `carry`.

    `default`: the default one too, where it stands there.
    """
    found = sorted(path for name in TEMPLATES for path in (source / name).glob("*.jinja") if path.is_file())
    found = [path for path in found if default or path.stem != "default"]
    for path in found:
        (directory / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(own_file(path), directory / path.parent.name / path.name)
    return bool(found)


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a training run, oldest first."""
    return sorted(path for path in run.glob("checkpoints/step-????????") if path.name[5:].isdigit())


def own_file(path: Path) -> Path:
    """`path`, a file of a model directory, if what it leads to belongs to the model too.

    The hub's cache is made of links: `models--X--Y/snapshots/REVISION/config.json` leads to `models--X--Y/blobs/…`. A
    link to anywhere else would put whatever lies there into a directory that may be handed on.

    Raises:
        InputError: it is a link out of the model's directory, and of the hub's folder for it.
    """
    inner = path.parent.name in TEMPLATES  # a folder that may be a link, too
    folder = Path(os.path.realpath(path.parent.parent if inner else path.parent))
    for parent in (folder, *folder.parents):
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            folder = parent.parent
    real = Path(os.path.realpath(path))
    if folder not in real.parents:
        raise InputError(f"{path}: is a link to {real}, outside of the model's directory: put the file itself there")
    return path


def not_a_model(path: Path) -> InputError:
    """Returns the error for a path without `config.json`: what it is, and what to do."""
    if not path.exists():
        near = nearest(path)
        return InputError(f"{path}: no such directory; " + (f"did you mean {near}?" if near else _WHERE_FROM))
    if path.is_dir():
        return InputError(f"{path}: {_no_model(path)}")
    if path.suffix == ".safetensors" and (path.parent / "config.json").exists():
        return InputError(f"{path}: a file of the model directory {path.parent}: give that one")
    return InputError(
        f"{path}: a file, not a model directory; `elm-mlx convert {path} DST` makes one of an OpenELM's checkpoint or "
        "of a GGUF file"
    )


def no_tokenizer(path: Path, openelm: bool) -> InputError:
    """Returns the error for a model directory without the tokenizer that is needed."""
    name, again = "tokenizer.json", ""
    if openelm:
        name, again = "tokenizer.model", ", or convert that again with --tokenizer"
    return InputError(
        f"{path}: holds no {name}, so it reads and writes no text: copy the one of the model that it was made from "
        f"into it{again}"
    )


def nearest(path: Path) -> Path | None:
    """The model directory beside `path` whose name is most like its."""
    import difflib

    try:
        names = [entry.name for entry in path.parent.iterdir() if (entry / "config.json").exists()]
    except OSError:
        return None
    found = difflib.get_close_matches(path.name, names, 1, 0.75)
    return path.with_name(found[0]) if found else None


def _no_model(path: Path) -> str:
    """Returns a hint: what a directory without `config.json` seems to be, and what to do with it."""
    if (path / PARAMETERS).is_file():
        return f"a checkpoint of a training run, not a model directory{_of_checkpoint(path)}"
    adapter, run = (_object_in(path / name) for name in ("adapter_config.json", RUN_RECORD))
    settings = run.get("settings") if run else None
    model = settings.get("model") if isinstance(settings, dict) else None
    if adapter is None and run is not None and run.get("command") in _ADAPTER_RUNS:
        command = f"elm-mlx {run['command']} --out {path} --resume"
        return f"a training run that has left no adapter yet, and no model; `{command}` goes on with it"
    prediction = _object_in(path / PREDICTION)
    if prediction is not None:
        base = prediction.get("base")
        name = base.get("name") if isinstance(base, dict) else None
        named = f"its model, {name}," if isinstance(name, str) else "its model"
        return f"a KV Prediction, not a model directory by itself: give {named} and `--kvp {path}`"
    if adapter is None:
        found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in (".pt", ".pth", ".gguf"))
        hint = f"; `elm-mlx convert {found[0]} DST` makes one" if found else ""
        return f"holds no config.json, so it is not a model directory{hint}"
    if "peft_type" in adapter:
        base = adapter.get("base_model_name_or_path")
        named = f"its model ({base})" if isinstance(base, str) and base else "its model"
        return f"an adapter of PEFT, not a model directory by itself: give {named} and `--adapter {path}`"
    full = adapter.get("fine_tune_type") == "full"
    what = "the trained weights of a model, kept as an adapter" if full else "an adapter"
    model = model or adapter.get("model")  # mlx-lm's says it there
    named = model if isinstance(model, str) else "MODEL"
    return (
        f"{what}, not a model directory by itself: give {named} and `--adapter {path}`, "
        f"or make one of both by `elm-mlx fuse {named} {path} DST`"
    )


def _of_checkpoint(path: Path) -> str:
    """Returns what to do with a training run's checkpoint, `RUN/checkpoints/step-…`."""
    run = path.absolute().parent.parent
    command = (_object_in(run / RUN_RECORD) or {}).get("command")
    if command == "pretrain":
        return f"; `elm-mlx average {path} --out DIR` makes one of it"
    return f"; `elm-mlx {command} --out {run} --resume` goes on with the run" if command in _ADAPTER_RUNS else ""


def _object_in(path: Path) -> dict[str, Any] | None:
    try:
        return json_object(path)
    except InputError:
        return None


def _foreign(directory: Path, kind: Kind) -> list[str]:
    """The names of what is neither of a directory of that kind nor litter; of all, where its mark is missing."""
    entries = sorted(entry for entry in directory.iterdir() if not _is_litter(entry))
    known = (kind.mark, *kind.names)
    found = [
        entry.name
        for entry in entries
        if not (entry.is_file() and any(fnmatchcase(entry.name, name) for name in known))
        and not (kind is MODEL and _has_templates_alone(entry))
    ]
    marked = any(entry.name == kind.mark for entry in entries)
    return found if found or marked else [entry.name for entry in entries]


def _has_templates_alone(entry: Path) -> bool:
    return entry.name in TEMPLATES and entry.is_dir() and all(each.suffix == ".jinja" for each in entry.iterdir())


def _is_litter(entry: Path) -> bool:
    if entry.is_dir() and not entry.is_symlink():
        inner = [each.relative_to(entry).as_posix() for each in (*entry.glob("*"), *entry.glob("huggingface/*"))]
        return entry.name == ".cache" and {*inner} <= _DOWNLOADED
    return any(fnmatchcase(entry.name, name) for name in _LITTER)


def _is_marked(path: Path, mark: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return mark in file.read(1024)
    except OSError:
        return False


def _lies_in(source: Path, target: Path) -> bool:
    """Returns whether `source`, or the target of its link, is `target` or lies in it."""
    real = Path(os.path.realpath(target))  # unlike resolve(), no exception for a loop of links
    named = Path(os.path.realpath(source.absolute().parent), source.name)
    return any(real in (place, *place.parents) for place in (named, Path(os.path.realpath(source))))
