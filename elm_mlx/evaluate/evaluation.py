"""One call of `elm-mlx eval`: what is asked for, the model that is asked, and where results go.

Knows paths and choices; `run` does the work.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elm_mlx import device, files, reading
from elm_mlx.errors import ElmError, InputError
from elm_mlx.evaluate import perplexity, scores, task_results, task_sources, tasks, tokens
from elm_mlx.evaluate.score_record import Record
from elm_mlx.evaluate.scores import Score
from elm_mlx.evaluate.scoring import Scorer
from elm_mlx.evaluate.task_results import Outcome, Row, Work
from elm_mlx.evaluate.task_sources import Missing
from elm_mlx.evaluate.tasks import Chosen
from elm_mlx.evaluate.tokens import Encoder
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
        self.published = task_results.published_model(self._loaded.model.config, self._path)
        self.source = task_results.published_source()
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
        return None if self.published is None or suite is None else task_results.published_mean(self.published, suite)

    def run(self, advance: Advance | None = None) -> None:
        """Ask what is not known yet, measure all, write it down; `rows`, `mean`, `missing` and `pace` tell it.

        Raises:
            InputError: no task's data are here, or a file is damaged.
            ElmError: results cannot be written.
        """
        model, tokenizer, wanted = self._loaded.model, self._loaded.tokenizer, self._wanted
        assert tokenizer is not None
        context = model.config.max_context_length
        works, self.missing = prepare(wanted.chosen(), tokenizer, context, wanted.data, wanted.limit)
        window = min(wanted.window or _WINDOW, context)
        stride = wanted.stride or max(1, window // 2)
        works += [prepare_text(path, tokenizer, window, stride) for path in dict.fromkeys(wanted.texts)]
        if not works:
            key, how = next(iter(self.missing.items()))
            raise InputError(f"no task's data are here; of {key}: {how}")
        about: dict[str, Any] = {**self._about, "machine": device.machine(), "version": __version__}
        with Record(self.out, self._identity, about) as record:
            self.pace = score(works, model, record, advance)
            outcomes = measure(works, record)
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

    state = hashlib.sha256()
    for path in paths:
        with reading.opened(path) as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                state.update(block)
    return state.hexdigest()


Advance = Callable[[str, int, int, int], None]  # key, items done of it now, cost done, cost of all


@dataclass(frozen=True)
class Pace:
    """How fast it went: items that were scored now, not found in the record, and their seconds."""

    items: int
    seconds: float


def prepare(
    chosen: Sequence[Chosen], tokenizer: Encoder, context: int, data: Path | None = None, limit: int | None = None
) -> tuple[list[Work], dict[str, str]]:
    """Tasks as items, and for each task or group whose data are not here, how to get them.

    Args:
        context: tokens that the model reads at once.
        limit: take each task's first questions only.

    Raises:
        InputError: a file is damaged, or a question cannot be scored.
    """
    works: list[Work] = []
    missing: dict[str, str] = {}
    for each in chosen:
        try:
            source = task_sources.load(each, data)
        except Missing as reason:
            missing.setdefault(each.key if each.task.group is None else each.task.group, str(reason))
            continue
        questions = source.questions[:limit]
        texts = tasks.before(each, questions, source.examples)
        items = []
        for number, (question, before) in enumerate(zip(questions, texts, strict=True), 1):
            try:
                items.append(tokens.encode(question.requests(before), tokenizer, context))
            except InputError as error:
                raise InputError(f"{source.where}, question {number}: {error}") from None
        task = each.task
        metrics = task.metrics or task_sources.metrics_of(questions)
        works.append(
            Work(each.key, task.name, source.where, metrics, items, each.shots, task.group, questions=questions)
        )
    return works, missing


def prepare_text(path: Path, tokenizer: Encoder, window: int, stride: int) -> Work:
    """A file of text as windows. Raises InputError."""
    text = perplexity.read(path, tokenizer, window, stride)
    key = f"{path.name}, window {window}, stride {stride}"
    items = [[window] for window in text.windows]
    return Work(key, path.name, str(path), ("bits_per_byte", "perplexity"), items, text=text)


def score(works: Sequence[Work], model: Any, record: Record, advance: Advance | None = None) -> Pace:
    """Score what `record` does not hold yet, and put it there.

    Raises:
        ElmError: the record cannot be written, or the model's log-probabilities are no numbers.
    """
    scorer = Scorer(model)
    started = time.perf_counter()
    left = []
    for work in works:
        known = [record.done.get((work.key, number), {}).get("id") for number in range(len(work.items))]
        ids = work.ids
        numbers = [number for number, (old, new) in enumerate(zip(known, ids, strict=True)) if old != new]
        left.append((work, ids, numbers, scorer.plan([work.items[number] for number in numbers])))
    total = sum(batch.cost for *_, planned in left for batch in planned.batches)
    spent = items = 0
    for work, ids, numbers, planned in left:
        for results, cost in scorer.run(planned):
            for result in results:
                number = numbers[result.item]
                if any(map(math.isnan, result.logprobs)):
                    raise ElmError(
                        f"{work.key}, item {number + 1}: the model's log-probabilities are no numbers: its weights are "
                        "damaged, or overflow the type that they are computed in"
                    )
                record.done[work.key, number] = {
                    "task": work.key, "item": number, "id": ids[number], "logprobs": result.logprobs,
                    "greedy": result.greedy,
                }  # fmt: skip
            record.append(record.done[work.key, numbers[result.item]] for result in results)
            spent, items = spent + cost, items + len(results)
            if advance is not None:
                advance(work.key, len(results), spent, total)
    return Pace(items, time.perf_counter() - started)


def measure(works: Sequence[Work], record: Record) -> list[Outcome]:
    """What was scored, as scores. All of it must be in `record`."""
    return [_measure(work, record) for work in works]


def _measure(work: Work, record: Record) -> Outcome:
    lines = [record.done[work.key, number] for number in range(len(work.items))]
    logprobs = [line["logprobs"] for line in lines]
    if work.text is not None:
        sums = [values[0] for values in logprobs]
        found = {
            "bits_per_byte": perplexity.bits_per_byte(work.text, sums),
            "perplexity": perplexity.perplexity(work.text, sums),
        }
        shares = perplexity.shares(work.text, sums)
        return Outcome(work, found, {"bits_per_byte": shares} if shares else {}, logprobs)
    each = [
        scores.of_question(question, line["logprobs"], line["greedy"], work.metrics)
        for question, line in zip(work.questions, lines, strict=True)
    ]
    by_metric = {metric: [one[metric] for one in each] for metric in work.metrics}
    means = {metric: scores.mean(metric, values) for metric, values in by_metric.items()}
    return Outcome(work, means, by_metric, logprobs)
