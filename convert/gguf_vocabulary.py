"""The tokenizer in a GGUF file's metadata: read, and written as the files that this package and transformers read.

GGUF has the pieces of a vocabulary and, of a byte-level BPE, its merges; what the tokenizer does before the merges
stands there by a name alone (`tokenizer.ggml.pre`), whose regular expressions llama.cpp knows. Those below are the ones
of the models' own `tokenizer.json`. A SentencePiece model comes back as `tokenizer.model`, and by that as
`tokenizer.json`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from elm_mlx.directories import TEMPLATES
from elm_mlx.errors import InputError
from elm_mlx.files import new_file, write_json, write_text
from elm_mlx.reading import Keys, short
from elm_mlx.text.sentencepiece_file import BPE as BPE_MODEL
from elm_mlx.text.sentencepiece_file import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from elm_mlx.text.tokenizer import FILE_NAME
from elm_mlx_convert import tokenizers
from elm_mlx_convert.gguf_file import GgufHeader, Strings

Json = dict[str, Any]

_MAX_TOKENS = 1 << 19  # twice the largest vocabulary there is
_MAX_MERGES = 1 << 20
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # Hugging Face's names, and GGUF's
_ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(by_words: bool) -> Json:
    """Bytes as GPT-2's alphabet has them, and before that GPT-2's words, or none."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": by_words}


_DIGITS: Json = {"type": "Digits", "individual_digits": True}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CL100K, _QWEN = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
_SEED = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K, _TEKKEN = (
    "|".join(f"{part}{end}" for part in _CASED) + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for end, digits in ((f"{_CONTRACTIONS}?", r"\p{N}{1,3}"), ("", r"\p{N}"))
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CJK = "[一-龥ࠀ-一가-퟿]+"


@dataclass(frozen=True)
class Rules:
    """What a byte-level BPE does before its merges.

    Attributes:
        whole: a word that is a piece needs no merges to become it.
        bos: BOS stands before a text where the metadata says nothing.
        composed: text is brought into Unicode's form NFC first.
    """

    steps: tuple[Json, ...]
    whole: bool = False
    bos: bool = False
    composed: bool = False


_WORDS = Rules((_bytes(True),))
_WORDS_AND_DIGITS = Rules((_DIGITS, _bytes(True)))
_LLAMA3 = Rules((_split(_CL100K), _bytes(False)), whole=True, bos=True)
_BY_CL100K = Rules((_split(_CL100K), _bytes(False)))
_BY_O200K = Rules((_split(_O200K), _bytes(False)))
_DEFAULT = Rules((*(_split(p) for p in (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), _bytes(False)))
RULES = {
    "gpt-2": _WORDS, "phi-2": _WORDS, "olmo": _WORDS, "jais": _WORDS, "mpt": _WORDS, "trillion": _WORDS,
    "exaone4": _WORDS, "granite-docling": _WORDS,
    "smollm": _WORDS_AND_DIGITS, "starcoder": _WORDS_AND_DIGITS, "refact": _WORDS_AND_DIGITS,
    "codeshell": _WORDS_AND_DIGITS, "exaone": _WORDS_AND_DIGITS, "minerva-7b": _WORDS_AND_DIGITS,
    "command-r": Rules(_WORDS_AND_DIGITS.steps, composed=True),
    "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3, "falcon3": _LLAMA3, "pixtral": _LLAMA3,
    "lfm2": _LLAMA3,
    "dbrx": _BY_CL100K, "smaug-bpe": _BY_CL100K,
    "qwen2": Rules((_split(_QWEN), _bytes(False)), composed=True),
    "deepseek-r1-qwen": Rules((_split(_QWEN), _bytes(False))), "megrez": Rules((_split(_QWEN), _bytes(False))),
    "gpt-4o": _BY_O200K, "llama4": _BY_O200K, "kanana2": _BY_O200K,
    "tekken": Rules((_split(_TEKKEN), _bytes(False)), whole=True, bos=True),
    "seed-coder": Rules((_split(_SEED), _bytes(False))),
    "deepseek-coder": Rules(
        (_split(r"[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split(_CJK), _DIGITS, _bytes(False))
    ),
    "default": _DEFAULT,
}  # fmt: skip


@dataclass(frozen=True)
class GgufVocabulary:
    """The tokenizer of a GGUF file, checked.

    Attributes:
        sentencepiece: it is a SentencePiece model; else a byte-level BPE.
        tokens, scores, types: by id. The types are SentencePiece's.
        merges: of a byte-level BPE, its pairs of pieces, the first to be joined first.
        special: the ids of "bos", "eos", "unk" and "pad", those that there are.
        end_ids: the tokens that end a text, EOS first.
        add_bos: BOS stands before a text.
        pre: the name of what is done before the merges.
        swallowing: its control tokens take the white space behind them, as Phi-3's do.
        templates: chat templates, the default one by the name "".
        warnings: what may be read otherwise than the model's own tokenizer reads it.
    """

    where: str
    sentencepiece: bool
    tokens: Sequence[str] = field(repr=False)
    scores: Sequence[float] = field(repr=False)
    types: Sequence[int] = field(repr=False)
    merges: Sequence[str] = field(repr=False)
    special: dict[str, int]
    end_ids: tuple[int, ...]
    add_bos: bool
    pre: str
    dummy_prefix: bool
    remove_spaces: bool
    swallowing: bool
    templates: dict[str, str] = field(repr=False)
    warnings: tuple[str, ...]

    def describe(self) -> str:
        kind = "SentencePiece" if self.sentencepiece else f"byte-level BPE by the rules {self.pre!r}"
        return f"{kind}, {len(self.tokens):,} pieces"


def read(header: GgufHeader) -> GgufVocabulary | None:
    """Returns the tokenizer in a file's metadata; None where it has none.

    Raises:
        InputError: it is of a kind that is not known here, or damaged.
    """
    where, metadata = str(header.file.path), header.metadata
    keys = Keys(where, metadata)
    if not keys.says("tokenizer.ggml.model") or keys.get("tokenizer.ggml.model") in ("no_vocab", "none"):
        return None
    kind = keys.word("tokenizer.ggml.model", ("llama", "gpt2"))
    tokens = _strings(header, "tokenizer.ggml.tokens", _MAX_TOKENS)
    types = _types(header, len(tokens))
    if kind == "llama":
        _set_unknown(keys, types, tokens)
    kept = len(tokens)
    while kept and types[kept - 1] == UNUSED:  # what fills a vocabulary up where the embedding has more rows
        kept -= 1
    pre, warnings = str(keys.get("tokenizer.ggml.pre") or ""), []
    if kind == "gpt2":
        if not pre:
            pre = "default"
            warnings.append(
                "it does not say what its tokenizer does before the merges (tokenizer.ggml.pre), as files of early "
                "2024 do not: read by llama.cpp's default, which may differ from the model's own"
            )
        if pre not in RULES:
            raise InputError(
                f"{where}: its tokenizer is a BPE by the rules {short(pre)} (tokenizer.ggml.pre), which are not known "
                "here: pass --tokenizer with the directory or repository of the original"
            )
    special = _special(keys, kept)
    phi3 = metadata.get("general.architecture") == "phi3"
    return GgufVocabulary(
        where=where,
        sentencepiece=kind == "llama",
        tokens=list(tokens)[:kept],
        scores=_scores(header, len(tokens))[:kept],
        types=types[:kept],
        merges=list(_strings(header, "tokenizer.ggml.merges", _MAX_MERGES)) if kind == "gpt2" else (),
        special=special,
        end_ids=_end_ids(keys, kept),
        add_bos=keys.flag("tokenizer.ggml.add_bos_token", kind == "llama" or RULES[pre].bos),
        pre=pre,
        dummy_prefix=keys.flag("tokenizer.ggml.add_space_prefix", True),
        remove_spaces=keys.flag("tokenizer.ggml.remove_extra_whitespaces", False),
        swallowing=phi3 and kind == "llama",
        templates=_templates(keys, metadata),
        warnings=tuple(warnings),
    )


def special_ids(header: GgufHeader) -> dict[str, int]:
    """Returns what a `config.json` says of a file's tokens. Raises InputError for a number that no token has."""
    keys, tokens = Keys(str(header.file.path), header.metadata), header.metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, Strings) else 0
    special, ends = _special(keys, count), _end_ids(keys, count)
    named = {f"{name}_token_id": token for name, token in special.items() if name != "unk"}
    return named | ({"eos_token_id": ends[0]} if ends else {})


def _special(keys: Keys, count: int) -> dict[str, int]:
    found = {name: _id(keys, f"tokenizer.ggml.{key}_token_id", count) for name, key in _SPECIAL.items()}
    return {name: token for name, token in found.items() if token is not None}


def _end_ids(keys: Keys, count: int) -> tuple[int, ...]:
    found = [_id(keys, f"tokenizer.ggml.{name}_token_id", count) for name in _ENDS]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _strings(header: GgufHeader, key: str, most: int) -> Strings:
    found = header.metadata.get(key)
    if not isinstance(found, Strings) or not found:
        raise header.file.fail(f"has no {key}: a list of strings is needed")
    if len(found) > most:
        raise header.file.fail(f"has {len(found):,} {key}; at most {most:,} are read")
    return found


def _types(header: GgufHeader, count: int) -> list[int]:
    found = header.metadata.get("tokenizer.ggml.token_type")
    if found is None:
        return [NORMAL] * count
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or len(found) != count:
        raise header.file.fail(f"has a tokenizer.ggml.token_type that is no list of {count:,} whole numbers")
    types = found.tolist()
    odd = next((kind for kind in set(types) if not 0 <= kind <= BYTE), None)
    if odd is not None:
        raise header.file.fail(f"has a token of the type {odd} (tokenizer.ggml.token_type), which is not known")
    return [kind or NORMAL for kind in types]


def _set_unknown(keys: Keys, types: list[int], tokens: Strings) -> None:
    """Has one unknown token, which SentencePiece needs; some files call it a control token, and fillings unknown.

    Raises:
        InputError: there is none.
    """
    named = _id(keys, "tokenizer.ggml.unknown_token_id", len(types))
    typed = [token for token, kind in enumerate(types) if kind == UNKNOWN]
    unknown = named if named is not None else next(iter(typed), None)
    if unknown is None:
        unknown = next((token for token, text in enumerate(tokens) if text == "<unk>"), None)
    if unknown is None:
        raise InputError(f"{keys.where}: has no unknown token (tokenizer.ggml.unknown_token_id)")
    for token in typed:
        types[token] = UNUSED
    types[unknown] = UNKNOWN


def _scores(header: GgufHeader, count: int) -> list[float]:
    found = header.metadata.get("tokenizer.ggml.scores")
    if found is None:
        return [0.0] * count
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or len(found) != count:
        raise header.file.fail(f"has tokenizer.ggml.scores that are no list of {count:,} numbers")
    if not np.isfinite(found).all():
        raise header.file.fail("has tokenizer.ggml.scores that are no numbers")
    return [float(score) for score in found.tolist()]


def _id(keys: Keys, name: str, count: int) -> int | None:
    """Returns a token's id; None where the key is unsaid, or names none: some files have -1, or 2**32 - 1, for that."""
    token = keys.get(name)
    if token is None or token in (-1, 0xFFFFFFFF):
        return None
    if type(token) is not int or not 0 <= token < count:
        raise InputError(f"{keys.where}: {name} is {short(token)}: the number of one of {count:,} tokens is needed")
    return token


def _templates(keys: Keys, metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    templates = {}
    for name, text in metadata.items():
        if name == prefix or name.startswith(f"{prefix}."):
            own = name[len(prefix) + 1 :]
            if not isinstance(text, str) or (own and not _TEMPLATE_NAME.fullmatch(own)):
                raise InputError(f"{keys.where}: {short(name)} is no chat template with a name of letters and digits")
            templates[own] = text
    return templates


def write(vocabulary: GgufVocabulary, directory: Path, max_length: int) -> list[str]:
    """Writes a model directory's tokenizer, its settings and its chat templates. Returns warnings.

    Args:
        max_length: the model's context in tokens.

    Raises:
        InputError: the libraries that read it would not.
    """
    warning = None
    if vocabulary.sentencepiece:
        with new_file(directory / FILE_NAME) as file:
            file.write(_sentencepiece_model(vocabulary))
        warning = tokenizers.write(
            directory / FILE_NAME, directory, max_length=max_length, swallowing=_swallowing(vocabulary)
        )
    else:
        write_json(directory / "tokenizer.json", _bpe(vocabulary))
    tokens, others = vocabulary.tokens, {name: text for name, text in vocabulary.templates.items() if name}
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[token] for name, token in vocabulary.special.items()},
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    template = vocabulary.templates.get("")
    if template is not None and not others:
        config["chat_template"] = template
    elif template is not None:
        write_text(directory / "chat_template.jinja", template)
    for name, text in others.items():
        (directory / TEMPLATES[0]).mkdir(exist_ok=True)
        write_text(directory / TEMPLATES[0] / f"{name}.jinja", text)
    write_json(directory / "tokenizer_config.json", config)
    return [warning] if warning else []


def _swallowing(vocabulary: GgufVocabulary) -> frozenset[str]:
    """Returns the control tokens that take the white space behind them. The file doesn't say it; Phi-3's do."""
    if not vocabulary.swallowing:
        return frozenset()
    controls = {text for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == CONTROL}
    return frozenset(controls - {"<s>", "<unk>", "<|endoftext|>"})


def _bpe(vocabulary: GgufVocabulary) -> Json:
    """Returns the content of `tokenizer.json` of a byte-level BPE."""
    rules, tokens, types = RULES[vocabulary.pre], vocabulary.tokens, vocabulary.types
    added = {token for token, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED, UNKNOWN, UNUSED)}
    pieces: dict[str, int] = {}
    for token, text in enumerate(tokens):
        pieces.setdefault(text, token)
    for merge in vocabulary.merges:
        left, _, right = merge.partition(" ")
        if " " in right or not all(part in pieces for part in (left, right, left + right)):
            raise InputError(f"{vocabulary.where}: its merge {short(merge)} is not of two pieces that make a third")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": tokens[token], "special": types[token] != USER_DEFINED}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for token in sorted(added)
        ],
        "normalizer": {"type": "NFC"} if rules.composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(rules.steps)},
        "post_processor": _post_processor(vocabulary),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rules.whole,
            "vocab": pieces,
            "merges": list(vocabulary.merges),
        },
    }


def _post_processor(vocabulary: GgufVocabulary) -> Json | None:
    """Puts BOS in front."""
    token = vocabulary.special.get("bos")
    if not vocabulary.add_bos or token is None:
        return None
    return tokenizers.bos_in_front(vocabulary.tokens[token], token)


def _sentencepiece_model(vocabulary: GgufVocabulary) -> bytes:
    """Returns a SentencePiece model of the vocabulary: the protobuf message ModelProto of SentencePiece's format."""
    types, special = vocabulary.types, vocabulary.special
    texts = [  # llama.cpp has those that a user defined with spaces
        text.replace(" ", SPACE) if kind == USER_DEFINED else text
        for text, kind in zip(vocabulary.tokens, types, strict=True)
    ]
    pieces = zip(texts, vocabulary.scores, types, strict=True)
    names = dict(special) if vocabulary.add_bos else {name: t for name, t in special.items() if name != "bos"}
    names["unk"] = types.index(UNKNOWN)
    # By the pieces' names, and not by their ids, the library finds them; a name that is no piece's is none.
    absent = "<none>" if "<none>" not in vocabulary.tokens else "<none of these>"
    trainer = [
        _number(3, BPE_MODEL), _number(4, len(types)), _number(35, BYTE in types),
        *(_number(40 + i, names.get(name, -1)) for i, name in enumerate(("unk", "bos", "eos", "pad"))),
        *(
            _message(45 + i, (vocabulary.tokens[names[name]] if name in names else absent).encode())
            for i, name in enumerate(("unk", "bos", "eos", "pad"))
        ),
    ]  # fmt: skip
    normalizer = [
        _message(1, b"identity"), _number(3, vocabulary.dummy_prefix), _number(4, vocabulary.remove_spaces),
        _number(5, True),
    ]  # fmt: skip
    return b"".join([*map(_piece, pieces), _message(2, b"".join(trainer)), _message(3, b"".join(normalizer))])


def _piece(piece: tuple[str, float, int]) -> bytes:
    text, score, kind = piece
    parts = [_message(1, text.encode()), b"\x15" + struct.pack("<f", score)]
    return _message(1, b"".join([*parts, *([_number(3, kind)] if kind != NORMAL else [])]))


def _message(number: int, content: bytes) -> bytes:
    """Returns a field of protobuf with bytes in it."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    """Returns a field of protobuf with a number in it; one below 0 has 64 bits."""
    return _varint(number << 3) + _varint(int(value) & (1 << 64) - 1)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
