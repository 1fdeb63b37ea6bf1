"""`elm-mlx kvp`: a recipe written and carried out; killed and resumed; and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kv_predictions
import mlx.core as mx
import pytest
import tiny
from commands import Run
from mlx.utils import tree_flatten
from training_runs import updates

from elm_mlx import directories
from elm_mlx.directories import checkpoints_of
from elm_mlx.store import kvp_directory
from elm_mlx.store.loading import load_model
from elm_mlx.train import checkpoint, sections


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """With a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(sections.write(kv_predictions.recipe_of(tmp_path), "A recipe."))
    return path


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_layers_left_out(run: Run, config: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "kvp"
    code, text, err = run("kvp", tiny_model_dir, config, "--keep", 0.5, "--out", out)
    assert code == 0, err
    assert f"base      {tiny_model_dir}: 134,688 parameters in 3 layers, frozen" in text
    assert "parameters in 2 layers" in text and "from layers 0 0 1\n" in text
    assert f"wrote     {out}; try: elm-mlx generate {tiny_model_dir} --kvp {out} --prompt …" in text
    first, *_, last = (line for line in metrics(out) if "valid_loss" in line)
    for line in metrics(out):
        name = "valid_" if "valid_loss" in line else ""
        parts = [line[f"{name}{part}"] for part in ("base_loss", "auxiliary_loss", "kv_distance")]
        assert line[f"{name}loss"] == pytest.approx(parts[0] + parts[1] + parts[2] / 3, rel=1e-5)
    assert last["valid_loss"] < first["valid_loss"] - 0.3
    base = load_model(tiny_model_dir)
    made, end = kvp_directory.load(out, tiny_model_dir, base), checkpoint.directory(out, 6)
    saved = mx.load(str(end / directories.PARAMETERS))
    kept = tree_flatten({"auxiliary": made.auxiliary.parameters(), "maps": made.maps})
    assert saved.keys() == {name for name, _ in kept}
    assert all(mx.array_equal(saved[name], value) for name, value in kept)
    record = json.loads((out / "kvp.json").read_text())
    assert record["layers"] == [0, 0, 1] and record["trained"]["keep"] == 0.5 and record["trained"]["tokens"] == 1536
    assert json.loads((out / "run.json").read_text())["command"] == "kvp"
    assert (
        run("generate", tiny_model_dir, "--draft-model", out / "auxiliary", "--prompt", "the", "--max-tokens", 2)[0]
        == 0
    )
    code, _, err = run("generate", out, "--prompt", "the")
    assert (
        code == 2 and f"a KV Prediction, not a model directory by itself: give its model, {tiny_model_dir}, and" in err
    )
    code, _, err = run("average", out, "--last", 2, "--out", tmp_path / "mean")
    assert code == 2 and "holds a KV Prediction, " in err and err.count("\n") == 1
    page = tmp_path / "report.html"
    assert run("report", out, "--out", page)[0] == 0 and "kv_distance" in page.read_text()
    code, _, err = run("kvp", tiny_model_dir, config, "--keep", 0.5, "--out", out)
    assert code == 2 and "holds a run already" in err


def test_an_auxiliary_of_another_shape_killed_and_resumed(
    run: Run, config: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Killed without warning, the run ends with the bytes of one that lived."""
    narrow = tiny.random_model(tiny.scaled_config(320, num_layers=2, model_dim=48, head_dim=8, num_gqa_groups=4), 3)
    auxiliary = tiny.write_directory(tmp_path / "small", narrow, (tiny_model_dir / "tokenizer.model").read_bytes())
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["kvp", str(tiny_model_dir), str(config), "--aux", str(auxiliary), "--set", "optimizer.steps=9"]
    assert run(*words, "--out", whole)[0] == 0
    command = [sys.executable, "-m", "elm_mlx", *words, "--out", str(cut)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not checkpoints_of(cut):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    code, text, err = run(*words, "--out", cut, "--resume")
    assert code == 0 and "resumed   after" in text, err
    assert updates(cut) == updates(whole)
    for name in ("maps.safetensors", "auxiliary/model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    for change, message in (
        ("loss.kv=1", "was trained with loss.kv = None, not 1.0; leave it as it was"),
        ("optimizer.lr=1", "was trained with optimizer.lr = 0.002, not 1.0; leave it as it was"),
    ):
        code, _, err = run(*words, "--out", cut, "--resume", "--set", change)
        assert code == 2 and message in err
    code, _, err = run(*words[:3], "--keep", 0.25, "--set", "optimizer.steps=9", "--out", cut, "--resume")
    assert code == 2 and "was trained from another model" in err


def test_a_recipe_to_start_from(run: Run, config: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    made = tmp_path / "new.toml"
    code, text, err = run("kvp", "--init", made, "--data", tmp_path / "texts.jsonl")
    assert code == 0, err
    assert f"learns from {tmp_path / 'texts.jsonl'}" in text and f"elm-mlx kvp MODEL {made} --keep 0.5" in text
    few = [word for each in ("optimizer.steps=1", "data.sequence_length=32", "data.window=128", "filters.min_tokens=1",
                             "filters.max_repetition=1", "data.workers=0") for word in ("--set", each)]  # fmt: skip
    code, _, err = run("kvp", tiny_model_dir, made, "--keep", 0.25, "--out", tmp_path / "kvp", *few)
    assert code == 0, err
    code, _, err = run("kvp", "--init", made)
    assert code == 2 and "exists already" in err


@pytest.mark.parametrize(("words", "message"), [
    ([], "MODEL is missing: give the base"), (["MODEL"], "CONFIG is missing: give a recipe; --init FILE writes"),
    (["MODEL", "CONFIG"], "--out is missing"), (["MODEL", "CONFIG", "--data", "x"], "--data: needs --init"),
    (["--init", "NEW", "--keep", "0.5"], "--keep: --init writes a recipe to be edited"),
    (["MODEL", "CONFIG", "--out", "OUT"], "give --aux, a smaller model, or --keep"),
    (["MODEL", "CONFIG", "--out", "OUT", "--keep", "0.5", "--set", "model.num_layers=3"], "has no key 'model'"),
    (["MODEL", "CONFIG", "--out", "OUT", "--aux", "NOWHERE"], "no such directory"),
])  # fmt: skip
def test_what_is_wrong_is_named(
    run: Run, config: Path, tiny_model_dir: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    places = {"MODEL": tiny_model_dir, "CONFIG": config, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "nowhere"}
    places["NEW"] = tmp_path / "new.toml"
    code, _, err = run("kvp", *(places.get(word, word) for word in words))
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() or not checkpoints_of(tmp_path / "out")


def test_a_prediction_that_training_made_worse_is_not_recommended(
    run: Run, config: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    worse = [word for each in ("lr=50", "warmup=0", "steps=3") for word in ("--set", f"optimizer.{each}")]
    words = ("--model", tiny_model_dir, "--config", config, "--keep", 0.5, "--out", tmp_path / "kvp")
    code, text, err = run("kvp", *words, *worse, "--set", "run.on_nan=skip")
    assert code == 0, err
    assert "worse than the maps as they were fitted" in text and "try:" not in text
    assert "do not use it; a lower optimizer.lr or other data may help" in err


def test_a_model_directory_is_kept(run: Run, config: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    code, _, err = run("kvp", tiny_model_dir, config, "--keep", 0.5, "--out", out)
    assert code == 2 and "is a model directory; --out names another one" in err
