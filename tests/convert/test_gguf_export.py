"""Models as GGUF files, read back by the `gguf` package: the same numbers as MLX's, and what it cost where not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import family_cases
import gguf
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import save_pt, save_tokenizer, tiny, weights
from tiny import scaled_config

from elm_mlx.bench.measured_models import write_seeded
from elm_mlx.errors import ElmError, InputError
from elm_mlx.files import new_file
from elm_mlx_convert import export_gguf, gguf_weights
from elm_mlx_convert.gguf_export import modelfile_text

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 96, "rope_theta": 1e4,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def write_llama(
    directory: Path, how: dict[str, Any] | None = None, dtype: mx.Dtype = mx.float16, **changes: Any
) -> Path:
    """A random Llama; quantized where `how` is given, the embedding as a Q8_0 would be."""
    draw = iter(mx.random.split(mx.random.key(0), 99))
    config = LLAMA | changes
    ffn = config["intermediate_size"]
    shapes = {"model.embed_tokens": (96, 64)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.self_attn.{name}_proj": (64 if name in "qo" else 32, 64) for name in "qkvo"}
        shapes |= {
            f"{layer}.mlp.{name}_proj": (64, ffn) if name == "down" else (ffn, 64) for name in ("gate", "up", "down")
        }
    tensors = {}
    for name, shape in shapes.items():
        values = mx.random.normal(shape, key=next(draw)).astype(dtype)
        if how is None:
            tensors[f"{name}.weight"] = values
            continue
        parts = mx.quantize(values, **how)
        if "embed" in name:
            scales = mx.abs(values).reshape(96, 2, 32).max(axis=-1) / 127
            steps = mx.round(values.reshape(96, 2, 32) / scales[..., None]).astype(mx.int32) + 128
            parts = (steps.astype(mx.uint8).reshape(96, 64).view(mx.uint32), scales, -128 * scales)
        tensors |= {f"{name}.{part}": each for part, each in zip(("weight", "scales", "biases"), parts, strict=False)}
    norms = ["model.norm", *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention"))]
    tensors |= {f"{name}.weight": mx.random.normal((64,), key=next(draw)).astype(dtype) for name in norms}
    directory.mkdir()
    mx.save_safetensors(str(directory / "model.safetensors"), tensors)
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
            own = {key: value for key, value in how.get(layer, how).items() if "." not in key}
            scales = stored[f"{layer}.scales"]
            biases = stored.get(f"{layer}.biases")
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            values = mx.dequantize(values, scales, biases, **own)
        if not name.endswith((".scales", ".biases")):
            found[layer] = np.array(values.astype(mx.float32))
    return found


def exported(directory: Path, to: Path, **how: Any) -> tuple[dict[str, np.ndarray], dict[str, Any], set[str], Any]:
    """Writes a directory as GGUF. Returns its tensors in float32, its fields, its matrices' types, and the result."""
    done = export_gguf(directory, to, **how)
    reader = gguf.GGUFReader(to)
    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}
    numbers = {name: gguf.dequantize(tensor.data, tensor.tensor_type) for name, tensor in tensors.items()}
    fields = {name.split(".", 1)[-1]: field.contents() for name, field in reader.fields.items()}
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    assert kinds == set(done.types)
    return numbers, fields, kinds, done


@pytest.mark.parametrize(
    ("precision", "kind"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32"), ("4bit", "Q4_1")]
)
def test_an_openelm_has_the_same_numbers(precision: str, kind: str, tmp_path: Path) -> None:
    config = scaled_config(320, model_dim=128, head_dim=64, ffn_dim_divisor=64)
    directory = write_seeded(config, tmp_path / "model", precision)
    found, fields, kinds, done = exported(directory, tmp_path / "a.gguf", verify=True)
    assert kinds == {kind}
    assert not done.roundings
    assert (done.verified.values, done.verified.largest) == (config.parameters, 0)
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
    assert fields["file_type"] == gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"]


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        (None, "F16"),
        ({"group_size": 32, "bits": 4}, "Q4_1"),
        ({"group_size": 64, "bits": 4}, "Q4_1"),
        ({"group_size": 64, "bits": 3}, "Q4_1"),
        ({"group_size": 32, "bits": 2}, "Q4_1"),
        ({"group_size": 64, "bits": 5}, "Q5_1"),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "MXFP4"),
    ],
)
def test_a_llama_has_the_same_numbers_with_heads_for_ropes_of_neighbours(
    how: dict[str, Any] | None, kind: str, tmp_path: Path
) -> None:
    directory = write_llama(tmp_path / "model", how)
    found, fields, kinds, done = exported(directory, tmp_path / "a.gguf", verify=True)
    assert kinds == ({kind} if how is None else {kind, "Q8_0"})
    assert not done.roundings
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
    assert fields["rope.freq_base"] == 1e4
    assert fields["rope.dimension_count"] == 16


@pytest.mark.parametrize("bits", [6, 8])
def test_what_has_no_type_is_rounded_and_the_cost_is_what_a_reader_finds(bits: int, tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "model", {"group_size": 32, "bits": bits})
    found, _, kinds, done = exported(directory, tmp_path / "a.gguf", verify=True)
    assert kinds == {"Q8_0"}
    (rounding,) = done.roundings
    assert (rounding.before, rounding.after) == (f"{bits} bits in groups of 32", "Q8_0")
    expected = widened(directory)
    worst = 0.0
    for ours, theirs in (("v_proj", "attn_v"), ("o_proj", "attn_output")):
        values = expected[f"model.layers.0.self_attn.{ours}"]
        worst = max(worst, np.abs(found[f"blk.0.{theirs}"] - values).max())
    assert 0 < worst <= rounding.largest < 0.02
    assert 0 < rounding.total / rounding.values < rounding.largest
    assert rounding.largest == done.verified.largest
    assert rounding.total == pytest.approx(done.verified.total)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"])
@pytest.mark.parametrize("how", [None, {"group_size": 64, "bits": 4}])
def test_every_type_of_a_model_of_floats_and_of_a_packed_one(
    kind: str, how: dict[str, Any] | None, tmp_path: Path
) -> None:
    directory = write_llama(tmp_path / "model", how)
    found, _, kinds, done = exported(directory, tmp_path / "a.gguf", kind=kind, verify=True)
    assert kinds == {kind.upper()}
    expected = widened(directory)
    bound = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 200, "q4_1": 1 / 12, "q4_0": 1 / 8}[kind]
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up")):
        values = expected[f"model.layers.0.{ours}"]
        assert np.abs(found[f"blk.0.{theirs}"] - values).max() <= bound * np.abs(values).max()
    assert bool(done.roundings) == (kind != "f32" and not (kind == "f16" and how is None))


def test_rows_that_no_blocks_fill_are_written_in_f16(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "model", intermediate_size=72)
    _, _, kinds, done = exported(directory, tmp_path / "a.gguf", kind="q8_0", verify=True)
    assert kinds == {"Q8_0", "F16"}
    assert any("2 matrices have rows that no blocks of 32 fill" in note for note in done.notes)


def test_scales_that_float16_has_not_are_rounded_or_refused(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "small", {"group_size": 32, "bits": 4}, mx.bfloat16)
    edit(directory, "model.layers.0.mlp.up_proj.scales", lambda scales: scales * 3e-7)
    _, _, _, done = exported(directory, tmp_path / "a.gguf", verify=True)
    (rounding,) = done.roundings
    assert (rounding.before, rounding.after) == ("4 bits in groups of 32", "Q4_1")
    assert 0 < rounding.largest < 2e-6
    edit(directory, "model.layers.0.mlp.up_proj.scales", lambda scales: scales * 1e30)
    with pytest.raises(InputError, match=r"up_proj\.weight has scales that overflow float16"):
        export_gguf(directory, tmp_path / "b.gguf")
    with pytest.raises(InputError, match="too large for f16"):
        export_gguf(directory, tmp_path / "b.gguf", kind="f16")
    assert not (tmp_path / "b.gguf").exists()
    assert not export_gguf(directory, tmp_path / "b.gguf", kind="f32").roundings


def edit(directory: Path, name: str, change: Any) -> None:
    file = str(directory / "model.safetensors")
    tensors = dict(mx.load(file))
    tensors[name] = change(tensors[name])
    mx.eval(tensors)
    mx.save_safetensors(file, tensors)


@pytest.mark.parametrize("how", [None, {"group_size": 32, "bits": 4}])
def test_what_is_no_number_is_refused(how: dict[str, Any] | None, tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "model", how)
    name = "model.layers.0.mlp.up_proj." + ("weight" if how is None else "scales")
    edit(directory, name, lambda values: values * mx.array(float("nan"), values.dtype))
    for kind in ("as-stored", "f32", "q4_0"):
        with pytest.raises(InputError, match=r"up_proj\.weight h|ffn_up\.weight h"):
            export_gguf(directory, tmp_path / "a.gguf", kind=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight", lambda values: values.reshape(-1), "is not packed as config.json says"),
        ("scales", lambda values: values[0], "is not packed as config.json says"),
        ("scales", lambda values: values[:, :1], r"scales of the shape \(128, 1\), and \(128, 2\) is needed"),
        ("weight", lambda values: values[:, :4], r"scales of the shape \(128, 2\), and \(128, 1\) is needed"),
        ("weight", lambda values: values.astype(mx.int32), r"is needed|weights must be"),
    ],
)
def test_packed_weights_that_do_not_fit_are_refused(name: str, change: Any, message: str, tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "model", {"group_size": 32, "bits": 4})
    edit(directory, f"model.layers.1.mlp.up_proj.{name}", change)
    with pytest.raises(InputError, match=message):
        export_gguf(directory, tmp_path / "a.gguf")


def test_a_pytorch_checkpoint_is_exported_as_its_directory_is(tmp_path: Path) -> None:
    config = tiny()
    save_tokenizer(tmp_path / "in", 320)
    source = save_pt(tmp_path / "in" / "first.pt", weights(config))
    found, _, kinds, done = exported(source, tmp_path / "a.gguf")
    assert kinds == {"F32"}
    np.testing.assert_array_equal(found["token_embd"], weights(config)["transformer.token_embeddings.weight"])
    assert done.parameters == config.parameters


def test_a_head_that_is_the_embedding_is_written_twice_where_llama_cpp_wants_it(tmp_path: Path) -> None:
    directory = family_cases.write(tmp_path / "model", "olmo2, yarn")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    file = str(directory / "model.safetensors")
    mx.save_safetensors(file, {k: mx.array(np.array(v)) for k, v in mx.load(file).items() if k != "lm_head.weight"})
    found, *_ = exported(directory, tmp_path / "a.gguf", verify=True)
    np.testing.assert_array_equal(found["output"], found["token_embd"])


def test_a_file_that_is_there_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    directory, to = write_llama(tmp_path / "model"), tmp_path / "a.gguf"
    export_gguf(directory, to)
    before = to.read_bytes()
    with pytest.raises(InputError, match="exists already; pass --overwrite"):
        export_gguf(directory, to, kind="f32")
    assert to.read_bytes() == before
    export_gguf(directory, to, overwrite=True)
    assert to.read_bytes() == before  # equal models give equal bytes
    with pytest.raises(InputError, match="is the source"):
        export_gguf(directory, directory / "model.safetensors", overwrite=True)


def test_a_file_that_the_disk_damages_is_found_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_llama(tmp_path / "model")
    written = gguf_weights._blocks

    def damaged(made: Any, weight: Any, part: Any, kind: str) -> Any:
        for data in written(made, weight, part, kind):
            yield data if part.name != "blk.1.ffn_down.weight" else np.roll(data, 1, axis=0)

    monkeypatch.setattr(gguf_weights, "_blocks", damaged)
    with pytest.raises(ElmError, match=r"verification failed: blk\.1\.ffn_down\.weight differs from its source"):
        export_gguf(directory, tmp_path / "a.gguf", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Of a matrix of 64 MB, some megabytes at a time."""
    import tracemalloc

    rows = 1 << 17
    directory = write_llama(tmp_path / "model", vocab_size=rows)
    edit(directory, "model.embed_tokens.weight", lambda values: mx.random.normal((rows, 64)))
    tracemalloc.start()
    try:
        with new_file(tmp_path / "unused"):
            export_gguf(directory, tmp_path / "a.gguf", kind="q4_0", verify=True)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_a_modelfile_names_the_file_the_context_and_the_end_tokens(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "in", 320)
    source = save_pt(tmp_path / "in" / "first.pt", weights(tiny()))
    done = export_gguf(source, tmp_path / "a.gguf", modelfile=True)
    assert done.modelfile == tmp_path / "Modelfile"
    assert done.modelfile.read_text().splitlines() == [
        "FROM ./a.gguf", "PARAMETER num_ctx 2048", 'PARAMETER stop "</s>"', 'TEMPLATE "{{ .Prompt }}"'
    ]  # fmt: skip
    with pytest.raises(InputError, match="Modelfile: exists already"):
        export_gguf(source, tmp_path / "b.gguf", modelfile=True)
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize(
    ("piece", "line"),
    [("<end>", '"<end>"'), ("<\\s>", '"<\\s>"'), ('<"end">', '"""<"end">"""'), ("Ende ä", '"Ende ä"')],
)
def test_a_modelfile_has_no_escapes(piece: str, line: str) -> None:
    """As Ollama reads none: quotes are within three quotes."""

    class Pieces:
        def piece_of(self, token: int) -> str:
            return piece

    vocabulary: Any = SimpleNamespace(tokenizer=Pieces(), end_ids=(0,))
    assert modelfile_text("a.gguf", tiny(), vocabulary, chats=True).splitlines()[2] == f"PARAMETER stop {line}"
