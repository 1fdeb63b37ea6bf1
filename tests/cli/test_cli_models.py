"""Names of repositories in place of directories, in every command that takes MODEL; `elm-mlx models`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import pytest
from commands import Run, modules_of, packages
from hub_server import HubServer

from elm_mlx.cli.serve import _named

NAME = "small/Llama"


@pytest.fixture
def llama(hub: HubServer, family_dirs: dict[str, Path]) -> str:
    """A Llama on the hub, whose commit this is."""
    return hub.add(NAME, family_dirs["llama"])


def test_commands_take_a_repositorys_name(
    run: Run, llama: str, hub: HubServer, family_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--max-tokens", 4, "--prompt", "the fox")
    code, named, err = run("generate", NAME, *options, "--draft-model", NAME)
    assert code == 0 and f"elm-mlx: {NAME}: " in err and "are downloaded into the hub's cache" in err
    assert named == run("generate", family_dirs["llama"], *options)[1]
    asked = len(hub.asked)
    assert run("chat", NAME, "--max-tokens", 4, stdin="hello\n")[0] == 0
    code, out, _ = run("info", "--model", NAME, "--revision", llama)
    assert code == 0 and out.startswith(f"{NAME}@{llama}: Llama, ")
    assert re.search(rf"^  directory +{tmp_path}/hub/models--small--Llama/snapshots/{llama}$", out, re.MULTILINE)
    assert run("export", NAME, "a.gguf")[0] == 0
    assert gguf.GGUFReader("a.gguf").fields["general.name"].contents() == "Llama"
    (tmp_path / "text.txt").write_text("the fox jumps over lazy dogs\n" * 9)
    assert run("eval", NAME, "--text", "text.txt", "--window", 16)[0] == 0 and (tmp_path / "evals" / "Llama").is_dir()
    assert _named(NAME) == f"{NAME}={tmp_path}/hub/models--small--Llama/snapshots/{llama}"
    assert _named(f"x={NAME}@main") == f"x={tmp_path}/hub/models--small--Llama/snapshots/{llama}"
    assert _named("small") == "small"
    assert len(hub.asked) == asked


def test_a_run_remembers_the_name_that_it_was_given(run: Run, llama: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "the fox jumps over lazy dogs"}\n' * 8)
    out = tmp_path / "run"
    settings = ("--data", tmp_path, "--out", out, "--iters", 2, "--rank", 2, "--max-seq-length", 32)
    code, shown, err = run("lora", NAME, *settings)
    assert code == 0, err
    assert f"try: elm-mlx chat {NAME} --adapter {out}" in shown
    assert json.loads((out / "run.json").read_text())["settings"]["model"] == NAME
    assert run("fuse", NAME, out, tmp_path / "fused")[0] == 0


def test_errors_say_what_was_tried(run: Run, llama: str, family_dirs: dict[str, Path], tmp_path: Path) -> None:
    for arguments, message in (
        (("info", "small/Lama"), "small/Lama: no such directory, nor is it in the hub's cache, and http"),
        (("info", f"{NAME}@v2"), f"{NAME}@v2: the hub has no such revision of {NAME}"),
        (("info", f"{NAME}@v1", "--revision", "v2"), f"--revision v2: {NAME}@v1 names a revision already"),
        (("info", NAME, "--revision", "v2"), f"{NAME}@v2: the hub has no such revision of {NAME}"),
        (("info", family_dirs["llama"], "--revision", "v2"), "--revision v2 is for a repository on the hub, but "),
        (("info", "--revision", "v2"), "--revision v2: MODEL is missing"),
        (("info", NAME, "--revision"), "--revision needs a revision"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and not out and err.startswith(f"elm-mlx: {message}") and err.count("\n") == 1, err


def test_ctrl_c_says_that_the_download_goes_on(run: Run, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from elm_mlx import hub as hub_module

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub_module, "_fetch", stop)
    code, _, err = run("info", NAME)
    assert code == 130 and "stopped; what has come is kept, and the same command goes on from there" in err


def test_a_directory_imports_nothing_of_the_hub(tiny_model_dir: Path) -> None:
    modules = modules_of("info", tiny_model_dir)[2]
    assert "huggingface_hub" not in packages(modules) and "elm_mlx.hub" not in modules


def test_what_is_there_is_listed_and_removed(run: Run, llama: str, hub: HubServer, tmp_path: Path) -> None:
    code, out, _ = run("models")
    assert code == 0 and out.startswith("no models in ")
    run("info", NAME)
    hub.repositories["a/T5"] = {"config.json": b'{"model_type": "t5"}', "model.safetensors": b""}
    run("info", "a/T5")
    code, out, _ = run("models")
    head, *rows = out.splitlines()
    assert code == 0 and head.split() == ["model", "commit", "from", "what", "it", "is", "size", "last", "used"]
    found = {row.split()[0]: row for row in rows}
    assert f" {llama[:8]}  hub   Llama, " in found[NAME] and "incomplete" in found["a/T5"]
    listed = json.loads(run("models", "--json")[1])
    about = next(each for each in listed if each["name"] == NAME)
    assert (
        about["runs"]
        and about["commit"] == llama
        and about["nbytes"] >= len(hub.repositories[NAME]["model.safetensors"])
    )
    code, _, err = run("models", "--remove", NAME)
    assert code == 2 and "pass --yes" in err and Path(about["directory"]).exists()
    code, _, err = run("models", "--remove", f"{NAME}@{llama[:7]}", "--yes")
    assert code == 2 and "not in the hub's cache" in err, "the table shows eight digits"
    code, _, err = run("models", "--remove", f"{NAME}@{llama[:8]}")
    assert code == 2 and "pass --yes" in err
    code, _, err = run("models", "--remove", "small/Other", "--yes")
    assert code == 2 and err.startswith("elm-mlx: small/Other: not in the hub's cache, and not converted from there")
    code, out, _ = run("models", "--remove", f"{NAME}@main", "--remove", "a/T5", "--yes")
    assert code == 0 and "removed     2 models, " in out and not Path(about["directory"]).exists()
    assert run("models")[1].startswith("no models in ")


def test_a_conversion_is_listed_beside_its_source(
    run: Run, hub: HubServer, tiny_model_dir: Path, tiny_tokenizer_file: Path
) -> None:
    hub.add("apple/OpenELM-tiny", tiny_model_dir)
    del hub.repositories["apple/OpenELM-tiny"]["tokenizer.model"]
    hub.repositories["meta-llama/Llama-2-7b-hf"] = {"tokenizer.model": tiny_tokenizer_file.read_bytes()}
    code, out, err = run("info", "apple/OpenELM-tiny")
    assert code == 0 and "/elm-mlx/models/apple--OpenELM-tiny/" in out and "is converted, once, into" in err
    rows = [row.split("  ") for row in run("models")[1].splitlines() if row.startswith("apple/")]
    assert len(rows) == 2
    assert {"converted", "hub"} == {cell.strip() for row in rows for cell in row} & {"converted", "hub"}
    code, out, _ = run("models", "--remove", "apple/OpenELM-tiny", "--yes")
    assert code == 0 and "removed     2 models" in out and "OpenELM-tiny" not in run("models")[1]
