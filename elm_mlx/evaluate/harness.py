"""LM Evaluation Harness over our model, for tasks that we don't define.

Knows how `lm_eval` asks a model: log-probabilities of a continuation, of a whole text, and texts to be generated. What
scores them is `scoring`. `lm_eval` is imported only here, and need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elm_mlx.errors import ElmError, InputError
from elm_mlx.evaluate import perplexity, tokens
from elm_mlx.evaluate.scoring import Scorer
from elm_mlx.evaluate.tokens import Scored

Advance = Callable[[int, int], None]

_MOST_GENERATED = 256  # where a task doesn't say; the harness' own default


def run(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    tasks_from: Path | None = None,
    advance: Advance | None = None,
) -> tuple[dict[str, Any], str]:
    """The harness' own results, and its table as text.

    Args:
        names: of the harness' tasks, groups and tags.
        tasks_from: a directory with tasks of the user's, in YAML.
        advance: told the cost done and that of all, of each kind of request apart.

    Raises:
        ElmError: `lm_eval` is not installed.
        InputError: it knows no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ElmError(f"--harness needs lm_eval ({error}): pip install lm_eval") from None
    manager = TaskManager(include_path=None if tasks_from is None else str(tasks_from))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise InputError(f"lm_eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` shows what there is")
    found = simple_evaluate(
        model=language_model(model, tokenizer, advance), tasks=list(names), num_fewshot=shots, limit=limit,
        task_manager=manager, log_samples=True,
    )  # fmt: skip
    return found, make_table(found)


def language_model(model: Any, tokenizer: Any, advance: Advance | None = None) -> Any:
    """An `lm_eval` model; its class can be made only where `lm_eval` is."""
    from lm_eval.api.model import LM

    scorer, context = Scorer(model), model.config.max_context_length

    class Ours(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            items: dict[int, list[Scored]] = {}
            by_document = [_document(request, number) for number, request in enumerate(requests)]
            for document, request in zip(by_document, requests, strict=True):
                items.setdefault(document, []).extend(tokens.encode([request.args], tokenizer, context))
            found = _each(scorer, list(items.values()), advance)
            rest = {document: iter(values) for document, values in zip(items, found, strict=True)}
            return [next(rest[document]) for document in by_document]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            texts = [tokens.begun(each.args[0], tokenizer) for each in requests]
            items = [list(perplexity.slide(ids, context, context)) for ids in texts]
            return [sum(value for value, _ in found) for found in _each(scorer, items, advance)]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [_generate(model, tokenizer, *request.args[:2]) for request in requests]

    return Ours()


def _document(request: Any, number: int) -> Any:
    """What requests of the same question have in common, so that they are scored together."""
    name, document = getattr(request, "task_name", None), getattr(request, "doc_id", None)
    return number if document is None else (name, document)


def _each(scorer: Scorer, items: list[list[Scored]], advance: Advance | None) -> list[list[tuple[float, bool]]]:
    """Log-probability and whether it is the likeliest text, for each sequence of each item."""
    planned = scorer.plan(items)
    total = sum(batch.cost for batch in planned.batches)
    found: dict[int, list[tuple[float, bool]]] = {}
    done = 0
    for results, cost in scorer.run(planned):
        done += cost
        found.update({each.item: list(zip(each.logprobs, each.greedy, strict=True)) for each in results})
        if advance is not None:
            advance(done, total)
    return [found[number] for number in range(len(items))]


def _generate(model: Any, tokenizer: Any, text: str, options: dict[str, Any]) -> str:
    from elm_mlx.inference.generation import generate

    until = options.get("until") or []
    most = int(options.get("max_gen_toks", _MOST_GENERATED))
    room = max(1, model.config.max_context_length - most)
    temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
    stop = [until] if isinstance(until, str) else list(until)
    return generate(
        model, tokenizer, tokenizer.encode(text)[-room:], max_tokens=most, temp=temperature, seed=0,
        stop=[each for each in stop if each],
    )  # fmt: skip
