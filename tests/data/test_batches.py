"""Batches: every example once and none mixed with another, in an order by seed that resumes and shards exactly."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.data import batches
from elm_mlx.data.batches import Batch, Batches, fingerprint
from elm_mlx.data.encoding import Example
from elm_mlx.errors import InputError


def example(number: int, length: int) -> Example:
    """Ids that tell which example they are of, and where in it; some marks."""
    ids = tuple(number * 1000 + i + 1 for i in range(length))
    return Example(ids, (False, *((number + i) % 3 > 0 for i in range(1, length))))


def drawn(count: int, longest: int, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    return [example(number, draw.randint(2, longest)) for number in range(count)]


def contents(batch: Batch) -> list[Example]:
    """The examples that a batch's arrays hold, read off the arrays alone."""
    found = []
    for row in range(len(batch.inputs)):
        inputs, targets, trained = batch.inputs[row], batch.targets[row], batch.trained[row]
        segments = (inputs > 0).astype(int) if batch.segments is None else batch.segments[row]
        assert not trained[segments == 0].any() and not inputs[segments == 0].any() and not targets[segments == 0].any()
        assert not (np.diff(np.append(segments, 0) == 0) < 0).any()  # padding is at the end
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert len(at) and at[-1] - at[0] + 1 == len(at)
            ids = (*inputs[at].tolist(), int(targets[at[-1]]))
            assert tuple(targets[at].tolist()) == ids[1:]
            found.append(Example(ids, (False, *trained[at].tolist())))
    return found


def equal(first: Batch, second: Batch) -> bool:
    names = ("inputs", "targets", "trained", "segments", "tokens")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


def epoch(made: Batches, number: int = 0) -> list[Batch]:
    """All batches of an epoch of a fresh iterator."""
    for _ in range(number):
        list(islice(made, made.steps()))
        made.resume(made.state() | {"epoch": made.epoch, "batch": 0})
    return list(islice(made, made.steps()))


EXAMPLES = st.lists(st.integers(2, 33), min_size=1, max_size=60).map(
    lambda lengths: [example(number, length) for number, length in enumerate(lengths)]
)


@pytest.mark.parametrize("packed", [True, False])
@given(examples=EXAMPLES, size=st.integers(1, 5), seed=st.integers(-5, 2**70))
@settings(max_examples=80)
def test_an_epoch_has_each_example_once_and_whole(packed: bool, examples: list[Example], size: int, seed: int) -> None:
    made = Batches(examples, size, 32, packed=packed, seed=seed)
    for number in range(2):
        found = list(islice(made, made.steps()))
        read = [each for batch in found for each in contents(batch)]
        assert Counter(read) == Counter(examples)
        assert sum(batch.tokens for batch in found) == sum(len(each.ids) - 1 for each in examples)
        assert made.epoch == number + 1
        made.resume(made.state() | {"epoch": number + 1, "batch": 0})


def test_arrays_are_as_they_say() -> None:
    packed, unpacked = (next(Batches(drawn(40, 30), 3, 50, packed=packed)) for packed in (True, False))
    for batch in (packed, unpacked):
        assert batch.inputs.dtype == batch.targets.dtype == np.int32 and batch.trained.dtype == np.bool_
        assert batch.inputs.shape == batch.targets.shape == batch.trained.shape and len(batch.inputs) == 3
        assert batch.tokens == (batch.inputs > 0).sum()
    assert packed.inputs.shape == (3, 50) and packed.segments is not None and packed.segments.dtype == np.int32
    assert unpacked.inputs.shape == (3, 32) and unpacked.segments is None


@pytest.mark.parametrize("packed", [True, False])
def test_lengths_and_reach(packed: bool) -> None:
    examples = drawn(40, 90, seed=3)
    found = []
    for batch in Batches(examples, 2, 512, packed=packed).once():
        found += batch.lengths().tolist()
        longest = int(batch.lengths().max())
        reach = batch.reach()
        assert reach is None or (longest <= reach < batch.inputs.shape[1] and reach.bit_count() == 1)
        if packed:
            assert reach == (64 if longest <= 64 else 128)
    assert sorted(filter(None, found)) == sorted(len(each.ids) - 1 for each in examples)


def test_the_batch_that_a_person_would_write() -> None:
    made = Batches([Example((5, 6, 7), (False, False, True)), Example((8, 9), (False, True))], 1, 5)
    batch = next(made)
    assert made.steps() == 1
    assert batch.inputs.tolist() == [[5, 6, 8, 0, 0]] and batch.targets.tolist() == [[6, 7, 9, 0, 0]]
    assert batch.trained.tolist() == [[False, True, True, False, False]]
    assert batch.segments is not None and batch.segments.tolist() == [[1, 1, 2, 0, 0]] and batch.tokens == 3


def test_rows_of_similar_length_without_packing() -> None:
    examples = drawn(400, 500)
    made = Batches(examples, 4, 512, packed=False)
    assert made.fill() > 0.9 > 0.6 > sum(len(each.ids) for each in examples) / (400 * 500)
    found = list(made.once())
    for batch in found:
        lengths = (batch.inputs > 0).sum(1)
        assert batch.inputs.shape[1] % 32 == 0 and batch.inputs.shape[1] - lengths.max() < 32
    shapes = [batch.inputs.shape[1] for batch in found]
    assert shapes != sorted(shapes) and shapes != sorted(shapes, reverse=True)


def test_a_row_that_is_no_multiple_of_the_step() -> None:
    assert next(Batches([example(0, 41)], 1, 40, packed=False)).inputs.shape == (1, 40)


@pytest.mark.parametrize(("longest", "least"), [(64, 0.97), (256, 0.95), (512, 0.9)])
def test_packed_rows_are_full(longest: int, least: float) -> None:
    made = Batches(drawn(3000, longest, seed=1), 1, 512)
    needed = sum(len(each.ids) - 1 for each in drawn(3000, longest, seed=1)) / 512
    assert made.fill() >= least and made.steps() == pytest.approx(needed / made.fill())


def test_rows_come_in_no_order_of_length() -> None:
    """Long examples would otherwise all be learnt first."""
    found = list(Batches(drawn(1000, 512), 1, 512).once())
    firsts = [int((batch.segments == 1).sum()) for batch in found]
    assert abs(np.corrcoef(firsts, range(len(firsts)))[0, 1]) < 0.15


def test_order_is_by_seed_and_epoch() -> None:
    examples = drawn(200, 40)

    def order(seed: int, number: int = 0, packed: bool = True) -> list[Example]:
        return [
            each
            for batch in epoch(Batches(examples, 2, 64, seed=seed, packed=packed), number)
            for each in contents(batch)
        ]

    for packed in (True, False):
        orders = [order(0, 0, packed), order(0, 1, packed), order(1, 0, packed), order(1, 1, packed)]
        assert all(a != b for a, b in pairwise(sorted(map(str, orders))))
        assert order(0, 1, packed) == orders[1] and order(1, 0, packed) == orders[2]


def test_order_is_the_same_everywhere() -> None:
    """In any process, whatever its hashes and global random state; written down, so that no update changes it."""
    code = (
        "from elm_mlx.data.batches import Batches\nfrom elm_mlx.data.encoding import Example\n"
        "examples = [Example((1,) * n, (False,) + (True,) * (n - 1)) for n in range(2, 12)]\n"
        "print([batch.tokens for batch in Batches(examples, 1, 16, seed=7).once()],"
        " [batch.tokens for batch in Batches(examples, 1, 16, seed=7, packed=False).once()])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert outputs == {"[16, 16, 16, 7] [4, 1, 8, 3, 9, 6, 2, 5, 10, 7]\n"}


def test_global_random_state_is_left_alone() -> None:
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    list(Batches(drawn(50, 9), 2, 16).once())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]


def test_validation_is_the_same_each_time() -> None:
    made = Batches(drawn(50, 30), 2, 32)
    before = list(made.once())
    list(islice(made, 7))
    assert all(map(equal, before, made.once()))


class TestResume:
    @pytest.mark.parametrize("packed", [True, False])
    @given(examples=EXAMPLES, done=st.integers(0, 40), seed=st.integers(0, 99))
    @settings(max_examples=80)
    def test_the_same_batches_follow(self, packed: bool, examples: list[Example], done: int, seed: int) -> None:
        made = Batches(examples, 2, 40, packed=packed, seed=seed)
        list(islice(made, done))
        state = json.loads(json.dumps(made.state()))
        again = Batches(list(examples), 2, 40, packed=packed, seed=seed)
        again.resume(state)
        assert again.state() == state and again.epoch == made.epoch
        assert all(map(equal, islice(made, 20), islice(again, 20)))

    def test_with_other_processes(self) -> None:
        examples = drawn(60, 30)
        one = Batches(examples, 6, 32)
        list(islice(one, 3))
        two = [Batches(examples, 3, 32, rank=rank, world=2) for rank in range(2)]
        for half in two:
            half.resume(one.state())
        assert Counter(contents(next(one))) == Counter(each for half in two for each in contents(next(half)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seed": 1}, "the seed changed: 0 before, 1 now"),
            ({"batch_size": 3}, "the rows of a batch changed: 2 before, 3 now"),
            ({"row_length": 33}, "the row length changed: 32 before, 33 now"),
            ({"packed": False}, "the packed changed"),
            ({"examples": drawn(50, 30, seed=9)}, "the data changed$"),
        ],
    )
    def test_what_is_not_the_same_is_refused(self, change: dict[str, Any], message: str) -> None:
        same: dict[str, Any] = {"examples": drawn(50, 30), "batch_size": 2, "row_length": 32}
        state = Batches(**same).state()
        with pytest.raises(InputError, match="cannot resume: " + message):
            Batches(**same | change).resume(state)

    @pytest.mark.parametrize(
        "damage", [{"epoch": -1}, {"epoch": "0"}, {"batch": 10**6}, {"batch": -1}, {"batch": None}, {"epoch": 1.0}]
    )
    def test_damage(self, damage: dict[str, Any]) -> None:
        made = Batches(drawn(50, 30), 2, 32)
        first = next(made)
        with pytest.raises(InputError, match="the position in the data is damaged"):
            made.resume(made.state() | damage)
        made.resume(made.state() | {"batch": 0})
        assert equal(next(made), first)

    def test_a_mark_is_data_too(self) -> None:
        one, other = Example((1, 2, 3), (False, True, True)), Example((1, 2, 3), (False, False, True))
        assert len({fingerprint([one]), fingerprint([other]), fingerprint([one, one]), fingerprint([])}) == 4
        assert fingerprint([Example((1, 2, 3), (False, True, True))]) == fingerprint([one])


class TestProcesses:
    @pytest.mark.parametrize("packed", [True, False])
    @given(examples=EXAMPLES, size=st.integers(1, 3), world=st.integers(1, 4))
    @settings(max_examples=60)
    def test_together_they_see_one_process_batches(
        self, packed: bool, examples: list[Example], size: int, world: int
    ) -> None:
        one = Batches(examples, size * world, 40, packed=packed)
        parts = [Batches(examples, size, 40, packed=packed, rank=rank, world=world) for rank in range(world)]
        for _ in range(2 * one.steps() + 1):
            whole, shares = next(one), [next(part) for part in parts]
            assert {share.inputs.shape for share in shares} == {(size, whole.inputs.shape[1])}
            for name in ("inputs", "targets", "trained", "segments"):
                rows = (getattr(share, name) for share in shares)
                if getattr(whole, name) is not None:
                    assert _rows(getattr(whole, name)) == sum(map(_rows, rows), Counter())
            assert sum(share.tokens for share in shares) == whole.tokens

    def test_a_process_may_have_nothing_to_do(self) -> None:
        idle = next(Batches([example(0, 9)], 1, 16, rank=1, world=2))
        assert idle.inputs.shape == (1, 16) and idle.tokens == 0 and not idle.trained.any()


def _rows(array: Iterable[Any]) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(row.tolist()) for row in array)


def test_what_cannot_be() -> None:
    with pytest.raises(InputError, match="an example of 34 tokens doesn't fit rows of 32"):
        Batches([example(0, 34)], 1, 32)
    with pytest.raises(InputError, match="there are no examples"):
        Batches([], 1, 32)
    for wrong in ({"batch_size": 0}, {"batch_size": 1, "rank": 1}, {"batch_size": 1, "rank": -1, "world": 2}):
        with pytest.raises(InputError, match=r"batch_size must be at least 1|there is no process"):
            Batches([example(0, 9)], row_length=32, **wrong)


def test_many_examples_are_packed_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_WINDOW", 7)
    for packed in (True, False):
        examples = drawn(100, 20)
        made = Batches(examples, 3, 32, packed=packed)
        assert Counter(each for batch in made.once() for each in contents(batch)) == Counter(examples)
