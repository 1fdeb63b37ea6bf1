"""A look at a mixture: its figures are those of the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import texts

from elm_mlx.data.filters import Filters
from elm_mlx.data.mixture_sample import sample
from elm_mlx.data.stream import Reading
from elm_mlx.data.text_sources import Source
from elm_mlx.errors import InputError


def test_all_of_a_small_mixture(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    values = texts.texts(30, words=(90, 120))
    one = texts.write(tmp_path / "one.jsonl", [*values[:20], "short", values[0]])
    two = texts.write(tmp_path / "two.jsonl", [*values[20:], 3])
    named: list[str] = []
    sources = [Source(str(one), weight=3), Source(str(two))]
    found = sample(sources, tiny_tokenizer_file, Filters(), Reading(8, 2048, workers=0), on_wrong=named.append)
    assert found.whole and found.tokens == sum(part.counts.tokens for part in found.parts)
    assert [part.wanted for part in found.parts] == [0.75, 0.25]
    assert found.parts[0].share == pytest.approx(0.75, abs=0.05) and sum(part.share for part in found.parts) == 1
    assert found.parts[1].counts.bad == 1 and named == [f"{two}, line 11: is a number, and not an object"]
    assert found.parts[0].counts.dropped["short"] >= 1 and found.parts[0].counts.dropped["duplicate"] >= 1
    assert found.tokens_per_second == found.tokens / found.seconds > 0


@pytest.mark.parametrize("count", [1, 7])
def test_each_document_counts_once(tmp_path: Path, tiny_tokenizer_file: Path, count: int) -> None:
    values = texts.texts(count, words=(300, 400))
    found = sample(
        [Source(str(texts.write(tmp_path / "a.jsonl", values)), weight=9),
         Source(str(texts.write(tmp_path / "b.jsonl", ["short", *texts.texts(1, 5, (900, 900))])))],
        tiny_tokenizer_file, Filters(), Reading(8, 2048, workers=0),
    )  # fmt: skip
    tokens = sum(len(texts.encoded(tiny_tokenizer_file, text)) for text in values)
    ours, other = (part.counts for part in found.parts)
    assert (ours.read, ours.kept, ours.tokens, ours.epoch) == (count, count, tokens, 0)
    assert (other.read, other.kept, other.dropped["short"]) == (2, 1, 1)
    assert found.whole and found.tokens == ours.tokens + other.tokens
    # what the mixture repeats of the one is its share all the same
    assert found.parts[0].share > 0.8


def test_the_beginning_of_a_large_one(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    path = texts.write(tmp_path / "a.jsonl", texts.texts(300, words=(90, 120)))
    found = sample([Source(str(path))], tiny_tokenizer_file, Filters(), Reading(8, 2048, workers=1), 20_000)
    assert not found.whole and 20_000 <= found.tokens < 30_000 and found.parts[0].share == 1
    with pytest.raises(InputError, match="at least 1 token"):
        sample([Source(str(path))], tiny_tokenizer_file, Filters(), Reading(8, 2048), 0)
