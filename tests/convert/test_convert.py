"""A whole conversion: every source to the same directory, atomic, repeatable, and refused where it must be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_files
from checkpoints import (
    VARIANTS,
    Weights,
    bfloat16,
    corenet,
    made,
    read,
    save_hub,
    save_pt,
    save_tokenizer,
    save_yaml,
    snapshot,
    tensors,
    tiny,
    weights,
)

from elm_mlx.errors import InputError
from elm_mlx.model.config import ModelConfig
from elm_mlx.text.chat_template import OPENELM_INSTRUCT_JINJA
from elm_mlx_convert import convert
from elm_mlx_convert.tensors import cast
from elm_mlx_convert.torch_files import load

ROOT = Path(__file__).parents[2]
CLASSICS = ROOT.parent / "shared" / "data" / "classics"

CONFIG = tiny()
WEIGHTS = weights(CONFIG)


def check_values(directory: Path, expected: Weights, to: Callable[[np.ndarray], np.ndarray] = bfloat16) -> None:
    found = read(directory)
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], to(values), err_msg=name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A float32 CoreNet checkpoint with its tokenizer of 300 pieces beside it."""
    save_tokenizer(tmp_path / "in")
    return save_pt(tmp_path / "in" / "model.pt", WEIGHTS)


def test_a_checkpoint_becomes_a_directory(tmp_path: Path, source: Path) -> None:
    seen: list[str] = []
    done = convert(source, tmp_path / "out", verify=True, on_plan=lambda plan: seen.append(plan.dtype))
    assert seen == ["bfloat16"]
    files = ["config.json", "conversion.json", "model.safetensors"]
    files += ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    cut = {n: v[:300] if n.startswith("transformer.token") else v for n, v in WEIGHTS.items()}
    check_values(tmp_path / "out", cut)
    config = ModelConfig.load(tmp_path / "out" / "config.json")
    assert config.vocab_size == 300 and config.num_query_heads == CONFIG.num_query_heads
    assert done.plan.dropped_rows == 20
    assert "dropped 20 rows of the embedding, past the tokenizer's 300 pieces" in done.plan.notes
    assert done.warnings == () and done.destination == tmp_path / "out"
    assert [d.group for d in done.differences] == ["embedding", "attention", "ffn", "norms"]


def test_the_record_says_where_it_came_from(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    (file,) = record["source"]["files"]
    assert file == {
        "name": "model.pt",
        "bytes": source.stat().st_size,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }
    assert record["dtype"] == {"source": "float32", "written": "bfloat16"}
    assert record["dropped_vocabulary_rows"] == 20
    assert record["tool"].startswith("elm-mlx ")
    assert str(tmp_path) not in json.dumps(record)


def test_equal_input_gives_equal_bytes(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "a")
    convert(source, tmp_path / "b" / "c")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b" / "c")


def sources(tmp_path: Path) -> dict[str, Path]:
    """The same weights in every kind of source."""
    wrapped = {
        f"module._orig_mod.{name.replace('attn.', 'attn._fsdp_wrapped_module.')}": t
        for name, t in tensors(corenet(WEIGHTS)).items()
    }
    nested = {"model_state_dict": tensors(corenet(WEIGHTS)), "epoch": 1}
    hub = save_hub(tmp_path / "hub", CONFIG, WEIGHTS)
    with_buffers = tensors(corenet(WEIGHTS))
    with_buffers["layers.0.attn.pos_embedding.inv_freq"] = torch_files.tensor(np.ones(4, np.float32))
    saved_twice = tensors(corenet(WEIGHTS))
    saved_twice["classifier.weight"] = saved_twice["token_embeddings.weight"]
    transposed = tensors(corenet(WEIGHTS))
    name = "layers.1.ffn.proj_1.weight"
    values = corenet(WEIGHTS)[name]
    transposed[name] = torch_files.tensor(values.T.copy()).part(0, values.shape, (1, values.shape[0]))
    return {
        "plain": save_pt(tmp_path / "plain" / "a.pt", WEIGHTS),
        "legacy": save_pt(tmp_path / "legacy" / "a.pt", WEIGHTS, legacy=True),
        "wrapped": torch_files.save(made(tmp_path / "wrapped") / "a.pt", wrapped),
        "nested": torch_files.save(made(tmp_path / "nested") / "a.pt", nested),
        "buffers": torch_files.save(made(tmp_path / "buffers") / "a.pt", with_buffers),
        "saved twice": torch_files.save(made(tmp_path / "twice") / "a.pt", saved_twice),
        "transposed": torch_files.save(made(tmp_path / "transposed") / "a.pt", transposed),
        "hub": hub,
        "bin": torch_files.save(made(tmp_path / "bin") / "pytorch_model.bin", tensors(WEIGHTS)).parent,
    }


def test_every_kind_of_source_gives_the_same_weights(tmp_path: Path) -> None:
    for kind, path in sources(tmp_path).items():
        out = tmp_path / f"out {kind}"
        convert(path, out)
        check_values(out, WEIGHTS)
        assert ModelConfig.load(out / "config.json").shapes() == CONFIG.shapes()


def test_an_mlx_directory_goes_through_again(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    a, b = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert a.pop("conversion.json") != b.pop("conversion.json")
    assert a == b
    convert(tmp_path / "a", tmp_path / "c", dtype="float32", verify=True)
    assert all(values.dtype == np.float32 for values in read(tmp_path / "c").values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(tmp_path: Path, variant: str) -> None:
    config = tiny(**VARIANTS[variant])
    made = weights(config)
    head_dim = None if config.normalize_qk_projections else 8
    done = convert(save_pt(tmp_path / "a.pt", made), tmp_path / "out", head_dim=head_dim, verify=True)
    check_values(tmp_path / "out", made)
    written = ModelConfig.load(tmp_path / "out" / "config.json")
    assert written.shapes() == config.shapes()
    assert any("mlx-lm cannot express" in warning for warning in done.warnings) == (not config.ffn_with_glu)


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        ("float32", None, "bfloat16"),
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("float32", "float32", "float32"),
        ("float32", "float16", "float16"),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "float16", "float16"),
        ("float64", None, "bfloat16"),
    ],
)
def test_types(tmp_path: Path, stored: str, asked: str | None, written: str) -> None:
    path = save_pt(tmp_path / "a.pt", WEIGHTS, stored)
    done = convert(path, tmp_path / "out", dtype=asked, verify=True)
    assert (done.plan.source_dtype, done.plan.dtype) == (stored, written)

    def expected(values: np.ndarray) -> np.ndarray:
        as_stored = bfloat16(values) if stored == "bfloat16" else values.astype(stored)
        return cast(as_stored, stored, written)

    check_values(tmp_path / "out", WEIGHTS, expected)


def test_a_mixture_follows_what_most_values_have(tmp_path: Path) -> None:
    mixed = tensors(corenet(WEIGHTS), "float16")
    norms = {name: t for name, t in tensors(corenet(WEIGHTS)).items() if name.endswith("norm.weight")}
    path = torch_files.save(tmp_path / "a.pt", mixed | norms)
    assert convert(path, tmp_path / "out").plan.dtype == "float16"


def wide(**fields: Any) -> ModelConfig:
    """As wide as the 3B, with little else of it."""
    return ModelConfig.scaled(
        vocab_size=8, num_layers=1, model_dim=3072, head_dim=128, num_gqa_groups=1,
        qkv_multipliers=0.05, ffn_multipliers=0.01, ffn_dim_divisor=2, **fields,
    )  # fmt: skip


def test_float16_is_refused_for_a_3b_and_never_chosen(tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", weights(wide()), "float16")
    with pytest.raises(InputError, match="as wide as the 3B overflow float16; use bfloat16 or float32"):
        convert(path, tmp_path / "out", dtype="float16")
    done = convert(path, tmp_path / "out")
    assert done.plan.dtype == "bfloat16" and any("activations" in note for note in done.plan.notes)


def test_values_that_overflow_leave_everything_as_it_was(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    before = snapshot(tmp_path)
    large = WEIGHTS | {"transformer.norm.weight": WEIGHTS["transformer.norm.weight"] * 1e6}
    path = save_pt(tmp_path / "in" / "large.pt", large)
    with pytest.raises(InputError, match=r"transformer\.norm\.weight holds values up to .*: use --dtype bfloat16"):
        convert(path, tmp_path / "out", dtype="float16", overwrite=True)
    path.unlink()
    assert snapshot(tmp_path) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]


def test_values_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    odd = WEIGHTS["transformer.norm.weight"].copy()
    odd[3] = np.nan
    done = convert(save_pt(tmp_path / "a.pt", WEIGHTS | {"transformer.norm.weight": odd}), tmp_path / "out")
    assert done.warnings[-1] == "NaN or infinite values in 'transformer.norm.weight'"


# Adapters


def with_adapters(dora: bool = False) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    made: dict[str, np.ndarray] = {}
    for name, values in corenet(WEIGHTS).items():
        module = name.removesuffix(".weight")
        if "norm" in name:
            made[name] = values
            continue
        made[f"{module}.base_layer.weight"] = values
        rows, columns = values.shape
        a = random.standard_normal((4, rows if "embed" in name else columns)).astype(np.float32)
        b = random.standard_normal((columns if "embed" in name else rows, 4)).astype(np.float32) * np.float32(0.1)
        if "embed" in name:
            made |= {f"{module}.lora_embedding_A.lora": a, f"{module}.lora_embedding_B.lora": b}
            continue
        made |= {f"{module}.lora_A.lora.weight": a, f"{module}.lora_B.lora.weight": b}
        if dora:
            made[f"{module}.lora_magnitude_vector.lora"] = np.abs(random.standard_normal(rows)).astype(np.float32)
    return made


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_merged_and_the_head_untied(tmp_path: Path, dora: bool) -> None:
    adapted = with_adapters(dora)
    path = torch_files.save(tmp_path / "a.pt", tensors({f"module.{name}": v for name, v in adapted.items()}))
    with pytest.raises(InputError, match="pass --lora-alpha"):
        convert(path, tmp_path / "out")
    done = convert(path, tmp_path / "out", lora_alpha=8, dtype="float32", verify=True)
    assert not done.plan.config.share_input_output_layers
    found = read(tmp_path / "out")
    base = adapted["token_embeddings.base_layer.weight"]
    np.testing.assert_array_equal(found["lm_head.weight"], base)
    a, b = adapted["token_embeddings.lora_embedding_A.lora"], adapted["token_embeddings.lora_embedding_B.lora"]
    np.testing.assert_allclose(found["transformer.token_embeddings.weight"], base + 2 * a.T @ b.T, rtol=1e-5, atol=1e-5)
    module = "layers.2.ffn.proj_1"
    merged = adapted[f"{module}.base_layer.weight"] + 2 * (
        adapted[f"{module}.lora_B.lora.weight"] @ adapted[f"{module}.lora_A.lora.weight"]
    )
    if dora:
        length = np.linalg.norm(merged, axis=1, keepdims=True)
        merged = merged / length * adapted[f"{module}.lora_magnitude_vector.lora"][:, None]
    np.testing.assert_allclose(found[f"transformer.{module}.weight"], merged, rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["merged_adapter"] == {"alpha": 8, "rank_stabilised": False}


def test_alpha_from_the_yaml_and_where_there_is_no_adapter(tmp_path: Path, source: Path) -> None:
    path = torch_files.save(made(tmp_path / "l") / "a.pt", tensors(with_adapters()))
    lora = "  lora:\n    config:\n      - params: {lora_alpha: 8, r: 4}\n"
    save_yaml(tmp_path / "l" / "config.yaml", "mine", 320, more=lora)
    convert(path, tmp_path / "a")
    convert(path, tmp_path / "b", lora_alpha=8)
    assert read(tmp_path / "a").keys() == read(tmp_path / "b").keys()
    for name, values in read(tmp_path / "a").items():
        np.testing.assert_array_equal(values, read(tmp_path / "b")[name])
    with pytest.raises(InputError, match=r"--lora-alpha is for a LoRA or DoRA checkpoint, and model\.pt holds no"):
        convert(source, tmp_path / "c", lora_alpha=8)
    with pytest.raises(InputError, match="--lora-alpha is nan"):
        convert(path, tmp_path / "c", lora_alpha=float("nan"))


# Tokenizers


def test_without_a_tokenizer_it_works_and_warns(tmp_path: Path) -> None:
    done = convert(save_pt(tmp_path / "a.pt", WEIGHTS), tmp_path / "out")
    assert "no tokenizer" in done.warnings[0] and done.plan.dropped_rows == 0
    assert not list((tmp_path / "out").glob("tokenizer*"))
    check_values(tmp_path / "out", WEIGHTS)


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", WEIGHTS)
    file = save_tokenizer(tmp_path / "tokenizer")
    for given in (file, str(file), file.parent):
        convert(path, tmp_path / "out", tokenizer=given, overwrite=True)
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == file.read_bytes()


def test_a_tokenizer_with_more_pieces_than_rows(tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", weights(tiny(vocab_size=299)))
    with pytest.raises(InputError, match="has 300 pieces, but the model's embedding has 299 rows"):
        convert(path, tmp_path / "out", tokenizer=save_tokenizer(tmp_path / "tokenizer"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_far_fewer(tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", weights(tiny(vocab_size=400)))
    done = convert(path, tmp_path / "out", tokenizer=save_tokenizer(tmp_path / "tokenizer"))
    assert "100 rows are more than padding" in done.warnings[0]


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_were_added_beside_the_tokenizer_are_missed_aloud(tmp_path: Path, name: str) -> None:
    source = save_hub(tmp_path / "source", tiny(vocab_size=302), weights(tiny(vocab_size=302)))
    save_tokenizer(source)
    added = {"<|im_start|>": 300, "<|im_end|>": 301, "[PAD]": 302}  # the last has no row
    by_number = {str(number): {"content": text} for text, number in added.items()}
    said = added if name == "added_tokens.json" else {"added_tokens_decoder": by_number}
    (source / name).write_text(json.dumps(said))
    done = convert(source, tmp_path / "out")
    (warning,) = done.warnings
    assert warning.startswith("'<|im_start|>', '<|im_end|>' of the rows that were dropped are tokens that were added")


def test_an_untied_head_loses_the_same_rows(tmp_path: Path) -> None:
    config = tiny(share_input_output_layers=False)
    path = save_pt(tmp_path / "a.pt", weights(config))
    convert(path, tmp_path / "out", tokenizer=save_tokenizer(tmp_path / "tokenizer"), verify=True)
    assert read(tmp_path / "out")["lm_head.weight"].shape == (300, 48)


def test_how_the_source_likes_to_be_sampled_is_kept(tmp_path: Path) -> None:
    hub = save_hub(tmp_path / "hub", CONFIG, WEIGHTS)
    (hub / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    convert(hub, tmp_path / "a")
    kept = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert kept == {"temperature": 0.7, "do_sample": True}


def test_the_sources_chat_template_is_kept(tmp_path: Path) -> None:
    hub = save_hub(tmp_path / "hub", CONFIG, WEIGHTS)
    save_tokenizer(hub)
    (hub / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from json"}))
    convert(hub, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())["chat_template"] == "from json"
    (hub / "chat_template.jinja").write_text("from file")
    convert(hub, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"] == "from file"


def test_an_instruct_model_gets_the_template_that_its_name_says(tmp_path: Path) -> None:
    hub = save_hub(tmp_path / "OpenELM-270M-Instruct", CONFIG, WEIGHTS)
    save_tokenizer(hub)

    def written(name: str, **options: str) -> object:
        done = convert(hub, tmp_path / name, **options)
        template = json.loads((tmp_path / name / "tokenizer_config.json").read_text()).get("chat_template")
        assert any("chat template" in note for note in done.plan.notes) == (not options)
        return template

    assert written("by name") == OPENELM_INSTRUCT_JINJA
    assert written("without", chat_template="none") is None
    (tmp_path / "own.jinja").write_text("my own")
    assert written("own", chat_template=str(tmp_path / "own.jinja")) == "my own"
    with pytest.raises(InputError, match="not a chat template"):
        convert(hub, tmp_path / "refused", chat_template="alpaca")
    assert not (tmp_path / "refused").exists()


# The real one


@pytest.mark.skipif(not CLASSICS.is_dir(), reason=f"{CLASSICS} is not here")
@pytest.mark.parametrize("given", ["checkpoint_average.pt", "."])
def test_the_classics(tmp_path: Path, given: str) -> None:
    done = convert(CLASSICS / given, tmp_path / "out", verify=True)
    training = json.loads((CLASSICS / "training.json").read_text())
    facts = training["model"] | {"vocab_size": training["vocab_size"], "max_context_length": 512}
    expected = ModelConfig.from_dict(facts)
    assert done.plan.parameters == training["parameters"]
    assert done.plan.config.shapes() == expected.shapes()
    for name in ("num_query_heads", "num_kv_heads", "max_context_length", "rope_max_length", "head_dim"):
        assert getattr(done.plan.config, name) == getattr(expected, name)
    tree = {f"transformer.{name}": t.read() for name, t in load(CLASSICS / "checkpoint_average.pt").items()}
    found = read(tmp_path / "out")
    assert found.keys() == tree.keys()
    for name, values in tree.items():
        np.testing.assert_array_equal(found[name], bfloat16(values), err_msg=name)
