"""A GGUF file's tokenizer as files: SentencePiece's ids by SentencePiece, a BPE's words by llama.cpp's expressions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
import sentencepiece_models
from gguf_files import ARRAY, BOOL, F32, I32, STRING, U32, gguf_file

from elm_mlx.errors import InputError
from elm_mlx.text import sentencepiece_file
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx_convert import gguf_vocabulary
from elm_mlx_convert.gguf_file import read_header

TEXTS = [
    "the quick fox", " the  quick   fox ", "漢字 かな naïve café", "😀 12 345", "a\tb\n\nc", "</s> <s> <unk>", "▁the",
    "<0x41> Ünï", "x" * 40, "", " ", "[INST] the [/INST] fox",
]  # fmt: skip


def header_of(path: Path, model: Path, **changes: Any) -> Any:
    """The header of a file with a SentencePiece model's pieces, and with other values of `tokenizer.ggml` keys."""
    pieces = sentencepiece_file.read(model).pieces()
    entries: dict[str, Any] = {
        "model": (STRING, "llama"), "tokens": (ARRAY, (STRING, [piece.text for piece in pieces])),
        "scores": (ARRAY, (F32, [piece.score for piece in pieces])),
        "token_type": (ARRAY, (I32, [piece.type for piece in pieces])), "bos_token_id": (U32, 1),
        "eos_token_id": (U32, 2), **changes,
    }  # fmt: skip
    written = [(f"tokenizer.ggml.{key}", value) for key, value in entries.items() if value is not None]
    path.write_bytes(gguf_file([("general.architecture", (STRING, "llama")), *written]))
    return read_header(path)


def written(header: Any, directory: Path) -> gguf_vocabulary.GgufVocabulary:
    directory.mkdir()
    vocabulary = gguf_vocabulary.read(header)
    assert vocabulary is not None
    gguf_vocabulary.write(vocabulary, directory, 512)
    return vocabulary


@pytest.mark.parametrize("spaces", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("symbols", [[], ["[INST]", "[/INST]"]])
def test_sentencepiece_makes_the_same_ids(tmp_path: Path, spaces: bool, prefix: bool, symbols: list[str]) -> None:
    options = sentencepiece_models.EXACT | {"remove_extra_whitespaces": spaces, "add_dummy_prefix": prefix}
    model = sentencepiece_models.train(tmp_path / "a.model", **options, user_defined_symbols=symbols)
    flags = {"add_space_prefix": (BOOL, prefix), "remove_extra_whitespaces": (BOOL, spaces)}
    written(header_of(tmp_path / "a.gguf", model, **flags), tmp_path / "out")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    special = [(each.bos_id(), each.eos_id(), each.unk_id(), each.vocab_size()) for each in (ours, theirs)]
    assert special[0] == special[1]
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text


@pytest.mark.parametrize("bos", [None, True, False])
def test_bos_stands_before_a_text_where_the_file_says_so(tmp_path: Path, bos: bool | None) -> None:
    model = sentencepiece_models.train(tmp_path / "a.model", **sentencepiece_models.EXACT)
    header = header_of(tmp_path / "a.gguf", model, add_bos_token=None if bos is None else (BOOL, bos))
    written(header, tmp_path / "out")
    first = 1 if bos is not False else None
    for name in ("tokenizer.model", "tokenizer.json"):
        tokenizer = Tokenizer.load(tmp_path / "out" / name)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (first, 2)


def test_fillings_are_no_pieces_and_the_unknown_token_is_one(tmp_path: Path) -> None:
    """As files of Phi-3 have it: `<unk>` a control token, and the fillings unknown."""
    model = sentencepiece_models.train(tmp_path / "a.model", **sentencepiece_models.EXACT)
    pieces = sentencepiece_file.read(model).pieces()
    changes = {
        "tokens": (ARRAY, (STRING, [*(piece.text for piece in pieces), "[PAD400]", "[PAD401]"])),
        "scores": None, "unknown_token_id": (U32, 0),
        "token_type": (ARRAY, (I32, [3, *(piece.type for piece in pieces[1:]), 2, 2])),
    }  # fmt: skip
    written(header_of(tmp_path / "a.gguf", model, **changes), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.unk_id) == (len(pieces), 0)


def test_no_unknown_token(tmp_path: Path) -> None:
    model = sentencepiece_models.train(tmp_path / "a.model", **sentencepiece_models.EXACT)
    count = len(sentencepiece_file.read(model).pieces())
    changes = {
        "tokens": (ARRAY, (STRING, [f"t{token}" for token in range(count)])), "token_type": (ARRAY, (I32, [1] * count)),
    }  # fmt: skip
    with pytest.raises(InputError, match="has no unknown token"):
        gguf_vocabulary.read(header_of(tmp_path / "a.gguf", model, **changes))


CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
CASED = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+",
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*",
)
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# As llama.cpp writes them, without flags within and without classes of cases.
EXPRESSIONS = {
    "llama-bpe": CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": rf"{CASED[0]}|{CASED[1]}|\p{{N}}{REST}",
    "gpt-4o": rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}{REST}",
}
# Without marks that combine, which llama.cpp's expressions of cases leave out and the models' own have.
SAMPLES = [
    "I'll say: it's 12345 o'clock, isn't IT'S?", "Grüße, ÄÖÜ straße HELLOworld helloWORLD McDonald",
    "日本語のテキスト 123漢字", "a  b   c\t\td \n\n  e\r\n\r\nf   ", "🦜🦜 emoji👩‍👩‍👧‍👦s", "ñandú Ωmega ДОМ дом Дом",
    "f(x) = x**2 // comment/* and */\n\n\treturn 3.14159;", "   leading", "trailing   ", "'s 'T 'LL'd",
    "1 22 333 4444 55555",
]  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_words_are_llama_cpp_s(name: str) -> None:
    from tokenizers import Tokenizer as Library

    rules = gguf_vocabulary.RULES[name]
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    library = Library.from_str(json.dumps(empty | {"pre_tokenizer": rules.steps[0]}))
    for text in SAMPLES:
        words = [word for word, _ in library.pre_tokenizer.pre_tokenize_str(text)]
        assert words == [found[0] for found in regex.finditer(EXPRESSIONS[name], text)], text
        assert "".join(words) == text


def test_every_rule_is_a_pre_tokenizer_of_the_library() -> None:
    from tokenizers import Tokenizer as Library

    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    for rules in gguf_vocabulary.RULES.values():
        steps = {"type": "Sequence", "pretokenizers": list(rules.steps)}
        library = Library.from_str(json.dumps(empty | {"pre_tokenizer": steps}))
        for text in SAMPLES:
            words = "".join(word for word, _ in library.pre_tokenizer.pre_tokenize_str(text))
            assert len(words) == len(text.encode())  # every byte is in one word
