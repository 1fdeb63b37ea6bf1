"""Matrices that are none: a description of what a product with them computes, which `cblas.c` finds where MLX takes the
numbers to begin. Nothing else may read them."""

from __future__ import annotations

import ctypes
import functools

import mlx.core as mx

from elm_mlx import blas, device

MARK = 32  # bytes in front, which each process draws
READ, WRITE, FEED, CHOOSE, STORED, STEP, ORDER = range(1, 8)  # kinds, as in cblas.c


def library() -> ctypes.CDLL | None:
    """Returns the library made of cblas.c, where products of a CPU are computed by it; else None."""
    return None if device.on_gpu() else blas.own("elm_mlx_retire")


def mark() -> ctypes.Array[ctypes.c_ubyte]:
    """Returns the bytes that each description begins with. There must be a `library`."""
    found = library()
    assert found is not None
    return (ctypes.c_ubyte * MARK).in_dll(found, "elm_mlx_mark")


def description(kind: int, fields: bytes = b"") -> mx.array:
    """Returns the mark, the kind and what else is said of it, as words. There must be a `library`."""
    words = mx.array(memoryview(bytes(mark()) + kind.to_bytes(4, "little") + fields).cast("I"))
    mx.eval(words)
    return words


def matrix(words: mx.array, inputs: int, outputs: int) -> mx.array:
    """Returns the matrix `(inputs, outputs)` that begins with a description."""
    found = mx.as_strided(words.view(mx.float32), (inputs, outputs), (1, inputs))
    mx.eval(found)  # in a graph it would be made each time
    return found


def address(array: mx.array) -> int:
    """Returns where an array's numbers are; it must be computed, and its rows lie one after the other."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(array)))


@functools.cache
def chooser(vocab_size: int) -> mx.array:
    """Returns the matrix by which logits `(rows, vocab_size)` are multiplied to the logarithm of the sum of their
    exponentials, the largest of them, and where that first is: `(rows, 3)`."""
    return matrix(description(CHOOSE), vocab_size, 3)


@functools.cache
def orderer(vocab_size: int) -> mx.array:
    """Returns the matrix by which numbers `(rows, vocab_size)` are multiplied to their places from the least on, equals
    in their order."""
    return matrix(description(ORDER), vocab_size, vocab_size)
