"""Text to ids: BOS, spaces at the border, long contexts; and texts in windows."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from elm_mlx.data.columns import parsed
from elm_mlx.data.examples import load
from elm_mlx.errors import InputError
from elm_mlx.evaluate import tokens
from elm_mlx.evaluate.tokens import Scored
from elm_mlx.text.chat_template import OpenELMInstruct
from elm_mlx.text.tokenizer import Tokenizer


def test_bos_stands_in_front_and_the_continuation_is_scored(tiny_tokenizer: Tokenizer) -> None:
    (found,) = tokens.encode([("the quick", " brown fox")], tiny_tokenizer, 512)
    assert found.ids == tiny_tokenizer.encode("the quick brown fox")
    assert found.ids[0] == tiny_tokenizer.bos_id
    assert found.ids[: found.start] == tiny_tokenizer.encode("the quick")


def test_spaces_at_the_contexts_end_belong_to_what_is_scored(tiny_tokenizer: Tokenizer) -> None:
    (found,) = tokens.encode([("the quick\n\n ", "fox")], tiny_tokenizer, 512)
    assert found.ids == tiny_tokenizer.encode("the quick\n\n fox")
    assert found.start == len(tiny_tokenizer.encode("the quick"))


def test_what_spans_the_border_is_scored_after_the_contexts_own_tokens(tiny_tokenizer: Tokenizer) -> None:
    context, after = "the qu", "ick"
    (found,) = tokens.encode([(context, after)], tiny_tokenizer, 512)
    alone, whole = tiny_tokenizer.encode(context), tiny_tokenizer.encode(context + after)
    if len(whole) > len(alone):
        assert found.ids == alone + whole[len(alone) :]
    assert found.ids[: found.start] == alone


def test_without_a_context_bos_is_read(tiny_tokenizer: Tokenizer) -> None:
    (found,) = tokens.encode([("", "old king")], tiny_tokenizer, 512)
    assert found == Scored([tiny_tokenizer.bos_id or 0, *tiny_tokenizer.encode("old king", add_bos=False)], 1)


def test_long_contexts_lose_their_beginning(tiny_tokenizer: Tokenizer) -> None:
    text = "the quick brown fox " * 40
    whole = tiny_tokenizer.encode(text + "jumps")
    (found,) = tokens.encode([(text, "jumps")], tiny_tokenizer, 64)
    assert len(found.ids) == 65  # the last is scored and never read
    assert found.ids == whole[-65:]
    scored = len(whole) - len(tiny_tokenizer.encode(text.rstrip()))
    assert found.start == 65 - scored


def test_what_cannot_be_scored_is_refused(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"an answer of .* tokens exceeds the model's context of 8"):
        tokens.encode([("the", " quick brown fox" * 20)], tiny_tokenizer, 8)
    with pytest.raises(InputError, match="nothing to score"):
        tokens.encode([("the quick", "")], tiny_tokenizer, 512)


def test_digests_tell_ids_and_borders_apart() -> None:
    one = [Scored([1, 2, 3], 1), Scored([1, 2], 1)]
    others = [[Scored([1, 2, 3], 2), Scored([1, 2], 1)], [Scored([1, 2, 3, 1, 2], 1)], [Scored([1, 2, 4], 1)], []]
    assert tokens.digest(one) == tokens.digest(list(one))
    assert len({tokens.digest(each) for each in [one, *others]}) == 5


@pytest.mark.parametrize(
    ("count", "window", "stride"), [(50, 16, 8), (50, 16, 16), (50, 16, 1), (5, 16, 8), (17, 16, 8)]
)
def test_windows_score_each_token_once_with_as_much_before_it_as_fits(count: int, window: int, stride: int) -> None:
    ids = list(range(count))
    found = list(tokens.slide(ids, window, stride))
    assert [token for each in found for token in each.ids[each.start :]] == ids[1:]
    for number, each in enumerate(found):
        assert len(each.ids) <= window + 1
        assert each.ids == list(range(each.ids[0], each.ids[-1] + 1))
        if number:
            assert len(each.ids) - each.start <= stride
            assert each.start >= min(window - stride + 1, each.ids[each.start])


def test_harness_windows_are_those_without_a_stride() -> None:
    found = list(tokens.slide([100, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 4, 4))
    assert [(each.ids[:-1], each.ids[each.start :]) for each in found] == [
        ([100, 0, 1, 2], [0, 1, 2, 3]), ([3, 4, 5, 6], [4, 5, 6, 7]), ([5, 6, 7, 8], [8, 9]),
    ]  # fmt: skip


def test_texts_are_read_from_files_of_every_kind(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl.gz"
    plain.write_text("the quick brown fox\n" * 3)
    lines.write_bytes(gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in ("caf\u00e9", "fox"))))
    assert tokens.read_text(plain, tiny_tokenizer, 64, 32).bytes == [60]
    found = tokens.read_text(lines, tiny_tokenizer, 64, 32)
    assert found.bytes == [5, 3]
    assert found.documents == [0, 1]


@pytest.mark.parametrize(("bos", "puts", "first"), [(None, [], 9), (7, [7], 7), (7, [], 7)])
def test_a_texts_first_token_is_predicted_too(bos: int | None, puts: list[int], first: int) -> None:
    """From EOS by tokenizers that have no BOS: the harness' prefix token."""
    tokenizer = SimpleNamespace(bos_id=bos, eos_id=9, encode=lambda text: [*puts, *map(ord, text)])
    assert tokens.encode_text("ab", tokenizer) == [first, 97, 98]  # type: ignore[arg-type]
    nobody = SimpleNamespace(bos_id=None, eos_id=None, encode=lambda text: [97])
    assert tokens.encode_text("a", nobody) == [97]  # type: ignore[arg-type]


def test_what_is_scored_of_a_record_is_what_training_learns_of_it(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The answers and their ends, after the same ids, in windows where they are long; the bytes are the answers'."""
    path = tmp_path / "a.jsonl"
    asked = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "café", "weight": 0}]
    said = [{"role": "user", "content": "and"}, {"role": "assistant", "content": "lazy dogs " * 30}]
    values = [
        {"messages": [*asked, *said, *said]}, {"prompt": "told", "completion": "stories"},
        {"instruction": "jump", "output": "over"}, {"text": "quick"},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    template = OpenELMInstruct(tiny_tokenizer)
    found = tokens.read_text(path, tiny_tokenizer, 64, 32, lambda: template)
    assert found.bytes == [600, 7, 4, 5]
    examples = load(path, tiny_tokenizer, template, 512)["train"].examples
    for number, example in enumerate(examples[:3]):
        windows = [each for each, document in zip(found.windows, found.documents, strict=True) if document == number]
        assert max(len(each.ids) for each in windows) <= 65
        scored = [token for each in windows for token in each.ids[each.start :]]
        assert scored == [token for token, trained in zip(example.ids, example.trained, strict=True) if trained]
    other = tokens.read_text(path, tiny_tokenizer, 512, 512, lambda: None, parsed(["text=completion"]), skip_bad=True)
    assert other.bytes == [7] and len(other.bad) == 3


def test_bits_per_byte_and_their_error_over_documents() -> None:
    text = tokens.TextWindows([Scored([1, 2], 1)] * 3, [0, 0, 1], [4, 4], "")
    logs = [-math.log(2) * 4, -math.log(2) * 4, -math.log(2) * 4]
    found = text.bits_per_byte(logs)
    assert found.value == pytest.approx(12 / 8)
    assert found.stderr == pytest.approx(math.sqrt(2 * (2**2 + 2**2)) / 8)
    assert text.perplexity(logs).value == pytest.approx(16)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "`text` is empty"),
        ("a.jsonl", b"", "holds no records"),
        ("a.txt", b"\xff", "line 1, byte 1: not UTF-8"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n',
            "line 1: is a conversation, and the model has no chat template",
        ),
        ("a.jsonl", b'{"prompt": "?", "chosen": "!", "rejected": "."}\n', "`elm-mlx dpo` trains on those"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: `text` is a number, not a string"),
        ("a.jsonl", b"{\n", "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: .*Unicode"),
        ("a.pdf", b"x", "not a kind of data file"),
    ],
)
def test_bad_texts_are_named(tiny_tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        tokens.read_text(path, tiny_tokenizer, 64, 32)


def test_a_stride_must_fit_the_window(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fox")
    with pytest.raises(InputError, match="--stride 65"):
        tokens.read_text(tmp_path / "a.txt", tiny_tokenizer, 64, 65)
