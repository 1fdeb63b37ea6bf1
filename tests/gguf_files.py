"""GGUF files byte by byte, right or wrong, for tests. Knows nothing of the package's own reader and writer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

Typed = tuple[int, Any]  # the number of a type of metadata, and a value; of an array, `(type, [values])`

FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(kind: int, what: Any) -> bytes:
    if kind == STRING:
        return string(what)
    if kind == ARRAY:
        inner, values = what
        return struct.pack("<IQ", inner, len(values)) + b"".join(value(inner, each) for each in values)
    return struct.pack("<" + FORMS[kind], what)


def entry(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """A tensor in the list. `shape` is in row-major order, as in Python."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


def gguf_file(
    metadata: Sequence[tuple[str | bytes, Typed]] = (),
    tensors: Sequence[tuple[str | bytes, Sequence[int], int, bytes]] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    """A whole file. A tensor is its name, shape, the number of its GGML type, and its bytes."""
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(metadata) if key_count is None else key_count,
    )
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    head += b"".join(string(key) + struct.pack("<I", kind) + value(kind, what) for key, (kind, what) in metadata)
    data = b""
    for name, shape, kind, content in tensors:
        data += b"\0" * (-len(data) % alignment)
        head += entry(name, shape, kind, len(data))
        data += content
    return head + b"\0" * (-len(head) % alignment) + data
