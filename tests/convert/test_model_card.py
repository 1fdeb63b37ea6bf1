"""A model card's head in a GGUF file: what the `gguf` package finds there, and cards that are no cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import other_models
import pytest

from elm_mlx_convert import export_gguf
from elm_mlx_convert.gguf_export import GgufExport

KEYS = gguf.Keys.General


def exported(path: Path, card: bytes | str, **how: Any) -> tuple[dict[str, Any], GgufExport]:
    directory = other_models.write_model(path / "model", "llama")
    (directory / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    done = export_gguf(directory, path / "a.gguf", **how)
    fields = gguf.GGUFReader(done.path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("general.")}, done


def test_licence_languages_and_base_models_are_in_the_file(tmp_path: Path) -> None:
    card = (
        "---\nlicense: other\nlicense_name: our-licence\nlicense_link: https://example.org/l\nlanguage:\n- en\n- no\n"
        "base_model:\n- HuggingFaceTB/SmolLM2-135M\n- https://example.org/other/\n- local\n---\n# A model\n"
    )
    found, done = exported(tmp_path, card, name="Ours", verify=True)
    assert not done.notes
    assert found[KEYS.NAME] == "Ours"
    assert [found[key] for key in (KEYS.LICENSE, KEYS.LICENSE_NAME, KEYS.LICENSE_LINK)] == [
        "other", "our-licence", "https://example.org/l",
    ]  # fmt: skip
    assert found[KEYS.LANGUAGES] == ["en", "no"]
    assert found[KEYS.BASE_MODEL_COUNT] == 3
    models = [
        {
            key: found.get(name.format(id=number))
            for key, name in (
                ("name", KEYS.BASE_MODEL_NAME), ("organization", KEYS.BASE_MODEL_ORGANIZATION),
                ("address", KEYS.BASE_MODEL_REPO_URL),
            )
        }
        for number in range(3)
    ]  # fmt: skip
    assert models == [
        {
            "name": "SmolLM2-135M", "organization": "HuggingFaceTB",
            "address": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
        },
        {"name": "other", "organization": None, "address": "https://example.org/other/"},
        {"name": "local", "organization": None, "address": None},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("# A model\n---\nlicense: mit\n---\n", None),
        ("", None),
        ("---\nlicense: 3\nlanguage: {a: 1}\nbase_model: [[1]]\n---\n", None),
        ("---\n- license\n---\n", "holds no YAML mapping"),
        ("---\nlicense: [mit\n---\n", "not YAML"),
        (b"---\nlicense: \xff\n---\n", "UTF-8"),
    ],
)
def test_a_card_that_says_nothing_or_cannot_be_read_stops_no_export(
    card: str | bytes, said: str | None, tmp_path: Path
) -> None:
    found, done = exported(tmp_path, card)
    assert not {name for name in found if name.startswith(("general.license", "general.lang", "general.base"))}
    assert [said in note and "\n" not in note for note in done.notes] == [True] * (said is not None)  # type: ignore[operator]
