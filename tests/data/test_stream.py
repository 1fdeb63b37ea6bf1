"""Batches of raw text: what they hold, in an order that workers don't change, that resumes and shards exactly."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import encoded, equal, made, rows_of

from elm_mlx.data.filters import Filters
from elm_mlx.data.stream import Reading, TextBatches, sample
from elm_mlx.data.text_sources import TextSource
from elm_mlx.errors import InputError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources: one of three files, one of a single small file."""
    path = tmp_path_factory.mktemp("texts")
    (path / "many").mkdir()
    for number, count in enumerate((30, 7, 18)):
        texts.write(path / "many" / f"{number}.jsonl", texts.texts(count, seed=number))
    texts.write(path / "few.jsonl", texts.texts(11, seed=9))
    return path


def mixture(folder: Path) -> list[TextSource]:
    return [TextSource(str(folder / "many"), weight=2), TextSource(str(folder / "few.jsonl"), weight=1)]


def first(count: int, sources: Sequence[TextSource | Path], tokenizer: Path, **options: Any) -> list[Any]:
    with made(sources, tokenizer, **options) as batches:
        return list(islice(batches, count))


def cut(ids: list[int], length: int) -> list[tuple[int, ...]]:
    """Rows that overlap by one, as a person would cut them."""
    return [tuple(ids[start : start + length + 1]) for start in range(0, len(ids) - length, length)]


class TestWhatBatchesHold:
    def test_documents_end_to_end(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        values = texts.texts(40)
        path = texts.write(tmp_path / "a.jsonl", values)
        ids = [token for value in values * 2 for token in encoded(tiny_tokenizer_file, value)]
        expected = cut(ids, 16)
        batches = first(len(expected) // 2, [path], tiny_tokenizer_file)
        rows = rows_of(batches)
        for start in range(0, len(rows) - 15, 16):  # a window has 256 tokens, which are 16 rows
            assert Counter(rows[start : start + 16]) == Counter(expected[start : start + 16])
        assert rows[:16] != expected[:16]  # and is shuffled

    def test_arrays(self, folder: Path, tiny_tokenizer_file: Path) -> None:
        (batch,) = first(1, mixture(folder), tiny_tokenizer_file, rows=3)
        assert batch.inputs.dtype == batch.targets.dtype == np.int32 and batch.inputs.shape == (3, 16)
        assert batch.trained.dtype == np.bool_ and batch.trained.all() and batch.targets.shape == batch.trained.shape
        assert batch.segments is None and batch.tokens == 48
        assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()

    def test_segments(self, folder: Path, tiny_tokenizer_file: Path) -> None:
        plain = first(60, mixture(folder), tiny_tokenizer_file)
        for batch, without in zip(first(60, mixture(folder), tiny_tokenizer_file, segments=True), plain, strict=True):
            assert batch.segments.dtype == np.int32 and np.array_equal(batch.inputs, without.inputs)
            for row, segments in zip(batch.inputs, batch.segments, strict=True):
                begins = np.flatnonzero(row == 1)  # BOS
                assert segments.tolist() == [1 + int(((begins > 0) & (begins <= at)).sum()) for at in range(16)]

    def test_a_document_longer_than_a_window(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        value = " ".join(texts.texts(60))
        path = texts.write(tmp_path / "a.jsonl", [value])
        ids = encoded(tiny_tokenizer_file, value)
        assert len(ids) > 1000
        expected = cut(ids * 2, 16)[: len(ids) // 16]
        with made([path], tiny_tokenizer_file) as batches:
            rows = rows_of(list(islice(batches, len(expected) // 2)))
            state = json.loads(json.dumps(batches.state()))
            following = list(islice(batches, 5))
        assert len(json.dumps(state)) < 2000  # no tokens in it
        for start in range(0, len(rows) - 16, 16):
            assert Counter(rows[start : start + 16]) == Counter(expected[start : start + 16])
        with made([path], tiny_tokenizer_file) as batches:
            batches.resume(state)
            assert all(map(equal, islice(batches, 5), following))

    def test_shares_are_in_tokens(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        long = texts.write(tmp_path / "long.jsonl", texts.texts(30, 0, (100, 200)))
        short = texts.write(tmp_path / "short.jsonl", texts.texts(30, 1, (2, 8)))
        sources = [TextSource(str(long), weight=1), TextSource(str(short), weight=3)]
        with made(sources, tiny_tokenizer_file) as batches:
            for _ in range(300):
                next(batches)
            a, b = batches.counts()
        assert b.tokens / (a.tokens + b.tokens) == pytest.approx(0.75, abs=0.02)
        assert b.epoch > 5 and a.read == a.kept  # the small one repeats, and is counted

    def test_another_seed_is_another_order(self, folder: Path, tiny_tokenizer_file: Path) -> None:
        one, other, same = (first(8, mixture(folder), tiny_tokenizer_file, seed=seed) for seed in (0, 1, 0))
        assert all(map(equal, one, same)) and not all(map(equal, one, other))


class TestFiltering:
    def test_counts_by_hand(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        good = texts.texts(4, words=(150, 150))
        (few,) = texts.texts(1, seed=5, words=(60, 60))
        ids = [encoded(tiny_tokenizer_file, text) for text in [*good, good[2] + " é", few]]
        assert min(map(len, ids[:-1])) >= 258 > len(ids[-1]) and len(few) > 200  # BOS and EOS don't count
        spam, line = "buy now " * 90, "-" * 300
        path = texts.write(
            tmp_path / "a.jsonl",
            [*good, "too short", spam, good[1], line, good[2] + " e\u0301", few, good[2] + " é"],
        )
        with made([path], tiny_tokenizer_file, Filters(), window=16, rows=1) as batches:
            while batches.counts()[0].epoch == 0:
                next(batches)
            (counts,) = batches.counts()
        assert counts.dropped == {
            "duplicate": 2, "short": 1, "repetitive": 1, "symbols": 1, "few tokens": 1, "unlike": 0
        }  # fmt: skip
        assert (counts.read, counts.kept) == (12, 6)  # the first of the next epoch, too
        assert counts.tokens == sum(map(len, ids[:-1])) + len(ids[0])

    def test_a_source_of_which_nothing_is_left(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        path = texts.write(tmp_path / "a.jsonl", ["a", "b", "-" * 300])
        with (
            made([path], tiny_tokenizer_file, Filters()) as batches,
            pytest.raises(InputError, match=r"a\.jsonl: none of its 3 documents is kept: 2 short, 1 symbols"),
        ):
            next(batches)

    def test_duplicates_across_sources(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        values = texts.texts(20)
        one = texts.write(tmp_path / "one.jsonl", values[:12])
        two = texts.write(tmp_path / "two.jsonl", values[8:])
        for seed in range(3):
            with made([one, two], tiny_tokenizer_file, seed=seed) as batches:
                for _ in range(60):
                    next(batches)
                a, b = batches.counts()
            assert a.dropped["duplicate"] == 0 and b.dropped["duplicate"] in (4 * b.epoch, 4 * b.epoch + 4)
        with made([one, two], tiny_tokenizer_file, Filters(duplicates=False, min_chars=0, min_tokens=0)) as batches:
            for _ in range(60):
                next(batches)
            assert [counts.dropped["duplicate"] for counts in batches.counts()] == [0, 0]

    def test_another_tokenizer_is_another_file(self, folder: Path, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        import tiny

        (tmp_path / "tokenizer.model").write_bytes(tiny.train_tokenizer(300))
        one = first(1, mixture(folder), tiny_tokenizer_file)[0]
        other = first(1, mixture(folder), tmp_path)[0]
        assert other.inputs.max() < 300 and not equal(one, other)


class TestOrder:
    @pytest.mark.parametrize("workers", [1, 3])
    def test_workers_change_nothing(self, folder: Path, tiny_tokenizer_file: Path, workers: int) -> None:
        expected = first(150, mixture(folder), tiny_tokenizer_file)
        found = first(150, mixture(folder), tiny_tokenizer_file, workers=workers)
        assert all(map(equal, expected, found))

    @given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 500), st.integers(0, 2**70), st.booleans())
    @settings(max_examples=25)
    def test_resuming_changes_nothing(
        self, folder: Path, tiny_tokenizer_file: Path, at: int, rows: int, window: int, seed: int, segments: bool
    ) -> None:
        options = {"rows": rows, "window": window, "seed": seed, "segments": segments}
        with made(mixture(folder), tiny_tokenizer_file, **options) as whole:
            for _ in range(at):
                next(whole)
            state = json.loads(json.dumps(whole.state()))
            expected = list(islice(whole, 20))
            with made(mixture(folder), tiny_tokenizer_file, **options) as resumed:
                resumed.resume(state)
                assert resumed.state() == state
                assert all(map(equal, islice(resumed, 20), expected))
                assert resumed.state() == whole.state() and resumed.counts() == whole.counts()

    def test_resuming_with_other_workers(self, folder: Path, tiny_tokenizer_file: Path) -> None:
        with made(mixture(folder), tiny_tokenizer_file, workers=2) as whole:
            for _ in range(31):
                next(whole)
            state = whole.state()
            expected = list(islice(whole, 20))
            whole.resume(state)  # its own past, too
            assert all(map(equal, islice(whole, 20), expected))
        with made(mixture(folder), tiny_tokenizer_file, workers=0) as resumed:
            resumed.resume(state)
            assert all(map(equal, islice(resumed, 20), expected))

    @given(st.sampled_from([(1, 2, 2), (2, 4, 4), (1, 3, 3), (2, 2, 4)]), st.integers(1, 300))
    @settings(max_examples=12)
    def test_processes_read_what_one_would(
        self, folder: Path, tiny_tokenizer_file: Path, shape: tuple[int, int, int], window: int
    ) -> None:
        rows, world, shards = shape
        options = {"window": window, "shards": shards}
        whole = first(40, mixture(folder), tiny_tokenizer_file, rows=rows * world, **options)
        parts = [
            first(40, mixture(folder), tiny_tokenizer_file, rows=rows, rank=rank, world=world, **options)
            for rank in range(world)
        ]
        for batch, *others in zip(whole, *parts, strict=True):
            for rank, other in enumerate(others):
                assert np.array_equal(batch.inputs[rank::world], other.inputs)
                assert np.array_equal(batch.targets[rank::world], other.targets)

    def test_each_document_is_read_by_one_process(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        values = texts.texts(60)
        path = texts.write(tmp_path / "a.jsonl", values)
        total = Counter[str]()
        for rank in range(3):
            with made([path], tiny_tokenizer_file, rank=rank, world=3, rows=1, window=16) as batches:
                while batches.counts()[0].epoch == 0:
                    next(batches)
                total["kept"] += batches.counts()[0].kept - 1
        assert total["kept"] == 60

    def test_going_on_with_other_processes(self, folder: Path, tiny_tokenizer_file: Path) -> None:
        whole = first(30, mixture(folder), tiny_tokenizer_file, rows=4, shards=2)
        both = [made(mixture(folder), tiny_tokenizer_file, rank=rank, world=2, rows=2) for rank in range(2)]
        lanes = []
        for each in both:
            for _ in range(11):
                next(each)
            lanes.append(each.state()["shards_at"])
        state = both[0].state()
        with made(mixture(folder), tiny_tokenizer_file, rows=4, shards=2) as one:
            with pytest.raises(InputError, match="the position in the data is damaged"):
                one.resume(state)  # one process's part of it
            one.resume(state | {"shards_at": lanes[0] | lanes[1]})
            assert all(map(equal, one, whole[11:]))

    def test_gathered_states_are_all_s(self, folder: Path, tiny_tokenizer_file: Path) -> None:
        other = {"1": {"a": 1}}
        reading = Reading(2, 16, workers=0)
        with TextBatches(
            mixture(folder), tiny_tokenizer_file, texts.EVERYTHING, reading, world=2, gather=lambda own: [own, other]
        ) as batches:
            assert batches.state()["shards_at"].keys() == {"0", "1"}


class TestResuming:
    def test_what_must_be_the_same(self, folder: Path, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        with made(mixture(folder), tiny_tokenizer_file) as batches:
            next(batches)
            state = batches.state()
        for options, message in (
            ({"seed": 1}, "the seed changed: 0 before, 1 now"),
            ({"rows": 3}, "the rows of a batch changed: 2 before, 3 now"),
            ({"length": 8}, "the row length changed"),
            ({"window": 300}, "the window changed: 256 before, 300 now"),
            ({"segments": True}, "the segments changed"),
            ({"shards": 2}, "the shards changed: 1 before, 2 now"),
            ({"filters": Filters()}, "the filters changed"),
        ):
            with made(mixture(folder), tiny_tokenizer_file, **options) as other:  # type: ignore[arg-type]
                assert other.fingerprint != batches.fingerprint
                with pytest.raises(InputError, match=f"cannot resume: {message}"):
                    other.resume(state)
        with (
            made(mixture(folder)[:1], tiny_tokenizer_file) as other,
            pytest.raises(InputError, match="cannot resume: the weights changed"),
        ):
            other.resume(state)

    @pytest.mark.parametrize(
        "damage",
        [
            {"batch": -1}, {"batch": 99}, {"block": "x"}, {"block": None}, {"shards_at": {}}, {"shards_at": [1]},
            {"shards_at": {"0": {"sources": []}}}, {"shards_at": {"0": 5}},
            {"shards_at": {"0": {"sources": [{}, {}], "rest": None}}},
        ],
    )  # fmt: skip
    def test_a_damaged_state(self, folder: Path, tiny_tokenizer_file: Path, damage: dict[str, Any]) -> None:
        with made(mixture(folder), tiny_tokenizer_file) as batches:
            with pytest.raises(InputError, match="cannot resume: the position in the data is damaged"):
                batches.resume(batches.state() | damage)
            with pytest.raises(InputError, match="cannot resume: the seed changed"):
                batches.resume(7)  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["epoch", "read", "kept", "tokens", "bad", "dropped", "next"])
    @pytest.mark.parametrize("value", ["x", -1, 2.5, None, {"duplicate": "x"}, [-(10**30), 0, 0]])
    def test_damaged_counts(self, folder: Path, tiny_tokenizer_file: Path, name: str, value: object) -> None:
        with made(mixture(folder), tiny_tokenizer_file) as batches:
            state = batches.state()
            source = state["shards_at"]["0"]["sources"][0]
            (source if name == "next" else source["counts"])[name] = value
            with pytest.raises(InputError, match="cannot resume: the position in the data is damaged"):
                batches.resume(state)


class TestDamage:
    def damaged(self, folder: Path) -> Path:
        good = [json.dumps({"text": text}) for text in texts.texts(20)]
        lines = [good[0], "{", *good[1:5], '{"body": "a"}', *good[5:], '{"text": "\\ud800"}']
        (folder / "a.jsonl").write_text("\n".join(lines))
        return folder / "a.jsonl"

    @pytest.mark.parametrize("workers", [0, 2])
    def test_bad_lines_are_named_and_counted_once(
        self, tmp_path: Path, tiny_tokenizer_file: Path, workers: int
    ) -> None:
        path, named = self.damaged(tmp_path), []
        reading = Reading(2, 16, window=64, workers=workers, max_bad=3)
        sources = [TextSource(str(path))]
        with TextBatches(sources, tiny_tokenizer_file, texts.EVERYTHING, reading, on_wrong=named.append) as batches:
            while batches.counts()[0].epoch < 2:
                next(batches)
            (counts,) = batches.counts()
        assert counts.bad == 3
        assert named == [
            f"{path}, line 2: not JSON: Expecting property name enclosed in double quotes at column 2",
            f"{path}, line 7: `text` is missing; it has `body`",
            f"{path}, line 23: the text is not valid Unicode: character 1 is U+D800",
        ]

    def test_too_many_of_them_stop_it(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        path = self.damaged(tmp_path)
        message = r"line 7: `text` is missing; .*; that makes 2 records that cannot be read, and 1 are allowed"
        with made([path], tiny_tokenizer_file, max_bad=1) as batches, pytest.raises(InputError, match=message):
            list(islice(batches, 99))

    @pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
    def test_a_broken_file(self, tmp_path: Path, tiny_tokenizer_file: Path, suffix: str) -> None:
        texts.write(tmp_path / "a.jsonl", texts.texts(30))
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts.texts(30, seed=1)).encode()
        broken = tmp_path / f"b{suffix}"
        if suffix == ".jsonl.zst":
            data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
        elif suffix == ".parquet":
            pytest.importorskip("pyarrow")
        else:
            data = gzip.compress(data)
        broken.write_bytes(data[:-20])
        with (
            made([tmp_path], tiny_tokenizer_file) as batches,
            pytest.raises(
                InputError, match=rf"b{suffix}: .*; that makes 1 file that cannot be read, and 0 are allowed"
            ),
        ):
            list(islice(batches, 300))
        with made([tmp_path], tiny_tokenizer_file, max_broken=1) as batches:
            while batches.counts()[0].epoch < 3:
                next(batches)
            (counts,) = batches.counts()
        assert len(counts.broken) == 1 and counts.broken[0].startswith(f"{broken}: ")

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_source_that_is_broken_from_its_beginning(
        self, tmp_path: Path, tiny_tokenizer_file: Path, workers: int
    ) -> None:
        (tmp_path / "a.json").write_text('[{"text": ')
        with (
            made([tmp_path / "a.json"], tiny_tokenizer_file, max_broken=1, workers=workers) as batches,
            pytest.raises(InputError, match=r"none of its 0 documents is kept: .*a\.json, line 1, column 11: not JSON"),
        ):
            next(batches)

    def test_an_error_is_not_the_end_of_waiting(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        (tmp_path / "a.jsonl").write_text("\n")
        for workers in (0, 1):
            with made([tmp_path / "a.jsonl"], tiny_tokenizer_file, workers=workers) as batches:
                for _ in range(3):
                    with pytest.raises(Exception, match=r"a\.jsonl: "):
                        next(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"workers": -1}, "workers must be at least 0, not -1"),
        ({"window": 0}, "window must be at least 1"),
        ({"shards": 3}, "3 shards won't do: their number is a multiple of the 1 processes, and divides the 2 rows"),
        ({"world": 2, "shards": 1}, "1 shards won't do"),
        ({"rank": 1}, "won't do"),
    ],
)
def test_numbers_that_will_not_do(
    folder: Path, tiny_tokenizer_file: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        made(mixture(folder), tiny_tokenizer_file, **options)


def test_no_sources_and_no_tokenizer(folder: Path, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    with pytest.raises(InputError, match="the mixture has no sources"):
        made([], tiny_tokenizer_file)
    with pytest.raises(InputError, match=r"holds no tokenizer\.model"):
        made(mixture(folder), tmp_path)


def test_real_books(tmp_path: Path) -> None:
    books, tokenizer = SHARED / "classics/train.jsonl.gz", SHARED / "classics/tokenizer.model"
    if not books.exists():
        pytest.skip(f"{books} is not here")
    small = tmp_path / "books.jsonl"
    with gzip.open(books) as lines:
        small.write_bytes(b"".join(sorted(lines, key=len)[:12]))
    with made([small], tokenizer, Filters(), length=256, window=1 << 16) as batches, contextlib.closing(batches):
        found = list(islice(batches, 100))
        (counts,) = batches.counts()
    assert sum(counts.dropped.values()) == 0 and counts.bad == 0 and len(found) == 100


def test_all_of_a_small_mixture(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    values = texts.texts(30, words=(90, 120))
    one = texts.write(tmp_path / "one.jsonl", [*values[:20], "short", values[0]])
    two = texts.write(tmp_path / "two.jsonl", [*values[20:], 3])
    named: list[str] = []
    sources = [TextSource(str(one), weight=3), TextSource(str(two))]
    found = sample(sources, tiny_tokenizer_file, Filters(), Reading(8, 2048, workers=0), on_wrong=named.append)
    assert found.whole and found.tokens == sum(part.counts.tokens for part in found.parts)
    assert [part.wanted for part in found.parts] == [0.75, 0.25]
    assert found.parts[0].share == pytest.approx(0.75, abs=0.05) and sum(part.share for part in found.parts) == 1
    assert found.parts[1].counts.bad == 1 and named == [f"{two}, line 11: is a number, not an object"]
    assert found.parts[0].counts.dropped["short"] >= 1 and found.parts[0].counts.dropped["duplicate"] >= 1
    assert found.tokens_per_second == found.tokens / found.seconds > 0


@pytest.mark.parametrize("count", [1, 7])
def test_each_document_counts_once(tmp_path: Path, tiny_tokenizer_file: Path, count: int) -> None:
    values = texts.texts(count, words=(300, 400))
    found = sample(
        [TextSource(str(texts.write(tmp_path / "a.jsonl", values)), weight=9),
         TextSource(str(texts.write(tmp_path / "b.jsonl", ["short", *texts.texts(1, 5, (900, 900))])))],
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
    found = sample([TextSource(str(path))], tiny_tokenizer_file, Filters(), Reading(8, 2048, workers=1), 20_000)
    assert not found.whole and 20_000 <= found.tokens < 30_000 and found.parts[0].share == 1
    with pytest.raises(InputError, match="tokens must be at least 1"):
        sample([TextSource(str(path))], tiny_tokenizer_file, Filters(), Reading(8, 2048), 0)
