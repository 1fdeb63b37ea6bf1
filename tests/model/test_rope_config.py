"""RoPE as a config says it: one normal form of all spellings, and each value that makes no sense is named.

That the frequencies are transformers' is shown by logits in test_family_references.
"""

from __future__ import annotations

from typing import Any

import pytest

from elm_mlx.errors import InputError
from elm_mlx.model.rope import frequencies
from elm_mlx.model.rope_config import RopeConfig, RopeRules, read_ropes
from elm_mlx.reading import Keys

LONG = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
PHI3 = RopeRules(original=32, phi3=True)


def rope(rules: RopeRules | None = None, layer_type: str = "full_attention", **values: Any) -> RopeConfig:
    found = read_ropes(Keys("config.json", {"max_position_embeddings": 128, **values}), 4, rules or RopeRules())
    return found[layer_type]


def test_all_spellings_are_one() -> None:
    said = {"rope_type": "linear", "factor": 2.0}
    expected = rope(rope_theta=5e5, rope_scaling=said)
    assert expected == RopeConfig("linear", 4, 5e5, 128, factor=2.0)
    for values in (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": 500000, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}},
        {"rope_parameters": {**said, "rope_theta": 5e5}},
        {"rope_theta": 1e4, "rope_parameters": {**said, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": said},
        {"rope_theta": 5e5, "rope_scaling": said, "rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": {"full_attention": {**said, "rope_theta": 5e5}, "sliding_attention": None}},
    ):
        assert rope(**values) == expected
    assert rope() == rope(rope_scaling={}) == rope(rope_parameters={"rope_type": "default"})
    assert rope(PHI3, rope_scaling={"type": "su", **LONG}) == rope(PHI3, rope_scaling={"type": "longrope", **LONG})


def test_layers_that_see_a_window() -> None:
    said = {"rope_type": "linear", "factor": 2.0}
    unscaled = RopeRules(windows_scaled=False)
    assert rope(layer_type="sliding_attention", rope_scaling=said).kind == "linear"
    assert rope(unscaled, "sliding_attention", rope_scaling=said).kind == "default"
    assert rope(unscaled, "sliding_attention", rope_scaling=said, rope_theta=7.0).theta == 7
    each = {"sliding_attention": said, "full_attention": {"rope_theta": 9.0}}
    assert rope(unscaled, "sliding_attention", rope_parameters=each).kind == "linear"
    assert rope(unscaled, "full_attention", rope_parameters=each) == RopeConfig("default", 4, 9.0, 128)


def test_the_length_where_frequencies_change() -> None:
    assert rope(rope_scaling={"type": "linear", "factor": 2.0}).switch is None
    assert rope(rope_scaling={"type": "dynamic", "factor": 2.0}).switch == 128
    assert rope(PHI3, rope_scaling={"type": "longrope", **LONG}).switch == 32
    assert rope(PHI3, original_max_position_embeddings=64, rope_scaling={"type": "longrope", **LONG}).switch == 64
    alike = {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]}
    assert rope(PHI3, rope_scaling=alike).switch is None
    long = rope(PHI3, rope_scaling={"type": "longrope", **LONG})
    assert frequencies(long, 32) == [1.0, 1 / 200] and frequencies(long, 33) == [1 / 3, 1 / 400]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rope_scaling": "linear"}, "config.json: rope_scaling is 'linear': an object"),
        ({"rope_scaling": {"type": "odd"}}, "rope_scaling: type is 'odd': one of default, linear"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type is ['linear']: one of"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}, "type say linear and yarn"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0: a number between"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor is inf"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor is True"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "a factor of at least 1"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}, "high_freq"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": "no"}}, "truncate is 'no': true or false"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0}}, "beta_fast is 0"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1, 2]}}, "long_factor is missing"),
        ({"rope_scaling": {"type": "longrope", **LONG, "short_factor": [1]}}, "short_factor is [1]"),
        ({"rope_scaling": {"type": "longrope", **LONG, "long_factor": [1, 0]}}, "long_factor is [1, 0]"),
        ({"rope_scaling": {"type": "longrope", **LONG, "original_max_position_embeddings": 1}}, "more than 1"),
        ({"rope_parameters": {"full_attention": [1]}}, "rope_parameters: full_attention is [1]: an object"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and this family rotates whole heads"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor is 2"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        rope(**values)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_part_of_a_head() -> None:
    assert rope(PHI3, partial_rotary_factor=0.5).dims == 2
    assert rope(PHI3, rope_parameters={"partial_rotary_factor": 0.5}).dims == 2
    with pytest.raises(InputError, match="1 values of each head are to be rotated"):
        rope(PHI3, partial_rotary_factor=0.25)
