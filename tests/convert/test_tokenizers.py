"""What is written for mlx-lm and transformers, read by them, against SentencePiece."""

from __future__ import annotations

import io
import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import ModelConfig
from elm_mlx.text import sentencepiece_file
from elm_mlx.text.chat_template import OPENELM_INSTRUCT_JINJA, OpenELMInstruct
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx_convert import tokenizers as converter

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
REAL = {"llama2": SHARED / "tokenizer" / "llama2.model", "classics": SHARED / "classics" / "tokenizer.model"}

LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
EXACT: dict[str, dict[str, Any]] = {
    "like llama": LLAMA,
    "without dummy prefix": {**LLAMA, "add_dummy_prefix": False},
    "without BOS": {**LLAMA, "bos_id": -1},
    "with more control pieces": {**LLAMA, "control_symbols": "<|end|>,<|pad|>"},
}
WORDS = "the quick brown fox jumps over lazy dogs while and 漢字 かな naïve café 12 345 </s> 😀 aaaa aa ooo ==== --"


def train(path: Path, **options: Any) -> Path:
    choice = random.Random(0).choice
    words = WORDS.split()
    lines = [" ".join(choice(words) + choice(["", ",", ".", "  "]) for _ in range(12)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=420, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("spm") / "some.model", **LLAMA)


@pytest.fixture(scope="module", params=[*EXACT, *REAL])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the converter has written a tokenizer into."""
    directory = tmp_path_factory.mktemp("written")
    if request.param in EXACT:
        model = train(directory / "source.model", **EXACT[request.param])
    else:
        model = REAL[request.param]
        if not model.exists():
            pytest.skip(f"{model} is not here")
    assert converter.write(model, directory, max_length=2048, chat_template=OPENELM_INSTRUCT_JINJA) is None
    assert (directory / "tokenizer.model").read_bytes() == model.read_bytes()
    return directory


def texts(count: int) -> list[str]:
    """Words, spaces of every kind, runs of one character, emoji, names of pieces, and any Unicode at all."""
    chance = random.Random(7)
    bits = [
        *WORDS.split(),
        *" \n\t\r",
        "  ",
        "<0x41>",
        "\u2581",
        "👩‍👩‍👧",
        "e\u0301",
        "ﷺ",
        "\u00a0",
        "\u3000",
        "\r\n",
        "<",
        "/s",
    ]
    runs = ["a", "aa", "o", "=", "-", " ", "\u2581", "0", "\n", "ab", "a "]

    def any_character() -> str:
        code = chance.choice([chance.randrange(1, 0xD800), chance.randrange(0xE000, 0x110000), chance.randrange(127)])
        return chr(code)

    def text() -> str:
        size, kind = chance.randrange(25), chance.random()
        if kind < 0.2:
            return chance.choice(runs) * chance.randrange(60)
        if kind < 0.4:
            return "".join(any_character() for _ in range(size))
        if kind < 0.7:
            return "".join(chance.choice(bits) for _ in range(size))
        space = chance.choice([" ", "  ", "\n"])
        return (
            chance.choice(["", " "]) + space.join(chance.choice(bits) for _ in range(size)) + chance.choice(["", " "])
        )

    return [text() for _ in range(count)]


def without_names(text: str, tokenizer: Tokenizer) -> str:
    """Without the names of control pieces, which tokenizer.json finds in any text."""
    for name in (*tokenizer.control_ids, "<unk>"):
        text = text.replace(name, "")
    return text


def test_tokenizer_json_gives_the_ids_and_texts_of_sentencepiece(written):
    tokenizers = pytest.importorskip("tokenizers")
    ours, theirs = Tokenizer.load(written), tokenizers.Tokenizer.from_file(str(written / "tokenizer.json"))
    assert theirs.get_vocab_size() == ours.vocab_size == sentencepiece_file.read(written / "tokenizer.model").vocab_size
    for raw in texts(2500):
        text = without_names(raw, ours)
        ids = ours.encode(text)
        assert theirs.encode(text).ids == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text


def test_names_of_control_pieces_are_the_one_difference(written):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(written / "tokenizer.json"))
    assert Tokenizer.load(written).eos_id in theirs.encode("a</s>b").ids
    assert Tokenizer.load(written).eos_id not in Tokenizer.load(written).encode("a</s>b")


@pytest.fixture(scope="module")
def loaded(written: Path) -> Any:
    """As mlx-lm opens the directory, with no network."""
    utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    config = ModelConfig.preset("OpenELM-270M", sentencepiece_file.read(written / "tokenizer.model").vocab_size)
    (written / "config.json").write_text(json.dumps(config.to_dict()))

    def refuse(*_: object) -> None:
        raise AssertionError("opening a local tokenizer went to the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        return utils.load(written, eos_token_ids=list(config.eos_token_ids))


def test_mlx_lm_gives_the_same_ids_texts_and_streams(written, loaded):
    ours = Tokenizer.load(written)
    for raw in texts(300):
        text = without_names(raw, ours)
        ids = ours.encode(text)
        assert loaded.encode(text) == ids
        assert loaded.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        if text.startswith((" ", "\u2581")):  # of which mlx-lm's streams drop more than one
            continue
        stream = loaded.detokenizer
        for token in ours.encode(text, add_bos=False):
            stream.add_token(token)
        stream.finalize()
        assert stream.text == ours.decode(ids)


def test_mlx_lm_knows_the_special_tokens_and_streams_in_linear_time(written, loaded):
    ours = Tokenizer.load(written)
    assert loaded.eos_token_ids == {ours.eos_id}
    assert loaded.bos_token_id == ours.bos_id
    assert loaded.model_max_length == 2048
    assert len(loaded.get_vocab()) == ours.vocab_size
    assert type(loaded.detokenizer).__name__ == "SPMStreamingDetokenizer"


def test_chat_template_gives_mlx_lm_the_ids_of_ours(written, loaded):
    ours = Tokenizer.load(written)
    if ours.bos_id is None:
        pytest.skip("the template needs BOS")
    messages = [{"role": "user", "content": " What's\n the fox?"}]
    template = OpenELMInstruct(ours)
    assert loaded.apply_chat_template(messages, add_generation_prompt=True) == template.encode(messages)
    messages += [{"role": "assistant", "content": "quick 😀"}, {"role": "user", "content": ""}]
    messages.insert(0, {"role": "system", "content": "the dogs"})
    assert loaded.apply_chat_template(messages, add_generation_prompt=True) == template.encode(messages)
    expected = template.encode(messages[:3], add_generation_prompt=False)
    assert loaded.apply_chat_template(messages[:3], add_generation_prompt=False) == expected


def test_equal_input_gives_equal_bytes_and_no_litter(llama_like, tmp_path):
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        converter.write(llama_like, tmp_path / name, max_length=512)
        converter.write(llama_like, tmp_path / name, max_length=2048)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert "chat_template" not in json.loads(contents[0]["tokenizer_config.json"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({**LLAMA, "normalization_rule_name": "nmt_nfkc"}, "normalize combined characters"),
        ({**LLAMA, "byte_fallback": False}, "leave unknown characters out"),
        ({**LLAMA, "remove_extra_whitespaces": True}, "at the start of a text"),
        ({**LLAMA, "model_type": "unigram"}, "'<0x41>' in a text is that byte"),
        ({**LLAMA, "user_defined_symbols": "<|user|>,ick,<|user|>+"}, "between user-defined symbols"),
    ],
)
def test_model_that_is_not_matched_to_the_last_character_says_so(options, reason, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    note = converter.write(train(tmp_path / "source.model", **options), tmp_path, max_length=2048)
    assert note is not None
    assert reason in note
    ours, theirs = Tokenizer.load(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("the quick<|user|>+ brown  fox", " <|user|>the lazy,  dogs", "quick over\tthe", "", " ", "é漢字"):
        assert theirs.encode(text).ids == ours.encode(text)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "word"}, "whole words"),
        ({"model_type": "char"}, "single characters"),
        ({**LLAMA, "treat_whitespace_as_suffix": True}, "end with their space"),
    ],
)
def test_model_that_tokenizer_json_cannot_express_keeps_its_own_file(options, reason, tmp_path):
    note = converter.write(train(tmp_path / "source.model", **options), tmp_path, max_length=2048)
    assert note is not None
    assert "cannot read" in note
    assert reason in note
    assert not (tmp_path / "tokenizer.json").exists()
    assert Tokenizer.load(tmp_path).encode("the fox")


def test_damaged_model_writes_nothing(llama_like, tmp_path):
    broken = tmp_path / "broken.model"
    broken.write_bytes(llama_like.read_bytes()[:-20])
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="not a whole SentencePiece model"):
        converter.write(broken, tmp_path / "out", max_length=2048)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(InputError, match="not a whole"):
        sentencepiece_file.read(broken)


class TestFind:
    def test_file_and_directory(self, llama_like, tmp_path):
        assert converter.find(llama_like) == llama_like
        assert converter.find(str(llama_like.parent)) == llama_like  # the only *.model there
        (tmp_path / "other.model").touch()
        (tmp_path / "tokenizer.model").touch()
        assert converter.find(tmp_path) == tmp_path / "tokenizer.model"

    def test_directory_without_one(self, tmp_path):
        with pytest.raises(InputError, match=r"no tokenizer\.model: no SentencePiece model; name the file"):
            converter.find(tmp_path)
        (tmp_path / "tokenizer.json").touch()
        with pytest.raises(InputError, match=r"tokenizer\.json is made from one"):
            converter.find(tmp_path)
        (tmp_path / "a.model").touch()
        (tmp_path / "b.model").touch()
        with pytest.raises(InputError, match="2 files"):
            converter.find(tmp_path)

    def test_missing_file_is_told_when_it_is_read(self, tmp_path):
        with pytest.raises(InputError, match="No such file"):
            sentencepiece_file.read(converter.find(tmp_path / "none" / "x.model"))

    def test_repository(self, llama_like, hub):
        hub.repositories["owner/name"] = {"model.safetensors": b"-"}
        with pytest.raises(InputError, match=r"^owner/name: no tokenizer\.model"):
            converter.find("owner/name")
        hub.repositories["owner/name"]["tokenizer.model"] = llama_like.read_bytes()
        assert converter.find("owner/name").read_bytes() == llama_like.read_bytes()
        assert hub.fetched() == ["tokenizer.model"]

    def test_repository_from_the_cache_without_network(self, llama_like, tmp_path, monkeypatch):
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ElmError, match="owner/name"):
            converter.find("owner/name")
        commit = "0123456789" * 4
        folder = tmp_path / "models--owner--name"
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        (folder / "snapshots" / commit / "tokenizer.model").write_bytes(llama_like.read_bytes())
        assert converter.find("owner/name").read_bytes() == llama_like.read_bytes()
