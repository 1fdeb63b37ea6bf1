"""The seccomp filter of each kind of processor, held against the kernel's table and tried without it."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from elm_mlx.problems.sandbox_worker import _CALLS, _filter_of

# 64-bit ARM has the numbers that the kernel gives every processor without older ones of its own.
TABLES = {
    "x86_64": "x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": "asm-generic/unistd.h",
}
KINDS = {"x86_64": 62, "aarch64": 183}  # EM_X86_64 and EM_AARCH64 of an ELF file
LITTLE_ENDIAN_64 = 0xC0000000
ALLOWED, REFUSED, KILLED = "allowed", "refused", "killed"
VERDICTS = {0x7FFF: ALLOWED, 0x0005: REFUSED, 0x8000: KILLED}  # the upper half: SECCOMP_RET_ALLOW, ERRNO, KILL_PROCESS


def table(machine: str) -> dict[str, int]:
    """Returns the kernel's numbers of calls by name."""
    path = Path("/usr/include", TABLES[machine])
    if not path.exists():
        pytest.skip(f"{path} is not there: Debian has it in linux-libc-dev")
    # Those of __NR3264 take other types on processors of 32 bits.
    return {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)\n", path.read_text())}


def verdict(machine: str, number: int, kind: int) -> str:
    """Returns what a filter does with a call: classic BPF as the kernel runs it (networking/filter.rst)."""
    call, accumulator, at = struct.pack("<iI", number, kind), 0, 0
    program = _filter_of(machine)
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            (accumulator,) = struct.unpack_from("<I", call, operand)
        elif code == 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
            at += if_true if accumulator == operand else if_false
        else:
            assert code == 0x06  # BPF_RET | BPF_K
            return VERDICTS[operand >> 16]


@pytest.mark.parametrize("machine", TABLES)
def test_the_filter_lets_through_the_calls_that_it_names(machine: str) -> None:
    kind, calls = _CALLS[machine]
    assert kind == LITTLE_ENDIAN_64 | KINDS[machine]
    known = table(machine)
    assert len(known) > 250 and {"openat", "socket", "clone", "execve", "kill", "madvise", "futex"} <= known.keys()
    for name, number in known.items():
        assert verdict(machine, number, kind) == (ALLOWED if name in calls else REFUSED), name
    assert {name: known[name] for name in calls} == calls


@pytest.mark.parametrize("machine", TABLES)
def test_calls_by_another_processors_numbers_end_the_process(machine: str) -> None:
    """As 32-bit calls on x86-64, whose number 1 is exit and not write; those of x32 are no numbers that it knows."""
    kind, calls = _CALLS[machine]
    for number in calls.values():
        assert verdict(machine, number, kind ^ 0x80000000) == KILLED
        assert verdict(machine, number, 0x40000003) == KILLED  # AUDIT_ARCH_I386
        assert verdict(machine, number | 0x40000000, kind) == REFUSED
