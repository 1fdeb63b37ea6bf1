"""Log-probabilities: any batching gives what mlx-lm's model gives for each text by itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import kv_predictions
import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx import device
from elm_mlx.evaluate import scoring
from elm_mlx.evaluate.scoring import Scorer
from elm_mlx.evaluate.tokens import Scored
from elm_mlx.inference.rows import predicted_prefill
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.network import Model
from elm_mlx.store.loading import load_model


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return load_model(tiny_model_dir)


def items(count: int, seed: int = 0, stem: int = 0) -> list[list[Scored]]:
    draw = random.Random(seed)
    beginning = [1, *(draw.randrange(3, 300) for _ in range(stem))]
    found = []
    for _ in range(count):
        context = beginning + [draw.randrange(3, 300) for _ in range(draw.randrange(0, 50))]
        item = []
        for _ in range(draw.choice([1, 2, 4])):
            own = context + [draw.randrange(3, 300) for _ in range(draw.choice([0, 0, 2]))]
            item.append(Scored(own + [draw.randrange(3, 300) for _ in range(draw.randrange(1, 14))], len(own)))
        found.append(item)
    return found


def by_mlx_lm(directory: Path, asked: list[list[Scored]]) -> list[list[float]]:
    """Each sequence by itself, whole, without a cache."""
    from mlx_lm.utils import load_model as load_theirs

    network, _ = load_theirs(directory)
    network.set_dtype(mx.float32)

    def one(each: Scored) -> float:
        logits = np.array(network(mx.array([each.ids[:-1]]))[0], np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return float(sum(logs[at - 1, each.ids[at]] for at in range(each.start, len(each.ids))))

    return [[one(each) for each in item] for item in asked]


def values(model: Any, asked: list[list[Scored]], tokens: int = 512) -> list[list[float]]:
    results = Scorer(model, tokens).score(asked)
    assert [each.item for each in results] == list(range(len(asked)))
    return [each.logprobs for each in results]


def test_scores_are_those_of_mlx_lm_on_the_same_tokens(model: Model, tiny_model_dir: Path) -> None:
    asked = items(24, stem=12)
    for one, other in zip(values(model, asked), by_mlx_lm(tiny_model_dir, asked), strict=True):
        assert one == pytest.approx(other, abs=2e-4)


@pytest.mark.parametrize("tokens", [16, 100, 4096])
@pytest.mark.parametrize("seed", range(3))
def test_neither_order_nor_size_of_batches_matters(model: Model, tokens: int, seed: int) -> None:
    asked = items(20, seed=seed)
    alone = [values(model, [item])[0] for item in asked]
    order = list(range(len(asked)))
    random.Random(seed).shuffle(order)
    together = values(model, [asked[number] for number in order], tokens)
    for place, number in enumerate(order):
        assert together[place] == pytest.approx(alone[number], abs=1e-5 * max(1.0, *map(abs, alone[number])))


def test_greedy_is_what_the_model_would_say(tiny_tokenizer: Any) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "brown fox")
    said = tiny_tokenizer.encode("\nbrown fox")
    start = len(tiny_tokenizer.encode("\n"))
    other = [*said[:-1], 5]
    result = Scorer(model).score([[Scored(said, start), Scored(other, start)]])[0]
    assert result.greedy == [True, False]
    assert result.logprobs[0] > -0.5 > result.logprobs[1]


def test_where_caches_are_not_ours_each_sequence_is_read_whole(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = items(9, stem=12)
    shared = values(model, asked)

    class State:
        """Of a recurrent layer, say."""

    monkeypatch.setattr(scoring, "make_prompt_cache", lambda model, kv_bits: [State() for _ in model.layers])
    scorer = Scorer(model, 512)
    assert not scorer.sharing
    for one, other in zip(scorer.score(asked), shared, strict=True):
        assert one.logprobs == pytest.approx(other, abs=1e-4)


def test_a_model_of_another_family_is_asked_for_logits(model: Model) -> None:
    class Other:
        """As mlx-lm's are: called with ids and caches, without a head of its own."""

        config, layers = model.config, model.layers

        def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
            return model(ids, cache)

        def parameters(self) -> Any:
            return model.parameters()

    asked = items(9, stem=12)
    for one, other in zip(values(Other(), asked), values(model, asked), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_large_vocabulary_goes_through_the_head_in_pieces(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = items(9)
    whole = values(model, asked)
    monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 3 * model.config.vocab_size)
    for one, other in zip(values(model, asked), whole, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_on_a_gpu_batches_are_larger_and_one_at_a_time(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    scorer = Scorer(model)
    assert scorer._tokens == 8 * scoring._TOKENS
    assert scorer._parts.most == 1
    asked = items(4)
    assert len(scorer.score(asked)) == 4


def test_an_untied_head_is_used(tiny_config: ModelConfig) -> None:
    model = tiny.random_model(tiny.scaled_config(tiny_config.vocab_size, share_input_output_layers=False))
    asked = items(3)
    logits = np.array(model(mx.array([asked[0][0].ids[:-1]]))[0], np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    each = asked[0][0]
    expected = sum(logs[at - 1, each.ids[at]] for at in range(each.start, len(each.ids)))
    assert values(model, asked)[0][0] == pytest.approx(expected, abs=1e-3)


def planned_items(seed: int, count: int, stem: int = 0) -> list[list[Scored]]:
    """Items of 1 to 5 sequences with a common beginning, in a small vocabulary so that ends coincide."""
    draw = random.Random(seed)
    beginning = [1, *(draw.randrange(2, 9) for _ in range(stem))]
    found = []
    for _ in range(count):
        context = beginning + [draw.randrange(2, 9) for _ in range(draw.randrange(0, 40))]
        item = []
        for _ in range(draw.randrange(1, 6)):
            own = context + [draw.randrange(2, 9) for _ in range(draw.randrange(0, 3))]
            item.append(Scored(own + [draw.randrange(2, 5) for _ in range(draw.randrange(1, 9))], len(own)))
        found.append(item)
    return found


def read_back(planned: scoring.Plan) -> dict[int, list[list[tuple[list[int], int]]]]:
    """For each item and sequence, what is read before each scored token, and that token."""
    found: dict[int, list[list[tuple[list[int], int]]]] = {}
    for batch in planned.batches:
        laid = []  # for each position of the blocks' rows: what is read up to it
        for block in batch.blocks:
            for row, owner in zip(block.rows.tolist(), block.owners.tolist(), strict=True):
                before = planned.stem + batch.prefix[owner].tolist()
                laid += [before + row[: position + 1] for position in range(len(row))]
        for span in batch.spans:
            sequences = []
            for place in span.places:
                pairs = []
                for where, token in zip(batch.where[place].tolist(), batch.targets[place].tolist(), strict=True):
                    pairs.append((laid[where], token))
                sequences.append(pairs)
            assert span.item not in found
            found[span.item] = sequences
    return found


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 25),
    st.sampled_from([0, 0, 12]),
    st.sampled_from([16, 200, 4096]),
    st.booleans(),
)
def test_each_token_is_scored_once_after_exactly_what_comes_before_it(
    seed: int, count: int, stem: int, tokens: int, sharing: bool
) -> None:
    asked = planned_items(seed, count, stem)
    found = read_back(scoring.plan(asked, tokens, sharing))
    assert sorted(found) == list(range(count))
    for number, item in enumerate(asked):
        expected = [[(each.ids[:at], each.ids[at]) for at in range(each.start, len(each.ids))] for each in item]
        assert found[number] == expected


def test_batches_keep_to_their_size_and_the_longest_come_first() -> None:
    planned = scoring.plan(planned_items(3, 60), 256)
    several = [batch for batch in planned.batches if len(batch.prefix) > 1]
    assert all(batch.prefix.size <= 256 for batch in several)
    assert all(sum(block.rows.size for block in batch.blocks) <= 256 for batch in several)
    costs = [batch.cost for batch in planned.batches]
    assert costs == sorted(costs, reverse=True)


def test_a_description_is_read_once_for_all() -> None:
    about = [1, *range(100, 150)]
    asked = [[Scored([*about, at, 7, 8], 52), Scored([*about, at, 9, 3], 52)] for at in range(200, 230)]
    planned = scoring.plan(asked, 2048)
    assert planned.stem == about
    assert sum(batch.cost for batch in planned.batches) < 30 * 2 * 3


def test_choices_of_one_token_are_one_row() -> None:
    asked = [[Scored([1, 5, 6, letter], 3) for letter in (11, 12, 13, 14)]]
    batch = scoring.plan(asked, 2048).batches[0]
    assert [len(block.rows) for block in batch.blocks] == [1]
    assert batch.targets.tolist() == [11, 12, 13, 14]
    assert len(set(batch.where.tolist())) == 1


def test_rows_of_very_different_lengths_are_blocks_of_their_own() -> None:
    asked = [[Scored([1, number, *range(2, length)], 2) for length in (12, 13, 100)] for number in range(101, 117)]
    batch = scoring.plan(asked, 8192).batches[0]
    assert [len(block.rows) for block in batch.blocks] == [16, 32]
    assert batch.cost < 16 * (1 + 98 + 2 * 12) + 32


def test_without_sharing_every_sequence_is_read_whole() -> None:
    planned = scoring.plan(planned_items(5, 10, 12), 2048, sharing=False)
    assert planned.stem == []
    assert all(batch.prefix.size == 0 for batch in planned.batches)
    assert scoring.plan([], 2048) == scoring.ScoringPlan([], [])


@pytest.mark.parametrize("tokens", [16, 4096])
def test_contexts_are_predicted_but_for_their_last_token(model: Model, tokens: int) -> None:
    kvp, asked = kv_predictions.prediction_of(model), items(6, stem=12)
    asked[3].append(Scored(asked[4][0].ids, asked[4][0].start))  # of two contexts, and lengths
    results = Scorer(model, tokens, kvp=kvp).score(asked)
    assert [each.item for each in results] == list(range(len(asked)))
    for item, found in zip(asked, results, strict=True):
        for each, logprob in zip(item, found.logprobs, strict=True):
            caches = make_prompt_cache(model)
            logits = predicted_prefill(model, kvp, each.ids[: each.start], caches)
            rest = model(mx.array([each.ids[each.start : -1]]), cache=caches)[0] if each.ids[each.start : -1] else None
            logits = logits if rest is None else mx.concatenate([logits, rest])
            logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            expected = sum(logs[at, token].item() for at, token in enumerate(each.ids[each.start :]))
            assert logprob == pytest.approx(expected, abs=2e-4)


def test_a_prediction_that_is_exact_scores_as_the_model_does(model: Model) -> None:
    asked = items(9, stem=12)
    found = Scorer(model, 512, kvp=kv_predictions.identity_of(model, model)).score(asked)
    for one, other in zip(found, values(model, asked), strict=True):
        assert one.logprobs == pytest.approx(other, abs=2e-4)
