"""A SentencePiece model into a model directory, in the forms that this package and Hugging Face's libraries read."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.files import new_file, write_json
from elm_mlx.reading import expanded, json_object_if_there
from elm_mlx.text import sentencepiece_file
from elm_mlx.text.sentencepiece_file import (
    BPE,
    CONTROL,
    NORMAL,
    SPACE,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    ModelFile,
    Piece,
)
from elm_mlx.text.tokenizer import FILE_NAME, Tokenizer, read_settings
from elm_mlx_convert import sources

Json = dict[str, Any]


def find(source: str | Path) -> Path:
    """Returns the SentencePiece model that `source` means: a file, a directory that holds one, or a hub repository.

    Raises:
        InputError: there is none there, or the repository is gated or does not exist.
        ElmError: the hub cannot be reached, and its cache has no copy.
    """
    path = expanded(source)
    repository = sources.named_repository(source)
    if repository is not None:
        return _inside(sources.fetch(repository, sources.contents(repository), [FILE_NAME]), str(source))
    return _inside(path, str(path)) if path.is_dir() else path


def added_beside(model_file: Path, pieces: int, rows: int) -> list[str]:
    """Returns the tokens that files beside a SentencePiece model add to its pieces, and an embedding has rows for."""
    directory = model_file.parent
    numbers = json_object_if_there(directory / "added_tokens.json")
    found = {number: text for text, number in numbers.items() if type(number) is int}
    settings = json_object_if_there(directory / "tokenizer_config.json").get("added_tokens_decoder")
    for number, token in settings.items() if isinstance(settings, dict) else ():
        if number.isascii() and number.isdigit() and isinstance(token, dict):
            found[int(number)] = str(token.get("content"))
    return [text for number, text in sorted(found.items()) if pieces <= number < rows]


def _inside(directory: Path, label: str) -> Path:
    if (directory / FILE_NAME).exists():
        return directory / FILE_NAME
    others = sorted(directory.glob("*.model"))
    if len(others) == 1:
        return others[0]
    found = f"{len(others)} files *.model, none of them called so" if others else "no SentencePiece model"
    if (directory / "tokenizer.json").exists():
        found += " (tokenizer.json is made from one, and is not enough)"
    raise InputError(f"{label}: no {FILE_NAME}: {found}; name the file")


def write(
    model_file: Path,
    directory: Path,
    *,
    max_length: int,
    chat_template: str | None = None,
    swallowing: frozenset[str] = frozenset(),
) -> str | None:
    """Writes the tokenizer into `directory`: `tokenizer.model` unchanged, `tokenizer.json`, `tokenizer_config.json`.

    With the last two, transformers and mlx-lm make the ids and texts that SentencePiece makes, with one exception
    that nothing spares them: to them the name of a control piece (`</s>`) is that piece wherever it stands in a
    text. Equal input gives equal bytes. BOS and EOS are those that a `tokenizer_config.json` beside `model_file` names,
    if it names pieces, or else the model's own.

    Args:
        max_length: the model's context in tokens.
        chat_template: Jinja text.
        swallowing: control pieces that take the white space behind them, which SentencePiece's format cannot say.

    Returns:
        None when that holds. A sentence to show when `tokenizer.json` cannot express the model (it is then not
        written), or not to the last character: models with normalization rules, unigrams and their like, none of
        them an OpenELM's.

    Raises:
        InputError: the model is damaged. Nothing was written.
    """
    model, tokenizer = sentencepiece_file.read(model_file), Tokenizer.load(model_file)
    pieces = model.pieces()
    inexpressible, inexact = _limits(model, pieces)
    with new_file(directory / FILE_NAME) as file:
        file.write(model.data)
    write_json(directory / "tokenizer_config.json", _config(tokenizer, max_length, chat_template))
    if inexpressible:
        return f"mlx-lm and transformers cannot read this tokenizer: {inexpressible}"
    write_json(directory / "tokenizer.json", _tokenizer(model, pieces, tokenizer, swallowing))
    return inexact and f"mlx-lm and transformers read some rare texts differently from this tokenizer: {inexact}"


def _config(tokenizer: Tokenizer, max_length: int, chat_template: str | None) -> Json:
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    for name, piece in read_settings(tokenizer.path.parent).items():
        if name in names and (token := tokenizer.id_of(piece)) is not None:
            names[name] = token
    pieces = tokenizer.pieces
    config: Json = {
        # This class takes tokenizer.json as it is; LlamaTokenizer would put rules of its own in place of some.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: pieces[token] for name, token in names.items() if token is not None},
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    return config if chat_template is None else {**config, "chat_template": chat_template}


def _tokenizer(model: ModelFile, pieces: list[Piece], tokenizer: Tokenizer, swallowing: frozenset[str]) -> Json:
    """Returns the content of `tokenizer.json`: SentencePiece's steps in the words of the tokenizers library."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": piece.text, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            | {"rstrip": piece.text in swallowing}
            for token, piece in enumerate(pieces)
            if piece.type in (CONTROL, UNKNOWN)
        ],
        "normalizer": _normalizer(model),
        "pre_tokenizer": _pre_tokenizer(pieces),
        "post_processor": _post_processor(tokenizer),
        "decoder": _decoder(model),
        "model": _bpe(model, pieces) if model.model_type == BPE else _unigram(model, pieces),
    }


def _limits(model: ModelFile, pieces: list[Piece]) -> tuple[str | None, str | None]:
    """Returns what the tokenizers library cannot express of the model, and what it does a little differently."""
    types = {piece.type for piece in pieces}
    inexpressible = {
        "it splits into whole words, or single characters": model.model_type not in (BPE, UNIGRAM),
        "its pieces end with their space instead of beginning with it": model.whitespace_as_suffix,
        "it does not mark spaces": not model.escape_whitespaces,
        "it has unused pieces": UNUSED in types,
    }
    inexact = {
        "they normalize combined characters and line ends differently": model.charsmap != b"",
        "they leave unknown characters out when decoding": not model.byte_fallback,
        f"they keep {SPACE} at the start of a text": model.remove_extra_whitespaces,
        "to them '<0x41>' in a text is that byte": model.model_type == UNIGRAM,
        "to them '<0x41>' between user-defined symbols is that byte": USER_DEFINED in types,
    }
    first, second = (next((why for why, holds in c.items() if holds), None) for c in (inexpressible, inexact))
    return first, second


def _normalizer(model: ModelFile) -> Json:
    steps: list[Json] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": rf"\A +|[ {SPACE}]+\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _pre_tokenizer(pieces: list[Piece]) -> Json | None:
    """Cuts user-defined symbols out first, the longest that fits; the rest is left in one."""
    symbols = sorted((p.text for p in pieces if p.type == USER_DEFINED), key=len, reverse=True)
    if not symbols:
        return None
    pattern = "|".join(re.escape(symbol) for symbol in symbols)
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _post_processor(tokenizer: Tokenizer) -> Json | None:
    return None if tokenizer.bos_id is None else bos_in_front(tokenizer.pieces[tokenizer.bos_id], tokenizer.bos_id)


def bos_in_front(bos: str, token: int) -> Json:
    """Returns the post-processor of a `tokenizer.json` that puts BOS before a text."""
    first, second = (
        [{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": name, "type_id": i}}]
        for i, name in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {bos: {"id": bos, "ids": [token], "tokens": [bos]}},
    }


def _decoder(model: ModelFile) -> Json:
    """Returns exactly what mlx-lm looks for to stream text in linear time."""
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _bpe(model: ModelFile, pieces: list[Piece]) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece.text for piece in pieces if piece.type == UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        # For user-defined symbols, which no merge makes.
        "ignore_merges": any(piece.type == USER_DEFINED for piece in pieces),
        "vocab": {piece.text: token for token, piece in enumerate(pieces)},
        "merges": _merges(pieces),
    }


def _merges(pieces: list[Piece]) -> list[str]:
    """Returns every pair of neighbours that SentencePiece joins, the one whose union scores highest first."""
    known = {piece.text: piece.score for piece in pieces if piece.type == NORMAL}
    pairs = [
        (score, text[:i], text[i:])
        for text, score in known.items()
        for i in range(1, len(text))
        if text[:i] in known and text[i:] in known
    ]
    pairs.sort(key=lambda pair: -pair[0])
    return [f"{left} {right}" for _, left, right in pairs]


def _unigram(model: ModelFile, pieces: list[Piece]) -> Json:
    return {
        "type": "Unigram",
        "unk_id": next(token for token, piece in enumerate(pieces) if piece.type == UNKNOWN),
        "vocab": [[piece.text, piece.score] for piece in pieces],
        "byte_fallback": model.byte_fallback,
    }
