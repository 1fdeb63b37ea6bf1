"""Dataclasses as TOML: there and back, and every mistake named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_mlx.errors import InputError
from elm_mlx.train import pretraining_recipe, sections


@dataclass(frozen=True)
class Part:
    """A part.

    Args:
        path: where.
        weight: how much.
    """

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Whole:
    part: Part
    parts: tuple[Part, ...] = ()
    count: int = 3
    note: str | None = None
    on: bool = False
    pair: tuple[float, ...] = (0.5, 1.0)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise InputError(f"count must not be below 0, and is {self.count}")


def read(tmp_path: Path, text: str, *overrides: str) -> Whole:
    (tmp_path / "a.toml").write_text(text)
    return sections.read(tmp_path / "a.toml", Whole, overrides)


FULL = 'count = 4\npair = 0.25\n[part]\npath = "p"\n[[parts]]\npath = "q"\nweight = 2\n'


def test_types_and_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, FULL) == Whole(Part("p"), (Part("q", 2.0),), 4, pair=(0.25,))


def test_overrides(tmp_path: Path) -> None:
    made = read(tmp_path, FULL, "count=7", "part.path=/a b/c", "on=true", "pair=[1, 2]", 'note="x"')
    assert made == Whole(Part("/a b/c"), (Part("q", 2.0),), 7, "x", True, (1.0, 2.0))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[prt]\n", "a.toml: has no key 'prt'; the nearest is part"),
        ('[part]\npath = "p"\nwieght = 1\n', "a.toml: [part] has no key 'wieght'; the nearest is weight"),
        ("[part]\n", "[part] path is missing: where"),
        ("[part]\npath = 3\n", "part.path is 3; it needs a text"),
        ('count = 1.5\n[part]\npath = "p"\n', "count is 1.5; it needs a whole number"),
        ('count = true\n[part]\npath = "p"\n', "count is True; it needs a whole number"),
        ('count = -1\n[part]\npath = "p"\n', "a.toml: count must not be below 0"),
        ('part = "p"\n', "part is not a section; it starts with [part]"),
        ("count = \n", "is not TOML"),
    ],
)
def test_mistakes_are_named(text: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert error in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        (int, "1e3", 1000), (int, 1e5, 100_000), (int, "7", 7), (int, [7], 7), (float, "1e-4", 1e-4), (float, 2, 2.0),
        (float, "5", 5.0), (bool, "Yes", True), (bool, "off", False), (bool, [True], True), (str, ["a"], "a"),
    ],
)  # fmt: skip
def test_a_value_as_files_write_it(kind: type, value: Any, wanted: Any) -> None:
    found = sections.scalar(kind, value)
    assert found == wanted and type(found) is kind


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 1.5), (int, True), (int, "1.5"), (int, "x"), (int, [1, 2]), (int, None), (int, float("nan")),
        (int, float("inf")), (int, 2**63), (int, "9" * 5000), (float, 10**400), (float, False),
        (float, ""), (float, {}),
        (bool, 1), (bool, "2"), (bool, None), (str, 3), (str, True), (str, ["a", "b"]), (str, {"a": 1}),
        (str, None),
    ],
)  # fmt: skip
def test_what_is_no_such_value(kind: type, value: Any) -> None:
    with pytest.raises(ValueError, match="it needs") as caught:
        sections.scalar(kind, value)
    assert len(str(caught.value)) < 100


def test_one_thing_where_several_are_meant_and_the_other_way(tmp_path: Path) -> None:
    text = 'count = 4e0\npair = "1e-3"\non = "yes"\n[[part]]\npath = ["p"]\n[parts]\npath = "q"\n'
    assert read(tmp_path, text) == Whole(Part("p"), (Part("q"),), 4, None, True, (1e-3,))
    with pytest.raises(InputError, match=r"part is not a section"):
        read(tmp_path, '[[part]]\npath = "p"\n[[part]]\npath = "q"\n')


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 50_000])
def test_overrides_that_toml_cannot_hold(value: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"count is .* it needs a whole number"):
        read(tmp_path, FULL, f"count={value}")


@pytest.mark.parametrize("override", ["count", "count.x=1", "=1"])
def test_overrides_that_are_none(override: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--set"):
        read(tmp_path, FULL, override)


@given(st.text(max_size=20), st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 2**62), st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float, count: int, on: bool
) -> None:
    whole = Whole(Part(text, number), (Part("a"), Part(text, 1e-8)), count, None, on, (number,))
    path = tmp_path_factory.mktemp("toml") / "a.toml"
    path.write_text(sections.write(whole, "a run\nof two lines"), encoding="utf-8")
    assert sections.read(path, Whole) == whole


def test_every_field_of_a_recipe_is_said_in_the_file(tmp_path: Path) -> None:
    made = pretraining_recipe.preset("OpenELM-270M")
    text = sections.write(made, "")
    assert "# the highest learning rate.\nlr = 0.0053\n" in text
    for part in (made.model, made.data, made.data.sources[0], made.filters, made.optimizer, made.run):
        lines = sections.write(part, "").splitlines()
        for name, value in vars(part).items():
            if isinstance(value, tuple) and value and not isinstance(value[0], float):
                continue  # tables of their own
            at = next(i for i, line in enumerate(lines) if re.match(rf"(# )?{name} =", line))
            assert re.match(r"# \w", lines[at - 1]), name
