"""`tokenizer.json`: the tokenizers library's ids and texts, transformers' templates, text that streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import other_models
import pytest

from elm_mlx.errors import InputError
from elm_mlx.text.chat_template import choose
from elm_mlx.text.tokenizer import Tokenizer

STYLES = tuple(other_models.TEMPLATES)
TEXTS = [
    "", "a", " ", "The crow was half dead with thirst.", "  two spaces\n\n\tand a tab ", "1234567 apples, don't!",
    "Grüße aus 日本 🦜👩‍👩‍👧", "\n", "�", "x" * 300,
]  # fmt: skip
QUESTION = {"role": "user", "content": "Where is  the pebble? "}
ANSWER = {"role": "assistant", "content": "In the pitcher 🦜."}
CONVERSATIONS = [
    [QUESTION],
    [{"role": "system", "content": "Be brief."}, QUESTION],
    [QUESTION, ANSWER, {"role": "user", "content": "And\nnow?"}],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bpe")
    for style in STYLES:
        (root / style).mkdir()
        other_models.write_tokenizer(root / style, style)
        (root / style / "config.json").write_text('{"model_type": "llama"}')
    return {style: root / style for style in STYLES}


def _library(folder: Path) -> Any:
    from tokenizers import Tokenizer as Encoder

    return Encoder.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_texts_are_the_librarys(style: str, folders: dict[str, Path]) -> None:
    ours, theirs = Tokenizer.load(folders[style]), _library(folders[style])
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_bos=False) == ids
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids) == text


@pytest.mark.parametrize("style", STYLES)
def test_text_streams(style: str, folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders[style])
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for split in range(len(ids) + 1):
            decoder = tokenizer.detokenizer(ids[:split])
            pieces = [decoder.add(token) for token in ids[split:]]
            pieces.append(decoder.finish())
            assert text.endswith("".join(pieces)) and ("�" in text or "�" not in "".join(pieces))
        decoder, shown = tokenizer.detokenizer(), ""
        for token in ids:
            shown += decoder.add(token)
            assert text.startswith(shown)
        assert shown + decoder.finish() == text


def test_an_unfinished_character_is_shown_at_the_end(folders: dict[str, Path]) -> None:
    tokenizer, theirs = Tokenizer.load(folders["llama3"]), _library(folders["llama3"])
    ids = tokenizer.encode("🐍", add_bos=False)
    assert len(ids) > 1
    decoder = tokenizer.detokenizer()
    assert [decoder.add(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert decoder.finish() == tokenizer.decode(ids[:-1]) == theirs.decode(ids[:-1]) == "�"
    broken = [*ids[:-1], *tokenizer.encode("a", add_bos=False)]
    assert tokenizer.decode(broken) == theirs.decode(broken) == "�a"


@pytest.mark.parametrize("style", STYLES)
def test_text_never_becomes_a_control_token(style: str, folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders[style])
    controls = tokenizer.control_ids
    assert set(other_models.CONTROLS[style]) == set(controls)
    for name, token in controls.items():
        ids = tokenizer.encode(f"say {name} now", add_bos=False)
        assert token not in ids and tokenizer.decode(ids) == f"say {name} now"
        assert tokenizer.decode([token]) == ""


def test_bos_is_what_the_tokenizer_puts_in_front(folders: dict[str, Path], tmp_path: Path) -> None:
    found = {style: Tokenizer.load(folder).bos_id for style, folder in folders.items()}
    assert found == {"chatml": None, "llama3": 0, "phi3": None}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["phi3"] / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    assert Tokenizer.load(tmp_path / "tokenizer.json").bos_id == 1
    assert Tokenizer.load(folders["llama3"]).eos_id == 4


@pytest.mark.parametrize("style", STYLES)
def test_templates_are_those_of_transformers(style: str, folders: dict[str, Path]) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folders[style])
    tokenizer = Tokenizer.load(folders[style])
    template = choose(folders[style], tokenizer)
    assert template is not None
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True)
            expected = expected["input_ids"] if hasattr(expected, "keys") else expected
            assert template.encode(messages, prompt) == list(expected)
    assert [tokenizer.pieces[token] for token in template.stop_ids] == [other_models.EOS[style]]
    assert template.stop_strings == ()


@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_goes_on_from_the_ids_that_were_said(style: str, folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders[style])
    template = choose(folders[style], tokenizer)
    assert template is not None
    said = [*template.encode([QUESTION]), *tokenizer.encode("In the pit", add_bos=False)]
    said += [*tokenizer.encode("cher 🦜.", add_bos=False), template.stop_ids[0]]
    messages = [QUESTION, ANSWER, {"role": "user", "content": "And now?"}]
    longer = template.extend(said, messages)
    assert longer[: len(said)] == said
    if style != "phi3":  # whose encoder puts a space before "cher"
        assert tokenizer.decode(longer) == tokenizer.decode(template.encode(messages))


@pytest.mark.parametrize("style", STYLES)
def test_a_message_with_the_name_of_a_control_token(style: str, folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders[style])
    template = choose(folders[style], tokenizer)
    assert template is not None
    plain = template.encode([{"role": "user", "content": "x"}])
    name = other_models.EOS[style]
    odd = template.encode([{"role": "user", "content": f"x{name}y"}])
    end = template.stop_ids[0]
    assert odd.count(end) == plain.count(end)
    assert name in tokenizer.decode(odd)


def test_files_that_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    values = json.loads((folders["llama3"] / "tokenizer.json").read_text())

    def refused(text: str, match: str) -> None:
        path.write_text(text)
        with pytest.raises(InputError, match=match) as error:
            Tokenizer.load(path)
        assert "\n" not in str(error.value)

    refused("{", "no tokenizer that can be read")
    refused("{}", "no tokenizer that can be read")
    refused(json.dumps({**values, "decoder": None}), "decodes by none")
    wordpiece = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    refused(json.dumps({**values, "decoder": wordpiece}), "decodes by WordPiece")
    with pytest.raises(InputError, match="No such file"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
        Tokenizer.load(tmp_path / "empty")
    tokenizer = Tokenizer.load(folders["llama3"])
    with pytest.raises(InputError, match="outside the vocabulary"):
        tokenizer.decode([-1])
    with pytest.raises(InputError, match=r"character 2 is U\+D800"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InputError, match=r"character 2 is U\+D800"):
        tokenizer.encode_parts(["a\ud800"])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("token", ["first", 10**6, 10**30])
def test_an_id_past_the_last_piece_has_no_text(folders: dict[str, Path], style: str, token: Any) -> None:
    tokenizer = Tokenizer.load(folders[style])
    token = tokenizer.vocab_size if token == "first" else token
    ids = tokenizer.encode("Grüße aus 日本 🦜")
    mixed = [token, *(each for one in ids for each in (one, token))]
    assert tokenizer.decode(mixed) == tokenizer.decode(ids) == "Grüße aus 日本 🦜"
    assert tokenizer.piece_of(token) == ""


def _changed(folder: Path, to: Path, **changes: Any) -> Path:
    """A tokenizer.json with other values at the top, or `model.X`'s."""
    values = json.loads((folder / "tokenizer.json").read_text())
    for name, value in changes.items():
        *inside, last = name.split("__")
        at = values
        for key in inside:
            at = at[key]
        at[last] = value
    (to / "tokenizer.json").write_text(json.dumps(values))
    return to / "tokenizer.json"


PANICS: dict[str, dict[str, Any]] = {
    # The library panics at all but the last while it encodes; of the last it raises an Exception.
    "a post-processor with a token that is not there": {
        "post_processor": {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}], "pair": [],
            "special_tokens": {},
        },
    },
    "a prefix of pieces that is longer than they are": {"model__continuing_subword_prefix": "##########"},
    "words of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "an unk_token without a piece": {"model__unk_token": "<gone>", "model__vocab": {"b": 0}, "model__merges": []},
}  # fmt: skip


@pytest.mark.parametrize("what", PANICS)
def test_what_the_library_throws_is_one_error(
    folders: dict[str, Path], tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = _changed(folders["llama3"], tmp_path, **PANICS[what])
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    with pytest.raises(InputError, match=r"tokenizer\.json: ") as error:
        Tokenizer.load(path).encode("the crow")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_ctrl_c_is_none_of_the_librarys_errors(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(folders["llama3"])

    class Interrupted:
        def encode(self, *_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer._encoding, "_encoder", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("the crow")


def test_a_byte_piece_that_is_none_is_a_piece(folders: dict[str, Path], tmp_path: Path) -> None:
    text = (folders["phi3"] / "tokenizer.json").read_text().replace('"<0x41>"', '"<0xZZ>"')
    (tmp_path / "tokenizer.json").write_text(text)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.decode([tokenizer.pieces.index("<0xZZ>")]) == "<0xZZ>"


@pytest.mark.parametrize("key", ["bos_token", "eos_token", "unk_token", "add_bos_token"])
@pytest.mark.parametrize("value", [5, [1], 0.5, {"content": 3}, [], {"content": []}, "\ud800"])
def test_settings_of_the_wrong_type_are_named(folders: dict[str, Path], tmp_path: Path, key: str, value: Any) -> None:
    path = _changed(folders["llama3"], tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value}))
    if value == "\ud800" and key != "add_bos_token":  # a text, and no token's
        assert getattr(Tokenizer.load(path), key.replace("token", "id")) in (None, 0)
        return
    with pytest.raises(InputError, match=f"{key} is ") as error:
        Tokenizer.load(path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_special_tokens_map_speaks_where_the_config_does_not(folders: dict[str, Path], tmp_path: Path) -> None:
    path = _changed(folders["llama3"], tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end_of_text|>"}}))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.eos_ids == (tokenizer.control_ids["<|end_of_text|>"],)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot_id|>"}))
    assert Tokenizer.load(path).eos_ids == (tokenizer.control_ids["<|eot_id|>"],)


def test_marks_as_wide_as_han_are_controls(folders: dict[str, Path], tmp_path: Path) -> None:
    """DeepSeek's, which its file does not call special: in a user's text they are text."""
    values = json.loads((folders["llama3"] / "tokenizer.json").read_text())
    mark = "<\uff5cUser\uff5c>"
    number = Tokenizer.load(folders["llama3"]).vocab_size
    values["added_tokens"].append({**values["added_tokens"][0], "id": number, "content": mark, "special": False})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.control_ids[mark] == number
    assert number not in tokenizer.encode_parts([f"hi{mark}there"]) and number in tokenizer.encode_parts(["hi", number])


def test_a_space_that_only_the_first_text_gets(folders: dict[str, Path], tmp_path: Path) -> None:
    """Newer files of SentencePiece models: `prepend_scheme` first."""
    values = json.loads((folders["phi3"] / "tokenizer.json").read_text())
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**values, "normalizer": None, "pre_tokenizer": metaspace}))
    tokenizer, theirs = Tokenizer.load(path), _library(tmp_path)
    end = tokenizer.control_ids["<|endoftext|>"]
    expected = theirs.encode("the crow<|endoftext|>the pebble", add_special_tokens=False).ids
    assert tokenizer.encode_parts(["the crow", end, "the pebble"]) == expected


@pytest.mark.parametrize("prefix", ["##", "\x00", "é"])
@pytest.mark.parametrize("key", ["continuing_subword_prefix", "continuing_\\u0073ubword\\u005Fprefix"])
def test_marked_pieces_are_refused_before_the_library_sees_them(tmp_path: Path, prefix: str, key: str) -> None:
    other_models.write_tokenizer(tmp_path, "phi3")
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["continuing_subword_prefix"] = prefix
    (tmp_path / "tokenizer.json").write_text(json.dumps(values).replace("continuing_subword_prefix", key))
    with pytest.raises(InputError, match="marks pieces that continue a word"):
        Tokenizer.load(tmp_path / "tokenizer.json")
