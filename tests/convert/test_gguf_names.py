"""GGUF's names of weights and settings: as the `gguf` package has them, and there and back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_cases
import gguf_cases
import numpy as np
import pytest
from checkpoints import tiny

from elm_mlx.errors import InputError
from elm_mlx.model.config import Config, ModelConfig, read_config
from elm_mlx_convert.gguf_names import (
    ARCHITECTURES,
    FREQUENCIES,
    check_expressible,
    config_values,
    interleaved,
    metadata,
    parts,
    rope_divisors,
    separated,
)

# What llama.cpp has no place for, or scales RoPE by that a file's tensors do not tell.
INEXPRESSIBLE = {
    "llama, dynamic": "dynamic", "olmo2": "biases", "olmo3, layers apart": "another base", "mamba": "not written",
    "mamba, biases, own head": "not written", "smollm3, its layers": "biases and RoPE in other layers",
    "gemma3": "query_pre_attn_scalar", "gemma3, linear": "query_pre_attn_scalar",
    "gemma2": "query_pre_attn_scalar", "gemma2, caps unsaid": "query_pre_attn_scalar",
}  # fmt: skip
UNTOLD = {"llama, llama3", "llama, `rope_parameters`"}  # divisors of another context than Llama 3's
CASES = sorted({*family_cases.CASES, *gguf_cases.CHANGED} - set(INEXPRESSIBLE))


def read(path: Path, name: str) -> Config:
    return read_config(gguf_cases.write_family(path / "model", name))


@pytest.mark.parametrize("name", CASES)
def test_every_weight_has_the_name_of_the_gguf_package(name: str, tmp_path: Path) -> None:
    import gguf

    config = read(tmp_path, name)
    check_expressible(config, "here")
    arch = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[config.model_type].name]
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    for weight, shape in config.shapes().items():
        (part,) = parts(weight, shape[0], config)
        assert part.name == names.get_name(weight, try_suffixes=(".weight", ".bias"))
        assert (part.start, part.stop) == (0, shape[0])


def test_an_openelm_has_the_names_of_the_gguf_package_and_its_first_projection_is_two() -> None:
    import gguf

    config = tiny()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OPENELM, config.num_layers)
    for weight, shape in config.shapes().items():
        found = parts(weight, shape[0], config)
        if weight.endswith("proj_1.weight"):
            layer = weight.split(".")[2]
            assert [part.name for part in found] == [f"blk.{layer}.ffn_gate.weight", f"blk.{layer}.ffn_up.weight"]
        else:
            assert [part.name for part in found] == [names.get_name(weight, try_suffixes=(".weight",))]
        assert [row for part in found for row in (part.start, part.stop)][:: 2 * len(found) - 1] == [0, shape[0]]
        assert not any(part.heads for part in found)


@pytest.mark.parametrize("name", sorted(set(CASES) - UNTOLD))
def test_the_settings_of_a_file_make_the_config_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    config = read(tmp_path, name)
    found = {part.name for weight, shape in config.shapes().items() for part in parts(weight, shape[0], config)}
    settings = {key: np.float32(v).item() if isinstance(v, float) else v for key, v in metadata(config).items()}
    values = config_values(settings, found, rope_divisors(config), "here")
    values |= {"vocab_size": config.vocab_size, "bos_token_id": 1, "eos_token_id": 2}
    base = gguf_cases.CHANGED.get(name, (name,))[0]
    again = read_config(family_cases.write(tmp_path / "again", base, values))
    assert again.max_context_length == config.max_context_length
    assert again.shapes() == config.shapes()
    for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "no_rope_layers"):
        assert again.values.get(key) == config.values.get(key)  # type: ignore[union-attr]
    if config.model_type.startswith("gemma"):
        assert [again.values[key] for key in ("layer_types", "sliding_window", "head_dim", "rms_norm_eps")] == [  # type: ignore[union-attr]
            pytest.approx(config.values[key]) if key == "rms_norm_eps" else config.values[key]  # type: ignore[union-attr]
            for key in ("layer_types", "sliding_window", "head_dim", "rms_norm_eps")
        ]
    assert {kind: flat(rope) for kind, rope in again.ropes.items()} == {  # type: ignore[union-attr]
        kind: flat(rope)
        for kind, rope in config.ropes.items()  # type: ignore[union-attr]
    }


def test_a_number_of_layers_that_no_model_has_is_refused_before_anything_is_made_of_it(tmp_path: Path) -> None:
    settings = metadata(read(tmp_path, "gemma2, its scale")) | {"gemma2.block_count": 1 << 29}
    with pytest.raises(InputError, match=r"gemma2\.block_count is 536870912: a whole number from 1 to 10,000"):
        config_values(settings, set(), {}, "here")


def flat(rope: Any) -> Any:
    """A RoPE without what says nothing: float32's rounding, and the context of training where nothing is scaled."""
    numbers = [rope.theta, rope.scale, rope.factor, *rope.bounds, *rope.short, *rope.long]
    unused = rope.kind in ("default", "linear")
    return rope.kind, rope.dims, None if unused else rope.original, [float(f"{number:.5g}") for number in numbers]


def test_llama_3s_divisors_tell_its_factor(tmp_path: Path) -> None:
    scaling = {**family_cases._LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}
    own = {
        **family_cases.config("llama"),
        "rope_scaling": scaling,
        "max_position_embeddings": 131_072,
        "rope_theta": 5e5,
    }
    own |= {"head_dim": 64}
    path = family_cases.write(tmp_path / "model", "llama", own)
    config = read_config(path)
    divisors = rope_divisors(config)
    assert divisors[FREQUENCIES][0] == 1
    assert divisors[FREQUENCIES][-1] == 32
    values = config_values(metadata(config), set(), divisors, "here")
    assert values["rope_scaling"] == scaling
    with pytest.raises(InputError, match="otherwise than Llama 3 does"):
        config_values(metadata(config), set(), {FREQUENCIES: divisors[FREQUENCIES] ** 2}, "here")


def test_interleaved_rows_are_rotated_by_neighbours_as_ours_by_halves() -> None:
    heads, size, position = 3, 8, 5
    vectors = np.random.default_rng(0).standard_normal(heads * size)
    angles = position * 10_000.0 ** -(np.arange(0, size, 2) / size)
    first, second = np.split(vectors.reshape(heads, size), 2, axis=1)
    halves = np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], axis=1
    )
    even, odd = interleaved(vectors, heads).reshape(heads, -1, 2).transpose(2, 0, 1)
    neighbours = np.stack(
        [even * np.cos(angles) - odd * np.sin(angles), odd * np.cos(angles) + even * np.sin(angles)], axis=-1
    )
    np.testing.assert_allclose(separated(neighbours.reshape(-1), heads).reshape(heads, size), halves)
    rows = np.arange(heads * size * 2).reshape(-1, 2)
    np.testing.assert_array_equal(separated(interleaved(rows, heads), heads), rows)


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_what_llama_cpp_has_no_place_for_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^here: (llama\.cpp's|of the family) .*{INEXPRESSIBLE[name]}"):
        check_expressible(read(tmp_path, name), "here")


def test_another_ramp_of_yarn_than_llama_cpp_s_is_refused(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    own = {**family_cases.config("llama"), "head_dim": 64, "rope_theta": 1e4, "rope_scaling": scaling}
    check_expressible(read_config(family_cases.write(tmp_path / "usual", "llama", own)), "here")
    own["rope_scaling"] = {**scaling, "beta_fast": 8.0}
    with pytest.raises(InputError, match="YaRN with a ramp of its own"):
        check_expressible(read_config(family_cases.write(tmp_path / "other", "llama", own)), "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_with_glu": False}, "an FFN without a gate"),
        ({"normalize_qk_projections": False}, "queries and keys without norms"),
        ({"share_input_output_layers": False}, "a head of its own beside the embedding"),
    ],
)
def test_an_openelm_that_llama_cpp_does_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    config: ModelConfig = replace(tiny(), **changes)
    with pytest.raises(InputError, match=f"OpenELM has no place for {message}"):
        check_expressible(config, "here")


def test_llama_3s_ramp_is_the_paper_s(tmp_path: Path) -> None:
    config = read(tmp_path, "llama, llama3")
    rope = config.ropes["full_attention"]  # type: ignore[union-attr]
    for pair, divisor in enumerate(rope_divisors(config)[FREQUENCIES]):
        wavelength = 2 * math.pi * rope.theta ** (2 * pair / rope.dims)
        low, high = (rope.original / bound for bound in rope.bounds)
        smooth = (rope.original / wavelength - rope.bounds[0]) / (rope.bounds[1] - rope.bounds[0])
        between = 1 / ((1 - smooth) / rope.factor + smooth)
        assert divisor == pytest.approx(1 if wavelength < high else rope.factor if wavelength > low else between)
