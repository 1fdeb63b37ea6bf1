"""What the tests share: tiny models made by code, and the small real one."""

from __future__ import annotations

import os

# Before BLAS is loaded. Its threads wait by spinning, and so take the processor from whatever runs beside them: other
# tests, and the programs that tests start, took up to six times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# isort: split
import elm_mlx  # noqa: F401  before whatever imports MLX, for the sake of its BLAS

# isort: split
import builtins
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import other_models
import processes
import pytest
import tiny
from commands import Run
from hub_server import HubServer
from hypothesis import settings

from elm_mlx import blas, device
from elm_mlx.cli import main
from elm_mlx.model.config import ModelConfig
from elm_mlx.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]

for name in ("COLUMNS", "LINES"):  # readline sets them, and pytest-xdist's workers have them from their parent
    os.environ.pop(name, None)
processes.reset_signals()
settings.register_profile("any machine", deadline=None)  # one that is busy is slow, and no failure
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first, so that no processor ends by waiting for one of them alone."""
    items.sort(key=lambda item: "example" not in item.path.name)


@pytest.fixture(params=[False, True], ids=["cpu", "gpu"])
def branch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both branches of every decision, whatever this machine has."""
    monkeypatch.setattr(device, "on_gpu", lambda: request.param)
    return bool(request.param)


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    """Ends what a test has started and left running, and calls that a failure."""
    before = processes.snapshot()
    yield
    left = processes.end_new(before)
    assert not left, f"left running: {left}"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`elm-mlx` in this process: exit code, stdout, stderr."""

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["elm-mlx", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package as one that is not installed."""

    def refuse(package: str) -> None:
        real = builtins.__import__

        def importing(name: str, *arguments: Any) -> Any:
            if name == package:
                raise ImportError(name)
            return real(name, *arguments)

        monkeypatch.setattr(builtins, "__import__", importing)

    return refuse


@pytest.fixture
def two_threads() -> Iterator[None]:
    """BLAS by two threads, as a program has it that is not a test."""
    kept, change = blas.threads(), blas._openblas("openblas_set_num_threads")
    if change is None:
        pytest.skip("the BLAS here cannot be told how many threads to use")
    change(2)
    yield
    change(kept)


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 320 pieces: BPE with byte fallback, BOS 1, EOS 2."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tiny.train_tokenizer())
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer_file)


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer: Tokenizer) -> ModelConfig:
    """Three layers that grow, 512 tokens of context, the vocabulary of `tiny_tokenizer`."""
    return tiny.scaled_config(tiny_tokenizer.vocab_size)


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig, tiny_tokenizer_file: Path
) -> Path:
    """A base model of random weights in bfloat16, with a tokenizer. Not to be written to."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    return tiny.write_directory(path, tiny.random_model(tiny_config), tiny_tokenizer_file.read_bytes())


@pytest.fixture(scope="session")
def wide_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer, tiny_tokenizer_file: Path
) -> Path:
    """As `tiny_model_dir`, with heads of 64 values. Not to be written to."""
    model = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size, head_dim=64))
    return tiny.write_directory(tmp_path_factory.mktemp("wide") / "model", model, tiny_tokenizer_file.read_bytes())


@pytest.fixture(scope="session")
def classics_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real model, converted: the project's own copy of it, or else the one beside the project."""
    from elm_mlx_convert import convert

    sources = [ROOT / "examples" / "classics", ROOT / ".." / "shared" / "data" / "classics"]
    found = next((path for folder in sources for path in sorted(folder.glob("*.pt"))), None)
    if found is None:
        pytest.skip(f"no checkpoint in {' or '.join(map(str, sources))}")
    path = tmp_path_factory.mktemp("classics") / "model"
    convert(found, path)
    return path


@pytest.fixture(scope="session")
def family_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model directory of each other family. Not to be written to."""
    root = tmp_path_factory.mktemp("families")
    return {name: other_models.write_model(root / name, name) for name in other_models.CONFIGS}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub of this test's own, with caches of its own: what huggingface_hub and conversions are kept in."""
    from huggingface_hub import constants

    server = HubServer()
    with server.running() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
        yield server
