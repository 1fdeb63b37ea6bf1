"""Likeness to trusted texts: by its formula in plain Python, and as a filter of the batches."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
from hypothesis import given
from hypothesis import strategies as st
from texts import equal, made, rows_of

from elm_mlx.data import likeness
from elm_mlx.data.filters import Filters
from elm_mlx.data.likeness import Likeness, spread
from elm_mlx.data.text_sources import TextSource
from elm_mlx.errors import InputError

IDS = st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=2, max_size=8)


def arrays(lists: Sequence[Sequence[int]]) -> list[Any]:
    return [np.array(ids, np.int32) for ids in lists]


def bucket(first: int, second: int) -> int:
    return ((first * 0x9E3779B1 + second * 0x85EBCA77) % 2**32) >> 16


def plain(trusted: Sequence[Sequence[int]], corpus: Sequence[Sequence[int]], ids: Sequence[int]) -> float:
    """Nats a pair, by frequencies that are drawn a tenth of the way to their mean."""
    wanted, common = (Counter(bucket(*pair) for text in part for pair in pairwise(text)) for part in (trusted, corpus))
    weights = []
    for pair in pairwise(ids):
        p, q = (counts[bucket(*pair)] / max(1, counts.total()) for counts in (wanted, common))
        mean = 0.1 * (p + q) / 2
        weights.append(round(1024 * math.log((p + mean) / (q + mean))) if mean else 0)
    return sum(weights) / 1024 / max(1, len(weights))


@given(IDS, IDS, st.lists(st.integers(0, 9), max_size=12))
def test_a_score_is_the_formulas(trusted: list[list[int]], corpus: list[list[int]], ids: list[int]) -> None:
    found = Likeness(arrays(trusted), arrays(corpus), 0.5)
    for text in [ids, *corpus]:
        others = corpus.copy()
        if text in corpus:  # it does not count for itself
            others.remove(text)
        assert found.score(np.array(text, np.int32)) == pytest.approx(plain(trusted, others, text), abs=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
def test_as_large_a_share_is_accepted_in_the_sample_and_beyond(share: float) -> None:
    draw = np.random.default_rng(0)
    bent = np.arange(1, 51) / np.arange(1, 51).sum()

    def drawn(count: int, part: float) -> list[Any]:
        """Texts of which so much follows one distribution, and the rest another."""
        mixed = part * bent + (1 - part) * bent[::-1]
        return [draw.choice(50, 200, p=mixed).astype(np.int32) for _ in range(count)]

    corpus = [text for part in np.linspace(0, 1, 800) for text in drawn(1, part)]
    draw.shuffle(corpus)  # type: ignore[arg-type]
    found = Likeness(drawn(100, 1), corpus[:600], share)
    for part in (corpus[:600], corpus[600:]):  # those in the sample, and the others
        assert sum(map(found.accepts, part)) / len(part) == pytest.approx(share, abs=0.06)
    if share < 1:
        assert sum(map(found.accepts, drawn(50, 0))) == 0 < sum(map(found.accepts, drawn(50, 1)))


def test_no_pair_decides_alone() -> None:
    """A pair that only one side has weighs at most log((1 + 0.05) / 0.05)."""
    found = Likeness(arrays([[1, 2]]), arrays([[3, 4], [3, 4, 3, 4]]), 1.0)
    assert [found.score(ids) for ids in arrays([[1, 2], [3, 4], [5, 6], [5], []])] == [
        pytest.approx(math.log(21), abs=1e-3), pytest.approx(-math.log(21), abs=1e-3), 0, 0, 0,
    ]  # fmt: skip


@given(st.lists(st.integers(0, 30), max_size=60))
def test_a_sample_is_spread_evenly(lengths: list[int]) -> None:
    contents: list[bytes | str] = [f"{number}:" + "x" * length for number, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likeness, "SAMPLE_BYTES", 100)
        patch.setattr(likeness, "READ_BYTES", 500)
        kept = spread(contents)
    numbers = [contents.index(content) for content in kept]
    read = next((i + 1 for i in range(len(contents)) if sum(map(len, contents[: i + 1])) > 500), len(contents))
    every = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    assert numbers == list(range(0, read, every)) and (every & (every - 1)) == 0
    assert sum(map(len, kept)) <= 100 or len(kept) <= 2
    assert every == 1 or sum(len(contents[i]) for i in range(0, read, every // 2)) > 100


class TestAsAFilter:
    @pytest.fixture
    def trusted(self, tmp_path: Path) -> Path:
        return texts.write(tmp_path / "trusted.jsonl", texts.texts(40, seed=7, words=(20, 40)))

    @pytest.fixture
    def corpus(self, tmp_path: Path) -> Path:
        """Every third text is as the trusted ones are; the others have their letters in disorder."""
        draw = random.Random(0)
        values = texts.texts(120, seed=8, words=(20, 40))
        values = [text if i % 3 == 0 else "".join(draw.sample(text, len(text))) for i, text in enumerate(values)]
        return texts.write(tmp_path / "corpus.jsonl", values)

    def filters(self, trusted: Path, share: float = 1 / 3) -> Filters:
        return replace(texts.EVERYTHING, like=str(trusted), like_share=share)

    def test_what_is_unlike_is_left_out_and_counted(
        self, trusted: Path, corpus: Path, tiny_tokenizer_file: Path
    ) -> None:
        with made([corpus], tiny_tokenizer_file, self.filters(trusted)) as batches:
            while batches.counts()[0].epoch == 0:
                next(batches)
            (counts,) = batches.first_epochs()
        good = counts.kept, counts.dropped["unlike"]
        assert sum(good) == counts.read == 120 and 34 <= good[0] <= 42

    def test_each_source_keeps_its_share(self, trusted: Path, corpus: Path, tiny_tokenizer_file: Path) -> None:
        """Also one that is all alike: the mixture's weights stay as they are."""
        other = texts.write(corpus.with_name("other.jsonl"), texts.texts(120, seed=9, words=(20, 40)))
        with made([corpus, other], tiny_tokenizer_file, self.filters(trusted)) as batches:
            while min(counts.epoch for counts in batches.counts()) == 0:
                next(batches)
            first, second = batches.first_epochs()
        assert 34 <= first.kept <= 42 and 34 <= second.kept <= 46

    def test_workers_and_resuming_change_nothing(self, trusted: Path, corpus: Path, tiny_tokenizer_file: Path) -> None:
        filters = self.filters(trusted)
        with made([corpus], tiny_tokenizer_file, filters, window=64) as batches:
            whole = list(islice(batches, 30))
        with made([corpus], tiny_tokenizer_file, filters, window=64, workers=2) as batches:
            assert all(map(equal, islice(batches, 11), whole))
            state = batches.state()
        with made([corpus], tiny_tokenizer_file, filters, window=64) as batches:
            batches.resume(state)
            assert all(map(equal, islice(batches, 19), whole[11:]))

    def test_processes_agree_on_what_is_alike(self, trusted: Path, corpus: Path, tiny_tokenizer_file: Path) -> None:
        options: dict[str, Any] = {"window": 64, "shards": 2}
        with made([corpus], tiny_tokenizer_file, self.filters(trusted), rows=4, **options) as batches:
            rows = sorted(rows_of(list(islice(batches, 10))))
        found = []
        for rank in (0, 1):
            with made([corpus], tiny_tokenizer_file, self.filters(trusted), rank=rank, world=2, **options) as batches:
                found += rows_of(list(islice(batches, 10)))
        assert sorted(found) == rows

    def test_other_trusted_texts_are_other_data(
        self, trusted: Path, corpus: Path, tiny_tokenizer_file: Path, tmp_path: Path
    ) -> None:
        with made([corpus], tiny_tokenizer_file, self.filters(trusted)) as batches:
            state = batches.state()
        (tmp_path / "elsewhere").mkdir()
        moved = trusted.rename(tmp_path / "elsewhere" / trusted.name)
        with made([corpus], tiny_tokenizer_file, self.filters(moved)) as batches:
            batches.resume(state)
        texts.write(moved, texts.texts(41, seed=7))
        for filters in (self.filters(moved), texts.EVERYTHING):
            with (
                made([corpus], tiny_tokenizer_file, filters) as batches,
                pytest.raises(InputError, match="cannot resume: the filters changed"),
            ):
                batches.resume(state)

    def test_runs_from_before_there_was_such_a_filter_go_on(self, corpus: Path, tiny_tokenizer_file: Path) -> None:
        with made([corpus], tiny_tokenizer_file) as batches:
            state = batches.state()
            expected = next(batches)
        assert not {"like", "like_share"} & state["filters"].keys()
        del state["shards_at"]["0"]["sources"][0]["counts"]["dropped"]["unlike"]
        with made([corpus], tiny_tokenizer_file) as batches:
            batches.resume(state)
            assert equal(next(batches), expected) and batches.counts()[0].dropped["unlike"] == 0

    def test_duplicates_are_no_part_of_the_sample(
        self, trusted: Path, tmp_path: Path, tiny_tokenizer_file: Path
    ) -> None:
        path = texts.write(tmp_path / "same.jsonl", ["again and again"] * 50)
        with pytest.raises(
            InputError, match=r"same\.jsonl: the other filters keep 1 of 1 document, and filters.like needs 2"
        ):
            made([path], tiny_tokenizer_file, self.filters(trusted))

    def test_trusted_texts_that_are_none(self, corpus: Path, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        path = texts.write(tmp_path / "short.jsonl", ["short"] * 3)
        filters = Filters(like=str(path))
        with pytest.raises(
            InputError, match=r"short\.jsonl: the other filters keep 0 of 3 documents, and filters.like needs 1"
        ):
            made([corpus], tiny_tokenizer_file, filters)
        with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
            made([TextSource(str(corpus))], tiny_tokenizer_file, Filters(like=str(tmp_path / "none.jsonl")))

    @pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
    def test_shares_that_will_not_do(self, share: float) -> None:
        with pytest.raises(InputError, match="like_share must be above 0 and at most 1, not"):
            Filters(like_share=share)
