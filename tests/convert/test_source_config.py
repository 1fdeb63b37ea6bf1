"""Where the config comes from: files of every kind, presets, shapes, and what contradicts them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_yaml, tiny

from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS, ModelConfig
from elm_mlx_convert.source_config import ConfigFile, Scaling, decide, find_config_file, read_config_file

LORA = """  lora:
    use_lora: true
    config:
      - regex: '.*token_embedding.*'
        module_type: embedding
        params: {adapter_name: lora, r: 32, lora_alpha: &alpha 16, use_rslora: false}
      - regex: '.*proj.*'
        module_type: linear
        params: {adapter_name: lora, r: 8, lora_alpha: *alpha, use_rslora: false, use_dora: true}
"""


def choose(settings: ConfigFile | None, config: ModelConfig, **options: Any) -> tuple[ModelConfig, str]:
    options = {"preset": None, "head_dim": None, "untied": False, **options}
    return decide(settings, options.pop("preset"), config.shapes(), "x.pt", **options)


@pytest.mark.parametrize("name", PRESETS)
def test_corenets_yaml_of_a_preset(tmp_path: Path, name: str) -> None:
    settings = read_config_file(save_yaml(tmp_path / "a.yaml", name, 32_128, 1024))
    config, origin = choose(settings, ModelConfig.preset(name, 32_128))
    assert config == replace(ModelConfig.preset(name, 32_128), max_context_length=1024, rope_max_length=2048)
    assert origin == f"a.yaml ({name})"


def test_corenets_yaml_of_a_name_that_is_no_preset(tmp_path: Path) -> None:
    config, origin = choose(read_config_file(save_yaml(tmp_path / "a.yml", "mine-3M", 320, 256)), tiny())
    assert config.shapes() == tiny().shapes()
    assert (config.max_context_length, config.rope_max_length) == (256, 512)
    assert origin == "the shapes; context from a.yml"


def test_yaml_with_dotted_keys(tmp_path: Path) -> None:
    prefix = "model.language_modeling.general_gpt"
    (tmp_path / "a.yaml").write_text(f"{prefix}.model_name: OpenELM-270M\n{prefix}.vocab_size: 7\n")
    assert read_config_file(tmp_path / "a.yaml") == ConfigFile(tmp_path / "a.yaml", None, "OpenELM-270M", 7)


def test_yaml_says_how_strong_an_adapter_is(tmp_path: Path) -> None:
    path = save_yaml(tmp_path / "a.yaml", "x", 320, more=LORA)
    assert read_config_file(path).scaling == Scaling(16.0)
    path.write_text(path.read_text().replace("false", "true"))
    assert read_config_file(path).scaling == Scaling(16.0, by_root=True)
    path.write_text(path.read_text().replace("*alpha", "8"))
    with pytest.raises(InputError, match="gives its adapters different scales"):
        read_config_file(path)
    path.write_text(path.read_text().replace("lora_alpha", "lora_beta"))
    with pytest.raises(InputError, match="without a lora_alpha"):
        read_config_file(path)


def test_config_json_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))
    config, origin = choose(read_config_file(tmp_path / "config.json"), tiny())
    assert (config, origin) == (tiny(), "config.json")


def test_config_json_of_apples_mlx_example(tmp_path: Path) -> None:
    words = {"model_name": "OpenELM-270M", "vocab_size": 32_128, "max_context_length": 2048}
    (tmp_path / "config.json").write_text(json.dumps(words))
    config, _ = choose(read_config_file(tmp_path / "config.json"), ModelConfig.preset("OpenELM-270M", 32_128))
    assert config == ModelConfig.preset("OpenELM-270M", 32_128)


def test_a_preset_counts_more_than_a_file(tmp_path: Path) -> None:
    settings = read_config_file(save_yaml(tmp_path / "a.yaml", "OpenELM-450M", 32_128, 1024))
    config, origin = choose(settings, ModelConfig.preset("OpenELM-270M", 32_128), preset="OpenELM-270M")
    assert config.max_context_length == 1024 and origin == "--preset OpenELM-270M"
    config, _ = choose(None, ModelConfig.preset("OpenELM-3B", 7), preset="OpenELM-3B")
    assert config == ModelConfig.preset("OpenELM-3B", 7)


def test_shapes_alone() -> None:
    config, origin = choose(None, ModelConfig.preset("OpenELM-1_1B", 32_128))
    assert (config, origin) == (ModelConfig.preset("OpenELM-1_1B", 32_128), "the shapes, those of OpenELM-1_1B")
    config, origin = choose(None, tiny())
    assert (config.shapes(), origin) == (tiny().shapes(), "the shapes")


def test_an_adapter_that_untied_the_head(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))
    untied = tiny(share_input_output_layers=False)
    config, _ = choose(read_config_file(tmp_path / "config.json"), untied, untied=True)
    assert config == untied


def test_contradictions_name_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    other = ModelConfig.preset("OpenELM-270M", 32_128)
    qkv = r"x\.pt: transformer\.token_embeddings\.weight has the shape \(32128, 1280\), but .* says \(32128, 1536\)"
    with pytest.raises(InputError, match=qkv):
        choose(None, other, preset="OpenELM-450M")
    with pytest.raises(InputError, match=qkv.replace(".* says", r"a\.yaml \(OpenELM-450M\) says")):
        choose(read_config_file(save_yaml(tmp_path / "a.yaml", "OpenELM-450M", 32_128)), other)
    with pytest.raises(InputError, match=r"has the shape \(320, 48\), but b\.yaml says \(4096, 48\)"):
        choose(read_config_file(save_yaml(tmp_path / "b.yaml", "mine", 4096)), tiny())
    with pytest.raises(InputError, match=r"has the shape \(32128, 1280\), but c\.yaml.* says \(32000, 1280\)"):
        choose(read_config_file(save_yaml(tmp_path / "c.yaml", "OpenELM-270M", 32_000)), other)
    (tmp_path / "config.json").write_text(json.dumps(tiny(qkv_multipliers=1.0).to_dict()))
    with pytest.raises(
        InputError, match=r"layers\.0\.attn\.qkv_proj\.weight has the shape \(\d+, 48\), but config\.json"
    ):
        choose(read_config_file(tmp_path / "config.json"), tiny())
    with pytest.raises(InputError, match=r"--head-dim is 16, but config\.json says 8"):
        choose(ConfigFile(tmp_path / "config.json", tiny()), tiny(), head_dim=16)


def test_the_one_file_that_lies_there(tmp_path: Path) -> None:
    assert find_config_file(tmp_path) is None
    path = save_yaml(tmp_path / "config.yaml", "mine", 320)
    found = find_config_file(tmp_path)
    assert found is not None and found.path == path
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds config\.json and config\.yaml: choose with --config"):
        find_config_file(tmp_path)


YAML = "model: {language_modeling: {general_gpt: {%s}}}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: [", "not YAML with plain values"),
        ("a.yaml", "!!python/object/apply:os.system ['touch pwned']", "not YAML with plain values"),
        ("a.yaml", "[" * 5000, "not YAML with plain values"),
        ("a.yaml", "just text", "holds no YAML mapping"),
        ("a.yaml", "model: {vision: 3}", "does not describe CoreNet's OpenELM"),
        ("a.yaml", "model: {language_modeling: {general_gpt: 3}}", "is not a mapping"),
        ("a.yaml", YAML % "model_name: 3", "model_name is 3"),
        ("a.yaml", YAML % "vocab_size: -1", "vocab_size is -1"),
        ("a.yaml", YAML % ("vocab_size: 0x1" + "0" * 9000), "vocab_size is huge"),
        ("a.yaml", YAML % "vocab_size: many", "vocab_size is 'many'"),
        ("a.yaml", YAML % "vocab_size: .nan", "vocab_size is nan"),
        ("a.yaml", YAML % "max_context_length: 1.0e+99", "max_context_length is 1e"),
        ("a.yaml", YAML % "max_context_length: true", "max_context_length is True"),
        ("a.yaml", "\xff\xfe", "not"),
        ("a.json", "{", "not JSON"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", "[]", "holds no JSON object"),
        ("a.json", "{}", "num_transformer_layers is missing"),
        ("a.json", '{"model_type": "llama"}', "model_type is 'llama'"),
        ("a.json", '{"model_type": "openelm", "quantization": {"bits": 4}}', "already quantized"),
        ("a.json", '{"num_transformer_layers": 1e999}', "num_transformer_layers is inf"),
        ("a.json", '{"num_transformer_layers": 99999999999}', "a whole number from 1 to 10,000"),
        ("a.json", '{"num_transformer_layers": "3"}', "num_transformer_layers is '3'"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=message) as caught:
        read_config_file(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("pwned").exists()


def hostile_values() -> list[tuple[str, Any]]:
    sizes = [-1, 0, 2**40, 1.5, "8", None, [8], True, float("nan"), float("inf"), 10**400]
    cases = [(key, value) for key in ("vocab_size", "model_dim", "head_dim", "ffn_dim_divisor") for value in sizes]
    lists = [[], [1], "abc", 7, {"a": 1}, [[1], [2], [3]], [-1, -1, -1], [float("nan")] * 3, ["a"] * 3, [2**40] * 3]
    cases += [(key, value) for key in ("num_query_heads", "num_kv_heads", "ffn_multipliers") for value in lists]
    cases += [("rms_norm_eps", value) for value in ("x", float("nan"), -1, 10**400)]
    cases += [("rope_freq_constant", value) for value in ("x", float("nan"), 0, -5)]
    cases += [("ffn_with_glu", "no"), ("share_input_output_layers", 2), ("eos_token_id", "</s>"), ("bos_token_id", -1)]
    return cases


@pytest.mark.parametrize(("key", "value"), hostile_values())
def test_hostile_values_in_config_json(tmp_path: Path, key: str, value: Any) -> None:
    """Each is refused, or (where null and the like mean the default) contradicts nothing and allocates nothing."""
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict() | {key: value}))
    try:
        settings = read_config_file(tmp_path / "config.json")
    except InputError as error:
        assert "config.json" in str(error) and "\n" not in str(error) and len(str(error)) < 500
        return
    assert value is None
    with pytest.raises(InputError):
        choose(settings, tiny())


def test_files_too_large(tmp_path: Path) -> None:
    for name, size in (("a.json", 17 << 20), ("a.yaml", 2 << 20)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
        with pytest.raises(InputError, match="larger than"):
            read_config_file(tmp_path / name)
