"""Workers: they answer what is asked, and their deaths are reasons; llama.cpp by a program that speaks as it does."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elm_mlx.bench import sides
from elm_mlx.bench.sides import Programs, Side, Unavailable, WorkerSide
from elm_mlx.bench.suites import About, Case, Figures
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.roofline import Cost

LLAMA = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if given["-m"].endswith("bad.gguf"):
    sys.exit("error: failed to load model")
known = {{"build_commit": "abc123", "model_type": "openelm 270M F16", "model_n_params": 271}}
rows = [(int(given["-p"]), 0), (0, int(given["-n"]))]
rows = [known | {{"n_prompt": p, "n_gen": n, "avg_ns": 2_000_000 * (p + n), "avg_ts": 500.0}} for p, n in rows if p + n]
print(json.dumps(rows))
"""


@pytest.fixture
def start(tiny_model_dir: Path) -> Iterator[Callable[..., Side]]:
    opened = []

    def call(name: str, dtype: str | None = None) -> Side:
        opened.append(sides.start(name, tiny_model_dir, dtype, Programs()))
        return opened[-1]

    yield call
    for side in opened:
        side.close()


def sane(figures: Figures, prompt: int, batch: int = 1) -> None:
    assert figures.prompt == pytest.approx(batch * prompt / figures.first, rel=0.2)
    assert figures.decode > 0 and figures.memory is not None and figures.memory > 10**7


def test_ours_says_what_it_has_and_measures(start: Callable[..., Side], tiny_model_dir: Path) -> None:
    side = start("ours")
    config = ModelConfig.load(tiny_model_dir / "config.json")
    about, cost = side.about, Cost.of(config)
    assert about.name.startswith("elm-mlx ") and about.dtype == "float32" and about.parameters == config.parameters
    assert about.weight_bytes == 4 * config.parameters and about.cache_bytes == config.kv_bytes_per_token(4)
    assert (about.flops, about.flops_head) == (sum(cost.linear), cost.head)
    sane(side.measure(Case("m", "stored", 20, 5)), 20)
    sane(side.measure(Case("m", "stored", 8, 4, batch=3)), 8, 3)
    alone = side.measure(Case("m", "stored", 8, 1))
    assert alone.decode == 0
    for prompt, new, reason in ((600, 2, "the model's context is 512"), (500, 30, "12 tokens were generated, not 30")):
        with pytest.raises(Unavailable, match=reason):
            side.measure(Case("m", "stored", prompt, new))
    assert side.alive()


def test_the_naive_one_is_ours_too(start: Callable[..., Side]) -> None:
    sane(start("naive", "bfloat16").measure(Case("m", "stored", 8, 4)), 8)


def test_mlx_lm_computes_in_what_is_asked_for(start: Callable[..., Side]) -> None:
    side = start("mlx-lm", "float32")
    assert side.about.name.startswith("mlx-lm ") and side.about.dtype == "float32"
    sane(side.measure(Case("m", "stored", 8, 4)), 8)
    sane(side.measure(Case("m", "stored", 8, 4, batch=2)), 8, 2)


def test_mlx_lm_as_installed_has_no_blas_of_ours(start: Callable[..., Side]) -> None:
    stock = start("mlx-lm-stock", "float32")
    assert stock.about.dtype == "bfloat16"  # as the model came
    sane(stock.measure(Case("m", "stored", 8, 4)), 8)


def test_only_mlx_lm_as_installed_is_denied_our_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELM_MLX_BLAS", raising=False)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    for name in ("ours", "naive", "mlx-lm", "mlx-lm-stock"):
        kept = sides.environment(name)
        assert kept.get("ELM_MLX_BLAS") == ("off" if name == "mlx-lm-stock" else None)
        assert "OPENBLAS_CORETYPE" not in kept and kept["PATH"] == os.environ["PATH"]


def test_a_side_that_cannot_start_says_why(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no such directory"):
        sides.start("ours", tmp_path / "none", None, Programs())
    with pytest.raises(Unavailable, match=r"PyTorch is not installed for .*--python"):
        sides.start("pytorch", tiny_model_dir, None, Programs(python="/bin/false"))
    with pytest.raises(Unavailable, match=r"/no/such/python: No such file"):
        sides.start("pytorch", tiny_model_dir, None, Programs(python="/no/such/python"))


@pytest.mark.parametrize(
    ("death", "reason"),
    [("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "lack of memory"),
     ("raise SystemExit(3)", "ended with 3"),
     ("raise ValueError('that was it')", "ValueError: that was it")],
)  # fmt: skip
def test_a_death_is_a_reason(death: str, reason: str) -> None:
    hello = 'print(\'{"name": "x", "dtype": "float32"}\', flush=True); input()\n'
    side = WorkerSide("x", [sys.executable, "-c", hello + death])
    assert side.about == About("x", "float32")
    with pytest.raises(Unavailable, match=reason):
        side.measure(Case("m", "stored", 1, 1))
    assert not side.alive()
    side.close()
    with pytest.raises(Unavailable, match=reason):
        WorkerSide("x", [sys.executable, "-c", death])


def test_a_worker_that_is_busy_is_ended_at_once() -> None:
    hello = 'print(\'{"name": "x", "dtype": "float32"}\', flush=True)\nimport time; time.sleep(60)'
    side = WorkerSide("x", [sys.executable, "-c", hello])
    started = time.monotonic()
    side.close()
    assert time.monotonic() - started < 10


def test_llama_cpp_is_asked_as_its_program_wants(tmp_path: Path, tiny_model_dir: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(LLAMA.format(python=sys.executable))
    program.chmod(0o755)
    known = Programs(llama_bench=str(program), gguf=tmp_path / "a.gguf")
    side = sides.start("llama.cpp", tiny_model_dir, None, known)
    assert side.about.name == "llama.cpp abc123" and side.about.parameters == 271
    assert side.measure(Case("m", "stored", 100, 33)) == Figures(0.2, 500.0, 500.0)
    assert side.measure(Case("m", "stored", 100, 1)).decode == 0
    with pytest.raises(Unavailable, match="measures one text at a time"):
        side.measure(Case("m", "stored", 100, 33, batch=2))
    with pytest.raises(Unavailable, match="llama-bench: error: failed to load model"):
        sides.start("llama.cpp", tiny_model_dir, None, Programs(llama_bench=str(program), gguf=tmp_path / "bad.gguf"))
    with pytest.raises(Unavailable, match="--gguf"):
        sides.start("llama.cpp", tiny_model_dir, None, Programs(llama_bench=str(program)))
    with pytest.raises(Unavailable, match="not on the PATH"):
        sides.start("llama.cpp", tiny_model_dir, None, Programs(llama_bench="no-such-program"))
