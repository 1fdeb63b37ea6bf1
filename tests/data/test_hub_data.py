"""Data sets on the hub: which of a repository's files are meant, from a made cache and a hub that is played."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from texts import records as read

from elm_mlx.data.hub_data import HubData
from elm_mlx.errors import ElmError, InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A cache of the hub's, by hand; and what was fetched."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.fetched, self._monkeypatch = path, list[str](), monkeypatch
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def cache(self, repository: str, *names: str, revision: str = "main") -> None:
        """Writes a repository whose every file holds a text: its name."""
        root = self.path / f"datasets--{repository.replace('/', '--')}"
        (root / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(COMMIT)
        for name in names:
            file = root / "snapshots" / COMMIT / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"text": name}) + "\n")

    def serve(self, listed: dict[str | None, list[str]]) -> None:
        """Plays the hub, with files by revision."""
        from huggingface_hub.errors import RevisionNotFoundError

        def about(_: Any, repository: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
            if revision not in listed:
                raise RevisionNotFoundError("404 Client Error", response=_Response())  # type: ignore[arg-type]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in listed[revision]])

        def fetch(repository: str, name: str, *, repo_type: str, revision: str | None) -> str:
            assert repo_type == "dataset" and name in listed[revision]
            self.fetched.append(name)
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_text(json.dumps({"text": name}) + "\n")
            return str(self.path / name)

        self._monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        self._monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", about)
        self._monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)


class _Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    status_code = 404
    request = None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path, monkeypatch)


def texts(name: str) -> dict[str, list[str]]:
    """Each split's texts, which say what they were read from."""
    return {split: [record.text for record in found.records] for split, found in read(Path(name)).items()}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hub:a/b", HubData("a/b")),
        ("hub:a/b:test", HubData("a/b", split="test")),
        ("hub:a/b/main", HubData("a/b", path="main")),
        ("hub:a.x/b-1@v2/data/x.csv:train_sft", HubData("a.x/b-1", "v2", "data/x.csv", "train_sft")),
    ],
)
def test_names(name: str, parts: HubData) -> None:
    assert HubData.parse(name) == parts


@pytest.mark.parametrize("name", ["hub:", "hub:b", "hub:a/", "hub:a/b:", "hub:a b/c", "hub:a/b:c:d"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InputError, match="write hub:OWNER/NAME"):
        HubData.parse(name)


def test_splits_as_of_a_directory(hub: Hub) -> None:
    train, test = [f"data/train-0000{n}-of-00002.jsonl" for n in (0, 1)], ["data/test-00000-of-00001.jsonl"]
    hub.cache("a/b", *train, *test, "data/unlabelled.jsonl", "README.md")
    assert texts("hub:a/b") == {"train": train, "test": test}
    assert texts("hub:a/b:test") == {"train": test}
    assert texts("hub:a/b:unlabelled") == texts("hub:a/b/data/unlabelled.jsonl") == {"train": ["data/unlabelled.jsonl"]}
    with pytest.raises(InputError, match=r"^hub:a/b: holds no dev\.jsonl, .*hub:a/b/FOLDER-OR-FILE names one$"):
        texts("hub:a/b:dev")


def test_a_part_of_a_data_set(hub: Hub) -> None:
    hub.cache("a/b", "main/train.jsonl", "socratic/train.jsonl", "socratic/test.jsonl")
    with pytest.raises(InputError, match=r"hub:a/b: main and socratic both hold data .*; hub:a/b/FOLDER-OR-FILE names"):
        texts("hub:a/b")
    assert texts("hub:a/b/socratic") == {"train": ["socratic/train.jsonl"], "test": ["socratic/test.jsonl"]}
    with pytest.raises(InputError, match=r"hub:a/b/none: has no data that can be read"):
        texts("hub:a/b/none")


def test_a_file_by_whatever_name(hub: Hub) -> None:
    hub.cache("a/b", "alpaca_cleaned.json", "README.md", "load.py")
    assert texts("hub:a/b") == {"train": ["alpaca_cleaned.json"]}


def test_what_the_cache_has_not(hub: Hub) -> None:
    with pytest.raises(ElmError, match=r"^hub:a/b: is not in the hub's cache, and HF_HUB_OFFLINE keeps it"):
        texts("hub:a/b")
    hub.serve({None: []})
    with pytest.raises(InputError, match=r"^hub:a/b: the hub has no revision v9 of it$"):
        texts("hub:a/b@v9")


def test_no_more_is_fetched_than_is_meant(hub: Hub) -> None:
    names = ["data/train.jsonl", "data/test.jsonl", "raw/huge.jsonl", "load.py", "../evil.jsonl"]
    hub.serve({None: names})
    assert texts("hub:a/b:test") == {"train": ["data/test.jsonl"]} and hub.fetched == ["data/test.jsonl"]
    assert texts("hub:a/b") == {"train": ["data/train.jsonl"], "test": ["data/test.jsonl"]}
    assert {*hub.fetched} == {"data/train.jsonl", "data/test.jsonl"}


def test_where_there_are_no_data_files_those_that_the_hub_makes_are_taken(hub: Hub) -> None:
    hub.serve({None: ["script.py", "a.zip"], "refs/convert/parquet": ["default/train/0000.jsonl"]})
    assert texts("hub:a/b") == {"train": ["default/train/0000.jsonl"]}
    hub.serve({None: ["script.py"]})
    with pytest.raises(InputError, match="hub:a/b: has no data that can be read"):
        texts("hub:a/b")
