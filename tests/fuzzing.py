"""Good input, damaged at random, and what the program makes of it: the answer, one line of error, or anything else.

    kind = Kind("transcript", write, {"talk.json": json_values}, lambda folder: read_messages(folder / "talk.json"))
    counts = run(kind, cases=1000, seed=0)

Each case is decided by the kind's name, the seed and its number, so that it can be made again. Cases run in children
of this process with limits of time and memory, a batch in each: a crash is an outcome, and the rest goes on. The
process that calls `run` must not have computed anything with MLX, whose threads no child would have.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elm_mlx.errors import ElmError

Damage = Callable[[bytes, random.Random], bytes]

CPU_SECONDS, WALL_SECONDS = 10, 60  # that a case may take
ADDRESS_BYTES = 8 << 30  # that a process may reserve
GROWTH_BYTES = 500 << 20  # that a case may add to the most that the process has held
_BATCH = 2000
_MEMORY = "/dev/shm"  # where Linux has files that never reach a disk

_NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 16, 48, 64, 255, 1000, 2**16, 10**6, 200_000, 10**9, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63,
    10**30, 10**300, 0.5, 1.0, 50.0, 1e-9, 1e-300, 1e30, 1e308, float("nan"), float("inf"),
)  # fmt: skip
_TEXTS = (
    "", " ", "a", "0", "1", "-1", "1e9", "true", "none", "default", "llama", "\x00", "\x1b[31m", "\n", "\u2028", "é",
    "\ud800", "\U0001f99c", "../../x", "/dev/zero", "~", "%s%n{0}", "{{ 1 }}", "{% for", "a" * 10_000, "日", "<s>",
    "<|im_end|>",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Args:
        write: puts a good one into an empty directory.
        damages: by name of a file in it, how that is damaged. A case damages one of them.
        use: what the program does with the directory. A result, or an ElmError of one line, is right.
    """

    name: str
    write: Callable[[Path], object]
    damages: Mapping[str, Damage]
    use: Callable[[Path], object]


@dataclass
class Counts:
    """Outcomes.

    Attributes:
        wrong: by number of the case, what happened instead of an answer or a line of error.
        peak: the most bytes that a child held.
    """

    ok: int = 0
    refused: int = 0
    wrong: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak: int = 0


def run(kind: Kind, cases: int, seed: int = 0) -> Counts:
    """The outcomes of `cases` cases."""
    counts, start, number = Counts(), time.perf_counter(), 0
    with tempfile.TemporaryDirectory(dir=_MEMORY if Path(_MEMORY).is_dir() else None) as folder:
        good = Path(folder, "good")
        good.mkdir()
        failed = _in_child(lambda tell: kind.write(good), lambda line: None)
        assert failed is None, f"{kind.name}: its good input cannot be made: {failed}"

        def take(line: str) -> None:
            nonlocal number
            outcome, peak = json.loads(line)
            counts.peak = max(counts.peak, peak)
            number += 1
            if outcome == "ok":
                counts.ok += 1
            elif outcome == "refused":
                counts.refused += 1
            else:
                counts.wrong[number - 1] = outcome

        while number < cases:
            first, last = number, min(cases, number + _BATCH)
            ended = _in_child(lambda tell, a=first, b=last: _batch(kind, good, seed, range(a, b), tell), take)  # type: ignore[misc]
            if ended is not None:
                counts.wrong[number] = ended
                number += 1
    counts.seconds = time.perf_counter() - start
    return counts


def damaged(kind: Kind, good: Path, seed: int, number: int) -> tuple[str, bytes]:
    """A case: the file that is damaged, and what it holds then."""
    draw = random.Random(f"{kind.name} {seed} {number}")
    name = draw.choice(sorted(kind.damages))
    return name, kind.damages[name]((good / name).read_bytes(), draw)


def _batch(kind: Kind, good: Path, seed: int, numbers: Sequence[int], tell: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=good.parent) as folder:
        place = Path(folder, "case")
        for number in numbers:
            # From the beginning, as a case may have written too.
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(good, place)
            name, data = damaged(kind, good, seed, number)
            (place / name).write_bytes(data)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            signal.alarm(WALL_SECONDS)
            before = _peak()
            outcome = _outcome(kind, place)
            if outcome in ("ok", "refused") and _peak() - before > GROWTH_BYTES:
                outcome = f"{(_peak() - before) >> 20} MB of memory ({outcome})"
            tell(json.dumps([outcome, _peak()]))


def _outcome(kind: Kind, place: Path) -> str:
    try:
        kind.use(place)
    except ElmError as error:
        return "refused" if str(error).strip() else "an error that says nothing"
    except BaseException as error:  # a panic of Rust is no Exception
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "elm_mlx" in frame.filename or "/convert/" in frame.filename] or list(where)
        at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"{type(error).__name__} at {at}: {str(error)[:200]!r}"
    return "ok"


def _in_child(work: Callable[[Callable[[str], None]], object], take: Callable[[str], None]) -> str | None:
    """Does `work` in a child, and hands on each line that it tells. Returns how the child died; None where it ended."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        try:
            _limit()
            stderr = os.fdopen(os.dup(2), "w")
            with os.fdopen(into, "w") as lines, Path(os.devnull).open("w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
                with redirect_stdout(nothing), redirect_stderr(nothing):
                    work(lambda line: print(line, file=lines, flush=True))
        except BaseException as error:
            traceback.print_exception(error, file=stderr)
            stderr.flush()
            os._exit(1)
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as lines:
        for line in lines:
            take(line)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        return None if code == 0 else f"the child ended with {code}"
    name = signal.Signals(-code).name
    limits = {"SIGPROF": f"more than {CPU_SECONDS} s", "SIGALRM": f"no end within {WALL_SECONDS} s"}
    return limits.get(name, name)


def _limit() -> None:
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _peak() -> int:
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def raw_bytes(data: bytes, draw: random.Random) -> bytes:
    """A few bytes flipped, set, cut out, doubled, moved, put in; or the end missing."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        size = len(changed)
        at = draw.randrange(size + 1)
        length = min(draw.choice((1, 2, 4, 8, 64, 1000)), size - at)
        match draw.randrange(8):
            case 0 if length:
                changed[at] ^= 1 << draw.randrange(8)
            case 1 if length:
                changed[at] = draw.choice((0, 1, 9, 10, 13, 34, 0x7F, 0x80, 0xC3, 0xED, 0xFF))
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length] * draw.choice((1, 2, 100))
            case 4:
                changed[at:at] = draw.randbytes(length)
            case 5:
                changed[at : at + length] = draw.randbytes(length)
            case 6:
                number = draw.choice([n for n in _NUMBERS if isinstance(n, int) and n < 2**64])
                changed[at : at + 8] = struct.pack(draw.choice("<>") + "Q", number)
            case _ if draw.random() < 0.3:
                del changed[at:]
    return bytes(changed)


def json_values(data: bytes, draw: random.Random) -> bytes:
    """Values of a JSON text replaced, removed, renamed, wrapped, moved; now and then the text itself damaged."""
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _changed(value, draw)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.8).encode("utf-8", "surrogatepass")
    return raw_bytes(text, draw) if draw.random() < 0.1 else text


def json_lines(data: bytes, draw: random.Random) -> bytes:
    """One line of JSON lines damaged as JSON, or the whole as bytes."""
    lines = data.splitlines()
    if draw.random() < 0.3:
        return raw_bytes(data, draw)
    number = draw.randrange(len(lines))
    lines[number] = json_values(lines[number], draw)
    return draw.choice((b"\n", b"\r\n", b"\n\n")).join(lines) + b"\n"


def safetensors_header(data: bytes, draw: random.Random) -> bytes:
    """The header of a safetensors file damaged as JSON, its length mostly right, the data as they are."""
    length = int.from_bytes(data[:8], "little")
    header = json_values(data[8 : 8 + length], draw)
    said = len(header) if draw.random() < 0.9 else draw.choice((0, 1, 2**31, 2**63, len(header) + 8))
    return said.to_bytes(8, "little") + header + data[8 + length :]


def either(*damages: Damage) -> Damage:
    """One of several."""
    return lambda data, draw: draw.choice(damages)(data, draw)


def _changed(value: Any, draw: random.Random) -> Any:
    """`value` with one of the values in it changed, each as likely as the others."""
    paths = list(_paths(value, ()))
    path = draw.choice(paths)
    return _put(value, path, draw)


def _paths(value: Any, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    found = [path]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        found += _paths(inner, (*path, key))
    return found


def _put(value: Any, path: tuple[Any, ...], draw: random.Random) -> Any:
    if len(path) > 1:
        value[path[0]] = _put(value[path[0]], path[1:], draw)
        return value
    if not path:
        return _other(value, draw)
    key = path[0]
    chosen = draw.randrange(10)
    if chosen == 0:
        del value[key]
    elif chosen == 1 and isinstance(value, dict):
        value[draw.choice(_TEXTS)] = value.pop(key)
    elif chosen == 1:
        value.insert(key, value[key])
    elif chosen == 2 and len(value) > 1:
        other = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = _other(value[key], draw)
    return value


def _other(value: Any, draw: random.Random) -> Any:
    chosen = draw.randrange(12)
    if chosen < 4:
        number = draw.choice(_NUMBERS)
        return -number if draw.random() < 0.3 else number
    if chosen == 4 and type(value) in (int, float):
        return value * draw.choice((-1, 2, 0.5, 10, 1000, 10**6)) + draw.choice((-1, 0, 1))
    if chosen == 5:
        return draw.choice((None, True, False))
    if chosen < 8:
        return draw.choice(_TEXTS)
    if chosen == 8:
        return [value] if draw.random() < 0.5 else {draw.choice(_TEXTS): value}
    if chosen == 9:
        return draw.choice(([], {}, [None], [[]], [1, 2], ["a"], {"a": 1}, [{}], [value] * 50, list(range(2000))))
    if chosen == 10:
        nested: Any = value
        for _ in range(draw.choice((2, 30, 90, 150, 400))):
            nested = [nested] if draw.random() < 0.5 else {"a": nested}
        return nested
    if isinstance(value, str) and value:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice((*_TEXTS, value)) + value[at + draw.randrange(2) :]
    return str(value)
