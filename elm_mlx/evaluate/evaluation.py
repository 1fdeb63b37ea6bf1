"""One call of `elm-mlx eval`: what is asked for, the model that is asked, and where results go.

Knows paths and choices; `run` does the work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elm_mlx import device, files, reading
from elm_mlx.errors import InputError
from elm_mlx.evaluate import evaluation_run, published, task_results, task_sources, tasks
from elm_mlx.evaluate.evaluation_run import Advance, Pace
from elm_mlx.evaluate.score_record import Record
from elm_mlx.evaluate.scores import Score
from elm_mlx.evaluate.task_results import Row
from elm_mlx.evaluate.tasks import Chosen
from elm_mlx.store import adapters
from elm_mlx.store.describe import check_directory, fingerprint
from elm_mlx.store.loading import open_model
from elm_mlx.version import __version__

HARNESS = "harness.json"
_WINDOW = 2048  # tokens of text read at once, where the model reads as many


@dataclass(frozen=True)
class Wanted:
    """What to ask.

    Attributes:
        tasks: names, with `@SHOTS` or without, or files; several may stand in one, with commas between.
        suite: one of the paper's; where neither tasks nor texts are named, `zero-shot`.
        texts: files to measure in bits a byte, in windows of `window` tokens that each score `stride` more.
        shots: for every task, but those that say how many themselves.
    """

    tasks: list[str] = field(default_factory=list)
    suite: str | None = None
    texts: list[Path] = field(default_factory=list)
    data: Path | None = None
    shots: int | None = None
    limit: int | None = None
    window: int | None = None
    stride: int | None = None

    def names(self) -> list[str]:
        return [name.strip() for each in self.tasks for name in each.split(",") if name.strip()]

    def suite_name(self) -> str | None:
        return self.suite or (None if self.tasks or self.texts else "zero-shot")

    def chosen(self) -> list[Chosen]:
        """The tasks, each once. Raises InputError for what is none, or where two would have one name."""
        suite = self.suite_name()
        if suite is None and not self.names() and not self.texts:
            raise InputError("--tasks names no task")
        found = [] if suite is None else tasks.suite(suite)
        if self.shots is not None:
            found = [Chosen(each.task, self.shots if each.task.shots is None else each.task.shots) for each in found]
        for name in self.names():
            found += _named(name, self.shots)
        _check_names((each.key, each.key if each.task.dataset else each.task.split) for each in found)
        _check_names((text.name, str(text)) for text in self.texts)
        return list({each.key: each for each in found}.values())


class Evaluation:
    """A model, loaded, and what it is to be asked.

    Args:
        out: where results go; by default `evals/NAME`, the model directory's name, with an adapter's `NAME+ADAPTER`.

    Raises:
        InputError: the model, a task or its data cannot be read.
    """

    def __init__(
        self,
        path: Path,
        wanted: Wanted,
        out: Path | None = None,
        *,
        adapter: Path | None = None,
        compute_dtype: str | None = None,
    ):
        self._wanted = wanted
        self._path = check_directory(path, with_tokenizer=True)
        self._loaded = open_model(self._path, compute_dtype, adapter)
        self.notes = self._loaded.notes
        names = [each.name or each.resolve().name for each in (self._path, adapter) if each is not None]
        self.out = out if out is not None else Path("evals", "+".join(names))
        self.missing: dict[str, str] = {}
        self.rows: list[Row] = []
        self.mean: Score | None = None
        self.pace = Pace(0, 0.0)
        self.results: dict[str, Any] = {}
        self.published = published.name_of(self._loaded.model.config, self._path)
        self.source = published.source()
        self._identity = {
            "model": fingerprint(self._path),
            "config.json": _digest(self._path / "config.json"),
            "adapter": None if adapter is None else _digest(adapters.weights_file(adapter), adapter / adapters.CONFIG),
            "computed in": _computed_in(self._loaded.model),
        }
        self._about = {"model": str(path), "adapter": None if adapter is None else str(adapter)}

    @property
    def published_mean(self) -> float | None:
        suite = self._wanted.suite_name()
        return None if self.published is None or suite is None else published.mean(self.published, suite)

    def run(self, advance: Advance | None = None) -> None:
        """Ask what is not known yet, measure all, write it down; `rows`, `mean`, `missing` and `pace` tell it.

        Raises:
            InputError: no task's data are here, or a file is damaged.
            ElmError: results cannot be written.
        """
        model, tokenizer, wanted = self._loaded.model, self._loaded.tokenizer, self._wanted
        assert tokenizer is not None
        context = model.config.max_context_length
        works, self.missing = evaluation_run.prepare(wanted.chosen(), tokenizer, context, wanted.data, wanted.limit)
        window = min(wanted.window or _WINDOW, context)
        stride = wanted.stride or max(1, window // 2)
        works += [evaluation_run.prepare_text(path, tokenizer, window, stride) for path in dict.fromkeys(wanted.texts)]
        if not works:
            key, how = next(iter(self.missing.items()))
            raise InputError(f"no task's data are here; of {key}: {how}")
        about: dict[str, Any] = {**self._about, "machine": device.machine(), "version": __version__}
        with Record(self.out, self._identity, about) as record:
            self.pace = evaluation_run.score(works, model, record, advance)
            outcomes = evaluation_run.measure(works, record)
            self.rows = task_results.rows(outcomes, self.published)
            suite = wanted.suite_name()
            self.mean = None if suite is None or self.missing else task_results.mean_of_suite(self.rows, suite)
            about |= {"identity": self._identity, "suite": suite, "limit": wanted.limit, "pace": asdict(self.pace)}
            about["mean"] = None if self.mean is None else asdict(self.mean)
            now = task_results.to_dict(outcomes, self.rows, self.missing, about)
            self.results = task_results.merged(record.results(), now)
            record.write_results(self.results)

    def hand_over(self, advance: Callable[[int, int], None] | None = None) -> str:
        """Have lm_eval ask its tasks; its table. `--data` is where it finds tasks of the user's, in YAML.

        Raises:
            ElmError: lm_eval is not installed, or results cannot be written.
            InputError: it has no such task.
        """
        from elm_mlx.evaluate import harness

        names = self._wanted.names()
        if not names or self._wanted.suite or self._wanted.texts:
            raise InputError("--harness asks tasks of lm_eval: name them by --tasks, and neither --suite nor --text")
        found, table = harness.run(
            self._loaded.model, self._loaded.tokenizer, names, shots=self._wanted.shots, limit=self._wanted.limit,
            tasks_from=self._wanted.data, advance=advance,
        )  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        files.write_text(self.out / HARNESS, json.dumps(found, indent=1, default=str) + "\n")
        return table


def _check_names(named: Iterable[tuple[str, str]]) -> None:
    """Whether each name that results are kept by stands for one thing. Raises InputError."""
    known: dict[str, str] = {}
    for name, what in named:
        first = known.setdefault(name, what)
        if first != what:
            raise InputError(f"{first} and {what}: results are kept by name, and both are {name}; rename a file")


def _named(name: str, shots: int | None) -> list[Chosen]:
    if task_sources.is_file(name):
        return [Chosen(task_sources.task_of_file(files.expanded(name)), shots or 0)]
    bare, at, own = name.partition("@")
    if at:
        if not own.isdecimal():
            raise InputError(f"--tasks {name}: after @ stands the number of examples")
        shots = int(own)
    return tasks.named(bare, shots)


def _computed_in(model: Any) -> str:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    types = {str(weight.dtype).removeprefix("mlx.core.") for _, weight in tree_flatten(model.parameters())}
    return f"{'/'.join(sorted(types))} on {str(mx.default_device().type).removeprefix('DeviceType.')}"


def _digest(*paths: Path) -> str:
    import hashlib

    state = hashlib.sha256()
    for path in paths:
        with reading.opened(path) as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                state.update(block)
    return state.hexdigest()
