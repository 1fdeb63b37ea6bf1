"""Steps and pieces of prompts that are one call of C, against layers one by one; and the memory they write into."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import other_models
import pytest
import tiny

from elm_mlx import blas
from elm_mlx.inference import rows as rows_module
from elm_mlx.inference.rows import Rows, prefill
from elm_mlx.model import described, packed
from elm_mlx.model.cache import KVCache, make_prompt_cache
from elm_mlx.model.network import Model
from elm_mlx.model.whole_step import WholeStep, whole_step
from elm_mlx.store import loading

pytestmark = pytest.mark.skipif(
    blas.own("elm_mlx_retire") is None, reason="cblas.c is not compiled here, so a step is MLX's"
)
MANY = blas.computes_many_rows()  # else OpenBLAS multiplies more than sixteen rows
LONGROPE = {"rope_scaling": {"type": "longrope", "long_factor": [3.0] * 8, "short_factor": [1.5] * 8}}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "head_dim": 20}, "mistral": {"sliding_window": 12}, "phi3": LONGROPE, "olmo": {},
    "olmo2": {}, "olmo3": {},
}  # fmt: skip


@pytest.fixture
def model() -> Model:
    return tiny.random_model(tiny.scaled_config(320))


def ids_of(length: int, first: int = 3) -> list[int]:
    return [(first + 5 * at) % 60 for at in range(length)]


def started(model: Any, lengths: list[int], kv_bits: int | None = None) -> Rows:
    rows = Rows(model)
    for row, length in enumerate(lengths):
        caches = make_prompt_cache(model, kv_bits)
        mx.eval(prefill(model, ids_of(length, row), caches))
        rows.join(caches, ids_of(length, row))
    return rows


def steps(rows: Rows, count: int, first: int = 7) -> mx.array:
    """Returns the logits `(count, rows, vocab_size)` of steps that follow each other."""
    tokens = [mx.array([(first * row + at + 1) % 60 for row in range(len(rows))]) for at in range(count)]
    return mx.stack([rows.step(token) for token in tokens])


def writes_in_place(rows: Rows) -> bool:
    return all(isinstance(cache.writer, WholeStep) for cache in rows.caches)


def close(found: mx.array, expected: mx.array, share: float = 1e-5) -> bool:
    return bool((mx.abs(found - expected).max() < share * (expected.max() - expected.min())).item())


@pytest.fixture
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def change() -> None:
        monkeypatch.setattr(rows_module, "whole_step", lambda *_: None)
        monkeypatch.setattr(rows_module, "whole_piece", lambda *_: None)

    return change


def model_of(name: str, tmp_path: Path) -> Any:
    """Returns a small OpenELM, or one of another family."""
    if name == "openelm":
        return tiny.random_model(tiny.scaled_config(320))
    changes = {"hidden_size": 96, "head_dim": 16, **FAMILIES[name]}
    return loading.load_model(other_models.write_model(tmp_path / "m", name, changes))


@pytest.mark.parametrize("name", ["openelm", *FAMILIES])
@pytest.mark.usefixtures("two_threads")
def test_logits_are_those_of_layers_one_by_one(name: str, tmp_path: Path, layer_by_layer: Callable[[], None]) -> None:
    """Of one text and several, across spans of attention and a cache that grows, and of guesses that follow a text."""
    model = model_of(name, tmp_path)
    found = []
    for whole in (True, False):
        if not whole:
            layer_by_layer()
        rows = started(model, [250])
        found.append([steps(rows, 12), rows.look_ahead(mx.array([ids_of(9)]))])
        assert writes_in_place(rows) is whole
        together, many = started(model, [3, 17, 254, 40, 5]), started(model, [*range(3, 23)])
        found[-1] += [steps(together, 8), steps(many, 3)]
        mx.eval(found)
        assert writes_in_place(together) is whole and writes_in_place(many) is (whole and MANY)
    for ours, expected in zip(*found, strict=True):
        assert close(ours, expected)


@pytest.mark.skipif(not MANY, reason="the rows of a prompt are OpenBLAS's here")
@pytest.mark.parametrize(
    ("name", "bits"), [*((name, None) for name in ("openelm", *FAMILIES)), ("wide", 8), ("wide", 4)]
)
@pytest.mark.usefixtures("two_threads")
def test_pieces_have_the_bits_of_layers_one_by_one(
    name: str, bits: int | None, tmp_path: Path, layer_by_layer: Callable[[], None]
) -> None:
    """In caches that are empty and grow, of few rows and of more than are computed together."""
    wide = name == "wide"
    model = tiny.random_model(tiny.scaled_config(320, head_dim=64)) if wide else model_of(name, tmp_path)
    cases = [([1], 128), ([2], 128), ([5], 128), ([17], 128), ([40, 3, 90, 200], 64), ([700], 600)]
    found: list[list[tuple[mx.array, list[mx.array]]]] = []
    for whole in (True, False):
        if not whole:
            layer_by_layer()
        found.append([])
        for lengths, step in cases:
            caches, ids, read = make_prompt_cache(model, bits), ids_of(sum(lengths)), 0
            for length in lengths:
                logits = prefill(model, ids[read : read + length], caches, step, text_length=sum(lengths))
                read += length
                assert [cache.offset for cache in caches] == [read] * len(caches)
            mx.eval(logits)
            assert read < 3 or all(isinstance(cache.writer, WholeStep) is whole for cache in caches)
            held = [array[:, :, :read] for cache in caches for array in cache.state if array is not None]
            found[-1].append((logits, held))
    for (ours, held), (expected, kept) in zip(*found, strict=True):
        assert mx.array_equal(ours, expected)
        assert all(mx.array_equal(one, other) for one, other in zip(held, kept, strict=True))


@pytest.mark.usefixtures("two_threads")
def test_a_row_has_the_same_bits_in_any_company(model: Model) -> None:
    """Alone, with texts of other lengths, and as a guess behind a text."""
    lengths = [3, 300, 40, *range(5, 18)]
    alone = [steps(started(model, [length]), 2)[:, 0] for length in lengths[:1]]
    together = steps(started(model, lengths), 2)
    assert mx.array_equal(together[:, 0], alone[0])
    for count in (2, 7, 16):
        assert mx.array_equal(steps(started(model, lengths[:count]), 2), together[:, :count]), count
    guesses = ids_of(16, 9)
    ahead = started(model, [300]).look_ahead(mx.array([guesses]))
    rows = started(model, [300])
    assert mx.array_equal(mx.concatenate([rows.step(mx.array([token])) for token in guesses]), ahead)


@pytest.mark.parametrize("name", ["openelm", "llama"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
def test_guesses_behind_several_texts_have_the_bits_of_steps(
    name: str, whole: bool, tmp_path: Path, layer_by_layer: Callable[[], None]
) -> None:
    """In as many slots as there are texts, and in more; and those that are right need not be computed again."""
    if not whole:
        layer_by_layer()
    model = model_of(name, tmp_path)
    for lengths, count in (([300, 3], 8), ([3, 255, 40], 5), ([5, 254, 17, 63], 4), ([9, 8, 70, 6, 5, 4, 3, 2], 2)):
        guesses = mx.array([ids_of(count, 11 * row) for row in range(len(lengths))])
        kept = [1 + row % count for row in range(len(lengths))]
        rows = started(model, lengths)
        mx.eval(steps(rows, 2))
        ahead = rows.look_ahead(guesses).reshape(len(lengths), count, -1)
        assert rows.lengths == [length + 2 for length in lengths]
        rows.resize([length + more for length, more in zip(rows.lengths, kept, strict=True)])
        after = steps(rows, 3)
        one_by_one = started(model, lengths)
        mx.eval(steps(one_by_one, 2))
        for place in range(count):
            expected = one_by_one.step(guesses[:, place])
            assert mx.array_equal(expected, ahead[:, place]), (lengths, place)
        one_by_one.resize([length + 2 + more for length, more in zip(lengths, kept, strict=True)])
        assert mx.array_equal(steps(one_by_one, 3), after), lengths


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.usefixtures("two_threads")
def test_quantized_keys_are_written_and_read_as_they_are_layer_by_layer(
    bits: int, head_dim: int, layer_by_layer: Callable[[], None]
) -> None:
    """Of one text and several, of guesses, and across a cache that grows: the same codes, the same logits."""
    model = tiny.random_model(tiny.scaled_config(320, head_dim=head_dim))
    found, held = [], []
    for whole in (True, False):
        if not whole:
            layer_by_layer()
        rows = started(model, [250], bits)
        ahead = rows.look_ahead(mx.array([ids_of(9)]))
        rows.resize([253])
        together = started(model, [3, 17, 254, 40, 5], bits)
        found.append([steps(rows, 12), ahead, steps(together, 8)])
        mx.eval(found)
        assert writes_in_place(rows) is writes_in_place(together) is whole
        first = [*rows.caches[0].state, *together.caches[0].state]  # whose keys depend on no other
        held.append([array[:, :, : rows.lengths[0]] for array in first if array is not None])
    for ours, expected in zip(*found, strict=True):
        assert close(ours, expected, 2e-3)  # rounded otherwise, a number may get the next code
    for ours, expected in zip(*held, strict=True):
        assert mx.array_equal(ours, expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: x * 1e-9, lambda x: x * 0, lambda x: x * 1e30, lambda x: x[:1] + 0 * x]
)
def test_numbers_are_quantized_as_mlx_does_it(bits: int, change: Callable[[mx.array], mx.array]) -> None:
    """Those of any size, and a head's that are all the same."""
    model = tiny.random_model(tiny.scaled_config(320, head_dim=64))
    own = model.transformer.layers[0].attn
    weight, first = own.qkv_proj.weight, (own.num_heads + own.num_kv_heads) * own.head_dim
    own.qkv_proj.weight = mx.concatenate([weight[:first], change(weight[first:])])
    quantized, plain = started(model, [3], bits), started(model, [3])
    mx.eval(steps(quantized, 20), steps(plain, 20))
    assert writes_in_place(quantized) and writes_in_place(plain)
    floats = mx.concatenate([array for array in plain.caches[0].state if array is not None], axis=1)
    for ours, expected in zip(quantized.caches[0].state, packed.pack(floats[:, :, :23], bits), strict=True):
        assert ours is not None and mx.array_equal(ours[:, :, :23], expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.usefixtures("two_threads")
def test_a_row_of_codes_has_the_same_bits_in_any_company(bits: int) -> None:
    model = tiny.random_model(tiny.scaled_config(320, head_dim=64))
    lengths = [300, 3, 40, *range(5, 18)]
    alone, guesses = steps(started(model, lengths[:1], bits), 2)[:, 0], ids_of(16, 9)
    for count in (2, 7, 16):
        assert mx.array_equal(steps(started(model, lengths[:count], bits), 2)[:, 0], alone), count
    ahead = started(model, [300], bits).look_ahead(mx.array([guesses]))
    rows = started(model, [300], bits)
    assert mx.array_equal(mx.concatenate([rows.step(mx.array([token])) for token in guesses]), ahead)


def test_steps_write_where_the_arrays_are(model: Model) -> None:
    rows = started(model, [5])
    mx.eval(steps(rows, 1))
    writer = rows.caches[0].writer
    mx.eval(steps(rows, 3), rows.look_ahead(mx.array([ids_of(3)])))
    rows.resize([rows.lengths[0] + 1])
    mx.eval(steps(rows, 3))
    assert rows.caches[0].writer is writer and not rows.traced
    before = [described.address(array) for array in rows.caches[0].state if array is not None]  # ends it
    assert rows.caches[0].writer is None and not writes_in_place(rows)
    mx.eval(steps(rows, 1))
    assert writes_in_place(rows) and rows.caches[0].writer is not writer
    assert [described.address(array) for array in rows.caches[0].state if array is not None] == before, "was copied"


def test_what_others_have_of_a_cache_stays_what_it_is(model: Model) -> None:
    """Arrays that were handed out, copies of all kinds, and those of two texts that part."""
    rows = started(model, [40])
    mx.eval(steps(rows, 4))
    cache = rows.caches[0]
    length = rows.lengths[0]
    taken = {
        "state": lambda: cache.state,
        "deep copy": lambda: copy.deepcopy(cache).state,
        "copy": lambda: copy.copy(cache).state,
        "single": lambda: cache.single(0, length).state,
        "block": lambda: cache.block(0, 0, length),
    }
    for name, take in taken.items():
        arrays = take()
        expected = [mx.array(memoryview(array)) for array in mx.contiguous(mx.stack(arrays)[:, 0])]
        rows.resize([length - 4])
        mx.eval(steps(rows, 4, first=1))  # over what is in them
        assert writes_in_place(rows)
        for array, values in zip(arrays, expected, strict=True):
            assert mx.array_equal(array[0], values), name


def test_texts_that_part_go_on_apart(model: Model, layer_by_layer: Callable[[], None]) -> None:
    found = []
    for whole in (True, False):
        if not whole:
            layer_by_layer()
        rows = started(model, [40])
        mx.eval(steps(rows, 2))
        other = Rows(model)
        other.join(copy.deepcopy(rows.caches), None)
        pairs = [(steps(rows, 1, at), steps(other, 1, at + 3)) for at in range(4)]
        joined = Rows(model)
        joined.join(rows.copy(0), None)
        joined.join(other.copy(0), None)
        found.append([*(part for pair in pairs for part in pair), steps(joined, 2), steps(rows, 1)])
        joined.leave(0)
        found[-1].append(steps(joined, 2))
        mx.eval(found)
    for ours, expected in zip(*found, strict=True):
        assert close(ours, expected)


@pytest.mark.parametrize("place", ["lend", "description", "matrix"])
def test_caches_are_whole_where_a_step_could_not_be_made(
    model: Model, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an interrupt, or for want of memory."""
    expected = steps(started(model, [40]), 3)
    rows = started(model, [40])
    found = [steps(rows, 1)]
    rows.caches[0].state  # noqa: B018 - which ends the step
    owner = KVCache if place == "lend" else described
    called, kept = [], getattr(owner, place)

    def interrupted(*given: Any) -> Any:
        called.append(given)
        if place != "lend" or len(called) == 2:
            raise KeyboardInterrupt
        return kept(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, place, interrupted)
        rows.step(mx.array([2]))
    assert (
        called and [array.shape[2] for cache in rows.caches for array in cache.state if array is not None] == [256] * 6
    )
    found += [rows.step(mx.array([token])) for token in (2, 3)]
    assert mx.array_equal(mx.concatenate([found[0][0], *found[1:]]), expected[:, 0])
    assert writes_in_place(rows)


def test_what_is_running_outlives_model_and_caches() -> None:
    model = tiny.random_model(tiny.scaled_config(320))
    expected = steps(started(model, [20]), 6)
    mx.eval(expected)
    pending = steps(started(model, [20]), 6)  # whose caches nobody has any more
    del model
    gc.collect()
    junk = [mx.random.normal((1 << 14,)) for _ in range(50)]  # where they were
    mx.eval(junk)
    assert mx.array_equal(pending, expected)


def test_places_outside_the_caches_give_no_numbers(model: Model) -> None:
    rows = started(model, [5])
    mx.eval(steps(rows, 1))
    writer = rows.caches[0].writer
    assert isinstance(writer, WholeStep)
    x = mx.ones((2, model.config.model_dim))
    for places in ([[0], [1]], [[-1, 0]], [[3, 5]]):  # there is one slot, and its rows follow each other
        assert mx.isnan(writer(x, mx.array(places))).all().item(), places
    assert mx.isfinite(writer(x, mx.array([[5, 6]]))).all().item()
    for wanted in range(3):
        assert mx.isfinite(writer.read(x, 5, 0, wanted)).all(axis=1).tolist() == [False, False, True, True][wanted:][:2]
    rows.caches[0].state  # noqa: B018 - which ends it
    assert mx.isnan(writer(x, mx.array([[5, 6]]))).all().item()


def test_other_caches_are_stepped_by_mlx(model: Model) -> None:
    few = model.in_c(1)
    assert few is not None
    rows = started(model, [5])
    assert whole_step(few, rows.caches, 512, 5) is None
    half = KVCache()
    half.update_and_fetch(*[mx.zeros((1, 1, 5, 32), mx.float16)] * 2)
    assert whole_step(few, [half], 1, 5) is None


def test_caches_of_which_some_have_grown_get_the_same_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C as they grow, one after the other: a step writes where one of them says."""
    model = tiny.random_model(tiny.scaled_config(320, num_gqa_groups=1, head_dim=64, model_dim=256))
    ids = [(3 + 5 * i) % 60 for i in range(400)]
    expected = prefill(model, ids[:220], make_prompt_cache(model))
    caches = make_prompt_cache(model)
    mx.eval(prefill(model, ids[:200], caches))
    reserve, count = KVCache.reserve, 0

    def interrupted(self: KVCache, length: int) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        reserve(self, length)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "reserve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prefill(model, ids[200:300], caches)
    assert len({cache.capacity for cache in caches}) == 2
    assert mx.array_equal(prefill(model, ids[200:220], caches), expected)
    assert len({cache.capacity for cache in caches}) == 1
