"""Models of other families: one normal form of their `config.json`, every value checked, and the shapes that follow.

Reads those of Llama, Mistral, Qwen, SmolLM3, Gemma, Phi-3, OLMo and Mamba as transformers 4 and 5 write them; the
networks are `other_networks`'. Importing this imports no MLX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from elm_mlx.errors import InputError
from elm_mlx.model.rope_config import LAYER_TYPES, RopeConfig, RopeRules, read_ropes
from elm_mlx.reading import LARGEST_SIZE, Keys, json_object, short
from elm_mlx.safetensors_file import Entry, read_header, weight_files

# A config.json may come from anywhere. These are far above what any model has, and what they allow is still a shape
# that can be written down: nothing is made of it before the weights' headers have been compared with it.
_MAX_LAYERS = 10_000
_MAX_VOCABULARY = 1 << 24
_MAX_WIDTH = 1 << 22
_MAX_HEADS = 1 << 14
_MAX_HEAD_DIM = 1 << 12
_MAX_WEIGHT = 1 << 33  # values of one weight: four times Llama 405B's largest
_MAX_PARAMETERS = 1 << 42
# What Mamba may read: it has no positions, so its config names no limit. Far above what any text here has.
_UNBOUNDED = 1 << 20


@dataclass(frozen=True)
class Family:
    """A family's network in mlx-lm: the file, the names of its body (all but the head) and embedding, and its traits.

    Attributes:
        positions: it attends to keys and values. Else it keeps a state, from which nothing can be removed, and texts
            in one row would run into each other.
        bare_norms: its norms are LayerNorms without weights, not RMSNorms.
        norms: they come before attention and FFN, after them, or both.
        normed_heads: whether queries and keys are normed: all heads together, or each by itself.
        biased_heads: queries, keys and values have biases, and nothing else has.
        offset_norms: a norm multiplies by 1 + its weight, and the embedding by the root of its width; the FFN's gate is
            a GELU. Layers with and without a window take turns.
        capped: a tanh keeps the scores of its attention within limits, and its logits.
        windowed: all of its layers have a `sliding_window`. mlx-lm's network has none, so no more than a window is
            read at once, where both are the same.
        switched_windows: its config has `use_sliding_window`, and mlx-lm's network no windows.
        eps, window, tied, rope, head_dim: the defaults of `rms_norm_eps`, `sliding_window`, `tie_word_embeddings`, RoPE
            and `head_dim`, as in transformers.
    """

    name: str
    file: str
    body: str = "model"
    embedding: str = "embed_tokens"
    positions: bool = True
    bare_norms: bool = False
    windowed: bool = False
    switched_windows: bool = False
    norms: Literal["before", "after", "both"] = "before"
    normed_heads: Literal["all", "each"] | None = None
    biased_heads: bool = False
    offset_norms: bool = False
    capped: bool = False
    eps: float = 1e-5
    rope: RopeRules = field(default_factory=RopeRules)
    window: int | None = None
    tied: bool = False
    head_dim: int | None = None


FAMILIES = {
    "llama": Family("Llama", "llama", eps=1e-6),
    "mistral": Family("Mistral", "llama", windowed=True, eps=1e-6, window=4096),
    "phi3": Family("Phi-3", "phi3", windowed=True, rope=RopeRules(original=4096, phi3=True)),
    # mlx-lm's own file for it wants another package, and fails on any prompt; it is a Llama but for its norms.
    "olmo": Family("OLMo", "llama", bare_norms=True),
    "olmo2": Family("OLMo 2", "olmo2", norms="after", normed_heads="all"),
    "olmo3": Family(
        "OLMo 3", "olmo3", norms="after", normed_heads="all", rope=RopeRules(500_000.0, windows_scaled=False),
        window=4096,
    ),
    "qwen2": Family("Qwen 2", "qwen2", biased_heads=True, switched_windows=True, eps=1e-6),
    "qwen3": Family("Qwen 3", "qwen3", normed_heads="each", switched_windows=True, eps=1e-6, head_dim=128),
    "smollm3": Family("SmolLM3", "smollm3", switched_windows=True, eps=1e-6, rope=RopeRules(2_000_000.0), tied=True),
    "gemma3_text": Family(
        "Gemma 3", "gemma3_text", norms="both", normed_heads="each", offset_norms=True, eps=1e-6, tied=True,
        rope=RopeRules(1_000_000.0, local=10_000.0, windows_scaled=False), window=4096, head_dim=256,
    ),
    # By mlx-lm's network of Gemma 3, which has windows; it differs in what is capped, and has no norms of heads.
    "gemma2": Family(
        "Gemma 2", "gemma3_text", norms="both", offset_norms=True, capped=True, eps=1e-6, tied=True, window=4096,
        head_dim=256,
    ),
    "mamba": Family("Mamba", "mamba", "backbone", "embeddings", positions=False, tied=True),
}  # fmt: skip
# Why others of these makers cannot be taken.
_NOT_TAKEN = {
    "gemma": "mlx-lm's network scales its embedding otherwise than the published weights want in float32",
    "gemma3": "a model of pictures too; the text models of Gemma 3, 270M and 1B, are gemma3_text",
    "qwen2_moe": "a mixture of experts", "qwen3_moe": "a mixture of experts", "mixtral": "a mixture of experts",
    "qwen3_next": "a mixture of experts, with layers that keep a state",
}  # fmt: skip


@dataclass(frozen=True)
class FamilyConfig:
    """The shape of a model of another family, as `ModelConfig` is an OpenELM's.

    Attributes:
        values: all arguments of the network, by Hugging Face's names, checked.
        ropes: the RoPE of each kind of layer, "full_attention" and "sliding_attention"; empty for a state.
        eos_token_ids: what its `config.json` names; of a model that `store` has opened, all that its files name.
        own_head: the weights hold a head that differs from the embedding, though `config.json` ties them.
    """

    model_type: str
    values: Mapping[str, Any] = field(repr=False, hash=False)
    vocab_size: int
    num_layers: int
    max_context_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...] = ()
    quantization: Mapping[str, Any] | None = field(default=None, hash=False)
    ropes: Mapping[str, RopeConfig] = field(default_factory=dict, hash=False)
    own_head: bool = False

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def positions(self) -> bool:
        return self.family.positions

    @property
    def embedding(self) -> str:
        """The embedding's name; the layers' is `layers_prefix`."""
        return f"{self.family.body}.{self.family.embedding}"

    @property
    def layers_prefix(self) -> str:
        return f"{self.family.body}.layers"

    @property
    def share_input_output_layers(self) -> bool:
        return bool(self.values["tie_word_embeddings"]) and not self.own_head

    @property
    def model_dim(self) -> int:
        return int(self.values["hidden_size"])

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of a layer's linears within it, as in mlx-lm's `keys`."""
        shapes = self._layer()
        return tuple(name.removesuffix(".weight") for name, shape in shapes.items() if _is_linear(name, shape))

    @property
    def parameters(self) -> int:
        layer = sum(map(math.prod, self._layer().values()))
        return self.num_layers * layer + sum(map(math.prod, self._outside().values()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the name of every weight in the network, and its shape."""
        outside, layer = self._outside(), self._layer()
        embedding = f"{self.embedding}.weight"
        shapes = {embedding: outside.pop(embedding)}
        for number in range(self.num_layers):
            shapes |= {f"{self.layers_prefix}.{number}.{name}": shape for name, shape in layer.items()}
        return shapes | outside

    def modules(self) -> list[str]:
        """Returns the modules that can have an adapter: linears, and not the embedding."""
        embedding = f"{self.embedding}.weight"
        return [
            name.removesuffix(".weight")
            for name, shape in self.shapes().items()
            if name != embedding and _is_linear(name, shape)
        ]

    @property
    def head_dim(self) -> int:
        """Values of a key, of a family that has keys."""
        return int(self.values["head_dim"])

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Returns the size of the KV cache for one token over all layers; 0 for a state of constant size."""
        if not self.positions:
            return 0
        return 2 * self.num_layers * int(self.values["num_key_value_heads"] * self.values["head_dim"]) * bytes_per_value

    def layer_rope(self, layer: int) -> RopeConfig:
        """Returns the RoPE of one layer, counted from 0."""
        types, rotated = self.values["layer_types"], self.values.get("no_rope_layers")
        rope = self.ropes["full_attention" if types is None else types[layer]]
        return rope if rotated is None or rotated[layer] else rope.none()

    @property
    def rope_switch(self) -> int | None:
        """The length within the context past which a text has other frequencies of RoPE; None if there is none."""
        switches = [rope.switch for rope in self.ropes.values() if rope.switch is not None]
        return min((switch for switch in switches if switch < self.max_context_length), default=None)

    def needs(self, name: str) -> bool:
        """Returns whether the network has a place for a tensor that files of the family may hold.

        They may hold RoPE's frequencies, which are computed, and the head again where it is the embedding.
        """
        spare = name.endswith("rotary_emb.inv_freq") or (self.share_input_output_layers and name.startswith("lm_head."))
        return not spare

    def _outside(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all weights outside the layers."""
        values, body = self.values, self.family.body
        shapes: dict[str, tuple[int, ...]] = {f"{self.embedding}.weight": (self.vocab_size, values["hidden_size"])}
        if not self.family.bare_norms:
            shapes[f"{body}.{'norm' if self.positions else 'norm_f'}.weight"] = (values["hidden_size"],)
        if not self.share_input_output_layers:
            shapes["lm_head.weight"] = (self.vocab_size, values["hidden_size"])
        return shapes

    def _layer(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of one layer's weights, by their names within it: all layers are alike."""
        return dict(_attention_layer(self) if self.positions else _state_layer(self.values))


Shapes: TypeAlias = Iterator[tuple[str, tuple[int, ...]]]


def _attention_layer(config: FamilyConfig) -> Shapes:
    values, family = config.values, config.family
    width, ffn = values["hidden_size"], values["intermediate_size"]
    queries = values["num_attention_heads"] * values["head_dim"]
    keys = values["num_key_value_heads"] * values["head_dim"]
    if family.file == "phi3":
        linears = {
            "self_attn.qkv_proj": (queries + 2 * keys, width), "self_attn.o_proj": (width, queries),
            "mlp.gate_up_proj": (2 * ffn, width), "mlp.down_proj": (width, ffn),
        }  # fmt: skip
    else:
        linears = {
            "self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (ffn, width), "mlp.down_proj": (width, ffn), "mlp.up_proj": (ffn, width),
        }  # fmt: skip
    for name, shape in linears.items():
        yield f"{name}.weight", shape
        own = family.biased_heads and name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        if own or values["attention_bias" if name.startswith("self_attn") else "mlp_bias"]:
            yield f"{name}.bias", shape[:1]
    if family.normed_heads is not None:
        for name, size in (("q_norm", queries), ("k_norm", keys)):
            yield f"self_attn.{name}.weight", (size if family.normed_heads == "all" else values["head_dim"],)
    if not family.bare_norms:
        for name in _NORMS[family.norms]:
            yield f"{name}.weight", (width,)


# A layer's norms as mlx-lm names them; where they come before alone, that of the FFN has an odd name.
_NORMS = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "after": ("post_feedforward_layernorm", "post_attention_layernorm"),
    "both": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
}  # fmt: skip


def _state_layer(values: Mapping[str, Any]) -> Shapes:
    """Mamba's block (Gu and Dao 2023, section 3.4)."""
    width, inner, state = values["hidden_size"], values["intermediate_size"], values["state_size"]
    rank = values["time_step_rank"]
    yield "mixer.in_proj.weight", (2 * inner, width)
    yield "mixer.conv1d.weight", (inner, values["conv_kernel"], 1)
    yield "mixer.x_proj.weight", (rank + 2 * state, inner)
    yield "mixer.dt_proj.weight", (inner, rank)
    yield "mixer.dt_proj.bias", (inner,)
    yield "mixer.out_proj.weight", (width, inner)
    yield "mixer.A_log", (inner, state)
    yield "mixer.D", (inner,)
    yield "norm.weight", (width,)
    if values["use_conv_bias"]:
        yield "mixer.conv1d.bias", (inner,)
    if values["use_bias"]:
        yield "mixer.in_proj.bias", (2 * inner,)
        yield "mixer.out_proj.bias", (width,)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".weight")


def read(keys: Keys, directory: Path) -> FamilyConfig:
    """Returns the normal form of the `config.json` in a model directory.

    Where it ties the head to the embedding and the weights hold another head, it is untied, as transformers 5 does it:
    a head that is there and differs was trained or merged apart, and is the model's.

    Raises:
        InputError: a value is missing, of the wrong type or out of range, alone or by what it makes with others; or a
            file of the weights cannot be read.
    """
    model_type = keys.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(("openelm", *FAMILIES))
        why = _NOT_TAKEN.get(str(model_type))
        reason = f" ({why})" if why else ""
        raise InputError(f"{keys.where}: model_type is {short(model_type)}{reason}; supported are {known}")
    family = FAMILIES[model_type]
    values: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": keys.size("vocab_size", most=_MAX_VOCABULARY),
        "num_hidden_layers": keys.size("num_hidden_layers", most=_MAX_LAYERS),
        "hidden_size": _width(keys, family),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", family.tied),
    }
    if family.offset_norms:
        keys.word("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    else:
        keys.word("hidden_act", ("silu", "swish"), "silu")
    values |= _attention_values(keys, family, values) if family.positions else _state_values(keys, values)
    ropes = read_ropes(keys, values["head_dim"], family.rope) if family.positions else {}
    config = FamilyConfig(
        model_type=model_type,
        values=values,
        vocab_size=values["vocab_size"],
        num_layers=values["num_hidden_layers"],
        max_context_length=_context(values, family, ropes),
        bos_token_id=next(iter(_ids(keys.get("bos_token_id"))), None),
        eos_token_ids=keys.token_ids("eos_token_id"),
        quantization=keys.get("quantization"),
        ropes=ropes,
    )
    for name, shape in (config._outside() | config._layer()).items():
        if math.prod(shape) > _MAX_WEIGHT:
            raise InputError(f"{keys.where}: {name} would be {shape}: no model is so large")
    if config.parameters > _MAX_PARAMETERS:
        raise InputError(f"{keys.where}: there would be {config.parameters:,} parameters: no model is so large")
    return replace(config, own_head=_has_own_head(config, directory))


def _width(keys: Keys, family: Family) -> int:
    if family.bare_norms and not keys.says("hidden_size") and keys.says("d_model"):
        raise InputError(
            f"{keys.where}: an OLMo in its first layout; the repository whose name ends with -hf can be read"
        )
    return keys.size("hidden_size", most=_MAX_WIDTH)


def _attention_values(keys: Keys, family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    heads = keys.size("num_attention_heads", most=_MAX_HEADS)
    kv_heads = keys.size("num_key_value_heads", heads, _MAX_HEADS)
    if heads % kv_heads:
        raise InputError(f"{keys.where}: {heads} heads (num_attention_heads) cannot share {kv_heads} of keys")
    even = values["hidden_size"] // heads
    if not keys.says("head_dim") and family.head_dim is None and not 0 < even <= _MAX_HEAD_DIM:
        raise InputError(f"{keys.where}: {heads} heads of a hidden_size of {values['hidden_size']}: no model has such")
    head_dim = keys.size("head_dim", family.head_dim or even, _MAX_HEAD_DIM)
    if family.file in ("phi3", "qwen2") and head_dim != even:
        raise InputError(
            f"{keys.where}: head_dim is {head_dim}, and mlx-lm's {family.name} has hidden_size / heads, {even}"
        )
    if keys.says("clip_qkv"):
        raise InputError(f"{keys.where}: clip_qkv is {short(keys.get('clip_qkv'))}, and mlx-lm's network does not clip")
    if keys.flag("rope_traditional", False):
        raise InputError(f"{keys.where}: rope_traditional is true, and pairs are half a head apart here")
    return {
        "intermediate_size": keys.size("intermediate_size", most=_MAX_WIDTH),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5 if family.bare_norms else keys.number("rms_norm_eps", family.eps, high=1.0),
        "max_position_embeddings": keys.size("max_position_embeddings"),
        "attention_bias": _has_biases(keys, family),
        "mlp_bias": family.file in ("llama", "smollm3") and keys.flag("mlp_bias", False),
        "rope_theta": family.rope.theta,  # mlx-lm's own RoPE, of which no use is made
        **_windows(keys, family, values["num_hidden_layers"]),
        **(_gemma_values(keys, family, values["num_hidden_layers"]) if family.offset_norms else {}),
        **(_rotated_layers(keys, values["num_hidden_layers"]) if family.file == "smollm3" else {}),
    }


def _has_biases(keys: Keys, family: Family) -> bool:
    """Reads whether attention's linears have biases. What a Phi-3 or Qwen 2 says of it transformers does not read.

    Raises:
        InputError: they have some, and mlx-lm's network has none.
    """
    said = family.file not in ("phi3", "qwen2") and keys.flag("attention_bias", False)
    if said and family.file in ("qwen3", "gemma3_text"):
        raise InputError(f"{keys.where}: attention_bias is true, and mlx-lm's {family.name} has no such biases")
    return said


def _rotated_layers(keys: Keys, layers: int) -> dict[str, Any]:
    """SmolLM3's layers with RoPE, by 1 in `no_rope_layers`, and without, by 0: by default every fourth."""
    interval = keys.size("no_rope_layer_interval", 4)
    if not keys.says("no_rope_layers"):
        return {"no_rope_layers": [int((layer + 1) % interval != 0) for layer in range(layers)]}
    given = keys.get("no_rope_layers")
    if not isinstance(given, list) or len(given) != layers or not all(each in (0, 1) for each in given):
        raise InputError(f"{keys.where}: no_rope_layers is {short(given)}: a list of {layers} times 0 or 1 is needed")
    return {"no_rope_layers": [int(each) for each in given]}


def _gemma_values(keys: Keys, family: Family, layers: int) -> dict[str, Any]:
    """Gemma's own values. Of so many layers, the last has no window, and so on, as mlx-lm's network has it."""
    if keys.says("use_bidirectional_attention") and keys.flag("use_bidirectional_attention", False):
        raise InputError(f"{keys.where}: use_bidirectional_attention is true: an encoder, which generates no text")
    caps: dict[str, float | None] = {}
    for name, usual in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        if family.capped:  # null is none, other than no word of it
            caps[name] = keys.number(name, usual, low=1e-6) if keys.says(name) or not keys.has(name) else None
        elif keys.says(name):
            raise InputError(f"{keys.where}: {name} is {short(keys.get(name))}, and mlx-lm's network caps nothing")
    types = keys.words("layer_types", LAYER_TYPES, layers)
    if types is None:
        name = "sliding_window_pattern" if keys.says("sliding_window_pattern") else "_sliding_window_pattern"
        every = keys.size(name, 2 if family.capped else 6)
    else:  # which transformers believes, whatever the pattern beside it says
        every = (*types, "full_attention").index("full_attention") + 1
    each = tuple(LAYER_TYPES[bool((layer + 1) % every)] for layer in range(layers))
    if every > layers or types not in (None, each):
        raise InputError(f"{keys.where}: the layers with and without a window do not take turns as mlx-lm's do")
    return {
        "query_pre_attn_scalar": keys.number("query_pre_attn_scalar", 256.0, low=1e-6),
        "sliding_window_pattern": every, "layer_types": each, **caps,
    }  # fmt: skip


def _windows(keys: Keys, family: Family, layers: int) -> dict[str, Any]:
    """`sliding_window`, and which layers see it alone; no `layer_types` where all are alike."""
    window = family.window  # null is no window, other than no word of it
    if keys.has("sliding_window"):
        window = keys.size("sliding_window") if keys.says("sliding_window") else None
    if family.windowed:
        return {"sliding_window": window, "layer_types": None}
    if family.offset_norms:
        return {"sliding_window": window or family.window}
    if family.switched_windows:
        if keys.flag("use_sliding_window", False):
            raise InputError(f"{keys.where}: use_sliding_window is true, and mlx-lm's {family.name} has no windows")
        return {"sliding_window": None, "layer_types": None}
    each = LAYER_TYPES
    types = keys.words("layer_types", each, layers)
    if types is None and family.file == "olmo3":  # every fourth sees everything
        types = tuple(each[bool((layer + 1) % 4)] for layer in range(layers))
    if types is None:
        return {"sliding_window": None, "layer_types": None}
    missing = {"full_attention", *(each if family.file == "olmo3" else ())} - {*types}
    if missing:
        raise InputError(f"{keys.where}: layer_types without {min(missing)}, which mlx-lm's network cannot do")
    if "sliding_attention" in types and window is None:
        raise InputError(f"{keys.where}: layer_types names sliding_attention, and sliding_window is missing")
    return {"sliding_window": window, "layer_types": types}


def _state_values(keys: Keys, values: Mapping[str, Any]) -> dict[str, Any]:
    width = values["hidden_size"]
    automatic = -(-width // 16)
    if keys.size("conv_kernel", 4, _MAX_HEADS) == 1:
        raise InputError(f"{keys.where}: conv_kernel is 1, and mlx-lm's network keeps no such state")
    return {
        "intermediate_size": keys.size("intermediate_size", width * keys.size("expand", 2, 64), _MAX_WIDTH),
        "state_size": keys.size("state_size", 16, _MAX_HEADS),
        "conv_kernel": keys.size("conv_kernel", 4, _MAX_HEADS),
        "use_bias": keys.flag("use_bias", False),
        "use_conv_bias": keys.flag("use_conv_bias", True),
        "time_step_rank": keys.size("time_step_rank", automatic, _MAX_WIDTH, word="auto"),
        "layer_norm_epsilon": keys.number("layer_norm_epsilon", 1e-5, high=1.0),
    }


def check_is_openelm(directory: Path, repository: str | None = None) -> None:
    """Raises InputError for the directory of another family's model, which needs no converting: says how it is used.

    Args:
        repository: on the hub, of which `directory` has the config.
    """
    try:
        family = FAMILIES.get(str(json_object(directory / "config.json").get("model_type")))
    except InputError:
        family = None
    if family is None:
        return
    if repository is not None:
        how = f"`elm-mlx generate {repository}`"
    elif any(directory.glob("model*.safetensors")):
        how = f"`elm-mlx generate {directory}`"
    else:
        how = "but its weights must be model*.safetensors, which it holds none of"
    raise InputError(
        f"{repository or directory}: of the family {family.name}, used as it is (OpenELM alone is converted, averaged "
        f"and exported): {how}"
    )


def _has_own_head(config: FamilyConfig, directory: Path) -> bool:
    if not config.share_input_output_layers or not any(directory.glob("model*.safetensors")):
        return False
    entries = {entry.name: (file, entry) for file in weight_files(directory) for entry in read_header(file)}
    for part in ("weight", "scales", "biases"):
        head, embedding = entries.get(f"lm_head.{part}"), entries.get(f"{config.embedding}.{part}")
        if head is not None and (embedding is None or not _same_bytes(head, embedding)):
            return True
    return False


def _same_bytes(one: tuple[Path, Entry], other: tuple[Path, Entry]) -> bool:
    (file, entry), (other_file, other_entry) = one, other
    if (entry.dtype, entry.shape) != (other_entry.dtype, other_entry.shape):
        return False
    with file.open("rb") as stream, other_file.open("rb") as other_stream:
        stream.seek(entry.begin), other_stream.seek(other_entry.begin)
        left = entry.end - entry.begin
        while left:
            count = min(left, 1 << 20)
            if stream.read(count) != other_stream.read(count):
                return False
            left -= count
    return True


def _context(values: Mapping[str, Any], family: Family, ropes: Mapping[str, RopeConfig]) -> int:
    """Returns the context length.

    YaRN's is the original one times its factor. Dynamic RoPE's frequencies change with each token past
    `max_position_embeddings`, so that no key in a cache would be right: there it ends.
    """
    if not family.positions:
        return _UNBOUNDED
    rope = ropes["full_attention"]
    most = int(values["max_position_embeddings"])
    if rope.kind == "yarn":
        most = min(int(rope.original * rope.factor), LARGEST_SIZE)
    return min(most, values["sliding_window"] or most) if family.windowed else most


def _ids(value: object) -> tuple[int, ...]:
    found = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    return tuple(token for token in found if type(token) is int and token >= 0)
