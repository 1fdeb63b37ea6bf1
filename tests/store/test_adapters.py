"""Adapters planned, written, read, and exchanged with mlx-lm; and every way in which a directory can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from elm_mlx import device
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import LINEARS, ModelConfig
from elm_mlx.model.network import Model
from elm_mlx.model.stored_layers import StoredLayer
from elm_mlx.safetensors_file import fingerprint
from elm_mlx.store import adapters
from elm_mlx.store.adapters import EMBEDDING, INPUT_EMBEDDING, Adapter, plan
from elm_mlx.store.loading import load_model, open_model

IDS = mx.array([[1, 9, 40, 7, 120, 33]])
ALL = [f"transformer.layers.{layer}.{name}" for layer in range(3) for name in LINEARS]


def trained(model: Model, adapter: Adapter) -> Model:
    """`model` with an adapter whose values are those of no start."""
    adapters.attach(model, adapter)
    for number, (_, module) in enumerate(model.named_modules()):
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(number))
            if "m" in module:
                module.m = module.m * (1 + 0.2 * mx.random.uniform(shape=module.m.shape, key=mx.random.key(number)))
    return model


def made(model_dir: Path, path: Path, **options: Any) -> tuple[Adapter, mx.array]:
    """An adapter at `path`, and the logits that it was saved with."""
    model = load_model(model_dir, "float32")
    adapter = plan(model.config, **options)
    trained(model, adapter)
    adapters.save(path, model, adapter)
    return adapter, model(IDS)


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.scaled_config(320, share_input_output_layers=False)
    return tiny.write_directory(tmp_path_factory.mktemp("untied") / "model", tiny.random_model(config), None)


# --- planned


def test_by_default_all_linears_of_all_layers(tiny_config: ModelConfig) -> None:
    adapter = plan(tiny_config)
    assert list(adapter.ranks) == ALL and set(adapter.ranks.values()) == {8}
    assert (adapter.kind, adapter.scale) == ("lora", 2.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_layers": 1}, ALL[8:]),
        ({"num_layers": 0, "targets": ["token_embeddings"]}, [EMBEDDING]),
        ({"targets": ["qkv_proj"]}, ALL[::4]),
        ({"targets": ["attn.*"], "num_layers": 2}, [*ALL[4:6], *ALL[8:10]]),
        ({"targets": ["layers.1.ffn.proj_2", "out_proj"]}, [ALL[1], ALL[5], ALL[7], ALL[9]]),
        ({"targets": ["*"]}, [EMBEDDING, *ALL]),
        ({"targets": ["layers.[02].*", "token_embeddings"], "num_layers": 1}, [EMBEDDING, *ALL[8:]]),
    ],
)
def test_targets(options: dict[str, Any], expected: list[str], tiny_config: ModelConfig) -> None:
    assert list(plan(tiny_config, **options).ranks) == expected


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ([2, 4, 6], {EMBEDDING: 6, ALL[0]: 2, ALL[4]: 4, ALL[8]: 6}),
        ({"*": 3, "2": 5, "token_embeddings": 9}, {EMBEDDING: 9, ALL[0]: 3, ALL[4]: 3, ALL[8]: 5}),
        ({"*": 3, "layers.0.*": 7}, {EMBEDDING: 3, ALL[0]: 7, ALL[4]: 3, ALL[8]: 3}),
    ],
)
def test_a_rank_for_each_layer(rank: Any, expected: dict[str, int], tiny_config: ModelConfig) -> None:
    adapter = plan(tiny_config, rank=rank, targets=["qkv_proj", "token_embeddings"], alpha=18)
    assert adapter.ranks == expected and adapter.scale == 18 / max(expected.values())


def test_rank_stabilised() -> None:
    assert plan(tiny.scaled_config(320), rank=16, alpha=8, rslora=True).scale == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_proj"]}, "no module is called 'q_proj'; there are token_embeddings, qkv_proj, out_proj"),
        ({"targets": ["lm_head"]}, "this model's head is its embedding"),
        ({"targets": []}, "nothing is left to adapt"),
        ({"num_layers": 0}, "nothing is left to adapt"),
        ({"num_layers": 4}, "num_layers is 4, and the model has 3 layers"),
        ({"num_layers": -2}, "num_layers is -2"),
        ({"rank": 0}, "rank of .* is 0"),
        ({"rank": True}, "rank of .* is True"),
        ({"rank": 10**9}, "rank of"),
        ({"rank": [8]}, "rank has 1 entry, and the model 3 layers"),
        ({"rank": {"qkv_proj": 4}}, "rank does not cover transformer.layers.0.attn.out_proj"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(options: dict[str, Any], message: str, tiny_config: ModelConfig) -> None:
    with pytest.raises(InputError, match=message):
        plan(tiny_config, **options)


# --- put into a model


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(dora: bool, tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir, "float32")
    before = model(IDS)
    adapter = plan(model.config, targets=["*"], rank=3, dora=dora, adapted_head=True)
    adapters.attach(model, adapter)
    assert mx.abs(model(IDS) - before).max() < 1e-4
    found = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
    assert found == adapter.shapes(model.config)


def test_a_seed_draws_the_same_adapter(tiny_model_dir: Path) -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = load_model(tiny_model_dir)
        adapters.attach(model, plan(model.config), seed)
        drawn.append(model.layers[1].ffn.proj_1.lora_a)
    assert mx.array_equal(drawn[0], drawn[1]) and not mx.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("gpu", [False, True])
def test_a_quantized_base(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed on a GPU, widened on a CPU: the same logits."""
    monkeypatch.setattr(device, "on_gpu", lambda: gpu)
    base = quantized(tmp_path / "base")
    _, expected = made(base, tmp_path / "adapter", targets=["*"], dora=True)
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    found = load_model(base, "float32", tmp_path / "adapter")(IDS)
    assert mx.abs(found - expected).max() / mx.std(expected) < 1e-2


def quantized(path: Path) -> Path:
    """What `mlx_lm.convert -q` writes, of a random model."""
    from mlx_lm import utils

    config = tiny.scaled_config(320, model_dim=128, ffn_dim_divisor=64)
    source = tiny.write_directory(path.with_name("dense"), tiny.random_model(config), None)
    model, values = utils.load_model(source)
    model, values = utils.quantize_model(model, values, group_size=64, bits=4)
    path.mkdir()
    utils.save_model(path, model)
    utils.save_config(values, path / "config.json")
    return path


# --- written and read

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "two layers": {"num_layers": 2, "targets": ["qkv_proj", "proj_2"]},
    "embedding": {"targets": ["token_embeddings"]},
    "embedding, adapted head": {"targets": ["*"], "adapted_head": True},
    "dora embedding, adapted head": {"targets": ["*"], "adapted_head": True, "dora": True},
    "ranks": {"rank": [2, 5, 3], "dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter, logits = made(tiny_model_dir, tmp_path, dropout=0.25, **KINDS[kind])
    model = load_model(tiny_model_dir, "float32", tmp_path)
    assert mx.allclose(model(IDS), logits, rtol=1e-5, atol=1e-5)
    assert not tree_flatten(model.trainable_parameters()) and not model.training
    assert adapters.read(tmp_path, model.config) == replace(adapter, directory=tmp_path)
    adapters.train_adapter(model)  # to go on training
    found = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
    assert found == adapter.shapes(model.config)


def test_notes_say_what_is_adapted(tiny_model_dir: Path, tmp_path: Path) -> None:
    made(tiny_model_dir, tmp_path, rank=[2, 5, 3], num_layers=2)
    notes = open_model(tiny_model_dir, adapter_path=tmp_path).notes
    assert notes[-1] == f"adapter {tmp_path}: LoRA of rank 3 to 5, scale 2, on 8 modules"


def test_weights_of_the_whole_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model_dir, "float32")
    model.layers[2].unfreeze()
    model.layers[2].ffn.proj_1.weight = model.layers[2].ffn.proj_1.weight * 1.5
    adapters.save(tmp_path, model, Adapter("full"))
    again = load_model(tiny_model_dir, "float32", tmp_path)
    assert mx.array_equal(again(IDS), model(IDS))
    stored = mx.load(str(tmp_path / "adapters.safetensors"))
    assert stored.keys() and all(name.startswith("transformer.layers.2.") for name in stored)


def test_weights_of_the_whole_model_are_computed_as_those_of_a_model_that_is_stored_so(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """In as few operations, and to the bit."""
    model = load_model(tiny_model_dir, "float32")
    weights = {name: 1.5 * value for name, value in tree_flatten(model.parameters()) if "proj" in name}
    model.unfreeze()
    model.load_weights(list(weights.items()), strict=False)
    adapters.save(tmp_path / "a", model, Adapter("full"))
    shutil.copytree(tiny_model_dir, tmp_path / "fused")
    own = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    stored = own | {name: value.astype(own[name].dtype) for name, value in weights.items()}
    mx.save_safetensors(str(tmp_path / "fused" / "model.safetensors"), stored)
    beside, one = load_model(tiny_model_dir, adapter_path=tmp_path / "a"), load_model(tmp_path / "fused")
    assert mx.array_equal(beside(IDS), one(IDS))
    layers = [layer for layer in beside.modules() if isinstance(layer, StoredLayer)]
    assert [layer.handle() is not None for layer in layers] == [True] * len(layers)
    assert len(layers) == sum(isinstance(layer, StoredLayer) for layer in one.modules())


def test_it_is_written_into_a_directory_that_is_not_there_yet(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model_dir)
    adapter = replace(plan(model.config), model_sha256=fingerprint(tiny_model_dir))
    adapters.attach(model, adapter)
    adapters.save(tmp_path / "new" / "adapter", model, adapter)
    load_model(tiny_model_dir, adapter_path=tmp_path / "new" / "adapter")


def test_a_place_that_cannot_be_written_to(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model_dir)
    adapter = plan(model.config)
    adapters.attach(model, adapter)
    (tmp_path / "file").write_text("")
    with pytest.raises(ElmError, match="cannot be made"):
        adapters.save(tmp_path / "file" / "adapter", model, adapter)


def test_other_weights_are_told_apart(tiny_model_dir: Path, tmp_path: Path, tiny_config: ModelConfig) -> None:
    other = tiny.write_directory(tmp_path / "other", tiny.random_model(tiny_config, seed=1), None)
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    assert fingerprint(copy) == fingerprint(tiny_model_dir) != fingerprint(other)
    stored = dict(mx.load(str(copy / "model.safetensors")))
    mx.eval(list(stored.values()))
    stored["transformer.norm.weight"] = stored["transformer.norm.weight"] * 1.5  # the last, and small
    mx.save_safetensors(str(copy / "model.safetensors"), stored)
    assert fingerprint(copy) != fingerprint(tiny_model_dir)

    model = load_model(tiny_model_dir)
    adapter = replace(plan(model.config), model_sha256=fingerprint(tiny_model_dir))
    adapters.attach(model, adapter)
    adapters.save(tmp_path / "adapter", model, adapter)
    load_model(tiny_model_dir, adapter_path=tmp_path / "adapter")
    with pytest.raises(InputError, match=r"adapter: was made for a model with other weights; .*take model_sha256 out"):
        load_model(other, adapter_path=tmp_path / "adapter")


def test_an_earlier_versions_hash_is_known(tiny_model_dir: Path, tmp_path: Path) -> None:
    old = Path(__file__).parents[1] / "fixtures" / "runs"
    kept = json.loads((old / "lora/checkpoints/step-00000005/adapter_config.json").read_text())["model_sha256"]
    assert fingerprint(old / "model", kept) == kept != fingerprint(old / "model")
    assert fingerprint(tiny_model_dir, kept) == fingerprint(tiny_model_dir) != kept


# --- mlx-lm


def theirs(model_dir: Path, adapter: Path) -> Any:
    """The model as plain mlx-lm opens it."""
    from mlx_lm.utils import load_adapters
    from mlx_lm.utils import load_model as load_theirs

    model, _ = load_theirs(model_dir)
    model.set_dtype(mx.float32)
    model = load_adapters(model, str(adapter))
    model.eval()
    return model


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding"])
def test_mlx_lm_reads_ours(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    _, logits = made(tiny_model_dir, tmp_path, **KINDS[kind])
    np.testing.assert_allclose(theirs(tiny_model_dir, tmp_path)(IDS), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dora", [False, True])
def test_mlx_lm_reads_ours_of_an_untied_model(dora: bool, untied_dir: Path, tmp_path: Path) -> None:
    _, logits = made(untied_dir, tmp_path, targets=["*"], dora=dora)
    np.testing.assert_allclose(theirs(untied_dir, tmp_path)(IDS), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(
    tuple(map(int, version("mlx-lm").split(".")[:2])) < (0, 32), reason="mlx-lm 0.31 passes over what it doesn't know"
)
def test_what_mlx_lm_would_compute_otherwise_it_refuses(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its tied head always reads the adapted embedding."""
    made(tiny_model_dir, tmp_path, targets=["token_embeddings", "qkv_proj"])
    with pytest.raises(ValueError, match=rf"{INPUT_EMBEDDING}.lora_a: not an adapter parameter"):
        theirs(tiny_model_dir, tmp_path)


TUNED: dict[str, dict[str, Any]] = {
    "default keys": {},
    "some": {"keys": ["attn.qkv_proj", "ffn.proj_2"]},
    "embedding": {"keys": ["attn.qkv_proj", "transformer.token_embeddings"]},
    "head": {"keys": ["lm_head", "transformer.layers.1.ffn.proj_1"]},
}


@pytest.mark.parametrize("num_layers", [-1, 2])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("keys", TUNED)
def test_ours_reads_mlx_lms(
    keys: str, kind: str, num_layers: int, tiny_model_dir: Path, untied_dir: Path, tmp_path: Path
) -> None:
    """Made by mlx-lm's own tuner, values moved, saved as `mlx_lm.lora` does."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model as load_theirs
    from mlx_lm.utils import save_config

    base = untied_dir if keys == "head" else tiny_model_dir
    model, _ = load_theirs(base)
    model.set_dtype(mx.float32)
    model.freeze()
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0, **TUNED[keys]}
    linear_to_lora_layers(model, num_layers, parameters, use_dora=kind == "dora")
    moved = [
        (name, value + 0.1 * mx.random.normal(value.shape, key=mx.random.key(number)))
        for number, (name, value) in enumerate(tree_flatten(model.trainable_parameters()))
    ]
    model.load_weights(moved, strict=False)
    model.eval()
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters, "seed": 0}
    save_config(config, tmp_path / "adapter_config.json")
    found = load_model(base, "float32", tmp_path)(IDS)
    np.testing.assert_allclose(found, model(IDS), rtol=2e-3, atol=2e-3)


# --- wrong


@pytest.fixture
def adapter_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    made(tiny_model_dir, tmp_path / "adapter", rank=4, targets=["qkv_proj", "proj_2"])
    return tmp_path / "adapter"


def refused(model: Path, adapter: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_model(model, adapter_path=adapter)
    assert "\n" not in str(caught.value)


NAME = "transformer.layers.1.attn.qkv_proj.lora_a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"tensor {NAME} is missing"),
        (lambda t: t.update({NAME: mx.zeros((64, 5))}), rf"tensor {NAME} is \(64, 5\), and the model needs \(64, 4\)"),
        (lambda t: t.update({NAME: mx.zeros((64,))}), rf"{NAME} is \(64,\), and the model needs \(64, 4\)"),
        (lambda t: t.update({NAME: mx.zeros((64, 4), mx.int32)}), rf"tensor {NAME} is I32"),
        (lambda t: t.update({NAME: mx.full((64, 4), float("nan"))}), rf"{NAME} holds NaN or infinite values"),
        (lambda t: t.update(intruder=mx.zeros(2)), "tensor intruder has no place"),
        (lambda t: t.update({NAME.replace("lora_a", "m"): mx.zeros(96)}), r"qkv_proj\.m has no place"),
        (lambda t: t.clear(), "is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, mx.array]], Any], message: str, adapter_dir: Path, tiny_model_dir: Path
) -> None:
    path = adapter_dir / "adapters.safetensors"
    tensors = dict(mx.load(str(path)))
    mx.eval(list(tensors.values()))
    change(tensors)
    mx.save_safetensors(str(path), tensors)
    refused(tiny_model_dir, adapter_dir, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, rf"{NAME.replace('1', '0')} is \(64, 4\), and the model needs \(64, 8\)"),
        ({"rank": 0}, "rank is 0: a whole number from 1 to "),
        ({"rank": "4"}, "rank is '4'"),
        ({"rank": None}, "lora_parameters: rank is missing"),
        ({"rank": 10**12}, "rank is 1000000000000"),
        ({"scale": None}, "scale is missing: a number between"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"scale": True}, "scale is True"),
        ({"dropout": 1}, "dropout is 1"),
        ({"dropout": "no"}, "dropout is 'no'"),
        ({"keys": "qkv_proj"}, "keys is 'qkv_proj': a list of names"),
        ({"keys": [7]}, r"keys is \[7\]"),
        ({"keys": []}, "keys names no module"),
        ({"keys": ["self_attn.q_proj"]}, "keys names 'self_attn.q_proj', and this model has no such module"),
        ({"keys": ["transformer.layers.9.attn.qkv_proj"]}, "no such module"),
        ({"keys": ["lm_head"]}, "no such module"),
        ({"keys": ["attn.qkv_proj"]}, r"proj_2\.lora_[ab] has no place"),
        ({"keys": ["attn.qkv_proj", "ffn.proj_2", "ffn.proj_1"]}, r"proj_1\.lora_[ab] is missing"),
        ({"keys": [EMBEDDING, INPUT_EMBEDDING]}, "the embedding twice"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(
    change: dict[str, Any], message: str, adapter_dir: Path, tiny_model_dir: Path
) -> None:
    path = adapter_dir / "adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_parameters"] |= change
    path.write_text(json.dumps(config))
    refused(tiny_model_dir, adapter_dir, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_tune_type": "ia3"}, "fine_tune_type is 'ia3': one of lora, dora, full is needed"),
        ({"fine_tune_type": []}, r"fine_tune_type is \[\]"),
        ({"fine_tune_type": "dora"}, r"qkv_proj\.m is missing"),
        ({"fine_tune_type": "full"}, "has no place"),
        ({"lora_parameters": None}, "lora_parameters: rank is missing"),
        ({"lora_parameters": [1]}, r"lora_parameters is \[1\]: an object is needed"),
        ({"num_layers": "all"}, "num_layers is 'all'"),
        ({"ranks": {"a": 1}}, "ranks and keys do not name the same modules"),
        ({"peft_type": "LORA", "lora_alpha": 8}, "holds neither adapter_model"),
    ],
)
def test_configs_that_make_no_sense_are_refused(
    change: dict[str, Any], message: str, adapter_dir: Path, tiny_model_dir: Path
) -> None:
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(tiny_model_dir, adapter_dir, message)


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_config_is_refused(content: bytes, adapter_dir: Path, tiny_model_dir: Path) -> None:
    (adapter_dir / "adapter_config.json").write_bytes(content)
    refused(tiny_model_dir, adapter_dir, r"adapter_config\.json: (not JSON|not UTF-8|holds no JSON object)")


def test_ranks_must_be_true(tiny_model_dir: Path, tmp_path: Path) -> None:
    made(tiny_model_dir, tmp_path, rank=[2, 5, 3])
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for rank, message in ((6, "the rank of .* is 6: one from 1 to 5"), (0, "is 0"), ("a", "is 'a'")):
        changed = config | {"ranks": {**config["ranks"], ALL[0]: rank}}
        path.write_text(json.dumps(changed))
        refused(tiny_model_dir, tmp_path, message)
    path.write_text(json.dumps(config | {"ranks": {**config["ranks"], ALL[0]: 1}}))
    refused(tiny_model_dir, tmp_path, rf"tensor {ALL[0]}\.lora_a is not 0 past the rank")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_named(size: int, adapter_dir: Path, tiny_model_dir: Path) -> None:
    path = adapter_dir / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(tiny_model_dir, adapter_dir, r"adapters\.safetensors: ")


def test_what_is_not_there_is_named(adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    (adapter_dir / "adapters.safetensors").unlink()
    refused(tiny_model_dir, adapter_dir, r"adapters\.safetensors: cannot be read")
    (adapter_dir / "adapter_config.json").unlink()
    refused(tiny_model_dir, adapter_dir, r"holds no adapter_config\.json, so it is not an adapter")
    refused(tiny_model_dir, tmp_path / "nowhere", "nowhere: no such directory; an adapter is one with")


def test_another_models_adapter_is_refused(adapter_dir: Path, tmp_path: Path) -> None:
    config = tiny.scaled_config(320, model_dim=96)
    other = tiny.write_directory(tmp_path / "wider", tiny.random_model(config), None)
    refused(other, adapter_dir, r"qkv_proj\.lora_a is \(64, 4\), and the model needs \(96, 4\)")
