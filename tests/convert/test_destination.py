"""Where a conversion may write: what it replaces, what it spares, and that a failure leaves the old as it was."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import made, read, save_pt, save_tokenizer, snapshot, tiny, weights

from elm_mlx import files
from elm_mlx.errors import ElmError, InputError
from elm_mlx_convert import conversion, convert

CONFIG = tiny()
WEIGHTS = weights(CONFIG)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A float32 CoreNet checkpoint with its tokenizer of 300 pieces beside it."""
    save_tokenizer(tmp_path / "in")
    return save_pt(tmp_path / "in" / "model.pt", WEIGHTS)


def test_dry_run_writes_nothing(tmp_path: Path, source: Path) -> None:
    before = snapshot(tmp_path)
    done = convert(source, tmp_path / "deep" / "out", dry_run=True)
    cut = CONFIG.with_vocab_size(300).shapes().values()
    assert done.destination is None and done.plan.parameters == sum(int(np.prod(shape)) for shape in cut)
    assert snapshot(tmp_path) == before and not (tmp_path / "deep").exists()


def test_existing_destinations(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    before = snapshot(out)
    with pytest.raises(InputError, match="exists already; pass --overwrite"):
        convert(source, out)
    with pytest.raises(InputError, match="exists already; pass --overwrite"):
        convert(source, out, dry_run=True)
    convert(source, out, overwrite=True, dtype="float32")
    assert snapshot(out).keys() == before.keys() and snapshot(out) != before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]


def test_overwrite_spares_what_is_no_model_directory(tmp_path: Path, source: Path) -> None:
    home = made(tmp_path / "home")
    (home / "thesis.tex").write_text("years of work")
    (home / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"it holds 'thesis\.tex'; nothing was replaced"):
        convert(source, home, overwrite=True)
    with pytest.raises(InputError, match=r"it holds 'home', 'in'; nothing was replaced"):
        convert(source, tmp_path, overwrite=True)
    assert (home / "thesis.tex").read_text() == "years of work"
    convert(source, made(tmp_path / "empty"), overwrite=True)


def test_destination_is_a_file_or_under_one(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        convert(source, tmp_path / "file", overwrite=True)
    with pytest.raises(ElmError, match="Not a directory"):
        convert(source, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_names_that_no_file_system_takes(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ElmError, match="File name too long"):
        convert(source, tmp_path / ("x" * 300))
    with pytest.raises(ElmError, match="File name too long"):
        convert("x" * 300, tmp_path / "out")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ElmError):
        convert(source, tmp_path / "loop")


def test_destination_holds_or_is_the_source(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "a")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=r"holds the source, model\.safetensors, which is to be read: choose another"):
        convert(tmp_path / "a", tmp_path / "a", dtype="float32", overwrite=True)
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(InputError, match="holds the source"):
        convert(tmp_path / "a", tmp_path / "link", overwrite=True)
    with pytest.raises(InputError, match="holds the source"):
        convert(tmp_path / "link", tmp_path / "a", overwrite=True)
    (tmp_path / "link").unlink()
    assert snapshot(tmp_path) == before


def test_destination_inside_the_source_and_through_a_link(tmp_path: Path, source: Path) -> None:
    convert(source, source.parent / "mlx")
    (tmp_path / "link").symlink_to(source.parent / "mlx")
    convert(source, tmp_path / "link", overwrite=True, dtype="float32")
    assert (tmp_path / "link").is_symlink()
    assert read(source.parent / "mlx")["transformer.norm.weight"].dtype == np.float32


def test_the_tokenizer_of_the_directory_that_is_replaced(tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", WEIGHTS)
    convert(path, tmp_path / "out", tokenizer=save_tokenizer(tmp_path / "tokenizer"))
    convert(path, tmp_path / "out", tokenizer=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "tokenizer.model").is_file()


def test_free_space_is_looked_at_first(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(ElmError, match=r"out: needs 1\d(\.\d)? MB, and 0 MB are free there"):
        convert(source, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_leaves_the_old(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    convert(source, tmp_path / "out")
    before = snapshot(tmp_path)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(code, "as the system says it")

    monkeypatch.setattr(conversion, "write_json", fails)
    with pytest.raises(ElmError, match=r"cannot be written: No space left|was not made: .*as the system says"):
        convert(source, tmp_path / "out", overwrite=True, dtype="float32")
    assert snapshot(tmp_path) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]


def test_a_verification_that_fails_leaves_the_old(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "out")
    before = snapshot(tmp_path)
    real = conversion.write_weights

    def wrong(directory: Path, tensors: Any, dtype: str, **options: Any) -> list[str]:
        broken = real(directory, tensors, dtype, **options)
        with (directory / "model.safetensors").open("r+b") as file:
            file.seek(-2, 2)
            file.write(b"\x3f\x00")
        return broken

    monkeypatch.setattr(conversion, "write_weights", wrong)
    with pytest.raises(ElmError, match=r"verification failed: transformer\.norm\.weight holds"):
        convert(source, tmp_path / "out", overwrite=True, verify=True)
    assert snapshot(tmp_path) == before


def test_a_source_that_changes_while_it_is_read(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = conversion.write_weights

    def meanwhile(*arguments: Any, **options: Any) -> list[str]:
        source.write_bytes(source.read_bytes()[:-5000])
        return real(*arguments, **options)

    monkeypatch.setattr(conversion, "write_weights", meanwhile)
    with pytest.raises(InputError, match=r"model\.pt"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
