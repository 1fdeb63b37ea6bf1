"""The `generation_config.json` of Hugging Face's tools, and what it may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elm_mlx.errors import InputError
from elm_mlx.inference import generation_config
from elm_mlx.inference.sampling import Sampler


def write(directory: Path, **values: Any) -> Path:
    (directory / generation_config.FILE_NAME).write_text(json.dumps(values))
    return directory


ALL = dict.fromkeys(generation_config.DEFAULTS)


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert generation_config.load(tmp_path) == {}
    assert generation_config.merge(tmp_path, ALL) == generation_config.DEFAULTS


def test_the_files_names_become_ours(tmp_path: Path) -> None:
    write(
        tmp_path, do_sample=True, temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1,
        max_new_tokens=64, eos_token_id=2, transformers_version="4.0",
    )  # fmt: skip
    expected = {
        "temp": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "max_tokens": 64,
    }  # fmt: skip
    assert generation_config.load(tmp_path) == expected
    assert generation_config.merge(tmp_path, ALL) == expected


def test_flags_go_before_the_file_and_zero_is_a_flag(tmp_path: Path) -> None:
    write(tmp_path, do_sample=True, temperature=0.7, top_k=40)
    assert generation_config.merge(tmp_path, {"temp": 0.0, "top_k": 0, "top_p": None}) == {
        "temp": 0.0,
        "top_k": 0,
        "top_p": 1.0,
    }


@pytest.mark.parametrize("sampling", [{}, {"do_sample": False}, {"do_sample": None}])
def test_a_model_that_does_not_sample_has_no_temperature(tmp_path: Path, sampling: dict[str, Any]) -> None:
    write(tmp_path, temperature=0.7, **sampling)
    assert generation_config.merge(tmp_path, ALL)["temp"] == 0.0


def test_null_is_nothing_said(tmp_path: Path) -> None:
    write(tmp_path, do_sample=None, temperature=None, top_k=None, max_new_tokens=None, eos_token_id=None)
    assert generation_config.load(tmp_path) == {}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"do_sample": True}, {"temp": 1.0}),
        ({"do_sample": True, "temperature": None, "top_p": 1.0}, {"temp": 1.0, "top_p": 1.0}),
        ({"do_sample": True, "temperature": 0}, {"temp": 0}),
        ({"do_sample": True, "temperature": 0.0, "top_k": -1}, {"temp": 0.0, "top_k": 0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 0}, {"temp": 0.0, "top_k": 0}),
        ({"top_k": 50.0, "max_new_tokens": 1e3, "eos_token_id": [1, 2]}, {"top_k": 50, "max_tokens": 1000}),
        ({"top_p": 1, "min_p": 0, "repetition_penalty": 1, "num_beams": 4, "max_length": 20},
         {"top_p": 1, "min_p": 0, "repetition_penalty": 1}),
    ],
)  # fmt: skip
def test_as_transformers_and_others_write_it(tmp_path: Path, said: dict[str, Any], meant: dict[str, Any]) -> None:
    found = generation_config.load(write(tmp_path, **said))
    assert found == meant
    Sampler(**{name: value for name, value in found.items() if name != "max_tokens"})
    assert all(type(found[name]) is int for name in found.keys() & {"top_k", "max_tokens"})


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", "hot"), ("temperature", [1]), ("temperature", True), ("top_k", 2.5), ("top_k", "40"),
     ("top_k", True), ("max_new_tokens", 1e3 + 0.5), ("max_new_tokens", {}), ("top_p", "0.9"), ("min_p", False),
     ("temperature", -1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0), ("top_p", 1.5),
     ("top_k", -2), ("min_p", 2), ("repetition_penalty", 0), ("max_new_tokens", 0), ("max_new_tokens", -1),
     ("do_sample", "yes"), ("do_sample", 1), ("top_k", float("inf"))],
)  # fmt: skip
def test_what_cannot_be_used_is_named(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path, **{"do_sample": True, key: value})
    with pytest.raises(
        InputError, match=rf"generation_config\.json: {key} is .*: .* (is needed|must be) ?.*"
    ) as caught:
        generation_config.load(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250 + len(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"\xff\xff", b"[" * 100_000], ids=lambda c: repr(c[:8])
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / generation_config.FILE_NAME).write_bytes(content)
    with pytest.raises(InputError, match=r"generation_config\.json(, line 1)?: "):
        generation_config.load(tmp_path)


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / generation_config.FILE_NAME).mkdir()
    with pytest.raises(InputError, match=r"generation_config\.json: cannot be read"):
        generation_config.load(tmp_path)


def test_settings_are_kept_in_the_directory(tmp_path: Path) -> None:
    liked = {**generation_config.DEFAULTS, "temp": 0.7, "max_tokens": 512}
    assert generation_config.merge(tmp_path, ALL, liked) == liked
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"bos_token_id": 1, "temperature": 0.3, "note": "é"}))
    assert generation_config.merge(tmp_path, ALL, liked) == liked, "a temperature without sampling is not used"
    for temp in (0.25, 0.0):
        chosen = {**liked, "temp": temp, "top_k": 7, "max_tokens": 99}
        assert generation_config.save(tmp_path, chosen) == path
        assert generation_config.merge(tmp_path, ALL, liked) == chosen, "the file goes before what we like"
        assert generation_config.merge(tmp_path, {**ALL, "temp": 0.9}, liked) == {**chosen, "temp": 0.9}, (
            "and flags before it"
        )
        saved = json.loads(path.read_text("utf-8"))
        assert (saved["bos_token_id"], saved["note"], saved["max_new_tokens"]) == (1, "é", 99)
        assert saved["do_sample"] is (temp > 0) and ("temperature" in saved) is (temp > 0)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    for broken in ("{", "[]", '{"top_k": "many"}'):
        path.write_text(broken)
        with pytest.raises(InputError, match="generation_config"):
            generation_config.load(tmp_path)
        with pytest.raises(InputError, match="generation_config"):
            generation_config.save(tmp_path, liked)
        assert path.read_text() == broken
