"""A pickle machine that can only build plain values.

Knows the pickle opcodes that torch.save writes, nothing of PyTorch. The machine is ours, rather than
a `pickle.Unpickler` with `find_class` overridden, because that class still does what the file says:
it calls whatever it was handed, runs `__setstate__`, hashes nested tuples as keys (which recurses in
C without a limit), sizes its memo by an index in the file, and has no bound on steps. Here an opcode
that is not in the table below is refused, a global is a name that the subclass may map to a value of
ours, and every step, byte, number and level is counted:

- keys of a dict are strings, 64-bit integers, booleans or None: hashing them costs a constant;
- what is built must be a finite tree of bounded depth and size, so that whoever walks it comes to an
  end: shared parts count as often as they are met.

A file at these limits costs about a second and 100 MB, and ends in an InputError or a value.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NoReturn

from elm_mlx.reading import printable
from elm_mlx_convert.tensors import File

# The pickle of a 3B's training checkpoint with averaged weights has 155 kB and takes 54,200 steps.
MAX_PICKLE_BYTES = 16 << 20
MAX_STEPS = 500_000
MAX_DEPTH = 100

_WINDOW = 1 << 16
_MAX_LINE = 512
_MAX_LONG = 255
_KEY_LIMIT = 1 << 63
_TOO_DEEP = f"its pickle is nested more than {MAX_DEPTH} levels deep"


class Stream:
    """The bytes of `file` from `start` on, `limit` of them at most, through a small window."""

    def __init__(self, file: File, start: int, limit: int) -> None:
        self.file = file
        self._end = min(start + limit, file.size)
        self._base = start
        self._window = b""
        self._at = 0

    @property
    def position(self) -> int:
        """The next byte's place in the file."""
        return self._base + self._at

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._window):
            if size > self._end - self.position:
                raise self.file.fail(f"its pickle goes on past byte {self._end}: cut short, or not a state dict")
            self._refill(size)
            end = size
        piece = self._window[self._at : end]
        self._at = end
        return piece

    def line(self) -> str:
        """Reads up to a newline, which is left out."""
        if len(self._window) - self._at < _MAX_LINE:
            self._refill(_MAX_LINE)
        end = self._window.find(b"\n", self._at, self._at + _MAX_LINE)
        if end < 0:
            raise self.file.fail("its pickle holds a line that does not end")
        piece = self._window[self._at : end]
        self._at = end + 1
        return self.text(piece)

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.file.fail("its pickle holds a text that is not UTF-8") from None

    def _refill(self, size: int) -> None:
        self._base, self._at = self.position, 0
        self._window = self.file.read(self._base, min(max(size, _WINDOW), self._end - self._base))


class PickleMachine:
    """Runs one pickle of `stream`, which is left just behind it. On its own it knows no global at all.

    Raises:
        InputError: for everything that a state dict has no need of.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}
        self._steps = 0

    def run(self) -> Any:
        while (code := self.stream.take(1)[0]) != _STOP:
            self.spend(1)
            handler = _HANDLERS.get(code)
            if handler is None:
                self.refuse_opcode(code)
            handler(self)
        if self._below or len(self._stack) != 1:
            self.fail("its pickle ends with more or less than one value")
        result = self._stack[0]
        self._check_tree(result)
        return result

    def resolve(self, name: str) -> Any:
        """Returns the value that stands for the global `module.attribute`."""
        self.fail(
            f"asks for the global {printable(name)}, which is not one of the few that a state dict needs; "
            "nothing was run. Save just the weights: torch.save(model.state_dict(), ...)"
        )

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Returns what the global `function`, as `resolve` gave it, makes of `arguments`."""
        self.fail("its pickle calls something that cannot be called")

    def build(self, value: Any, state: Any) -> Any:
        """Returns `value` with `state` applied, or `value` where the state does not matter."""
        self.fail("its pickle sets attributes of something that has none")

    def new(self, kind: Any, arguments: tuple[Any, ...]) -> Any:
        """Returns the value that stands for a new object of the class `kind`, a global."""
        self.refuse_opcode(0x81)

    def is_inert(self, value: Any) -> bool:
        """Returns whether `value` stands for an object of which nothing is kept, nor of what it is filled with."""
        return False

    def persistent(self, reference: Any) -> Any:
        """Returns the value that `reference` to data outside of the pickle stands for."""
        self.fail("its pickle refers to data outside of it where there is none")

    def fail(self, problem: str) -> NoReturn:
        raise self.stream.file.fail(problem)

    def spend(self, steps: int) -> None:
        """Counts work; what takes longer than one step says so before it does it."""
        self._steps += steps
        if self._steps > MAX_STEPS:
            self.fail(f"its pickle takes more than {MAX_STEPS:,} steps, which no state dict does")

    def refuse_opcode(self, code: int) -> NoReturn:
        import pickletools  # its table takes a while to make

        name = next((opcode.name for opcode in pickletools.opcodes if opcode.code == chr(code)), f"0x{code:02x}")
        self.fail(f"its pickle uses the opcode {name}, which torch.save does not write for a state dict")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if not self._stack:
            self.fail("its pickle takes a value where there is none")
        return self._stack.pop()

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def pop_to_mark(self) -> list[Any]:
        if not self._below:
            self.fail("its pickle goes back to a mark that it never set")
        items, self._stack = self._stack, self._below.pop()
        return items

    def top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            self.fail(f"its pickle fills a {kind.__name__} where there is none")
        return self._stack[-1]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.stream.take(struct.calcsize(layout)))[0]

    def take_sized(self, layout: str) -> bytes:
        """Reads a length as `layout` says, and as many bytes."""
        return self.stream.take(self._length(layout))

    def extend(self, kind: type, items: list[Any]) -> None:
        """Puts `items` into the list on top. A set is never there but as an inert value, of which nothing is kept."""
        if not self.top_is_inert():
            self.top(kind).extend(items)

    def store(self, values: list[Any]) -> None:
        """Puts keys and values, alternating, into the dict on top."""
        if self.top_is_inert():
            return
        target = self.top(dict)
        if len(values) % 2:
            self.fail("its pickle has a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            self.put(target, key, value)

    def put(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        if type(key) not in (str, int, bool, type(None)) or (type(key) is int and abs(key) >= _KEY_LIMIT):
            self.fail("a dict in it has a key that is neither a string nor a 64-bit integer")
        target[key] = value

    def remember(self, index: int) -> None:
        if not self._stack:
            self.fail("its pickle remembers a value where there is none")
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        if index not in self._memo:
            self.fail("its pickle recalls a value that it never stored")
        self.push(self._memo[index])

    def take_long(self, layout: str) -> int:
        size = self._length(layout)
        if size > _MAX_LONG:
            self.fail(f"its pickle holds an integer of {size:,} bytes")
        return int.from_bytes(self.stream.take(size), "little", signed=True)

    def take_text_number(self) -> int | bool:
        """Reads the line of INT and LONG: digits, an L behind them, or 00 and 01 for the booleans."""
        line = self.stream.line()
        if line in ("00", "01"):
            return line == "01"
        digits = line.removesuffix("L")
        if not (digits.isascii() and digits.removeprefix("-").isdigit()):
            self.fail("its pickle holds an invalid number")
        return int(digits)

    def resolve_stacked(self) -> Any:
        attribute, module = self.pop(), self.pop()
        if type(attribute) is not str or type(module) is not str:
            self.fail("its pickle names a global by something that is not a string")
        return self.resolve(f"{module}.{attribute}")

    def reduce(self) -> Any:
        return self.call(*self._pop_call())

    def make(self) -> Any:
        return self.new(*self._pop_call())

    def make_with_names(self) -> Any:
        names, arguments, kind = self.pop(), self.pop(), self.pop()
        if type(names) is not dict or type(arguments) is not tuple or not self.is_inert(kind):
            self.refuse_opcode(0x92)
        return self.new(kind, arguments)

    def top_is_inert(self) -> bool:
        return bool(self._stack) and self.is_inert(self._stack[-1])

    def _pop_call(self) -> tuple[Any, tuple[Any, ...]]:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple:
            self.fail("its pickle calls with arguments that are not a tuple")
        return function, arguments

    def _length(self, layout: str) -> int:
        size: int = self.number(layout)
        if size < 0:
            self.fail("its pickle holds a negative length")
        return size

    def _check_tree(self, root: Any) -> None:
        """Refuses cycles, depth, and sharing that unfolds without end. Goes depth first without recursion."""
        measured: dict[int, tuple[int, int]] = {}  # values and levels of each container, all below it included
        open_ids: set[int] = set()
        pending = [(root, False)]
        while pending:
            node, finished = pending.pop()
            parts = node.values() if type(node) is dict else node if type(node) in (list, tuple) else ()
            if finished:
                open_ids.remove(id(node))
                below = [measured.get(id(part), (1, 0)) for part in parts]
                values, levels = 1 + sum(size for size, _ in below), 1 + max(height for _, height in below)
                if values > MAX_STEPS:
                    self.fail("its pickle repeats its parts until they are too many to walk")
                if levels > MAX_DEPTH:
                    self.fail(_TOO_DEEP)
                measured[id(node)] = values, levels
            elif id(node) in open_ids:
                self.fail("its pickle holds something that contains itself")
            elif parts and id(node) not in measured:
                if len(open_ids) >= MAX_DEPTH:
                    self.fail(_TOO_DEEP)
                open_ids.add(id(node))
                pending.append((node, True))
                pending.extend((part, False) for part in parts if type(part) in (dict, list, tuple))


def _global(machine: PickleMachine) -> None:
    module = machine.stream.line()
    machine.push(machine.resolve(f"{module}.{machine.stream.line()}"))


def _instance(machine: PickleMachine) -> None:
    _global(machine)  # the error should name the global where that is the offence
    machine.refuse_opcode(ord("i"))


_STOP = ord(".")

_PUSHES: dict[str, Callable[[PickleMachine], Any]] = {
    "N": lambda m: None,
    "\x88": lambda m: True,
    "\x89": lambda m: False,
    "J": lambda m: m.number("<i"),
    "K": lambda m: m.number("<B"),
    "M": lambda m: m.number("<H"),
    "\x8a": lambda m: m.take_long("<B"),
    "\x8b": lambda m: m.take_long("<i"),
    "I": PickleMachine.take_text_number,
    "L": PickleMachine.take_text_number,
    "G": lambda m: m.number(">d"),
    "X": lambda m: m.stream.text(m.take_sized("<I")),
    "\x8c": lambda m: m.stream.text(m.take_sized("<B")),
    "\x8d": lambda m: m.stream.text(m.take_sized("<Q")),
    "T": lambda m: m.stream.text(m.take_sized("<i")),  # Python 2's str
    "U": lambda m: m.stream.text(m.take_sized("<B")),
    "B": lambda m: m.take_sized("<I"),
    "C": lambda m: m.take_sized("<B"),
    "\x8e": lambda m: m.take_sized("<Q"),
    "\x96": lambda m: m.take_sized("<Q"),  # a bytearray
    "}": lambda m: {},
    "]": lambda m: [],
    ")": lambda m: (),
    "t": lambda m: tuple(m.pop_to_mark()),
    "\x85": lambda m: (m.pop(),),
    "\x86": lambda m: (m.pop(), m.pop())[::-1],
    "\x87": lambda m: (m.pop(), m.pop(), m.pop())[::-1],
    "\x93": PickleMachine.resolve_stacked,
    "R": PickleMachine.reduce,
    "\x81": PickleMachine.make,
    "\x92": PickleMachine.make_with_names,
    "\x8f": lambda m: m.resolve("builtins.set"),
    "\x91": lambda m: (m.resolve("builtins.frozenset"), m.pop_to_mark())[0],
    "b": lambda m: m.build(*(m.pop(), m.pop())[::-1]),
    "Q": lambda m: m.persistent(m.pop()),
}

_EFFECTS: dict[str, Callable[[PickleMachine], None]] = {
    "\x80": lambda m: m.number("<B"),  # the protocol's version; the opcodes say all that matters
    "\x95": lambda m: m.number("<Q"),  # a frame's length: a hint for buffering, no limit of anything
    "(": PickleMachine.mark,
    "a": lambda m: m.extend(list, [m.pop()]),
    "e": lambda m: m.extend(list, m.pop_to_mark()),
    "\x90": lambda m: m.extend(set, m.pop_to_mark()),
    "s": lambda m: m.store([m.pop(), m.pop()][::-1]),
    "u": lambda m: m.store(m.pop_to_mark()),
    "q": lambda m: m.remember(m.number("<B")),
    "r": lambda m: m.remember(m.number("<I")),
    "\x94": lambda m: m.remember(len(m._memo)),
    "h": lambda m: m.recall(m.number("<B")),
    "j": lambda m: m.recall(m.number("<I")),
    "c": _global,
    "i": _instance,
}


def _pushing(make: Callable[[PickleMachine], Any]) -> Callable[[PickleMachine], None]:
    return lambda machine: machine.push(make(machine))


_HANDLERS = {ord(code): _pushing(make) for code, make in _PUSHES.items()} | {
    ord(code): effect for code, effect in _EFFECTS.items()
}
