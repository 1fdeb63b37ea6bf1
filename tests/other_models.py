"""Small models of other families, by code: mlx-lm's layout, random weights, a byte-level BPE trained here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from elm_mlx.model import other_networks
from elm_mlx.model.config import read_config

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "phi3": PHI3}
CONTROLS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "phi3": ["<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}
BOS = {"chatml": "<|im_start|>", "llama3": "<|begin_of_text|>", "phi3": "<s>"}
EOS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "phi3": "<|end|>"}
# Llama 3's way of cutting a text into words: contractions, words, at most three digits, punctuation, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "The crow was half dead with thirst, and there was a pitcher which had once been full of water.",
    "Then a thought came to him, and he took a pebble and dropped it into the pitcher: 1, 22, 333, 4444 of them!",
    "Ça va? Grüße, 日本語のテキスト, 🦜🦜 and\n\n  some   spaces\tand tabs.",
] * 20

_SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 80, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        **_SHAPE, "model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": LLAMA3_ROPE,
        "tie_word_embeddings": False,
    },
    "mistral": {**_SHAPE, "model_type": "mistral", "attention_bias": True, "head_dim": 16, "tie_word_embeddings": True},
    "phi3": {
        **_SHAPE, "model_type": "phi3", "original_max_position_embeddings": 64,
        # both alike, for mlx-lm knows the long one alone
        "rope_scaling": {"type": "longrope", "long_factor": [1.5] * 4, "short_factor": [1.5] * 4},
    },
    "olmo": {**_SHAPE, "model_type": "olmo", "num_key_value_heads": 6, "tie_word_embeddings": True, "clip_qkv": None},
    "olmo2": {**_SHAPE, "model_type": "olmo2", "tie_word_embeddings": False},
    "olmo3": {
        **_SHAPE, "model_type": "olmo3", "num_hidden_layers": 4, "sliding_window": 16, "rope_theta": 1e4,
        "tie_word_embeddings": False,
    },
    "qwen2": {**_SHAPE, "model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {**_SHAPE, "model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": True},
    "smollm3": {
        **_SHAPE, "model_type": "smollm3", "num_hidden_layers": 4, "rope_theta": 5e6, "tie_word_embeddings": True,
    },
    "gemma3_text": {
        **_SHAPE, "model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 16,
        "sliding_window_pattern": 3, "query_pre_attn_scalar": 24, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    },
    "gemma2": {
        # A width whose root bfloat16 has: mlx-lm rounds it so for Gemma 3, as in training, and for this one not.
        **_SHAPE, "model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16,
        "sliding_window": 64,
        "query_pre_attn_scalar": 24, "rope_theta": 1e4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
    },
    "mamba": {
        "model_type": "mamba", "hidden_size": 48, "intermediate_size": 96, "state_size": 8, "num_hidden_layers": 2,
        "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
    },
}  # fmt: skip
STYLES = {"llama": "llama3", "phi3": "phi3"}  # the others are ChatML


def train_tokenizer(style: str, vocab_size: int = 400) -> Any:
    """A `tokenizers.Tokenizer`: byte-level, or for Phi-3 SentencePiece-like, with the control tokens of `style`."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    controls = CONTROLS[style]
    if style == "phi3":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=controls[:3] + bytes_, show_progress=False)
        tokenizer.train_from_iterator(TEXTS[:2], trainer)
        values = json.loads(tokenizer.to_str())
        values["added_tokens"] = values["added_tokens"][:3]  # bytes are pieces like others
        tokenizer = Tokenizer.from_str(json.dumps(values))
        # As in Phi-3's file: no special tokens to the library, and white space after them goes.
        tokenizer.add_tokens([AddedToken(name, rstrip=True, normalized=False) for name in controls[3:]])
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=controls, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    if style == "llama3":
        bos = BOS[style]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def write_tokenizer(path: Path, style: str, vocab_size: int = 400) -> Any:
    tokenizer = train_tokenizer(style, vocab_size)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS[style], "eos_token": EOS[style],
        "chat_template": TEMPLATES[style], "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def write_model(path: Path, name: str, changes: Mapping[str, Any] | None = None, seed: int = 0) -> Path:
    """A model directory of the family `name`, float32, as mlx-lm would save it."""
    path.mkdir(parents=True)
    style = STYLES.get(name, "chatml")
    tokenizer = write_tokenizer(path, style)
    config = {
        **CONFIGS[name], "vocab_size": tokenizer.get_vocab_size() + 3,
        "bos_token_id": tokenizer.token_to_id(BOS[style]),
        "eos_token_id": tokenizer.token_to_id(EOS[style]), **(changes or {}),
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    network = other_networks.network(read_config(path))
    keys = mx.random.split(mx.random.key(seed), 1000)
    weights = {
        name: _drawn(name, value, key)
        for (name, value), key in zip(tree_flatten(network.parameters()), keys, strict=False)
    }
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    return path


def word(path: Path, text: str) -> int:
    """The id of the one token that `text` is, after a space or without."""
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert len(ids) == 1, f"{text!r} is {len(ids)} tokens"
    return ids[0]


def write_chain(path: Path, words: Sequence[str | None]) -> Path:
    """A Llama that says of `words` the one that comes next, without spaces, and after the last one EOS.

    Its layers add nothing: the last token alone decides. None is a token that the tokenizer has no piece for, each time
    another. The words are added to the tokenizer, as a piece each.
    """
    write_model(path, "llama")
    values = json.loads((path / "tokenizer.json").read_text())
    entry = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    size = len(values["model"]["vocab"])
    for name in filter(None, words):
        values["added_tokens"].append({"id": size, "content": name, **entry})
        size += 1
    (path / "tokenizer.json").write_text(json.dumps(values))
    silent = iter(range(size, size + len(words)))
    chain = [next(silent) if name is None else word(path, name) for name in words]
    config = json.loads((path / "config.json").read_text())
    width, rows = config["hidden_size"], size + len(words)
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    weights = mx.load(str(path / "model.safetensors"))
    for name, value in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(value)
    embedding, head = mx.zeros((rows, width)), mx.zeros((rows, width))
    for place, (token, following) in enumerate(zip(chain, [*chain[1:], config["eos_token_id"]], strict=True)):
        embedding[token, place], head[following, place] = 1.0, 9.0
    weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    return path


def _drawn(name: str, value: mx.array, key: mx.array) -> mx.array:
    if name.endswith(("A_log", "D")):
        return value
    if value.ndim == 1 and name.endswith("weight"):
        return 1 + 0.1 * mx.random.normal(value.shape, key=key)
    return mx.random.normal(value.shape, key=key) * (0.5 if "embed" in name else 0.15)
