"""The words of messages."""

from __future__ import annotations

from elm_mlx.errors import ElmError, InputError
from elm_mlx.reading import counted


def test_how_many_of_what() -> None:
    assert [counted(1, noun) for noun in ("checkpoint", "entry", "process")] == ["1 checkpoint", "1 entry", "1 process"]
    assert counted(0, "record") == "0 records" and counted(1000, "layer") == "1,000 layers"
    assert [counted(2, noun) for noun in ("entry", "process", "batch", "key")] == [
        "2 entries", "2 processes", "2 batches", "2 keys",
    ]  # fmt: skip


def test_whose_fault_it_is_decides_the_exit_code() -> None:
    assert (InputError.exit_code, ElmError.exit_code) == (2, 1) and issubclass(InputError, ElmError)
