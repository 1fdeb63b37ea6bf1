"""What a run of KV prediction begins with: the auxiliary's weights, the fitted maps, and models that go together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kv_predictions
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from elm_mlx.data.batches import Batch
from elm_mlx.errors import InputError
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.store.loading import load_model
from elm_mlx.train import kvp_recipe, memory
from elm_mlx.train.kvp_training import KVPTraining, fit


@pytest.fixture
def recipe(tmp_path: Path) -> kvp_recipe.KVPRecipe:
    return kv_predictions.recipe_of(tmp_path)


def training(
    base: Path, recipe: Any, out: Path, auxiliary: Path | None = None, keep: float | None = None
) -> KVPTraining:
    return KVPTraining(base, auxiliary, keep, recipe, out)


def test_layers_that_are_left_begin_with_the_bases_weights(
    tiny_model_dir: Path, recipe: kvp_recipe.KVPRecipe, tmp_path: Path
) -> None:
    with training(tiny_model_dir, recipe, tmp_path / "out", keep=0.5) as run:
        assert run.places == (0, 0, 1) and run.config.num_layers == 2
        base, auxiliary = run._open_base(), run._open_auxiliary()
        trained = KVPrediction(base, auxiliary, run.places).trainable_parameters()
        assert run.trainable == sum(value.size for _, value in tree_flatten(trained))
    for mine, its in ((0, 0), (1, 2)):
        pairs = zip(tree_flatten(auxiliary.layers[mine]), tree_flatten(base.layers[its]), strict=True)
        assert all(mx.array_equal(one, other) and one.dtype == mx.float32 for (_, one), (_, other) in pairs)
    assert mx.array_equal(auxiliary.embed(mx.array([5])), base.embed(mx.array([5])))


def test_a_quantized_base_is_read_as_it_is(
    tiny_model_dir: Path, tiny_config: ModelConfig, recipe: kvp_recipe.KVPRecipe, tmp_path: Path, branch: bool
) -> None:
    tokenizer = (tiny_model_dir / "tokenizer.model").read_bytes()
    tiny.write_quantized(tmp_path / "q", tiny.random_model(tiny_config), tokenizer)
    with training(tmp_path / "q", recipe, tmp_path / "out", keep=0.25) as run:
        auxiliary = run._open_auxiliary()
    assert run.config.quantization is None and len(auxiliary.layers) == 1
    begun, own = auxiliary.layers[0].attn.out_proj.weight, load_model(tmp_path / "q", "float32").layers[0].attn.out_proj
    np.testing.assert_allclose(begun.T, own(mx.eye(begun.shape[1])), atol=1e-6)


def batches(count: int = 3) -> list[Batch]:
    draw = np.random.default_rng(0)
    drawn = [draw.integers(0, 320, (4, 33), dtype=np.int32) for _ in range(count)]
    return [Batch(ids[:, :-1], ids[:, 1:], np.ones((4, 32), np.bool_), None, 128) for ids in drawn]


def test_maps_from_a_twin_begin_as_the_identity() -> None:
    base, twin = (tiny.random_model(tiny.scaled_config(320)) for _ in range(2))
    made = KVPrediction(base, twin, range(3))
    fit(made, iter(batches()))
    for each in made.maps:
        for linear in (each.to_keys, each.to_values):
            np.testing.assert_allclose(linear.weight, np.eye(len(linear.weight)), atol=0.02)
            np.testing.assert_allclose(linear.bias, 0, atol=0.02)


def test_no_other_maps_are_nearer_to_what_the_base_projects() -> None:
    made = kv_predictions.prediction_of(tiny.random_model(tiny.scaled_config(320)))
    ids = np.concatenate([batch.inputs for batch in batches()])

    own, base = (
        [kv_predictions.projections(model.config, kv_predictions.weights_of(model), row) for row in ids]
        for model in (made.auxiliary, made.base)
    )

    def misses() -> float:
        total = 0.0
        for layer, place in enumerate(made.places):
            for kind, linear in enumerate((made.maps[layer].to_keys, made.maps[layer].to_values)):
                weight, bias = np.array(linear.weight), np.array(linear.bias)
                total += sum(
                    ((one[place][kind] @ weight.T + bias - other[layer][kind]) ** 2).sum()
                    for one, other in zip(own, base, strict=True)
                )
        return total

    fit(made, iter(batches()))
    fitted, maps = misses(), made.maps[1]
    for name in ("weight", "bias"):
        for linear in (maps.to_keys, maps.to_values):
            kept = linear[name]
            linear[name] = kept + 0.01 * mx.random.normal(kept.shape, key=mx.random.key(3))
            assert misses() > fitted
            linear[name] = kept


def narrower(path: Path, config: ModelConfig) -> Path:
    return tiny.write_directory(path, tiny.random_model(tiny.scaled_config(300)), None)


def shorter(path: Path, config: ModelConfig) -> Path:
    return tiny.write_directory(path, tiny.random_model(replace(config, max_context_length=64)), None)


def other_pieces(path: Path, config: ModelConfig) -> Path:
    return tiny.write_directory(path, tiny.random_model(config), tiny.train_tokenizer(character_coverage=0.99))


def deeper(path: Path, config: ModelConfig) -> Path:
    model = tiny.random_model(tiny.scaled_config(config.vocab_size, num_layers=4))
    return tiny.write_directory(path, model, tiny.train_tokenizer())


def packed(path: Path, config: ModelConfig) -> Path:
    return tiny.write_quantized(path, tiny.random_model(config), tiny.train_tokenizer())


@pytest.mark.parametrize(("make", "message"), [
    (narrower, "has 300 tokens and the base 320: an auxiliary model needs the base's vocabulary"),
    (shorter, "reads 64 tokens and the base [0-9,]+: an auxiliary model needs a context as long"),
    (other_pieces, "token [0-9]+ is .* and the base's .*: an auxiliary model needs the base's vocabulary"),
    (deeper, "auxiliary: the auxiliary model has 4 layers, and its base only 3; give a smaller one"),
    (packed, "is quantized, and cannot be trained: give what it was quantized from"),
])  # fmt: skip
def test_auxiliaries_that_do_not_go_with_the_base(
    tiny_model_dir: Path, tiny_config: ModelConfig, recipe: kvp_recipe.KVPRecipe, tmp_path: Path,
    make: Callable[[Path, ModelConfig], Path], message: str,
) -> None:  # fmt: skip
    path = make(tmp_path / "auxiliary", tiny_config)
    if not (path / "tokenizer.model").exists():
        shutil.copy(tiny_model_dir / "tokenizer.model", path)
    with pytest.raises(InputError, match=message):
        training(tiny_model_dir, recipe, tmp_path / "out", path)


def test_what_makes_no_run(
    tiny_model_dir: Path, family_dirs: dict[str, Path], recipe: kvp_recipe.KVPRecipe, tmp_path: Path
) -> None:
    wrong: list[tuple[Path, Path | None, float | None, str]] = [
        (tiny_model_dir, None, None, "give --aux, a smaller model, or --keep"),
        (tiny_model_dir, tiny_model_dir, 0.5, "give --aux, a smaller model, or --keep"),
        (tiny_model_dir, None, 0.4, "0.4 of the layers cannot be kept: 0.75, 0.5, 0.25 are possible"),
        (tiny_model_dir, None, 0.75, "--keep 0.75: keeps all of the 3 layers"),
        (family_dirs["llama"], None, 0.5, "is a Llama, and KV Prediction is for OpenELM"),
        (tiny_model_dir, family_dirs["llama"], None, "is a Llama, and KV Prediction is for OpenELM"),
    ]
    for base, auxiliary, keep, message in wrong:
        with pytest.raises(InputError, match=message):
            training(base, recipe, tmp_path / "out", auxiliary, keep)
    with pytest.raises(InputError, match="is a model directory; --out names another one"):
        training(tiny_model_dir, recipe, tiny_model_dir, keep=0.5)
    long = replace(recipe, data=replace(recipe.data, sequence_length=1024))
    with pytest.raises(InputError, match="sequences of 1,024 tokens exceed the model's context"):
        training(tiny_model_dir, long, tmp_path / "out", keep=0.5)


def test_memory_and_cost_count_both_models(tiny_model_dir: Path, recipe: kvp_recipe.KVPRecipe, tmp_path: Path) -> None:
    with training(tiny_model_dir, recipe, tmp_path / "out", keep=0.5) as run:
        load, cost = run.load(), run._cost()
    alone = replace(load, beside=None)
    more = memory.estimate(load).weights - memory.estimate(alone).weights
    assert more == 4 * run.base.parameters
    assert memory.estimate(load).activations > memory.estimate(alone).activations
    assert len(cost.linear) == 2 + 3 + 1 and len(cost.attention) == 5
