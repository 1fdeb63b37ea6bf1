"""The names of weights and settings in GGUF, a table a family, for what is written so and for what is read.

The names are llama.cpp's (`src/llama-arch.cpp`), and so is what a file's architecture has room for: its OpenELM has a
gate, norms of queries and keys and a tied head, and nothing else. llama.cpp's Llama, SmolLM3 and OLMo rotate neighbours
within a head where Hugging Face's rotate its halves, so that the rows of their queries and keys lie in another order;
and its Gemma multiplies by a norm's weight where Hugging Face's multiply by 1 more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elm_mlx.errors import InputError
from elm_mlx.model.config import MODEL_TYPE, Config, ModelConfig
from elm_mlx.model.families import FAMILIES, FamilyConfig
from elm_mlx.model.rope_config import RopeConfig
from elm_mlx.reading import LARGEST_SIZE, Keys, short

Array = np.ndarray[Any, np.dtype[Any]]
Value = int | float | bool | str | Array  # of metadata: whole numbers have 32 bits, and so have the others

_MAX_LAYERS = 10_000
_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")
_LLAMA = {
    "model.embed_tokens": ("token_embd",),
    "model.norm": ("output_norm",),
    "lm_head": ("output",),
    "model.layers.{}.input_layernorm": ("blk.{}.attn_norm",),
    "model.layers.{}.self_attn.q_proj": ("blk.{}.attn_q",),
    "model.layers.{}.self_attn.k_proj": ("blk.{}.attn_k",),
    "model.layers.{}.self_attn.v_proj": ("blk.{}.attn_v",),
    "model.layers.{}.self_attn.o_proj": ("blk.{}.attn_output",),
    "model.layers.{}.post_attention_layernorm": ("blk.{}.ffn_norm",),
    "model.layers.{}.mlp.gate_proj": ("blk.{}.ffn_gate",),
    "model.layers.{}.mlp.up_proj": ("blk.{}.ffn_up",),
    "model.layers.{}.mlp.down_proj": ("blk.{}.ffn_down",),
}
_PHI3 = {
    **_LLAMA,
    "model.layers.{}.self_attn.qkv_proj": ("blk.{}.attn_qkv",),
    "model.layers.{}.mlp.gate_up_proj": ("blk.{}.ffn_up",),  # gate and up projection in one, as they are there too
}
_QWEN3 = {
    **_LLAMA,
    "model.layers.{}.self_attn.q_norm": ("blk.{}.attn_q_norm",),
    "model.layers.{}.self_attn.k_norm": ("blk.{}.attn_k_norm",),
}
_OLMO2 = {
    **_QWEN3,
    "model.layers.{}.post_attention_layernorm": ("blk.{}.post_attention_norm",),
    "model.layers.{}.post_feedforward_layernorm": ("blk.{}.post_ffw_norm",),
}
_GEMMA = {
    **_QWEN3,
    "model.layers.{}.post_attention_layernorm": ("blk.{}.post_attention_norm",),
    "model.layers.{}.pre_feedforward_layernorm": ("blk.{}.ffn_norm",),
    "model.layers.{}.post_feedforward_layernorm": ("blk.{}.post_ffw_norm",),
}
_OPENELM = {
    "transformer.token_embeddings": ("token_embd",),
    "transformer.norm": ("output_norm",),
    "transformer.layers.{}.attn_norm": ("blk.{}.attn_norm",),
    "transformer.layers.{}.attn.qkv_proj": ("blk.{}.attn_qkv",),
    "transformer.layers.{}.attn.q_norm": ("blk.{}.attn_q_norm",),
    "transformer.layers.{}.attn.k_norm": ("blk.{}.attn_k_norm",),
    "transformer.layers.{}.attn.out_proj": ("blk.{}.attn_output",),
    "transformer.layers.{}.ffn_norm": ("blk.{}.ffn_norm",),
    "transformer.layers.{}.ffn.proj_1": ("blk.{}.ffn_gate", "blk.{}.ffn_up"),
    "transformer.layers.{}.ffn.proj_2": ("blk.{}.ffn_down",),
}


@dataclass(frozen=True)
class Architecture:
    """A family's network in llama.cpp.

    Attributes:
        name: its `general.architecture`.
        tensors: our names without `.weight` and `.bias`, `{}` for the layer's number, and GGUF's: several hold the
            rows of ours, one below the other, in equal parts.
        neighbours: RoPE rotates neighbours within a head: `interleaved` says where the rows go.
        free_heads: a head may have another size than the hidden size over the number of heads.
        tied, untied: it can have the embedding as its head, and another one.
        turns: every so many layers one has no window, or of SmolLM3 no RoPE, where nothing is said; 0 for none.
    """

    name: str
    tensors: Mapping[str, tuple[str, ...]]
    neighbours: bool = False
    free_heads: bool = False
    tied: bool = True
    untied: bool = True
    turns: int = 0


ARCHITECTURES = {
    MODEL_TYPE: Architecture("openelm", _OPENELM, free_heads=True),
    "llama": Architecture("llama", _LLAMA, neighbours=True, free_heads=True),
    "mistral": Architecture("llama", _LLAMA, neighbours=True, free_heads=True),
    "phi3": Architecture("phi3", _PHI3),
    "qwen2": Architecture("qwen2", _LLAMA),
    "qwen3": Architecture("qwen3", _QWEN3, free_heads=True),
    "olmo": Architecture("olmo", _LLAMA, neighbours=True),
    "olmo2": Architecture("olmo2", _OLMO2, tied=False),
    "olmo3": Architecture("olmo2", _OLMO2, tied=False),
    "smollm3": Architecture("smollm3", _LLAMA, neighbours=True, turns=4),
    "gemma2": Architecture("gemma2", _GEMMA, free_heads=True, untied=False, turns=2),
    "gemma3_text": Architecture("gemma3", _GEMMA, free_heads=True, turns=6),
}
# Gemma's own settings: the key behind the architecture's name, and the one of `config.json`.
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# Of so many layers are the models of 27B, whose scores llama.cpp scales by another width than a head's.
_GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
# Of all but OpenELM: the key behind the architecture's name, and the one of `config.json`.
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
}
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# How Llama 3.1 and 3.2 scale RoPE: a file has the divisors alone, which these three make with a factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Part:
    """Some rows of one of our tensors, which are a tensor of GGUF.

    Attributes:
        heads: the rows are of so many heads, and lie there as `interleaved` puts them; 0 where they lie as ours do.
        more: the values there are larger by so much.
    """

    name: str
    start: int
    stop: int
    heads: int = 0
    more: int = 0


def parts(name: str, rows: int, config: Config) -> tuple[Part, ...]:
    """Returns the tensors of GGUF that hold the weight `name` of `rows` rows, first row to last.

    Raises:
        KeyError: GGUF has no such weight of this architecture.
    """
    architecture = ARCHITECTURES[config.model_type]
    module, _, kind = name.rpartition(".")
    layer = _LAYER.search(module)
    pattern = _LAYER.sub("{}", module, count=1)
    theirs = architecture.tensors[pattern]
    size = rows // len(theirs)
    heads = 0
    if architecture.neighbours and isinstance(config, FamilyConfig):
        key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(pattern.rpartition(".")[2])
        heads = 0 if key is None else int(config.values[key])
    number = layer[0] if layer else ""
    more = int(isinstance(config, FamilyConfig) and config.family.offset_norms and pattern.endswith("norm"))
    return tuple(
        Part(f"{each.format(number)}.{kind}", size * at, size * (at + 1), heads, more) for at, each in enumerate(theirs)
    )


def interleaved(rows: Array, heads: int) -> Array:
    """Returns rows of `heads` heads, whose RoPE rotates the halves of a head, for one that rotates neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def separated(rows: Array, heads: int) -> Array:
    """Returns rows that `interleaved` has put into their order, in the one that they had before."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def check_expressible(config: Config, where: str) -> None:
    """Raises InputError for a model whose network llama.cpp does not have: says what it lacks."""
    if config.model_type not in ARCHITECTURES:
        raise InputError(f"{where}: of the family {FAMILIES[config.model_type].name}, which is not written as GGUF")
    missing = _missing(config)
    if missing:
        name = "OpenELM" if isinstance(config, ModelConfig) else config.family.name
        raise InputError(f"{where}: llama.cpp's {name} has no place for {' and '.join(missing)}")


def _missing(config: Config) -> list[str]:
    if isinstance(config, ModelConfig):
        lacks = {
            "an FFN without a gate": not config.ffn_with_glu,
            "queries and keys without norms": not config.normalize_qk_projections,
            "a head of its own beside the embedding": not config.share_input_output_layers,
        }
        return [what for what, holds in lacks.items() if holds]
    architecture, values = ARCHITECTURES[config.model_type], config.values
    windows = set(values["layer_types"] or ()) - {"full_attention"}
    ropes = {kind: rope for kind, rope in config.ropes.items() if kind == "full_attention" or windows}
    lacks = {
        f"heads of {config.head_dim}": not architecture.free_heads
        and config.head_dim * values["num_attention_heads"] != config.model_dim,
        "biases": architecture.name != "llama" and (values["attention_bias"] or values["mlp_bias"]),
        "a sliding window in some layers": bool(windows) and architecture.name not in ("olmo2", "gemma2", "gemma3"),
        "a head of its own beside the embedding": not architecture.untied and not config.share_input_output_layers,
        "RoPE in other layers than three of four": values.get("no_rope_layers", _rotated(config)) != _rotated(config),
        "scores and logits that are not capped": config.family.capped and None in (values.get(key) for key in _CAPS),
        "another scale of scores (query_pre_attn_scalar)": values.get("query_pre_attn_scalar", 0) != _scalar(config),
        "RoPE whose frequencies change with the length (dynamic)": any(
            rope.kind == "dynamic" and rope.factor != 1 for rope in ropes.values()
        ),
        "YaRN with a ramp of its own": any(rope.kind == "yarn" and not _usual_ramp(rope) for rope in ropes.values()),
        "divisors of RoPE's frequencies": architecture.name not in ("llama", "phi3")
        and any(rope.kind in ("llama3", "longrope") for rope in ropes.values()),
        "RoPE that is scaled, or has another base, in layers with a sliding window": bool(windows)
        and (ropes["sliding_attention"].kind, ropes["sliding_attention"].theta)
        != ("default", ropes["sliding_attention" if architecture.name == "gemma3" else "full_attention"].theta),
    }
    return [what for what, holds in lacks.items() if holds]


def _rotated(config: FamilyConfig) -> list[int]:
    """Returns which layers llama.cpp's SmolLM3 rotates, as `no_rope_layers` has it."""
    return [int((layer + 1) % 4 != 0) for layer in range(config.num_layers)]


def _scalar(config: FamilyConfig) -> int:
    """Returns the `query_pre_attn_scalar` that llama.cpp takes for a Gemma; 0 for another family."""
    if config.model_type not in _GEMMA_27B:
        return 0
    even = config.model_dim // int(config.values["num_attention_heads"])
    return even if config.num_layers == _GEMMA_27B[config.model_type] else config.head_dim


def _usual_ramp(rope: RopeConfig) -> bool:
    """Returns True where YaRN's ramp goes from 32 turns in the original context to one, in whole pairs."""
    first, last = (
        rope.dims * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta)) for turns in (32, 1)
    )
    usual = max(math.floor(first), 0), min(math.ceil(last), rope.dims - 1)
    return rope.bounds[0] == usual[0] and abs(rope.bounds[1] - usual[1]) < 0.01


def metadata(config: Config) -> dict[str, Value]:
    """Returns what a file says of the network: `general.architecture`, and the keys that begin with its name.

    The context is the one that this program reads at most: of a model whose layers all have a window, the window.
    """
    name = ARCHITECTURES[config.model_type].name
    values: dict[str, Value]
    if isinstance(config, ModelConfig):
        values = {
            "block_count": config.num_layers,
            "context_length": config.max_context_length,
            "embedding_length": config.model_dim,
            "feed_forward_length": np.array(config.ffn_dims, np.int32),
            "attention.head_count": np.array(config.num_query_heads, np.int32),
            "attention.head_count_kv": np.array(config.num_kv_heads, np.int32),
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": float(config.rope_freq_constant),
        }
    else:
        values = {key: int(config.values[own]) for key, own in _SIZES.items()}
        values["context_length"] = config.max_context_length
        norm = "layer_norm_epsilon" if config.family.bare_norms else "layer_norm_rms_epsilon"
        values[f"attention.{norm}"] = float(config.values["rms_norm_eps"])
        values |= _rope(config) | _windows(config)
    values["vocab_size"] = config.vocab_size
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in values.items()}


def _rope(config: FamilyConfig) -> dict[str, Value]:
    rope = config.ropes["full_attention"]
    values: dict[str, Value] = {"rope.dimension_count": rope.dims, "rope.freq_base": float(rope.theta)}
    if config.model_type == "phi3" or rope.kind in ("longrope", "yarn"):
        values["rope.scaling.original_context_length"] = rope.original
    if rope.kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind == "longrope":
        values |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": float(rope.scale)}
    if rope.kind == "yarn":  # there on top of the paper's own factor of attention
        values["rope.scaling.attn_factor"] = rope.scale / (1 + 0.1 * math.log(max(rope.factor, 1.0)))
    return values


def _windows(config: FamilyConfig) -> dict[str, Value]:
    if config.model_type == "phi3":  # 0 says that there is none, which llama.cpp tells Phi-4 by
        return {"attention.sliding_window": int(config.values["sliding_window"] or 0)}
    types = config.values["layer_types"]
    if types is None or "sliding_attention" not in types:
        return {}
    values: dict[str, Value] = {"attention.sliding_window": int(config.values["sliding_window"])}
    sliding = [kind == "sliding_attention" for kind in types]
    if sliding != _usual_turns(ARCHITECTURES[config.model_type].turns, len(types)):
        values["attention.sliding_window_pattern"] = np.array(sliding)
    if config.model_type == "gemma3_text":
        values["rope.freq_base_swa"] = float(config.ropes["sliding_attention"].theta)
    return values | {key: float(config.values[key]) for key in _CAPS if config.family.capped}


def _usual_turns(turns: int, layers: int) -> list[bool]:
    """Returns which layers have a window where a file says nothing of it."""
    return [bool((layer + 1) % turns) for layer in range(layers)] if turns else []


def rope_divisors(config: Config) -> dict[str, Array]:
    """Returns the float32 tensors that divide RoPE's frequencies, by GGUF's names; most models have none."""
    if isinstance(config, ModelConfig):
        return {}
    rope = config.ropes["full_attention"]
    if rope.kind == "llama3":
        return {FREQUENCIES: _llama3_divisors(rope)}
    if rope.kind == "longrope":
        return {LONG: np.array(rope.long, np.float32), SHORT: np.array(rope.short, np.float32)}
    return {}


def _llama3_divisors(rope: RopeConfig) -> Array:
    """Llama 3.1's rule: slow frequencies are divided by the factor, fast ones stay, those between by a ramp."""
    low, high = rope.bounds
    frequencies = rope.theta ** -(np.arange(0, rope.dims, 2) / rope.dims)
    turns = rope.original * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1) if high > low else (turns > high).astype(float)
    return (1 / ((1 - smooth) / rope.factor + smooth)).astype(np.float32)


def config_values(
    metadata: Mapping[str, Any], tensors: Collection[str], divisors: Mapping[str, Array], where: str
) -> dict[str, Any]:
    """Returns the `config.json` that a file's metadata mean, of any family but OpenELM, without tokens.

    Args:
        tensors: the names of all tensors in the file.
        divisors: those of FREQUENCIES, LONG and SHORT that it has, as float32.
        where: the file, for messages.

    Raises:
        InputError: it is of an architecture that is not known here, or a key is missing or of the wrong type.
    """
    keys = Keys(where, metadata)
    model_type = model_type_of(metadata, where)
    prefix = ARCHITECTURES[model_type].name
    if keys.size(f"{prefix}.expert_count", 1) > 1:
        raise InputError(f"{where}: a mixture of experts, which is not supported")
    optional = {"attention.key_length", "attention.value_length", "attention.head_count_kv"}
    values: dict[str, Any] = {"model_type": model_type}
    for key, own in _SIZES.items():
        if key not in optional or keys.says(f"{prefix}.{key}"):
            values[own] = keys.size(f"{prefix}.{key}", most=_MAX_LAYERS if key == "block_count" else LARGEST_SIZE)
    norm = "layer_norm_epsilon" if FAMILIES[model_type].bare_norms else "layer_norm_rms_epsilon"
    values["rms_norm_eps"] = keys.number(f"{prefix}.attention.{norm}", 1e-5, high=1.0)
    values["max_position_embeddings"] = keys.size(f"{prefix}.context_length")
    values["tie_word_embeddings"] = "output.weight" not in tensors
    values["attention_bias"] = "blk.0.attn_q.bias" in tensors
    values["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    heads = values["num_attention_heads"]
    head_dim = values.get("head_dim") or values["hidden_size"] // heads
    dims = keys.size(f"{prefix}.rope.dimension_count", head_dim)
    if dims != head_dim:
        values["partial_rotary_factor"] = dims / head_dim
    values["rope_theta"] = keys.number(f"{prefix}.rope.freq_base", 10_000.0, low=1.0)
    scaling = _scaling(keys, prefix, values, divisors, dims)
    if scaling is not None:
        values["rope_scaling"] = scaling
    if metadata.get(f"{prefix}.attention.clamp_kqv"):
        values["clip_qkv"] = keys.number(f"{prefix}.attention.clamp_kqv", 0.0)
    window = metadata.get(f"{prefix}.attention.sliding_window")
    if model_type in ("phi3", "olmo3"):
        values["sliding_window"] = window or None
    pattern = metadata.get(f"{prefix}.attention.sliding_window_pattern")
    turns = ARCHITECTURES[model_type].turns
    if FAMILIES[model_type].offset_norms and not isinstance(pattern, np.ndarray):
        turns = keys.size(f"{prefix}.attention.sliding_window_pattern", turns)
        pattern = np.array(_usual_turns(turns, values["num_hidden_layers"]))
    if model_type in ("olmo3", *_GEMMA_27B) and isinstance(pattern, np.ndarray):
        values["layer_types"] = ["sliding_attention" if each else "full_attention" for each in pattern.tolist()]
    return values | (
        _gemma_values(keys, prefix, values) if FAMILIES[model_type].offset_norms else {"hidden_act": "silu"}
    )


def _gemma_values(keys: Keys, prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what else the `config.json` of a Gemma says, by llama.cpp's defaults."""
    large = values["num_hidden_layers"] == _GEMMA_27B[values["model_type"]]
    even = values["hidden_size"] // values["num_attention_heads"]
    found = {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": keys.size(f"{prefix}.attention.sliding_window", 4096),
        "query_pre_attn_scalar": even if large or "head_dim" not in values else values["head_dim"],
    }
    if prefix == "gemma3":
        return found | {"rope_local_base_freq": keys.number(f"{prefix}.rope.freq_base_swa", 10_000.0, low=1.0)}
    return found | {key: keys.number(f"{prefix}.{key}", usual, low=1e-6) for key, usual in _CAPS.items()}


def model_type_of(metadata: Mapping[str, Any], where: str) -> str:
    """Returns the `model_type` of the model in a file. Raises InputError for an architecture that is not known here."""
    name = metadata.get("general.architecture")
    if metadata.get("general.type", "model") != "model":
        raise InputError(f"{where}: holds no model, but {short(metadata['general.type'])} (general.type)")
    if name == "olmo2":
        return "olmo3" if metadata.get("olmo2.attention.sliding_window") else "olmo2"
    for model_type, architecture in ARCHITECTURES.items():
        if architecture.name == name:
            return model_type
    known = ", ".join(dict.fromkeys(each.name for each in ARCHITECTURES.values()))
    raise InputError(f"{where}: its architecture is {short(name)} (general.architecture); supported are {known}")


def _scaling(
    keys: Keys, prefix: str, values: Mapping[str, Any], divisors: Mapping[str, Array], dims: int
) -> dict[str, Any] | None:
    """Returns the `rope_scaling` of a file's metadata and tensors; None where RoPE is not scaled."""
    longest = values["max_position_embeddings"]
    if FREQUENCIES in divisors:
        return _llama3_scaling(keys.where, divisors[FREQUENCIES], values["rope_theta"], dims)
    original = keys.size(f"{prefix}.rope.scaling.original_context_length", longest)
    if LONG in divisors and SHORT in divisors:
        return {
            "rope_type": "longrope",
            "long_factor": divisors[LONG].tolist(),
            "short_factor": divisors[SHORT].tolist(),
            "original_max_position_embeddings": original,
            "attention_factor": keys.number(f"{prefix}.rope.scaling.attn_factor", 1.0),
        }
    kind = keys.get(f"{prefix}.rope.scaling.type")
    factor = keys.number(f"{prefix}.rope.scaling.factor", keys.number(f"{prefix}.rope.scale_linear", 1.0))
    if factor in (0.0, 1.0) or kind == "none":
        return None
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise InputError(f"{keys.where}: RoPE is scaled by {short(kind)}, which is not known here")
    sharper = keys.number(f"{prefix}.rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(max(factor, 1.0)))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": sharper,
    }


def _llama3_scaling(where: str, divisors: Array, theta: float, dims: int) -> dict[str, Any]:
    factor = float(divisors.max())
    bounds = (_LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"])
    original = int(_LLAMA3["original_max_position_embeddings"])
    usual = RopeConfig("llama3", dims, theta, original, factor=factor, bounds=bounds)
    if divisors.shape != (dims // 2,) or not np.allclose(_llama3_divisors(usual), divisors, rtol=1e-4):
        raise InputError(f"{where}: {FREQUENCIES} divides RoPE's frequencies otherwise than Llama 3 does")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
