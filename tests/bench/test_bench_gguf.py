"""A model directory as GGUF, read back by the package gguf: the same numbers as MLX's, and nothing that would round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tiny import scaled_config

from elm_mlx.bench import gguf_copy
from elm_mlx.bench.gguf_copy import Refused
from elm_mlx.bench.models import write_seeded

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 96, "rope_theta": 1e4,
    "max_position_embeddings": 256,
}  # fmt: skip


def write_llama(directory: Path, how: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A random Llama in float16; quantized where `how` is given, the embedding as a Q8_0 would be."""
    draw = iter(mx.random.split(mx.random.key(0), 99))
    shapes = {"model.embed_tokens": (96, 64)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.self_attn.{name}_proj": (64 if name in "qo" else 32, 64) for name in "qkvo"}
        shapes |= {
            f"{layer}.mlp.{name}_proj": (64, 128) if name == "down" else (128, 64) for name in ("gate", "up", "down")
        }
    tensors = {}
    for name, shape in shapes.items():
        values = mx.random.normal(shape, key=next(draw)).astype(mx.float16)
        if how is None:
            tensors[f"{name}.weight"] = values
            continue
        parts = mx.quantize(values, group_size=how["group_size"], bits=how["bits"])
        if "embed" in name:
            scales = mx.abs(values).reshape(96, 2, 32).max(axis=-1) / 127
            steps = mx.round(values.reshape(96, 2, 32) / scales[..., None]).astype(mx.int32) + 128
            parts = (steps.astype(mx.uint8).reshape(96, 64).view(mx.uint32), scales, -128 * scales)
        tensors |= {f"{name}.{part}": each for part, each in zip(("weight", "scales", "biases"), parts, strict=True)}
    norms = ["model.norm", *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention"))]
    tensors |= {f"{name}.weight": mx.random.normal((64,), key=next(draw)).astype(mx.float16) for name in norms}
    directory.mkdir()
    mx.save_safetensors(str(directory / "model.safetensors"), tensors)
    config = LLAMA | changes
    if how is not None:
        config["quantization"] = {**how, "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def widened(directory: Path) -> dict[str, np.ndarray]:
    """A directory's weights as MLX reads them, in float32."""
    stored = mx.load(str(directory / "model.safetensors"))
    how = json.loads((directory / "config.json").read_text()).get("quantization", {})
    found = {}
    for name, values in stored.items():
        layer = name.removesuffix(".weight")
        if values.dtype == mx.uint32:
            own = how.get(layer, how)
            parts = (stored[f"{layer}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            values = mx.dequantize(values, *parts, group_size=own["group_size"], bits=own["bits"])
        if not name.endswith((".scales", ".biases")):
            found[layer] = np.array(values.astype(mx.float32))
    return found


def copied(directory: Path, to: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], set[str]]:
    """Writes a directory as GGUF. Returns its tensors in float32, its fields, and the types of its matrices."""
    gguf_copy.write(directory, to)
    reader = gguf.GGUFReader(to)
    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}
    numbers = {name: gguf.dequantize(tensor.data, tensor.tensor_type) for name, tensor in tensors.items()}
    fields = {name.split(".", 1)[-1]: field.contents() for name, field in reader.fields.items()}
    return numbers, fields, {tensor.tensor_type.name for tensor in tensors.values() if tensor.data.ndim > 1}


@pytest.mark.parametrize(
    ("precision", "kind"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32"), ("4bit", "Q4_1")]
)
def test_an_openelm_has_the_same_numbers(precision: str, kind: str, tmp_path: Path) -> None:
    config = scaled_config(320, model_dim=128, head_dim=64, ffn_dim_divisor=64)
    directory = write_seeded(config, tmp_path / "model", precision)
    found, fields, kinds = copied(directory, tmp_path / "a.gguf")
    assert kinds == {kind}
    expected = widened(directory)
    for layer in range(config.num_layers):
        ours, theirs = f"transformer.layers.{layer}", f"blk.{layer}"
        gate, up = np.split(expected[f"{ours}.ffn.proj_1"], 2)
        pairs = {
            "attn_norm": expected[f"{ours}.attn_norm"], "attn_qkv": expected[f"{ours}.attn.qkv_proj"],
            "attn_q_norm": expected[f"{ours}.attn.q_norm"], "attn_k_norm": expected[f"{ours}.attn.k_norm"],
            "attn_output": expected[f"{ours}.attn.out_proj"], "ffn_norm": expected[f"{ours}.ffn_norm"],
            "ffn_gate": gate, "ffn_up": up, "ffn_down": expected[f"{ours}.ffn.proj_2"],
        }  # fmt: skip
        for name, values in pairs.items():
            np.testing.assert_array_equal(found.pop(f"{theirs}.{name}"), values, err_msg=name)
    np.testing.assert_array_equal(found.pop("token_embd"), expected["transformer.token_embeddings"])
    np.testing.assert_array_equal(found.pop("output_norm"), expected["transformer.norm"])
    assert not found
    assert fields["feed_forward_length"] == list(config.ffn_dims)
    assert fields["attention.head_count"] == list(config.num_query_heads)
    assert fields["attention.head_count_kv"] == list(config.num_kv_heads)
    assert (fields["architecture"], fields["vocab_size"], fields["block_count"]) == ("openelm", 320, 3)
    assert fields["rope.dimension_count"] == fields["attention.key_length"] == config.head_dim
    assert fields["attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)


@pytest.mark.parametrize("how", [None, {"group_size": 32, "bits": 4}, {"group_size": 64, "bits": 4}])
def test_a_llama_has_the_same_numbers_with_heads_for_ropes_of_neighbours(
    how: dict[str, Any] | None, tmp_path: Path
) -> None:
    directory = write_llama(tmp_path / "model", how)
    found, fields, kinds = copied(directory, tmp_path / "a.gguf")
    assert kinds == ({"F16"} if how is None else {"Q4_1", "Q8_0"})
    expected = widened(directory)
    np.testing.assert_array_equal(found["token_embd"], expected["model.embed_tokens"])
    layer = "model.layers.1"
    for name, heads in (("q", 4), ("k", 2)):  # 16 rows a head: 0, 8, 1, 9, …
        rows = expected[f"{layer}.self_attn.{name}_proj"]
        order = [16 * head + half + 8 * part for head in range(heads) for half in range(8) for part in (0, 1)]
        np.testing.assert_array_equal(found[f"blk.1.attn_{name}"], rows[order])
    names = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate"}
    names |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm"}
    for ours, theirs in names.items():
        np.testing.assert_array_equal(found[f"blk.1.{theirs}"], expected[f"{layer}.{ours}"], err_msg=ours)
    assert len(found) == len(expected)
    assert (fields["attention.head_count"], fields["attention.head_count_kv"]) == (4, 2)
    assert fields["rope.freq_base"] == 1e4 and fields["rope.dimension_count"] == 16


def test_what_would_round_is_refused(tmp_path: Path) -> None:
    for name, how, changes, reason in (
        ("mistral", None, {"model_type": "mistral"}, "of OpenELMs, and of Llamas"),
        ("scaled", None, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "without scaled RoPE"),
        ("3bit", {"group_size": 32, "bits": 3}, {}, "no type for the same 3-bit weights"),
        ("8bit", {"group_size": 32, "bits": 8}, {}, "no type for the same 8-bit weights"),
        ("mode", {"group_size": 32, "bits": 4, "mode": "mxfp4"}, {}, "the way in which it is quantized"),
    ):
        with pytest.raises(Refused, match=reason):
            gguf_copy.write(write_llama(tmp_path / name, how, **changes), tmp_path / "a.gguf")
    fine, huge = (np.array([[value]], np.float32) for value in (0.5, 1e6))
    assert gguf_copy.halved("F32", fine) == 0.5
    for dtype, values in (
        ("F32", huge),
        ("F32", np.array([[0.1]], np.float32)),
        ("BF16", np.array([[0x0101]], np.uint16)),
    ):
        with pytest.raises(Refused, match="not float16 numbers"):
            gguf_copy.halved(dtype, values)
