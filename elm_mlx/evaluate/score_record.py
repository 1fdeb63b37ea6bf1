"""The directory of an evaluation: `run.json` (which model, computed how), `items.jsonl`, `results.json`.

`items.jsonl` has a line for each item that was scored, appended as it comes, so that a crash leaves whole lines and
perhaps a torn last one. An item that is there with the same token ids is not computed again, whichever tasks and limits
are asked for next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from elm_mlx import files, reading
from elm_mlx.errors import InputError

ABOUT, ITEMS, RESULTS = "run.json", "items.jsonl", "results.json"


class ScoreRecord:
    """The directory of an evaluation, open and locked between `with` and its end.

    Attributes:
        done: by task and item, the line of each item that is there: its `id`, `logprobs` and `greedy`.

    Raises:
        InputError: it is the record of another model, or of something computed otherwise.
        ElmError: another process writes to it, or nobody can.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], about: Mapping[str, Any]):
        self._out = out
        self.done: dict[tuple[str, int], Mapping[str, Any]] = {}
        with ExitStack() as held:
            held.enter_context(files.hold(out))
            known = (out / ABOUT).exists()
            if known:
                reading.check_made_with(out, "scores", kept_identity(out), identity, "choose another --out")
            self._file = held.enter_context(files.JsonLinesFile(out / ITEMS))
            self._recall()
            if not known:
                files.write_json(out / ABOUT, {**about, "identity": dict(identity)})
            self._held = held.pop_all()

    def __enter__(self) -> ScoreRecord:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.__exit__(kind, error, at)

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Keeps lines, each with `task`, `item`, `id`, `logprobs` and `greedy`. Raises ElmError."""
        self.done.update({(line["task"], line["item"]): line for line in lines})
        self._file.append(*lines)

    def results(self) -> dict[str, Any] | None:
        """The results of the last run; None where there are none that can be read."""
        try:
            return read_results(self._out)
        except InputError:
            return None

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes `results.json`. Raises ElmError."""
        files.write_json(self._out / RESULTS, results)

    def _recall(self) -> None:
        """Reads the lines that are there, and cuts off a torn last one."""
        whole = 0
        for line in self._file.read(reading.TEXT_BYTES):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                entry = json.loads(line)
                self.done[entry["task"], entry["item"]] = entry
            except (ValueError, KeyError, TypeError):
                continue  # a disk that lost a block: the item is computed again
        self._file.cut(whole)


def read_results(out: Path) -> dict[str, Any]:
    """Reads the results in a directory, or in a file of its own. Raises InputError."""
    path = out / RESULTS if out.is_dir() else out
    if not path.exists():
        raise InputError(f"{path}: no such file; `elm-mlx eval MODEL --out {reading.quoted(out)}` makes it")
    results = reading.json_object(path, reading.TEXT_BYTES)
    if not isinstance(results.get("tasks"), dict):
        raise InputError(f"{path}: not results of `elm-mlx eval`")
    return results


def kept_identity(out: Path) -> dict[str, Any]:
    """Returns what the record in a directory is of; nothing where there is no record yet.

    Raises:
        InputError: its file is damaged, or of something else.
    """
    if not (out / ABOUT).exists():
        return {}
    try:
        known = reading.json_object(out / ABOUT).get("identity")
    except InputError as error:
        raise InputError(f"{error}; choose another --out") from None
    if not isinstance(known, dict):
        raise InputError(f"{out / ABOUT}: was not written by `elm-mlx eval`; choose another --out")
    return known
