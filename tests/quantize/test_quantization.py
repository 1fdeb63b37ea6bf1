"""Quantized directories against mlx-lm, NumPy and each other; and what a refused or killed run leaves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import other_models
import pytest
import tiny
from mlx_lm import utils

from elm_mlx import files, safetensors_file
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model import config
from elm_mlx.model.config import ModelConfig
from elm_mlx.quantize import bit_plan, losses
from elm_mlx.quantize.bit_plan import Weights
from elm_mlx.quantize.quantization import RECORD, Quantization, quantize
from elm_mlx.quantize.recipe import choose
from elm_mlx.store import adapters
from elm_mlx.store.adapters import plan as plan_adapter
from elm_mlx.store.describe import describe
from elm_mlx.store.fusion import fuse
from elm_mlx.store.loading import load, load_model, open_model
from elm_mlx.text import excerpts

IDS = [1, 9, 40, 7, 120, 33, 260, 5, 77, 12]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    """Two layers whose rows divide into groups of 64 and 128."""
    config = tiny.scaled_config(320, num_layers=2, model_dim=128, head_dim=32, ffn_dim_divisor=128)
    path = tmp_path_factory.mktemp("base") / "model"
    return tiny.write_directory(path, tiny.random_model(config), tiny_tokenizer_file.read_bytes())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short, so that a run takes a fraction of a second."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(tiny.WORDS.split() * 20), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To measure sensitivities on: each weight takes three passes."""
    path = tmp_path_factory.mktemp("little") / "little.txt"
    path.write_text(tiny.WORDS, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_speed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "speed" not in request.node.name:
        monkeypatch.setattr(losses, "speed", lambda loaded: losses.Speed(1.0, 1.0))


def logits(path: Path) -> np.ndarray:
    model = load_model(path, "float32")
    return np.array(model(mx.array([IDS]))[0])


def mlx_lm_logits(path: Path) -> np.ndarray:
    """Of the network and weights as mlx-lm opens them, its scales widened: 16-bit sums would blur the comparison."""
    model, _ = utils.load_model(path)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([IDS]))[0])


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


WISHES: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"bits": bits} for bits in (2, 3, 5, 8)},
    "group 128": {"group_size": 128}, "group 32": {"group_size": 32, "bits": 6},
    "mxfp4": {"mode": "mxfp4"}, "mxfp8": {"mode": "mxfp8"}, "nvfp4": {"mode": "nvfp4"}, "budget": {"bpw": 4.6},
}  # fmt: skip


@pytest.mark.parametrize("wish", WISHES)
def test_mlx_lm_opens_it_and_says_the_same(wish: str, base: Path, text: Path, little: Path, tmp_path: Path) -> None:
    done = quantize(base, tmp_path / "q", choose(**WISHES[wish]), text=text, calibration=little)
    ours = logits(tmp_path / "q")
    np.testing.assert_allclose(ours, mlx_lm_logits(tmp_path / "q"), atol=2e-4 * np.abs(ours).max())
    model, _ = utils.load_model(tmp_path / "q")
    assert utils.compute_bits_per_weight(model) == pytest.approx(done.bits_after)
    assert {name: module.bits for name, module in model.named_modules() if hasattr(module, "bits")} == {
        name: how.bits for name, how in done.formats.items()
    }
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]


@pytest.mark.parametrize("bits", [3, 4])
def test_the_bytes_are_those_of_mlx_lms_own_quantizing(bits: int, base: Path, text: Path, tmp_path: Path) -> None:
    quantize(base, tmp_path / "q", choose(bits), text=text)
    model, config = utils.load_model(base)
    model, config = utils.quantize_model(model, config, group_size=64, bits=bits)
    utils.save_model(tmp_path / "theirs", model)
    theirs, ours = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("theirs", "q"))
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        assert array.dtype == ours[name].dtype and mx.array_equal(array, ours[name]), name
    written = json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]
    assert written == config["quantization"]


def test_the_losses_are_numpys(base: Path, text: Path, tmp_path: Path) -> None:
    done = quantize(base, tmp_path / "q", choose(3), text=text)
    before, after = open_model(base), open_model(tmp_path / "q")
    assert before.tokenizer is not None
    ids = before.tokenizer.encode(text.read_text("utf-8"), add_bos=False)
    divergences, flips, surprises = [], [], []
    for start in range(0, len(ids), 512):
        window = [before.tokenizer.bos_id, *ids[start : start + 512]]
        both = [
            log_softmax(np.array(loaded.model(mx.array([window[:-1]]))[0], np.float64)) for loaded in (before, after)
        ]
        divergences.extend((np.exp(both[0]) * (both[0] - both[1])).sum(-1))
        flips.extend(both[0].argmax(-1) != both[1].argmax(-1))
        surprises.append([-logprobs[np.arange(len(window) - 1), window[1:]] for logprobs in both])
    found = done.losses
    assert found.tokens == len(ids) == len(divergences)
    assert found.kl_mean == pytest.approx(np.mean(divergences), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.percentile(divergences, 99), rel=1e-4)
    assert found.kl_max == pytest.approx(np.max(divergences), rel=1e-4)
    assert found.flipped == pytest.approx(np.mean(flips), abs=2 / len(ids))
    for i, perplexity in enumerate((found.perplexity_before, found.perplexity_after)):
        assert perplexity == pytest.approx(np.exp(np.concatenate([pair[i] for pair in surprises]).mean()), rel=1e-4)


def test_the_record_says_what_was_measured(base: Path, text: Path, tmp_path: Path) -> None:
    done = quantize(base, tmp_path / "q", choose(4), text=text)
    record = json.loads((tmp_path / "q" / RECORD).read_text("utf-8"))
    assert record["losses"]["kl_mean"] == done.losses.kl_mean and record["losses"]["text"]["name"] == "text.txt"
    assert record["bytes"]["after"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert record["weights"].keys() == done.formats.keys()
    assert (tmp_path / "q" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert describe(tmp_path / "q").parameters == describe(base).parameters


def test_speeds_are_measured(base: Path, text: Path, tmp_path: Path) -> None:
    done = quantize(base, tmp_path / "q", choose(4), text=text)
    assert min(done.speed_before.prompt, done.speed_before.decode, done.speed_after.prompt, done.speed_after.decode) > 1


def test_sensitivity_is_the_divergence_of_one_weight_at_a_time(base: Path) -> None:
    loaded = open_model(base, "float32")
    model = loaded.model
    rows = losses.rows(IDS * 4, 1, 20)
    name = "transformer.layers.0.ffn.proj_2"
    shapes = {name: tuple(model.layers[0].ffn.proj_2.weight.shape)}
    kept = model.layers[0].ffn.proj_2.weight
    with losses.reference(model, rows, base.parent) as before:
        weights = Weights({}, shapes, mx.bfloat16, 0)
        found = bit_plan.sensitivities(model, before, weights, 64)[name]
    assert model.layers[0].ffn.proj_2.weight is kept
    inputs = mx.array([row.inputs for row in rows])
    old = log_softmax(np.array(model(inputs), np.float64))
    for bits in bit_plan.MEASURED:
        parts = mx.quantize(kept.astype(mx.bfloat16), group_size=64, bits=bits)
        wide = [part.astype(mx.float32) if part.dtype == mx.bfloat16 else part for part in parts]
        model.layers[0].ffn.proj_2.weight = mx.dequantize(*wide, group_size=64, bits=bits)
        new = log_softmax(np.array(model(inputs), np.float64))
        assert found[bits] == pytest.approx((np.exp(old) * (old - new)).sum(-1).mean(), rel=2e-3)
    assert found[4] > found[5] > found[6] > found[8] > 0
    model.layers[0].ffn.proj_2.weight = kept


def test_a_mix_meets_its_budget_and_beats_one_format_of_the_same_size(classics_dir: Path, tmp_path: Path) -> None:
    """Of 4 bits in groups of 64, all counted."""
    short = tmp_path / "text.txt"
    content = excerpts.held_out(None).content
    short.write_text(content[:3000], "utf-8")
    learn = tmp_path / "learn.txt"  # one or two windows, to be quick
    learn.write_text(excerpts.calibration(None).content[:700], "utf-8")
    uniform = quantize(classics_dir, tmp_path / "u", choose(4), text=short)
    budget = uniform.bits_after
    mixed = quantize(classics_dir, tmp_path / "m", choose(bpw=budget), text=short, calibration=learn)
    assert 0.99 * budget < mixed.bits_after <= budget
    assert len({how.bits for how in mixed.formats.values()}) > 1
    assert mixed.losses.kl_mean < 0.9 * uniform.losses.kl_mean


@pytest.mark.parametrize(
    ("bpw", "message"), [(2.4, "2 bits everywhere are 2.5"), (16.0, "the unquantized model takes no more")]
)
def test_budgets_that_cannot_be(bpw: float, message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        quantize(base, tmp_path / "q", choose(bpw=bpw))
    assert not (tmp_path / "q").exists()


def test_a_budget_of_much_keeps_some_weights_whole(base: Path, text: Path, little: Path, tmp_path: Path) -> None:
    done = quantize(base, tmp_path / "q", choose(bpw=12.0), text=text, calibration=little)
    assert 11.5 < done.bits_after <= 12.0 and 0 < len(done.formats) < 9
    np.testing.assert_allclose(logits(tmp_path / "q"), mlx_lm_logits(tmp_path / "q"), atol=1e-3)


def test_rows_that_do_not_divide(tmp_path: Path, tiny_tokenizer_file: Path, text: Path) -> None:
    config = tiny.scaled_config(320, num_layers=1, model_dim=96, head_dim=16, ffn_dim_divisor=64)
    base = tiny.write_directory(tmp_path / "b", tiny.random_model(config), tiny_tokenizer_file.read_bytes())
    seen: list[Any] = []
    done = quantize(base, tmp_path / "q", choose(4), text=text, on_plan=seen.append)
    assert done.formats["transformer.token_embeddings"].group_size == 32
    assert "smaller groups" in seen[0].notes[0]
    np.testing.assert_allclose(logits(tmp_path / "q"), mlx_lm_logits(tmp_path / "q"), atol=1e-3)


def test_without_a_tokenizer(base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    done = quantize(bare, tmp_path / "q", choose(4))
    assert done.text is None and done.losses.perplexity_after is None and done.losses.kl_mean > 0
    for wish in ({"bpw": 4.6}, {"method": "gptq"}):
        with pytest.raises(InputError, match="the model has no tokenizer"):
            quantize(bare, tmp_path / "r", choose(**wish))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [("float32", None, "bfloat16"), ("float16", None, "float16"), ("bfloat16", "float32", "float32")],
)
def test_the_type_of_scales_and_norms(
    stored: str, asked: str | None, written: str, base: Path, text: Path, tmp_path: Path
) -> None:
    model = load_model(base, "float32")
    source = tiny.write_directory(tmp_path / "s", model, None, getattr(mx, stored))
    quantize(source, tmp_path / "q", choose(4, dtype=asked), text=text)
    arrays = mx.load(str(tmp_path / "q" / "model.safetensors"))
    found = {str(array.dtype) for name, array in arrays.items() if array.dtype != mx.uint32}
    assert found == {f"mlx.core.{written}"}


def test_a_wide_float16_model_gets_bfloat16(monkeypatch: pytest.MonkeyPatch, base: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "_WIDE", 128)
    source = tiny.write_directory(tmp_path / "s", load_model(base, "float32"), None, mx.float16)
    quantize(source, tmp_path / "q", choose(4))
    assert mx.load(str(tmp_path / "q" / "model.safetensors"))["transformer.norm.weight"].dtype == mx.bfloat16
    with pytest.raises(InputError, match="overflow float16"):
        quantize(source, tmp_path / "r", choose(4, dtype="float16"))


def test_refused_leaves_nothing(base: Path, text: Path, tmp_path: Path) -> None:
    seen: list[Quantization] = []
    with pytest.raises(ElmError, match="more than --max-kld 1e-06; nothing was written") as raised:
        quantize(base, tmp_path / "q", choose(2), text=text, max_kld=1e-6, on_result=seen.append)
    assert raised.value.exit_code == 1 and seen[0].losses.kl_mean > 1e-6
    assert list(tmp_path.iterdir()) == []
    quantize(base, tmp_path / "q", choose(8), text=text, max_kld=1.0)
    old = (tmp_path / "q" / "model.safetensors").read_bytes()
    with pytest.raises(ElmError, match="max-kld"):
        quantize(base, tmp_path / "q", choose(2), text=text, max_kld=1e-6, overwrite=True)
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == old


def test_numbers_that_are_none_are_refused(base: Path, text: Path, tmp_path: Path) -> None:
    model, tokenizer = load(base, "float32")
    assert tokenizer is not None
    model.transformer.norm.weight = mx.full((128,), float("nan"))
    broken = tiny.write_directory(tmp_path / "b", model, tokenizer.path.read_bytes())
    with pytest.raises(ElmError, match="logits are NaN"):
        quantize(broken, tmp_path / "q", choose(4), text=text)
    assert not (tmp_path / "q").exists()


def test_what_is_quantized_already_is_not_again(base: Path, text: Path, tmp_path: Path) -> None:
    quantize(base, tmp_path / "q", choose(4), text=text)
    with pytest.raises(InputError, match="quantized already"):
        quantize(tmp_path / "q", tmp_path / "r", choose(3), text=text)
    with pytest.raises(InputError, match="exists already"):
        quantize(base, tmp_path / "q", choose(3), text=text)
    with pytest.raises(InputError, match="which is to be read"):
        quantize(base, base, choose(3), text=text, overwrite=True)


def test_killed_it_leaves_no_half_directory(base: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time, elm_mlx\nfrom elm_mlx.quantize import losses\n"
        "from elm_mlx.quantize.quantization import quantize\nfrom elm_mlx.quantize.recipe import choose\n"
        "losses.compare = lambda *_: (print('written', flush=True), time.sleep(60))\n"
        "quantize(sys.argv[1], sys.argv[2], choose(4))\n"
    )
    target = tmp_path / "q"
    with subprocess.Popen([sys.executable, "-c", program, str(base), str(target)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"written\n"
        child.send_signal(signal.SIGKILL)
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1
    time.sleep(0.01)
    quantize(base, target, choose(4))
    assert list(tmp_path.iterdir()) == [target]


def test_an_adapter_on_top_and_fused(base: Path, text: Path, little: Path, tmp_path: Path) -> None:
    """All that follows takes a mixed model: an adapter attached, saved, and merged."""
    quantize(base, tmp_path / "q", choose(bpw=4.6), text=text, calibration=little)
    model = load_model(tmp_path / "q", "float32")
    adapter = plan_adapter(model.config, rank=2)
    adapters.attach(model, adapter)
    for number, (_, module) in enumerate(model.named_modules()):
        if "lora_b" in module:
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape, key=mx.random.key(number))
    adapters.save(tmp_path / "a", model, adapter)
    fused = fuse(tmp_path / "q", tmp_path / "a", tmp_path / "f", dequantize=True)
    assert fused.tolerance is not None
    config = ModelConfig.load(tmp_path / "f" / "config.json")
    assert config.quantization is None


def test_scratch_beside_a_path(tmp_path: Path) -> None:
    with files.scratch_directory(tmp_path / "deep" / "q") as scratch:
        (scratch / "x").write_text("x")
        with files.new_directory(tmp_path / "deep" / "q") as made:  # which clears litter, and not this
            (made / "y").write_text("y")
        assert (scratch / "x").exists()
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["q"]
    with files.scratch_directory(tmp_path / "none" / "q"):
        pass
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", other_models.CONFIGS)
@pytest.mark.parametrize("wish", [{"mode": "mxfp4"}, {"bpw": 6.0, "group_size": 32}], ids=["mxfp4", "budget"])
def test_models_of_other_families(name: str, wish: dict[str, Any], text: Path, little: Path, tmp_path: Path) -> None:
    """Made with rows that divide into groups; mlx-lm's own network gives the same logits."""
    wider: dict[str, Any] = {"hidden_size": 64 if name == "gemma2" else 96}  # whose root bfloat16 has
    if name != "mamba":
        wider |= {"num_attention_heads": 12, "intermediate_size": 128}
    if name == "olmo":
        wider |= {"num_key_value_heads": 12}
    source = other_models.write_model(tmp_path / "source", name, wider)
    done = quantize(source, tmp_path / "q", choose(**wish), text=text, calibration=little)
    assert done.losses.kl_mean > 0 and 4 < done.bits_after <= 6.0 and done.losses.perplexity_after is not None
    if name == "olmo":  # mlx-lm's own wants a package that nobody has
        return
    ours, theirs = logits(tmp_path / "q"), mlx_lm_logits(tmp_path / "q")
    # mlx-lm gives what it takes from a float-packed embedding in bfloat16
    np.testing.assert_allclose(ours, theirs, atol=(2e-4 if "bpw" in wish else 2e-2) * np.abs(ours).max())


def test_a_large_model_is_written_in_shards(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(base, tmp_path / "whole", choose(4), text=text)
    small = partial(safetensors_file.write_shards, shard_bytes=60_000)
    monkeypatch.setattr(safetensors_file, "write_shards", small)
    quantize(base, tmp_path / "q", choose(4), text=text)
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text("utf-8"))
    assert len(set(index["weight_map"].values())) > 1
    np.testing.assert_array_equal(logits(tmp_path / "q"), logits(tmp_path / "whole"))
    np.testing.assert_array_equal(mlx_lm_logits(tmp_path / "q"), mlx_lm_logits(tmp_path / "whole"))


def test_a_disk_that_fills_while_a_model_is_read_is_an_error(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no signal, as it would be where a mapping is written to."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr(losses.tempfile, "TemporaryFile", lambda dir: Path("/dev/full").open("w+b"))  # noqa: SIM115
    with pytest.raises(ElmError, match=r"q: cannot be written: No space left.*nothing was changed"):
        quantize(base, tmp_path / "q", choose(4), text=text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["gptq", "awq", "dwq"])
def test_a_head_that_the_config_does_not_name_is_no_methods(method: str, text: Path, tmp_path: Path) -> None:
    """mlx-lm would drop it, and the result would lack it."""
    source = other_models.write_model(tmp_path / "source", "llama", {"tie_word_embeddings": False})
    config = json.loads((source / "config.json").read_text("utf-8")) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"--method {method}: the weights have a head of their own"):
        quantize(source, tmp_path / "q", choose(4, method=method), calibration=text, text=text)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(("family", "method"), [("olmo", "gptq"), ("olmo", "awq"), ("phi3", "awq")])
def test_networks_that_a_method_cannot_do_are_refused_before_anything_is_planned(
    family: str, method: str, family_dirs: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    seen: list[Any] = []
    with pytest.raises(InputError, match=f"--method {method}: mlx-lm"):
        recipe = choose(4, method=method)
        quantize(family_dirs[family], tmp_path / "q", recipe, text=text, on_plan=seen.append)
    assert not seen and list(tmp_path.iterdir()) == []
