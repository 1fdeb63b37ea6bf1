"""A batch in parts is the batch: same loss, same gradients, and dropout of its own in each part."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import runs
from mlx.utils import tree_flatten

from elm_mlx import blas, device
from elm_mlx.data.batches import Batch
from elm_mlx.device import Parts, most_parts
from elm_mlx.store import adapters
from elm_mlx.store.adapters import Adapter
from elm_mlx.train.step import Step


def batch(rows: int) -> Batch:
    return next(runs.batches(size=rows))


@pytest.mark.parametrize(("rows", "count", "expected"), [(4, 2, [2, 2]), (5, 2, [2, 3]), (2, 8, [1, 1]), (3, 1, [3])])
def test_rows_are_shared_out(rows: int, count: int, expected: list[int]) -> None:
    whole = batch(rows)
    pieces = whole.split(count)
    assert [len(piece.inputs) for piece in pieces] == expected
    for name in ("inputs", "targets", "trained", "segments"):
        np.testing.assert_array_equal(np.concatenate([getattr(piece, name) for piece in pieces]), getattr(whole, name))


def test_rows_without_segments_are_shared_out_too() -> None:
    assert [piece.segments for piece in next(runs.batches(packed=False)).split(2)] == [None, None]


@pytest.fixture(params=[2, 3])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(device, "most_parts", lambda *_: request.param)
    return int(request.param)


def test_loss_and_gradients_do_not_depend_on_the_number_of_parts(
    processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = Step(runs.model(), runs.settings())
    monkeypatch.setattr(device, "most_parts", lambda *_: 1)
    single = Step(runs.model(), runs.settings())
    assert several.parts == processors and single.parts == 1
    loss, grads, count = several.gradients(batch(5))
    expected, truth, same = single.gradients(batch(5))
    assert count == same and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert several.loss(batch(5))[0].item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, mine), (_, reference) in zip(tree_flatten(grads), tree_flatten(truth), strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5 * np.abs(reference).max(), err_msg=name)


def test_an_update_of_parts_is_the_same_each_time(processors: int) -> None:
    def losses() -> list[float]:
        step = Step(runs.model(), runs.settings())
        found = []
        for each in (batch(4), batch(3), batch(4)):
            loss, grads, count = step.gradients(each)
            step.apply(grads, loss * 0 + 1, count, 1e-2)
            found.append(loss.item())
        return found

    assert losses() == losses()


def test_parts_have_dropout_of_their_own(processors: int) -> None:
    model = runs.model()
    adapters.attach(model, Adapter("lora", {"transformer.layers.0.ffn.proj_1": 4}, 4.0, 0.5))
    model.train()
    step = Step(model, runs.settings())
    row = batch(1)
    same = Batch(*(np.repeat(each, processors, axis=0) for each in (row.inputs, row.targets, row.trained)), None, 0)
    built = step._computed(step._gradients, same)
    grads = [np.array(tree_flatten(grads)[-1][1]) for _, grads in built]
    assert all(np.abs(grads[0] - other).max() > 1e-6 for other in grads[1:])


def test_one_part_where_there_is_nothing_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "threads", lambda: 3)
    assert most_parts(8) == 3
    assert most_parts(device._GRADIENT_BYTES) == 1
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    assert most_parts(8) == 1


def test_what_fails_in_a_part_fails(processors: int) -> None:
    before = mx.default_stream(mx.cpu)
    with pytest.raises(ValueError, match="no graph"):
        for number, stream in enumerate(Parts(processors).streams(processors, [])):
            with stream:
                if number:
                    raise ValueError("no graph")
    assert mx.default_stream(mx.cpu) == before


@pytest.mark.usefixtures("two_threads")
def test_products_use_as_many_processors_afterwards_as_before() -> None:
    assert blas.threads() == 2
    with blas.one_thread():
        assert blas.threads() == 1
    assert blas.threads() == 2
