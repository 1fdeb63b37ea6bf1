"""The evaluation of a model: read tasks and texts, score what is not scored yet, measure, write results.

A run that was interrupted goes on from the log-probabilities that it has kept: see `score_record`.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from elm_mlx import device, files, reading
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.data import split_files
from elm_mlx.data.columns import parsed
from elm_mlx.data.hub_data import PREFIX
from elm_mlx.errors import ElmError, InputError
from elm_mlx.evaluate import scores, task_sources, tasks, tokens
from elm_mlx.evaluate.questions import Question
from elm_mlx.evaluate.score_record import ScoreRecord, kept_identity
from elm_mlx.evaluate.scores import Score, ScoreRow, TaskResult
from elm_mlx.evaluate.scoring import Scorer
from elm_mlx.evaluate.task_sources import Missing
from elm_mlx.evaluate.tasks import Chosen
from elm_mlx.evaluate.tokens import Scored, TextWindows
from elm_mlx.model.cache import check_caches
from elm_mlx.model.config import read_config
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.model.stored_layers import StoredLayer
from elm_mlx.safetensors_file import fingerprint
from elm_mlx.store import adapters, kvp_directory
from elm_mlx.store.loading import open_model
from elm_mlx.store.model_names import name_of
from elm_mlx.text.chat_template import Template, choose
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx.version import __version__

HARNESS = "harness.json"
_WINDOW = 2048  # tokens of text read at once, where the model reads as many


@dataclass(frozen=True)
class EvaluationRequest:
    """The tasks and texts to evaluate a model on. Raises InputError where `columns` are none.

    Attributes:
        tasks: names, with `@SHOTS` or without, or files; several may stand in one, with commas between.
        suite: one of the paper's; `zero-shot` where neither tasks nor texts are named.
        texts: data sets to measure in bits per byte, in windows of `window` tokens that each score `stride` more.
        columns, template, skip_bad: how they are read, as `lora` reads them.
        data: a directory of files TASK.jsonl.
        shots: few-shot examples, of every task that does not set their number itself.
        limit: take each task's first questions only.
    """

    tasks: list[str] = field(default_factory=list)
    suite: str | None = None
    texts: list[str | Path] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    template: str | None = None
    skip_bad: bool = False
    data: Path | None = None
    shots: int | None = None
    limit: int | None = None
    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        parsed(self.columns)

    def names(self) -> list[str]:
        return [name.strip() for each in self.tasks for name in each.split(",") if name.strip()]

    def suite_name(self) -> str | None:
        return self.suite or (None if self.tasks or self.texts else "zero-shot")

    def chosen(self) -> list[Chosen]:
        """The tasks, each once. Raises InputError for an unknown one, or where two would have one name."""
        suite = self.suite_name()
        if suite is None and not self.names() and not self.texts:
            raise InputError("--tasks names no task")
        found = [] if suite is None else tasks.suite(suite)
        if self.shots is not None:
            found = [Chosen(each.task, self.shots if each.task.shots is None else each.task.shots) for each in found]
        for name in self.names():
            bare, at, shots = name.partition("@")
            if task_sources.is_file(name):
                found.append(Chosen(task_sources.task_of_file(reading.expanded(name)), self.shots or 0))
            elif at and not shots.isdecimal():
                raise InputError(f"--tasks {name}: the number of examples is missing after @")
            else:
                found += tasks.named(bare, int(shots) if at else self.shots)
        _check_names((each.key, each.key if each.task.dataset else each.task.split) for each in found)
        _check_names((_text_name(text), str(text)) for text in self.texts)
        return list({each.key: each for each in found}.values())


def _text_name(source: str | Path) -> str:
    return str(source) if str(source).startswith(PREFIX) else Path(source).name


def _check_names(named: Iterable[tuple[str, str]]) -> None:
    """Raises InputError where a name that results are kept by stands for two things."""
    known: dict[str, str] = {}
    for name, what in named:
        first = known.setdefault(name, what)
        if first != what:
            raise InputError(f"{first} and {what}: results are kept by name, and both are {name}; rename a file")


@dataclass(frozen=True)
class Pace:
    """The items scored in this run, those found in the record excepted, and the seconds that they took."""

    items: int
    seconds: float


class Evaluation:
    """The evaluation of a model, which is loaded when this is made. `run` fills the attributes.

    Args:
        out: where results go; by default `evals/NAME`, the model directory's name, with an adapter's `NAME+ADAPTER`.
        kv_bits: score with quantized keys and values, as of `make_prompt_cache`.
        kvp: the directory of a KV prediction for the model, by which contexts are predicted but for their last token.

    Attributes:
        notes: remarks on the model for the user.
        missing: task or group -> how to get its data.
        cut: of a task's questions, those that exceed the model's context with their examples, and how many there are.
        texts: those that were read, by the names of their rows.
        rows: the table of scores; `mean`: over the suite, where all of its tasks are there.
        results: the contents of results.json.
        published: the published model of the same shape, if there is one; `source`: the paper.

    Raises:
        InputError: the model cannot be read.
    """

    def __init__(
        self,
        path: Path,
        request: EvaluationRequest,
        out: Path | None = None,
        *,
        adapter: Path | None = None,
        compute_dtype: str | None = None,
        kv_bits: int | None = None,
        kvp: Path | None = None,
    ):
        self._request = request
        path = reading.expanded(path)
        self._paths = path, adapter
        config = read_config(path, with_tokenizer=True)
        for text in map(str, request.texts):
            if not text.startswith(PREFIX):
                split_files.find(text)  # or what is not there is said only when the model is loaded
        check_caches(config, kv_bits)
        self._kv_bits = kv_bits
        self._loaded = open_model(path, compute_dtype, adapter, config)
        self.notes = self._loaded.notes
        self._kvp = None
        if kvp is not None:
            self._kvp = kvp_directory.load(kvp, path, self._loaded.model)
            self.notes += (self._kvp.describe(),)
        names = [name_of(each).rpartition("/")[2] for each in (path, adapter, kvp) if each is not None]
        names += [] if kv_bits is None else [f"kv{kv_bits}"]
        self.out = out if out is not None else Path("evals", "+".join(names))
        self.missing: dict[str, str] = {}
        self.cut: dict[str, tuple[int, int]] = {}
        self.texts: dict[str, TextWindows] = {}
        self.rows: list[ScoreRow] = []
        self.mean: Score | None = None
        self.pace = Pace(0, 0.0)
        self.results: dict[str, Any] = {}
        self.published = scores.published_model(self._loaded.model.config, path)
        self.source = scores.published()["source"]
        leaves = tree_flatten(self._loaded.model.leaf_modules(), is_leaf=nn.Module.is_module)
        types = {name for _, module in leaves for name in _computed_in(module)}
        self._identity = {
            "model": fingerprint(path, kept_identity(self.out).get("model")),
            "config.json": _digest(path / "config.json"),
            "adapter": None if adapter is None else _digest(adapters.weights_file(adapter), adapter / adapters.CONFIG),
            "computed in": f"{'/'.join(sorted(types))} on {str(mx.default_device().type).removeprefix('DeviceType.')}",
            "kv_bits": kv_bits,
            "kvp": None if kvp is None else _digest(*(kvp / name for name in kvp_directory.CONTENTS)),
        }
        self._about = {"model": str(path), "adapter": None if adapter is None else str(adapter)}

    @property
    def published_mean(self) -> float | None:
        suite = self._request.suite_name()
        if self.published is None or suite is None:
            return None
        return float(scores.published()["models"][self.published][suite]["mean"])

    def run(self, on_progress: OnProgress = no_progress) -> None:
        """Scores what is not scored yet, and writes results.json.

        Raises:
            InputError: no task's data are here, or a file is damaged.
            ElmError: results cannot be written.
        """
        request, model, tokenizer = self._request, self._loaded.model, self._loaded.tokenizer
        assert tokenizer is not None
        context = model.config.max_context_length
        works, self.missing = prepare(request.chosen(), tokenizer, context, request.data, request.limit)
        self.cut = {work.key: (work.cut, len(work.items)) for work in works if work.cut}
        window = min(request.window or _WINDOW, context)
        stride = request.stride or max(1, window // 2)
        columns, metrics = parsed(request.columns), ("bits_per_byte", "perplexity")
        for source in dict.fromkeys(request.texts):
            on_progress(f"reading {_text_name(source)}")
            text = tokens.read_text(source, tokenizer, window, stride, self._template, columns, request.skip_bad)
            name = _text_name(source) + (f":{text.split}" if text.split else "")
            key, items = f"{name}, window {window}, stride {stride}", [[each] for each in text.windows]
            works.append(Work(key, name, str(source), metrics, items, text=text))
        if not works:
            key, how = next(iter(self.missing.items()))
            raise InputError(f"none of the tasks' data were found; {key}: {how}")
        about: dict[str, Any] = {**self._about, "machine": device.machine(), "version": __version__}
        self.texts = {work.name: work.text for work in works if work.text is not None}
        with ScoreRecord(self.out, self._identity, about) as record:
            self.pace = score(works, model, record, on_progress, self._kv_bits, self._kvp)
            found = {work.key: work.measure(record) for work in works}
            self.rows = scores.rows(list(found.values()), self.published)
            suite = request.suite_name()
            self.mean = None if suite is None or self.missing else scores.mean_of_suite(self.rows, suite)
            now = {
                **about, "identity": self._identity, "suite": suite, "limit": request.limit, "pace": asdict(self.pace),
                "mean": None if self.mean is None else asdict(self.mean),
                "scores": [row.to_dict() for row in self.rows], "missing": self.missing, "cut": self.cut,
                "tasks": {key: asdict(result) for key, result in found.items()},
            }  # fmt: skip
            self.results = scores.merge(record.results(), now)
            record.write_results(self.results)

    def _template(self) -> Template | None:
        """Returns the template that texts of other formats are read by. Raises InputError."""
        path, adapter = self._paths
        assert self._loaded.tokenizer is not None
        return choose(path, self._loaded.tokenizer, self._request.template, adapter)

    def run_harness(self, on_progress: OnProgress = no_progress) -> str:
        """Has lm_eval ask its own tasks, those in YAML below `EvaluationRequest.data` too, and returns its table.

        Raises:
            ElmError: lm_eval is not installed, or results cannot be written.
            InputError: it has no such task.
        """
        from elm_mlx.evaluate import harness

        names = self._request.names()
        if not names or self._request.suite or self._request.texts:
            raise InputError("--harness runs lm_eval's tasks: name them with --tasks, without --suite or --text")
        found, table = harness.run(
            self._loaded.model, self._loaded.tokenizer, names, shots=self._request.shots, limit=self._request.limit,
            tasks_from=self._request.data, on_progress=on_progress, kv_bits=self._kv_bits,
            kvp=self._kvp,
        )  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        files.write_text(self.out / HARNESS, json.dumps(found, indent=1, default=str) + "\n")
        return table


@dataclass(frozen=True)
class Work:
    """A task, or a text, as items to score.

    Attributes:
        key: the name of its results.
        name, shots, group: of the task; a text's name is its file's.
        where: the file or repository that was read.
        metrics: the first is the one that a mean is taken of.
        items: the token sequences that each question is scored by.
        questions: of a task; `text` of a text.
    """

    key: str
    name: str
    where: str
    metrics: tuple[str, ...]
    items: list[list[Scored]]
    shots: int = 0
    group: str | None = None
    questions: list[Question] = field(default_factory=list)
    text: TextWindows | None = None

    @property
    def cut(self) -> int:
        """The number of questions that are longer than the model's context, and lack their beginning."""
        return sum(any(each.cut for each in item) for item in self.items)

    def measure(self, record: ScoreRecord) -> TaskResult:
        """Scores of log-probabilities, all of which must be in `record`."""
        lines = [record.done[self.key, number] for number in range(len(self.items))]
        logprobs = [line["logprobs"] for line in lines]
        if self.text is not None:
            sums = [values[0] for values in logprobs]
            shares = self.text.shares(sums)
            means = {"bits_per_byte": self.text.bits_per_byte(sums), "perplexity": self.text.perplexity(sums)}
            values = {"bits_per_byte": shares} if shares else {}
            digest = self.text.digest
        else:
            each = [
                scores.of_question(question, line["logprobs"], line["greedy"], self.metrics)
                for question, line in zip(self.questions, lines, strict=True)
            ]
            values = {metric: [one[metric] for one in each] for metric in self.metrics}
            means = {metric: scores.mean(metric, found) for metric, found in values.items()}
            state = hashlib.blake2b(digest_size=8)
            for question in self.questions:
                state.update(repr((question.requests(), question.right)).encode())
            digest = state.hexdigest()
        return TaskResult(self.name, self.shots, self.group, self.where, digest, means, values, logprobs)


def prepare(
    chosen: Sequence[Chosen], tokenizer: Tokenizer, context: int, data: Path | None = None, limit: int | None = None
) -> tuple[list[Work], dict[str, str]]:
    """Reads and encodes tasks; returns also, for each task or group whose data are not here, how to get them.

    Args:
        context: tokens that the model reads at once.
        limit: take each task's first questions only.

    Raises:
        InputError: a file is damaged, or a question cannot be scored.
    """
    works: list[Work] = []
    missing: dict[str, str] = {}
    for each in chosen:
        task = each.task
        try:
            source = task_sources.load(each, data)
        except Missing as reason:
            missing.setdefault(task.group or each.key, str(reason))
            continue
        questions = source.questions[:limit]
        items = []
        contexts = each.contexts(questions, source.examples)
        for number, (question, before) in enumerate(zip(questions, contexts, strict=True), 1):
            try:
                items.append(tokens.encode(question.requests(before), tokenizer, context))
            except InputError as error:
                raise InputError(f"{source.where}, question {number}: {error}") from None
        metrics = task.metrics or task_sources.metrics_of(questions)
        works.append(Work(each.key, task.name, source.where, metrics, items, each.shots, task.group, questions))
    return works, missing


def score(
    works: Sequence[Work],
    model: Any,
    record: ScoreRecord,
    on_progress: OnProgress = no_progress,
    kv_bits: int | None = None,
    kvp: KVPrediction | None = None,
) -> Pace:
    """Scores the items that are not in `record` yet, and appends them to it.

    Args:
        on_progress: called with a work's key, and the computed and total cost of all.
        kv_bits, kvp: as of `Scorer`.

    Raises:
        ElmError: the record cannot be written, or the model's log-probabilities are NaN.
    """
    scorer = Scorer(model, kv_bits=kv_bits, kvp=kvp)
    started = time.perf_counter()
    left = []
    for work in works:
        ids = [tokens.digest(item) for item in work.items]
        numbers = [n for n, own in enumerate(ids) if record.done.get((work.key, n), {}).get("id") != own]
        left.append((work, ids, numbers, scorer.plan([work.items[number] for number in numbers])))
    total = sum(batch.cost for *_, planned in left for batch in planned.batches)
    spent = items = 0
    for work, ids, numbers, planned in left:
        for results, cost in scorer.run(planned):
            lines = []
            for result in results:
                number = numbers[result.item]
                if any(map(math.isnan, result.logprobs)):
                    raise ElmError(
                        f"{work.key}, item {number + 1}: the model's log-probabilities are NaN: its weights are "
                        "damaged, or overflow the type that they are computed in"
                    )
                found = {"logprobs": result.logprobs, "greedy": result.greedy}
                lines.append({"task": work.key, "item": number, "id": ids[number], **found})
            record.append(lines)
            spent, items = spent + cost, items + len(results)
            on_progress(work.key, spent, total)
    return Pace(items, time.perf_counter() - started)


def _computed_in(layer: nn.Module) -> set[str]:
    """Returns the types of a layer's weights, as they are used."""
    if isinstance(layer, StoredLayer):
        return {"bfloat16" if layer.rounds else "float32"}
    return {str(weight.dtype).removeprefix("mlx.core.") for _, weight in tree_flatten(layer.parameters())}


def _digest(*paths: Path) -> str:
    state = hashlib.sha256()
    for path in paths:
        with reading.opened(path) as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                state.update(block)
    return state.hexdigest()
