"""Every naming scheme to the canonical one and back."""

from __future__ import annotations

import pytest
from checkpoints import VARIANTS, tiny

from elm_mlx.errors import InputError
from elm_mlx.reading import listed
from elm_mlx_convert.names import TABLE, canonical_names, is_buffer, to_canonical, to_corenet, unwrap, unwrapped


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_of_every_variant_there_and_back(variant: str) -> None:
    for name in tiny(**VARIANTS[variant]).shapes():
        assert to_canonical(to_corenet(name)) == name
        assert to_canonical(name) == name


def test_the_table_has_each_name_once() -> None:
    assert len({name for row in TABLE for name in row}) == 2 * len(TABLE)


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.layers.3.attn.q_norm.weight",
        "module.module.layers.3.attn.q_norm.weight",
        "_orig_mod.module.layers.3.attn.q_norm.weight",
        "_fsdp_wrapped_module.layers.3._fsdp_wrapped_module.attn._checkpoint_wrapped_module.q_norm.weight",
        "_orig_mod._fsdp_wrapped_module.layers._orig_mod.3._orig_mod.attn.q_norm._orig_mod.weight",
        "transformer._orig_mod.layers.3.attn.q_norm.weight",
    ],
)
def test_wrappers_anywhere_and_repeatedly(wrapped: str) -> None:
    assert to_canonical(wrapped) == "transformer.layers.3.attn.q_norm.weight"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "weight",
        "layers.3.attn.qkv_proj.bias",
        "layers.03.ffn_norm.weight",
        "layers.-1.ffn_norm.weight",
        "layers.{}.ffn_norm.weight",
        "layers..ffn_norm.weight",
        "layers.1234567.ffn_norm.weight",
        "layers.3.layers.3.ffn_norm.weight",
        "xlayers.3.ffn_norm.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "modules.norm.weight",
        "{0.__class__}",
    ],
)
def test_what_is_no_weight_of_an_openelm(name: str) -> None:
    assert to_canonical(name) is None


def test_buffers_are_left_out_and_strangers_are_named() -> None:
    assert is_buffer("layers.0.attn.pos_embedding.inv_freq")
    assert is_buffer("transformer.causal_mask")
    assert not is_buffer("layers.0.attn.inv_freq.weight")
    names = ["norm.weight", "layers.0.attn.pos_embedding.inv_freq"]
    assert canonical_names(names, "x.pt") == {"transformer.norm.weight": "norm.weight"}
    with pytest.raises(InputError, match=r"x\.pt: holds tensors that no OpenELM has: 'a\.b', 'c', 'd' and 2 more"):
        canonical_names([*names, "a.b", "c", "d", "e", "f"], "x.pt")


def test_two_names_of_one_weight() -> None:
    with pytest.raises(InputError, match=r"both stand for 'transformer\.norm\.weight'"):
        canonical_names(["norm.weight", "transformer.norm.weight"], "x.pt")
    assert unwrapped({"module.a": 1, "b": 2}, "x.pt") == {"a": 1, "b": 2}
    with pytest.raises(InputError, match="there twice"):
        unwrapped({"module.a": 1, "a": 2}, "x.pt")


def test_a_wrapper_is_a_whole_part_of_a_name() -> None:
    assert unwrap("submodule.module_list.x") == "submodule.module_list.x"


def test_hostile_names_are_shown_on_one_short_line() -> None:
    shown = listed(["a\nb\x1b[2J", "x" * 1000])
    assert "\n" not in shown and "\x1b" not in shown and len(shown) < 200
