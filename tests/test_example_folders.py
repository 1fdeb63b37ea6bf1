"""The examples run as their READMEs say, on little."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from held_out_books import plain_loss, write_beginnings

from elm_mlx.store.loading import load

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parent.parent
CLASSICS = ROOT / "examples" / "classics"
SHAKESPEARE = ROOT / "examples" / "shakespeare"


def table(output: str) -> dict[str, float]:
    """The loss of each row."""
    return {name: float(loss) for name, loss in re.findall(r"^\| ([a-z ]+) \| ([\d.]+) \| [\d.]+ \|$", output, re.M)}


def loss_of_passage(model_path: Path, text: str, adapter_path: Path | None = None) -> float:
    """Nats a token of a text that fits the context, the logits' softmax taken in float64."""
    model, tokenizer = load(model_path, compute_dtype="float32", adapter_path=adapter_path)
    assert tokenizer is not None
    ids = np.array(tokenizer.encode(text))
    logits = np.array(model(mx.array(ids)[None])[0, :-1], np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-logprobs[np.arange(len(ids) - 1), ids[1:]].mean())


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The example run for five updates on little: what it wrote, what it printed, and the text it held out."""
    directory = tmp_path_factory.mktemp("shakespeare")
    for name, start, count in (("train", 0, 40), ("valid", 40, 1)):
        lines = (SHAKESPEARE / "data" / f"{name}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (directory / f"{name}.jsonl").write_text("".join(lines[start : start + count]), "utf-8")
    held_out = json.loads((directory / "valid.jsonl").read_text("utf-8"))["text"]
    command = [sys.executable, SHAKESPEARE / "run.py", "--data", directory, "--out", directory / "out", "--iters", "5"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return directory / "out", done.stdout, held_out


def test_shakespeares_table_is_the_loss_of_what_was_written(shakespeare: tuple[Path, str, str]) -> None:
    out, printed, held_out = shakespeare
    losses = table(printed)
    assert list(losses) == ["before", "with the adapter", "fused"]
    assert losses["before"] == pytest.approx(loss_of_passage(out / "base", held_out), abs=2e-4)
    assert losses["with the adapter"] == pytest.approx(loss_of_passage(out / "base", held_out, out / "run"), abs=2e-4)
    assert losses["fused"] == pytest.approx(loss_of_passage(out / "fused", held_out), abs=2e-4)


def test_shakespeare_learns_and_fusing_keeps_it(shakespeare: tuple[Path, str, str]) -> None:
    _, printed, _ = shakespeare
    before, adapted, fused = table(printed).values()
    assert adapted < before - 0.01
    assert fused == pytest.approx(adapted, abs=1e-3)  # but for rounding weights to bfloat16


def test_shakespeare_goes_on_where_it_was(shakespeare: tuple[Path, str, str]) -> None:
    out, printed, _ = shakespeare
    steps = [json.loads(line)["step"] for line in (out / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert max(steps) == 5
    command = [sys.executable, SHAKESPEARE / "run.py", "--data", out.parent, "--out", out, "--iters", "5"]
    again = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert "--resume" in again.stdout and table(again.stdout) == table(printed)


def test_shakespeare_chooses_by_other_passages_than_it_trains_on(shakespeare: tuple[Path, str, str]) -> None:
    out, _, held_out = shakespeare
    train, valid = ((out / "data" / f"{name}.jsonl").read_text("utf-8").splitlines() for name in ("train", "valid"))
    assert (len(train), len(valid)) == (38, 2)
    assert not set(train) & set(valid)
    assert all(json.loads(line)["text"] != held_out for line in [*train, *valid])


@pytest.mark.parametrize("name", ["train", "valid"])
def test_shakespeares_extract_is_whole_plays(name: str) -> None:
    lines = (SHAKESPEARE / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()
    titles = {json.loads(line)["title"] for line in lines}
    assert titles == ({"Hamlet", "Macbeth"} if name == "train" else {"Julius Caesar"})
    for title in titles:
        passages = [passage for passage in map(json.loads, lines) if passage["title"] == title]
        assert passages[0]["text"].startswith(f"Title: {title}\n")
        assert "ACT V" in "".join(passage["text"] for passage in passages)


@pytest.fixture(scope="module")
def classics(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The small model's making on the extract, for 20 updates: what it wrote, and what it printed."""
    out = tmp_path_factory.mktemp("classics") / "out"
    return out, remake(out)


def remake(out: Path) -> str:
    held_out = write_beginnings(out.with_name("held-out.jsonl"), 5000, 2000)  # of three windows, and of two
    command = [sys.executable, CLASSICS / "run.py", "--out", out, "--steps", "20", "--held-out", held_out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def classics_table(output: str) -> dict[str, list[float]]:
    """Nats a token and bits a byte of each model on both books."""
    rows = re.findall(r"^\| ([a-z0-9, ]+) \| ([\d.]+), ([\d.]+) \| ([\d.]+), ([\d.]+) \|$", output, re.M)
    return {name: [float(value) for value in values] for name, *values in rows}


def test_the_small_models_table_is_the_loss_of_what_was_written(classics: tuple[Path, str]) -> None:
    out, printed = classics
    rows = classics_table(printed)
    assert list(rows) == ["last checkpoint", "mean of the last five", "the same, exported in bfloat16"]
    model, tokenizer = load(out / "average", compute_dtype="float32")
    assert tokenizer is not None
    texts = [json.loads(line)["text"] for line in out.with_name("held-out.jsonl").read_text("utf-8").splitlines()]
    assert len(tokenizer.encode(texts[0])) > 1024
    expected = [value for text in texts for value in plain_loss(model, tokenizer, text, 512)]
    assert rows["mean of the last five"] == pytest.approx(expected, abs=2e-4)


def test_the_small_model_learns_from_raw_text_and_comes_as_a_pytorch_file(classics: tuple[Path, str]) -> None:
    out, printed = classics
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    watched = [line["valid_loss"] for line in lines if "valid_loss" in line]
    assert watched[-1] < watched[0] - 1.5
    rows = classics_table(printed)
    assert rows["the same, exported in bfloat16"] == pytest.approx(rows["mean of the last five"], abs=2e-3)
    assert (out / "exported" / "checkpoint.pt").is_file() and "largest difference 0 " in printed


def test_the_small_models_making_goes_on_where_it_was(classics: tuple[Path, str]) -> None:
    out, printed = classics
    again = remake(out)
    assert "--resume" in again and classics_table(again) == classics_table(printed)


def test_what_is_watched_is_not_trained_on(classics: tuple[Path, str]) -> None:
    out, _ = classics
    train, watched = ((out / "data" / f"{name}.jsonl").read_text("utf-8").splitlines() for name in ("train", "watched"))
    assert train and watched and not set(train) & set(watched)
    held_out = gzip.decompress((CLASSICS / "held-out.jsonl.gz").read_bytes()).decode()
    titles = {json.loads(line)["title"] for line in held_out.splitlines()}
    extract = gzip.decompress((CLASSICS / "extract.jsonl.gz").read_bytes()).decode()
    assert not titles & {json.loads(line)["title"] for line in extract.splitlines()}


def test_the_spreadsheets_columns_become_a_model_that_is_asked(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "spreadsheet" / "run.py", "--out", tmp_path, "--iters", "2"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "fields between semicolons; prompt = `Question`, completion = `Answer` (guessed" in done.stdout
    assert "test      loss " in done.stdout and (tmp_path / "fused" / "chat_template.jinja").exists()
    assert re.findall(r"^\| (before|after) \| \d+ of 16 \|$", done.stdout, re.M) == ["before", "after"]
    assert (tmp_path / "ollama" / "tool-library.gguf").read_bytes()[:4] == b"GGUF"
    assert "FROM ./tool-library.gguf" in (tmp_path / "ollama" / "Modelfile").read_text("utf-8")
