"""`elm-mlx info`: figures that are the directory's, in a table that fits, and as JSON."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from commands import Run, modules_of, packages

from elm_mlx import blas, device
from elm_mlx.model.config import ModelConfig
from elm_mlx.store.describe import describe


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """On a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return run


def test_the_figures_are_the_directorys(run: Run, tiny_model_dir: Path) -> None:
    code, out, err = run("info", tiny_model_dir)
    about = describe(tiny_model_dir)
    assert code == 0 and err == ""
    assert f"OpenELM, {about.parameters:,} parameters ({about.embedding_parameters:,} in the embedding)" in out
    assert "3 layers, width 64, heads of 16, SwiGLU, QK norm, tied head" in out
    assert "320 tokens\n" in out and "512 tokens\n" in out
    assert "bfloat16" in out
    assert f"{about.kv_bytes_per_token['16 bits']:,} bytes a token in 16 bits" in out


def test_every_layer_is_a_row_with_bars_in_proportion(run: Run, tiny_model_dir: Path) -> None:
    out = run("info", tiny_model_dir)[1]
    rows = [line.split() for line in out.splitlines() if re.match(r"\s+\d+\s+\d+\s+\d+\s+[█▏▎▍▌▋▊▉]+", line)]
    about = describe(tiny_model_dir)
    assert len(rows) == len(about.layers)
    widest = max(layer.ffn_dim for layer in about.layers)
    for number, (row, layer) in enumerate(zip(rows, about.layers, strict=True)):
        index, heads, kv, head_bar, ffn, ffn_bar, parameters = row
        assert (int(index), int(heads), int(kv)) == (number, layer.query_heads, layer.kv_heads)
        assert (int(ffn), int(parameters.replace(",", ""))) == (layer.ffn_dim, layer.parameters)
        assert abs(len(ffn_bar) - 16 * layer.ffn_dim / widest) <= 1
        assert len(head_bar) == 16 * layer.query_heads // 4
    assert all(len(line) <= 80 for line in out.splitlines()[1:])


def test_json_is_the_description(run: Run, tiny_model_dir: Path, tiny_config: ModelConfig) -> None:
    code, out, err = run("info", tiny_model_dir, "--json")
    assert code == 0 and err == ""
    assert json.loads(out) == json.loads(json.dumps(describe(tiny_model_dir).to_dict()))
    assert [layer["query_heads"] for layer in json.loads(out)["layers"]] == list(tiny_config.num_query_heads)


def test_the_system_is_what_mlx_computes_with(run: Run) -> None:
    code, out, _ = run("info", "--system")
    assert code == 0
    assert mx.__version__ in out and str(mx.default_device()) in out
    assert blas.status().name in out
    code, out, _ = run("info", "--system", "--json")
    assert json.loads(out)["system"]["mlx"] == mx.__version__


def test_both_at_once(run: Run, tiny_model_dir: Path) -> None:
    result = json.loads(run("info", tiny_model_dir, "--system", "--json")[1])
    assert result["system"]["device"] == str(mx.default_device()) and result["parameters"] > 0
    out = run("info", tiny_model_dir, "--system")[1]
    assert "parameters" in out and "blas:" in out


def test_what_a_gpu_computes_in(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, says in ((True, "the stored type"), (False, "float32 where memory allows")):
        monkeypatch.setattr(device, "on_gpu", lambda gpu=gpu: gpu)
        assert says in run("info", "--system")[1]


def test_memory_that_is_not_known(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda: None)
    assert "not known" in run("info", "--system")[1]


def test_the_lack_of_a_tokenizer_is_said(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    assert "no tokenizer" not in run("info", path)[1]
    (path / "tokenizer.model").unlink()
    assert "no tokenizer in the directory" in run("info", path)[1]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: shutil.rmtree(path), "no such directory"),
        (lambda path: (path / "config.json").unlink(), r"holds no config\.json"),
        (lambda path: (path / "config.json").write_text("{}"), r"config\.json: num_transformer_layers is missing"),
        (lambda path: (path / "config.json").write_text("{"), r"config\.json: not JSON"),
        (lambda path: (path / "model.safetensors").unlink(), r"holds no model\.safetensors"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 9), r"model\.safetensors: "),
    ],
)
def test_what_is_wrong_is_one_line_and_2(
    run: Run, tiny_model_dir: Path, tmp_path: Path, prepare: Callable[[Path], object], message: str
) -> None:
    path = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    prepare(path)
    code, out, err = run("info", path)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("elm-mlx: ") and re.search(message, err)


def test_nothing_asked_for(run: Run) -> None:
    code, out, err = run("info")
    assert (code, out, err) == (2, "", "elm-mlx: give MODEL, or --system\n")


def test_a_directory_is_described_without_mlx(tiny_model_dir: Path) -> None:
    out, _, modules = modules_of("info", tiny_model_dir)
    assert "parameters" in out
    assert not packages(modules) & {"mlx", "mlx_lm", "transformers", "huggingface_hub", "torch"}


def test_a_name_that_is_nearly_a_model_beside_it_is_named(run: Run, tiny_model_dir: Path) -> None:
    code, _, err = run("info", tiny_model_dir.with_name("modle"))
    assert code == 2 and f"modle: no such directory; did you mean {tiny_model_dir}?" in err


@pytest.mark.parametrize("columns", [60, 80])
def test_a_narrow_terminal_has_room_for_every_line(
    run: Run, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    monkeypatch.setenv("NO_COLOR", "1")
    name = str(tiny_model_dir)
    assert all(len(line) <= columns or name in line for line in run("info", tiny_model_dir)[1].splitlines())
