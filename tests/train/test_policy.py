"""Answers come from the parameters as they are: what was drawn has the probability that the training step sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from threading import Event

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from training_tasks import write_task

from elm_mlx.model.attention import Segments
from elm_mlx.model.lora_layers import LoRALinear
from elm_mlx.model.network import Model
from elm_mlx.problems.built_in import load_task
from elm_mlx.problems.checked_task import CheckedTask
from elm_mlx.problems.drawn_problems import training_problem
from elm_mlx.quantize.quantization import quantize
from elm_mlx.quantize.recipe import Format, QuantizationRecipe
from elm_mlx.store import adapters, loading
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx.train.loop_settings import Schedule, Settings
from elm_mlx.train.loss import Head, losses_only
from elm_mlx.train.policy import Policy
from elm_mlx.train.policy_gradient import PolicyGradient, WeighedAnswer, batches_of
from elm_mlx.train.rollout_batches import HeldOut
from elm_mlx.train.step import Step, global_norm


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> CheckedTask:
    return load_task(str(write_task(tmp_path_factory.mktemp("task") / "letters.py")))


def full(path: Path) -> Model:
    model = loading.open_model(path, "float32", widen=True).model
    model.unfreeze()
    return model


def adapted(dora: bool) -> Callable[[Path], Model]:
    def make(path: Path) -> Model:
        model = loading.open_model(path, "float32", widen=True).model
        adapters.attach(model, adapters.plan(model.config, rank=4, dora=dora))
        return model

    return make


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "lora, 4 bits"])
def test_answers_have_the_probabilities_of_the_training_step(
    tiny_model_dir: Path, tiny_tokenizer: Tokenizer, task: CheckedTask, tmp_path: Path, branch: bool, kind: str
) -> None:
    """At the beginning, and after updates that change much."""
    if branch and "bits" in kind:
        pytest.skip("quantized products on a CPU take 20 seconds")
    path = tiny_model_dir
    if "bits" in kind:
        path = tmp_path / "packed"
        quantize(tiny_model_dir, path, QuantizationRecipe(Format(4, 32)))
    model = full(path) if kind == "full" else adapted(kind == "dora")(path)
    policy = Policy(model, tiny_tokenizer, None, task, None, samples=4, max_tokens=12, seed=5)
    step = Step(model, Settings(Schedule(1e-2, 10)), None, PolicyGradient())
    before: list[tuple[int, ...]] = []
    for update in range(3):
        problems = [training_problem(task, [1, 2], 0, number) for number in range(3)]
        names = [name for name, _ in tree_flatten(model.parameters())]
        solved = policy.solve(problems, "sampling", Event())
        assert names == [name for name, _ in tree_flatten(model.parameters())] and model.training
        answers = [
            WeighedAnswer(policy.prompt(each.drawn), answer.rollout.tokens, answer.rollout.logprobs, 1.0)
            for each in solved
            for answer in each.answers
        ]
        assert [answer.tokens for answer in answers] != before
        before = [answer.tokens for answer in answers]
        for together in (False, True):
            (batch,) = batches_of(answers, 2 * len(answers), together)
            where, targets, weights, _, drawn = PolicyGradient().arrays(batch)
            segments = None
            if batch.segments is not None and batch.positions is not None:
                segments = Segments(mx.array(batch.segments), None, mx.array(batch.positions))
            hidden = model.transformer(mx.array(batch.inputs), None, segments)
            now = -losses_only(Head.of(model), hidden, (where, targets))
            np.testing.assert_allclose(np.array(now * weights), np.array(drawn * weights), atol=5e-5 * (1 + 9 * update))
        _, gradients, count = step.gradients(batch)
        step.apply(gradients, global_norm(gradients) / count, count, 1e-2)
        mx.eval(step.state())


def test_rounded_parameters_answer_as_they_are_trained(
    tiny_model_dir: Path, tiny_tokenizer: Tokenizer, task: CheckedTask
) -> None:
    """Adapters in float32, computed in bfloat16: afterwards they are what they were, to the bit."""
    model = adapted(False)(tiny_model_dir)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
    kept = {name: np.array(value) for name, value in tree_flatten(model.trainable_parameters())}
    found = [
        Policy(model, tiny_tokenizer, None, task, dtype, samples=2, max_tokens=8, seed=0).solve(
            [training_problem(task, [1], 0, 0)], "sampling", Event()
        )
        for dtype in (None, mx.bfloat16)
    ]
    exact, rounded = (each[0].answers[0].rollout.logprobs[0] for each in found)
    assert exact != rounded and exact == pytest.approx(rounded, abs=0.3)
    for name, value in tree_flatten(model.trainable_parameters()):
        np.testing.assert_array_equal(np.array(value), kept[name])


def test_answers_are_counted_as_they_come(tiny_model_dir: Path, tiny_tokenizer: Tokenizer, task: CheckedTask) -> None:
    told: list[tuple[object, ...]] = []

    def on_progress(*parts: object) -> None:
        told.append(parts)

    model = adapted(False)(tiny_model_dir)
    policy = Policy(model, tiny_tokenizer, None, task, None, samples=2, max_tokens=4, seed=0, on_progress=on_progress)
    policy.solve([training_problem(task, [1], 0, number) for number in range(3)], "validating", Event())
    assert told == [("validating", done, 6) for done in range(7)]


def test_a_validation_ends_where_someone_stops_it(
    tiny_model_dir: Path, tiny_tokenizer: Tokenizer, task: CheckedTask
) -> None:
    stop, model = Event(), adapted(False)(tiny_model_dir)

    def on_progress(what: str, done: int = 0, total: int = 0, /) -> None:
        asked.append(done)
        if done == 40:
            stop.set()

    asked: list[int] = []
    policy = Policy(model, tiny_tokenizer, None, task, None, samples=2, max_tokens=4, seed=0, on_progress=on_progress)
    problems = [training_problem(task, [1], 0, number) for number in range(100)]
    model.train()
    for _ in range(2):
        loss, *rest = HeldOut(policy, problems).examine(stop)
        assert math.isnan(loss) and rest == [{}, []]
    assert asked == [*range(41), 0]
    assert any(isinstance(module, LoRALinear) for module in model.modules()) and model.training


def test_what_a_judge_raises_leaves_the_model_as_it_was(
    tiny_model_dir: Path, tiny_tokenizer: Tokenizer, task: CheckedTask
) -> None:
    def fail(problem: object, answer: str) -> bool:
        raise ZeroDivisionError

    model = adapted(False)(tiny_model_dir)
    model.train()
    broken = CheckedTask("broken", 1, task.problem, fail)  # type: ignore[arg-type]
    policy = Policy(model, tiny_tokenizer, None, broken, None, samples=2, max_tokens=300, seed=0)
    with pytest.raises(ZeroDivisionError):
        policy.solve([training_problem(task, [1], 0, number) for number in range(9)], "sampling", Event())
    assert any(isinstance(module, LoRALinear) for module in model.modules()) and model.training
