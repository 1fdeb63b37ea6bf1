"""Paths that hold `~`, from everywhere that one is written: arguments, files of settings, Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import Run

import elm_mlx
from elm_mlx.cli import _COMMANDS, _Commands
from elm_mlx.data.text_sources import TextFiles
from elm_mlx.serve.served_models import load_models
from elm_mlx.text import chat_template
from elm_mlx.text.chat_template import OPENELM_INSTRUCT_JINJA
from elm_mlx.train import pretraining_recipe, sections


@pytest.fixture
def home(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with a model that converses, `m`, and data for it, `d.jsonl`."""
    path = tmp_path / "home"
    shutil.copytree(tiny_model_dir, path / "m")
    (path / "m" / "chat_template.jinja").write_text(OPENELM_INSTRUCT_JINJA)
    (path / "d.jsonl").write_text(json.dumps({"prompt": "the quick", "completion": "fox"}) + "\n")
    (path / "t.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    monkeypatch.setenv("HOME", str(path))
    return path


@pytest.mark.parametrize("name", [name for name in _COMMANDS if name not in ("models", "serve")])  # these take names
def test_every_path_of_every_command_is_expanded(name: str, home: Path) -> None:
    kinds = [parameter.type for parameter in _Commands()[name].params if parameter.type.name == "path"]
    assert kinds
    assert {kind.convert("~/m", None, None) for kind in kinds} == {str(home / "m")}


@pytest.mark.parametrize("model", ["~/m", "m=~/m"])
def test_a_model_that_is_served(home: Path, model: str) -> None:
    assert list(load_models([model], [], None, print)) == ["m"]


def test_a_model_is_the_same_however_it_is_named(run: Run, home: Path) -> None:
    options = ("--prompt", "the quick", "--max-tokens", 3, "--json")
    wanted = json.loads(run("generate", home / "m", *options)[1])
    found = json.loads(run("generate", "~/m", *options)[1])
    assert found["text"] == wanted["text"] and found["prompt_tokens"] == wanted["prompt_tokens"]


def test_data_and_templates(run: Run, home: Path) -> None:
    code, out, _ = run("data", "~/d.jsonl", "--model=~/m", "--template", "~/t.jinja")
    assert code == 0 and "[the quick]" in out and f"example 1: {home / 'd.jsonl'}, line 1" in out


def test_a_file_of_settings(run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: ~/m\ndata: ~/d.jsonl\nout: ~/run\niters: 1\n")
    code, _, err = run("lora", "-c", "c.yaml")
    assert code == 0, err
    assert (home / "run" / "adapters.safetensors").exists() and not (tmp_path / "~").exists()
    assert run("lora", "--out", "~/run", "--resume")[0] == 0


def test_a_recipe(home: Path) -> None:
    made = pretraining_recipe.preset("small", "~/d.jsonl")
    (home / "r.toml").write_text(sections.write(made, "about"))
    read = sections.read(Path("~/r.toml"), pretraining_recipe.Recipe)
    assert read == made and TextFiles(read.data.sources[0]).paths == [home / "d.jsonl"]


def test_python(home: Path) -> None:
    _, tokenizer = elm_mlx.load("~/m")
    assert tokenizer is not None and tokenizer.path == home / "m" / "tokenizer.model"
    found = chat_template.choose(Path("~/m"), tokenizer)
    assert found is not None and found.stop_strings


def test_a_directory_that_is_called_so(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "here").mkdir()
    monkeypatch.chdir(home / "here")
    shutil.copytree(home / "m", "~/m")
    (home / "m" / "config.json").write_text("{")
    code, _, err = run("data", home / "d.jsonl", "--model", "./~/m")
    assert code == 0, err
    assert run("data", home / "d.jsonl", "--model", "~/m")[0] == 2


def test_a_directory_that_is_called_so_is_meant_by_python_too(
    home: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "~" / "other")
    monkeypatch.chdir(tmp_path)
    model, _ = elm_mlx.load("./~/other")
    assert model.config == elm_mlx.load_model(tiny_model_dir).config
