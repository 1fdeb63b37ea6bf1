"""Directories as `convert` and mlx-lm make them, and every way in which one can be broken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

from elm_mlx import blas, device
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.network import Model
from elm_mlx.store import loading
from elm_mlx.store.describe import describe
from elm_mlx.store.loading import load, load_model, open_model

IDS = mx.array([[1, 9, 40, 7, 120, 33]])


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that read float32 alone."""
    monkeypatch.setattr(blas, "reads_stored", lambda: False)


@pytest.fixture
def directory(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def tensors(directory: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(directory / "model.safetensors")))


def types(model: Model) -> set[mx.Dtype]:
    return {weight.dtype for _, weight in tree_flatten(model.parameters())}


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what is loaded


@pytest.mark.usefixtures("unread")
def test_weights_are_widened_on_a_cpu_and_left_on_a_gpu(branch: bool, tiny_model_dir: Path) -> None:
    loaded = open_model(tiny_model_dir)
    assert loaded.stored == "bfloat16"
    assert types(loaded.model) == {mx.bfloat16 if branch else mx.float32}
    assert bool(loaded.notes) is not branch
    stored = tensors(tiny_model_dir)
    for name, weight in tree_flatten(loaded.model.parameters()):
        assert mx.array_equal(weight, stored[name].astype(weight.dtype)), name


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", device.DTYPES)
def test_a_compute_dtype_is_obeyed(branch: bool, name: str, tiny_model_dir: Path) -> None:
    loaded = open_model(tiny_model_dir, name)
    assert types(loaded.model) == {device.DTYPES[name]}
    slow = f"computing in {name} by MLX's loops, which is slow on a CPU: leave out --compute-dtype there"
    assert loaded.notes == (() if branch or name == "float32" else (slow,))


@pytest.mark.usefixtures("unread")
def test_too_little_memory_leaves_16_bits(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    monkeypatch.setattr(device, "available_memory", lambda: 1000)
    loaded = open_model(tiny_model_dir)
    assert types(loaded.model) == {mx.bfloat16}
    assert "slowly on a CPU" in loaded.notes[0]


def test_the_tokenizer_comes_along_or_the_model_alone(directory: Path) -> None:
    change_config(directory, eos_token_id=[2, 5])
    model, tokenizer = load(str(directory))
    assert isinstance(model, Model)
    assert tokenizer.eos_ids == (2, 5)
    (directory / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"holds no tokenizer\.model"):
        load(directory)
    assert isinstance(load_model(directory), Model)


def test_a_loaded_model_is_not_trained_by_accident(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir)
    assert not tree_flatten(model.trainable_parameters()) and not model.training


def shard(directory: Path, **more_in_map: str) -> list[Path]:
    """Two files and an index, as a model of more than 5 GB has."""
    items = sorted(tensors(directory).items())
    mx.eval([value for _, value in items])
    files = [directory / f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    mx.save_safetensors(str(files[0]), dict(items[:9]))
    mx.save_safetensors(str(files[1]), dict(items[9:]))
    (directory / "model.safetensors").unlink()
    weight_map = {name: files[i >= 9].name for i, (name, _) in enumerate(items)} | more_in_map
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def test_shards_are_one_model(directory: Path, tiny_model_dir: Path) -> None:
    shard(directory)
    assert mx.array_equal(load_model(directory)(IDS), load_model(tiny_model_dir)(IDS))
    (directory / "model.safetensors.index.json").unlink()  # also without an index
    assert mx.array_equal(load_model(directory)(IDS), load_model(tiny_model_dir)(IDS))


def test_files_that_the_index_does_not_name_are_left_alone(directory: Path, tiny_model_dir: Path) -> None:
    shard(directory)
    (directory / "model-00003-of-00003.safetensors").write_bytes(b"left behind by another download")
    assert mx.array_equal(load_model(directory)(IDS), load_model(tiny_model_dir)(IDS))


# --- quantized


def quantize(directory: Path, out: Path, **options: Any) -> Path:
    """What `mlx_lm.convert -q` writes of `directory`."""
    from mlx_lm import utils

    model, config = utils.load_model(directory)
    model, config = utils.quantize_model(model, config, **{"group_size": None, "bits": None, **options})
    out.mkdir()
    utils.save_model(out, model)
    utils.save_config(config, out / "config.json")
    return out


def mixed(path: str, module: nn.Module) -> bool | dict[str, Any]:
    if "layers.1" in path:
        return False
    return {"group_size": 32, "bits": 8 if path.endswith(("embeddings", "out_proj")) else 3}


QUANTIZED: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 64},
    "2 bits": {"bits": 2, "group_size": 32},
    "6 bits": {"bits": 6, "group_size": 32},
    "8 bits": {"bits": 8, "group_size": 32},
    "mixed": {"bits": 4, "group_size": 32, "quant_predicate": mixed},
    "mxfp4": {"mode": "mxfp4"},
    "mxfp8": {"mode": "mxfp8"},
    "nvfp4": {"mode": "nvfp4"},
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("quantized")
    config = tiny.scaled_config(320, model_dim=128, ffn_dim_divisor=64)
    source = tiny.write_directory(folder / "source", tiny.random_model(config), None)

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = quantize(source, folder / kind.replace(" ", "-"), **QUANTIZED[kind])
        return made[kind]

    return make


def dequantized(directory: Path) -> dict[str, mx.array]:
    """Every weight that the directory stands for, in float32, each by its own entry in the config."""
    config = json.loads((directory / "config.json").read_text())["quantization"]
    stored, weights = tensors(directory), {}
    for name, weight in stored.items():
        path = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if f"{path}.scales" in stored:
            how = {k: v for k, v in {**config, **config.get(path, {})}.items() if k in ("group_size", "bits", "mode")}
            scales, biases = stored[f"{path}.scales"], stored.get(f"{path}.biases")
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            weight = mx.dequantize(weight, scales, biases, **how)
        weights[name] = weight.astype(mx.float32)
    return weights


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_unpacked_on_a_cpu(
    kind: str, quantized: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    loaded = open_model(quantized(kind))
    expected = dequantized(quantized(kind))
    found = dict(tree_flatten(loaded.model.parameters()))
    assert found.keys() == expected.keys() == loaded.model.config.shapes().keys()
    for name, weight in found.items():
        assert weight.dtype == mx.float32 and mx.array_equal(weight, expected[name]), name
    assert "quantized weights computed in float32" in loaded.notes[0]
    assert "-bit, group" in loaded.stored


@pytest.mark.skipif(not blas.reads_stored(), reason="cblas.c is not compiled here")
@pytest.mark.parametrize("kind", ["bfloat16", *(kind for kind in QUANTIZED if kind not in ("mxfp8", "nvfp4"))])
def test_a_cpu_reads_weights_as_they_are_stored(
    kind: str, quantized: Callable[[str], Path], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters are those of the file but for norms, and the logits the bits of widened ones."""
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    path = tiny_model_dir if kind == "bfloat16" else quantized(kind)
    loaded, stored = open_model(path), tensors(path)
    for name, weight in tree_flatten(loaded.model.parameters()):
        assert mx.array_equal(weight, stored[name]), name
        assert weight.dtype == (mx.float32 if "norm" in name else stored[name].dtype), name
    assert "weights computed in float32, read as they are stored" in loaded.notes[0]
    wide = open_model(path, widen=True)
    assert types(wide.model) == {mx.float32}
    assert mx.array_equal(loaded.model(IDS), wide.model(IDS))
    assert types(open_model(path, "float32").model) == {mx.float32}


@pytest.mark.skipif(not blas.rounds_rows(), reason="this processor does not multiply bfloat16")
def test_a_prompts_products_are_bfloat16s_on_request(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    exact, loaded = open_model(tiny_model_dir).model, open_model(tiny_model_dir, "bfloat16")
    assert "computed in float32, prompts in bfloat16, read as they are stored" in loaded.notes[0]
    ids = mx.arange(3, 60)[None]
    found, expected = loaded.model(ids), exact(ids)
    assert found.dtype == mx.float32 and not mx.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert mx.abs(found - expected).max() < 0.03 * mx.abs(expected).max()
    assert mx.array_equal(loaded.model(ids[:, :9]), exact(ids[:, :9]))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_stay_packed_on_a_gpu_or_where_memory_is_short(
    kind: str, quantized: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quantized(kind)
    reference = Model(ModelConfig.load(path / "config.json"))
    reference.load_weights(list(dequantized(path).items()))
    truth = np.array(reference(IDS))
    for gpu, free in ((True, None), (False, 1000)):
        monkeypatch.setattr(device, "on_gpu", lambda gpu=gpu: gpu)
        monkeypatch.setattr(device, "available_memory", lambda free=free: free)
        model = open_model(path).model
        stored = tensors(path)
        for name, weight in tree_flatten(model.parameters()):
            assert mx.array_equal(weight, stored[name]), name
        monkeypatch.setattr(device, "on_gpu", lambda: True)
        logits = np.array(open_model(path, "float32").model(IDS))
        assert np.abs(logits - truth).max() / truth.std() < 1e-3


@pytest.mark.usefixtures("unread")
def test_packed_float32_scales_stay_packed_where_memory_is_short(
    quantized: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(quantized("4 bits"), tmp_path / "model"))
    wide = {k: v.astype(mx.float32) if v.dtype == mx.bfloat16 else v for k, v in tensors(path).items()}
    mx.save_safetensors(str(path / "model.safetensors"), wide)
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    monkeypatch.setattr(device, "available_memory", lambda: 1000)
    assert types(open_model(path).model) == {mx.float32, mx.uint32}


def test_mlx_lm_computes_the_same_with_quantized_weights(
    quantized: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.utils import load_model as load_theirs

    path = quantized("mixed")
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    theirs, _ = load_theirs(path)
    ours = load_model(path)
    truth = np.array(theirs(IDS).astype(mx.float32))
    assert np.abs(np.array(ours(IDS).astype(mx.float32)) - truth).max() / truth.std() < 0.05


@pytest.mark.parametrize(
    "quantization",
    [
        None, [], "4", {}, {"bits": 4}, {"group_size": 64}, {"group_size": 0, "bits": 4},
        {"group_size": -64, "bits": 4}, {"group_size": 64, "bits": 0}, {"group_size": 64, "bits": -4},
        {"group_size": 64, "bits": 5}, {"group_size": 64, "bits": 7}, {"group_size": 64, "bits": 10**30},
        {"group_size": 1e999, "bits": 4}, {"group_size": float("nan"), "bits": 4}, {"group_size": 64, "bits": 4.5},
        {"group_size": 64, "bits": True}, {"group_size": "64", "bits": "4"}, {"group_size": 32, "bits": 4},
        {"group_size": 64, "bits": 4, "mode": "mxfp4"}, {"group_size": 64, "bits": 4, "mode": "guess"},
        {"group_size": 64, "bits": 4, "mode": []},
        {"group_size": 64, "bits": 4, "transformer.layers.0.attn.qkv_proj": {"group_size": 64, "bits": 8}},
        {"group_size": 64, "bits": 4, "transformer.layers.0.attn.qkv_proj": {}},
    ],
)  # fmt: skip
def test_a_quantization_that_does_not_fit_is_refused(
    quantization: Any, quantized: Callable[[str], Path], tmp_path: Path, branch: bool
) -> None:
    path = Path(shutil.copytree(quantized("4 bits"), tmp_path / "model"))
    change_config(path, quantization=quantization)
    refused(path, "quantiz")


def test_a_mode_of_null_is_unsaid(quantized: Callable[[str], Path], tmp_path: Path, branch: bool) -> None:
    path = Path(shutil.copytree(quantized("4 bits"), tmp_path / "model"))
    how: dict[str, Any] = {"group_size": 64, "bits": 4, "mode": None}
    change_config(path, quantization={**how, "transformer.layers.0.attn.qkv_proj": how})
    usual, found = open_model(quantized("4 bits")), open_model(path)
    assert found.stored == usual.stored
    weights = dict(tree_flatten(usual.model.parameters()))
    assert all(mx.array_equal(value, weights[name]) for name, value in tree_flatten(found.model.parameters()))
    assert describe(path).dtype == describe(quantized("4 bits")).dtype


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_a_quantized_weight_without_its_parts_is_refused(
    part: str, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(quantized("4 bits"), tmp_path / "model"))
    name = f"transformer.layers.1.ffn.proj_2.{part}"
    for change in (lambda _: None, lambda x: x[:, :-1], lambda x: x.view(mx.uint16)):
        stored = dict(mx.load(str(quantized("4 bits") / "model.safetensors")))
        changed = change(stored.pop(name))
        if changed is not None:
            stored[name] = changed
        mx.save_safetensors(str(path / "model.safetensors"), stored)
        refused(path, r"transformer\.layers\.1\.ffn\.proj_2")


# --- broken


def refused(path: Path, message: str, compute_dtype: str | None = None) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_model(path, compute_dtype)
    assert "\n" not in str(caught.value)


def rewrite(directory: Path, change: Callable[[dict[str, mx.array]], Any]) -> None:
    stored = tensors(directory)
    mx.eval(list(stored.values()))
    change(stored)
    mx.save_safetensors(str(directory / "model.safetensors"), stored)


NAME = "transformer.layers.2.attn.out_proj.weight"


def test_a_missing_tensor_is_named(directory: Path) -> None:
    rewrite(directory, lambda stored: stored.pop(NAME))
    refused(directory, f"tensor {NAME} is missing")


def test_a_tensor_too_many_is_named(directory: Path) -> None:
    rewrite(directory, lambda stored: stored.update(intruder=mx.zeros(2)))
    refused(directory, "tensor intruder has no place")


@pytest.mark.parametrize("shape", [(64, 1), (64, 65), (4096,), (1, 64, 64), (0, 64), ()])
def test_a_wrong_shape_is_named_with_the_right_one(directory: Path, shape: tuple[int, ...]) -> None:
    rewrite(directory, lambda stored: stored.update({NAME: mx.zeros(shape)}))
    refused(directory, rf"tensor {NAME} is \({', '.join(map(str, shape))},?\), and config\.json implies \(64, 64\)")


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.uint8, mx.bool_, mx.complex64])
@pytest.mark.parametrize("name", [NAME, "transformer.token_embeddings.weight", "transformer.norm.weight"])
def test_a_tensor_that_is_no_float_is_named(directory: Path, name: str, dtype: mx.Dtype) -> None:
    rewrite(directory, lambda stored: stored.update({name: stored[name].astype(dtype)}))
    refused(directory, f"tensor {name} is .*{str(dtype).removeprefix('mlx.core.')}")


def test_a_config_of_another_model_is_refused(directory: Path) -> None:
    change_config(directory, vocab_size=321)
    refused(directory, r"token_embeddings\.weight is \(320, 64\), and config\.json implies \(321, 64\)")
    change_config(directory, vocab_size=320, share_input_output_layers=False)
    refused(directory, r"lm_head\.weight is missing")
    change_config(directory, share_input_output_layers=True, normalize_qk_projections=False)
    refused(directory, r"_norm\.weight has no place")


def test_a_head_that_is_not_tied_is_not_tied_silently(directory: Path) -> None:
    rewrite(directory, lambda stored: stored.update({"lm_head.weight": mx.zeros((320, 64))}))
    refused(directory, r"lm_head\.weight has no place")


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1, -1000])
def test_a_truncated_file_is_named(directory: Path, size: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(directory, r"model\.safetensors: ")


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"\xff" * 4096, b"\x08\0\0\0\0\0\0\0{}      ", b"{" * 9999])
def test_another_file_under_that_name_is_refused(directory: Path, content: bytes) -> None:
    (directory / "model.safetensors").write_bytes(content)
    refused(directory, r"model/model\.safetensors: |missing")


def test_a_file_with_bytes_left_over_is_refused(directory: Path) -> None:
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(directory, r"model\.safetensors: its tensors take")


def test_a_folder_in_place_of_a_file_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()
    refused(directory, r"model\.safetensors: cannot be read")


def test_a_directory_without_weights_says_so(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    refused(directory, "holds no model.safetensors")


def test_a_missing_shard_is_named(directory: Path) -> None:
    files = shard(directory)
    files[1].unlink()
    refused(directory, r"model-00002-of-00002\.safetensors is missing, which model\.safetensors\.index\.json names")


def test_a_tensor_in_two_files_is_refused(directory: Path) -> None:
    first, second = shard(directory)
    both = dict(mx.load(str(first))) | {NAME: mx.zeros((64, 64))}
    mx.eval(list(both.values()))
    mx.save_safetensors(str(first), both)
    refused(directory, f"{second.name}: tensor {NAME} is in another file")


@pytest.mark.parametrize(
    "index",
    [b"", b"{}", b"[]", b'{"weight_map": null}', b'{"weight_map": []}', b'{"weight_map": {"a": 7, "b": [1]}}',
     b'{"weight_map": {"a": "../../etc/passwd"}}', b'{"weight_map": {}}', b"[" * 100_000, b"\xff\xfe"],
    ids=lambda index: repr(index[:40]),
)  # fmt: skip
def test_an_index_that_makes_no_sense_is_refused(directory: Path, index: bytes) -> None:
    (directory / "model.safetensors.index.json").write_bytes(index)
    refused(directory, "weight_map|is missing|holds no model.safetensors|JSON|UTF-16")


def test_a_run_of_pretraining_that_is_not_done_is_told_from_a_model(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "checkpoints").mkdir()
    refused(directory, r"no model\.safetensors yet, .*; `elm-mlx average \S+ --last 1 --out DIR` makes a model of its")


def test_weights_that_are_cut_while_they_are_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*arguments: Any) -> Any:
        os.truncate(directory / "model.safetensors", 3000)
        return computation(*arguments)

    computation = loading.device.computation
    monkeypatch.setattr(loading.device, "computation", cut)
    with pytest.raises(ElmError, match=r"tensor transformer\..* cannot be loaded: \[read\]"):
        loading.open_model(directory)


def test_no_directory_no_config(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere: no such directory; `elm-mlx convert")
    refused(tmp_path, "holds no config.json")
    (tmp_path / "model.pt").write_bytes(b"")
    refused(tmp_path / "model.pt", r"model\.pt: a file, not a model directory; `elm-mlx convert")


def test_a_damaged_tokenizer_is_named(directory: Path) -> None:
    path = directory / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:1000])
    refused(directory, r"tokenizer\.model")


def test_a_compute_dtype_that_does_not_exist_is_refused(tiny_model_dir: Path) -> None:
    refused(tiny_model_dir, "compute dtype 'int4' is not one of", "int4")


def test_float64_weights_are_read(directory: Path) -> None:
    """NumPy writes them when one forgets."""
    wide = {name: np.array(value.astype(mx.float32), np.float64) for name, value in tensors(directory).items()}
    save_file(wide, directory / "model.safetensors")
    try:
        model = load_model(directory, "float32")
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert types(model) == {mx.float32}
