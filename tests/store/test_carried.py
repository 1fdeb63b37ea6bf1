"""What a directory needs to answer as before goes with it, through everything that makes a directory of another."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from elm_mlx import directories
from elm_mlx.text import chat_template
from elm_mlx.text.chat_template import OPENELM_INSTRUCT_JINJA

JINJA = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
GENERATION = {"do_sample": True, "top_k": 7, "eos_token_id": [2, 5], "a key of others": [1]}
PLACES: dict[str, tuple[str, Any]] = {
    "tokenizer_config": ("tokenizer_config.json", {"chat_template": JINJA, "eos_token": "<s>"}),
    "several": (
        "tokenizer_config.json",
        {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": JINJA}]},
    ),
    "jinja": ("chat_template.jinja", JINJA),
    "json": ("chat_template.json", {"chat_template": JINJA}),
    "folder": ("additional_chat_templates/default.jinja", JINJA),
}


def place(directory: Path, where: str) -> None:
    """Puts `JINJA` into a directory in one of the ways that there are, and its like beside it."""
    name, content = PLACES[where]
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    settings = directory / "tokenizer_config.json"
    if settings.exists():
        values = json.loads(settings.read_text())
        values.pop("chat_template", None)
        settings.write_text(json.dumps(values))
        content = values | content if name == settings.name else content
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))


def openelm(tiny_model_dir: Path, to: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, to))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    path.write_text('{"prompt": "the fox", "completion": "us"}\n' * 4)
    return path


def trained(run: Run, model: Path, data: Path, out: Path, *options: object) -> Path:
    code, _, err = run("lora", model, "--data", data, "--out", out, "--iters", 1, *options)
    assert code == 0, err
    return out


@pytest.mark.parametrize(
    ("command", "where"),
    [("quantize", "jinja"), ("fuse", "several"), ("fuse", "folder"), ("average", "jinja"),
     *product(["convert", "export"], PLACES)],
)  # fmt: skip
def test_templates_and_settings_come_along(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path, command: str, where: str
) -> None:
    model, made = openelm(tiny_model_dir, tmp_path / "model"), tmp_path / "made"
    place(model, where)
    if where in ("jinja", "folder"):
        (model / "additional_chat_templates").mkdir(exist_ok=True)
        (model / "additional_chat_templates" / "rag.jinja").write_text("R")
    arguments: dict[str, list[object]] = {
        "quantize": ["quantize", model, made, "--bits", 8, "--group-size", 32, "--text", data],
        "convert": ["convert", model, made],
        "average": ["average", model, "--out", made],
        "export": ["export", model, tmp_path / "exported"],
    }
    if command == "fuse":
        arguments["fuse"] = ["fuse", model, trained(run, model, data, tmp_path / "adapter"), made]
    code, _, err = run(*arguments[command])
    assert code == 0, err
    if command == "export":
        code, _, err = run("convert", tmp_path / "exported" / "checkpoint.pt", made)
        assert code == 0, err
    assert chat_template.own_source(made)[0] == JINJA
    ends = {"eos_token_id": [1, 2, 5]} if (command, where) == ("export", "tokenizer_config") else {}  # its <s>, too
    assert json.loads((made / "generation_config.json").read_text()) == GENERATION | ends
    code, _, err = run("generate", made, "-p", "the", "--max-tokens", 2)
    assert code == 0 and "answered by the chat template" in err, err
    if command != "export":  # whose directory has no place for them
        if where in ("jinja", "folder"):
            assert (made / "additional_chat_templates" / "rag.jinja").read_text() == "R"
        if where == "tokenizer_config":
            assert json.loads((made / "tokenizer_config.json").read_text())["eos_token"] == "<s>"
        assert directories.check_destination(made, directories.MODEL, overwrite=True) is None


def test_of_another_family(family_dirs: dict[str, Path], tmp_path: Path) -> None:
    model, made = Path(shutil.copytree(family_dirs["llama"], tmp_path / "model")), tmp_path / "made"
    place(model, "json")
    (model / "special_tokens_map.json").write_text('{"eos_token": "<|end_of_text|>"}')
    made.mkdir()
    directories.carry(model, made)
    for name in ("chat_template.json", "special_tokens_map.json", "generation_config.json", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (model / name).read_bytes()


def test_the_template_of_a_run_goes_with_its_adapter_and_into_the_fused_model(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "my.jinja"
    file.write_text(JINJA)
    adapter = trained(run, tiny_model_dir, data, tmp_path / "adapter", "--template", file, "--save-every", 1)
    file.unlink()
    for directory in (adapter, *(adapter / "checkpoints").glob("step-*")):
        assert chat_template.own_source(directory)[0] == JINJA
    code, out, err = run("generate", tiny_model_dir, "-p", "the", "--max-tokens", 2, "--adapter", adapter)
    assert code == 0 and "answered by the chat template" in err, err
    code, out, err = run("chat", tiny_model_dir, "--max-tokens", 2, "--adapter", adapter, stdin="the\n")
    assert code == 0 and "base model" not in err, err
    code, out, err = run(
        "chat", tiny_model_dir, "--max-tokens", 2, "--adapter", adapter, "--template", "none", stdin="the\n"
    )
    assert code == 0 and "base model" in err, "what is asked for goes before"
    for to in ("peft", "mlx"):
        code, out, err = run("adapter", tiny_model_dir, adapter, tmp_path / to, "--to", to)
        assert code == 0 and chat_template.own_source(tmp_path / to)[0] == JINJA, err
    fused = tmp_path / "fused"
    code, out, err = run("fuse", tiny_model_dir, adapter, fused)
    assert code == 0 and "the adapter was trained by" in out, err
    assert chat_template.own_source(fused)[0] == JINJA


@pytest.mark.parametrize("where", ["tokenizer_config", "folder"])
def test_it_takes_the_place_of_the_models_own(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path, where: str
) -> None:
    model = openelm(tiny_model_dir, tmp_path / "model")
    place(model, where)
    for name, expected in (("openelm-instruct", OPENELM_INSTRUCT_JINJA), ("none", None)):
        adapter = trained(run, model, data, tmp_path / name, "--template", name)
        assert chat_template.source_of(model, None, adapter)[0] == expected
        assert chat_template.source_of(model)[0] == JINJA
        fused = tmp_path / f"fused {name}"
        code, _, err = run("fuse", model, adapter, fused)
        assert code == 0, err
        assert chat_template.own_source(fused)[0] == expected
    adapter = trained(run, model, data, tmp_path / "own")
    assert not (adapter / "chat_template.jinja").exists()


def test_a_mean_of_full_runs_has_it_too(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    out = trained(run, tiny_model_dir, data, tmp_path / "run", "--full", "--template", "openelm-instruct")
    code, _, err = run("average", *(out / "checkpoints").glob("step-*"), "--out", tmp_path / "mean")
    assert code == 0, err
    assert chat_template.own_source(tmp_path / "mean")[0] == OPENELM_INSTRUCT_JINJA


def test_a_folder_of_templates_that_holds_other_things_is_not_replaced(
    run: Run, tiny_model_dir: Path, tmp_path: Path
) -> None:
    made = openelm(tiny_model_dir, tmp_path / "made")
    (made / "chat_templates").mkdir()
    (made / "chat_templates" / "notes.txt").write_text("mine")
    code, _, err = run("quantize", tiny_model_dir, made, "--overwrite")
    assert code == 2 and "chat_templates" in err and (made / "chat_templates" / "notes.txt").exists()


def test_a_link_out_of_the_model_is_no_template(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    model, secret = openelm(tiny_model_dir, tmp_path / "model"), tmp_path / "secret"
    secret.write_text("mine")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "x.jinja").symlink_to(secret)
    code, _, err = run("convert", model, tmp_path / "made", "--chat-template", "openelm-instruct")
    assert code == 2 and "is a link to" in err and not (tmp_path / "made").exists()
