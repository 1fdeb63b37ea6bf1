"""Each filter against its definition written out in NumPy, and draws against the distribution they are drawn from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.errors import InputError
from elm_mlx.inference import sampling
from elm_mlx.inference.sampling import PENALTY_WINDOW, Sampler, joined

VOCAB = 24


def distribution(logits: np.ndarray, temp: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Probability of each token, by the definitions: filters one after the other, then temperature."""
    order = [int(token) for token in np.argsort(-logits, kind="stable")]
    kept = order[:top_k] if top_k else order
    probs = dict(zip(kept, reference.softmax(logits[kept].astype(np.float64)), strict=True))
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += probs[token]
    kept = [token for token in nucleus if probs[token] >= min_p * probs[nucleus[0]] * (1 - 1e-6)]
    result = np.zeros(len(logits))
    result[kept] = reference.softmax(logits[kept].astype(np.float64) / temp)
    return result


def drawn(logits: np.ndarray, count: int, seed: int = 0, **options: Any) -> np.ndarray:
    """`count` tokens, all rows of one batch."""
    sampler = Sampler(**options)
    rows = mx.broadcast_to(mx.array(logits, mx.float32)[None], (count, len(logits)))
    tokens, _, _ = sampler(rows, sampler.start([[1]] * count, seed))
    return np.array(tokens)


def some_logits(seed: int = 0, size: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)


SETTINGS: list[dict[str, Any]] = [
    {"temp": 1.0},
    {"temp": 0.5},
    {"temp": 3.0},
    {"temp": 1.0, "top_k": 5},
    {"temp": 1.0, "top_k": VOCAB},
    {"temp": 1.0, "top_k": 10**9},
    {"temp": 1.0, "top_p": 0.6},
    {"temp": 2.0, "top_p": 0.9},
    {"temp": 1.0, "min_p": 0.1},
    {"temp": 4.0, "min_p": 0.2},
    {"temp": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square over the tokens that can come; the rest never does."""
    logits, count = some_logits(), 20_000
    probs = distribution(logits, **options)
    found = np.bincount(drawn(logits, count, seed=7, **options), minlength=VOCAB)
    assert not found[probs == 0].any()
    expected = probs * count
    common = expected >= 5
    chi_square = ((found - expected)[common] ** 2 / expected[common]).sum()
    freedom = int(common.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4  # about one in ten thousand


@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0, 1, 2, 7, VOCAB - 1, VOCAB, 99]),
    st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 1e-9, 0.01, 0.3, 1.0]),
)
def test_what_can_come_is_what_the_filters_leave(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    """At a temperature so high that in 2,000 draws nearly every candidate comes."""
    logits = some_logits(seed)
    options = {"temp": 1e4, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    allowed = {int(token) for token in np.flatnonzero(distribution(logits, **options))}
    assert set(drawn(logits, 2000, seed % 1000, **options).tolist()) == allowed


@pytest.mark.parametrize("options", [{"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.05}], ids=str)
def test_mlx_lm_keeps_the_same_candidates(options: dict[str, Any]) -> None:
    from mlx_lm import sample_utils

    for seed in range(5):
        logits = some_logits(seed, 200)
        logprobs = mx.array(reference.log_softmax(logits.astype(np.float64)).astype(np.float32))[None]
        name, value = next(iter(options.items()))
        theirs = np.flatnonzero(np.isfinite(np.array(getattr(sample_utils, f"apply_{name}")(logprobs, value))[0]))
        ours = np.flatnonzero(distribution(logits, 1.0, **options))
        np.testing.assert_array_equal(ours, theirs)
        assert set(drawn(logits, 4000, temp=1e4, **options).tolist()) == set(theirs.tolist())


def test_without_temperature_the_likeliest_comes_whatever_the_filters() -> None:
    logits = some_logits(3)
    for options in ({}, {"top_k": 3}, {"top_p": 0.1}, {"min_p": 1.0}, {"top_k": 2, "top_p": 0.5, "min_p": 0.5}):
        assert set(drawn(logits, 8, **options).tolist()) == {int(logits.argmax())}


@pytest.mark.parametrize("temp", [1e-3, 1e-6, 1e-20, 1e-38, 1e-45, 1e-60])
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_tiny_temperature_takes_the_likeliest(temp: float, options: dict[str, Any]) -> None:
    logits = some_logits(4)
    for scale in (1.0, 100.0):
        assert set(drawn(logits * scale, 50, temp=temp, **options).tolist()) == {int(logits.argmax())}


@pytest.mark.parametrize("temp", [1e6, 1e30, 1e300])
def test_a_huge_temperature_is_fair(temp: float) -> None:
    logits = some_logits(5)
    assert set(drawn(logits, 2000, temp=temp).tolist()) == set(range(VOCAB))
    kept = {int(token) for token in np.argsort(-logits)[:5]}
    assert set(drawn(logits, 500, temp=temp, top_k=5, top_p=0.9999).tolist()) <= kept


@pytest.mark.parametrize("options", [{"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}], ids=str)
def test_the_strictest_filter_leaves_the_likeliest(options: dict[str, Any]) -> None:
    logits = some_logits(6)
    assert set(drawn(logits, 100, temp=100.0, **options).tolist()) == {int(logits.argmax())}


def test_equal_logits_are_all_kept_by_min_p_and_counted_by_top_k() -> None:
    logits = np.zeros(VOCAB, np.float32)
    assert set(drawn(logits, 2000, temp=1.0, min_p=1.0).tolist()) == set(range(VOCAB))
    assert len(set(drawn(logits, 2000, temp=1.0, top_k=3).tolist())) == 3
    assert len(set(drawn(logits, 2000, temp=1.0, top_p=0.25).tolist())) == pytest.approx(VOCAB * 0.25, abs=1)


@pytest.mark.parametrize("scale", [1.0, 100.0, 3e4])
@pytest.mark.parametrize(
    "options",
    [{}, {"temp": 1.0}, {"temp": 0.7, "top_p": 0.5, "top_k": 9, "min_p": 0.1}, {"repetition_penalty": 1.5}],
    ids=str,
)
def test_the_logprob_is_the_models_own(options: dict[str, Any], scale: float) -> None:
    logits = np.stack([some_logits(seed) * scale for seed in range(6)])
    sampler = Sampler(**options)
    tokens, logprobs, _ = sampler(mx.array(logits), sampler.start([[3, 5]] * 6, 0))
    truth = reference.log_softmax(logits.astype(np.float64))[np.arange(6), np.array(tokens)]
    np.testing.assert_allclose(np.array(logprobs), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_16_bit_logits_are_sampled_in_float32(dtype: mx.Dtype) -> None:
    logits = mx.array(some_logits(1, 4000))[None].astype(dtype)
    sampler = Sampler(temp=1.0, top_p=0.9)
    tokens, logprobs, _ = sampler(logits, sampler.start([[1]], 0))
    truth = reference.log_softmax(np.array(logits.astype(mx.float32), np.float64))[0, int(tokens[0])]
    assert logprobs.dtype == mx.float32
    np.testing.assert_allclose(float(logprobs[0]), truth, rtol=1e-5)


def penalized(logits: np.ndarray, seen: set[int], penalty: float) -> np.ndarray:
    result = logits.copy()
    for token in seen:
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    return result


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=90),
    st.sampled_from([0.5, 1.1, 1.5, 3.0]),
    st.integers(0, 99),
)
def test_a_repetition_penalty_is_exact_step_after_step(prompt: list[int], penalty: float, seed: int) -> None:
    sampler = Sampler(repetition_penalty=penalty)
    state, history = sampler.start([prompt]), list(prompt)
    for step in range(12):
        logits = some_logits(100 * seed + step)
        tokens, _, state = sampler(mx.array(logits)[None], state)
        expected = penalized(logits.astype(np.float64), set(history[-PENALTY_WINDOW:]), penalty)
        assert int(tokens[0]) == int(expected.argmax())
        history.append(int(tokens[0]))


@pytest.mark.parametrize(
    ("logits", "chosen"),
    [([0.4, 0.3, -9.0], 1), ([0.4, 0.1, -9.0], 0), ([-0.2, -0.3, -9.0], 1), ([0.0, -0.1, -9.0], 0)],
)
def test_a_penalty_divides_what_is_positive_and_multiplies_what_is_not(logits: list[float], chosen: int) -> None:
    sampler = Sampler(repetition_penalty=2.0)
    assert int(sampler(mx.array([logits]), sampler.start([[0]]))[0][0]) == chosen


def test_a_penalty_makes_what_was_said_rarer_and_then_forgets_it() -> None:
    logits = np.zeros(100, np.float32)
    logits[7] = 2.0
    logits[8] = 1.5
    sampler = Sampler(repetition_penalty=2.0)
    state = sampler.start([[7, *[1] * (PENALTY_WINDOW - 1)]])
    tokens, _, state = sampler(mx.array(logits)[None], state)
    assert int(tokens[0]) == 8
    tokens, _, state = sampler(mx.array(logits)[None], state)  # now 7 is 65 tokens back
    assert int(tokens[0]) == 7


def test_the_penalty_goes_before_the_filters() -> None:
    logits = np.array([4.0, 3.9, 0.0, -1.0], np.float32)
    sampler = Sampler(temp=1e3, top_k=1, repetition_penalty=2.0)
    tokens, _, _ = sampler(mx.array(logits)[None], sampler.start([[0]], 1))
    assert int(tokens[0]) == 1


def test_mlx_lm_penalizes_alike() -> None:
    from mlx_lm.sample_utils import make_repetition_penalty

    prompt = [3, 3, 9, 11]
    logits = some_logits(12)
    theirs = np.array(make_repetition_penalty(1.3, PENALTY_WINDOW)(mx.array(prompt), mx.array(logits)[None]))[0]
    np.testing.assert_allclose(theirs, penalized(logits, set(prompt), 1.3), rtol=1e-6)
    sampler = Sampler(repetition_penalty=1.3)
    tokens, _, _ = sampler(mx.array(logits)[None], sampler.start([prompt]))
    assert int(tokens[0]) == int(theirs.argmax())


@given(
    presence=st.floats(-2, 2, width=32), frequency=st.floats(-2, 2, width=32), seed=st.integers(0, 99),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=5),
)  # fmt: skip
@settings(max_examples=30)
def test_what_was_generated_is_counted_and_biases_are_added(
    presence: float, frequency: float, seed: int, bias: dict[int, float]
) -> None:
    """OpenAI's definition: logits minus count times frequency minus, of what was said, presence; the prompt is none."""
    sampler = Sampler(presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias)
    state, counts = sampler.start([[1, 2], [3]]), np.zeros((2, VOCAB))
    added = np.array([bias.get(token, 0.0) for token in range(VOCAB)])
    for step in range(8):
        logits = np.stack([some_logits(seed + step), some_logits(seed + step + 1000)])
        expected = logits + added - frequency * counts - presence * (counts > 0)
        tokens, logprobs, state = sampler(mx.array(logits), state)
        for row, token in enumerate(tokens.tolist()):
            assert expected[row][token] >= expected[row].max() - 1e-4
            assert logprobs[row].item() == pytest.approx(math.log(reference.softmax(logits[row])[token]), abs=1e-4)
            counts[row, token] += 1


def test_counts_stay_with_their_row_when_others_leave() -> None:
    sampler = Sampler(presence_penalty=2.0)
    logits = mx.array(np.stack([some_logits(seed) for seed in range(3)]))
    _, _, state = sampler(logits, sampler.start([[1]] * 3))
    expected, _, _ = sampler(logits, state)
    kept, _, _ = sampler(logits[mx.array([2, 0])], sampler.keep(state, mx.array([2, 0])))
    assert kept.tolist() == [expected[2].item(), expected[0].item()]


def test_mlx_lm_biases_alike() -> None:
    from mlx_lm.sample_utils import make_logits_processors

    bias = {3: 1.5, 7: -100.0, 11: 4.0}
    for seed in range(10):
        logits = mx.array(some_logits(seed))[None]
        (process,) = make_logits_processors(logit_bias=bias)
        chosen, _, _ = Sampler(logit_bias=bias)(logits, Sampler().start([[1]]))
        assert chosen.tolist() == mx.argmax(process(mx.array([1]), logits), axis=-1).tolist()


def test_what_a_bias_hides_never_comes() -> None:
    """And the log-probability is still the model's own."""
    logits, bias = some_logits(), np.where(np.arange(VOCAB) % 5 == 0, 0.0, -np.inf).astype(np.float32)
    for sampler in (Sampler(), Sampler(1.5), Sampler(2.0, top_p=0.9), Sampler(2.0, top_k=20), Sampler(2.0, min_p=0.01)):
        state = sampler.start([[1]], 3)
        for _ in range(20):
            tokens, logprobs, state = sampler(mx.array(logits)[None], state, mx.array(bias))
            token = tokens.item()
            assert token % 5 == 0
            assert logprobs.item() == pytest.approx(math.log(reference.softmax(logits)[token]), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {1: math.nan}},
    ],
    ids=str,
)
def test_a_penalty_or_bias_that_is_none_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Sampler(**options)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63])
def test_a_seed_reproduces_and_rows_differ(seed: int) -> None:
    logits = some_logits(2, 1000)
    first = drawn(logits, 30, seed=seed, temp=1.0)
    np.testing.assert_array_equal(first, drawn(logits, 30, seed=seed, temp=1.0))
    assert len(set(first.tolist())) > 10
    assert (first != drawn(logits, 30, seed=seed + 1, temp=1.0)).any()


def test_without_a_seed_every_run_is_another() -> None:
    sampler = Sampler(temp=1.0)
    logits = mx.zeros((1, 100_000))
    assert len({int(sampler(logits, sampler.start([[1]]))[0][0]) for _ in range(8)}) > 4


def test_successive_draws_are_not_the_same_draw() -> None:
    sampler = Sampler(temp=1.0)
    state = sampler.start([[1]], seed=5)
    tokens = []
    for _ in range(20):
        token, _, state = sampler(mx.zeros((1, 1000)), state)
        tokens.append(int(token[0]))
    assert len(set(tokens)) > 15


def test_the_global_random_state_is_left_alone() -> None:
    mx.random.seed(3)
    expected = mx.random.normal((4,))
    mx.random.seed(3)
    drawn(some_logits(), 10, seed=1, temp=1.0)
    assert mx.array_equal(mx.random.normal((4,)), expected)


def test_rows_can_be_dropped_between_steps() -> None:
    sampler = Sampler(temp=1.0, repetition_penalty=1.2)
    prompts = [[1, 2], [3], [4, 5, 6]]
    state = sampler.keep(sampler.start(prompts, 0), mx.array([2, 0]))
    assert mx.array_equal(state.recent, sampler.start([prompts[2], prompts[0]], 0).recent)
    tokens, logprobs, _ = sampler(mx.zeros((2, 50)), state)
    assert tokens.shape == logprobs.shape == (2,)


@pytest.mark.parametrize("size", [VOCAB, 20_001], ids=str)  # exponentials are MLX's, and the polynomial
@pytest.mark.parametrize(
    "options",
    [
        {},
        *SETTINGS,
        {"repetition_penalty": 1.4},
        {"temp": 0.9, "repetition_penalty": 1.4, "presence_penalty": 0.5, "top_p": 0.9},
        {"temp": 1.1, "frequency_penalty": 0.3, "logit_bias": {3: 2.0}},
    ],
    ids=str,
)
def test_rows_with_a_key_each_draw_to_the_bit_what_they_draw_alone(options: dict[str, Any], size: int) -> None:
    sampler, rows = Sampler(**options), 5
    prompts = [[1, 3 + row, 4] for row in range(rows)]
    alone = [sampler.start([prompt], 100 + row) for row, prompt in enumerate(prompts)]
    together = joined(alone)
    for step in range(6):
        logits = mx.random.normal((rows, size), key=mx.random.key(step)) * 3
        biases = mx.random.normal((rows, size), key=mx.random.key(50 + step))
        if step == 3:  # one has left, and another stands in its place
            together, alone, logits, biases = joined([together.row(4), together.row(1)]), [alone[4], alone[1]], *(
                mx.stack([array[4], array[1]]) for array in (logits, biases)
            )  # fmt: skip
            rows = 2
        logits, biases = logits[:rows], biases[:rows]
        tokens, logprobs, together = sampler(logits, together, biases)
        for row in range(rows):
            token, logprob, alone[row] = sampler(logits[row : row + 1], alone[row], biases[row])
            assert mx.array_equal(token, tokens[row : row + 1]) and mx.array_equal(logprob, logprobs[row : row + 1])


@pytest.mark.parametrize("size", [3, 20_001], ids=str)
def test_no_chance_draws_what_has_no_probability(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = mx.full((1, size), -math.inf)
    logits[0, 1] = 1.0
    sampler = Sampler(0.7)
    for chance in (0.0, 2**-32, 0.5, 1 - 2**-24, 1.0):
        monkeypatch.setattr(sampling, "_chances", lambda key, rows, chance=chance: (key, mx.array([[chance]])))
        assert sampler(logits, sampler.start([[1]], 0))[0].item() == 1


BAD = {
    "temp": [-0.1, math.nan, math.inf, -math.inf],
    "top_p": [0.0, -1.0, 1.0001, math.nan, math.inf],
    "top_k": [-1, -(10**9)],
    "min_p": [-1e-9, 1.1, math.nan],
    "repetition_penalty": [0.0, -1.0, math.nan, math.inf],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_setting_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{name} is {value}: it must be "):
        Sampler(**{name: value})


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(InputError, match=f"seed is {seed}: it must be "):
        Sampler(temp=1.0).start([[1]], seed)


def write(directory: Path, **values: Any) -> Path:
    (directory / sampling.FILE_NAME).write_text(json.dumps(values))
    return directory


ALL = dict.fromkeys(sampling.DEFAULTS)


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert sampling.saved_settings(tmp_path) == {}
    assert sampling.merge_settings(tmp_path, ALL) == sampling.DEFAULTS


def test_the_files_names_become_ours(tmp_path: Path) -> None:
    write(
        tmp_path, do_sample=True, temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1,
        max_new_tokens=64, eos_token_id=2, transformers_version="4.0",
    )  # fmt: skip
    expected = {
        "temp": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "max_tokens": 64,
    }  # fmt: skip
    assert sampling.saved_settings(tmp_path) == expected
    assert sampling.merge_settings(tmp_path, ALL) == expected


def test_flags_go_before_the_file_and_zero_is_a_flag(tmp_path: Path) -> None:
    write(tmp_path, do_sample=True, temperature=0.7, top_k=40)
    assert sampling.merge_settings(tmp_path, {"temp": 0.0, "top_k": 0, "top_p": None}) == {
        "temp": 0.0,
        "top_k": 0,
        "top_p": 1.0,
    }


@pytest.mark.parametrize("said", [{}, {"do_sample": False}, {"do_sample": None}])
def test_a_model_that_does_not_sample_has_no_temperature(tmp_path: Path, said: dict[str, Any]) -> None:
    write(tmp_path, temperature=0.7, **said)
    assert sampling.merge_settings(tmp_path, ALL)["temp"] == 0.0


def test_null_is_nothing_said(tmp_path: Path) -> None:
    write(tmp_path, do_sample=None, temperature=None, top_k=None, max_new_tokens=None, eos_token_id=None)
    assert sampling.saved_settings(tmp_path) == {}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"do_sample": True}, {"temp": 1.0}),
        ({"do_sample": True, "temperature": None, "top_p": 1.0}, {"temp": 1.0, "top_p": 1.0}),
        ({"do_sample": True, "temperature": 0}, {"temp": 0}),
        ({"do_sample": True, "temperature": 0.0, "top_k": -1}, {"temp": 0.0, "top_k": 0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 0}, {"temp": 0.0, "top_k": 0}),
        ({"top_k": 50.0, "max_new_tokens": 1e3, "eos_token_id": [1, 2]}, {"top_k": 50, "max_tokens": 1000}),
        ({"top_p": 1, "min_p": 0, "repetition_penalty": 1, "num_beams": 4, "max_length": 20},
         {"top_p": 1, "min_p": 0, "repetition_penalty": 1}),
    ],
)  # fmt: skip
def test_as_transformers_and_others_write_it(tmp_path: Path, said: dict[str, Any], meant: dict[str, Any]) -> None:
    found = sampling.saved_settings(write(tmp_path, **said))
    assert found == meant
    Sampler(**{name: value for name, value in found.items() if name != "max_tokens"})
    assert all(type(found[name]) is int for name in found.keys() & {"top_k", "max_tokens"})


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", "hot"), ("temperature", [1]), ("temperature", True), ("top_k", 2.5), ("top_k", "40"),
     ("top_k", True), ("max_new_tokens", 1e3 + 0.5), ("max_new_tokens", {}), ("top_p", "0.9"), ("min_p", False),
     ("temperature", -1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0), ("top_p", 1.5),
     ("top_k", -2), ("min_p", 2), ("repetition_penalty", 0), ("max_new_tokens", 0), ("max_new_tokens", -1),
     ("do_sample", "yes"), ("do_sample", 1), ("top_k", float("inf"))],
)  # fmt: skip
def test_what_cannot_be_used_is_named(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path, **{"do_sample": True, key: value})
    with pytest.raises(
        InputError, match=rf"generation_config\.json: {key} is .*: .* (is needed|must be) ?.*"
    ) as caught:
        sampling.saved_settings(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250 + len(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"\xff\xff", b"[" * 100_000], ids=lambda c: repr(c[:8])
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / sampling.FILE_NAME).write_bytes(content)
    with pytest.raises(InputError, match=r"generation_config\.json(, line 1)?: "):
        sampling.saved_settings(tmp_path)


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / sampling.FILE_NAME).mkdir()
    with pytest.raises(InputError, match=r"generation_config\.json: cannot be read"):
        sampling.saved_settings(tmp_path)


def test_settings_are_kept_in_the_directory(tmp_path: Path) -> None:
    liked = {**sampling.DEFAULTS, "temp": 0.7, "max_tokens": 512}
    assert sampling.merge_settings(tmp_path, ALL, liked) == liked
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"bos_token_id": 1, "temperature": 0.3, "note": "é"}))
    assert sampling.merge_settings(tmp_path, ALL, liked) == liked, "a temperature without sampling is not used"
    for temp in (0.25, 0.0):
        chosen = {**liked, "temp": temp, "top_k": 7, "max_tokens": 99}
        assert sampling.save_settings(tmp_path, chosen) == path
        assert sampling.merge_settings(tmp_path, ALL, liked) == chosen, "the file goes before what we like"
        assert sampling.merge_settings(tmp_path, {**ALL, "temp": 0.9}, liked) == {**chosen, "temp": 0.9}, (
            "and flags before it"
        )
        saved = json.loads(path.read_text("utf-8"))
        assert (saved["bos_token_id"], saved["note"], saved["max_new_tokens"]) == (1, "é", 99)
        assert saved["do_sample"] is (temp > 0) and ("temperature" in saved) is (temp > 0)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    for broken in ("{", "[]", '{"top_k": "many"}'):
        path.write_text(broken)
        with pytest.raises(InputError, match="generation_config"):
            sampling.saved_settings(tmp_path)
        with pytest.raises(InputError, match="generation_config"):
            sampling.save_settings(tmp_path, liked)
        assert path.read_text() == broken
