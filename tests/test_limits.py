"""Whatever lies where a file is wanted, the command says so in one line, at once: docs/limits.md."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from commands import Run

from elm_mlx.store import loading
from elm_mlx.text.tokenizer import Tokenizer


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def gigabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(6 << 30)


def text_of_another_age(path: Path) -> None:
    path.write_bytes(b'{"caf\xe9": "noir"}')


STRANGE: list[Callable[[Path], None]] = [pipe, device, gigabytes, Path.mkdir, text_of_another_age]


@pytest.fixture
def model(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    """A model that answers at once."""
    return tiny.write_directory(tmp_path / "model", tiny.spelling_model(tiny_tokenizer, "fox"), tiny.train_tokenizer())


def refused(run: Run, name: str, *arguments: object) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and not out, (code, out, err)
    # Each bad record of training data has a line of its own, and a model may have been opened.
    *others, line = err.splitlines()
    assert line.startswith("elm-mlx: ") and name in line, err
    assert all((name in other and "not UTF-8" in other) or "computed in float32" in other for other in others), err


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", STRANGE, ids=lambda put: put.__name__)
@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors", "model.safetensors.index.json",
    ],
)  # fmt: skip
def test_in_a_model_directory(run: Run, model: Path, name: str, put: Callable[[Path], None]) -> None:
    (model / name).unlink(missing_ok=True)
    put(model / name)
    refused(run, name, "generate", model, "-p", "\n", "--max-tokens", 1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", STRANGE, ids=lambda put: put.__name__)
def test_named_on_the_command_line(run: Run, model: Path, tmp_path: Path, put: Callable[[Path], None]) -> None:
    there = tmp_path / "there.jsonl"
    put(there)
    out = tmp_path / "out"
    (tmp_path / "adapter").mkdir()
    put(tmp_path / "adapter" / "adapter_config.json")
    for arguments in (
        ("generate", model, "--prompts", there), ("generate", model, "-p", "a", "--template", there),
        ("lora", model, "--data", there, "--out", out), ("lora", model, "--config", there, "--out", out),
        ("quantize", model, out, "--bits", 4, "--text", there), ("eval", model, "--text", there, "--out", out),
        ("pretrain", there, "--out", out), ("data", there, "--model", model), ("train-tokenizer", there, "--out", out),
    ):  # fmt: skip
        refused(run, "there.jsonl", *arguments)
    refused(run, "adapter_config.json", "generate", model, "-p", "a", "--adapter", tmp_path / "adapter")
    assert not (out / "model.safetensors").exists()


def test_what_windows_saves_reads_the_same(run: Run, model: Path, tmp_path: Path) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_bytes(b"\xef\xbb\xbf" + text.replace("{", "{\r\n").encode())
    (tmp_path / "plain").write_bytes("Grüße\na\n".encode())
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + "Grüße\r\na\r\n".encode())
    said = [run("generate", model, "--prompts", tmp_path / name, "--max-tokens", 2)[1] for name in ("plain", "marked")]
    assert said[0] == said[1] and "Grüße\n" in said[0]
    whole = ["generate", model, "--max-tokens", 2, "--json", "-p", "-"]
    plain, marked = (json.loads(run(*whole, stdin=text)[1]) for text in ("Grüße\nb", "\ufeffGrüße\r\nb"))
    assert plain["prompt"] == marked["prompt"] == "Grüße\nb" and plain["tokens"] == marked["tokens"]


def test_a_directory_that_changes_while_it_is_read(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = loading.read_header

    def gone(path: Path) -> object:
        shutil.move(path, path.with_name("moved"))
        return read(path)

    monkeypatch.setattr(loading, "read_header", gone)
    refused(run, "model.safetensors", "generate", model, "-p", "a")
