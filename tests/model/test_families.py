"""Other families: what mlx-lm makes of the same directory, and what cannot be done is said."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import family_cases
import fuzzing
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import other_models
import pytest
from mlx.utils import tree_flatten

from elm_mlx import blas, device
from elm_mlx.errors import InputError
from elm_mlx.inference import batch, generation
from elm_mlx.inference.prefix import PrefixCache
from elm_mlx.inference.sampling import Sampler
from elm_mlx.model import other_networks
from elm_mlx.model.attention import Causal, Segments
from elm_mlx.model.cache import KVCache, StateCache, make_prompt_cache
from elm_mlx.model.config import read_config
from elm_mlx.model.families import FamilyConfig
from elm_mlx.model.rope import frequencies
from elm_mlx.store import loading
from elm_mlx.store.describe import describe

NAMES = tuple(other_models.CONFIGS)
MLX_LM = tuple(name for name in NAMES if name != "olmo")  # what it can run
IDS = [(i * 37 + 11) % 380 for i in range(40)]


@pytest.fixture(scope="session")
def theirs(family_dirs: dict[str, Path]) -> dict[str, Any]:
    """The same by mlx-lm."""
    from mlx_lm.utils import load_model as load_theirs

    return {name: load_theirs(path)[0] for name, path in family_dirs.items() if name in MLX_LM}


def _theirs_greedy(model: Any, ids: list[int], count: int) -> list[int]:
    from mlx_lm.generate import generate_step

    return [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=count)]


@pytest.mark.parametrize("name", MLX_LM)
def test_logits_are_those_of_mlx_lm(name: str, family_dirs: dict[str, Path], theirs: dict[str, Any]) -> None:
    model, tokenizer = loading.load(family_dirs[name])
    ids = mx.array([IDS, IDS[::-1]])
    expected = theirs[name](ids)
    assert mx.allclose(model(ids), expected, atol=1e-4)
    assert mx.allclose(model.head(model.transformer(ids, None)), expected, atol=1e-4)
    assert tokenizer is not None and tokenizer.eos_ids == model.config.eos_token_ids
    assert model.config.num_layers == len(model.layers)
    assert model.config.parameters == sum(value.size for _, value in tree_flatten(theirs[name].parameters()))


@pytest.mark.parametrize("name", MLX_LM)
def test_greedy_tokens_are_those_of_mlx_lm(name: str, family_dirs: dict[str, Path], theirs: dict[str, Any]) -> None:
    model = loading.load_model(family_dirs[name])
    expected = _theirs_greedy(theirs[name], IDS, 24)
    for step in (512, 7):
        found = generation.stream_generate(model, None, IDS, max_tokens=24, stop_at_eos=False, prefill_step=step)
        assert [response.token for response in found] == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_what_each_prompt_gives(name: str, family_dirs: dict[str, Path]) -> None:
    model, tokenizer = loading.load(family_dirs[name])
    assert tokenizer is not None
    prompts = [IDS[:5], IDS[:23], IDS[7:]]
    together = list(batch.generate_batch(model, tokenizer, prompts, max_tokens=8))
    for prompt, row in zip(prompts, together, strict=True):
        alone = [response.token for response in generation.stream_generate(model, tokenizer, prompt, max_tokens=8)]
        assert row.tokens == alone


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_is_read_once(name: str, family_dirs: dict[str, Path]) -> None:
    model = loading.load_model(family_dirs[name])
    cache = PrefixCache(model)
    logits = cache.read(IDS[:30])
    assert logits is not None
    said = list(cache.decode(logits, Sampler(), 0, 6))
    held = list(cache.ids)
    longer = [*IDS[:30], *said, 5, 6]
    assert cache.shared(longer) == len(held)
    again = cache.read(longer)
    fresh = generation.prefill(model, longer, make_prompt_cache(model))
    assert again is not None and mx.allclose(again, fresh, atol=1e-4)
    cut = [*IDS[:20], 3]
    assert cache.shared(cut) == (20 if name != "mamba" else 0)
    again = cache.read(cut)
    assert again is not None
    assert mx.allclose(again, generation.prefill(model, cut, make_prompt_cache(model)), atol=1e-4)


def test_caches(family_dirs: dict[str, Path]) -> None:
    kinds = {name: type(make_prompt_cache(loading.load_model(path))[0]) for name, path in family_dirs.items()}
    assert kinds == {name: StateCache if name == "mamba" else KVCache for name in NAMES}
    state = StateCache()
    assert not state.is_trimmable() and state.nbytes == 0
    state.state, state.offset = [mx.zeros(3), mx.zeros(2)], 5
    assert state.trim(2) == 0 and state.offset == 5 and state[0] is not None
    assert state.trim(5) == 5 and state.offset == 0 and state[0] is None


def test_a_window_hides_what_lies_before_it() -> None:
    cache = KVCache()
    assert cache.make_mask(4, window_size=8) == "causal" and cache.make_mask(1, window_size=8) is None
    cache.offset = 6
    mask = cache.make_mask(3, window_size=4)
    assert isinstance(mask, Causal)
    expected = [[0, 0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert mask.array(3, 9)[0, 0].astype(mx.int32).tolist() == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mamba"])
def test_segments_keep_texts_apart(name: str, family_dirs: dict[str, Path]) -> None:
    model = loading.load_model(family_dirs[name])
    row, numbers = mx.array([IDS]), mx.array([[1] * 17 + [2] * 23])
    together = model(row, segments=Segments(numbers))
    assert mx.allclose(together[:, :17], model(row[:, :17]), atol=1e-4)
    assert mx.allclose(together[:, 17:], model(row[:, 17:]), atol=1e-4)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mamba"])
def test_texts_that_begin_alike_share_what_they_begin_with(name: str, family_dirs: dict[str, Path]) -> None:
    model = loading.load_model(family_dirs[name])
    numbers = mx.array([[-1] * 17 + [1] * 9 + [2] * 14])
    positions = mx.array([[*range(26), *range(17, 31)]])
    together = model(mx.array([IDS]), segments=Segments(numbers, None, positions))
    first, second = (model(mx.array([[*IDS[:17], *rest]])) for rest in (IDS[17:26], IDS[26:]))
    assert mx.allclose(together[:, :26], first, atol=1e-4)
    assert mx.allclose(together[:, 26:], second[:, 17:], atol=1e-4)


def test_a_state_cannot_tell_texts_apart(family_dirs: dict[str, Path]) -> None:
    model = loading.load_model(family_dirs["mamba"])
    with pytest.raises(InputError, match="Mamba cannot tell them apart"):
        model(mx.array([IDS]), segments=Segments(mx.ones((1, len(IDS)))))


@pytest.mark.parametrize("name", MLX_LM)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_quantized(
    name: str, on_gpu: bool, tmp_path: Path, family_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By mlx-lm's own quantization, multiplied as it is in float32, and as on a GPU."""
    from mlx_lm.utils import load_model as load_theirs
    from mlx_lm.utils import quantize_model, save

    wide = {"hidden_size": 96, "intermediate_size": 192, "time_step_rank": 32, "rope_scaling": None}
    if name == "gemma2":
        wide["hidden_size"] = 64
    model, config = load_theirs(other_models.write_model(tmp_path / "dense", name, wide))
    quantized, config = quantize_model(model, config, 32, 4)
    path = tmp_path / "quantized"
    shutil.copytree(tmp_path / "dense", path)
    (path / "model.safetensors").unlink()
    save(path, tmp_path / "dense", quantized, _NoTokenizer(), config)
    expected = load_theirs(path)[0](mx.array([IDS[:6]]))
    monkeypatch.setattr(device, "on_gpu", lambda: on_gpu)
    loaded, packed = loading.open_model(path), on_gpu or blas.reads_stored()
    assert ("4-bit" in loaded.stored) and any(hasattr(m, "bits") for m in loaded.model.modules()) is packed
    assert mx.allclose(loaded.model(mx.array([IDS[:6]])), expected, atol=2e-3, rtol=1e-3)


class _NoTokenizer:
    def save_pretrained(self, path: Path) -> None:
        pass


def test_configs_that_are_refused(tmp_path: Path, family_dirs: dict[str, Path]) -> None:
    def refused(changes: dict[str, Any], match: str) -> None:
        values = {**json.loads((family_dirs["llama"] / "config.json").read_text()), **changes}
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(InputError, match=match) as error:
            config = read_config(tmp_path)
            assert config.shapes()
        assert "\n" not in str(error.value)

    refused({"model_type": "gpt2"}, "model_type is 'gpt2'; supported are openelm, llama")
    for name, reason in (("gemma", "scales its embedding"), ("qwen3_moe", "a mixture of experts")):
        refused({"model_type": name}, rf"model_type is '{name}' \(.*{reason}.*\); supported are openelm, llama")
    for name in ("qwen2", "qwen3", "smollm3"):
        refused({"model_type": name, "use_sliding_window": True}, "use_sliding_window is true, and mlx-lm's .* has no")
    refused({"model_type": "qwen2", "head_dim": 16}, "head_dim is 16, and mlx-lm's Qwen 2 has hidden_size / heads, 8")
    refused({"model_type": "qwen3", "attention_bias": True}, "attention_bias is true, and mlx-lm's Qwen 3 has no such")
    for layers in ([1], [1, 2], "11", [1, None]):
        refused({"model_type": "smollm3", "no_rope_layers": layers}, "no_rope_layers is .*: a list of 2 times 0 or 1")
    gemma = {"model_type": "gemma3_text", "head_dim": 16, "sliding_window_pattern": 2}
    refused(gemma | {"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0, and mlx-lm's network caps")
    refused(gemma | {"use_bidirectional_attention": True}, "an encoder, which generates no text")
    refused(gemma | {"sliding_window_pattern": 3}, "do not take turns as mlx-lm's do")
    refused(gemma | {"layer_types": ["full_attention", "sliding_attention"]}, "do not take turns as mlx-lm's do")
    refused(gemma | {"hidden_activation": "relu"}, "hidden_activation is 'relu': one of gelu_pytorch_tanh")
    for cap in (0.0, -50.0, float("inf"), "50", True):
        refused({"model_type": "gemma2", "head_dim": 16, "attn_logit_softcapping": cap}, "attn_logit_softcapping is ")
    refused({"model_type": "olmo", "clip_qkv": 8.0}, "clip_qkv is 8.0")
    refused({"model_type": ["llama"]}, r"model_type is .*; supported are openelm, llama")
    refused({"model_type": "olmo", "hidden_size": None, "d_model": 48}, "an OLMo in its first layout")
    refused({"vocab_size": "many"}, "vocab_size is 'many': a whole number")
    refused({"vocab_size": 400.0}, r"vocab_size is 400\.0: a whole number")
    refused({"num_hidden_layers": 10**9}, "from 1 to 10,000")
    refused({"max_position_embeddings": None}, "max_position_embeddings is missing")
    refused({"max_position_embeddings": 2**31}, "from 1 to 1,073,741,824")
    refused({"intermediate_size": None}, "intermediate_size is missing")
    refused({"num_attention_heads": 5}, "5 heads .* cannot share 2 of keys")
    refused({"head_dim": 7}, "rotates pairs, and 7 values")
    refused({"hidden_act": "gelu"}, "hidden_act is 'gelu'")
    refused({"attention_bias": "false"}, "attention_bias is 'false': true or false")
    refused({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan")
    refused({"rope_traditional": True}, "rope_traditional is true")
    refused({"layer_types": ["full_attention"]}, "a list of 2")
    refused({"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}, "layer_types without full_attention")
    refused({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is missing")
    refused({"model_type": "olmo3", "layer_types": ["full_attention"] * 2}, "layer_types without sliding_attention")
    refused({"model_type": "phi3", "head_dim": 16}, "head_dim is 16, and mlx-lm's Phi-3")
    refused({"model_type": "mamba", "conv_kernel": 1}, "conv_kernel is 1")
    refused({"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq")


def test_sizes_are_bounded_alone_and_together(tmp_path: Path) -> None:
    """A shape that no model has is refused by its figures: no array is made of it."""
    for name in NAMES:
        values = {**other_models.CONFIGS[name], "vocab_size": 400}
        sizes = [key for key, value in values.items() if type(value) is int]
        for changes in [*({key: 10**6} for key in sizes), *({key: 10**9} for key in sizes), dict.fromkeys(sizes, 9000)]:
            (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
            try:
                config = read_config(tmp_path)
            except InputError as error:
                assert "config.json: " in str(error) and "\n" not in str(error)
            else:
                assert config.parameters == sum(math.prod(shape) for shape in config.shapes().values()) < 1 << 43


@pytest.mark.parametrize("case", family_cases.CASES)
def test_a_damaged_config_is_one_line_or_a_model(case: str, tmp_path: Path) -> None:
    """In whatever is taken all figures are such that a network can be made of them, or its weights be looked for."""
    text = json.dumps(family_cases.config(case)).encode()
    taken = 0
    for number in range(30):
        (tmp_path / "config.json").write_bytes(fuzzing.json_values(text, random.Random(f"{case} {number}")))
        try:
            config = read_config(tmp_path)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            continue
        if isinstance(config, FamilyConfig):
            taken += 1
            assert config.parameters < 1 << 43 and config.kv_bytes_per_token() >= 0 and config.linears
            for rope in config.ropes.values():
                found = [*frequencies(rope), *frequencies(rope, rope.original + 1), rope.scale]
                assert all(math.isfinite(value) for value in found) and min(found) > 0
    assert taken


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_the_networks(name: str, tmp_path: Path) -> None:
    switches = [
        {}, {"attention_bias": True, "mlp_bias": True}, {"use_bias": True, "use_conv_bias": False},
        {"tie_word_embeddings": True}, {"tie_word_embeddings": False},
    ]  # fmt: skip
    if name in ("qwen3", "gemma2", "gemma3_text"):  # whose networks have no biases
        del switches[1]
    for changes in switches:
        values = {**other_models.CONFIGS[name], "vocab_size": 400, **changes}
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = read_config(tmp_path)
        parameters = tree_flatten(other_networks.network(config).parameters())
        assert config.shapes() == {name: value.shape for name, value in parameters}
        assert config.parameters == sum(value.size for _, value in parameters)


def _published(name: str, *sizes: int, **more: Any) -> dict[str, Any]:
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    return {"model_type": name, "hidden_act": "silu", **dict(zip(keys, sizes, strict=False)), **more}


# Parameters as their model cards and papers count them, and tokens of context.
PUBLISHED = {
    "Llama 3.1 8B": (_published("llama", 4096, 14336, 32, 32, 8, 128256, 131072), 8_030_261_248, 131072),
    "Llama 3.1 405B": (_published("llama", 16384, 53248, 126, 128, 8, 128256, 131072), 405_853_388_800, 131072),
    "Mistral 7B 0.1": (_published("mistral", 4096, 14336, 32, 32, 8, 32000, 32768), 7_241_732_096, 4096),
    "Mistral NeMo": (
        _published("mistral", 5120, 14336, 40, 32, 8, 131072, 131072, head_dim=128, sliding_window=None),
        12_247_782_400, 131072,
    ),
    "Phi-3 mini": (_published("phi3", 3072, 8192, 32, 32, 32, 32064, 4096, sliding_window=2047), 3_821_079_552, 2047),
    "Phi-4 mini": (
        _published("phi3", 3072, 8192, 32, 24, 8, 200064, 131072, tie_word_embeddings=True, partial_rotary_factor=0.75,
                   rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}),
        3_836_021_760, 131072,
    ),
    "Gemma 2 2B": (
        _published("gemma2", 2304, 9216, 26, 8, 4, 256000, 8192, head_dim=256, hidden_act="gelu_pytorch_tanh"),
        2_614_341_888, 8192,
    ),
    "OLMo 1B": (_published("olmo", 2048, 8192, 16, 16, 16, 50304, 2048, tie_word_embeddings=True), 1_176_764_416, 2048),
    "OLMo 3 7B": (
        _published("olmo3", 4096, 11008, 32, 32, 32, 100278, 65536, rope_scaling={
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}),
        7_298_011_136, 65536,
    ),
    "Mamba 130M": (
        _published("mamba", 768, num_hidden_layers=24, vocab_size=50280, state_size=16, time_step_rank="auto"),
        129_135_360, 1 << 20,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters_and_context(name: str, tmp_path: Path) -> None:
    values, parameters, context = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    assert (config.parameters, config.max_context_length) == (parameters, context)


def test_many_layers_take_no_time(tmp_path: Path) -> None:
    values = {**other_models.CONFIGS["llama"], "vocab_size": 400, "num_hidden_layers": 10_000}
    (tmp_path / "config.json").write_text(json.dumps(values))
    start = time.perf_counter()
    config = read_config(tmp_path)
    assert len(config.shapes()) == 90_003 and len(config.modules()) == 70_001 and len(config.linears) == 7
    assert time.perf_counter() - start < 5


def test_transformers_newer_names_of_rope(tmp_path: Path, family_dirs: dict[str, Path]) -> None:
    values = json.loads((family_dirs["llama"] / "config.json").read_text())
    parameters = {"rope_theta": values.pop("rope_theta"), **values.pop("rope_scaling")}
    shutil.copytree(family_dirs["llama"], tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text(json.dumps({**values, "rope_parameters": parameters}))
    ids = mx.array([IDS])
    assert mx.array_equal(loading.load_model(tmp_path / "new")(ids), loading.load_model(family_dirs["llama"])(ids))


def test_transformers_newer_names_of_rope_by_kind_of_layer(tmp_path: Path, family_dirs: dict[str, Path]) -> None:
    values = json.loads((family_dirs["olmo3"] / "config.json").read_text())
    each = {"rope_theta": values.pop("rope_theta"), "rope_type": "default"}
    shutil.copytree(family_dirs["olmo3"], tmp_path / "new")

    def write(whole: dict[str, Any], window: dict[str, Any]) -> None:
        parameters = {"full_attention": whole, "sliding_attention": window}
        new = {**values, "rope_theta": None, "rope_scaling": None, "rope_parameters": parameters}
        (tmp_path / "new" / "config.json").write_text(json.dumps(new))

    write(each, each)
    ids = mx.array([IDS])
    assert mx.array_equal(loading.load_model(tmp_path / "new")(ids), loading.load_model(family_dirs["olmo3"])(ids))
    write(each, {**each, "rope_theta": 5e5})
    config = read_config(tmp_path / "new")
    assert isinstance(config, FamilyConfig)
    assert [config.layer_rope(layer).theta for layer in range(4)] == [5e5, 5e5, 5e5, 1e4]
    assert len(loading.load_model(tmp_path / "new").ropes) == 2


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_a_window_that_all_layers_see_is_the_context(name: str, tmp_path: Path, family_dirs: dict[str, Path]) -> None:
    values = json.loads((family_dirs[name] / "config.json").read_text())
    for window, context in ((32, 32), (None, 512), (4096, 512)):
        (tmp_path / "config.json").write_text(json.dumps({**values, "sliding_window": window}))
        assert read_config(tmp_path).max_context_length == context


def test_a_head_that_is_missing_is_no_tied_one(tmp_path: Path, family_dirs: dict[str, Path]) -> None:
    path = tmp_path / "model"
    shutil.copytree(family_dirs["olmo2"], path)
    weights = mx.load(str(path / "model.safetensors"))
    del weights["lm_head.weight"]
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    for open_ in (loading.load, describe):
        with pytest.raises(InputError, match=r"lm_head\.weight is missing; .* \(tie_word_embeddings\)"):
            open_(path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path, family_dirs: dict[str, Path]) -> None:
    path = tmp_path / "model"
    shutil.copytree(family_dirs["llama"], path)
    weights = mx.load(str(path / "model.safetensors"))
    kept = weights.pop("model.layers.1.mlp.up_proj.weight")
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    for open_ in (loading.load, describe):
        with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
            open_(path)
    mx.save_safetensors(str(path / "model.safetensors"), {**weights, "model.layers.1.mlp.up_proj.weight": kept[1:]})
    with pytest.raises(InputError, match=r"up_proj\.weight is \(79, 48\), and config\.json implies \(80, 48\)"):
        loading.load(path)


def test_mlx_lm_and_transformers_are_not_imported(family_dirs: dict[str, Path]) -> None:
    code = (
        "import sys; from elm_mlx.store import loading; loading.load(sys.argv[1]);"
        "print([name for name in sys.modules if name.split('.')[0] in ('mlx_lm', 'transformers')])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, family_dirs["llama"]], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_mlx_lm_stays_as_it_is(family_dirs: dict[str, Path], theirs: dict[str, Any]) -> None:
    from mlx_lm.models import activations, cache

    loading.load(family_dirs["mamba"])
    assert activations.swiglu.__module__ != "elm_mlx.model.ops"
    assert cache.ArraysCache is not StateCache and isinstance(theirs["llama"], nn.Module)


def test_layers_share_their_rotation(family_dirs: dict[str, Path]) -> None:
    counts = {name: len(getattr(loading.load_model(path), "ropes", ())) for name, path in family_dirs.items()}
    assert counts == {**dict.fromkeys(NAMES, 1), "smollm3": 2, "gemma3_text": 2, "mamba": 0}
    model = loading.load_model(family_dirs["phi3"])
    assert [name for name, _ in model.named_modules() if "rope" in name.split(".")[0] or "_rope" in name] == []
    assert all(rope.rotate is None for rope in model.ropes)


def test_the_first_olmo_is_its_formulas(family_dirs: dict[str, Path]) -> None:
    """LayerNorm without weights, RoPE on half heads, SwiGLU, a tied head: in NumPy."""
    weights = {k: np.array(v, np.float64) for k, v in mx.load(str(family_dirs["olmo"] / "model.safetensors")).items()}
    assert not any("norm" in name for name in weights)
    heads, width, length = 6, 8, len(IDS)

    def norm(x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    cosines, sines = np.cos(angles), np.sin(angles)

    def turned(x: Any) -> Any:
        left, right = np.split(x, 2, axis=-1)
        return np.concatenate([left * cosines - right * sines, right * cosines + left * sines], -1)

    x = weights["model.embed_tokens.weight"][IDS]
    for layer in ("model.layers.0", "model.layers.1"):
        normed = norm(x)
        q, k, v = (
            (normed @ weights[f"{layer}.self_attn.{name}_proj.weight"].T).reshape(length, heads, width).swapaxes(0, 1)
            for name in "qkv"
        )
        scores = turned(q) @ turned(k).swapaxes(1, 2) / np.sqrt(width)
        scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        seen = (shares / shares.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(length, -1)
        x = x + seen @ weights[f"{layer}.self_attn.o_proj.weight"].T
        gate, up = (norm(x) @ weights[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    expected = norm(x) @ weights["model.embed_tokens.weight"].T
    assert np.allclose(np.array(loading.load_model(family_dirs["olmo"])(mx.array([IDS]))[0]), expected, atol=1e-4)
