"""Fused models against the adapter's arithmetic in NumPy, and the proof that refuses what is not equal."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from commands import Run
from mlx.utils import tree_map

from elm_mlx.errors import ElmError, InputError
from elm_mlx.model import lora_layers
from elm_mlx.model.config import ModelConfig
from elm_mlx.store import adapters, fused_weights
from elm_mlx.store import fusion as module
from elm_mlx.store.adapters import Adapter, plan
from elm_mlx.store.fusion import Fusion, fuse
from elm_mlx.store.loading import load, load_model, read_weights

IDS = mx.array([[1, 9, 40, 7, 120, 33]])


def adapter_for(model_dir: Path, path: Path, size: float = 0.05, **options: Any) -> Path:
    """An adapter of values that move the logits."""
    model = load_model(model_dir, "float32")
    adapter = plan(model.config, **options)
    adapters.attach(model, adapter)
    for number, (_, part) in enumerate(model.named_modules()):
        if "lora_b" in part:
            part.lora_b = size * mx.random.normal(part.lora_b.shape, key=mx.random.key(number))
            if "m" in part:
                part.m = part.m * (1 + size * mx.random.uniform(shape=part.m.shape, key=mx.random.key(number)))
    adapters.save(path, model, adapter)
    return path


def merged(model_dir: Path, adapter_dir: Path) -> dict[str, np.ndarray]:
    """Every weight that model and adapter amount to, float64."""
    config = ModelConfig.load(model_dir / "config.json")
    adapter = adapters.read(adapter_dir, config)
    values = {name: np.array(value, np.float64) for name, value in adapters.read_values(adapter, config).items()}
    weights = dense(model_dir)
    head = weights["transformer.token_embeddings.weight"]
    for name in adapter.ranks:
        product = adapter.scale * values[f"{name}.lora_a"] @ values[f"{name}.lora_b"]
        weight = weights[f"{name}.weight"] + (product if "embeddings" in name else product.T)
        if adapter.kind == "dora":
            weight *= (values[f"{name}.m"] / np.linalg.norm(weight, axis=1))[:, None]
        weights[f"{name}.weight"] = weight
    if adapter.unties(config):
        weights["lm_head.weight"] = head
    return weights


def dense(model_dir: Path) -> dict[str, np.ndarray]:
    config = ModelConfig.load(model_dir / "config.json")
    weights, packing = read_weights(model_dir, config)
    found = {}
    for name in config.shapes():
        weight, stem = weights[name], name.removesuffix("weight")
        if name in packing:
            weight = lora_layers.dequantize(
                weight, weights[f"{stem}scales"], weights.get(f"{stem}biases"), **packing[name]
            )
        found[name] = np.array(weight.astype(mx.float32), np.float64)
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Callable[[str], Path]:
    """Models by the type of their weights, "4-bit" too, "mixed" with an embedding of 8 bits."""
    folder = tmp_path_factory.mktemp("bases")
    model = tiny.random_model(tiny.scaled_config(320, model_dim=128, ffn_dim_divisor=64))
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            dtype = {"float32": mx.float32, "float16": mx.float16}.get(kind, mx.bfloat16)
            tokenizer = tiny_tokenizer_file.read_bytes()
            path = tiny.write_directory(folder / kind, model, tokenizer, dtype)
            made[kind] = quantized(path, kind == "mixed") if kind in ("4-bit", "mixed") else path
        return made[kind]

    return make


def quantized(path: Path, mixed: bool) -> Path:
    from mlx_lm import utils

    def predicate(name: str, _: Any) -> bool | dict[str, Any]:
        return {"group_size": 32, "bits": 8} if mixed and name.endswith("embeddings") else True

    model, config = utils.load_model(path)
    model, config = utils.quantize_model(model, config, group_size=64, bits=4, quant_predicate=predicate)
    (path / "model.safetensors").unlink()
    utils.save_model(path, model)
    utils.save_config(config, path / "config.json")
    return path


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "last layer": {"num_layers": 1, "targets": ["qkv_proj"]},
    "embedding": {"targets": ["*"]},
    "dora embedding, adapted head": {"targets": ["*"], "dora": True, "adapted_head": True},
    "ranks": {"rank": [2, 5, 3]},
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_is_the_merged_one_rounded_once(
    kind: str, dtype: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(dtype)
    adapter = adapter_for(base, tmp_path / "adapter", **KINDS[kind])
    done = fuse(base, adapter, tmp_path / "fused")
    assert (
        done.dtype == dtype
        and "two other books" in done.compared
        and done.tolerance
        and done.rms / done.spread < done.tolerance
    )
    found, expected = dense(tmp_path / "fused"), merged(base, adapter)
    assert found.keys() == expected.keys() and done.untied == (kind == "embedding")
    rounding = {"float32": 1e-5, "float16": 2**-11, "bfloat16": 2**-8}[dtype] * 1.01
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, rtol=rounding, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_model_computes_what_model_and_adapter_do(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = adapter_for(bases("float32"), tmp_path / "adapter", **KINDS[kind])
    fuse(bases("float32"), adapter, tmp_path / "fused")
    expected = load_model(bases("float32"), None, adapter)(IDS)
    assert mx.allclose(load_model(tmp_path / "fused")(IDS), expected, rtol=1e-4, atol=1e-4)
    assert not mx.allclose(load_model(bases("float32"))(IDS), expected, rtol=1e-2, atol=1e-2)


def test_mlx_lm_reads_a_fused_model_with_a_head_of_its_own(bases: Callable[[str], Path], tmp_path: Path) -> None:
    from mlx_lm.utils import load_model as load_theirs

    for kind in ("float32", "mixed"):
        adapter = adapter_for(bases(kind), tmp_path / f"adapter {kind}", size=0.5, targets=["*"])
        path = tmp_path / f"fused {kind}"
        assert fuse(bases(kind), adapter, path).untied
        theirs, _ = load_theirs(path)
        theirs.set_dtype(mx.float32)
        ours = load_model(path, "float32")(IDS)
        assert mx.abs(theirs(IDS) - ours).max() / mx.std(ours) < 1e-3


def test_everything_else_comes_along(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases("bfloat16"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {"my_key": 7}
    (base / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_text('{"temp": 0.5}')
    (base / "conversion.json").write_text('{"source": "somewhere"}')
    adapter = adapter_for(base, tmp_path / "adapter", targets=["qkv_proj"])
    fuse(base, adapter, tmp_path / "fused")
    same = {"generation_config.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"}
    assert {entry.name for entry in (tmp_path / "fused").iterdir()} == same | {
        "config.json", "model.safetensors", "conversion.json",
    }  # fmt: skip
    for name in same:
        assert (tmp_path / "fused" / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((tmp_path / "fused" / "config.json").read_text()) == config
    record = json.loads((tmp_path / "fused" / "conversion.json").read_text())
    assert record["base"] == {"source": "somewhere"} and record["adapter"]["name"] == "adapter"
    untouched = "transformer.layers.0.ffn.proj_1.weight"
    before, after = (
        read_weights(base, ModelConfig.load(base / "config.json"))[0],
        mx.load(str(tmp_path / "fused" / "model.safetensors")),
    )
    assert mx.array_equal(before[untouched], after[untouched])


# --- quantized


@pytest.mark.parametrize("kind", ["4-bit", "mixed"])
def test_a_quantized_model_is_quantized_anew_where_it_changes(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(kind)
    adapter = adapter_for(base, tmp_path / "adapter", size=0.3, targets=["qkv_proj", "token_embeddings"])
    done = fuse(base, adapter, tmp_path / "fused")
    assert done.tolerance is None and done.moved is not None and 0 < done.moved < 1
    assert done.divergence > 0 and done.largest >= done.mean > 0
    before, after = (mx.load(str(path / "model.safetensors")) for path in (base, tmp_path / "fused"))
    kept = [name for name in before if ".qkv_proj." not in name and "embeddings" not in name]
    assert kept and all(mx.array_equal(before[name], after[name]) for name in kept)
    for part in ("weight", "scales", "biases"):  # the head is the old embedding, bit by bit
        assert mx.array_equal(after[f"lm_head.{part}"], before[f"transformer.token_embeddings.{part}"])
        assert not mx.array_equal(after[f"transformer.token_embeddings.{part}"], after[f"lm_head.{part}"])
    expected, found = merged(base, adapter), dense(tmp_path / "fused")
    for name, weight in expected.items():
        steps = np.abs(weight).max() / (4 if kind == "4-bit" or "qkv" in name else 60)
        assert np.abs(found[name] - weight).max() < steps, name


@pytest.mark.parametrize("kind", ["4-bit", "mixed"])
@pytest.mark.parametrize("targets", [["qkv_proj"], ["*"]])
def test_or_it_is_dequantized_without_a_loss(
    kind: str, targets: list[str], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(kind)
    adapter = adapter_for(base, tmp_path / "adapter", targets=targets)
    done = fuse(base, adapter, tmp_path / "fused", dequantize=True)
    assert done.dtype == "bfloat16" and done.tolerance
    assert "quantization" not in json.loads((tmp_path / "fused" / "config.json").read_text())
    expected, found = merged(base, adapter), dense(tmp_path / "fused")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, rtol=2**-7, atol=1e-5, err_msg=name)


def test_what_four_bits_cannot_keep_is_refused_with_its_figures(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """No weight changes by half a step, and the noise of lots is more than a hundred small weights can average."""
    base = bases("4-bit")
    adapter = adapter_for(base, tmp_path / "adapter", size=1e-4, targets=["qkv_proj"])
    with pytest.raises(ElmError, match=r"keep too little .*by lot \d+%, rounded to the nearest 0%, on a new grid 0%"):
        fuse(base, adapter, tmp_path / "fused")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter"]
    kept = fuse(base, adapter, tmp_path / "dense", dequantize=True, dtype="float32")
    assert kept.rms < kept.effect / 10 and kept.kept == {} and kept.way is None


def test_of_an_adapter_without_effect_nothing_is_lost(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("4-bit")
    done = fuse(base, adapter_for(base, tmp_path / "adapter", size=0.0), tmp_path / "fused")
    assert (done.effect_nats, done.divergence, done.moved, done.share) == (0, 0, 0, 1)
    before, after = (mx.load(str(path / "model.safetensors")) for path in (base, tmp_path / "fused"))
    assert before.keys() == after.keys() and all(mx.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("best", [fused_weights.LOT, fused_weights.ANEW])  # written again, and last
def test_the_way_that_keeps_most_is_written(
    best: str, bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is: what is on the disk is what the figures are of."""
    base = bases("4-bit")
    adapter = adapter_for(base, tmp_path / "adapter", size=0.3)
    monkeypatch.setattr(module, "_KEPT", -math.inf)
    monkeypatch.setattr(module, "_ENOUGH", math.inf)
    shares = {way: float(way == best) for way in fused_weights.WAYS}
    monkeypatch.setattr(Fusion, "share", property(lambda done: shares[done.way]))
    done = fuse(base, adapter, tmp_path / "fused")
    assert done.way == best and done.kept == shares
    monkeypatch.setattr(module, "WAYS", {best: ""})
    fuse(base, adapter, tmp_path / "alone")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("fused", "alone"))
    assert one == other


def test_no_other_way_is_tried_where_nearly_all_is_kept(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fusion, "share", property(lambda done: 0.96))
    done = fuse(bases("4-bit"), adapter_for(bases("4-bit"), tmp_path / "adapter"), tmp_path / "fused")
    assert (done.way, done.kept) == (fused_weights.LOT, {fused_weights.LOT: 0.96})


def test_a_float_mode_is_quantized_anew_too(bases: Callable[[str], Path], tmp_path: Path) -> None:
    from mlx_lm import utils

    base = Path(shutil.copytree(bases("bfloat16"), tmp_path / "base"))
    model, config = utils.load_model(base)
    model, config = utils.quantize_model(model, config, group_size=32, bits=4, mode="mxfp4")
    (base / "model.safetensors").unlink()
    utils.save_model(base, model)
    utils.save_config(config, base / "config.json")
    done = fuse(base, adapter_for(base, tmp_path / "adapter", size=0.3), tmp_path / "fused")
    assert done.moved is not None and 0 < done.moved < 1 and done.tolerance is None
    assert list(done.kept) == [fused_weights.ANEW]
    with pytest.raises(ElmError, match="on a new grid 0%, and 75% are wanted"):
        fuse(base, adapter_for(base, tmp_path / "small", size=1e-6), tmp_path / "same")


# --- another type


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "4-bit"])
def test_all_is_written_in_the_type_that_is_asked_for(
    kind: str, dtype: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(kind)
    adapter = adapter_for(base, tmp_path / "adapter", targets=["*"])
    done = fuse(base, adapter, tmp_path / "fused", dequantize=kind == "4-bit", dtype=dtype)
    assert done.dtype == dtype and done.untied and done.moved is None
    assert done.tolerance and done.rms / done.spread < done.tolerance
    stored = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    assert {str(value.dtype) for value in stored.values()} == {f"mlx.core.{dtype}"}
    expected, found = merged(base, adapter), dense(tmp_path / "fused")
    rounding = {"float32": 1e-5, "float16": 2**-11, "bfloat16": 2**-8}[dtype] * 1.01
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, rtol=rounding, atol=1e-5, err_msg=name)


def test_what_16_bits_would_swallow_float32_keeps(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("bfloat16")
    model = load_model(base, "float32")
    model.layers[0].unfreeze()
    model.layers[0].attn.out_proj.weight = model.layers[0].attn.out_proj.weight * (1 + 2**-12)
    adapters.save(tmp_path / "adapter", model, Adapter("full"))
    lost = fuse(base, tmp_path / "adapter", tmp_path / "16")
    assert lost.rms > 0.9 * lost.effect > 0
    kept = fuse(base, tmp_path / "adapter", tmp_path / "32", dtype="float32")
    assert kept.rms < 0.05 * kept.effect and kept.dtype == "float32"


def test_the_config_names_the_type(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases("bfloat16"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    adapter = adapter_for(base, tmp_path / "adapter")
    for dtype in (None, "float32"):
        fuse(base, adapter, tmp_path / "fused", dtype=dtype, overwrite=True)
        written = json.loads((tmp_path / "fused" / "config.json").read_text())
        assert written == config | {"torch_dtype": dtype or "bfloat16"}


def test_a_type_that_cannot_be_had_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = adapter_for(bases("4-bit"), tmp_path / "adapter")
    with pytest.raises(InputError, match="dtype 'int4' is not one of float32, float16, bfloat16"):
        fuse(bases("float32"), adapter, tmp_path / "fused", dtype="int4")
    with pytest.raises(InputError, match=r"is quantized and stays so, .*; float32 needs --dequantize too"):
        fuse(bases("4-bit"), adapter, tmp_path / "fused", dtype="float32")
    assert not (tmp_path / "fused").exists()


# --- proof


def test_a_merge_that_computes_something_else_is_refused(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the scale left out, on the way of whoever writes."""
    adapter = adapter_for(bases("bfloat16"), tmp_path / "adapter")
    monkeypatch.setattr(lora_layers, "merge", lambda weight, delta, m: weight + delta / 2)
    with pytest.raises(
        ElmError, match=r"fused: the fused model's logits are 0\.\d+ of their spread away .*nothing was"
    ):
        fuse(bases("bfloat16"), adapter, tmp_path / "fused")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter"]


def test_a_model_that_finds_all_tokens_alike_is_fused(tmp_path: Path, run: Run) -> None:
    """Nothing of its logits' spread, which is 0, is away from them."""
    model = tiny.random_model(tiny.scaled_config(64))
    model.update(tree_map(mx.zeros_like, model.parameters()))
    source = tiny.write_directory(tmp_path / "source", model, None, mx.float32)
    adapter = adapter_for(source, tmp_path / "adapter")
    code, out, err = run("fuse", source, adapter, tmp_path / "fused")
    assert code == 0 and "0 of the logits' spread" in out, err


def test_values_that_overflow_are_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = adapter_for(bases("float16"), tmp_path / "adapter", size=1e5)
    with pytest.raises(ElmError, match="nothing was written"):
        fuse(bases("float16"), adapter, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_a_model_without_a_tokenizer_is_compared_on_made_up_ids(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases("float32"), tmp_path / "base"))
    (base / "tokenizer.model").unlink()
    done = fuse(base, adapter_for(base, tmp_path / "adapter"), tmp_path / "fused")
    assert "made up" in done.compared and done.tokens == 128


def test_figures(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Against float64, on the text that was given."""
    base = bases("bfloat16")
    adapter = adapter_for(base, tmp_path / "adapter")
    text = "the quick brown fox jumps over lazy dogs"
    done = fuse(base, adapter, tmp_path / "fused", text=text)
    model, tokenizer = load(base, None, adapter)
    assert tokenizer is not None
    ids = mx.array([tokenizer.encode(text)])
    alone, before, after = (
        np.array(other(ids)[0], np.float64) for other in (load_model(base), model, load_model(tmp_path / "fused"))
    )
    p, q, r = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (before, after, alone))
    expected = Fusion(
        tmp_path / "fused", done.adapter, "bfloat16", False, ids.size, "the text",
        effect_nats=float((p * np.log(p / r)).sum(axis=-1).mean()),
        effect=float(np.sqrt(((before - alone) ** 2).mean())), spread=float(before.std()),
        rms=float(np.sqrt(((before - after) ** 2).mean())), largest=float(np.abs(before - after).max()),
        mean=float(np.abs(before - after).mean()), divergence=float((p * np.log(p / q)).sum(axis=-1).mean()),
        same_top=float((before.argmax(-1) == after.argmax(-1)).mean()), tolerance=6 / 128,
    )  # fmt: skip
    for name in ("effect", "effect_nats", "spread", "rms", "largest", "mean", "same_top", "tolerance"):
        assert getattr(done, name) == pytest.approx(getattr(expected, name), rel=1e-2), name
    assert done.divergence == pytest.approx(expected.divergence, rel=0.1, abs=1e-6)
    assert (done.tokens, done.untied, done.adapter.kind) == (expected.tokens, False, "lora")


def test_rows_of_several_lengths_are_compared_where_they_count(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """In batches, as one after the other."""
    base = bases("float32")
    adapter = adapter_for(base, tmp_path / "adapter")
    rows = [
        ([1, *(9 + i % 300 for i in range(length))], [i % 3 == 1 for i in range(length + 1)])
        for length in (400, 5, 70, 6, 300, 4)
    ]
    done = fuse(base, adapter, tmp_path / "fused", sample=lambda: module.LogitSample("rows", rows))
    models = [load(base)[0], load(base, None, adapter)[0]]
    alone, before = (
        np.concatenate([np.array(model(mx.array([ids]))[0])[counted] for ids, counted in rows]) for model in models
    )
    assert (done.compared, done.tokens) == ("rows", len(alone))
    assert done.effect == pytest.approx(float(np.sqrt(((before - alone) ** 2).mean())), rel=1e-3)


def test_whole_weights(bases: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(bases("bfloat16"), "float32")
    model.layers[0].unfreeze()
    model.layers[0].attn.out_proj.weight = model.layers[0].attn.out_proj.weight * 1.25
    adapters.save(tmp_path / "adapter", model, Adapter("full"))
    fuse(bases("bfloat16"), tmp_path / "adapter", tmp_path / "fused")
    expected = model(IDS)
    assert mx.abs(load_model(tmp_path / "fused")(IDS) - expected).max() / mx.std(expected) < 0.05


# --- where it is written


def test_what_is_there_is_kept_unless_asked(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("float32")
    adapter, out = adapter_for(base, tmp_path / "adapter"), tmp_path / "fused"
    fuse(base, adapter, out)
    with pytest.raises(InputError, match="exists already; pass --overwrite"):
        fuse(base, adapter, out, sample=lambda: pytest.fail("before the data are read"))
    fuse(base, adapter, out, overwrite=True)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not just a model directory: it holds 'thesis\.txt'; nothing was replaced"):
        fuse(base, adapter, out, overwrite=True)
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    with pytest.raises(InputError, match="holds the source, copy, which is to be read"):
        fuse(copy, adapter, copy, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        fuse(base, adapter, adapter / "adapter_config.json")


def test_memory_is_bounded_by_the_model_and_a_tensor(tmp_path: Path) -> None:
    """Written tensor by tensor: no second copy of the model beside the one that logits are taken of."""
    config = tiny.scaled_config(4096, model_dim=512, head_dim=64, num_layers=6, ffn_dim_divisor=256)
    base = tiny.write_directory(tmp_path / "base", tiny.random_model(config), None)
    adapter = adapter_for(base, tmp_path / "adapter", rank=2)
    size = sum(np.prod(shape) for shape in config.shapes().values()) * 4
    script = """if True:
        import resource, sys, elm_mlx
        from elm_mlx.store.loading import load, load_model
        import mlx.core as mx
        if len(sys.argv) > 3:
            from elm_mlx.store.fusion import fuse
            fuse(*sys.argv[1:])
        else:
            mx.eval(load_model(sys.argv[1], None, sys.argv[2])(mx.array([list(range(128))])))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """

    def peak(*arguments: Path) -> int:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        unit = 1 if sys.platform == "darwin" else 1024
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * unit

    loaded, fused = peak(base, adapter), peak(base, adapter, tmp_path / "fused")
    print(f"\nloaded {loaded / 1e6:.0f} MB, fused {fused / 1e6:.0f} MB, weights {size / 1e6:.0f} MB")
    assert fused - loaded < 0.8 * size
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
