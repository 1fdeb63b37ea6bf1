"""The config that shapes imply: exact for any widths, and plain about what does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from checkpoints import VARIANTS, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS, ModelConfig
from elm_mlx_convert.source_config import check_shapes, infer_config, preset_name

Shapes = dict[str, tuple[int, ...]]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("vocab_size", [32_000, 32_128])
def test_presets_are_recognised_in_the_papers_own_words(name: str, vocab_size: int) -> None:
    preset = ModelConfig.preset(name, vocab_size)
    assert infer_config(preset.shapes(), "x") == preset
    assert preset_name(replace(preset, max_context_length=512)) == name
    untied = replace(preset, share_input_output_layers=False)
    assert infer_config(untied.shapes(), "x") == untied


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str) -> None:
    config = tiny(**VARIANTS[variant])
    head_dim = None if config.normalize_qk_projections else 8
    found = infer_config(config.shapes(), "x", head_dim=head_dim)
    assert found.shapes() == config.shapes()
    assert found.num_query_heads == config.num_query_heads
    assert found.num_kv_heads == config.num_kv_heads
    assert found.ffn_dims == config.ffn_dims
    assert found.ffn_with_glu == config.ffn_with_glu
    assert found.share_input_output_layers == config.share_input_output_layers
    assert preset_name(found) is None


widths = st.integers(1, 100_000)


@settings(max_examples=300)
@given(
    dims=st.tuples(st.integers(1, 20_000), st.integers(1, 40).map(lambda n: 2 * n)),
    layers=st.lists(st.tuples(widths, st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    vocab_size=st.integers(1, 1_000_000),
)
def test_any_widths_come_back_exactly(
    dims: tuple[int, int], layers: list[tuple[int, int, int]], flags: tuple[bool, bool, bool], vocab_size: int
) -> None:
    """Through our rounding, and through mlx-lm's."""
    from mlx_lm.models.openelm import make_divisible

    model_dim, head_dim = dims
    glu, norms, tied = flags
    shapes = shapes_of(model_dim, head_dim, layers, glu=glu, norms=norms, tied=tied, vocab_size=vocab_size)
    config = infer_config(shapes, "x", head_dim=head_dim)
    assert config.shapes() == shapes
    assert config.ffn_dims == tuple(width for width, _, _ in layers)
    assert config.num_kv_heads == tuple(kv for _, kv, _ in layers)
    assert config.num_query_heads == tuple(kv * groups for _, kv, groups in layers)
    for width, multiplier in zip(config.ffn_dims, config.ffn_multipliers, strict=True):
        assert int(make_divisible(multiplier * model_dim, divisor=config.ffn_dim_divisor)) == width
    again = ModelConfig.from_dict(config.to_dict())
    assert again == config


def shapes_of(
    model_dim: int,
    head_dim: int,
    layers: list[tuple[int, int, int]],
    *,
    glu: bool,
    norms: bool,
    tied: bool,
    vocab_size: int,
) -> Shapes:
    """Written out by hand, not by ModelConfig. Layers are (FFN width, kv heads, query heads for each)."""
    shapes: Shapes = {"transformer.token_embeddings.weight": (vocab_size, model_dim)}
    for i, (width, kv, groups) in enumerate(layers):
        p = f"transformer.layers.{i}."
        shapes[p + "attn_norm.weight"] = (model_dim,)
        shapes[p + "attn.qkv_proj.weight"] = ((kv * groups + 2 * kv) * head_dim, model_dim)
        if norms:
            shapes[p + "attn.q_norm.weight"] = shapes[p + "attn.k_norm.weight"] = (head_dim,)
        shapes[p + "attn.out_proj.weight"] = (model_dim, kv * groups * head_dim)
        shapes[p + "ffn_norm.weight"] = (model_dim,)
        shapes[p + "ffn.proj_1.weight"] = (width * (2 if glu else 1), model_dim)
        shapes[p + "ffn.proj_2.weight"] = (model_dim, width)
    shapes["transformer.norm.weight"] = (model_dim,)
    if not tied:
        shapes["lm_head.weight"] = (vocab_size, model_dim)
    return shapes


def without(name: str) -> Any:
    return lambda shapes: shapes.pop(name)


def reshaped(**changes: tuple[int, ...]) -> Any:
    return lambda shapes: shapes.update({key.replace("__", "."): shape for key, shape in changes.items()})


L0, L1 = "transformer.layers.0.", "transformer.layers.1."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("transformer.token_embeddings.weight"), "token_embeddings.weight is missing"),
        (without(L1 + "ffn.proj_1.weight"), r"layers\.1\.ffn\.proj_1\.weight is missing"),
        (without(L1 + "attn.k_norm.weight"), r"layers\.1\.attn\.k_norm\.weight is missing"),
        (without("transformer.norm.weight"), "transformer.norm.weight is missing"),
        (reshaped(**{L0 + "attn.q_norm.weight": (8, 1)}), r"q_norm\.weight has the shape \(8, 1\), and a vector"),
        (reshaped(**{L0 + "attn.q_norm.weight": (7,)}), r"head_dim is 7|no whole number of query"),
        (reshaped(**{L0 + "ffn.proj_1.weight": (33, 48)}), r"layers\.0\.ffn\.proj_1\.weight writes 33 values"),
        (reshaped(**{L1 + "attn.out_proj.weight": (48, 25)}), r"layers\.1\.attn\.qkv_proj\.weight writes \d+ values"),
        (reshaped(**{L1 + "attn_norm.weight": (47,)}), r"attn_norm\.weight has the shape \(47,\).*says \(48,\)"),
        (reshaped(**{"transformer.token_embeddings.weight": (320, 0)}), "a matrix is needed"),
        (reshaped(**{"lm_head.weight": (319, 48)}), r"lm_head\.weight has the shape \(319, 48\).*\(320, 48\)"),
        (reshaped(**{"transformer.layers.7.attn_norm.weight": (48,)}), "none with number 3"),
        (lambda shapes: [shapes.pop(n) for n in list(shapes) if "layers" in n], "has no layers"),
    ],
)
def test_what_fits_no_openelm_is_named(change: Any, message: str) -> None:
    shapes = dict(tiny().shapes())
    change(shapes)
    with pytest.raises(InputError, match=message):
        infer_config(shapes, "x.pt")


def test_gate_in_one_layer_only() -> None:
    shapes = dict(tiny().shapes())
    width = shapes[L1 + "ffn.proj_2.weight"][1]
    shapes[L1 + "ffn.proj_1.weight"] = (width, 48)
    with pytest.raises(InputError, match="layer 1's FFN"):
        infer_config(shapes, "x.pt")


def test_head_dim_is_asked_for_where_nothing_shows_it() -> None:
    shapes = tiny(normalize_qk_projections=False).shapes()
    with pytest.raises(InputError, match="pass --head-dim"):
        infer_config(shapes, "x.pt")
    with pytest.raises(InputError, match="--head-dim is 0"):
        infer_config(shapes, "x.pt", head_dim=0)
    with pytest.raises(InputError, match="no whole number of query and key/value heads of 64"):
        infer_config(shapes, "x.pt", head_dim=64)
    with pytest.raises(InputError, match=r"q_norm\.weight has the shape \(8,\), but --head-dim says \(16,\)"):
        infer_config(tiny().shapes(), "x.pt", head_dim=16)


def test_a_config_against_shapes() -> None:
    config = tiny()
    check_shapes(config, config.shapes(), "x", "y")
    with pytest.raises(InputError, match=r"x: lm_head\.weight has the shape \(320, 48\), but y says there is no such"):
        check_shapes(config, tiny(share_input_output_layers=False).shapes(), "x", "y")
    with pytest.raises(InputError, match=r"x: lm_head\.weight is missing; y says it has the shape \(320, 48\)"):
        check_shapes(tiny(share_input_output_layers=False), config.shapes(), "x", "y")
    with pytest.raises(InputError, match=r"token_embeddings\.weight has the shape \(320, 48\), but y says \(321, 48\)"):
        check_shapes(config.with_vocab_size(321), config.shapes(), "x", "y")
