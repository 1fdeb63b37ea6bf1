"""Ids, texts and streams against SentencePiece itself, over models of every kind that it trains."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_models import BYTES, EXACT, SHARED, train

from elm_mlx.errors import InputError
from elm_mlx.text import sentencepiece_file
from elm_mlx.text.tokenizer import Tokenizer

REAL = {"llama2": SHARED / "tokenizer" / "llama2.model", "classics": SHARED / "classics" / "tokenizer.model"}

KINDS: dict[str, dict[str, object]] = {
    "like llama": EXACT,
    "normalizing": BYTES,
    "without dummy prefix": {**EXACT, "add_dummy_prefix": False},
    "spaces removed, without dummy prefix": {**BYTES, "add_dummy_prefix": False},
    "without bytes": {"model_type": "bpe", "unk_surface": "(?)"},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "with own symbols": {**EXACT, "user_defined_symbols": "<|user|>,\u2581\u2581", "control_symbols": "<|end|>"},
    "with space as suffix": {**EXACT, "treat_whitespace_as_suffix": True},
    "without BOS": {**EXACT, "bos_id": -1},
}
TEXTS = st.text(st.sampled_from(" \n\ta1é漢😀\u200d\u2581<s/>|user0x4") | st.characters(codec="utf-8"), max_size=40)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: train(folder / f"{kind}.model", **options) for kind, options in KINDS.items()} | REAL


@pytest.fixture(scope="module", params=[*KINDS, *REAL])
def pair(
    request: pytest.FixtureRequest, paths: dict[str, Path]
) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """Ours, and SentencePiece's own."""
    path = paths[request.param]
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return Tokenizer.load(path), sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def tokenizer(paths: dict[str, Path]) -> Tokenizer:
    return Tokenizer.load(paths["like llama"])


def random_ids(seed: int, size: int, tokenizer: Tokenizer) -> list[int]:
    """Rich in bytes, control pieces, and pieces that begin with a space."""
    choose = random.Random(seed)
    spaced = [token for token, piece in enumerate(tokenizer.pieces) if piece.startswith("\u2581")]
    pools = [range(3), range(3, min(259, tokenizer.vocab_size)), spaced, range(tokenizer.vocab_size)]
    return [choose.choice(choose.choice(pools)) for _ in range(size)]


def test_encode_gives_bos_and_then_the_ids_of_sentencepiece(pair):
    ours, theirs = pair
    bos = [] if theirs.bos_id() < 0 else [theirs.bos_id()]

    @settings(max_examples=150)
    @given(TEXTS)
    def check(text: str) -> None:
        ids = ours.encode(text, add_bos=False)
        assert ids == theirs.encode(text)
        assert ours.encode(text) == bos + ids
        assert ours.decode(ids) == theirs.decode(ids)

    check()


def test_stream_is_decode_for_any_ids_after_any_prompt(pair):
    ours, theirs = pair
    for seed in range(400):
        ids = random_ids(seed, seed % 24, ours)
        cut = seed % (len(ids) + 1)
        stream = ours.detokenizer()
        first = "".join(map(stream.add, ids[:cut]))
        rest = "".join(map(stream.add, ids[cut:])) + stream.finish()
        assert first + rest == theirs.decode(ids) == ours.decode(ids)
        after = ours.detokenizer(ids[:cut])
        assert "".join(map(after.add, ids[cut:])) + after.finish() == rest
        if stream_is_whole(ours, ids[:cut]):
            assert rest == ours.decode(ids)[len(ours.decode(ids[:cut])) :]


def stream_is_whole(tokenizer: Tokenizer, ids: list[int]) -> bool:
    return tokenizer.detokenizer(ids).finish() == ""


def test_stream_never_breaks_a_character(pair):
    ours, theirs = pair
    for text in ("👩‍👩‍👧 naïve 漢字", "ﷺ\u200d🏳️‍🌈!", "e\u0301 𝔘𝔫𝔦 \U0010ffff"):
        ids = ours.encode(text)
        stream = ours.detokenizer()
        shown = ""
        for token in ids:
            shown += stream.add(token)
            assert theirs.decode(ids).startswith(shown)
        assert shown == theirs.decode(ids)
        assert stream.finish() == ""


def test_stream_holds_bytes_back_until_they_are_a_character_or_cannot_become_one(tokenizer):
    byte = {b: tokenizer.pieces.index(f"<0x{b:02X}>") for b in range(256)}
    letter = tokenizer.encode("the", add_bos=False)[-1]

    def stream(*values: int) -> list[str]:
        decoder = tokenizer.detokenizer(tokenizer.encode("x"))
        return [*(decoder.add(byte[v]) for v in values), decoder.finish()]

    assert stream(*"€".encode()) == ["", "", "€", ""]
    assert stream(0xE2, 0x82) == ["", "", "\ufffd\ufffd"]  # one for each byte, as SentencePiece does
    assert stream(0xE2, 0x41) == ["", "\ufffdA", ""]
    assert stream(0xFF, 0x80) == ["\ufffd", "\ufffd", ""]
    assert stream(0xF0, 0x9F, 0x98, 0x80) == ["", "", "", "😀", ""]
    decoder = tokenizer.detokenizer([byte[0xE2]])  # a prompt that ends amid a character leaves it to the stream
    assert decoder.add(byte[0x82]) + decoder.add(byte[0xAC]) == "€"
    decoder = tokenizer.detokenizer([byte[0xE2]])
    assert decoder.add(letter).startswith("\ufffd")


def test_space_at_the_start_goes_and_after_a_prompt_stays(tokenizer):
    the = tokenizer.pieces.index("\u2581the")
    assert tokenizer.decode([the]) == "the"
    assert tokenizer.detokenizer([tokenizer.bos_id]).add(the) == "the"
    assert tokenizer.detokenizer(tokenizer.encode("while")).add(the) == " the"
    assert tokenizer.detokenizer([the, tokenizer.eos_id]).add(the) == " the"


def test_stream_reads_each_token_once(tokenizer, monkeypatch):
    class NoDecoding:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was called")

    ids = tokenizer.encode("the quick brown 😀 fox " * 50)
    whole = tokenizer.decode(ids)
    tokenizer.detokenizer(ids)  # looks the pieces up
    monkeypatch.setattr(tokenizer._encoding, "_processor", NoDecoding())
    stream = tokenizer.detokenizer()
    assert "".join(map(stream.add, ids)) + stream.finish() == whole


def test_names_of_control_pieces_in_a_text_are_text(tokenizer):
    ids = tokenizer.encode("</s><s><unk><0x41>", add_bos=False)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id} & set(ids)
    assert tokenizer.decode(ids) == "</s><s><unk><0x41>"
    assert tokenizer.control_ids == {"<s>": 1, "</s>": 2}


def test_eos_ids_are_the_models_own_until_set(paths):
    tokenizer = Tokenizer.load(paths["like llama"])
    assert tokenizer.eos_ids == (tokenizer.eos_id,) == (2,)
    tokenizer.eos_ids = (2, 7)
    assert tokenizer.eos_ids == (2, 7)
    assert Tokenizer.load(paths["without BOS"]).bos_id is None


def test_decode_takes_arrays(tokenizer):
    ids = tokenizer.encode("the quick fox")
    assert tokenizer.decode(np.array(ids)) == "the quick fox"
    assert tokenizer.decode([]) == ""


def test_a_negative_id_is_named(tokenizer):
    with pytest.raises(InputError, match="token -1 is outside the vocabulary"):
        tokenizer.decode([1, -1])
    with pytest.raises(InputError, match="token -1 is outside"):
        tokenizer.detokenizer().add(-1)


@pytest.mark.parametrize("token", ["first", 400_000, 1 << 40])
def test_an_id_past_the_last_piece_has_no_text(tokenizer, token):
    """As an embedding with more rows than the tokenizer has pieces may give; amid a character, too."""
    token = tokenizer.vocab_size if token == "first" else token
    ids = tokenizer.encode("naïve 漢字 😀")
    mixed = [token, *(each for one in ids for each in (one, token))]
    assert tokenizer.decode(mixed) == tokenizer.decode(ids)
    stream = tokenizer.detokenizer(mixed[:2])
    assert "".join([*map(stream.add, mixed[2:]), stream.finish()]).strip() == tokenizer.decode(ids[1:]).strip()
    assert tokenizer.piece_of(token) == ""


def test_a_piece_and_its_id(tokenizer):
    assert [tokenizer.id_of(piece) for piece in tokenizer.pieces[:9]] == list(range(9))
    assert tokenizer.id_of("no such piece") is None
    assert tokenizer.piece_of(2) == "</s>" or tokenizer.eos_id != 2


def test_pieces_that_are_no_utf8_are_named(paths, tmp_path):
    data, path = paths["like llama"].read_bytes(), tmp_path / "tokenizer.model"
    whole = Tokenizer.load(paths["like llama"])
    broken = next(token for token, piece in enumerate(whole.pieces) if piece.startswith("▁") and len(piece) > 3)
    piece = whole.pieces[broken].encode()
    field = b"\x0a" + bytes([len(piece)])
    path.write_bytes(data.replace(field + piece, field + b"\xff" * len(piece)))
    tokenizer = Tokenizer.load(path)
    for use in (lambda: tokenizer.pieces, lambda: tokenizer.detokenizer([broken]), lambda: tokenizer.decode([broken])):
        with pytest.raises(InputError, match=r"piece.* not UTF-8"):
            use()
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox", "the others are what they were"


def test_text_that_is_no_unicode_is_refused_with_its_place(tokenizer):
    with pytest.raises(InputError, match=r"character 3 is U\+DCFF"):
        tokenizer.encode("ab\udcff")


def test_file_description_equals_protobufs_reading(paths):
    model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs protobuf")
    for path in paths.values():
        if not path.exists():
            continue
        proto = model_pb2.ModelProto.FromString(path.read_bytes())
        model = sentencepiece_file.read(path)
        assert [(p.text, p.score, p.type) for p in model.pieces()] == [(p.piece, p.score, p.type) for p in proto.pieces]
        trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
        assert model.vocab_size == len(proto.pieces)
        assert model.model_type == trainer.model_type
        assert model.byte_fallback == trainer.byte_fallback
        assert model.unknown_surface == trainer.unk_surface
        assert model.whitespace_as_suffix == trainer.treat_whitespace_as_suffix
        assert model.add_dummy_prefix == normalizer.add_dummy_prefix
        assert model.remove_extra_whitespaces == normalizer.remove_extra_whitespaces
        assert model.escape_whitespaces == normalizer.escape_whitespaces
        assert model.charsmap == normalizer.precompiled_charsmap


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no tokenizer\.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        Tokenizer.load(tmp_path / "none.model")
    for content, reason in ((b"", "empty"), (b"PK\3\4", "not a SentencePiece model"), (b"\n", "not a whole")):
        path = tmp_path / "x.model"
        path.write_bytes(content)
        with pytest.raises(InputError, match=reason):
            Tokenizer.load(path)


def test_huge_file_is_refused_without_reading_it_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sentencepiece_file, "MAX_BYTES", 1000)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n" + bytes(2000))
    with pytest.raises(InputError, match="larger than"):
        Tokenizer.load(tmp_path)


def test_every_truncation_is_refused(paths, tmp_path):
    data = paths["like llama"].read_bytes()
    path = tmp_path / "cut.model"
    for size in {*range(1, len(data), 97), *range(len(data) - 150, len(data))}:
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="not a whole SentencePiece model"):
            Tokenizer.load(path)


def test_damaged_files_are_refused_or_work(paths, tmp_path):
    data = paths["like llama"].read_bytes()
    chance = random.Random(1)
    path = tmp_path / "damaged.model"
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 2, 8])):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            tokenizer = Tokenizer.load(path)
            sentencepiece_file.read(path).pieces()
            tokenizer.decode(tokenizer.encode("the fox 😀"))
            stream = tokenizer.detokenizer(range(tokenizer.vocab_size))
            stream.finish()
        except InputError:
            refused += 1
    assert refused > 100


def test_denormalizing_model_is_refused(paths, tmp_path):
    path = tmp_path / "denormalizing.model"
    rules = sentencepiece_file.read(paths["normalizing"]).charsmap
    spec = b"\x12" + varint(len(rules)) + rules
    path.write_bytes(paths["like llama"].read_bytes() + b"\x2a" + varint(len(spec)) + spec)
    with pytest.raises(InputError, match="rewrite decoded text"):
        Tokenizer.load(path)


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def test_loading_imports_sentencepiece_alone(paths):
    code = (
        "import sys; from elm_mlx.text.tokenizer import Tokenizer; Tokenizer.load(sys.argv[1]).encode('x');"
        "heavy = {'mlx.core', 'transformers', 'tokenizers', 'jinja2', 'google.protobuf'}; print(heavy & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, str(paths["like llama"])]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"
