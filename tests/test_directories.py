"""What `--overwrite` replaces, one rule for all commands; which links are followed when a model is copied; what is said
of a path that is no model directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from elm_mlx import directories
from elm_mlx.directories import ADAPTER, EXPORT, MODEL, Kind, check_destination, check_file
from elm_mlx.errors import InputError
from elm_mlx.model.config import ModelConfig, read_config


def made(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")
    return path


KINDS = {
    "model": (MODEL, ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md")),
    "adapter": (ADAPTER, ("adapter_config.json", "adapters.safetensors", "README.md")),
    "peft": (ADAPTER, ("adapter_config.json", "adapter_model.bin")),
    "export": (EXPORT, ("checkpoint.pt", "config.yaml", "tokenizer.model")),
}
LITTER = (
    ".DS_Store", "._config.json", "._anything", "Thumbs.db", "desktop.ini", ".gitattributes", "Icon\r",
    ".cache/huggingface/download/config.json.metadata", ".cache/huggingface/.gitignore",
)  # fmt: skip


@pytest.mark.parametrize(("kind", "names"), KINDS.values(), ids=KINDS)
def test_a_directory_of_the_kind_is_replaced_when_asked(kind: Kind, names: tuple[str, ...], tmp_path: Path) -> None:
    out = made(tmp_path / "out", *names, *LITTER)
    check_destination(out, kind, True)
    check_destination(tmp_path / "new", kind, False)
    with pytest.raises(InputError, match="exists already; pass --overwrite"):
        check_destination(out, kind, False)


@pytest.mark.parametrize(("kind", "names"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "other",
    [
        "thesis.tex", "checkpoints/step-1", ".git/HEAD", ".cache/pip/x",
        ".cache/huggingface/hub/models--a--b/blobs/x", ".cache/huggingface/token", ".DS_Store/x", ".hidden", "run.json",
        "README.md/x", "DS_Store",
    ],
)  # fmt: skip
def test_what_is_of_no_such_directory_is_kept_and_named(
    kind: Kind, names: tuple[str, ...], other: str, tmp_path: Path
) -> None:
    out = made(tmp_path / "out", *(name for name in names if not other.startswith(name)), other)
    name = other.split("/")[0]
    with pytest.raises(InputError, match=f"is not just {kind.name}: it holds '{name}'; nothing was replaced"):
        check_destination(out, kind, True)


@pytest.mark.parametrize(("kind", "names"), KINDS.values(), ids=KINDS)
def test_without_its_mark_it_is_none(kind: Kind, names: tuple[str, ...], tmp_path: Path) -> None:
    out = made(tmp_path / "out", *names)
    (out / kind.mark).unlink()
    with pytest.raises(InputError, match=r"is not just .*: it holds"):
        check_destination(out, kind, True)
    check_destination(made(tmp_path / "litter", *LITTER), kind, True)  # as good as empty


def test_links(tmp_path: Path) -> None:
    """A link in the directory goes, what it leads to stays; a link to a directory is none of a model's files."""
    out = made(tmp_path / "out", "config.json")
    (out / "model.safetensors").symlink_to(made(tmp_path / "blobs", "a") / "a")
    check_destination(out, MODEL, True)
    (tmp_path / "link").symlink_to("out")
    check_destination(tmp_path / "link", MODEL, True)
    (out / "README.md").symlink_to(tmp_path / "blobs")
    with pytest.raises(InputError, match=r"it holds 'README\.md'"):
        check_destination(tmp_path / "link", MODEL, True)
    (tmp_path / "loop").symlink_to("loop")
    check_destination(tmp_path / "loop", MODEL, True)  # as the system sees it nothing is there; writing says more


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    out = made(tmp_path / "out", "config.json", "model.safetensors")
    (tmp_path / "link").symlink_to("out")
    elsewhere = made(tmp_path / "elsewhere", "model.safetensors")
    (out / "model-1.safetensors").symlink_to(elsewhere / "model.safetensors")
    for target in (out, tmp_path / "link"):
        for source in (out, tmp_path / "link", out / "model.safetensors", out / "model-1.safetensors"):
            with pytest.raises(InputError, match=r"holds the source, .*, which is to be read"):
                check_destination(target, MODEL, True, [elsewhere, source])
        check_destination(target, MODEL, True, [elsewhere, tmp_path])


def test_files(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    check_file(page, False)
    page.write_bytes(b"<!doctype html> and more")
    with pytest.raises(InputError, match="exists already; pass --overwrite"):
        check_file(page, False)
    check_file(page, True)
    check_file(page, False, b"<!doctype html>")
    page.write_bytes(b"<html>")
    with pytest.raises(InputError, match="exists already; pass --overwrite"):
        check_file(page, False, b"<!doctype html>")
    os.mkfifo(tmp_path / "pipe")
    for path, says in ((tmp_path, "is a directory"), (tmp_path / "pipe", "is not a regular file")):
        with pytest.raises(InputError, match=says):
            check_file(path, True)


COMMANDS: dict[str, Callable[[Path, Path, Path], tuple[object, ...]]] = {
    "convert": lambda model, adapter, out: ("convert", model, out),
    "fuse": lambda model, adapter, out: ("fuse", model, adapter, out),
    "quantize": lambda model, adapter, out: ("quantize", model, out, "--bits", 8, "--group-size", 32),
    "average": lambda model, adapter, out: ("average", model, "--out", out),
    "export": lambda model, adapter, out: ("export", model, out),
    "adapter": lambda model, adapter, out: ("adapter", model, adapter, out, "--to", "peft"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_goes_by_the_same_rule(
    command: Callable[[Path, Path, Path], tuple[object, ...]], run: Run, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from elm_mlx.store import adapters
    from elm_mlx.store.loading import load_model

    model = load_model(tiny_model_dir)
    adapter = adapters.plan(model.config, rank=2)
    adapters.attach(model, adapter)
    adapters.save(tmp_path / "adapter", model, adapter)
    arguments = command(tiny_model_dir, tmp_path / "adapter", tmp_path / "out")
    code, _, err = run(*arguments)
    assert code == 0, err
    made(tmp_path / "out", *LITTER)
    code, _, err = run(*arguments)
    assert code == 2 and "exists already; pass --overwrite" in err
    code, _, err = run(*arguments, "--overwrite")
    assert code == 0 and not (tmp_path / "out" / ".DS_Store").exists(), err
    made(tmp_path / "out", "thesis.tex")
    code, _, err = run(*arguments, "--overwrite")
    assert code == 2 and "it holds 'thesis.tex'; nothing was replaced" in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


# --- what comes along


def cached(root: Path, *names: str) -> Path:
    """A snapshot in the hub's cache: every file a link to a blob."""
    snapshot = root / "models--X--Y" / "snapshots" / "0123"
    for number, name in enumerate(names):
        made(root / "models--X--Y" / "blobs", f"{number:040x}")
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        target = root / "models--X--Y" / "blobs" / f"{number:040x}"
        (snapshot / name).symlink_to(os.path.relpath(target, (snapshot / name).parent))
    return snapshot


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    source = cached(tmp_path, *directories.CARRIED)
    (tmp_path / "model").symlink_to(source)
    for number, path in enumerate((source, tmp_path / "model")):
        out = tmp_path / str(number)
        out.mkdir()
        directories.carry(path, out)
        assert sorted(entry.name for entry in out.iterdir()) == sorted(directories.CARRIED)
        assert not any(entry.is_symlink() for entry in out.iterdir())


def test_a_link_within_the_directory_is_followed(tmp_path: Path) -> None:
    source = made(tmp_path / "model", "tokenizer.json")
    (source / "vocab.json").symlink_to("tokenizer.json")
    directories.carry(source, made(tmp_path / "out", "x"))
    assert (tmp_path / "out" / "vocab.json").read_text() == "x"


@pytest.mark.parametrize("name", directories.CARRIED)
@pytest.mark.parametrize("hub", [False, True])
def test_a_link_out_of_it_is_refused_by_name(hub: bool, name: str, tmp_path: Path) -> None:
    made(tmp_path, "id_rsa")
    source = cached(tmp_path, "config.json") if hub else made(tmp_path / "model", "config.json")
    (source / name).symlink_to(tmp_path / "id_rsa")
    with pytest.raises(InputError, match=f"{name}: is a link to .*id_rsa, outside of the model's directory"):
        directories.carry(source, made(tmp_path / "out", "x"))


@pytest.mark.parametrize("name", directories.TEMPLATES)
def test_a_folder_that_is_a_link_out_of_it_is_refused_by_name(name: str, tmp_path: Path) -> None:
    made(tmp_path / "elsewhere", "default.jinja")
    source = made(tmp_path / "model", "config.json")
    (source / name).symlink_to(tmp_path / "elsewhere")
    refused = f"{name}/default.jinja: is a link to .*elsewhere/default.jinja, outside of the model's directory"
    with pytest.raises(InputError, match=refused):
        directories.carry(source, made(tmp_path / "out", "x"))
    with pytest.raises(InputError, match=refused):  # which `convert` asks of the one that it takes
        directories.own_file(source / name / "default.jinja")


@pytest.mark.parametrize("name", ["convert", "fuse", "quantize", "average"])
@pytest.mark.parametrize("file", ["generation_config.json", "chat_template.jinja"])
def test_no_command_hands_on_what_a_link_leads_to(
    file: str, name: str, run: Run, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from elm_mlx.store import adapters
    from elm_mlx.store.loading import load_model

    model = load_model(tiny_model_dir)
    adapter = adapters.plan(model.config, rank=2)
    adapters.attach(model, adapter)
    adapters.save(tmp_path / "adapter", model, adapter)
    base = tmp_path / "model"
    base.mkdir()
    for entry in tiny_model_dir.iterdir():
        (base / entry.name).write_bytes(entry.read_bytes())
    (tmp_path / "secret").write_text('{"secret": 1}')
    (base / file).symlink_to(tmp_path / "secret")
    code, _, err = run(*COMMANDS[name](base, tmp_path / "adapter", tmp_path / "out"))
    assert code == 2 and f"{file}: is a link to" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_directory_says_what_to_do(
    tmp_path: Path, tiny_config: ModelConfig, family_dirs: dict[str, Path]
) -> None:
    with pytest.raises(InputError, match=r"no such directory; `elm-mlx convert SRC DST` makes one"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        read_config(tmp_path)
    file = tmp_path / "model.pt"
    file.touch()
    with pytest.raises(InputError, match=r"a file, not a model directory; `elm-mlx convert .*model\.pt DST`"):
        read_config(file)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    assert read_config(tmp_path) == tiny_config
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"model\.safetensors: a file of the model directory .*: give that one"):
        read_config(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"OWNER/NAME is a repository on the Hugging Face hub$"):
        read_config(Path("meta/Llama-9"))
    with pytest.raises(InputError, match=r"holds no tokenizer\.model.* or convert that again with --tokenizer$"):
        read_config(tmp_path, with_tokenizer=True)
    shutil.copy(family_dirs["llama"] / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"holds no tokenizer\.json.* was made from into it$"):
        read_config(tmp_path, with_tokenizer=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"adapter_config.json": {"fine_tune_type": "lora"}},
            "out: an adapter, not a model .* give MODEL and `--adapter .*out`, or .* fuse MODEL .*out D",
        ),
        (
            {
                "adapter_config.json": {"fine_tune_type": "full"},
                "run.json": {"command": "lora", "settings": {"model": "/base"}},
            },
            "out: the trained weights of a model, kept .* give /base and .* `elm-mlx fuse /base .*out DST`",
        ),
        ({"adapter_config.json": {"model": "theirs"}}, "give theirs and `--adapter"),
        ({"adapter_config.json": {"model": 7}, "run.json": {"settings": 7}}, "give MODEL and `--adapter"),
        (
            {"adapter_config.json": {"peft_type": "LORA"}},
            "an adapter of PEFT, not a .* its model and `--adapter .*out`",
        ),
        (
            {"adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "some/llama"}},
            r"give its model \(some/llama\) and `--adapter .*out`",
        ),
        (
            {"run.json": {"command": "dpo"}},
            "a training run that has left no adapter yet, .* `elm-mlx dpo --out .*out --resume` goes on",
        ),
        ({"run.json": {"identity": {}}}, r"holds no config\.json, so it is not a model directory$"),
        ({"b.pt": 0, "a.gguf": 0}, r"so it is not a model directory; `elm-mlx convert .*out/a\.gguf DST` makes one$"),
        ({"run.json": [], "adapter_config.json": []}, r"holds no config\.json"),
    ],
)
def test_what_else_a_directory_is(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, values in files.items():
        (out / name).write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        read_config(out)


@pytest.mark.parametrize(
    "run, message",
    [
        ({"command": "pretrain"}, r"directory; `elm-mlx average .*step-00000002 --out DIR` makes one of it$"),
        ({"command": "grpo"}, r"directory; `elm-mlx grpo --out \S*run --resume` goes on with the run$"),
        ({"command": "later"}, "directory$"),
        ([], "directory$"),
        (None, "directory$"),
    ],
)
def test_what_to_do_with_a_runs_checkpoint(tmp_path: Path, run: Any, message: str) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "parameters.safetensors").write_bytes(b"")
    if run is not None:
        (tmp_path / "run/run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=f"step-00000002: a checkpoint of a training run, not a model {message}"):
        read_config(checkpoint)
