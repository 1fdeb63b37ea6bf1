"""The scaling rule against NumPy's, the presets against the paper's figures, and what no config may say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS, ModelConfig, make_divisible, spread

# parameters at 32,000 tokens, RMSNorms in a forward pass, 16-bit KV-cache bytes a token
FIGURES = {
    "OpenELM-270M": (271_527_168, 65, 16_128),
    "OpenELM-450M": (457_179_136, 81, 23_296),
    "OpenELM-1_1B": (1_079_891_456, 113, 43_264),
    "OpenELM-3B": (3_036_647_424, 145, 83_968),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_preset_has_the_published_figures(name: str) -> None:
    config = ModelConfig.preset(name)
    parameters, norms, kv_bytes = FIGURES[name]
    assert sum(math.prod(shape) for shape in config.shapes().values()) == parameters
    assert sum(key.endswith("norm.weight") for key in config.shapes()) == norms
    assert config.kv_bytes_per_token() == kv_bytes
    assert config.kv_bytes_per_token(4) == 2 * kv_bytes
    assert (config.max_context_length, config.rope_max_length, config.vocab_size) == (2048, 4096, 32_000)


def test_the_270m_has_the_lists_that_its_config_on_the_hub_spells_out() -> None:
    config = ModelConfig.preset("OpenELM-270M")
    assert config.num_query_heads == (12, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16, 16, 20, 20, 20, 20)
    assert config.num_kv_heads == (3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5)
    assert config.ffn_multipliers == (
        0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.0,
    )  # fmt: skip


def test_presets_are_named_and_another_name_is_refused() -> None:
    assert list(PRESETS) == list(FIGURES)
    with pytest.raises(InputError, match=r"preset 'OpenELM-7B' is not one of OpenELM-270M, .*OpenELM-3B"):
        ModelConfig.preset("OpenELM-7B")


@given(st.floats(0, 1e6), st.integers(1, 4096))
def test_make_divisible_keeps_its_promise(value: float, divisor: int) -> None:
    made = make_divisible(value, divisor)
    assert made % divisor == 0 and made >= divisor
    assert made >= 0.9 * value
    assert made == divisor or made - value <= divisor * (1 if made - divisor < 0.9 * value else 0.5)


multipliers = st.integers(1, 800).map(lambda n: n / 100) | st.floats(0.01, 8, allow_nan=False)


def test_layers_without_end_are_refused_before_they_are_listed() -> None:
    with pytest.raises(InputError, match="num_layers is 1000000000000: at most 10,000"):
        tiny.scaled_config(320, num_layers=10**12)


@given(multipliers, multipliers, st.integers(1, 80))
def test_spread_is_numpys_linspace_rounded(low: float, high: float, layers: int) -> None:
    expected = [float(np.round(value, 2)) for value in np.linspace(low, high, layers)]
    assert spread((low, high), layers) == expected
    assert spread([low, high], layers) == expected
    assert spread(high, layers) == [high] * layers


counts = st.integers(1, 6)
configs = st.builds(
    ModelConfig.scaled,
    vocab_size=st.integers(1, 2**20), num_layers=counts, model_dim=st.integers(1, 4096),
    head_dim=st.integers(1, 64).map(lambda half: 2 * half), num_gqa_groups=st.integers(1, 8),
    qkv_multipliers=multipliers | st.tuples(multipliers, multipliers),
    ffn_multipliers=multipliers | st.tuples(multipliers, multipliers),
    ffn_dim_divisor=st.integers(1, 512), ffn_with_glu=st.booleans(), normalize_qk_projections=st.booleans(),
    share_input_output_layers=st.booleans(), rms_norm_eps=st.floats(0, 1), rope_freq_constant=st.floats(1, 1e9),
    max_context_length=st.integers(1, 2**20), bos_token_id=st.integers(0, 2**20),
    eos_token_id=st.integers(0, 2**20) | st.tuples(st.integers(0, 99), st.integers(0, 99)),
    quantization=st.none() | st.just({"group_size": 64, "bits": 4, "mode": "affine", "lm_head": {"bits": 8}}),
)  # fmt: skip


@settings(max_examples=60)
@given(configs)
def test_a_config_survives_json(config: ModelConfig) -> None:
    text = json.dumps(config.to_dict())
    again = ModelConfig.from_dict(json.loads(text))
    assert again == config
    assert again.shapes() == config.shapes()


@settings(max_examples=60)
@given(configs)
def test_every_layer_is_whole(config: ModelConfig) -> None:
    shapes = config.shapes()
    for layer in range(config.num_layers):
        query, kv, ffn = config.num_query_heads[layer], config.num_kv_heads[layer], config.ffn_dims[layer]
        assert query % kv == 0 and ffn % config.ffn_dim_divisor == 0
        assert shapes[f"transformer.layers.{layer}.attn.out_proj.weight"] == (
            config.model_dim,
            query * config.head_dim,
        )
        assert shapes[f"transformer.layers.{layer}.ffn.proj_1.weight"][0] == ffn * (1 + config.ffn_with_glu)
    assert ("lm_head.weight" in shapes) is not config.share_input_output_layers


@pytest.mark.parametrize("name", PRESETS)
def test_corenets_rule_and_the_hubs_lists_say_the_same(name: str) -> None:
    config = ModelConfig.preset(name)
    rule = {
        "num_transformer_layers": config.num_layers, "model_dim": config.model_dim, "head_dim": config.head_dim,
        "vocab_size": 32_000, "num_gqa_groups": 4, "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0],
    }  # fmt: skip
    assert ModelConfig.from_dict(rule) == config
    lists = rule | {"num_query_heads": list(config.num_query_heads), "num_kv_heads": list(config.num_kv_heads)}
    assert ModelConfig.from_dict(lists) == config  # the hub's files: lists of heads, a pair for the FFN
    assert ModelConfig.from_dict({**lists, "ffn_multipliers": list(config.ffn_multipliers)}) == config


@settings(max_examples=30)
@given(configs)
def test_mlx_lm_reads_the_same_widths(config: ModelConfig) -> None:
    from mlx_lm.models import openelm

    args = openelm.ModelArgs.from_dict(json.loads(json.dumps(config.to_dict())))
    assert args.model_type == "openelm"
    assert tuple(args.num_query_heads) == config.num_query_heads
    assert tuple(args.num_kv_heads) == config.num_kv_heads
    widths = [
        int(openelm.make_divisible(m * args.model_dim, divisor=args.ffn_dim_divisor)) for m in args.ffn_multipliers
    ]
    assert tuple(widths) == config.ffn_dims
    assert args.rope_freq_constant == config.rope_freq_constant
    assert args.share_input_output_layers == config.share_input_output_layers


GOOD = tiny.scaled_config(320).to_dict()
REQUIRED = ("vocab_size", "model_dim", "head_dim", "num_transformer_layers", "num_kv_heads", "ffn_multipliers")
HOSTILE: list[Any] = [
    "64", "", b"x", -1, 0, 1.5, math.nan, math.inf, -math.inf, 2**63, 10**400, True, False, [], [1], [[1]], [None],
    {}, {"a": 1}, [math.nan] * 3, ["8"] * 3, [0] * 3, [-2] * 3, [True] * 3, [2**40] * 3, [1e300] * 3, [1] * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(InputError, match=rf"here\.json: .*{key}"):
        ModelConfig.from_dict({name: value for name, value in GOOD.items() if name != key}, where="here.json")


@pytest.mark.parametrize("key", [*GOOD, "num_gqa_groups", "qkv_multipliers", "quantization"])
def test_whatever_a_value_is_the_config_is_sound_or_refused(key: str) -> None:
    without_lists = {name: value for name, value in GOOD.items() if name != "num_query_heads"}
    rule = {**without_lists, "num_gqa_groups": 2, "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0]}
    for base in (GOOD, rule):
        for value in HOSTILE:
            try:
                config = ModelConfig.from_dict({**base, key: value}, where="here.json")
            except InputError as error:
                message = str(error)
                assert message.startswith("here.json: ") and "\n" not in message and len(message) < 400
            else:
                assert all(type(side) is int and side > 0 for shape in config.shapes().values() for side in shape)
                json.dumps(config.to_dict())


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from([*GOOD, "num_gqa_groups", "qkv_multipliers", "quantization"]), junk, max_size=4))
def test_random_values_are_refused_in_one_line(changes: dict[str, Any]) -> None:
    for base in (GOOD, {}):
        try:
            ModelConfig.from_dict({**base, **changes}).shapes()
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_query_heads": [4, 4]}, "num_query_heads has 2 entries for num_transformer_layers 3"),
        ({"num_kv_heads": [2, 2, 3]}, "layer 2: .* query heads cannot share 3 key/value heads"),
        ({"head_dim": 15}, "head_dim is 15: .* even"),
        ({"vocab_size": "320"}, "vocab_size is '320': a whole number from 1 to 16,777,216 is needed"),
        ({"head_dim": 200_000}, "head_dim is 200000: a whole number from 1 to 4,096 is needed"),
        ({"model_dim": 2**31}, "model_dim is 2147483648: a whole number from 1 to 1,048,576 is needed"),
        ({"num_query_heads": [2**24] * 3}, "layer 0: 16777216 query heads cannot share"),
        ({"ffn_multipliers": [1e9] * 3}, r"ffn multiplier is 1000000000\.0: a number above 0 and at most"),
        ({"ffn_with_glu": 1}, "ffn_with_glu is 1: true or false is needed"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"ffn_multipliers": [0.5, -1.0, 2.0]}, r"ffn multiplier is -1\.0"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_fn_name": "gelu"}, "activation_fn_name is 'gelu'"),
        ({"normalization_layer_name": "layer_norm"}, "normalization_layer_name is 'layer_norm'"),
        ({"num_transformer_layers": 10**9}, "num_transformer_layers"),
        ({"eos_token_id": [2, -1]}, "eos_token_id is .*a token id, or for the end several"),
    ],
)
def test_a_contradiction_says_what_and_where(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^here\.json: .*{message}"):
        ModelConfig.from_dict({**GOOD, **change}, where="here.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"{" * 50,
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"9" * 9999,
    ],
    ids=lambda content: f"{content[:8]!r}, {len(content)} bytes",
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        ModelConfig.load(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: cannot be read: No such file"):
        ModelConfig.load(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json: cannot be read: Is a directory"):
        ModelConfig.load(tmp_path / "config.json")


def test_eos_may_be_one_or_several() -> None:
    assert ModelConfig.from_dict(GOOD).eos_token_ids == (2,)
    assert ModelConfig.from_dict({**GOOD, "eos_token_id": [2, 5]}).eos_token_ids == (2, 5)


def test_a_new_vocabulary_leaves_the_rest() -> None:
    config = tiny.scaled_config(320)
    assert config.with_vocab_size(100) == tiny.scaled_config(100)


def test_a_config_is_read_without_mlx() -> None:
    code = "import sys; from elm_mlx.model import config; config.ModelConfig.preset('OpenELM-3B'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mlx" not in {name.split(".")[0] for name in done.stdout.split()}
