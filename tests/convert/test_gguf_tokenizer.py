"""Tokenizers in GGUF's metadata: what llama.cpp makes the same ids by, and what it cannot be told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import other_models
import pytest
import sentencepiece
import sentencepiece_models
from checkpoints import save_hub, tiny, weights
from sentencepiece_models import EXACT

from elm_mlx.errors import InputError
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx_convert import convert, export_gguf, tokenizers
from elm_mlx_convert.gguf_export import GgufExport

DIGITS = {"type": "Digits", "individual_digits": True}


def fields(path: Path, **how: Any) -> tuple[dict[str, Any], GgufExport]:
    """What a file says of the tokenizer of the model in `path`."""
    done = export_gguf(path, path.with_suffix(".gguf"), overwrite=True, **how)
    found = gguf.GGUFReader(done.path).fields
    prefix = "tokenizer."
    return {
        name.removeprefix(prefix).removeprefix("ggml."): field.contents()
        for name, field in found.items()
        if name.startswith(prefix)
    }, done


def openelm(path: Path, **options: object) -> Path:
    """A model of 410 rows with a SentencePiece model of 400 pieces."""
    config = tiny(vocab_size=410)
    directory = save_hub(path, config, weights(config))
    sentencepiece_models.train(directory / "tokenizer.model", **options)
    return directory


def test_a_sentencepiece_model_is_there_piece_by_piece(tmp_path: Path) -> None:
    directory = openelm(tmp_path / "model", **EXACT)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found, done = fields(directory)
    assert not done.notes
    assert (found["model"], found["pre"], found["chat_template"]) == ("llama", "default", "{{ messages[0].content }}")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert found["tokens"] == [*map(processor.id_to_piece, range(400)), *(f"[PAD{row}]" for row in range(400, 410))]
    np.testing.assert_allclose(found["scores"][:400], [*map(processor.get_score, range(400))], rtol=1e-6)
    kinds = gguf.TokenType
    expected = [
        kinds.UNKNOWN if processor.is_unknown(token) else kinds.CONTROL if processor.is_control(token)
        else kinds.BYTE if processor.is_byte(token) else kinds.NORMAL
        for token in range(400)
    ]  # fmt: skip
    assert found["token_type"] == [*expected, *[kinds.UNUSED] * 10]
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)
    assert (found["add_bos_token"], found["add_eos_token"], found["add_space_prefix"]) == (True, False, True)


def test_tokens_without_rows_are_left_out_and_said(tmp_path: Path) -> None:
    rows = other_models.train_tokenizer("chatml").get_vocab_size()
    directory = other_models.write_model(tmp_path / "model", "mistral", {"vocab_size": rows})
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    entry = {**content["added_tokens"][0], "id": rows, "content": "[PAD]"}
    path.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], entry]}))
    found, done = fields(directory)
    assert len(found["tokens"]) == len(found["token_type"]) == rows
    assert f"1 token past the embedding's {rows} rows is left out" in done.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**EXACT, "model_type": "unigram"}, "unigrams, words or characters"),
        ({**EXACT, "byte_fallback": False}, "no pieces for bytes"),
        ({**EXACT, "treat_whitespace_as_suffix": True}, "end with their space"),
    ],
)
def test_a_sentencepiece_model_that_llama_cpp_reads_otherwise_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    directory = openelm(tmp_path / "model", **options)
    with pytest.raises(InputError, match=rf"tokenizer\.model: has .*{message}"):
        export_gguf(directory, tmp_path / "a.gguf")


def test_normalization_is_said(tmp_path: Path) -> None:
    _, done = fields(openelm(tmp_path / "model", **{**EXACT, "normalization_rule_name": "nfkc"}))
    assert any("normalizes text" in note for note in done.notes)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_byte_level_bpe_has_its_merges_and_the_name_of_its_rules(name: str, tmp_path: Path) -> None:
    directory = other_models.write_model(tmp_path / "model", name)
    content = json.loads((directory / "tokenizer.json").read_text())
    found, done = fields(directory)
    assert not done.notes
    assert (found["model"], found["pre"]) == ("gpt2", "dbrx")
    assert found["merges"] == [" ".join(merge) for merge in content["model"]["merges"]]
    vocabulary = content["model"]["vocab"]
    assert [found["tokens"].index(text) for text in vocabulary] == list(vocabulary.values())
    style = other_models.STYLES.get(name, "chatml")
    controls = {found["tokens"][at] for at, kind in enumerate(found["token_type"]) if kind == gguf.TokenType.CONTROL}
    assert controls == set(other_models.CONTROLS[style])
    assert found["tokens"][found["eos_token_id"]] == other_models.EOS[style]
    assert found["tokens"][found["bos_token_id"]] == other_models.BOS[style]
    assert found["add_bos_token"] == (style == "llama3")
    assert found["chat_template"] == other_models.TEMPLATES[style]
    assert found["tokens"][-3:] == [f"[PAD{len(vocabulary) + i}]" for i in range(3)]


def test_ids_that_a_vocabulary_leaves_out_are_padding(tmp_path: Path) -> None:
    directory = other_models.write_model(tmp_path / "model", "mistral")
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] += 2
    path.write_text(json.dumps(content))
    tokens = fields(directory)[0]["tokens"]
    assert tokens[vocabulary[last] - 2 : vocabulary[last] + 1] == [
        f"[PAD{vocabulary[last] - 2}]", f"[PAD{vocabulary[last] - 1}]", last
    ]  # fmt: skip
    vocabulary[last] = 1 << 31
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="has a piece of the id 2147483648"):
        export_gguf(directory, tmp_path / "b.gguf")


def test_special_tokens_are_control_tokens_whatever_they_are_for(tmp_path: Path) -> None:
    """As llama.cpp's converter types them, one that is called unknown and ones that look special among them."""
    directory = other_models.write_model(tmp_path / "model", "mistral")
    path, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    content = json.loads(path.read_text())
    first, size = content["added_tokens"][0], len(content["model"]["vocab"])
    added = {"<|fim|>": False, "<tool>": False, "<pad>": True}
    entries = [
        {**first, "id": size + i, "content": text, "special": how} for i, (text, how) in enumerate(added.items())
    ]
    path.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], *entries]}))
    more = {"unk_token": first["content"], "pad_token": {"content": "<pad>"}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | more))
    wider = other_models.write_model(tmp_path / "wider", "mistral", {"vocab_size": size + 3})
    for file in (path, settings):
        shutil.copy(file, wider)
    found, _ = fields(wider)
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    control, defined = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    assert {text: kinds[text] for text in (first["content"], *added)} == {
        first["content"]: control, "<|fim|>": control, "<tool>": defined, "<pad>": control,
    }  # fmt: skip
    assert found["unknown_token_id"] == first["id"] and found["padding_token_id"] == size + 2


@pytest.mark.parametrize("layout", ["SentencePiece", "ours", "Gemma's"])
def test_spaces_that_a_user_defined_are_spaces(layout: str, tmp_path: Path) -> None:
    """As Gemma's tokenizer has several: llama.cpp looks for them in the text as it is written."""
    symbols = ["\u2581\u2581", "\n\n", "<a|b>"]
    options = {**EXACT, "user_defined_symbols": symbols, "add_dummy_prefix": False}
    if layout == "SentencePiece":
        directory = openelm(tmp_path / "model", **options)
    else:
        directory = other_models.write_model(tmp_path / "model", "mistral", {"vocab_size": 410})
        sentencepiece_models.train(tmp_path / "a.model", **options)
        tokenizers.write(tmp_path / "a.model", directory, max_length=64)
    if layout == "Gemma's":
        content = json.loads((directory / "tokenizer.json").read_text())
        for text in symbols:
            entry = {"id": content["model"]["vocab"][text], "content": text, "special": False, "normalized": True}
            content["added_tokens"].append({**content["added_tokens"][0], **entry})
        content["model"]["ignore_merges"] = False
        content["pre_tokenizer"] = {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        }  # fmt: skip
        (directory / "tokenizer.json").write_text(json.dumps(content))
    found, _ = fields(directory)
    defined = [
        text for text, kind in zip(found["tokens"], found["token_type"], strict=True)
        if kind == gguf.TokenType.USER_DEFINED
    ]  # fmt: skip
    assert sorted(defined) == sorted(["  ", "\n\n", "<a|b>"])
    convert(directory.with_suffix(".gguf"), tmp_path / "back")
    ours, theirs = Tokenizer.load(tmp_path / "back"), Tokenizer.load(directory)
    for text in ("the  quick   fox", "a\n\nb<a|b>  c", "    "):
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize(
    ("steps", "whole", "name"),
    [
        ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], False, "gpt-2"),
        ([DIGITS, {"type": "ByteLevel", "add_prefix_space": False}], False, "smollm"),
        (None, True, "llama-bpe"),
        (None, False, "dbrx"),
    ],
)
def test_rules_have_names(steps: list[dict[str, Any]] | None, whole: bool, name: str, tmp_path: Path) -> None:
    directory = other_models.write_model(tmp_path / "model", "mistral")
    change(directory, steps, whole)
    assert fields(directory)[0]["pre"] == name


@pytest.mark.parametrize(
    ("steps", "whole", "message"),
    [
        ([{"type": "ByteLevel", "add_prefix_space": True}], False, "ByteLevel"),
        ([{"type": "ByteLevel", "add_prefix_space": False}], True, "whole words up"),
        ([{"type": "Whitespace"}, {"type": "ByteLevel", "add_prefix_space": False}], False, "Whitespace"),
    ],
)
def test_rules_without_a_name_are_refused(
    steps: list[dict[str, Any]], whole: bool, message: str, tmp_path: Path
) -> None:
    directory = other_models.write_model(tmp_path / "model", "mistral")
    change(directory, steps, whole)
    with pytest.raises(InputError, match=rf"tokenizer\.json: cuts text by .*{message}.* that llama\.cpp has no name"):
        export_gguf(directory, tmp_path / "a.gguf")


def change(directory: Path, steps: list[dict[str, Any]] | None, whole: bool) -> None:
    """Gives a model's tokenizer other rules."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    if steps is not None:
        full = [{"trim_offsets": True, **step} if step["type"] == "ByteLevel" else step for step in steps]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": full}
    content["model"]["ignore_merges"] = whole
    path.write_text(json.dumps(content))


def test_merges_of_a_sentencepiece_model_become_scores_in_its_order(tmp_path: Path) -> None:
    directory = other_models.write_model(tmp_path / "model", "llama", {"vocab_size": 402})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    sentencepiece_models.train(tmp_path / "spm.model", **EXACT)
    tokenizers.write(tmp_path / "spm.model", directory, max_length=512)
    (directory / "tokenizer.model").unlink()
    found, done = fields(directory)
    assert not done.notes
    assert (found["model"], found["add_space_prefix"], found["add_bos_token"]) == ("llama", True, True)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    whole = [token for token in range(400) if len(processor.id_to_piece(token)) > 1 and processor.get_score(token) < 0]
    joined = [token for token in whole if found["scores"][token] > -1000]
    order = sorted(joined, key=lambda token: -processor.get_score(token))
    assert sorted(joined, key=lambda token: -found["scores"][token]) == order
    assert len(joined) > 50
    assert [found["token_type"][processor.piece_to_id(f"<0x{byte:02X}>")] for byte in (0, 65, 255)] == [6, 6, 6]


def test_merges_that_no_scores_give_are_refused(tmp_path: Path) -> None:
    directory = other_models.write_model(tmp_path / "model", "phi3")
    with pytest.raises(InputError, match="merges have an order that no scores have"):
        export_gguf(directory, tmp_path / "a.gguf")


def test_several_end_tokens_and_those_that_have_no_name(tmp_path: Path) -> None:
    directory = other_models.write_model(tmp_path / "model", "llama")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 3, 4]}))
    found, done = fields(directory)
    ends = [found[f"{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert len(set(ends)) == 3
    assert set(ends) < {1, 2, 3, 4}
    assert any("more than three end tokens" in note for note in done.notes)


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    config = tiny()
    found, done = fields(save_hub(tmp_path / "model", config, weights(config)))
    assert found == {"model": "no_vocab"}
    assert any("no tokenizer" in note for note in done.notes)
