"""Adapters of PEFT and CoreNet, in files made by code, against the weights that their formulas give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch_files
from safetensors.numpy import load_file, save_file

from elm_mlx.adapters import EMBEDDING, Adapter
from elm_mlx.config import ModelConfig
from elm_mlx.errors import InputError
from elm_mlx_convert import read_corenet, read_peft, write_peft
from elm_mlx_convert.adapters import Scaling, merge
from elm_mlx_convert.sources import open_source

Arrays = dict[str, np.ndarray]

CONFIG = checkpoints.tiny()
UNTIED = checkpoints.tiny(share_input_output_layers=False)
QKV, OUT = "transformer.layers.0.attn.qkv_proj", "transformer.layers.2.attn.out_proj"


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def shape(module: str, config: ModelConfig = CONFIG) -> tuple[int, ...]:
    return config.shapes()[f"{module}.weight"]


def peft_tensors(ranks: dict[str, int], dora: bool = False) -> Arrays:
    """By the names that `PeftModel.save_pretrained` writes."""
    tensors: Arrays = {}
    for module, rank in ranks.items():
        (rows, columns), stem = shape(module), f"base_model.model.{module}"
        if module == EMBEDDING:
            tensors |= {f"{stem}.lora_embedding_A": draw(rank, rows), f"{stem}.lora_embedding_B": draw(columns, rank)}
            tensors[f"{stem}.base_layer.weight"] = draw(rows, columns)  # PEFT saves an adapted embedding whole
        else:
            tensors |= {f"{stem}.lora_A.weight": draw(rank, columns), f"{stem}.lora_B.weight": draw(rows, rank)}
        if dora:
            tensors[f"{stem}.lora_magnitude_vector"] = np.abs(draw(rows))
    return tensors


def peft_directory(path: Path, tensors: Arrays, binary: bool = False, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none", **config}
    (path / "adapter_config.json").write_text(json.dumps(values))
    if binary:
        torch_files.save(path / "adapter_model.bin", {n: torch_files.tensor(t) for n, t in tensors.items()})
    else:
        save_file(tensors, path / "adapter_model.safetensors")
    return path


def delta(adapter: Adapter, arrays: Arrays, module: str) -> np.ndarray:
    """What is added to the module's weight."""
    product = adapter.scale * arrays[f"{module}.lora_a"] @ arrays[f"{module}.lora_b"]
    return product if module == EMBEDDING else product.T


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft(dora: bool, binary: bool, tmp_path: Path) -> None:
    tensors = peft_tensors({QKV: 4, OUT: 4}, dora)
    adapter, arrays = read_peft(peft_directory(tmp_path, tensors, binary), CONFIG)
    assert (adapter.kind, adapter.scale, adapter.dropout) == ("dora" if dora else "lora", 2.0, 0.05)
    assert adapter.ranks == {QKV: 4, OUT: 4} and not adapter.adapted_head
    assert {name: value.shape for name, value in arrays.items()} == adapter.shapes(CONFIG)
    for module in (QKV, OUT):
        stem = f"base_model.model.{module}"
        expected = 2.0 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        np.testing.assert_allclose(delta(adapter, arrays, module), expected, rtol=1e-5, atol=1e-5)
        if dora:
            np.testing.assert_array_equal(arrays[f"{module}.m"], tensors[f"{stem}.lora_magnitude_vector"])


def test_pefts_embedding(tmp_path: Path) -> None:
    tensors = peft_tensors({EMBEDDING: 4, QKV: 4})
    adapter, arrays = read_peft(peft_directory(tmp_path, tensors), CONFIG)
    stem = f"base_model.model.{EMBEDDING}"
    expected = 2.0 * (tensors[f"{stem}.lora_embedding_B"] @ tensors[f"{stem}.lora_embedding_A"]).T
    np.testing.assert_allclose(delta(adapter, arrays, EMBEDDING), expected, rtol=1e-5, atol=1e-5)
    assert adapter.unties(CONFIG)


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({}, {QKV: 8 / 2, OUT: 8 / 5}),
        ({"use_rslora": True}, {QKV: 8 / 2**0.5, OUT: 8 / 5**0.5}),
        ({"alpha_pattern": {"qkv_proj": 3}}, {QKV: 3 / 2, OUT: 8 / 5}),
        ({"alpha_pattern": {"layers.2.attn.out_proj": 3, "proj": 100}}, {QKV: 8 / 2, OUT: 3 / 5}),
        ({"lora_alpha": 0}, {QKV: 0, OUT: 0}),
    ],
)
def test_pefts_ranks_and_strengths_by_module(options: dict[str, Any], scales: dict[str, float], tmp_path: Path) -> None:
    tensors = peft_tensors({QKV: 2, OUT: 5})
    adapter, arrays = read_peft(peft_directory(tmp_path, tensors, **options), CONFIG)
    assert adapter.ranks == {QKV: 2, OUT: 5}
    for module, scale in scales.items():
        stem = f"base_model.model.{module}"
        expected = scale * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        np.testing.assert_allclose(delta(adapter, arrays, module), expected, rtol=1e-4, atol=1e-5)


def corenet_tensors(dora: bool, vocabulary: int) -> Arrays:
    tensors: Arrays = {}
    for module in ("layers.0.attn.qkv_proj", "layers.2.ffn.proj_2"):
        rows, columns = shape(f"transformer.{module}")
        tensors |= {
            f"{module}.base_layer.weight": draw(rows, columns),
            f"{module}.lora_A.lora.weight": draw(4, columns),
            f"{module}.lora_B.lora.weight": draw(rows, 4),
        }
        if dora:
            tensors[f"{module}.lora_magnitude_vector.lora"] = np.abs(draw(rows))
    if not dora:
        tensors |= {
            "token_embeddings.base_layer.weight": draw(vocabulary, CONFIG.model_dim),
            "token_embeddings.lora_embedding_A.lora": draw(4, vocabulary),
            "token_embeddings.lora_embedding_B.lora": draw(CONFIG.model_dim, 4),
        }
    return tensors | {"layers.0.attn_norm.weight": draw(CONFIG.model_dim)}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_corenet_gives_what_merging_gives(dora: bool, tmp_path: Path) -> None:
    """Rows of a padded vocabulary are dropped."""
    tensors = corenet_tensors(dora, CONFIG.vocab_size + 7)
    path = tmp_path / "lora.pt"
    torch_files.save(path, {f"module.{name}": torch_files.tensor(value) for name, value in tensors.items()})
    adapter, arrays = read_corenet(path, CONFIG, alpha=6.0)
    assert adapter.kind == ("dora" if dora else "lora") and adapter.scale == 1.5
    assert {name: value.shape for name, value in arrays.items()} == adapter.shapes(CONFIG)
    names = {name.removeprefix("module."): tensor for name, tensor in open_source(path).tensors.items()}
    merged = merge(names, Scaling(6.0), "x")
    for module in adapter.ranks:
        name = module.removeprefix("transformer.")
        weight = tensors[f"{name}.base_layer.weight"][: shape(module)[0]] + delta(adapter, arrays, module)
        if dora:
            weight *= (arrays[f"{module}.m"] / np.linalg.norm(weight, axis=1))[:, None]
        expected = merged[f"{name}.weight"].read()[: len(weight)]
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-4)


def test_corenets_strength_must_be_known(tmp_path: Path) -> None:
    tensors = {name: torch_files.tensor(value) for name, value in corenet_tensors(True, 320).items()}
    torch_files.save(tmp_path / "lora.pt", tensors)
    with pytest.raises(InputError, match="does not say how strong its adapter is: pass --alpha"):
        read_corenet(tmp_path / "lora.pt", CONFIG)
    yaml = "model:\n  language_modeling:\n    general_gpt: {model_name: x}\n  lora:\n    config:\n"
    yaml += "      - {params: {lora_alpha: 8, use_rslora: true}}\n"
    (tmp_path / "config.yaml").write_text(yaml)
    assert read_corenet(tmp_path / "lora.pt", CONFIG)[0].scale == 4.0
    (tmp_path / "config.yaml").rename(tmp_path / "other.yaml")
    assert read_corenet(tmp_path / "lora.pt", CONFIG, settings=tmp_path / "other.yaml")[0].scale == 4.0
    torch_files.save(tmp_path / "plain.pt", {"norm.weight": torch_files.tensor(draw(48))})
    with pytest.raises(InputError, match="holds no adapter"):
        read_corenet(tmp_path / "plain.pt", CONFIG, alpha=1)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_to_peft_and_back(dora: bool, tmp_path: Path) -> None:
    ranks = {QKV: 2, OUT: 5} if dora else {EMBEDDING: 5, QKV: 2, OUT: 5, "lm_head": 5}
    adapter = Adapter("dora" if dora else "lora", ranks, 1.75, 0.1)
    arrays = {name: np.abs(draw(*shape)) for name, shape in adapter.shapes(UNTIED).items()}
    write_peft(tmp_path, adapter, arrays, UNTIED)
    again, found = read_peft(tmp_path, UNTIED)
    assert again == adapter
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored[f"base_model.model.{QKV}.lora_A.weight"].shape == (2, shape(QKV)[1])
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["target_modules"] == list(ranks) and values["rank_pattern"] == {QKV: 2}
    assert values["alpha_pattern"] == {QKV: 3.5} and values["lora_alpha"] == 8.75


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter("full"), "weights of the whole model"),
        (Adapter("dora", {EMBEDDING: 2}), "PEFT's DoRA of an embedding measures its columns"),
        (Adapter("lora", {EMBEDDING: 2}, adapted_head=True), "PEFT's tied head reads the base embedding"),
    ],
)
def test_what_peft_has_no_word_for_is_refused(adapter: Adapter, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_peft(tmp_path, adapter, {}, CONFIG)
    assert not list(tmp_path.iterdir())


A, B = f"base_model.model.{QKV}.lora_A.weight", f"base_model.model.{QKV}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A), r"qkv_proj\.lora_A is missing"),
        (lambda t: t.pop(B), r"qkv_proj\.lora_B is missing"),
        (lambda t: t.update({A: draw(4, 5)}), r"qkv_proj\.lora_A is \(4, 5\), and the model needs \(4, 48\)"),
        (lambda t: t.update({B: draw(7, 4)}), r"qkv_proj\.lora_B is \(7, 4\), and the model needs \(\d+, 4\)"),
        (lambda t: t.update({A: draw(4)}), r"lora_A of shape \(4,\) is no matrix"),
        (lambda t: t.update({A: np.zeros((0, 48), np.float32)}), "no matrix of a rank"),
        (lambda t: t.update({A: np.zeros((4, 48), np.int32)}), "lora_A is int32"),
        (lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): draw(3)}), "lora_magnitude_vector"),
        (lambda t: t.update({A.replace("lora_A", "lora_A.other"): draw(4, 48)}), "holds two adapters"),
        (lambda t: t.update({A.replace("qkv_proj", "q_proj"): draw(4, 48)}), "which is no module of an OpenELM"),
        (lambda t: t.update({A.replace("layers.0", "layers.7"): draw(4, 48)}), "which the model does not have"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": draw(4, 48)}), "the model does not have"),
        (lambda t: t.update({"base_model.model.lm_head.modules_to_save.weight": draw(4)}), "is no part of a LoRA"),
        (lambda t: t.clear(), "adapts nothing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Callable[[Arrays], Any], message: str, tmp_path: Path) -> None:
    tensors = peft_tensors({QKV: 4, OUT: 4})
    change(tensors)
    refused(peft_directory(tmp_path, tensors), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is known"),
        ({"bias": "all"}, "asks for 'bias'"),
        ({"lora_bias": True}, "asks for 'lora_bias'"),
        ({"fan_in_fan_out": True}, "asks for 'fan_in_fan_out'"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed the model's own weights"),
        ({"lora_alpha": None}, "lora_alpha or alpha_pattern is no number"),
        ({"lora_alpha": "8"}, "is no number"),
        ({"lora_alpha": float("nan")}, "is no number"),
        ({"alpha_pattern": {"qkv_proj": "x"}}, "is no number"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "which is no module's name"),
        ({"alpha_pattern": [1]}, "is no number"),
    ],
)
def test_configs_that_are_not_known_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(peft_directory(tmp_path, peft_tensors({QKV: 4}), **change), message)


def test_pefts_dora_of_an_embedding_is_refused(tmp_path: Path) -> None:
    tensors = peft_tensors({EMBEDDING: 4})
    tensors[f"base_model.model.{EMBEDDING}.lora_magnitude_vector"] = draw(48)
    refused(peft_directory(tmp_path, tensors), "measures its columns in PEFT, and its rows here")


def test_a_directory_without_weights_and_a_hostile_pickle(tmp_path: Path) -> None:
    path = peft_directory(tmp_path / "a", peft_tensors({QKV: 4}))
    (path / "adapter_model.safetensors").unlink()
    refused(path, r"holds neither adapter_model\.safetensors nor adapter_model\.bin")
    torch_files.save(path / "adapter_model.bin", {"x": torch_files.Call("os.system", ("true",))})
    refused(path, r"os\.system")
    torch_files.save(path / "adapter_model.bin", {"x": {"y": torch_files.tensor(draw(2))}})
    refused(path, "holds no tensors by name")


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_peft(path, CONFIG)
    assert "\n" not in str(caught.value)
