"""A split's examples: what is too long is split, cut or left out, counted and named; what isn't whole stops it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece_models import EXACT, train

from elm_mlx.data.encoding import Encoder, Example
from elm_mlx.data.examples import BadRecords, Prepared, load, prepare
from elm_mlx.data.records import Completion, Split, Text
from elm_mlx.errors import InputError
from elm_mlx.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(train(tmp_path_factory.mktemp("examples") / "tokenizer.model", **EXACT))


class TestLength:
    def test_a_long_text_is_split_and_each_token_learnt_once(self, tokenizer: Tokenizer) -> None:
        text = "the quick brown fox jumps over lazy dogs " * 20
        whole = Encoder(tokenizer, None).encode(Text("", text))
        for size in (2, 3, 16, len(whole.ids) - 1):
            prepared = prepare(Split([Text("f", text)]), tokenizer, None, size)
            assert all(2 <= len(example.ids) <= size for example in prepared.examples)
            learnt = [token for example in prepared.examples for token in example.ids[1:]]
            assert learnt == list(whole.ids[1:])
            assert all(example.trained == (False, *[True] * (len(example.ids) - 1)) for example in prepared.examples)
            assert (prepared.split, prepared.windows, prepared.left_out) == (1, len(prepared.examples), 0)
            assert prepared.lengths == [len(whole.ids)] and prepared.longest == (len(whole.ids), "f")

    def test_what_just_fits_is_whole(self, tokenizer: Tokenizer) -> None:
        whole = Encoder(tokenizer, None).encode(Text("", "the quick brown fox"))
        prepared = prepare(Split([Text("f", "the quick brown fox")]), tokenizer, None, len(whole.ids))
        assert prepared.examples == [whole] and prepared.warnings() == []

    def lengthy(self, tokenizer: Tokenizer, truncate: bool) -> Prepared:
        records = [
            Completion("f, line 1", "the", " fox"),
            Completion("f, line 2", "the", " quick brown" * 30),
            Completion("f, line 3", "the quick brown" * 30, " fox"),
        ]
        return prepare(Split(list(records)), tokenizer, None, 32, truncate=truncate)

    def test_long_answers_are_left_out_counted_and_the_longest_named(self, tokenizer: Tokenizer) -> None:
        prepared = self.lengthy(tokenizer, False)
        assert prepared.sources == ["f, line 1"] and prepared.left_out == 2
        assert prepared.warnings() == [
            f"2 of 3 records longer than 32 tokens: left out; the longest, f, line 3, has {prepared.longest[0]}; "
            "--truncate cuts them, a larger --max-seq-length keeps them"
        ]

    def test_truncate_keeps_what_there_is_of_an_answer(self, tokenizer: Tokenizer) -> None:
        prepared = self.lengthy(tokenizer, True)
        assert prepared.sources == ["f, line 1", "f, line 2"]
        assert (prepared.cut, prepared.left_out) == (1, 1)
        whole = Encoder(tokenizer, None).encode(Completion("", "the", " quick brown" * 30))
        assert prepared.examples[1] == Example(whole.ids[:32], whole.trained[:32])
        assert [line.partition(";")[0] for line in prepared.warnings()] == [
            "1 of 3 records longer than 32 tokens: their end is cut off",
            "1 of 3 records longer than 32 tokens: left out, as cut they would teach nothing",
        ]

    @pytest.mark.parametrize(
        ("truncate", "context", "remedy"),
        [
            (False, None, "; --truncate cuts them, a larger --max-seq-length keeps them"),
            (False, 512, "; --truncate cuts them, a larger --max-seq-length keeps them"),
            (False, 64, "; --truncate cuts them, a larger --max-seq-length keeps more"),
            (False, 32, "; --truncate cuts them"),
            (True, 512, "; a larger --max-seq-length keeps them"),
            (True, 32, ""),
        ],
    )
    def test_what_is_advised_would_help(
        self, tokenizer: Tokenizer, truncate: bool, context: int | None, remedy: str
    ) -> None:
        record = Completion("f, line 1", "the quick brown" * 30, " fox")
        (line,) = prepare(Split([record]), tokenizer, None, 32, truncate=truncate, context=context).warnings()
        assert (
            line.partition(f"the longest, f, line 1, has {len(Encoder(tokenizer, None).encode(record).ids)}")[2]
            == remedy
        )

    def test_no_example_is_longer_than_what_the_model_reads(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "the fox"}\n')
        assert load(path, tokenizer, None, 64, context=64)["train"].context == 64
        with pytest.raises(InputError, match="--max-seq-length 65: the model reads 64 tokens at most"):
            load(path, tokenizer, None, 65, context=64)

    def test_truncate_cuts_texts_too(self, tokenizer: Tokenizer) -> None:
        prepared = prepare(Split([Text("f", "the fox " * 40)]), tokenizer, None, 16, truncate=True)
        assert [len(example.ids) for example in prepared.examples] == [16] and prepared.split == 0

    def test_sums(self, tokenizer: Tokenizer) -> None:
        prepared = self.lengthy(tokenizer, True)
        assert prepared.tokens == sum(len(example.ids) for example in prepared.examples)
        assert prepared.trained_tokens == sum(map(sum, (example.trained for example in prepared.examples)))
        assert prepared.counts == {"Completion": 3}


class TestLoad:
    def write(self, path: Path, *values: Any) -> Path:
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return path

    def test_splits(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        self.write(tmp_path / "train.jsonl", {"text": "the fox"}, {"text": "a dog"})
        self.write(tmp_path / "valid.jsonl", {"text": "the king"})
        splits = load(tmp_path, tokenizer, None, 99)
        assert {name: len(split.examples) for name, split in splits.items()} == {"train": 2, "valid": 1}

    def test_bad_records_stop_it_or_are_left_out(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.jsonl", {"text": ""}, {"text": "the fox"}, {"text": "\ud800"})
        with pytest.raises(BadRecords) as caught:
            load(path, tokenizer, None, 99)
        assert [reason.partition(": ")[0] for reason in caught.value.reasons] == [f"{path}, line 1", f"{path}, line 3"]
        assert str(caught.value) == (
            f"{path}, line 1: `text` is empty (1 more is bad; `elm-mlx data` names them all); "
            "mend the data, or --skip-bad leaves such records out"
        )
        split = load(path, tokenizer, None, 99, skip_bad=True)["train"]
        assert len(split.examples) == 1 and split.bad == list(caught.value.reasons)

    def test_nothing_left(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        bad = self.write(tmp_path / "bad.jsonl", {"text": ""})
        with pytest.raises(InputError, match=r"no example is left to train on: .*line 1: `text` is empty"):
            load(bad, tokenizer, None, 99, skip_bad=True)
        long = self.write(tmp_path / "long.jsonl", {"prompt": "the fox" * 9, "completion": "x"})
        with pytest.raises(InputError, match=r"no example is left to train on: 1 of 1 record longer than 9 tokens"):
            load(long, tokenizer, None, 9)
        with pytest.raises(InputError, match="--max-seq-length 1: an example has two tokens or more"):
            load(bad, tokenizer, None, 1)
