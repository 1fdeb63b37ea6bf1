"""A model directory's tokenizer as GGUF's metadata, which llama.cpp makes the same token ids by.

llama.cpp has two tokenizers of its own for these models: SentencePiece's BPE, where the piece of the highest score is
joined first ("llama"), and byte-level BPE by a list of merges ("gpt2"). What the second does before the merges it knows
by a name alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.reading import counted, listed
from elm_mlx.text import sentencepiece_file
from elm_mlx.text.sentencepiece_file import BPE, BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from elm_mlx.text.tokenizer import Tokenizer, Vocabulary, read_settings
from elm_mlx_convert.gguf_file import Metadatum
from elm_mlx_convert.gguf_vocabulary import RULES

Json = dict[str, Any]

_MAX_BYTES = 64 << 20
_MAX_PIECES = 1 << 24
_UNJOINED = -1000.0  # the score of pieces that no merge makes
_ENDS = ("eos", "eot", "eom")  # what llama.cpp has names for: the end of a text, a turn, a message
# llama.cpp's own converter calls these control tokens, also where `tokenizer.json` doesn't call them special.
_LIKE_CONTROL = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
# Gemma's tokenizers cut at spaces, after all of them have become marks.
_NO_CUT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_PREFERRED = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o")  # of several names for the same


def tokenizer_metadata(
    vocabulary: Vocabulary, rows: int, templates: Mapping[str, str]
) -> tuple[dict[str, Metadatum], list[str]]:
    """Returns what a GGUF file says of a model's tokenizer, and notes on what llama.cpp does otherwise.

    Args:
        vocabulary: the model's tokenizer and end tokens, as `read_vocabulary` collects them.
        rows: of the embedding: as many tokens are written.
        templates: chat templates in Jinja, the default one by the name "".

    Raises:
        InputError: llama.cpp has no such tokenizer: says what it lacks.
    """
    tokenizer = vocabulary.tokenizer
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}, [
            "no tokenizer: llama.cpp takes and gives token ids alone, and Ollama and LM Studio cannot use it"
        ]
    values, notes = _of_json(tokenizer) if tokenizer.path.suffix == ".json" else _of_sentencepiece(tokenizer)
    notes += _fit(values, rows, tokenizer)
    values["tokenizer.ggml.add_bos_token"] = tokenizer.bos_id is not None
    values["tokenizer.ggml.add_eos_token"] = False
    for name, token in _special(tokenizer, vocabulary.end_ids).items():
        if token < rows:
            values[f"tokenizer.ggml.{name}_token_id"] = token
    if vocabulary.end_ids[len(_ENDS) :]:
        pieces = [tokenizer.piece_of(token) for token in vocabulary.end_ids[len(_ENDS) :]]
        notes.append(
            f"GGUF has no name for more than three end tokens: {listed(pieces)} end no text there by themselves"
        )
    for name, text in templates.items():
        values["tokenizer.chat_template" + (f".{name}" if name else "")] = text
    return values, notes


def _special(tokenizer: Tokenizer, ends: Sequence[int]) -> dict[str, int]:
    """Returns the special tokens by GGUF's names. A BOS that is put before no text is named all the same."""
    settings = read_settings(tokenizer.path.parent)
    names = [name for name in ("bos", "unk", "pad") if f"{name}_token" in settings]
    named = {name: tokenizer.id_of(settings[f"{name}_token"]) for name in names}
    found = {"bos": tokenizer.bos_id if tokenizer.bos_id is not None else named.get("bos")}
    found["unknown"] = tokenizer.unk_id if tokenizer.unk_id is not None else named.get("unk")
    found["padding"] = named.get("pad")
    found |= dict(zip(_ENDS, ends, strict=False))
    # llama.cpp puts numbers of its own, of Llama and GPT-2, where none is said.
    found["bos"] = found["bos"] if found["bos"] is not None else next(iter(ends), None)
    return {name: token for name, token in found.items() if token is not None}


def _fit(values: dict[str, Metadatum], rows: int, tokenizer: Tokenizer) -> list[str]:
    """Has `values` name as many tokens as the embedding has rows. Returns notes.

    Raises:
        InputError: two tokens are written alike, of which llama.cpp finds but one.
    """
    tokens = values["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    count, more = len(tokens), rows - len(tokens)
    notes = []
    if more < 0:
        are = "is" if more == -1 else "are"
        notes.append(f"{counted(-more, 'token')} past the embedding's {rows:,} rows {are} left out")
        del tokens[rows:]
    tokens += [f"[PAD{token}]" for token in range(count, rows)]
    double = [token for token, times in Counter(tokens).items() if times > 1]
    if double:
        raise InputError(
            f"{tokenizer.path}: several tokens are written {listed(double)}, of which llama.cpp finds but one"
        )
    types = np.asarray(values["tokenizer.ggml.token_type"], np.int32)[:rows]
    values["tokenizer.ggml.token_type"] = np.concatenate([types, np.full(max(more, 0), UNUSED, np.int32)])
    if "tokenizer.ggml.scores" in values:
        scores = np.asarray(values["tokenizer.ggml.scores"], np.float32)[:rows]
        values["tokenizer.ggml.scores"] = np.concatenate([scores, np.full(max(more, 0), -10_000, np.float32)])
    return notes


def _of_sentencepiece(tokenizer: Tokenizer) -> tuple[dict[str, Metadatum], list[str]]:
    model = sentencepiece_file.read(tokenizer.path)
    pieces = model.pieces()
    lacks = {
        "unigrams, words or characters, where llama.cpp has SentencePiece's BPE": model.model_type != BPE,
        "no pieces for bytes, by which llama.cpp writes what no other piece has": not model.byte_fallback,
        "pieces that end with their space": model.whitespace_as_suffix,
        "pieces without marks for spaces": not model.escape_whitespaces,
    }
    missing = next((what for what, holds in lacks.items() if holds), None)
    if missing is not None:
        raise InputError(f"{tokenizer.path}: has {missing}")
    does_not = {
        "normalizes text before it is cut into pieces": model.charsmap != b"",
        "takes spaces from both ends of a text, and all but one of several": model.remove_extra_whitespaces,
    }
    values: dict[str, Metadatum] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": _as_written([piece.text for piece in pieces], [piece.type for piece in pieces]),
        "tokenizer.ggml.scores": np.array([piece.score for piece in pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([piece.type for piece in pieces], np.int32),
        "tokenizer.ggml.add_space_prefix": model.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": model.remove_extra_whitespaces,
    }
    notes = [f"the tokenizer {what}, and llama.cpp's does not" for what, holds in does_not.items() if holds]
    return values, notes


def _of_json(tokenizer: Tokenizer) -> tuple[dict[str, Metadatum], list[str]]:
    path = tokenizer.path
    content = json.loads(reading.text(path, _MAX_BYTES))
    model = content.get("model")
    if (
        not isinstance(model, Mapping)
        or model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), Mapping)
    ):
        raise InputError(f"{path}: is no BPE, and llama.cpp has no such tokenizer for this architecture")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges", [])]
    byte_level = _steps(content.get("decoder"), "decoders")[-1:] or [{}]
    return (_byte_level if byte_level[0].get("type") == "ByteLevel" else _by_scores)(tokenizer, content, merges)


Merges = Sequence[tuple[str, ...]]


def _byte_level(tokenizer: Tokenizer, content: Json, merges: Merges) -> tuple[dict[str, Metadatum], list[str]]:
    pre, notes = _pre_tokenizer(tokenizer.path, content)
    tokens, types = _pieces(tokenizer, content)
    values: dict[str, Metadatum] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }
    return values, notes


def _pre_tokenizer(path: Path, content: Json) -> tuple[str, list[str]]:
    """Returns llama.cpp's name for what is done to a text before the merges, and notes on what it doesn't do."""
    normal = _steps(content.get("normalizer"), "normalizers")
    composes = [step for step in normal if step.get("type") == "NFC"]
    if len(composes) < len(normal):
        raise InputError(f"{path}: changes text by {_kinds(normal)} before it is cut, which llama.cpp does not")
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    said = [_essence(step) for step in steps]
    whole = bool(content["model"].get("ignore_merges"))
    names = [
        name
        for name, rules in RULES.items()
        if [_essence(step) for step in rules.steps] == said and rules.whole == whole
    ]
    if not names:
        raise InputError(
            f"{path}: cuts text by {_kinds(steps)}"
            + (", and looks whole words up before the merges," if whole else "")
            + " in a way that llama.cpp has no name for"
        )
    name = next((name for name in _PREFERRED if name in names), names[0])
    notes = (
        ["the tokenizer composes characters (NFC) before it cuts a text, and llama.cpp's does not"] if composes else []
    )
    return name, notes


def _kinds(steps: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(str(step.get("type"))[:40] for step in steps) or "nothing"


def _essence(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns what a step of a pre-tokenizer does, however it is written."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return kind, bool(step.get("add_prefix_space")), step.get("use_regex", True) is not False
    if kind == "Split":
        pattern = step.get("pattern")
        text = pattern.get("Regex", pattern.get("String")) if isinstance(pattern, Mapping) else pattern
        return kind, text, step.get("behavior"), bool(step.get("invert"))
    return kind, *sorted((key, str(value)) for key, value in step.items() if key != "type")


def _by_scores(tokenizer: Tokenizer, content: Json, merges: Merges) -> tuple[dict[str, Metadatum], list[str]]:
    """A SentencePiece-like BPE: its merges in their order become scores, by which SentencePiece joins pieces."""
    path = tokenizer.path
    tokens, types = _pieces(tokenizer, content)
    by_text = {text: token for token, text in enumerate(tokens)}
    if not content["model"].get("byte_fallback") or "<0x0A>" not in by_text:
        raise InputError(f"{path}: has no pieces for bytes, by which llama.cpp writes what no other piece has")
    scores = np.full(len(tokens), _UNJOINED, np.float32)
    types = [
        BYTE if kind == NORMAL and sentencepiece_file.byte_of(text) is not None else kind
        for text, kind in zip(tokens, types, strict=True)
    ]
    normal, cut = (_steps(content.get(key), f"{key.replace('_', '')}s") for key in ("normalizer", "pre_tokenizer"))
    odd = []
    for step in (*normal, *cut):
        isolated = _isolated(step)
        if isolated and by_text.keys() >= {*isolated}:
            for text in isolated:
                types[by_text[text]] = USER_DEFINED
        elif step.get("type") not in ("Prepend", "Replace", "Metaspace") and step != _NO_CUT:
            odd.append(step)
    if odd:
        raise InputError(f"{path}: changes or cuts text by {_kinds(odd)}, which llama.cpp does not")
    if tokenizer.unk_id is not None and types[tokenizer.unk_id] != NORMAL:
        types[tokenizer.unk_id] = UNKNOWN
    missing = set(_joins(tokens, types)) - set(merges)
    rank, last = 0, None
    for merge in merges:
        token = by_text.get("".join(merge))
        if token is None or types[token] != NORMAL or token == last:
            continue
        if scores[token] != _UNJOINED or missing:
            raise InputError(f"{path}: its merges have an order that no scores have, by which llama.cpp joins pieces")
        scores[token], last, rank = -rank, token, rank + 1
    prefix = any(step.get("type") == "Prepend" for step in normal) or any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in cut
    )
    values: dict[str, Metadatum] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": _as_written(tokens, types),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return values, []


def _isolated(step: Mapping[str, Any]) -> list[str] | None:
    """Returns the texts that a step of a pre-tokenizer cuts out, as `tokenizers` writes those that a user defined."""
    found = step.get("pattern") if step.get("type") == "Split" and step.get("behavior") == "Isolated" else None
    pattern = found.get("Regex") if isinstance(found, dict) and not step.get("invert") else None
    if not isinstance(pattern, str):
        return None
    parts = re.findall(r"(?:\\.|[^|])+", pattern, re.DOTALL)
    texts = [re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in parts]
    return texts if "|".join(map(re.escape, texts)) == pattern else None


def _as_written(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """Returns tokens as llama.cpp wants them: those that a user defined it finds in a text whose spaces are spaces."""
    return [
        text.replace(SPACE, " ") if kind == USER_DEFINED else text for text, kind in zip(tokens, types, strict=True)
    ]


def _joins(tokens: Sequence[str], types: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yields every pair of pieces that make a third: SentencePiece joins them all."""
    known = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    for text in known:
        for at in range(1, len(text)):
            if text[:at] in known and text[at:] in known:
                yield text[:at], text[at:]


def _pieces(tokenizer: Tokenizer, content: Json) -> tuple[list[str], list[int]]:
    """Returns every token as it is written, by id, and its type. An id that no token has is a padding one."""
    size = 1 + max([*content["model"]["vocab"].values(), tokenizer.vocab_size - 1])  # some leave ids out
    if size > _MAX_PIECES:
        raise InputError(f"{tokenizer.path}: has a piece of the id {size - 1}, which no model has a row for")
    tokens = [f"[PAD{token}]" for token in range(size)]
    types = [UNUSED] * len(tokens)
    for text, token in content["model"]["vocab"].items():
        tokens[token], types[token] = text, NORMAL
    controls = set(tokenizer.control_ids.values())
    for entry in content.get("added_tokens") or []:
        token, text = entry["id"], entry["content"]
        tokens[token] = text
        types[token] = CONTROL if token in controls or _LIKE_CONTROL.fullmatch(text) else USER_DEFINED
    return tokens, types


def _steps(part: Any, nested: str) -> list[Mapping[str, Any]]:
    """Returns the steps of a part of `tokenizer.json`, one or a sequence of them."""
    if part is None:
        return []
    found = part.get(nested) if part.get("type") == "Sequence" else [part]
    return list(found or [])
