"""Adapters of PEFT and CoreNet, in files made by code, against the weights that their formulas give."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch_files
from commands import Run
from safetensors.numpy import load_file, save_file

from elm_mlx.errors import InputError
from elm_mlx.model.config import ModelConfig, read_config
from elm_mlx.store.adapters import EMBEDDING, Adapter, of_weights
from elm_mlx_convert import LoraWeights, read_corenet, read_peft, write_peft
from elm_mlx_convert.lora_files import merge
from elm_mlx_convert.source_config import Scaling
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


def shapes(adapter: LoraWeights) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in adapter.arrays.items()}


def delta(adapter: LoraWeights, module: str) -> np.ndarray:
    """What is added to the module's weight."""
    product: np.ndarray = adapter.scale * adapter.arrays[f"{module}.lora_a"] @ adapter.arrays[f"{module}.lora_b"]
    return product if module == EMBEDDING else product.T


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft(dora: bool, binary: bool, tmp_path: Path) -> None:
    tensors = peft_tensors({QKV: 4, OUT: 4}, dora)
    adapter = read_peft(peft_directory(tmp_path, tensors, binary), CONFIG)
    assert (adapter.dora, adapter.scale, adapter.dropout) == (dora, 2.0, 0.05)
    assert adapter.ranks == {QKV: 4, OUT: 4} and not of_weights(adapter).adapted_head
    assert shapes(adapter) == of_weights(adapter).shapes(CONFIG)
    for module in (QKV, OUT):
        stem = f"base_model.model.{module}"
        expected = 2.0 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        np.testing.assert_allclose(delta(adapter, module), expected, rtol=1e-5, atol=1e-5)
        if dora:
            np.testing.assert_array_equal(adapter.arrays[f"{module}.m"], tensors[f"{stem}.lora_magnitude_vector"])


def test_pefts_embedding(tmp_path: Path) -> None:
    tensors = peft_tensors({EMBEDDING: 4, QKV: 4})
    adapter = read_peft(peft_directory(tmp_path, tensors), CONFIG)
    stem = f"base_model.model.{EMBEDDING}"
    expected = 2.0 * (tensors[f"{stem}.lora_embedding_B"] @ tensors[f"{stem}.lora_embedding_A"]).T
    np.testing.assert_allclose(delta(adapter, EMBEDDING), expected, rtol=1e-5, atol=1e-5)
    assert of_weights(adapter).unties(CONFIG)


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({}, {QKV: 8 / 2, OUT: 8 / 5}),
        ({"use_rslora": True}, {QKV: 8 / 2**0.5, OUT: 8 / 5**0.5}),
        ({"alpha_pattern": {"qkv_proj": 3}}, {QKV: 3 / 2, OUT: 8 / 5}),
        ({"alpha_pattern": {"layers.2.attn.out_proj": 3, "proj": 100}}, {QKV: 8 / 2, OUT: 3 / 5}),
        ({"alpha_pattern": {r"^transformer\.layers\.[01]\..*": 3}}, {QKV: 3 / 2, OUT: 8 / 5}),
        ({"alpha_pattern": {r"layers\.\d+\.attn\.(?:out|k)_proj": 3, ".*proj": 5}}, {QKV: 5 / 2, OUT: 3 / 5}),
        ({"alpha_pattern": {"kv_proj": 3, "proj$": 4}}, {QKV: 8 / 2, OUT: 8 / 5}),  # from a dot on, and to the end
        ({"lora_alpha": 0}, {QKV: 0, OUT: 0}),
        ({"target_modules": "all-linear"}, {QKV: 8 / 2, OUT: 8 / 5}),
        ({"target_modules": r".*\.attn\..*", "layers_to_transform": [0, 2]}, {QKV: 8 / 2, OUT: 8 / 5}),
        ({"target_modules": ["qkv_proj", "out_proj"], "rank_pattern": {"out_proj": 5}}, {QKV: 8 / 2, OUT: 8 / 5}),
    ],
)
def test_pefts_ranks_and_strengths_by_module(options: dict[str, Any], scales: dict[str, float], tmp_path: Path) -> None:
    tensors = peft_tensors({QKV: 2, OUT: 5})
    adapter = read_peft(peft_directory(tmp_path, tensors, **options), CONFIG)
    assert adapter.ranks == {QKV: 2, OUT: 5}
    for module, scale in scales.items():
        stem = f"base_model.model.{module}"
        expected = scale * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        np.testing.assert_allclose(delta(adapter, module), expected, rtol=1e-4, atol=1e-5)


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
    adapter = read_corenet(path, CONFIG, alpha=6.0)
    assert (adapter.dora, adapter.scale) == (dora, 1.5)
    assert shapes(adapter) == of_weights(adapter).shapes(CONFIG)
    names = {name.removeprefix("module."): tensor for name, tensor in open_source(path).tensors.items()}
    merged = merge(names, Scaling(6.0), "x")
    for module in adapter.ranks:
        name = module.removeprefix("transformer.")
        weight = tensors[f"{name}.base_layer.weight"][: shape(module)[0]] + delta(adapter, module)
        if dora:
            weight *= (adapter.arrays[f"{module}.m"] / np.linalg.norm(weight, axis=1))[:, None]
        expected = merged[f"{name}.weight"].read()[: len(weight)]
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-4)


def test_corenets_strength_must_be_known(tmp_path: Path) -> None:
    tensors = {name: torch_files.tensor(value) for name, value in corenet_tensors(True, 320).items()}
    torch_files.save(tmp_path / "lora.pt", tensors)
    with pytest.raises(InputError, match="does not say its adapter's alpha: pass --alpha"):
        read_corenet(tmp_path / "lora.pt", CONFIG)
    yaml = "model:\n  language_modeling:\n    general_gpt: {model_name: x}\n  lora:\n    config:\n"
    yaml += "      - {params: {lora_alpha: 8, use_rslora: true}}\n"
    (tmp_path / "config.yaml").write_text(yaml)
    assert read_corenet(tmp_path / "lora.pt", CONFIG).scale == 4.0
    (tmp_path / "config.yaml").rename(tmp_path / "other.yaml")
    assert read_corenet(tmp_path / "lora.pt", CONFIG, settings=tmp_path / "other.yaml").scale == 4.0
    torch_files.save(tmp_path / "plain.pt", {"norm.weight": torch_files.tensor(draw(48))})
    with pytest.raises(InputError, match="holds no adapter"):
        read_corenet(tmp_path / "plain.pt", CONFIG, alpha=1)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_to_peft_and_back(dora: bool, tmp_path: Path) -> None:
    ranks = {QKV: 2, OUT: 5} if dora else {EMBEDDING: 5, QKV: 2, OUT: 5, "lm_head": 5}
    names = Adapter("dora" if dora else "lora", ranks).shapes(UNTIED)
    adapter = LoraWeights(dora, 1.75, 0.1, {name: np.abs(draw(*shape)) for name, shape in names.items()})
    write_peft(tmp_path, adapter)
    again = read_peft(tmp_path, UNTIED)
    assert (again.dora, again.scale, again.dropout, again.ranks) == (dora, 1.75, 0.1, ranks)
    assert again.arrays.keys() == adapter.arrays.keys()
    for name, value in adapter.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], value)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored[f"base_model.model.{QKV}.lora_A.weight"].shape == (2, shape(QKV)[1])
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["target_modules"] == list(ranks) and values["rank_pattern"] == {QKV: 2}
    assert values["alpha_pattern"] == {QKV: 3.5} and values["lora_alpha"] == 8.75


def test_what_peft_cannot_express_is_refused(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    import mlx.core as mx

    from elm_mlx.store import adapters

    config = read_config(tiny_model_dir)
    seen = Adapter("lora", {EMBEDDING: 2}, adapted_head=True)
    adapters.write(tmp_path / "seen", seen, {n: mx.zeros(shape) for n, shape in seen.shapes(config).items()}, config)
    norm = "transformer.norm.weight"
    adapters.write(tmp_path / "full", Adapter("full"), {norm: mx.ones(config.shapes()[norm])}, config)
    for name, message in (
        ("seen", "PEFT's tied head reads the base embedding, but this adapter's the adapted one: fuse it"),
        ("full", "weights of the whole model are not an adapter; `elm-mlx fuse` merges them"),
    ):
        code, _, err = run("adapter", tiny_model_dir, tmp_path / name, tmp_path / "out", "--to", "peft")
        assert code == 2 and message in err and not (tmp_path / "out").exists()
    dora = LoraWeights(True, 1.0, 0.0, {f"{EMBEDDING}.{name}": draw(2, 2) for name in ("lora_a", "lora_b", "m")})
    with pytest.raises(InputError, match="DoRA of an embedding cannot be written for PEFT"):
        write_peft(tmp_path / "out", dora)
    assert not (tmp_path / "out").exists()


A, B = f"base_model.model.{QKV}.lora_A.weight", f"base_model.model.{QKV}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A), r"qkv_proj\.lora_A is missing"),
        (lambda t: t.pop(B), r"qkv_proj\.lora_B is missing"),
        (
            lambda t: t.update({A: draw(4, 5)}),
            r"lora_A has the shape \(4, 5\), and the model needs \(4, 48\)",
        ),
        (
            lambda t: t.update({B: draw(7, 4)}),
            r"qkv_proj\.lora_B has the shape \(7, 4\), and the model needs \(\d+, 4\)",
        ),
        (lambda t: t.update({A: draw(4)}), r"lora_A of shape \(4,\) is no matrix"),
        (lambda t: t.update({A: np.zeros((0, 48), np.float32)}), "no matrix of a rank"),
        (lambda t: t.update({A: np.zeros((4, 48), np.int32)}), "lora_A is int32"),
        (lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): draw(3)}), "lora_magnitude_vector"),
        (lambda t: t.update({A.replace("lora_A", "lora_A.other"): draw(4, 48)}), "holds two adapters"),
        (
            lambda t: t.update({A.replace("qkv_proj", "q_proj"): draw(4, 48)}),
            r"adapts 'transformer.*q_proj', which this model does not have; there are token_embeddings, qkv_proj",
        ),
        (lambda t: t.update({A.replace("layers.0", "layers.7"): draw(4, 48)}), "which this model does not have; there"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": draw(4, 48)}),
            "does not have: its head is its embedding",
        ),
        (lambda t: t.update({"base_model.model.lm_head.modules_to_save.weight": draw(4)}), "holds tensors of no LoRA"),
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
        ({"use_rslora": "true"}, "use_rslora is 'true': true or false is needed"),
        ({"use_rslora": 1}, "use_rslora is 1: true or false is needed"),
        ({"use_dora": "true"}, "use_dora is 'true': true or false is needed"),
        ({"lora_alpha": None}, "lora_alpha is missing: a number"),
        ({"lora_alpha": "8"}, "lora_alpha is '8': a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan: a number"),
        ({"alpha_pattern": {"qkv_proj": "x"}}, "alpha_pattern: qkv_proj is 'x': a number"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "a regular expression that is not supported: name the modules"),
        ({"alpha_pattern": {"(a|b)(a|b)": 2}}, "a regular expression that is not supported"),
        ({"alpha_pattern": {".*.*.*x": 2}}, "a regular expression that is not supported"),
        ({"alpha_pattern": {"a?a?a?": 2}}, "a regular expression that is not supported"),
        ({"alpha_pattern": {"x" * 201: 2}}, "a regular expression that is not supported"),
        ({"alpha_pattern": {"[z-a]": 2}}, "alpha_pattern holds an invalid regular expression"),
        ({"alpha_pattern": {f"m{i}": 1 for i in range(1001)}}, "alpha_pattern has 1,001 entries"),
        ({"modules_to_save": ["lm_head"]}, "asks for 'modules_to_save', which is not supported: merge it with PEFT"),
        ({"trainable_token_indices": [1]}, "asks for 'trainable_token_indices'"),
        ({"target_parameters": ["experts"]}, "asks for 'target_parameters'"),
        ({"use_dora": True}, r"holds no lora_magnitude_vector, and adapter_config\.json says use_dora"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]: an object is needed"),
    ],
)
def test_configs_that_are_not_known_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(peft_directory(tmp_path, peft_tensors({QKV: 4}), **change), message)


def test_pefts_dora_of_an_embedding_is_refused(tmp_path: Path) -> None:
    tensors = peft_tensors({EMBEDDING: 4})
    tensors[f"base_model.model.{EMBEDDING}.lora_magnitude_vector"] = draw(48)
    refused(peft_directory(tmp_path, tensors), "normalizes its columns, elm-mlx's its rows")


def test_a_directory_without_weights_and_a_hostile_pickle(tmp_path: Path) -> None:
    path = peft_directory(tmp_path / "a", peft_tensors({QKV: 4}))
    (path / "adapter_model.safetensors").unlink()
    refused(path, r"holds neither adapter_model\.safetensors nor adapter_model\.bin")
    torch_files.save(path / "adapter_model.bin", {"x": torch_files.Call("os.system", ("true",))})
    refused(path, r"os\.system")
    torch_files.save(path / "adapter_model.bin", {"x": {"y": torch_files.tensor(draw(2))}})
    refused(path, "holds no named tensors")


# --- other families


FAMILIES = {
    "llama": ("self_attn.q_proj", "mlp.down_proj", "lm_head"),
    "mistral": ("self_attn.v_proj", "mlp.gate_proj"),
    "phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj"),
    "olmo": ("self_attn.o_proj", "mlp.up_proj"),
    "olmo2": ("self_attn.k_proj", "mlp.up_proj", "lm_head"),
    "olmo3": ("self_attn.o_proj", "mlp.down_proj"),
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_against_pefts_formulas(
    name: str, dora: bool, run: Run, family_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """Model and adapter compute what a model of the merged weights does; and so after a way out and back in."""
    base = family_dirs[name]
    weights = load_file(base / "model.safetensors")
    tensors: Arrays = {}
    for module in (m if m == "lm_head" else f"model.layers.1.{m}" for m in FAMILIES[name]):
        rows, columns = weights[f"{module}.weight"].shape
        a, b = draw(4, columns), draw(rows, 4)
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        merged = weights[f"{module}.weight"] + 8 / 4**0.5 * b @ a
        if dora:
            m = np.abs(draw(rows))
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = m
            merged *= (m / np.linalg.norm(merged, axis=1))[:, None]
        weights[f"{module}.weight"] = merged
    source = peft_directory(tmp_path / "peft", tensors, binary=dora, use_rslora=True, use_dora=dora)
    expected = Path(shutil.copytree(base, tmp_path / "merged"))
    save_file(weights, expected / "model.safetensors")
    assert run("adapter", base, source, tmp_path / "ours")[0] == 0
    assert run("adapter", base, tmp_path / "ours", tmp_path / "back", "--to", "peft")[0] == 0
    wanted = logits(expected)
    for adapter in (source, tmp_path / "ours", tmp_path / "back"):
        found = logits(base, adapter)
        assert np.abs(found - wanted).max() < 1e-3 * wanted.std()
    assert np.abs(logits(base) - wanted).max() > 0.1 * wanted.std()


def logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    import mlx.core as mx

    from elm_mlx.store.loading import load_model

    return np.array(load_model(model, "float32", adapter)(mx.array([[1, 9, 40, 7, 33]]))[0])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("model.embed_tokens", r"adapts 'model\.embed_tokens', which only an OpenELM supports"),
        ("lm_head", "does not have: its head is its embedding"),
        ("model.layers.0.self_attn.qkv_proj", r"this model does not have; there are q_proj, k_proj, v_proj"),
        ("model.layers.9.self_attn.q_proj", "this model does not have"),
    ],
)
def test_what_another_family_has_not_is_named(
    module: str, message: str, run: Run, family_dirs: dict[str, Path], tmp_path: Path
) -> None:
    a, b = ("embedding_A", "embedding_B") if "embed" in module else ("A.weight", "B.weight")
    stem = f"base_model.model.{module}"
    tensors = {f"{stem}.lora_{a}": draw(4, 48), f"{stem}.lora_{b}": draw(48, 4)}
    source = peft_directory(tmp_path / "peft", tensors)
    for command in (
        ("info", family_dirs["mistral"], "--adapter", source),
        ("adapter", family_dirs["mistral"], source, "x"),
    ):
        code, _, err = run(*command)
        assert code == 2 and re.search(message, err) and err.count("\n") == 1, err


def test_a_model_without_its_head_in_the_names(family_dirs: dict[str, Path], tmp_path: Path) -> None:
    """As PEFT saves one that was made around `AutoModel`."""
    stem = "base_model.model.layers.0.self_attn.o_proj"
    tensors = {f"{stem}.lora_A.weight": draw(4, 48), f"{stem}.lora_B.weight": draw(48, 4)}
    source = peft_directory(tmp_path / "peft", tensors)
    adapter = read_peft(source, read_config(family_dirs["llama"]))
    assert adapter.ranks == {"model.layers.0.self_attn.o_proj": 4}


def test_a_checkpoint_of_corenets_is_for_no_other_family(
    run: Run, family_dirs: dict[str, Path], tmp_path: Path
) -> None:
    torch_files.save(tmp_path / "lora.pt", {"x": torch_files.tensor(draw(2))})
    code, _, err = run("adapter", family_dirs["llama"], tmp_path / "lora.pt", tmp_path / "out")
    assert code == 2 and "holds no adapter_config.json, which an adapter of a Llama has" in err


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_peft(path, CONFIG)
    assert "\n" not in str(caught.value)
