"""A mixture against a plain account of it: which document comes next, what is cut off, where it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.data import filters
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.data.mixture import Feed, Mixture, ahead
from elm_mlx.data.text_sources import Broken, Position, Raw, TextSource
from elm_mlx.data.workers import Encode
from elm_mlx.errors import InputError

Content = str | BadRecord | Broken | None


@dataclass
class Answer:
    value: Any
    ready: bool = True

    def done(self) -> bool:
        return self.ready

    def result(self) -> Any:
        return self.value


@dataclass
class Pool:
    """Encodes texts like `3 4 5` as these numbers, and leaves out `short`."""

    workers: int = 0
    ready: bool = True
    answers: list[Answer] = field(default_factory=list)

    def read(self, function: Callable[[], Any]) -> Answer:
        self.answers.append(Answer(function(), self.ready))
        return self.answers[-1]

    def submit(self, task: Encode) -> Answer:
        texts = [text for text in task.contents if isinstance(text, str)]
        return Answer(
            [filters.SHORT if text == "short" else np.array(text.split(), np.uint32).tobytes() for text in texts]
        )


def feed(documents: Sequence[Content], weight: float = 1.0, number: int = 0, pool: Pool | None = None) -> Feed:
    """A source of one file, epoch after epoch."""

    def read(position: Position) -> Iterator[Raw]:
        epoch, start = position.epoch, position.number
        while True:
            for place in range(start, len(documents)):
                yield Raw(Position(epoch, 0, place), f"s{number}, line {place + 1}", documents[place])
            epoch, start = epoch + 1, 0

    told: list[str] = []
    made = Feed(TextSource(f"s{number}", weight=weight), read, pool or Pool(), 1, told.append)  # type: ignore[arg-type]
    made.told = told  # type: ignore[attr-defined]
    return made


def texts(source: int, lengths: Sequence[int]) -> list[str]:
    """Documents of these lengths, every id of them once in the whole mixture."""
    starts = np.cumsum([1000 * source, *lengths])
    return [" ".join(map(str, range(start, start + length))) for start, length in zip(starts, lengths, strict=False)]


def blocks(mixture: Mixture, count: int) -> list[tuple[list[int], list[bool]]]:
    found = []
    for _ in range(count):
        mixture.fill(wait=True)
        ids, starts = mixture.take()
        found.append((ids.tolist(), starts.tolist()))
    return found


def account(lengths: Sequence[Sequence[int]], weights: Sequence[float], tokens: int) -> tuple[list[int], list[bool]]:
    """The stream: always a document of the source that is furthest behind, the first of those that are alike."""
    ids: list[int] = []
    starts: list[bool] = []
    spent, turns = [0] * len(lengths), [0] * len(lengths)
    documents = [[list(map(int, text.split())) for text in texts(i, each)] for i, each in enumerate(lengths)]
    while len(ids) < tokens:
        shares = [count / weight for count, weight in zip(spent, weights, strict=True)]
        behind = shares.index(min(shares))
        document = documents[behind][turns[behind] % len(documents[behind])]
        ids += document
        starts += [True] + [False] * (len(document) - 1)
        spent[behind] += len(document)
        turns[behind] += 1
    return ids, starts


SOURCES = st.lists(
    st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.sampled_from([0.5, 1.0, 3.0])),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=30)
@given(sources=SOURCES, size=st.integers(2, 40))
def test_blocks_are_cut_off_one_stream_and_share_an_id(sources: list[tuple[list[int], float]], size: int) -> None:
    lengths, weights = zip(*sources, strict=True)
    mixture = Mixture([feed(texts(i, each), weights[i], i) for i, each in enumerate(lengths)], size)
    ids, starts = account(lengths, weights, 6 * size)
    for number, block in enumerate(blocks(mixture, 6)):
        at = number * (size - 1)  # its last id is the next one's first, so that each is a target once
        assert block == (ids[at : at + size], starts[at : at + size])


@settings(max_examples=30)
@given(sources=SOURCES)
def test_shares_are_the_weights_but_for_a_document(sources: list[tuple[list[int], float]]) -> None:
    lengths, weights = zip(*sources, strict=True)
    feeds = [feed(texts(i, each), weights[i], i) for i, each in enumerate(lengths)]
    blocks(Mixture(feeds, 500), 2)
    exact = [Fraction(weight) for weight in weights]  # thirds of whole numbers meet the bound, floats miss it by 5e-15
    spent, longest = [each.counts.tokens for each in feeds], max(map(max, lengths))
    for count, weight in zip(spent, exact, strict=True):
        assert abs(count / weight - spent[0] / exact[0]) <= longest / min(exact)


@settings(max_examples=30)
@given(sources=SOURCES, size=st.integers(2, 40), after=st.integers(0, 4))
def test_resumed_from_its_state_it_goes_on(sources: list[tuple[list[int], float]], size: int, after: int) -> None:
    """In the middle of a document, of an epoch: from what JSON keeps."""
    lengths, weights = zip(*sources, strict=True)
    one, other = (
        Mixture([feed(texts(i, each), weights[i], i) for i, each in enumerate(lengths)], size) for _ in range(2)
    )
    blocks(one, after)
    state = json.loads(json.dumps(one.state()))
    other.resume(state)
    assert other.state() == state and blocks(other, 4) == blocks(one, 4)


def test_another_document_where_it_stood_is_no_resuming() -> None:
    mixture = Mixture([feed(texts(0, [5, 7]))], 4)
    blocks(mixture, 1)
    with pytest.raises(InputError, match="cannot resume: s0, line 1 is another document than before"):
        Mixture([feed(["short", "1"])], 4).resume(mixture.state())
    with pytest.raises(ValueError):
        Mixture([feed(["1", "2"])], 4).resume(mixture.state())  # has not as many ids as are left of it


def test_without_waiting_it_takes_what_is_ready() -> None:
    """Of the source whose turn it is: another one's documents don't come in its place."""
    pools = Pool(workers=1), Pool(workers=1, ready=False)
    first, second = feed(texts(0, [3]), 1, 0, pools[0]), feed(texts(1, [3]), 1, 1, pools[1])
    mixture = Mixture([first, second], 20)
    mixture.fill(wait=False)
    assert (first.counts.tokens, second.counts.tokens) == (3, 0)
    for answer in pools[1].answers:
        answer.ready = True
    mixture.fill(wait=False)
    assert (first.counts.tokens, second.counts.tokens) == (12, 9)
    assert blocks(mixture, 1)[0][0][:6] == [0, 1, 2, 1000, 1001, 1002]


def test_what_is_left_out_is_counted_and_told_once() -> None:
    source = feed(["1 2", "short", BadRecord("no JSON"), None, Broken("s0: cut off")])
    mixture = Mixture([source], 9)
    blocks(mixture, 1)
    counts = source.counts
    assert (counts.kept, counts.tokens, counts.bad, counts.broken) == (5, 10, 1, ["s0: cut off"])
    assert (counts.dropped[filters.SHORT], counts.dropped[filters.DUPLICATE]) == (4, 4)
    assert source.told == ["s0, line 3: no JSON", "s0: cut off"]  # type: ignore[attr-defined]
    assert source.first is not None and (source.first.kept, source.first.read) == (1, 4)


def test_a_source_of_which_nothing_is_kept_ends_the_run() -> None:
    with pytest.raises(InputError, match="s0: none of its 2 documents is kept: 1 short; 1 bad"):
        blocks(Mixture([feed(["short", BadRecord("no JSON")])], 4), 1)


@pytest.mark.parametrize(("share", "tasks"), [(1.0, 7), (0.5, 4), (0.0, 1)])
def test_more_is_encoded_ahead_of_a_larger_source(share: float, tasks: int) -> None:
    assert ahead(2, share, 1.0) == tasks
