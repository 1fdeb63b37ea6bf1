"""A pickle can do nothing but describe values, and cannot make the machine work without end."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch_files import Call, error_of, legacy_of, put, zip_file, zip_of

from elm_mlx_convert.pickle_machine import MAX_DEPTH, MAX_PICKLE_BYTES, MAX_STEPS
from elm_mlx_convert.torch_files import load

LAYOUTS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


class _Reduce:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made_of = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made_of


class _SetState:
    def __getstate__(self) -> dict[str, int]:
        return {"x": 1}

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("ran")


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


COMMAND = "touch ran"
ATTACKS: dict[str, tuple[bytes, str]] = {
    "os.system": (b"\x80\x02cposix\nsystem\n" + _text(COMMAND) + b"\x85R.", "posix.system"),
    "stack global": (b"\x80\x04" + _text("os") + _text("system") + b"\x93" + _text(COMMAND) + b"\x85R.", "os.system"),
    "dotted": (b"\x80\x04" + _text("torch") + _text("hub.load") + b"\x93.", "torch.hub.load"),
    "eval": (b"\x80\x02cbuiltins\neval\n" + _text("open('ran','w')") + b"\x85R.", "builtins.eval"),
    "python 2's eval": (b"c__builtin__\neval\n" + _text("1") + b"\x85R.", "__builtin__.eval"),
    "getattr chain": (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n" + _text("os") + b"\x85R" + _text("system") + b"tR.",
        "builtins.getattr",
    ),
    "in a dict, late": (b"\x80\x02}(" + _text("a") + b"K\x01" + _text("b") + b"cposix\nsystem\nu.", "posix.system"),
    "as a key": (b"\x80\x02}(cposix\nsystem\nNu.", "posix.system"),
    "inst": (b"(" + _text(COMMAND) + b"iposix\nsystem\n.", "posix.system"),
    "obj": (b"(cposix\nsystem\n" + _text(COMMAND) + b"o.", "posix.system"),
    "newobj": (b"\x80\x02csubprocess\nPopen\n" + _text(COMMAND) + b"\x85\x81.", "subprocess.Popen"),
    "inst of an allowed name": (b"(icollections\nOrderedDict\n.", "opcode INST"),
    "obj of an allowed name": (b"(ccollections\nOrderedDict\no.", "opcode OBJ"),
    "newobj of an allowed name": (b"ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
    "newobj_ex": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "opcode NEWOBJ_EX"),
    "ext1": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "ext2": (b"\x80\x02\x83\x01\x00.", "opcode EXT2"),
    "ext4": (b"\x80\x02\x84\x01\x00\x00\x00.", "opcode EXT4"),
    "text reference": (b"\x80\x02Pstorage\n.", "opcode PERSID"),
    "nested load": (b"ctorch.storage\n_load_from_bytes\nC\x00\x85R.", "torch.storage._load_from_bytes"),
    "import only": (b"\x80\x02cevil_module\nname\n.", "evil_module.name"),
    "control characters": (b"\x80\x04" + _text("a\x1b[2J\n") + _text("b") + b"\x93.", r"a\x1b[2J\n.b"),
    "long name": (b"\x80\x04" + _text("a" * 9000) + _text("b") + b"\x93.", "a" * 333 + " …"),
    "call of a dtype": (b"ctorch\nfloat32\n)R.", "cannot be called"),
    "call of a value": (b"X\x01\x00\x00\x00a)R.", "cannot be called"),
    "build on a class": (b"ccollections\nOrderedDict\n}b.", "sets attributes"),
    "build on a list": (b"]}b.", "sets attributes"),
    "setstate": (pickle.dumps(_SetState(), 2), "test_pickle_machine._SetState"),
}


@LAYOUTS
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_end_in_an_error_that_says_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, legacy: bool
) -> None:
    (tmp_path / "evil_module.py").write_text("open('ran', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    opcodes, words = ATTACKS[name]
    modules = set(sys.modules)
    text = error_of(tmp_path, legacy_of(opcodes) if legacy else zip_of(opcodes))
    assert words in text
    assert set(sys.modules) - modules <= {"pickletools"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil_module.py", "file.pt"]


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 4])
def test_commands_that_pickle_itself_would_run(tmp_path: Path, protocol: int, legacy: bool) -> None:
    sentinel = tmp_path / "ran"
    command = f"touch {sentinel}"
    chains: list[Any] = [
        _Reduce(os.system, command),
        _Reduce(eval, f"open({str(sentinel)!r}, 'w')"),
        _Reduce(getattr, _Reduce(__import__, "os"), "system"),
        _Reduce(subprocess.Popen, ["touch", str(sentinel)]),
        {"model_state_dict": [_Reduce(exec, f"open({str(sentinel)!r}, 'w')")]},
    ]
    names = ["posix.system", "builtins.eval", "builtins.getattr", "subprocess.Popen", "builtins.exec"]
    pickle.loads(pickle.dumps(chains[1], protocol))
    assert sentinel.exists()  # so these would run
    sentinel.unlink()
    for chain, name in zip(chains, names, strict=True):
        opcodes = pickle.dumps(chain, protocol)
        text = error_of(tmp_path, legacy_of(opcodes) if legacy else zip_of(opcodes))
        python_2 = text.replace("__builtin__", "builtins").replace("commands", "subprocess")  # protocol 2's names
        assert f"the global {name}," in python_2
        assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]


def test_attributes_put_on_a_dict_vanish(tmp_path: Path) -> None:
    value = Call("collections.OrderedDict", (), {"__class__": "x", "items": None, "keys": 1})
    loaded = load(put(tmp_path, zip_file(value)))
    assert type(loaded) is dict and loaded == {}


@pytest.mark.parametrize("place", range(3))
def test_the_small_pickles_in_front_know_no_globals(tmp_path: Path, place: int) -> None:
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts[place] = parts[place][:-1] + b"ccollections\nOrderedDict\n."
    assert "collections.OrderedDict" in error_of(tmp_path, b"".join(parts) + b"}.].")


# Work without end


def _costs(tmp_path: Path, opcodes: bytes) -> str:
    """The error, which must come within seconds and a bounded amount of memory."""
    data = zip_of(opcodes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    text = error_of(tmp_path, data)
    assert time.process_time() - start < 10
    kilobytes = 1024 if sys.platform == "darwin" else 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / kilobytes < 200_000
    return text


def _wide(layout: str, value: int) -> bytes:
    return struct.pack(layout, value)


LONG = MAX_STEPS + 10
BOMBS: dict[str, tuple[bytes, str]] = {
    "steps": (b"N" * LONG, "steps"),
    "dicts": (b"}" * LONG, "steps"),
    "marks": (b"(" * LONG, "steps"),
    "memo": (b"}" + b"\x94" * LONG, "steps"),
    "memo by a huge index": (b"Nr\xff\xff\xff\xff]r\xfe\xff\xff\xff0.", "opcode POP"),
    "memo never stored": (b"j\xff\xff\xff\xff.", "never stored"),
    "dicts of a long list": (
        b"](" + b"(NNt" * 9999 + b"eq\x00" + b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 9999 + b".",
        "steps",
    ),
    "sizes of a long list": (
        b"](" + b"N" * 99_999 + b"eq\x00" + b"ctorch\nSize\nq\x01" + b"h\x01h\x00\x85R" * 9999 + b".",
        "steps",
    ),
    "shapes of a long tuple": (
        b"(" + b"N" * 99_999 + b"tq\x00" + b"ctorch\nSize\nq\x01" + b"h\x01h\x00\x85R" * 9999 + b".",
        "steps",
    ),
    "deep lists": (b"]" * 200_000 + b"a" * 199_999 + b".", "levels deep"),
    "deep tuples": (b"N" + b"\x85" * 400_000 + b".", "levels deep"),
    "deep dicts": (b"}" + b"N}" * 150_000 + b"s" * 150_000 + b".", "levels deep"),
    "deep by sharing": (b"](" + b"N\x85q\x00" + b"h\x00\x85q\x00" * 300 + b"e.", "levels deep"),
    "list in itself": (b"]q\x00h\x00a.", "contains itself"),
    "dict in itself": (b"}q\x00Nh\x00s.", "contains itself"),
    "tuple in itself": (b"]q\x00h\x00\x85q\x01a.", "contains itself"),
    "a deep tuple as a key": (b"}N" + b"\x85" * 400_000 + b"Ns.", "neither a string nor"),
    "a tuple as a key": (b"})Ns.", "neither a string nor"),
    "a float as a key": (b"}G" + b"\0" * 8 + b"Ns.", "neither a string nor"),
    "a huge key": (b"}\x8a\x09" + b"\xff" * 8 + b"\x01Ns.", "neither a string nor"),
    "a symbol as a key": (b"}ctorch\nfloat32\nNs.", "neither a string nor"),
    "a long integer": (b"\x8b" + _wide("<i", 1 << 20) + b"\x01" * (1 << 20) + b".", "integer of 1,048,576 bytes"),
    "a negative length": (b"\x8b\xff\xff\xff\xff.", "negative length"),
    "a long number": (b"I" + b"9" * 600 + b"\n.", "does not end"),
    "a number of letters": (b"I1_0\n.", "an invalid number"),
    "a text of 2 GB": (b"X\xff\xff\xff\x7fabc.", "cut short"),
    "a text of 16 EB": (b"\x8d" + b"\xff" * 8 + b"abc.", "cut short"),
    "bytes of 16 EB": (b"\x8e" + b"\xff" * 8 + b"abc.", "cut short"),
    "a frame of 16 EB": (b"\x95" + b"\xff" * 8, "cut short"),
    "half a surrogate": (b"X\x03\0\0\0\xed\xa0\x80.", "not UTF-8"),
    "a name without end": (b"c" + b"a" * 9000 + b"\n\n.", "does not end"),
    "bytes from a long text": (
        b"X" + _wide("<I", MAX_STEPS) + b"a" * MAX_STEPS + b"q\x00c_codecs\nencode\nh\x00X\x06\0\0\0latin1\x86R.",
        "steps",
    ),
    "nothing": (b".", "more or less than one value"),
    "two values": (b"NN.", "more or less than one value"),
    "an open mark": (b"N(.", "more or less than one value"),
    "no end": (b"N", "cut short"),
    "no opcode": (b"\xff.", "opcode 0xff"),
    "no value for append": (b"a.", "no"),
    "append to a tuple": (b")Na.", "fills a list"),
    "item of a list": (b"]NNs.", "fills a dict"),
    "a key without a value": (b"}(Nu.", "key without a value"),
    "no mark": (b"t.", "never set"),
    "memo of nothing": (b"q\x00.", "remembers"),
    "arguments that are none": (b"ctorch\nSize\n]R.", "not a tuple"),
    "a global by number": (b"NN\x93.", "not a string"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_soon_and_small(tmp_path: Path, name: str) -> None:
    opcodes, words = BOMBS[name]
    assert words in _costs(tmp_path, b"\x80\x02" + opcodes)


def test_a_pickle_that_is_too_large(tmp_path: Path) -> None:
    text = error_of(tmp_path, zip_of(bytes(MAX_PICKLE_BYTES + 1)))
    assert f"the limit is {MAX_PICKLE_BYTES:,}" in text


def test_a_legacy_pickle_that_does_not_end(tmp_path: Path) -> None:
    endless = b"\x80\x02" + (b"C\xff" + b"x" * 255) * (MAX_PICKLE_BYTES // 257 + 1)
    assert "goes on past" in error_of(tmp_path, legacy_of(endless))


def test_parts_may_be_shared_and_nested_within_reason(tmp_path: Path) -> None:
    nested: Any = "leaf"
    for _ in range(MAX_DEPTH - 1):
        nested = [nested]
    shared = {"a": [1, 2]}
    value = [nested, [shared] * 100, [[shared] * 10] * 10]
    assert load(put(tmp_path, zip_file(value))) == value
    assert "levels deep" in error_of(tmp_path, zip_file([value]))


def test_sharing_that_unfolds_without_end(tmp_path: Path) -> None:
    laugh: Any = ["ha"]
    for _ in range(30):
        laugh = [laugh, laugh]
    assert "repeats its parts" in error_of(tmp_path, zip_file(laugh))
