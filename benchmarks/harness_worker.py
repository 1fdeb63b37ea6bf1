"""One side of `harness.py` in a process of its own: tasks asked and scored, as JSON.

    harness_worker.py PEER JOB

PEER is `ours`, `stock` (LM Evaluation Harness through mlx-lm, as installed), `equal` (the same with our BLAS and
weights in float32), `handed` (the harness' tasks, our scoring, as `elm-mlx eval --harness`), `encoded` (its way from
text to ids too, as for its own PyTorch models) or `served` (its `local-completions`, which asks `elm-mlx serve` at the
job's `url`). JOB is a JSON file with `model`, `directory` and `tasks`, a number of examples for each. Each task's
answer has `requests`, pairs of texts by question, `logprobs` and `greedy` alike, its `scores`, and the `seconds` that
scoring took, tokenizing included, on the clock and of `processor` time.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Runs `elm_mlx.evaluate`; returns its requests, choices and seconds, task by task."""
    from elm_mlx import load
    from elm_mlx.evaluate import scores, task_sources, tokens
    from elm_mlx.evaluate.scoring import Scorer
    from elm_mlx.evaluate.tasks import TASKS, Chosen

    model, tokenizer = load(job["model"])
    assert tokenizer is not None
    scorer = Scorer(model)
    answers = {}
    for name, shots in job["tasks"].items():
        chosen = Chosen(TASKS[name], shots)
        source = task_sources.load(chosen, Path(job["directory"]))
        texts = chosen.contexts(source.questions, source.examples)
        requests = [question.requests(before) for question, before in zip(source.questions, texts, strict=True)]
        start, used = time.perf_counter(), time.process_time()
        found = scorer.score([tokens.encode(each, tokenizer, model.config.max_context_length) for each in requests])
        seconds, processor = time.perf_counter() - start, time.process_time() - used
        values = [
            scores.of_question(question, each.logprobs, each.greedy, chosen.task.metrics)
            for question, each in zip(source.questions, found, strict=True)
        ]
        answers[name] = {
            "requests": requests,
            "logprobs": [each.logprobs for each in found],
            "greedy": [each.greedy for each in found],
            "scores": {metric: scores.mean(metric, [one[metric] for one in values]).value for metric in values[0]},
            "seconds": seconds,
            "processor": processor,
        }
    return answers


def harness(job: dict[str, Any], peer: str) -> dict[str, Any]:
    """The same by the harness, through the language model that `peer` stands for."""
    import logging

    if peer not in ("stock", "served"):
        import elm_mlx  # noqa: F401  (its BLAS must come before MLX)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.disable(logging.WARNING)
    language_model = _served(job) if peer == "served" else _language_model(job["model"], peer)
    asked: list[tuple[Any, Any]] = []
    plain = language_model.loglikelihood
    took = {"seconds": 0.0, "processor": 0.0}

    def recorded(requests: list[Any]) -> list[Any]:
        """The same, with what was asked and how long it took kept."""
        start, used = time.perf_counter(), time.process_time()
        found = plain(requests)
        took.update(seconds=time.perf_counter() - start, processor=time.process_time() - used)
        asked.extend(zip(requests, found, strict=True))
        return list(found)

    language_model.loglikelihood = recorded
    manager = TaskManager(include_path=str(Path(job["directory"], "tasks")))
    answers = {}
    for name, shots in job["tasks"].items():
        asked.clear()
        results = simple_evaluate(
            model=language_model, tasks=[f"elm_{name}"], num_fewshot=shots, task_manager=manager, bootstrap_iters=0
        )
        answers[name] = _answer(asked, results["results"][f"elm_{name}"]) | took
    return answers


def _served(job: dict[str, Any]) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{job['url']}/v1/completions", model=Path(job["model"]).name, tokenizer=job["model"],
        tokenizer_backend="huggingface", batch_size=4, num_concurrent=2,
    )  # fmt: skip


def _language_model(model: str, peer: str) -> Any:
    if peer == "handed":
        from elm_mlx import load
        from elm_mlx.evaluate import harness

        return harness.language_model(*load(model))
    if peer == "encoded":
        return _encoded(model)
    import mlx.core as mx
    from mlx_lm.evaluate import MLXLM

    made = MLXLM(model, use_chat_template=False)
    if peer == "equal":
        made._model.set_dtype(mx.float32)
        mx.eval(made._model.parameters())
    return made


def _encoded(path: str) -> Any:
    from lm_eval.api.model import TemplateLM

    from elm_mlx import load
    from elm_mlx.evaluate.scoring import Scorer
    from elm_mlx.evaluate.tokens import Scored

    model, tokenizer = load(path)
    assert tokenizer is not None
    context = model.config.max_context_length

    class Encoded(TemplateLM):
        """Our tokenizer and scores under the harness' own way from text to ids."""

        backend = "causal"
        eot_token_id = tokenizer.eos_id
        prefix_token_id = tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            return tokenizer.encode(string, add_bos=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
            sequences = [((read + scored)[-(context + 1) :], len(scored)) for _, read, scored in requests]
            found = Scorer(model).score([[Scored(ids, len(ids) - count)] for ids, count in sequences])
            return [(each.logprobs[0], each.greedy[0]) for each in found]

        def loglikelihood_rolling(self, requests: list[Any], **options: Any) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any], **options: Any) -> list[str]:
            raise NotImplementedError

    return Encoded()


def _answer(asked: list[tuple[Any, Any]], results: dict[str, Any]) -> dict[str, Any]:
    by_question: dict[int, list[tuple[Any, Any]]] = {}
    for request, found in asked:
        by_question.setdefault(request.doc_id, []).append((request.args, found))
    questions = [by_question[number] for number in sorted(by_question)]
    return {
        "requests": [[args for args, _ in each] for each in questions],
        "logprobs": [[found[0] for _, found in each] for each in questions],
        "greedy": [[bool(found[1]) for _, found in each] for each in questions],
        "scores": {name.removesuffix(",none"): value for name, value in results.items() if name.endswith(",none")},
    }


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[2]).read_text())
    print(json.dumps(ours(wanted) if sys.argv[1] == "ours" else harness(wanted, sys.argv[1])))
