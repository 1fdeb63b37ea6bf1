"""examples/tokenizers on what comes with the project, small: its figures against the plainest count there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from elm_mlx.model.config import ModelConfig

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the example wrote, and what it printed."""
    out = tmp_path_factory.mktemp("tokenizers")
    command = [
        sys.executable,
        ROOT / "examples" / "tokenizers" / "run.py",
        "--shared",
        out / "none",
        "--out",
        out / "out",
    ]
    sizes = ["--sizes", "300", "600", "--no-speed"]
    ran = subprocess.run([*map(str, command), *sizes], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return out / "out", ran.stdout


def test_bytes_a_token_are_the_librarys(done: tuple[Path, str]) -> None:
    from tokenizers import Tokenizer

    out, printed = done
    found = json.loads((out / "results.json").read_text("utf-8"))["bytes_per_token"]
    assert list(found) == ["trained, 300", "trained, 600"]
    lines = (ROOT / "examples" / "shakespeare" / "data" / "valid.jsonl").read_text("utf-8").splitlines()
    plays = [json.loads(line)["text"] for line in lines]
    for size in (300, 600):
        encoder = Tokenizer.from_file(str(out / f"bpe-{size}.json"))
        assert encoder.get_vocab_size() == size
        tokens = sum(len(encoder.encode(text).ids) for text in plays)
        expected = sum(len(text.encode()) for text in plays) / tokens
        assert found[f"trained, {size}"]["plays"] == pytest.approx(expected)
        assert f"| trained, {size} | {expected:.2f} |" in printed
    assert found["trained, 600"]["plays"] > found["trained, 300"]["plays"]


def test_a_cut_vocabulary_is_one_that_was_trained_so_small(done: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = done
    command = [sys.executable, ROOT / "examples" / "tokenizers" / "run.py", "--shared", tmp_path / "none", "--no-speed"]
    subprocess.run([*map(str, command), "--out", tmp_path, "--sizes", "300"], check=True, capture_output=True, cwd=ROOT)
    small = [json.loads(path.read_text("utf-8"))["model"] for path in (out / "bpe-300.json", tmp_path / "bpe-300.json")]
    assert small[0]["vocab"] == small[1]["vocab"] and small[0]["merges"] == small[1]["merges"]


def test_shares_are_those_of_the_presets(done: tuple[Path, str]) -> None:
    shares = json.loads((done[0] / "results.json").read_text("utf-8"))["embedding_share"]
    config = ModelConfig.preset("OpenELM-1_1B", 128_256)
    embedding = config.shapes()["transformer.token_embeddings.weight"]
    assert shares["OpenELM-1_1B"]["128256"] == pytest.approx(embedding[0] * embedding[1] / config.parameters)
