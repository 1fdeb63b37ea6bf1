"""Data sets on the hub: which of a repository's files are meant, from a made cache and a hub that is played."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from texts import records as read

from elm_mlx import hub as hub_module
from elm_mlx.data.hub_data import HubData
from elm_mlx.errors import ElmError, InputError

NAME = "datasets/a/b"


def fill(hub: HubServer, *names: str, name: str = NAME) -> None:
    """Makes a data set whose every file holds a text: its name."""
    hub.repositories[name] = {each: json.dumps({"text": each}).encode() + b"\n" for each in names}


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


def test_splits_as_of_a_directory(hub: HubServer) -> None:
    train, test = [f"data/train-0000{n}-of-00002.jsonl" for n in (0, 1)], ["data/test-00000-of-00001.jsonl"]
    fill(hub, *train, *test, "data/unlabelled.jsonl", "README.md")
    assert texts("hub:a/b") == {"train": train, "test": test}
    assert texts("hub:a/b:test") == {"train": test}
    assert texts("hub:a/b:unlabelled") == texts("hub:a/b/data/unlabelled.jsonl") == {"train": ["data/unlabelled.jsonl"]}
    with pytest.raises(InputError, match=r"^hub:a/b: holds no dev\.jsonl, .*hub:a/b/FOLDER-OR-FILE names one$"):
        texts("hub:a/b:dev")


def test_a_part_of_a_data_set(hub: HubServer) -> None:
    fill(hub, "main/train.jsonl", "socratic/train.jsonl", "socratic/test.jsonl")
    with pytest.raises(InputError, match=r"hub:a/b: main and socratic both hold data .*; hub:a/b/FOLDER-OR-FILE names"):
        texts("hub:a/b")
    assert texts("hub:a/b/socratic") == {"train": ["socratic/train.jsonl"], "test": ["socratic/test.jsonl"]}
    with pytest.raises(InputError, match=r"hub:a/b/none: has no data that can be read"):
        texts("hub:a/b/none")


def test_a_file_by_whatever_name(hub: HubServer) -> None:
    fill(hub, "alpaca_cleaned.json", "README.md", "load.py")
    assert texts("hub:a/b") == {"train": ["alpaca_cleaned.json"]}


def test_offline_the_cache_is_all_there_is(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(hub, "train.jsonl", "test.jsonl")
    assert texts("hub:a/b:test") == {"train": ["test.jsonl"]}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert texts("hub:a/b") == {"train": ["test.jsonl"]}  # by whatever name: the only one that is there
    with pytest.raises(ElmError, match=r"^hub:a/c: is not in the hub's cache, and HF_HUB_OFFLINE keeps it"):
        texts("hub:a/c")
    assert len(hub.asked) == asked


def test_what_the_hub_has_not(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(hub, "train.jsonl")
    with pytest.raises(InputError, match=r"^hub:a/b@v9: the hub has no such revision of a/b$"):
        texts("hub:a/b@v9")
    with pytest.raises(
        InputError, match=r"^hub:a/c: not in the hub's cache, and http.* has no such data set \(or it is"
    ):
        texts("hub:a/c")
    hub.refuses[NAME] = (403, "GatedRepo")
    with pytest.raises(InputError, match=r"^hub:a/b: is gated: accept its terms at http.*/datasets/a/b, and log in"):
        texts("hub:a/b")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ElmError, match=r"^hub:a/b: not in the hub's cache, and http://127.0.0.1:9 cannot be reached"):
        texts("hub:a/b")


def test_no_more_is_fetched_than_is_meant(hub: HubServer) -> None:
    fill(hub, "data/train.jsonl", "data/test.jsonl", "raw/huge.jsonl", "load.py", "../evil.jsonl")
    assert texts("hub:a/b:test") == {"train": ["data/test.jsonl"]} and {*hub.fetched()} == {"data/test.jsonl"}
    assert texts("hub:a/b") == {"train": ["data/train.jsonl"], "test": ["data/test.jsonl"]}
    assert {*hub.fetched()} == {"data/train.jsonl", "data/test.jsonl"}


def test_where_there_are_no_data_files_those_that_the_hub_makes_are_taken(hub: HubServer) -> None:
    fill(hub, "script.py", "a.zip")
    with pytest.raises(InputError, match="hub:a/b: has no data that can be read"):
        texts("hub:a/b")
    fill(hub, "default/train/0000.jsonl", name=f"{NAME}@refs/convert/parquet")
    assert texts("hub:a/b") == {"train": ["default/train/0000.jsonl"]}


def test_a_large_file_goes_on_where_its_download_broke(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_LARGE", 1000)
    monkeypatch.setattr(hub_module, "_PIECE", 1000)
    monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: None)
    lines = [f"line {number} of a data set" for number in range(500)]
    hub.repositories[NAME] = {"train.jsonl": "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()}
    hub.breaks["train.jsonl"] = [5000, *[0] * 5]  # then the command fails, and is given again
    with pytest.raises(ElmError, match=r"hub:a/b: .* cannot be reached .*: the same command goes on"):
        texts("hub:a/b")
    hub.breaks["train.jsonl"], before = [], len(hub.asked)
    assert texts("hub:a/b") == {"train": lines}
    ranges = [asked for method, path, asked in hub.asked[before:] if method == "GET" and path.endswith("train.jsonl")]
    assert ranges == ["bytes=5000-"]
