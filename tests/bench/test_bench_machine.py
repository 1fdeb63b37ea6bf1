"""What figures are said to be of."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from elm_mlx.bench import machine


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_that_was_changed_otherwise_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an interrupted suite doesn't go on with figures of both."""
    code = tmp_path / "elm_mlx" / "__init__.py"
    code.parent.mkdir()
    monkeypatch.setattr(machine.elm_mlx, "__file__", str(code))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    code.write_text("a = 1\n")
    for command in (["init"], ["add", "."], ["commit", "-m", "begin"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    clean = machine.commit()
    assert clean is not None and re.fullmatch(r"[0-9a-f]{40}", clean)
    names = []
    for text in ("a = 2\n", "a = 3\n", "a = 2\n", "a = 1\n"):
        code.write_text(text)
        names.append(machine.commit())
    first, second, again, last = names
    assert first == again and first != second and last == clean
    assert first is not None and re.fullmatch(rf"{clean}-dirty-[0-9a-f]{{8}}", first)


@pytest.mark.parametrize(
    ("flags", "vectors"),
    [
        ("fpu sse2 avx avx2 fma avx512f avx512bw", "AVX-512"),
        ("fpu sse2 avx avx2 fma", "AVX2"),
        ("fpu sse2 avx", ""),
        ("fp asimd fphp", ""),
    ],
)
def test_a_machine_is_told_by_its_vectors_too(flags: str, vectors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one name may differ by a factor."""
    monkeypatch.setattr(machine.blas, "processor", lambda: "")
    assert machine._vectors() == ""
    monkeypatch.setattr(machine.blas, "processor", lambda: f"flags\t\t: {flags}\n")
    assert machine._vectors() == vectors
