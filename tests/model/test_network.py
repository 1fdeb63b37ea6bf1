"""The network against `reference`, in every variant, whole and in pieces, on both devices' branches."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
import tiny
from mlx.utils import tree_flatten, tree_map

from elm_mlx import device
from elm_mlx.model.attention import Segments
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.network import Model
from elm_mlx.store.loading import load

SCALING: dict[str, dict[str, Any]] = {
    "layer-wise": {},
    "uniform": {"qkv_multipliers": 1.0, "ffn_multipliers": 2.0},
}
VARIANTS = {
    f"{scaling}, {groups} queries a key, {'QK norm' if norm else 'no QK norm'}, "
    f"{'GLU' if glu else 'no GLU'}, {'tied' if tied else 'untied'}": SCALING[scaling]
    | {
        "num_gqa_groups": groups, "normalize_qk_projections": norm, "ffn_with_glu": glu,
        "share_input_output_layers": tied,
    }
    for scaling, groups, norm, glu, tied in product(SCALING, (1, 2, 4), (True, False), (True, False), (True, False))
}  # fmt: skip
FEW = list(VARIANTS)[::7]


def variant(name: str) -> Model:
    return tiny.random_model(tiny.scaled_config(96, **VARIANTS[name]), seed=len(name))


def numpy_weights(model: Model) -> dict[str, np.ndarray]:
    return {name: np.array(weight.astype(mx.float32)) for name, weight in tree_flatten(model.parameters())}


def ids_of(length: int, batch: int = 1, vocab: int = 96) -> mx.array:
    return mx.random.randint(0, vocab, (batch, length), key=mx.random.key(length))


def expected(model: Model, ids: mx.array) -> np.ndarray:
    weights = numpy_weights(model)
    return np.stack([reference.logits(model.config, weights, row) for row in ids.tolist()])


def assert_close(result: mx.array, truth: np.ndarray, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of how far the logits spread."""
    assert result.shape == truth.shape
    worst = np.abs(np.array(result.astype(mx.float32)) - truth).max() / truth.std()
    assert worst < tolerance


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_references(name: str) -> None:
    model, ids = variant(name), ids_of(24)
    assert_close(model(ids), expected(model, ids))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_weights_are_those_that_the_config_lists(name: str) -> None:
    model = variant(name)
    assert {key: weight.shape for key, weight in tree_flatten(model.parameters())} == model.config.shapes()


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("name", FEW)
def test_a_cache_changes_nothing(name: str) -> None:
    """Chunks of a prompt, then token by token, on past the point where the cache grows."""
    model, ids = variant(name), ids_of(266)
    caches = make_prompt_cache(model)
    pieces, start = [], 0
    for size in (1, 2, 100, 151, *[1] * 12):
        pieces.append(model(ids[:, start : start + size], cache=caches))
        start += size
    assert start == 266 and {cache.offset for cache in caches} == {266}
    assert_close(mx.concatenate(pieces, axis=1), expected(model, ids))


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("name", FEW[:3])
def test_a_long_prompt_in_one_pass_or_in_chunks(name: str) -> None:
    model, ids = variant(name), ids_of(700)
    truth = expected(model, ids)
    assert_close(model(ids), truth)
    for chunk in (256, 300, 513):
        caches = make_prompt_cache(model)
        pieces = [model(ids[:, start : start + chunk], cache=caches) for start in range(0, 700, chunk)]
        assert_close(mx.concatenate(pieces, axis=1), truth)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("length", [1, 9, 300])
@pytest.mark.parametrize("name", FEW[:4])
def test_rows_of_a_batch_do_not_meet(name: str, length: int) -> None:
    model, ids = variant(name), ids_of(length, batch=3)
    together = np.array(model(ids))
    for row in range(3):
        assert_close(model(ids[row : row + 1]), together[row : row + 1])


@pytest.mark.usefixtures("branch")
def test_a_trimmed_cache_is_as_one_that_never_read_further() -> None:
    model, ids = variant(FEW[0]), ids_of(30)
    caches = make_prompt_cache(model)
    model(ids, cache=caches)
    for cache in caches:
        assert cache.trim(12) == 12
    assert_close(model(ids[:, 18:], cache=caches), expected(model, ids)[:, 18:])


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("length", [1, 5, 300])
def test_extreme_activations(glu: bool, length: int) -> None:
    """Gates of some hundreds, attention that looks at one position alone: no overflow, and no more lost than
    float32 loses when scores are in the thousands.
    """
    config = tiny.scaled_config(96, ffn_with_glu=glu, normalize_qk_projections=False)
    model = tiny.random_model(config)
    model.update(tree_map(lambda weight: weight * 12 if weight.ndim == 2 else weight, model.parameters()))
    ids = ids_of(length)
    assert_close(model(ids), expected(model, ids), 0.02)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 0.02), (mx.bfloat16, 0.2)])
@pytest.mark.parametrize("length", [1, 40])
def test_16_bits_are_near(dtype: mx.Dtype, tolerance: float, length: int) -> None:
    model, ids = variant(FEW[0]), ids_of(length)
    model.set_dtype(dtype)
    truth = np.stack([reference.logits(model.config, numpy_weights_of_16_bits(model), row) for row in ids.tolist()])
    result = model(ids)
    assert result.dtype == dtype
    assert_close(result, truth, tolerance)


def numpy_weights_of_16_bits(model: Model) -> dict[str, np.ndarray]:
    return {name: np.array(weight.astype(mx.float32)) for name, weight in tree_flatten(model.parameters())}


def test_both_branches_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = variant(FEW[2]), ids_of(320, batch=2)
    results = []
    for gpu in (False, True):
        monkeypatch.setattr(device, "on_gpu", lambda gpu=gpu: gpu)
        caches = make_prompt_cache(model)
        results.append(mx.concatenate([model(ids[:, :319], cache=caches), model(ids[:, 319:], cache=caches)], axis=1))
    assert_close(results[0], np.array(results[1]))


@pytest.mark.parametrize("length", [1, 3])
def test_attention_is_fused_and_keys_are_not_repeated(
    branch: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.random_model(tiny.scaled_config(96, num_gqa_groups=4))
    seen = []
    fused = mx.fast.scaled_dot_product_attention

    def spy(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        seen.append((queries.size, keys.shape, values.shape))
        return fused(queries, keys, values, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    model(ids_of(length))
    config = model.config
    assert seen == [
        (heads * length * config.head_dim, *[(1, kv, length, config.head_dim)] * 2)
        for heads, kv in zip(config.num_query_heads, config.num_kv_heads, strict=True)
    ]
    assert max(config.num_kv_heads) < min(config.num_query_heads)


@pytest.mark.parametrize("length", [1, 40])
def test_each_norm_of_the_config_is_one_fused_call(branch: bool, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = variant(FEW[0])
    calls = []
    fused = mx.fast.rms_norm
    monkeypatch.setattr(mx.fast, "rms_norm", lambda *args: (calls.append(1), fused(*args))[1])
    model(ids_of(length))
    assert len(calls) == sum(name.endswith("norm.weight") for name in model.config.shapes())


def test_hidden_states_and_head_make_the_logits() -> None:
    for tied in (True, False):
        model = tiny.random_model(tiny.scaled_config(96, share_input_output_layers=tied))
        ids = ids_of(5)
        np.testing.assert_array_equal(model.head(model.transformer(ids, None)), model(ids))


def test_the_real_model_computes_what_the_formulas_say(classics_dir: Path) -> None:
    model, tokenizer = load(classics_dir)
    assert tokenizer is not None
    ids = tokenizer.encode("It was the best of times, it was the worst of times, it was the age of wisdom")
    truth = reference.logits(model.config, numpy_weights(model), ids)
    assert_close(model(mx.array([ids])), truth[None], 1e-3)
    assert truth[-1].argmax() == int(model(mx.array([ids]))[0, -1].argmax())


def test_a_preset_has_its_shapes() -> None:
    config = ModelConfig.preset("OpenELM-3B")
    model = Model(config)  # lazily: nothing is allocated
    assert {key: weight.shape for key, weight in tree_flatten(model.parameters())} == config.shapes()


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("name", FEW[:4])
def test_texts_that_share_a_row_have_the_logits_of_each_alone(name: str) -> None:
    """Also where the blocks of long rows begin in the middle of a text, and beside padding."""
    model, lengths = variant(name), [130, 1, 200, 69]
    texts = [ids_of(length) for length in lengths]
    row = mx.concatenate([*texts, mx.zeros((1, 20), mx.int32)], axis=1)
    numbers = np.repeat([1, 2, 3, 4, 0], [*lengths, 20])[None]
    together = model(row, segments=Segments(mx.array(numbers)))
    for number, text in enumerate(texts, 1):
        own = mx.array(np.flatnonzero(numbers[0] == number))
        assert_close(together[:, own], expected(model, text))


def beginning_in_common(prompt: mx.array, answers: list[mx.array], padding: int) -> tuple[mx.array, Segments]:
    """Returns a row of a prompt and what follows it in several texts, and what separates those."""
    lengths, first = [each.shape[1] for each in answers], prompt.shape[1]
    row = mx.concatenate([prompt, *answers, mx.zeros((1, padding), mx.int32)], axis=1)
    numbers = np.repeat([-1, *range(1, len(answers) + 1), 0], [first, *lengths, padding])[None]
    positions = np.concatenate([np.arange(first), *(first + np.arange(each) for each in lengths), [0] * padding])
    return row, Segments(mx.array(numbers), None, mx.array(positions[None].astype(np.int32)))


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("name", FEW[:4])
def test_texts_that_begin_alike_have_the_logits_of_each_alone(name: str) -> None:
    """Where what they have in common is read once."""
    model, prompt = variant(name), ids_of(100)
    answers = [ids_of(length)[:, ::-1] for length in (70, 1, 130)]
    row, segments = beginning_in_common(prompt, answers, 20)
    together, start = model(row, segments=segments), 100
    for answer in answers:
        alone = expected(model, mx.concatenate([prompt, answer], axis=1))
        assert_close(together[:, :100], alone[:, :100])
        assert_close(together[:, start : (start := start + answer.shape[1])], alone[:, 100:])
