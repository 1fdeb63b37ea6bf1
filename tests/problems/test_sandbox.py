"""Code that a model wrote: what it returns, and what it cannot do to this machine or to its judge."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elm_mlx.errors import ElmError
from elm_mlx.problems import sandbox, sandbox_worker
from elm_mlx.problems.sandbox import CodeError, values

MMAP = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="these are Linux's calls")


@pytest.fixture(autouse=True, scope="module")
def little_time() -> Iterator[None]:
    """A process of this module alone, with less time and memory, which ends with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "SECONDS", 0.3)
        patch.setattr(sandbox, "MEMORY", 64 << 20)
        sandbox.stop()
        yield
        sandbox.stop()


@pytest.fixture
def another_process() -> Iterator[None]:
    """A process that begins with this test, and ends with it."""
    sandbox.stop()
    yield
    sandbox.stop()


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever an answer did, the same process runs the next one."""
    assert values("def f(x): return x + 1", "f", [[1]]) == [2]
    before = _pid()
    yield
    assert values("def f(x): return x + 1", "f", [[1], [2]]) == [2, 3]
    assert _pid() == before or "another_process" in request.fixturenames


def _pid() -> int:
    assert sandbox._process is not None
    return sandbox._process._process.pid


def result(source: str, *arguments: Any) -> Any:
    return values(source, "f", [list(arguments)])[0]


def attempt(*statements: str) -> Any:
    """What `f` returns whose body is these statements."""
    return result("import os, sys\ndef f():\n" + "".join(f"    {line}\n" for line in statements))


def test_values_of_every_kind() -> None:
    source = "def f(x): return x"
    kinds: list[Any] = [None, True, 0, -(10**30), 2.5, "", "é\U0001f600\ud800", [], [[1], {"a": None}], {"b": [1.5]}]
    assert values(source, "f", [[each] for each in kinds]) == kinds
    assert [type(each) for each in values(source, "f", [[each] for each in kinds])] == [type(each) for each in kinds]
    assert result("def f(): return (1, (2,))") == [1, [2]]
    assert result("f = lambda a, b: a - b", 5, 3) == 2
    assert result("class f:\n def __new__(cls, x): return x", 4) == 4


def test_what_computing_needs_is_there() -> None:
    source = """
from __future__ import annotations
import bisect, collections, dataclasses, datetime, decimal, fractions, functools, heapq, itertools, json, math, random
import re, statistics, string, typing
from collections import Counter, defaultdict, deque
from typing import List

@dataclasses.dataclass(order=True)
class Point:
    x: int

@functools.lru_cache
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)

def f(text: str) -> List[object]:
    print("seen", text)
    date = datetime.datetime.strptime("2024-02-29", "%Y-%m-%d")
    parts = [math.comb(5, 2), fib(50), max(Point(1), Point(2)).x, Counter(text).most_common(1), re.findall("a+", text)]
    return [*parts, str(decimal.Decimal("0.1") + 1), "\\N{BULLET}", date.year, sorted(itertools.permutations("ab"))]
"""
    expected = [10, 12586269025, 2, [["a", 3]], ["a", "aa"], "1.1", "\\N{BULLET}", 2024, [["a", "b"], ["b", "a"]]]
    assert result(source, "abaac")[:-3] == expected[:-3]
    assert result(source, "abaac")[-2:] == expected[-2:]


@pytest.mark.usefixtures("another_process")
def test_an_answer_is_the_same_each_time() -> None:
    source = "import random\ndef f(): return [list({'ab', 'cd', 'ef', 'gh'}), random.random(), hash('a')]"
    first = result(source)
    sandbox.stop()
    assert result(source) == first


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(): return 1 // 0", "ZeroDivisionError: integer division or modulo by zero"),
        ("def f(: return", "SyntaxError: "),
        ("def g(): return 1", "has no attribute 'f'"),
        ("f = 3", "TypeError: 'int' object is not callable"),
        ("def f(x): return x", "TypeError: f.. missing 1 required"),
        ("def f(): return {1, 2}", "TypeError: it returns set"),
        ("def f(): return {1: 2}", "TypeError: it returns dict"),
        ("def f(): return f", "TypeError: it returns function"),
        ("class L(list): pass\ndef f(): return L()", "TypeError: it returns L"),
        ("def f():\n while True: yield 1", "TypeError: it returns generator"),
        ("def f():\n a = []\n a.append(a)\n return a", "RecursionError"),
        ("def f():\n a = 1\n for _ in range(900): a = [a]\n return a", "RecursionError|without a result"),
        ("def f(): return f()", "RecursionError"),
        ("def f(): return 10 ** 5000", "ValueError: Exceeds the limit"),
        ("import sys\nsys.set_int_max_str_digits(0)\ndef f(): return 10 ** 5000", "without a result"),
        ("raise SystemExit", "SystemExit"),
        ("def f(): raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f():\n class E(Exception):\n  def __str__(self): raise self\n raise E", "without a result"),
        ("def f(): raise ValueError('a' * 10**6)", "ValueError: a{100}"),
        ("def f(): raise ValueError('a\\n\\x1b[2Jb')", r"ValueError: a\S+\[2Jb"),
        ("import numpy", "No module named 'numpy'"),
        ("import elm_mlx", "No module named 'elm_mlx'"),
        ("import os\ndef f(): os._exit(0)", "ended its process without a result"),
        ("import os\ndef f(): os.abort()", "ended its process"),
        ("import ctypes\ndef f(): ctypes.string_at(0)", "ended its process .signal 11"),
        ("import threading\ndef f(): threading.Thread(target=print).start()", "can't start new thread"),
        ("import time\ndef f(): time.sleep(60)", "PermissionError"),
        ("import os\ndef f():\n while True: os.fork()", "PermissionError"),
        ("import os\ndef f(): os.execv('/bin/true', ['true'])", "PermissionError"),
        ("import subprocess", "No module named"),
        ("def f(): return input()", "EOFError"),
        ("def f(): return 'a' * (1 << 20)", "returns more than 1024 KB"),
        ("def f(): return [0] * 10**9", "MemoryError"),
        ("def f():\n a = []\n while True: a.append('a' * 10**6 + str(len(a)))", "MemoryError"),
        ("def f(): return sum(1 for _ in iter(int, 1))", "takes more than 0.3 s"),
        ("while True: pass", "takes more than 0.3 s"),
        ("def f():\n while True:\n  try:\n   while True: pass\n  except BaseException: pass", "takes more than 0.3 s"),
        ("def f(): return 3 ** 10 ** 8", "takes more than 0.3 s"),
        ("import re\ndef f(): return re.match('(a+)+$', 'a' * 40 + 'b')", "takes more than 0.3 s"),
        ("class D:\n def __del__(self):\n  while True: pass\ndef f(): D()", "takes more than 0.3 s"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(*a): return f(f, *a)", "takes more|MemoryError|signal"),
        ("f = eval('lambda: ' + '-' * 10**6 + '1')", "MemoryError|RecursionError|SyntaxError|signal"),
        ("def f(): return bytearray(10**9)", "MemoryError"),
        ("import mmap\ndef f(): return len(mmap.mmap(-1, 10**9))", "No module named|MemoryError|Cannot allocate"),
        (
            "import signal\ndef f():\n signal.setitimer(signal.ITIMER_PROF, 0)",
            "PermissionError|Operation not permitted",
        ),
        ("import signal\ndef f():\n signal.signal(signal.SIGPROF, signal.SIG_IGN)", "PermissionError"),
        ("import resource\ndef f(): resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))", "not permitted|not allowed"),
    ],
)  # fmt: skip
def test_what_gives_no_values(source: str, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(CodeError, match=reason) as failure:
        result(source)
    assert "\n" not in str(failure.value) and len(str(failure.value)) < 600
    assert time.monotonic() - began < 6


def test_a_shell_does_not_start() -> None:
    assert result("import os\ndef f(): return os.system('true')") != 0


@pytest.mark.usefixtures("another_process")
def test_the_clock_ends_what_does_not_compute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "waiting_worker.py"
    text = Path(sandbox_worker.__file__).read_text()
    worker.write_text(text.replace('"x86_64": (0xC000003E, {', '"x86_64": (0xC000003E, {"a": 230, "b": 35,'))
    monkeypatch.setattr(sandbox, "_WORKER", worker)  # whose filter lets nanosleep through
    sandbox.stop()
    if sys.platform == "linux" and platform.machine() == "x86_64":
        result("import time\ndef f(): time.sleep(0.01)")
    with pytest.raises(CodeError, match=r"takes more than|PermissionError"):
        result("import time\ndef f(): time.sleep(60)")


def test_nobody_waits_for_what_was_closed() -> None:
    for source in (
        "import os\nos.closerange(0, 99)\ndef f(): return 1",
        "import os\nos.closerange(0, 99)\nwhile True: pass",
    ):
        with pytest.raises(CodeError, match=r"without a result|takes more than"):
            result(source)


def test_endless_output_goes_nowhere() -> None:
    for stream in (
        "print('a' * 10**6)",
        "sys.stderr.write('a' * 10**6)",
        "sys.__stdout__.write('a')",
        "os.write(1, b'a')",
    ):
        source = f"import os, sys\ndef f():\n while True:\n  try: {stream}\n  except OSError: pass"
        with pytest.raises(CodeError, match="takes more than"):
            result(source)


def test_the_pipe_of_results_takes_so_much() -> None:
    flood = "import os\nwhile True:\n for i in range(99):\n  try: os.write(i, b'[' * 10**5)\n  except OSError: pass"
    with pytest.raises(CodeError, match="returns more than 1024 KB"):
        result(flood)


@pytest.mark.parametrize(
    "written",
    [
        "", "nonsense", "[" * 100_000, '{"a":' * 100_000, "[]", "null", '{"values": 3}', '{"values": []}', "{}",
        '{"values": [1, 2]}', '{"values": [' + "9" * 900_000 + "]}", '{"failure": {"a": 1}}', '{"values": [1',
        '{"values": [1]}{"values": [1]}', '{"size": 3, "ended": null}\n[1]', "\xff",
    ],
)  # fmt: skip
def test_what_is_written_by_the_code_itself_is_taken_for_no_more_than_bytes(written: str) -> None:
    source = f"import os\ndata = {written!r}.encode('latin-1')\ndef f():\n for i in range(99):\n"
    source += (
        "  left = data\n  try:\n   while left: left = left[os.write(i, left):]\n  except OSError: pass\n os._exit(0)"
    )
    with pytest.raises(CodeError):
        result(source)


@pytest.mark.usefixtures("another_process")
def test_nothing_of_this_process_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    monkeypatch.setenv("SECRET", "secret")
    sandbox.stop()
    path = repr(str(secret))
    for line in (
        f"open({path}).read()", f"os.stat({path})", f"os.unlink({path})", f"os.truncate({path}, 0)",
        f"os.rename({path}, {path} + '2')", f"os.chmod({path}, 0)", "os.listdir('/')", "os.readlink('/proc/self/exe')",
        "open('/proc/self/environ').read()", "open('/proc/%d/environ' % os.getppid()).read()", "os.chmod('/', 0)",
        "os.mkfifo('/tmp/fifo')", "os.memfd_create('a')", "os.pipe()", "os.dup(3)", "os.dup2(3, 1)",
        "os.kill(os.getppid(), 9)", f"os.kill({os.getpid()}, 9)", "os.kill(-1, 9)", "os.killpg(0, 9)", "os.nice(5)",
        "os.setsid()", "os.sched_setaffinity(0, [0])", "os.chdir('/tmp')", "os.symlink('/', '/tmp/link')",
    ):  # fmt: skip
        with pytest.raises(CodeError, match="Error"):
            attempt(line)
    assert attempt("return [dict(os.environ), sys.argv[3:], os.environb.get(b'SECRET')]") == [{}, [str(1 << 20)], None]
    assert secret.read_text() == "secret" and secret.stat().st_mode & 0o600


def test_no_connection_comes_to_a_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        port = server.getsockname()[1]
        with pytest.raises(CodeError, match="PermissionError"):
            result(f"import socket\ndef f(): socket.socket().connect(('127.0.0.1', {port}))")
        with pytest.raises(TimeoutError):
            server.accept()


@on_linux
def test_every_system_call_but_those_of_computing_is_refused() -> None:
    """By machine code too: `syscall` is called as C would."""
    allowed = sandbox_worker._CALLS[platform.machine()][1].values()
    source = """
import ctypes, errno
call = ctypes.CDLL(None, use_errno=True).syscall
def f(numbers):
    through = []
    for number in numbers:
        ctypes.set_errno(0)
        if call(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != errno.EPERM:
            through.append(number)
    return through
"""
    kinds = [0, 0x40000000] if platform.machine() == "x86_64" else [0]  # and those of x32
    # The kernel's own trampolines call 335 and 336 past every filter, and whoever else does is ended.
    refused = [kind + n for kind in kinds for n in range(1024) if kind or n not in (*allowed, 335, 336)]
    assert result(source, refused) == []


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="machine code of x86-64")
def test_calls_of_another_kind_of_processor_end_the_process() -> None:
    source = (
        MMAP
        + """
def f(code):
    place = libc.mmap(None, 4096, 7, 0x22, -1, 0)
    ctypes.memmove(place, bytes(code), len(code))
    return ctypes.CFUNCTYPE(ctypes.c_int)(place)()
"""
    )
    returns_seven, getpid_as_i386 = [0xB8, 7, 0, 0, 0, 0xC3], [0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]
    assert result(source, returns_seven) == 7
    with pytest.raises(CodeError, match=r"\(signal 31\)"):
        result(source, getpid_as_i386)


def test_memory_of_every_kind_counts() -> None:
    """Shared, and mapped without Python."""
    source = (
        MMAP
        + """
def f(flags):
    size, count = 1 << 20, 0
    while count < 200:
        place = libc.mmap(None, size, 3, flags, -1, 0)
        if place in (None, 2**64 - 1):
            break
        ctypes.memset(place, 1, size)
        count += 1
    return count
"""
    )
    for flags in (0x22, 0x21) if sys.platform == "linux" else (0x1002, 0x1001):
        assert result(source, flags) <= 64


def test_what_a_fork_left_does_not_reach_the_next() -> None:
    result(
        "import builtins, json, sys\ndef f():\n builtins.leak = json.dumps = 1\n sys.modules['math'] = None\n return 1"
    )
    assert result("import builtins, math\ndef f(): return [hasattr(builtins, 'leak'), math.pi]") == [
        False,
        3.141592653589793,
    ]


@on_linux
def test_no_memory_has_what_another_answer_said_or_returned() -> None:
    """Or a wrong answer copies a right one to the same problem: all that a fork can write to is searched for it."""
    one, two = "3f9c1b77d2e84a06", "b51e07c8a9f2d364"
    search = """
import ctypes
def f(ranges, one, two):
    one, two, found = one.encode(), two.encode(), []
    for start, end in ranges:
        for place in range(start, end, 1 << 20):
            data = ctypes.string_at(place, min(end - place, (1 << 20) + 64))
            at = data.find(one)
            while at >= 0:
                found += [place + at] * (data[at + 16: at + 32] == two)
                at = data.find(one, at + 1)
    return found
"""
    secret = values(f"def f(n): return [n] * n + ['{one}{two}']", "f", [[n] for n in range(99)])
    assert secret[0] == [one + two]
    lines = [line.split() for line in Path(f"/proc/{_pid()}/maps").read_text().splitlines()]
    ranges = [[int(each, 16) for each in line[0].split("-")] for line in lines if line[1].startswith("rw")]
    assert result(search, ranges, one, two) == []
    assert result(f"MINE = '{one}' + '{two}'\n{search}", ranges, one, two) != []


@pytest.mark.usefixtures("another_process")
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="a system call of x86-64")
def test_a_crash_leaves_no_core_dump(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not to a program either, to which the limit of its size means nothing."""
    worker = tmp_path / "asking_worker.py"
    text = Path(sandbox_worker.__file__).read_text()
    worker.write_text(text.replace('"x86_64": (0xC000003E, {', '"x86_64": (0xC000003E, {"prctl": 157,'))
    monkeypatch.setattr(sandbox, "_WORKER", worker)  # whose filter lets prctl through
    sandbox.stop()
    assert result("import ctypes\ndef f(): return ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)") == 0  # PR_GET_DUMPABLE


@pytest.mark.usefixtures("another_process")
def test_a_process_that_was_killed_amid_an_answer_is_no_wrong_answer(tmp_path: Path) -> None:
    result("def f(): return 5")
    assert sandbox._process is not None
    (tmp_path / "cut").write_bytes(b'{"size": 99, "ended": null}\n{"values"')
    with (tmp_path / "cut").open("rb") as cut, pytest.raises(ElmError, match="was ended from outside"):
        sandbox._process._answers = cut  # as much as came
        result("def f(): return 5")


def test_threads_ask_in_turn() -> None:
    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: result("def f(x): return x * 2", n)})) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: 2 * n for n in range(8)}


@pytest.mark.usefixtures("another_process")
def test_a_process_that_was_killed_is_replaced() -> None:
    result("def f(): return 5")
    os.kill(_pid(), signal.SIGKILL)
    assert sandbox._process is not None
    sandbox._process._process.wait()
    assert result("def f(): return 5") == 5


def test_a_system_that_does_not_hold_code_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "open_worker.py"
    worker.write_text(Path(sandbox_worker.__file__).read_text().replace("        _filter_calls()\n", "        pass\n"))
    monkeypatch.setattr(sandbox, "_WORKER", worker)
    monkeypatch.setattr(sandbox, "_process", None)
    with pytest.raises(ElmError, match=r"^the code of answers is not run: .*looking at files.*processes"):
        result("def f(): return 1")
    worker.write_text("raise SystemExit")
    with pytest.raises(ElmError, match="process that runs the code of answers was ended"):
        result("def f(): return 1")


@on_linux
def test_a_processor_that_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "other_worker.py"
    worker.write_text(Path(sandbox_worker.__file__).read_text().replace(f'"{platform.machine()}"', '"vax"'))
    monkeypatch.setattr(sandbox, "_WORKER", worker)
    monkeypatch.setattr(sandbox, "_process", None)
    with pytest.raises(ElmError, match=platform.machine()):
        result("def f(): return 1")


def test_an_answer_ends_with_the_process_that_asked() -> None:
    asking = "from elm_mlx.problems import sandbox; sandbox.SECONDS = 60; sandbox.values('while True: pass', 'f', [[]])"
    with subprocess.Popen([sys.executable, "-c", asking]) as asker:
        time.sleep(1)
        asker.kill()
    # The fixture of all tests finds what is left.


def test_json_of_requests_takes_any_text() -> None:
    assert values("def f(x): return len(x)", "f", [["\ud800\0\n"]]) == [3]
    with pytest.raises(CodeError, match=r"SyntaxError|ValueError|UnicodeEncodeError"):
        result("\ud800\0")
    assert json.loads(json.dumps("\ud800")) == "\ud800"


@on_linux
def test_limits_of_the_shell_stay() -> None:
    asking = (
        "from elm_mlx.problems.sandbox import values; print(values('def f(x): return len(b\"a\" * x)', 'f', [[9]]))"
    )
    command = f"ulimit -v 600000; exec {shlex.quote(sys.executable)} -c {shlex.quote(asking)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "[9]\n"
