"""Model directories made by code: small enough to load in milliseconds, whole enough for every command.

Knows how a tokenizer is trained, a random model drawn, and a model made that says one given thing.
"""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import sentencepiece
from mlx.utils import tree_flatten, tree_map

from elm_mlx.model.config import ModelConfig
from elm_mlx.model.network import Model
from elm_mlx.text.tokenizer import Tokenizer

CONTEXT = 512
WORDS = "the quick brown fox jumps over lazy dogs while an old king told stories of naïve cafés and 漢字 to us"


def train_tokenizer(vocab_size: int = 320, **options: object) -> bytes:
    """A SentencePiece model with Llama's settings: BPE, byte fallback, text left as it is, BOS 1, EOS 2."""
    draw = random.Random(0)
    lines = [
        " ".join(word + draw.choice(["", ",", "."]) for word in draw.choices(WORDS.split(), k=9)) for _ in range(99)
    ]
    model = io.BytesIO()
    settings: dict[str, object] = {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "vocab_size": vocab_size, "num_threads": 1, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings | options)
    return model.getvalue()


def scaled_config(vocab_size: int, **fields: object) -> ModelConfig:
    """Three layers that grow, in a few kilobytes."""
    options: dict[str, object] = {
        "num_layers": 3, "model_dim": 64, "head_dim": 16, "num_gqa_groups": 2, "ffn_dim_divisor": 16,
        "max_context_length": CONTEXT, "rope_max_length": 2 * CONTEXT,
    }  # fmt: skip
    return ModelConfig.scaled(vocab_size=vocab_size, **options | fields)  # type: ignore[arg-type]


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """Weights large enough that what came before decides what comes next, norms' weights aside from 1."""
    model = Model(config)
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(model.parameters()))))
    model.update(tree_map(lambda weight: _drawn(weight, next(keys)), model.parameters()))
    mx.eval(model.parameters())
    return model


def with_piece(model: bytes, text: str) -> bytes:
    """A SentencePiece model with one more piece, defined by a user, behind the others."""
    content = text.encode()
    piece = b"\x0a" + bytes([len(content)]) + content + b"\x18\x04"
    return model + b"\x0a" + bytes([len(piece)]) + piece


def spelling_model(tokenizer: Tokenizer, text: str, context: int = CONTEXT, padding: int = 0) -> Model:
    """A model that answers whatever ends with a newline, or says nothing of `text`, by `text` and then EOS.

    Its layers add nothing: the last token alone decides, so no token of `text` may come twice. A `text` that
    begins with its own last token goes round in circles, for ever. With `padding` it has so many tokens more than the
    tokenizer has pieces, and says one of them after each of the first of `text`.
    """
    chain = [*tokenizer.encode("\n")[-1:], *tokenizer.encode("\n" + text, add_bos=False)[2:]]
    if chain[1] == chain[-1]:
        nexts = dict(pairwise(chain)) | {chain[-1]: chain[2]}
    else:
        assert len({*chain}) == len(chain), "a token comes twice"
        nexts = dict(zip(chain, [*chain[1:], tokenizer.eos_id], strict=True))
    size = tokenizer.vocab_size + padding
    for silent, token in zip(range(tokenizer.vocab_size, size), chain[1:], strict=False):
        nexts[silent], nexts[token] = nexts[token], silent
    width = -(-size // 32) * 32
    config = ModelConfig.scaled(
        vocab_size=size, num_layers=1, model_dim=width, head_dim=8, num_gqa_groups=1, qkv_multipliers=8 / width,
        ffn_multipliers=8 / width, ffn_dim_divisor=8, max_context_length=context, rope_max_length=2 * context,
        share_input_output_layers=False,
    )  # fmt: skip
    model = Model(config)
    layer = model.layers[0]
    layer.attn.out_proj.weight = mx.zeros_like(layer.attn.out_proj.weight)
    layer.ffn.proj_2.weight = mx.zeros_like(layer.ffn.proj_2.weight)
    model.transformer.token_embeddings.weight = mx.eye(size, width)
    following = [nexts.get(token, chain[1]) for token in range(size)]
    head = mx.zeros((size, width))
    head[mx.array(following), mx.arange(size)] = 10.0
    model.lm_head.weight = head
    mx.eval(model.parameters())
    return model


def guessing_model(tokenizer: Tokenizer, guesses: str, ends: float = 0.9) -> Model:
    """A model that answers anything by one of the characters of `guesses`, each as likely, and mostly ends there.

    The last token alone decides, as in `spelling_model`. An answer goes on by another guess where it does not end.
    """
    tokens = mx.array([tokenizer.id_of(f"<0x{ord(guess):02X}>") for guess in guesses])
    size = tokenizer.vocab_size
    model = spelling_model(tokenizer, "ab")
    layer, width = model.layers[0], model.lm_head.weight.shape[1]
    layer.update(tree_map(lambda weight: _drawn(weight, mx.random.key(weight.size)), layer.parameters()))
    layer.attn.out_proj.weight = mx.zeros_like(layer.attn.out_proj.weight)
    layer.ffn.proj_2.weight = mx.zeros_like(layer.ffn.proj_2.weight)
    logits = mx.full((size, width), -30.0)
    logits[tokens] = 0.0
    logits[tokens[:, None], tokens] = math.log((1 - ends) / len(guesses))
    logits[tokenizer.eos_id, tokens] = math.log(ends)
    model.lm_head.weight = logits / width**0.5  # the last norm makes a one-hot vector as long as that
    mx.eval(model.parameters())
    return model


def write_directory(path: Path, model: Model, tokenizer: bytes | None, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """A model directory at `path`, which is made if need be."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(model.config.to_dict()))
    found = tree_flatten(model.parameters())
    weights = {name: weight if weight.dtype == mx.uint32 else weight.astype(dtype) for name, weight in found}
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    if tokenizer is not None:
        (path / "tokenizer.model").write_bytes(tokenizer)
    return path


def write_quantized(path: Path, model: Model, tokenizer: bytes | None) -> Path:
    """A model directory of 4-bit weights in groups of 32, where their width allows it; `model`'s become so too."""
    nn.quantize(model, 32, 4, class_predicate=lambda _, part: "weight" in part and part.weight.shape[-1] % 32 == 0
                and hasattr(part, "to_quantized"))  # fmt: skip
    model.config = replace(model.config, quantization={"group_size": 32, "bits": 4})
    return write_directory(path, model, tokenizer)


def _drawn(weight: mx.array, key: mx.array) -> mx.array:
    if weight.ndim == 1:
        return 1 + 0.2 * mx.random.normal(weight.shape, key=key)
    return mx.random.normal(weight.shape, key=key) * (1.5 / weight.shape[1] ** 0.5)
