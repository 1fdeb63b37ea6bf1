"""KV Prediction: the published layer maps, CoreNet's formulas, and a base that predicts itself."""

from __future__ import annotations

import kv_predictions
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from elm_mlx.errors import InputError
from elm_mlx.model.attention import Segments
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.kv_prediction import KVPrediction, kept_layers, layer_map, pruned_map

# CoreNet, projects/kv-prediction/openelm/*.yaml: layers of base and auxiliary, and the map.
PUBLISHED = [
    (  # 1.1B by 270M
        28, 16,
        "0 0 1 1 2 2 3 3 4 4 5 5 6 6 7 7 8 8 9 9 10 10 11 11 12 13 14 15",
    ),
    (  # 1.1B by 450M
        28, 20,
        "0 0 1 1 2 2 3 3 4 4 5 5 6 6 7 7 8 9 10 11 12 13 14 15 16 17 18 19",
    ),
    (  # 3B by 270M
        36, 16,
        "0 0 0 1 1 1 2 2 2 3 3 3 4 4 5 5 6 6 7 7 8 8 9 9 10 10 11 11 12 12 13 13 14 14 15 15",
    ),
    (  # 3B by 450M
        36, 20,
        "0 0 1 1 2 2 3 3 4 4 5 5 6 6 7 7 8 8 9 9 10 10 11 11 12 12 13 13 14 14 15 15 16 17 18 19",
    ),
    (  # 3B by 1.1B
        36, 28,
        "0 0 1 1 2 2 3 3 4 4 5 5 6 6 7 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27",
    ),
]  # fmt: skip
# Of an auxiliary of left-out layers: the base's layers, the share that is kept, and the map.
PRUNED = [
    (
        28, 0.25,
        "0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3 4 4 4 4 5 5 5 5 6 6 6 6",
    ),
    (
        28, 0.5,
        "0 0 1 1 2 2 3 3 4 4 5 5 6 6 7 7 8 8 9 9 10 10 11 11 12 12 13 13",
    ),
    (
        28, 0.75,
        "0 1 2 2 3 4 5 5 6 7 8 8 9 10 11 11 12 13 14 14 15 16 17 17 18 19 20 20",
    ),
    (
        36, 0.25,
        "0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3 4 4 4 4 5 5 5 5 6 6 6 6 7 7 7 7 8 8 8 8",
    ),
    (
        36, 0.5,
        "0 0 1 1 2 2 3 3 4 4 5 5 6 6 7 7 8 8 9 9 10 10 11 11 12 12 13 13 14 14 15 15 16 16 17 17",
    ),
    (
        36, 0.75,
        "0 1 2 2 3 4 5 5 6 7 8 8 9 10 11 11 12 13 14 14 15 16 17 17 18 19 20 20 21 22 23 23 24 25 26 26",
    ),
]  # fmt: skip
# The layers that these are made of, by the same configs and by kv_prediction.py.
KEPT = [
    (
        28, 0.25,
        "0 4 8 12 16 20 24",
    ),
    (
        28, 0.5,
        "0 2 4 6 8 10 12 14 16 18 20 22 24 26",
    ),
    (
        28, 0.75,
        "0 1 2 4 5 6 8 9 10 12 13 14 16 17 18 20 21 22 24 25 26",
    ),
    (
        36, 0.25,
        "0 4 8 12 16 20 24 28 32",
    ),
    (
        36, 0.5,
        "0 2 4 6 8 10 12 14 16 18 20 22 24 26 28 30 32 34",
    ),
    (
        36, 0.75,
        "0 1 2 4 5 6 8 9 10 12 13 14 16 17 18 20 21 22 24 25 26 28 29 30 32 33 34",
    ),
]  # fmt: skip
IDS = [3, 17, 5, 9, 250, 31, 8, 8, 100, 42, 7, 19]


@pytest.mark.parametrize(("base", "auxiliary", "expected"), PUBLISHED)
def test_published_maps(base: int, auxiliary: int, expected: str) -> None:
    assert " ".join(map(str, layer_map(base, auxiliary))) == expected


@pytest.mark.parametrize(("base", "keep", "expected"), PRUNED)
def test_published_maps_to_layers_that_are_left(base: int, keep: float, expected: str) -> None:
    assert " ".join(map(str, pruned_map(base, kept_layers(base, keep)))) == expected


@pytest.mark.parametrize(("base", "keep", "expected"), KEPT)
def test_layers_that_the_published_auxiliaries_have(base: int, keep: float, expected: str) -> None:
    assert " ".join(map(str, kept_layers(base, keep))) == expected


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
def test_a_base_of_any_depth_can_be_pruned(layers: int, keep: float) -> None:
    kept = kept_layers(layers, keep)
    places = pruned_map(layers, kept)
    assert [places[layer] for layer in kept] == [*range(len(kept))] and len(places) == layers


def test_no_auxiliary_is_deeper_than_its_base() -> None:
    with pytest.raises(InputError, match="3 layers, and its base only 2"):
        layer_map(2, 3)
    with pytest.raises(InputError, match=r"0.6 of the layers cannot be kept: 0.75, 0.5, 0.25 are possible"):
        kept_layers(8, 0.6)


def prediction(**fields: object) -> KVPrediction:
    """Three layers of 16-wide heads in groups of two, by two of 8-wide ones; other `fields` of the base."""
    base = tiny.random_model(tiny.scaled_config(320, **fields))
    return kv_predictions.prediction_of(base)


@pytest.mark.parametrize("fields", [
    {}, {"normalize_qk_projections": False}, {"num_gqa_groups": 4, "num_layers": 4},
    {"share_input_output_layers": False, "head_dim": 32},
])  # fmt: skip
def test_corenets_formulas(fields: dict[str, object]) -> None:
    made, ids = prediction(**fields), mx.array([IDS, IDS[::-1]])
    _, found = made.predict(ids)
    truth, hidden = made.true(ids), made.hidden(ids, found)
    for row, own in enumerate(ids.tolist()):
        expected, true = kv_predictions.predicted(made, own), kv_predictions.true(made.base, own)
        for got, wanted in ((found, expected), (truth, true)):
            for layer in range(len(made.places)):
                for kind in (0, 1):
                    np.testing.assert_allclose(got[layer][kind][row].swapaxes(0, 1), wanted[layer][kind], atol=2e-5)
        logits = kv_predictions.logits(made.base, own, expected, own_last=False)
        np.testing.assert_allclose(made.base.head(hidden)[row], logits, atol=2e-4 * logits.std())


def test_what_is_predicted_at_inference_is_what_the_formulas_say(branch: bool) -> None:
    made, ids = prediction(), mx.array([IDS, IDS[::-1]])
    own, caches = make_prompt_cache(made.auxiliary), make_prompt_cache(made.base)
    for piece in (ids[:, :1], ids[:, 1:8], ids[:, 8:-1]):
        made.read(piece, own, caches)
    found = made.base(ids[:, -1:], cache=caches)
    for row, each in enumerate(ids.tolist()):
        given = kv_predictions.predicted(made, each[:-1])
        logits = kv_predictions.logits(made.base, each, given, own_last=True)
        np.testing.assert_allclose(found[row], logits, atol=2e-4 * logits.std())
    # The auxiliary's own caches are as if it alone had read the ids: it may guess what follows.
    alone = make_prompt_cache(made.auxiliary)
    made.auxiliary(ids[:, :-1], cache=alone)
    for read, whole in zip(own, alone, strict=True):
        for got, wanted in zip(read.state, whole.state, strict=True):
            assert got is not None and wanted is not None
            np.testing.assert_allclose(got[:, :, : whole.offset], wanted[:, :, : whole.offset], atol=1e-4)


def test_a_base_that_predicts_itself_says_the_same(branch: bool) -> None:
    base, twin = (tiny.random_model(tiny.scaled_config(320)) for _ in range(2))
    made, ids = kv_predictions.identity_of(base, twin), mx.array([IDS * 3])
    whole = base(ids)
    hidden, found = made.predict(ids)
    np.testing.assert_allclose(base.head(made.hidden(ids, found)), whole, atol=1e-5)
    np.testing.assert_allclose(twin.head(hidden), whole, atol=1e-5)
    own, caches = make_prompt_cache(twin), make_prompt_cache(base)
    made.read(ids[:, :20], own, caches)
    made.read(ids[:, 20:-1], own, caches)
    np.testing.assert_allclose(base(ids[:, -1:], cache=caches), whole[:, -1:], atol=1e-4)


def test_texts_of_a_row_stay_apart() -> None:
    made = prediction()
    row, segments = mx.array([IDS[:5] + IDS[5:]]), Segments(mx.array([[1] * 5 + [2] * 7]))
    _, found = made.predict(row, segments)
    together = made.hidden(row, found, segments)
    for part in (slice(0, 5), slice(5, 12)):
        _, alone = made.predict(row[:, part])
        np.testing.assert_allclose(together[:, part], made.hidden(row[:, part], alone), atol=1e-4)


def test_only_auxiliary_and_maps_are_trained() -> None:
    made = prediction()
    names = {name.split(".")[0] for name, _ in tree_flatten(made.trainable_parameters())}
    assert names == {"auxiliary", "maps"}
