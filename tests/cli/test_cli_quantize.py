"""Quantizing on the command line: what it prints and leaves, and that all else runs on the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from commands import Run

from elm_mlx.quantize import losses
from elm_mlx.quantize.losses import Speed


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Speeds are not measured."""
    monkeypatch.setattr(losses, "speed", lambda loaded: Speed(200.0, 40.0))
    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    path = tmp_path / "texts" / "text.txt"
    path.write_text(" ".join(tiny.WORDS.split() * 8), "utf-8")
    return path


def test_what_was_lost_is_printed_and_everything_runs_on_it(
    run: Run, tiny_model_dir: Path, text: Path, tmp_path: Path
) -> None:
    target = tmp_path / "q"
    code, out, err = run("quantize", tiny_model_dir, target, "--bits", 4, "--text", text)
    assert (code, err) == (0, "")
    lines = {line[:10].strip(): line[12:] for line in out.splitlines()}
    record = json.loads((target / "quantization.json").read_text("utf-8"))
    assert f"{record['losses']['kl_mean']:.3g} nats a token" in lines["divergence"]
    assert lines["compared"].endswith("tokens (text.txt)") and "to 5.35 bits a weight" in lines["bytes"]
    assert lines["tokens/s"].startswith("prompt 200 to 200, decode 40 to 40") and lines["wrote"] == str(target)
    assert lines["plan"] == "transformer.token_embeddings        4-bit, group 64"
    assert "4-bit, group 32/64, scales bfloat16, 5.35 bits a weight" in run("info", target)[1]
    assert run("generate", target, "--prompt", "the quick", "--max-tokens", 4)[0] == 0
    assert run("chat", target, "--max-tokens", 4, stdin="the fox\n")[0] == 0
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": tiny.WORDS}) + "\n", "utf-8")
    options = ("--iters", 1, "--batch-size", 1)
    assert run("lora", target, "--data", data, "--out", tmp_path / "a", *options)[0] == 0
    assert run("fuse", target, tmp_path / "a", tmp_path / "f", "--dequantize")[0] == 0


def test_a_mix_shows_its_bits_by_layer(run: Run, tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    options = ("--bpw", 5, "--group-size", 32, "--text", text, "--calibration", text)
    code, out, _ = run("quantize", tiny_model_dir, tmp_path / "q", *options)
    assert code == 0 and "bits a weight; by its parts" in out
    record = json.loads((tmp_path / "q" / "quantization.json").read_text("utf-8"))
    bits = {name: how["bits"] for name, how in record["weights"].items()}
    assert len(set(bits.values())) > 1  # or it were no mix
    for kind in ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2"):
        names = [f"transformer.layers.{i}.{kind}" for i in range(3)]
        ours = [str(bits[name]) for name in names if name in bits]  # not all can be had in groups of 32
        shown = next(line for line in out.splitlines() if kind in line).split(kind)[1].split()
        assert shown[: len(ours)] == ours if len(set(ours)) > 1 else shown[0] == f"{ours[0]}-bit,"
    assert record["recipe"]["calibration"]["name"] == "text.txt"


def test_refused(run: Run, tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "q"
    code, out, err = run("quantize", tiny_model_dir, target, "--bits", 2, "--text", text, "--max-kld", 1e-5)
    assert code == 1 and "divergence" in out and "wrote" not in out
    assert err.startswith(f"elm-mlx: {target}: diverges by") and err.count("\n") == 1
    for wish in (["--bits", 7], ["--bpw", 4.5, "--bits", 4], ["--mode", "int4"], ["--method", "gguf"]):
        code, _, err = run("quantize", tiny_model_dir, target, *wish)
        assert code == 2 and err.count("\n") == 1
    code, _, err = run("quantize", tiny_model_dir, target, "--text", tmp_path / "none.txt")
    assert code == 2 and "none.txt: cannot be read" in err
    assert not target.exists() and [entry.name for entry in tmp_path.iterdir()] == ["texts"]


def test_converted_and_quantized_in_one_go(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "q"
    code, out, _ = run("convert", tiny_model_dir, target, "--quantize", "mxfp4")
    assert code == 0 and "converted" in out and "plan        transformer.token_embeddings" in out
    assert out.endswith(f"wrote       {target}\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["q"]
    assert json.loads((target / "config.json").read_text("utf-8"))["quantization"]["mode"] == "mxfp4"
    assert (target / "conversion.json").exists() and (target / "quantization.json").exists()
    code, _, err = run("convert", tiny_model_dir, target, "--quantize", "4")
    assert code == 2 and "exists already" in err
    assert run("convert", tiny_model_dir, target, "--quantize", "8", "--overwrite")[0] == 0
    assert json.loads((target / "config.json").read_text("utf-8"))["quantization"]["bits"] == 8
    code, _, err = run("convert", target, target, "--quantize", "4", "--overwrite")
    assert code == 2 and "which is to be read" in err
    code, _, err = run("convert", tiny_model_dir, tmp_path / "r", "--quantize", "four")
    assert code == 2 and "--quantize four: is not a number of bits" in err
    code, out, _ = run("convert", tiny_model_dir, tmp_path / "r", "--quantize", "4", "--dry-run")
    assert code == 0 and "nothing was written" in out
    assert [entry.name for entry in tmp_path.iterdir()] == ["q"]


def test_as_a_process(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "elm_mlx", "quantize", tiny_model_dir, tmp_path / "q", "--text", text]
    environment = os.environ | {"PYTHONWARNINGS": "error::DeprecationWarning:elm_mlx"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tokens/s" in done.stdout
