"""LM Evaluation Harness (`lm_eval`) with our model, for tasks that are not defined here.

`lm_eval` is imported only here, and need not be installed. It asks for log-probabilities of a continuation, or of a
whole text, and for generated text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.errors import ElmError, InputError
from elm_mlx.evaluate import tokens
from elm_mlx.evaluate.scoring import Scorer
from elm_mlx.evaluate.tokens import Scored
from elm_mlx.model.kv_prediction import KVPrediction

_MOST_GENERATED = 256  # where a task doesn't say; the harness' own default


def run(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    tasks_from: Path | None = None,
    on_progress: OnProgress = no_progress,
    kv_bits: int | None = None,
    kvp: KVPrediction | None = None,
) -> tuple[dict[str, Any], str]:
    """Returns the harness' own results, and its table as text.

    Args:
        names: of the harness' tasks, groups and tags.
        tasks_from: a directory with tasks of the user's, in YAML.
        on_progress: called with the computed and total cost, of each kind of request apart.
        kv_bits: of keys and values, as of `make_prompt_cache`.
        kvp: as of `Scorer`, and of `generate`.

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
        model=language_model(model, tokenizer, on_progress, kv_bits, kvp), tasks=list(names), num_fewshot=shots,
        limit=limit, task_manager=manager, log_samples=True,
    )  # fmt: skip
    return found, make_table(found)


def language_model(
    model: Any,
    tokenizer: Any,
    on_progress: OnProgress = no_progress,
    kv_bits: int | None = None,
    kvp: KVPrediction | None = None,
) -> Any:
    """Returns an `lm_eval` model. Its class can be made only where `lm_eval` is installed."""
    from lm_eval.api.model import LM

    scorer, context = Scorer(model, kv_bits=kv_bits, kvp=kvp), model.config.max_context_length

    class HarnessModel(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            items: dict[Any, list[Scored]] = {}  # by question, whose choices are scored together
            questions = []
            for number, request in enumerate(requests):
                name, document = getattr(request, "task_name", None), getattr(request, "doc_id", None)
                questions.append(number if document is None else (name, document))
                items.setdefault(questions[-1], []).extend(tokens.encode([request.args], tokenizer, context))
            found = scorer.score(list(items.values()), on_progress)
            pairs = (zip(each.logprobs, each.greedy, strict=True) for each in found)
            rest = dict(zip(items, pairs, strict=True))
            return [next(rest[question]) for question in questions]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            texts = [tokens.encode_text(each.args[0], tokenizer) for each in requests]
            items = [list(tokens.slide(ids, context, context)) for ids in texts]
            return [sum(found.logprobs) for found in scorer.score(items, on_progress)]

        def generate_until(self, requests: list[Any]) -> list[str]:
            from elm_mlx.inference.generation import generate
            from elm_mlx.model.cache import make_prompt_cache

            found = []
            for text, options in (request.args[:2] for request in requests):
                until = options.get("until") or []
                most = int(options.get("max_gen_toks", _MOST_GENERATED))
                if most >= context:
                    raise InputError(
                        f"a task wants {most} tokens (max_gen_toks), and the model's context is {context}: nothing of "
                        "its questions would be read"
                    )
                ids = tokenizer.encode(text)[-(context - most) :]
                temp = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
                stop = [each for each in ([until] if isinstance(until, str) else until) if each]
                caches = make_prompt_cache(model, kv_bits)
                text = generate(
                    model, tokenizer, ids, max_tokens=most, temp=temp, seed=0, stop=stop, prompt_cache=caches, kvp=kvp
                )
                found.append(text)
            return found

    return HarnessModel()
