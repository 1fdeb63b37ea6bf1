"""Clean, chosen and noisy text to train on: the noise, what was trained on, and a page that its records make."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from elm_mlx.store.loading import load
from elm_mlx.text.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "data-quality"
ARMS = "noise-50", "noise-50, like"
SETS = "optimizer.steps=12", "optimizer.warmup=1", "run.batch_size=2"
TOKENS = 12 * 2 * 256


def imported(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A module of the example, as its own script would find it."""
    for found in ("run", "page", "noise", "command", "books", "measure", "pages", "spread"):
        monkeypatch.delitem(sys.modules, found, raising=False)
    monkeypatch.setattr(sys, "path", [str(FOLDER), str(FOLDER.parent), *sys.path])
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first words of the held-out books."""
    path = tmp_path_factory.mktemp("held-out") / "books.jsonl"
    books = gzip.decompress((ROOT / "examples" / "classics" / "held-out.jsonl.gz").read_bytes()).decode().splitlines()
    lines = [json.dumps({"title": book["title"], "text": book["text"][:1500]}) for book in map(json.loads, books)]
    path.write_text("\n".join(lines), "utf-8")
    return path


def example(out: Path, held_out: Path) -> str:
    words = ["--out", out, "--held-out", held_out, "--seeds", 0, "--arms", *ARMS, "--set", *SETS]
    command = [sys.executable, str(FOLDER / "run.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, held_out: Path) -> tuple[Path, str]:
    """Two arms in a few updates: what the example wrote, and what it printed."""
    out = tmp_path_factory.mktemp("data-quality") / "out"
    return out, example(out, held_out)


def test_what_is_recorded_are_the_losses_of_what_was_trained(trained: tuple[Path, str], held_out: Path) -> None:
    losses = json.loads((trained[0] / "results.json").read_text("utf-8"))["losses"]
    assert {*losses} == {*ARMS}
    for arm, by_seed in losses.items():
        model, tokenizer = load(trained[0] / "seed-0" / arm.replace(", ", "-"), compute_dtype="float32")
        assert tokenizer is not None and [*by_seed] == ["0"]
        for book in map(json.loads, held_out.read_text("utf-8").splitlines()):
            ids, nats = np.array(tokenizer.encode(book["text"])), []
            for start in range(0, len(ids) - 1, 256):
                piece = ids[start : start + 257]
                logits = np.array(model(mx.array(piece[None, :-1]))[0], np.float64)
                nats += [*(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(piece) - 1), piece[1:]])]
            bits = sum(nats) / math.log(2) / len(book["text"].encode())
            assert by_seed["0"][book["title"]] == pytest.approx([np.mean(nats), bits], rel=1e-4)


def test_what_was_trained_on_is_of_the_kinds_that_are_said(trained: tuple[Path, str]) -> None:
    """Unfiltered, the first tokens of the file; filtered, as many, and mostly clean ones."""
    out, printed = trained
    made_of = json.loads((out / "results.json").read_text("utf-8"))["made of"]
    tokenizer = Tokenizer.load(out / "tokenizer.model")
    kinds: list[str] = []
    for line in (out / "seed-0" / "noise-50.jsonl").read_text("utf-8").splitlines():
        document = json.loads(line)
        kinds += [document["kind"]] * (len(tokenizer.encode(document["text"])) + 1)
    assert made_of["noise-50"] == Counter(kinds[:TOKENS])
    assert " unlike" in printed and sum(made_of["noise-50, like"].values()) == TOKENS
    assert made_of["noise-50, like"]["clean"] > made_of["noise-50"]["clean"]


def test_it_goes_on_where_it_was(trained: tuple[Path, str], held_out: Path) -> None:
    out, printed = trained
    (out / "seed-0" / "noise-50, like.json").unlink()
    before = (out / "results.json").read_text("utf-8")
    again = example(out, held_out)
    assert re.findall(r"^\$ elm-mlx .*$", again, re.M) == [
        line + " --resume" for line in re.findall(r"^\$ elm-mlx pretrain .*noise-50-like .*$", printed, re.M)
    ]
    assert (out / "results.json").read_text("utf-8") == before


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_noise_is_as_much_and_of_the_kinds_that_are_said(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    noise = imported(monkeypatch, "noise")
    clean = [f"Once there was a king, number {number}, and he had {number * 7} sons. " * 30 for number in range(400)]
    mixed = noise.with_noise(clean, share, 1)
    assert mixed == noise.with_noise(clean, share, 1) != noise.with_noise(clean, share, 2)
    assert sorted(text for kind, text in mixed if kind == "clean") == sorted(clean)
    lengths: Counter[str] = Counter()
    for kind, text in mixed:
        lengths[kind] += len(text)
    total = lengths.total()
    assert lengths["clean"] / total == pytest.approx(1 - share, abs=0.02)
    for kind, part in {"copy": 1 / 6, "changed copy": 1 / 6, "scan": 1 / 3, "boilerplate": 1 / 3}.items():
        assert lengths[kind] / total == pytest.approx(part * share, abs=0.02)
    copies, changed = ([text for kind, text in mixed if kind == name] for name in ("copy", "changed copy"))
    assert {*copies} <= {*clean} and len({*copies}) <= 12 < len(copies)
    assert len({*changed}) == len(changed) and {text.split("\n", 1)[1] for text in changed} <= {*clean}
    for text in (text for kind, text in mixed if kind == "scan"):
        assert text not in clean and not {"king", "sons"} >= {*text.split()}


def test_strict_limits_leave_a_third(monkeypatch: pytest.MonkeyPatch, trained: tuple[Path, str]) -> None:
    run = imported(monkeypatch, "run")
    path = trained[0] / "seed-0" / "classics.jsonl"
    limits = {name: float(value) for name, value in (field.split("=") for field in run.strict(path))}
    found = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    most = [limits[f"filters.max_{name}"] for name in ("repetition", "symbols")]
    passed = [text for text in found if run.repetition(text) <= most[0] and run.symbols(text) <= most[1]]
    assert len(found) / 3 <= len(passed) <= len(found) / 2


def test_the_page_is_that_of_its_recorded_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = imported(monkeypatch, "page")
    for name in ("README.md", "results.json"):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    before = (tmp_path / "README.md").read_text("utf-8")
    row = next(line for line in before.splitlines() if line.startswith(f"| {page.ARMS['noise-50']} |"))
    (tmp_path / "README.md").write_text(before.replace(row + "\n", ""), "utf-8")
    monkeypatch.setattr(page, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["page.py"])
    page.main()
    assert (tmp_path / "README.md").read_text("utf-8") == before
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")

    losses = json.loads((FOLDER / "results.json").read_text("utf-8"))["losses"]
    seeds = sorted({*losses["classics"]} & {*losses["noise-50"]})
    noisy, clean = ([[*losses[arm][seed].values()] for seed in seeds] for arm in ("noise-50", "classics"))
    more = [np.mean([a[0] - b[0] for a, b in zip(*each, strict=True)]) for each in zip(noisy, clean, strict=True)]
    reach = {2: 12.706, 3: 4.3027}[len(more)] * statistics.stdev(more) / len(more) ** 0.5
    assert f"| {np.mean(more):+.3f} ± {reach:.3f} |" in row
