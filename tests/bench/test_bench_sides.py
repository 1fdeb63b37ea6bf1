"""Workers: they answer what is asked, and their deaths are reasons; llama.cpp with a library of our own."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elm_mlx.bench import sides
from elm_mlx.bench.sides import Programs, Side, Unavailable, WorkerSide
from elm_mlx.bench.suites import About, Case, Measured, prompt_ids
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.roofline import Cost

# As much of llama.cpp's library as the worker calls. Its network's next token is a sum over the text so far.
LLAMA = """
import ctypes
from types import SimpleNamespace as Values

VOCAB, PIECE = 90, 16
_lib = Values(ggml_commit=type("", (), {"__call__": lambda self: b"abc1234-dirty"})())
open_contexts = []

def llama_backend_init(): pass
def llama_model_default_params(): return Values()
def llama_model_load_from_file(path, params): return None if b"bad" in path else Values(path=path)
def llama_model_get_vocab(model): return model
def llama_vocab_n_tokens(vocab): return VOCAB
def llama_model_n_params(model): return 271
def llama_print_system_info(): return b"CPU : AVX2 = 1 | "
def llama_supports_gpu_offload(): return False
def llama_context_default_params(): return Values(n_threads=4)
def llama_n_batch(context): return PIECE
def llama_batch_free(batch): pass

def llama_model_desc(model, text, size):
    text.value = b"llama 135M Q4_1"

def llama_init_from_model(model, settings):
    assert settings.n_threads == settings.n_threads_batch > 0 and not open_contexts
    if settings.n_ctx > 500:
        return None
    open_contexts.append(settings)
    return Values(texts=[[] for _ in range(settings.n_seq_max)], room=settings.n_ctx)

def llama_free(context):
    open_contexts.pop()

def llama_batch_init(size, embedding, texts):
    rows = (ctypes.c_int * texts * size)()
    return Values(token=(ctypes.c_int * size)(), pos=(ctypes.c_int * size)(), n_seq_id=(ctypes.c_int * size)(),
                  seq_id=rows, logits=(ctypes.c_int8 * size)(), n_tokens=0)

def llama_decode(context, batch):
    assert 0 < batch.n_tokens <= PIECE
    context.logits = {}
    for place in range(batch.n_tokens):
        assert batch.n_seq_id[place] == 1
        text = context.texts[batch.seq_id[place][0]]
        assert batch.pos[place] == len(text)
        text.append(batch.token[place])
        if batch.logits[place]:
            logits = (ctypes.c_float * VOCAB)()
            logits[sum((at + 1) * token for at, token in enumerate(text)) % VOCAB] = 1
            context.logits[place] = logits
    return sum(map(len, context.texts)) > context.room

def llama_get_logits_ith(context, place):
    return ctypes.cast(context.logits[place], ctypes.POINTER(ctypes.c_float))
"""


@pytest.fixture
def peers(tmp_path: Path) -> str:
    """A Python that has llama-cpp-python, of which this is the library."""
    packages = tmp_path / "packages"
    for path, text in {
        "llama_cpp/__init__.py": "",
        "llama_cpp/llama_cpp.py": LLAMA,
        "llama_cpp_python-9.8.dist-info/METADATA": "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.8\n",
    }.items():
        (packages / path).parent.mkdir(parents=True, exist_ok=True)
        (packages / path).write_text(text)
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(packages)!r}); _, _, *sys.argv = sys.argv\n"
        "exec(sys.argv[1]) if sys.argv[0] == '-c' else runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.fixture
def start(tiny_model_dir: Path) -> Iterator[Callable[..., Side]]:
    opened = []

    def call(name: str, dtype: str | None = None) -> Side:
        opened.append(sides.start(name, tiny_model_dir, dtype, Programs()))
        return opened[-1]

    yield call
    for side in opened:
        side.close()


def sane(measured: Measured, prompt: int, batch: int = 1) -> list[int]:
    figures, text = measured
    assert figures.prompt == pytest.approx(batch * prompt / figures.first, rel=0.2)
    assert figures.decode > 0 and figures.memory is not None and figures.memory > 10**7
    return text


def test_ours_says_what_it_has_and_measures(start: Callable[..., Side], tiny_model_dir: Path) -> None:
    side = start("ours")
    config = ModelConfig.load(tiny_model_dir / "config.json")
    about, cost = side.about, Cost.of(config)
    assert about.name.startswith("elm-mlx ") and about.dtype == "float32" and about.parameters == config.parameters
    assert about.weight_bytes == 2 * config.parameters and about.cache_bytes == config.kv_bytes_per_token(4)
    assert (about.flops, about.flops_head) == (sum(cost.linear), cost.head)
    sane(side.measure(Case("m", "stored", 20, 5)), 20)
    sane(side.measure(Case("m", "stored", 8, 4, batch=3)), 8, 3)
    alone, _ = side.measure(Case("m", "stored", 8, 1))
    assert alone.decode == 0
    for prompt, new, reason in ((600, 2, "the model's context is 512"), (500, 30, "12 tokens were generated, not 30")):
        with pytest.raises(Unavailable, match=reason):
            side.measure(Case("m", "stored", prompt, new))
    assert side.alive()


def test_keys_in_few_bits_are_measured_or_the_reason_why_not(wide_model_dir: Path, start: Callable[..., Side]) -> None:
    for name in ("ours", "mlx-lm"):
        side = sides.start(name, wide_model_dir, "float32", Programs())
        try:
            sane(side.measure(Case("m", "stored", 8, 4, kv_bits=8)), 8)
            if name == "ours":
                sane(side.measure(Case("m", "stored", 8, 4, batch=3, kv_bits=4)), 8, 3)
            else:
                with pytest.raises(Unavailable, match="of one text alone"):
                    side.measure(Case("m", "stored", 8, 4, batch=3, kv_bits=4))
        finally:
            side.close()
    with pytest.raises(Unavailable, match="heads of 16 values"):
        start("ours").measure(Case("m", "stored", 8, 4, kv_bits=8))


def test_the_naive_one_is_ours_too(start: Callable[..., Side]) -> None:
    sane(start("naive", "bfloat16").measure(Case("m", "stored", 8, 4)), 8)


def test_with_prompt_lookup_it_writes_the_same_and_tells_what_a_pass_gave(start: Callable[..., Side]) -> None:
    case = Case("m", "stored", 30, 60)
    plain, expected = start("ours").measure(case)
    side = start("prompt-lookup")
    figures, text = side.measure(case)
    assert text == expected and len(text) == 60
    assert plain.per_pass is None and figures.per_pass is not None and 1 <= figures.per_pass <= 8
    with pytest.raises(Unavailable, match="one text at a time"):
        side.measure(Case("m", "stored", 8, 4, batch=2))


def test_mlx_lm_computes_in_what_is_asked_for(start: Callable[..., Side]) -> None:
    side = start("mlx-lm", "float32")
    assert side.about.name.startswith("mlx-lm ") and side.about.dtype == "float32"
    ours = sane(start("ours").measure(Case("m", "stored", 8, 4)), 8)
    assert sane(side.measure(Case("m", "stored", 8, 4)), 8) == ours and len(ours) == 4
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


def test_llama_cpp_reads_all_prompts_and_goes_on_from_what_it_chose(peers: str, tiny_model_dir: Path) -> None:
    side = sides.start("llama.cpp", tiny_model_dir, None, Programs(peers))
    try:
        assert side.about.name == "llama.cpp abc1234 (llama-cpp-python 9.8)" and side.about.parameters == 271
        assert side.about.dtype == "Q4_1" and side.about.notes == ("CPU : AVX2 = 1",)
        for case in (Case("m", "stored", 40, 5), Case("m", "stored", 24, 3, batch=3), Case("m", "stored", 8, 1)):
            figures, text = side.measure(case)
            texts = [prompt_ids(case.prompt, 90, row) for row in range(case.batch)]
            for step in range(case.new):
                chosen = [sum((at + 1) * token for at, token in enumerate(ids)) % 90 for ids in texts]
                assert text[step * case.batch : (step + 1) * case.batch] == chosen
                texts = [[*ids, token] for ids, token in zip(texts, chosen, strict=True)]
            assert figures.prompt == pytest.approx(case.batch * case.prompt / figures.first)
            assert (figures.decode > 0) == (case.new > 1) and (figures.memory or 10**8) > 10**6
        with pytest.raises(Unavailable, match="no room for so many positions"):
            side.measure(Case("m", "stored", 600, 1))
        assert side.alive()
    finally:
        side.close()


def test_llama_cpp_is_given_the_users_file_or_one_that_is_written(
    peers: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started: list[str] = []
    monkeypatch.setattr(sides, "WorkerSide", lambda name, command: started.append(Path(command[-1]).read_bytes()[:4]))
    own = tmp_path / "own.gguf"
    own.write_bytes(b"mine")
    sides.start("llama.cpp", tiny_model_dir, None, Programs(peers, own))
    sides.start("llama.cpp", tiny_model_dir, None, Programs(peers))
    assert started == [b"mine", b"GGUF"] and not [*tmp_path.glob("elm-mlx-gguf-*")]


def test_llama_cpp_that_cannot_be_had_says_why(peers: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"llama-cpp-python is not installed for .*--python"):
        sides.start("llama.cpp", tiny_model_dir, None, Programs("/bin/false"))
    with pytest.raises(Unavailable, match=r"llama\.cpp cannot read .*bad\.gguf"):
        sides.start("llama.cpp", tiny_model_dir, None, Programs(peers, tmp_path / "bad.gguf"))
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "vocab_size": 8}')
    with pytest.raises(Unavailable, match=r"is missing.*; --gguf names a file"):
        sides.start("llama.cpp", tmp_path, None, Programs(peers))
