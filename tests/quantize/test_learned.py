"""mlx-lm's learned methods through `quantize`: what they leave is opened by mlx-lm, and by how much they help."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm import utils

from elm_mlx.errors import InputError
from elm_mlx.model.config import ModelConfig
from elm_mlx.quantize import losses
from elm_mlx.quantize.losses import Speed
from elm_mlx.quantize.quantization import quantize
from elm_mlx.quantize.recipe import choose
from elm_mlx.store.loading import load_model

IDS = mx.array([[1, 9, 40, 7, 120, 33, 260, 5, 77, 12]])


@pytest.fixture(autouse=True)
def no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "speed", lambda loaded: Speed(1.0, 1.0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    config = tiny.scaled_config(320, num_layers=2, head_dim=32, ffn_dim_divisor=64, share_input_output_layers=False)
    path = tmp_path_factory.mktemp("base") / "model"
    return tiny.write_directory(path, tiny.random_model(config), tiny_tokenizer_file.read_bytes())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draw = random.Random(3)
    path.write_text(" ".join(draw.choice(tiny.WORDS.split()) for _ in range(800)), "utf-8")
    return path


@pytest.mark.parametrize("method", ["gptq", "awq", "dwq"])
def test_what_it_leaves_is_opened_and_no_worse_than_rounding(
    method: str, base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = quantize(base, tmp_path / "plain", choose(2, 32), text=text)
    rate = 1e-3 if method == "dwq" else None
    learnt = quantize(
        base, tmp_path / "q", choose(2, 32, method=method, rate=rate), calibration=text, text=text, overwrite=True
    )
    assert capsys.readouterr() == ("", "")
    assert learnt.formats == plain.formats and learnt.bits_after == plain.bits_after
    assert learnt.losses.kl_mean < plain.losses.kl_mean
    model = load_model(tmp_path / "q", "float32")
    theirs, _ = utils.load_model(tmp_path / "q")
    theirs.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(model(IDS)), np.array(theirs(IDS)), atol=2e-3)
    record = json.loads((tmp_path / "q" / "quantization.json").read_text("utf-8"))
    assert record["recipe"]["method"] == method and record["recipe"]["calibration"]["name"] == "text.txt"
    arrays = mx.load(str(tmp_path / "q" / "model.safetensors"))
    assert {array.dtype for array in arrays.values()} == {mx.bfloat16, mx.uint32}


def test_what_a_method_cannot_do_is_said(base: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the quick brown fox", "utf-8")
    with pytest.raises(InputError, match="tokens, and 2,048 are needed"):
        quantize(base, tmp_path / "q", choose(method="gptq"), calibration=tmp_path / "short.txt", text=text)
    odd = tmp_path / "odd"
    config = tiny.scaled_config(320, num_layers=1, model_dim=96, head_dim=32)
    tiny.write_directory(odd, tiny.random_model(config), (base / "tokenizer.model").read_bytes())
    with pytest.raises(InputError, match=r"wants the same groups everywhere.*choose --group-size 32"):
        quantize(odd, tmp_path / "q", choose(method="gptq"), calibration=text, text=text)
    plain = tmp_path / "plain"
    shutil.copytree(base, plain)
    config = tiny.scaled_config(320, num_layers=1, head_dim=32, ffn_dim_divisor=64, ffn_with_glu=False)
    tiny.write_directory(plain, tiny.random_model(config), None)
    assert not ModelConfig.load(plain / "config.json").ffn_with_glu
    with pytest.raises(InputError, match="cannot open it"):
        quantize(plain, tmp_path / "q", choose(method="awq"), calibration=text, text=text)
    assert not (tmp_path / "q").exists()
