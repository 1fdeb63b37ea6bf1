"""Each way of getting a BLAS, and of not getting one, in a process of its own: MLX multiplies rightly in all."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from elm_mlx import blas

import mlx.core as mx  # isort: skip

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux needs a BLAS of its own"),
    pytest.mark.skipif(importlib.util.find_spec("scipy_openblas32") is None, reason="scipy-openblas32 is missing"),
]
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
ASK = """
import json, elm_mlx
from elm_mlx import blas
import mlx.core as mx
a, b = (mx.arange(40 * 40).reshape(40, 40) % m - 3.0 for m in (7, 11))
exact = (a.astype(mx.int32)[:, :, None] * b.astype(mx.int32)[None]).sum(axis=1)
right = all(mx.array_equal(product, expected) for product, expected in (
    (a @ b, exact), (a[:1] @ b, exact[:1]), (a @ b[:, :1], exact[:, :1]), (a.T.T @ b.T.T, exact)))
print(json.dumps({"name": blas.status().name, "path": blas.status().path, "note": blas.status().note, "right": right}))
"""


class Answer:
    """What a new process says of its BLAS, and how it multiplies."""

    def __init__(self, code: str = ASK, **environment: str | None) -> None:
        changed = {**os.environ, "ELM_MLX_BLAS": None, **environment}
        kept = {name: value for name, value in changed.items() if value is not None}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept, timeout=120)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        self.name, self.path, self.note = answer["name"], answer["path"], answer["note"]
        self.warnings = done.stderr.splitlines()
        assert answer["right"]

    @property
    def fast(self) -> bool:
        return self.path is not None and self.warnings == []

    def warns(self, about: str) -> bool:
        """One line, that says what is slow, why, and what to set."""
        (line,) = self.warnings
        return (
            self.path is None
            and line.startswith("elm-mlx: slow matrix products: ")
            and line.endswith("(ELM_MLX_BLAS chooses a BLAS)")
            and about in line
        )


@pytest.fixture(scope="module")
def compiling_once(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH on which `cc` compiles once, which takes seconds, and then gives copies of what it has made."""
    directory = tmp_path_factory.mktemp("bin")
    (directory / "cc").write_text(f"""#!/bin/sh
for each; do [ "$before" = -o ] && out=$each; before=$each; done
[ -e {directory}/made ] || {{ {COMPILER} "$@" && cp "$out" "$out.copy" && mv "$out.copy" {directory}/made; exit; }}
cp {directory}/made "$out"
""")
    (directory / "cc").chmod(0o755)
    path = os.environ.get("PATH", os.defpath)
    return path if COMPILER is None else f"{directory}{os.pathsep}{path}"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A user's cache, empty."""
    path = tmp_path / "cache"
    path.mkdir()
    return path


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where temporary files go, to see that none stays."""
    path = tmp_path / "scratch"
    path.mkdir()
    return path


def library(path: Path, source: str) -> Path:
    """A shared library of a few lines of C."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    path.with_suffix(".c").write_text(source)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(path), str(path.with_suffix(".c"))], check=True)
    return path


def test_a_fast_one_is_made_once_and_kept(cache: Path, scratch: Path, compiling_once: str) -> None:
    environment = {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(scratch), "PATH": compiling_once}
    first = Answer(**environment)
    assert first.fast and first.name.startswith("OpenBLAS (scipy-openblas32)")
    (kept,) = (cache / "elm-mlx").glob("*.so")
    page = (Path(__file__).parents[1] / "docs" / "info.md").read_text("utf-8")
    assert all(re.search(r"libcblas\w+-[0-9a-f]{16}-\d+\.so\b", text) for text in (kept.name, page))
    assert first.path == str(kept) and kept.parent.stat().st_mode & 0o777 == 0o700
    before = kept.stat()
    second = Answer(**environment)
    assert second.fast and second.path == first.path and second.name == first.name
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list(scratch.iterdir())


def test_many_first_processes_at_once(cache: Path, compiling_once: str) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PATH": compiling_once}
    environment.pop("ELM_MLX_BLAS", None)
    processes = [
        subprocess.Popen([sys.executable, "-c", ASK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        for _ in range(4)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == b""
        assert json.loads(out)["path"] and json.loads(out)["right"]
    assert len(list((cache / "elm-mlx").glob("*.so"))) == 1


@pytest.mark.parametrize("made", ["by the compiler", "by patchelf"])
def test_without_a_compiler_symbols_are_renamed(cache: Path, made: str, compiling_once: str) -> None:
    path = compiling_once if made == "by the compiler" else str(cache)  # where there is no cc
    answer = Answer(XDG_CACHE_HOME=str(cache), PATH=path)
    assert answer.fast
    by_compiler = made == "by the compiler" and COMPILER is not None
    assert (blas.OWN_FEW_ROWS in answer.name) is by_compiler


@pytest.mark.parametrize("how", ["a file in its place", "open to others", "under a file"])
def test_without_a_cache_that_is_ours_alone_nothing_is_kept(
    cache: Path, scratch: Path, how: str, compiling_once: str
) -> None:
    own = cache / "elm-mlx"
    if how == "a file in its place":
        own.touch()
    elif how == "open to others":
        own.mkdir()
        own.chmod(0o777)
    else:
        cache = cache / "file"
        cache.touch()
    answer = Answer(XDG_CACHE_HOME=str(cache), TMPDIR=str(scratch), PATH=compiling_once)
    assert answer.fast
    assert how != "open to others" or not list(own.iterdir())
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("missing", [["HOME"], ["HOME", "PATH", "USER", "LOGNAME"]])
def test_without_a_home_or_a_path(missing: list[str], cache: Path, compiling_once: str) -> None:
    assert Answer(XDG_CACHE_HOME=str(cache), **{"PATH": compiling_once, **dict.fromkeys(missing)}).fast
    if "PATH" not in missing:
        (cache / "file").touch()
        assert Answer(XDG_CACHE_HOME=None, HOME=str(cache / "file" / "home"), PATH=compiling_once).fast


def test_a_damaged_copy_is_made_anew(cache: Path, compiling_once: str) -> None:
    environment = {"XDG_CACHE_HOME": str(cache), "PATH": compiling_once}
    path = Answer(**environment).path
    whole = Path(path).read_bytes()
    cut = (whole[:3000], whole[:9000])  # as a power cut leaves it: opened, it would be a bus error
    for content in (b"", b"no library", b"\x7fELF", bytes(len(whole)), *cut):
        Path(path).write_bytes(content)
        assert Answer(**environment).fast
        again = Answer(**environment)
        assert again.fast and again.path == path


def test_what_cannot_be_made_is_tried_once_a_day(cache: Path, tmp_path: Path) -> None:
    tried, tools = tmp_path / "tried", tmp_path / "bin"
    tools.mkdir()
    (tools / "cc").write_text(f"#!/bin/sh\necho again >> {tried}\necho no headers here >&2\nexit 1\n")
    (tools / "cc").chmod(0o755)
    for _ in range(2):
        answer = Answer(XDG_CACHE_HOME=str(cache), PATH=str(tools))
        assert answer.fast and blas.OWN_FEW_ROWS not in answer.name
    assert tried.read_text() == "again\n" * 2  # for this processor, and for any
    (failed,) = (cache / "elm-mlx").glob("*.failed")
    assert "no headers here" in failed.read_text()
    os.utime(failed, (0, 0))
    assert Answer(XDG_CACHE_HOME=str(cache), PATH=str(tools)).fast
    assert tried.read_text() == "again\n" * 4


def test_what_was_killed_is_no_word_on_the_processor_and_is_tried_again_soon(cache: Path, tmp_path: Path) -> None:
    """It had left a library for any processor, for good."""
    tools, tried = tmp_path / "bin", tmp_path / "tried"
    tools.mkdir()
    said = "cc: fatal error: Killed signal terminated program cc1\\ncompilation terminated."
    (tools / "cc").write_text(f"#!/bin/sh\necho again >> {tried}\nprintf '{said}\\n' >&2\nexit 1\n")
    (tools / "cc").chmod(0o755)
    answer = Answer(XDG_CACHE_HOME=str(cache), PATH=str(tools))
    assert answer.fast and blas.OWN_FEW_ROWS not in answer.name and tried.read_text() == "again\n"
    (failed,) = (cache / "elm-mlx").glob("*.failed")
    assert "Killed signal" in failed.read_text()
    os.utime(failed, (failed.stat().st_mtime - 600,) * 2)
    assert Answer(XDG_CACHE_HOME=str(cache), PATH=str(tools)).fast and tried.read_text() == "again\n" * 2
    failed.write_text("")  # a full disk
    assert Answer(XDG_CACHE_HOME=str(cache), PATH=str(tools)).fast and tried.read_text() == "again\n" * 3


def test_what_took_too_long_is_tried_again_in_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []

    def busy(original: Path, made: Path) -> None:
        tried.append(made)
        raise subprocess.TimeoutExpired(["cc"], 300)

    original, now = tmp_path / "original", time.time()
    original.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seconds, times in ((0, 1), (5, 1), (590, 1), (610, 2)):
        monkeypatch.setattr(time, "time", lambda at=now + seconds: at)
        with pytest.raises(blas._FAILURES, match="timed out after 300 seconds"), blas._made(original, busy, None):
            pass
        assert len(tried) == times, seconds


def test_it_can_be_switched_off(cache: Path) -> None:
    answer = Answer(ELM_MLX_BLAS="off", XDG_CACHE_HOME=str(cache))
    assert answer.path is None and answer.note == "ELM_MLX_BLAS=off" and answer.warnings == []
    assert not list(cache.iterdir())


def test_an_empty_choice_is_none() -> None:
    assert Answer(ELM_MLX_BLAS="").fast


NAIVE = """
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
  for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) {
    float sum = 0;
    for (int l = 0; l < k; l++)
      sum += (ta == 111 ? a[i * lda + l] : a[l * lda + i]) * (tb == 111 ? b[l * ldb + j] : b[j * ldb + l]);
    c[i * ldc + j] = alpha * sum + (beta == 0 ? 0 : beta * c[i * ldc + j]);
  }
}
"""


def test_one_that_multiplies_rightly_is_taken(tmp_path: Path) -> None:
    answer = Answer(ELM_MLX_BLAS=str(library(tmp_path / "libmine.so", NAIVE)))
    assert answer.fast and answer.name == "libmine.so"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("sum = 0;", "sum = 0; return;"),
        ("alpha * sum", "1.0001f * sum"),
        ("(tb == 111", "(tb != 111"),
        ("l < k", "l < (m == 1 ? k - 1 : k)"),
        ("(beta == 0 ? 0 : beta * c[i * ldc + j])", "beta * c[i * ldc + j]"),
        ("i < m", "i < 16 && i < m"),
    ],
)
def test_one_that_multiplies_wrongly_is_refused(tmp_path: Path, right: str, wrong: str) -> None:
    assert right in NAIVE
    path = library(tmp_path / "libwrong.so", NAIVE.replace(right, wrong))
    assert Answer(ELM_MLX_BLAS=str(path)).warns(f"{path} multiplies wrongly")


def test_what_is_no_blas_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library at all")
    assert Answer(ELM_MLX_BLAS=str(text)).warns("text.so")
    assert Answer(ELM_MLX_BLAS=str(tmp_path / "nowhere.so")).warns("nowhere.so")
    assert Answer(ELM_MLX_BLAS=str(tmp_path)).warns(str(tmp_path))
    other = library(tmp_path / "libother.so", "int answer(void) { return 42; }")
    assert Answer(ELM_MLX_BLAS=str(other)).warns("libother.so has no cblas_sgemm")


def test_mlx_before_us_is_too_late() -> None:
    assert Answer("import mlx.core\n" + ASK).warns("import elm_mlx first")


def test_without_any_blas_it_is_slow_and_says_so(cache: Path) -> None:
    """As if the packages were not installed, and the system had none."""
    code = """
import os
os.environ["ELM_MLX_BLAS"] = "off"
from elm_mlx import blas
import importlib.util
importlib.util.find_spec = lambda name: None
del os.environ["ELM_MLX_BLAS"]
load = blas._load
def only_files(path, original=None):
    if path == "libopenblas.so.0":
        raise OSError("none")
    return load(path, original)
blas._load = only_files
blas.status.cache_clear()
blas.prefer_fast()
"""
    assert Answer(code + ASK, XDG_CACHE_HOME=str(cache)).warns("the package scipy-openblas32 is not installed")


def test_where_nothing_can_be_made_the_reasons_are_given(cache: Path) -> None:
    code = """
import os
os.environ["ELM_MLX_BLAS"] = "off"
from elm_mlx import blas
import shutil
shutil.which = lambda *_, **__: None
del os.environ["ELM_MLX_BLAS"]
blas._load_system = lambda reason: (_ for _ in ()).throw(blas._Unusable(reason))
blas.status.cache_clear()
blas.prefer_fast()
"""
    answer = Answer(code + ASK, XDG_CACHE_HOME=str(cache))
    assert answer.warns("no C compiler") and answer.warns("patchelf is not installed")


@pytest.mark.parametrize(("platform", "name"), [("darwin", "Accelerate"), ("win32", "MLX's own")])
def test_elsewhere_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch, platform: str, name: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert blas.status.__wrapped__() == blas.Status(name)


def test_this_process_multiplies_with_a_fast_one() -> None:
    if os.environ.get("ELM_MLX_BLAS"):
        pytest.skip("ELM_MLX_BLAS is set")
    assert blas.status().path is not None, blas.status()


def test_rows_and_columns_of_every_layout_are_right() -> None:
    """The C that multiplies few, on memory that holds NaN, as fresh memory may."""
    path = blas.status().path
    if path is None:
        pytest.skip("no fast BLAS here")
    gemm = ctypes.CDLL(path).cblas_sgemm
    gemm.restype = None
    draw = random.Random(0)
    shapes = [(1, 1, 1), (1, 33, 19), (1, 2, 300), (33, 1, 19), (2, 1, 300), (17, 9, 21)]
    shapes += [
        (2, 8, 8),
        (3, 5, 31),
        (4, 3, 64),
        (5, 11, 40),
        (6, 4, 9),
        (7, 4, 9),
        (8, 70, 21),
        (3, 300, 5),
        (1, 150, 7),
        (9, 40, 30),
        (17, 33, 530),
        (38, 70, 35),
    ]
    for (m, n, k), ta, tb, beta in itertools.product(shapes, (111, 112), (111, 112), (0.0, 1.0, 0.5)):
        spare = 3  # rows are longer than they need to be, as a slice of a matrix has them
        lda, ldb, ldc = (k if ta == 111 else m) + spare, (n if tb == 111 else k) + spare, n + spare
        a = [draw.randint(-4, 4) for _ in range((m if ta == 111 else k) * lda)]
        b = [draw.randint(-4, 4) for _ in range((k if tb == 111 else n) * ldb)]
        old = 2.0 if beta else math.nan
        c = (ctypes.c_float * (m * ldc))(*[old] * (m * ldc))
        gemm(
            101, ta, tb, m, n, k, ctypes.c_float(1), (ctypes.c_float * len(a))(*a), lda,
            (ctypes.c_float * len(b))(*b), ldb, ctypes.c_float(beta), c, ldc,
        )  # fmt: skip
        for i, j in itertools.product(range(m), range(ldc)):
            if j >= n:  # not ours to write
                assert c[i * ldc + j] == old or (math.isnan(old) and math.isnan(c[i * ldc + j]))
                continue
            row = (a[i * lda + x] if ta == 111 else a[x * lda + i] for x in range(k))
            column = (b[x * ldb + j] if tb == 111 else b[j * ldb + x] for x in range(k))
            assert c[i * ldc + j] == sum(map(int.__mul__, row, column)) + (beta * old if beta else 0)


def test_mlx_takes_no_cblas_function_that_we_do_not_give() -> None:
    library = next(
        (Path(importlib.util.find_spec("mlx").submodule_search_locations[0]) / "lib").glob("libmlx.so"), None
    )
    if library is None:
        pytest.skip("MLX's library lies elsewhere on this system")
    wanted = set(re.findall(rb"\0(cblas_[a-z]+)(?=\0)", library.read_bytes()))
    assert {name.decode() for name in wanted} <= set(blas.SYMBOLS)


OWN_MANY = blas.computes_many_rows()
needs_few_rows = pytest.mark.skipif(blas.OWN_FEW_ROWS not in blas.status().name, reason="no C compiler")


@needs_few_rows
@pytest.mark.usefixtures("two_threads")
def test_a_rows_product_depends_on_no_other_row_and_on_no_number_of_processors() -> None:
    """To the bit, shared out or not: whether alone or one of sixteen, before a matrix or one that is transposed; and
    where rows are a prompt's, from seventeen on."""
    drawn = mx.random.normal((3001, 203), key=mx.random.key(1))  # large enough to be shared out, in odd portions
    few, many = mx.random.normal((16, 203), key=mx.random.key(2)), mx.random.normal((150, 203), key=mx.random.key(3))
    prompts = [(many, drawn.T, (17, 18, 24, 25, 31, 100))] if OWN_MANY else []
    for rows, matrix, counts in [(few, drawn.T, range(1, 17)), (few, mx.contiguous(drawn.T), range(1, 17)), *prompts]:
        together = rows @ matrix
        exact = np.array(rows, np.float64) @ np.array(matrix, np.float64)
        assert np.abs(np.array(together) - exact).max() < 1e-4
        for count in counts:
            assert mx.array_equal(rows[:count] @ matrix, together[:count])
        with blas.one_thread():
            assert mx.array_equal(rows @ matrix, together)


@needs_few_rows
@pytest.mark.skipif(
    not {"avx2", "fma", "avx512f"} <= set(blas.processor().split()), reason="this is no processor with more than AVX2"
)
def test_a_processor_without_avx_512_computes_the_same_bits_in_any_company(cache: Path, tmp_path: Path) -> None:
    """What holds of this processor's library, of one that is compiled for others: GCC tuned for these takes apart what
    it makes one operation of for this one."""
    compiler, tuned = tmp_path / "bin" / "cc", tmp_path / "tuned"
    compiler.parent.mkdir()
    compiler.write_text(f"""#!/bin/sh
for each; do
  shift
  if [ "$each" = -march=native ]; then
    touch {tuned}
    set -- "$@" -march=x86-64-v3 -mtune=znver3
  else
    set -- "$@" "$each"
  fi
done
exec {COMPILER} "$@"
""")
    compiler.chmod(0o755)
    path = f"{compiler.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    own, tests = "test_a_rows_product_depends_on_no_other_row_and_on_no_number_of_processors", Path(__file__).parent
    chosen = [f"model/test_{name}.py" for name in ("stored_layers", "sublayers", "whole_step")]
    options = "-m pytest -p no:cacheprovider --numprocesses=0 -k"
    command = [sys.executable, *options.split(), "not real_chat_model"]
    done = subprocess.run(
        [*command, *(str(tests / name) for name in (f"test_blas.py::{own}", *chosen))],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "PATH": path}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert tuned.exists() and len(list((cache / "elm-mlx").glob("*.so"))) == 1


@needs_few_rows
@pytest.mark.usefixtures("two_threads")
def test_openblas_has_no_thread_that_a_helper_would_wait_for() -> None:
    openblas = next(library for library in blas._opened if hasattr(library, "scipy_openblas_get_num_threads"))
    a, b = mx.random.normal((70, 300), key=mx.random.key(1)), mx.random.normal((300, 200), key=mx.random.key(2))
    for x, y in ((a, b), (b.T, a.T), (mx.contiguous(a.T).T, b), (a[:, :1].T, a), (a.astype(mx.float64), b)):
        with mx.stream(mx.cpu):
            exact = np.array(x, np.float64) @ np.array(y, np.float64)
            assert np.abs(np.array(x @ y) - exact).max() < 1e-4
        assert (openblas.scipy_openblas_get_num_threads(), blas.threads()) == (1, 2)


@needs_few_rows
def test_zeros_behind_a_rows_numbers_change_no_bit_of_its_product() -> None:
    rows, matrix = mx.random.normal((16, 500), key=mx.random.key(1)), mx.random.normal((500, 61), key=mx.random.key(2))
    expected = rows @ matrix
    for more in (1, 12, 500, 3000):
        for count in range(1, 17):
            found = mx.pad(rows, [(0, 0), (0, more)])[:count] @ mx.pad(matrix, [(0, more), (0, 0)])
            assert mx.array_equal(found, expected[:count])


@needs_few_rows
@pytest.mark.usefixtures("two_threads")
def test_products_at_the_same_time_do_not_disturb_each_other() -> None:
    matrix = mx.random.normal((2000, 160), key=mx.random.key(1))
    rows = [mx.random.normal((4, 160), key=mx.random.key(key)) for key in range(4)]
    mx.eval(matrix, rows)
    expected = [each @ matrix.T for each in rows]
    mx.eval(expected)

    def multiply(number: int) -> bool:
        with mx.stream(mx.new_stream(mx.cpu)):
            return all(mx.array_equal(rows[number] @ matrix.T, expected[number]).item() for _ in range(100))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(multiply, range(4)))


FORKED = """
import ctypes, elm_mlx, os
import mlx.core as mx
a, b = mx.ones((4, 300)), mx.ones((2000, 300))
mx.eval(a @ b.T)
gemm = ctypes.CDLL(elm_mlx.blas.status().path).cblas_sgemm
child = os.fork()
c = (ctypes.c_float * (4 * 2000))()
x, y = (ctypes.c_float * 1200)(*[1.0] * 1200), (ctypes.c_float * 600000)(*[1.0] * 600000)
one, zero = ctypes.c_float(1), ctypes.c_float(0)
gemm(101, 111, 112, 4, 2000, 300, one, x, 300, y, 300, zero, c, 2000)
assert set(c) == {300.0}
if child and os.waitpid(child, 0)[1] == 0:
    print("right in both")
"""


@needs_few_rows
def test_a_forked_process_multiplies_too() -> None:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.stdout, done.returncode) == ("right in both\n", 0), done.stderr


STARVED = """
import ctypes, resource, elm_mlx
import mlx.core as mx
from elm_mlx import blas
from elm_mlx.model import described
library, count = blas.own("elm_mlx_retire"), 1 << 22
numbers, places = (ctypes.c_float * count)(), (ctypes.c_float * count)()
sort = ctypes.c_void_p(described.address(described.description(described.ORDER)))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 24), -1))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
print("begins", flush=True)
one, zero = ctypes.c_float(1), ctypes.c_float(0)
library.cblas_sgemm(101, 111, 112, 1, count, count, one, numbers, count, sort, count, zero, places, count)
"""


@needs_few_rows
def test_a_product_without_memory_says_so() -> None:
    """It cannot tell MLX, and ends the process."""
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True, timeout=60)
    assert done.stdout == "begins\n" and done.returncode == -signal.SIGABRT
    assert done.stderr.startswith("elm-mlx: a product's memory: Cannot allocate memory"), done.stderr
