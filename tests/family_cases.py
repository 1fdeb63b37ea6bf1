"""Small models of every family with every RoPE and every way to tie the head, as `benchmarks/families.py` shows them to
transformers and the tests show them to us. Weights are drawn from a tensor's name, so that no file has to be kept."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

IDS = [(i * 37 + 11) % 61 for i in range(40)]
LENGTHS = (12, 40)  # of prompts: within the length that `ORIGINAL` is, and beyond it
ORIGINAL = 16
NEW_TOKENS = 8  # of greedy answers to prompts of ORIGINAL - 4 tokens, over the switch from short factors to long ones

_SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_MAMBA = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "state_size": 4,
    "conv_kernel": 4, "time_step_rank": 2, "expand": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_LONG = {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.5]}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
_GEMMA = {
    "hidden_size": 64,  # whose root bfloat16 has: mlx-lm rounds it so, as in training, and transformers in float32 not
    "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24, "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0, "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
}  # fmt: skip
_GEMMA2 = {
    "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24,
    "rope_theta": 10_000.0, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
_PARTIAL = {"short_factor": [1.0, 1.3], "long_factor": [1.5, 4.0]}


def _llama(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, **changes}


def _scaled(**scaling: Any) -> dict[str, Any]:
    return _llama(rope_theta=10_000.0, rope_scaling=scaling)


def _phi3(**changes: Any) -> dict[str, Any]:
    own = {"original_max_position_embeddings": ORIGINAL, "sliding_window": None, "rope_theta": 10_000.0}
    return {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **own, **changes}


def _other(name: str, architecture: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": name, "architectures": [architecture], **changes}


def _olmo3(**changes: Any) -> dict[str, Any]:
    return _other("olmo3", "Olmo3ForCausalLM", num_hidden_layers=4, sliding_window=8, **changes)


CASES: dict[str, dict[str, Any]] = {
    "llama": _llama(rope_theta=10_000.0),
    "llama, theta unsaid": _llama(),
    "llama, head_dim": _llama(head_dim=16, rope_theta=500_000.0),
    "llama, biases": _llama(attention_bias=True, mlp_bias=True),
    "llama, heads unsaid": _llama(num_key_value_heads=None),
    "llama, linear": _scaled(rope_type="linear", factor=2.5),
    "llama, linear by `type`": _scaled(type="linear", factor=2.5),
    "llama, dynamic": {**_scaled(type="dynamic", factor=2.0), "max_position_embeddings": 24},
    "llama, yarn": _scaled(**_YARN),
    "llama, yarn with its keys": _scaled(**_YARN, beta_fast=8.0, beta_slow=0.5, attention_factor=1.3),
    "llama, yarn by DeepSeek": _scaled(**_YARN, mscale=1.0, mscale_all_dim=0.7, beta_fast=4.0),
    "llama, yarn from its context": {**_scaled(rope_type="yarn", factor=4.0), "max_position_embeddings": ORIGINAL},
    "llama, llama3": _scaled(**_LLAMA3),
    "llama, longrope": _scaled(rope_type="longrope", factor=4.0, original_max_position_embeddings=ORIGINAL, **_LONG),
    "llama, `rope_parameters`": _llama(rope_parameters={**_LLAMA3, "rope_theta": 10_000.0}),
    "llama, tied": _llama(tie_word_embeddings=True),
    "llama, tying unsaid": {k: v for k, v in _llama().items() if k != "tie_word_embeddings"},
    "llama, tied and a head": _llama(tie_word_embeddings=True),
    "llama, tied and the head again": _llama(tie_word_embeddings=True),
    "mistral": _other("mistral", "MistralForCausalLM", rope_theta=10_000.0, head_dim=16),
    "mistral, window": _other("mistral", "MistralForCausalLM", sliding_window=40),
    "mistral, no window, tied": _other("mistral", "MistralForCausalLM", sliding_window=None, tie_word_embeddings=True),
    "mistral, yarn": _other("mistral", "MistralForCausalLM", rope_scaling=_YARN, sliding_window=None),
    "phi3": _phi3(),
    "phi3, partial": _phi3(partial_rotary_factor=0.5),
    "phi3, longrope": _phi3(rope_scaling={"type": "longrope", **_LONG}),
    "phi3, su": _phi3(rope_scaling={"type": "su", **_LONG}),
    "phi3, longrope, partial, tied": _phi3(
        rope_scaling={"type": "longrope", **_PARTIAL}, partial_rotary_factor=0.5, tie_word_embeddings=True
    ),
    "phi3, `rope_parameters`": _phi3(rope_parameters={"rope_type": "longrope", "rope_theta": 10_000.0, **_LONG}),
    "olmo": _other("olmo", "OlmoForCausalLM", num_key_value_heads=4),
    "olmo, tied, linear": _other(
        "olmo", "OlmoForCausalLM", tie_word_embeddings=True, rope_scaling={"type": "linear", "factor": 2.0}
    ),
    "olmo2": _other("olmo2", "Olmo2ForCausalLM", rope_theta=500_000.0, attention_bias=True),
    "olmo2, yarn": _other("olmo2", "Olmo2ForCausalLM", rope_scaling=_YARN),
    "olmo3": _olmo3(rope_theta=500_000.0),
    "olmo3, yarn": _olmo3(rope_theta=500_000.0, rope_scaling=_YARN),
    "olmo3, layers apart": _olmo3(
        rope_parameters={
            "full_attention": {**_YARN, "rope_theta": 500_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        }
    ),
    "qwen2": _other("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True, use_sliding_window=False),
    "qwen2, yarn, own head": _other("qwen2", "Qwen2ForCausalLM", rope_scaling=_YARN, rope_theta=1_000_000.0),
    "qwen3": _other("qwen3", "Qwen3ForCausalLM", head_dim=16, rope_theta=1_000_000.0, tie_word_embeddings=True),
    "qwen3, yarn, own head": _other("qwen3", "Qwen3ForCausalLM", head_dim=8, rope_scaling=_YARN),
    "smollm3": _other("smollm3", "SmolLM3ForCausalLM", num_hidden_layers=4, rope_theta=5_000_000.0),
    "smollm3, its layers": _other(
        "smollm3",
        "SmolLM3ForCausalLM",
        num_hidden_layers=3,
        no_rope_layers=[0, 1, 1],
        attention_bias=True,
        rope_scaling=_YARN,
        tie_word_embeddings=False,
    ),
    "gemma3": _other("gemma3_text", "Gemma3ForCausalLM", **_GEMMA),
    "gemma3, linear": _other(
        "gemma3_text", "Gemma3ForCausalLM", **_GEMMA, rope_scaling={"rope_type": "linear", "factor": 8.0}
    ),
    "gemma2": _other("gemma2", "Gemma2ForCausalLM", **_GEMMA2, attn_logit_softcapping=4.0, final_logit_softcapping=3.0),
    "gemma2, caps unsaid": _other("gemma2", "Gemma2ForCausalLM", **_GEMMA2),
    "mamba": _other("mamba", "MambaForCausalLM"),
    "mamba, biases, own head": _other(
        "mamba", "MambaForCausalLM", use_bias=True, tie_word_embeddings=False, layer_norm_epsilon=1e-3
    ),
}


def config(name: str) -> dict[str, Any]:
    """The `config.json` of a case, as transformers 4 or 5 takes it. Whose value is None is unsaid."""
    values = {**(_MAMBA if name.startswith("mamba") else _SHAPE), **CASES[name]}
    return {key: value for key, value in values.items() if value is not None or key == "sliding_window"}


def write(path: Path, name: str, values: dict[str, Any] | None = None) -> Path:
    """The case `name` as a model directory of Hugging Face's layout; with the config `values`, if given."""
    from safetensors.numpy import save_file

    from elm_mlx.model.config import read_config

    path.mkdir(parents=True)
    own = config(name)
    (path / "config.json").write_text(json.dumps(own))
    shapes = read_config(path).shapes()
    weights = {key: _drawn(key, shape) for key, shape in shapes.items()}
    if name.endswith("a head"):
        weights["lm_head.weight"] = _drawn("lm_head.weight", shapes["model.embed_tokens.weight"])
    if name.endswith("the head again"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(own if values is None else values))
    return path


def _drawn(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("A_log"):
        return np.log(np.arange(1, shape[1] + 1, dtype=np.float32)) + 0.1 * values
    if len(shape) == 1:
        return (0.1 * values + (0 if name.endswith("bias") else 1)).astype(np.float32)
    if name.endswith("conv1d.weight"):
        return np.ascontiguousarray(0.3 * values.swapaxes(1, 2))  # as PyTorch has it
    return values * (1.0 if "embed" in name or "head" in name else 2.0 / math.sqrt(shape[-1]))
