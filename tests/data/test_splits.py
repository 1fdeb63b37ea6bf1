"""Names of data files: what people, mlx-lm and the hub write is found, junk is not, and of two none is guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from elm_mlx.data.splits import Name, find, is_held_out, name_of
from elm_mlx.errors import InputError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".ndjson", ".parquet")
HASH = "a09b74b3ef9c3b56"


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root: Path, *names: str) -> dict[str, list[str]]:
    splits = find(make(root, *names), SUFFIXES)
    return {split: [str(path.relative_to(root)) for path in files.paths] for split, files in splits.items()}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("train.jsonl", Name("train")),
        ("TRAIN.JSONL", Name("train")),
        ("val.ndjson", Name("valid")),
        ("Validation.json", Name("valid")),
        ("dev.jsonl.gz", Name("valid")),
        ("eval.json", Name("valid")),
        ("test.parquet", Name("test")),
        ("train-00000-of-00002.parquet", Name("train", "", 0, 2)),
        (f"train-00001-of-00002-{HASH}.parquet", Name("train", "", 1, 2)),
        ("train_3.jsonl", Name("train", "", 3)),
        ("train.00012.jsonl.gz", Name("train", "", 12)),
        (f"train_sft-00000-of-00001-{HASH}.parquet", Name("train", "_sft", 0, 1)),
        ("train-v2.json", Name("train", "-v2")),
        ("training.json", None),
        ("trained-1.json", None),
        ("my-train.json", None),
    ],
)
def test_what_a_name_says(name: str, wanted: Name | None) -> None:
    suffix = max((each for each in SUFFIXES if name.lower().endswith(each)), key=len)
    assert name_of(Path(name), suffix) == wanted


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["train.jsonl", "dev.jsonl", "test.json"], ["train.jsonl"]),
        (["train.jsonl", ".DS_Store", "._train.jsonl", "README.md", "dataset_infos.json"], ["train.jsonl"]),
        (["train.jsonl", "train_old.jsonl", "train-raw.json", "train.jsonl.bak", "training.json"], ["train.jsonl"]),
        (["train_2.json", "train_10.json", "train_1.jsonl.gz"], ["train_1.jsonl.gz", "train_2.json", "train_10.json"]),
        ([f"train-0000{i}-of-00002-{HASH}.parquet" for i in (1, 0)],
         [f"train-0000{i}-of-00002-{HASH}.parquet" for i in (0, 1)]),
        (["train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"], ["train_sft-00000-of-00001.parquet"]),
        (["data/train-00000-of-00001.parquet", "README.md"], ["data/train-00000-of-00001.parquet"]),
        (["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl"], ["train/a.jsonl", "train/b.jsonl"]),
        (["train/part-10.parquet", "train/part-9.parquet"], ["train/part-9.parquet", "train/part-10.parquet"]),
        (["TRAIN/x.json", "Val/y.json"], ["TRAIN/x.json"]),
        (["data/default/train/0000.parquet", "data/default/test/0000.parquet"], ["data/default/train/0000.parquet"]),
        (["train/1/a.json", "train/2/a_1.json", "train/state.json"], ["train/1/a.json", "train/2/a_1.json"]),
        (["train/train-00000-of-00001.json"], ["train/train-00000-of-00001.json"]),
        (["train/books-00000-of-00001.json", "train/news-00000-of-00001.json"],
         ["train/books-00000-of-00001.json", "train/news-00000-of-00001.json"]),
        (["train.jsonl", "data/train.jsonl"], ["train.jsonl"]),
        (["train/test-questions.json", "train/test.json"], ["train/test-questions.json"]),
    ],
)  # fmt: skip
def test_the_files_to_train_on(tmp_path: Path, names: list[str], wanted: list[str]) -> None:
    assert found(tmp_path, *names)["train"] == wanted


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev", "eval", "VALID"])
def test_a_validation_by_any_name(tmp_path: Path, name: str) -> None:
    assert found(tmp_path, "train.jsonl", f"{name}.jsonl", "test.jsonl") == {
        "train": ["train.jsonl"], "valid": [f"{name}.jsonl"], "test": ["test.jsonl"],
    }  # fmt: skip
    assert found(tmp_path / "folders", "train/a.jsonl", f"{name}/b.jsonl")["valid"] == [f"{name}/b.jsonl"]


@pytest.mark.parametrize(
    ("names", "both"),
    [
        (["train.json", "train.jsonl"], "train.json and train.jsonl"),
        (["train.jsonl", "TRAIN.jsonl"], "TRAIN.jsonl and train.jsonl"),
        (["train.jsonl", "train-00000-of-00001.jsonl"], "train-00000-of-00001.jsonl and train.jsonl"),
        (["train.jsonl", "val.jsonl", "dev.jsonl"], "dev.jsonl and val.jsonl"),
        (["train.jsonl", "train/a.jsonl"], "train.jsonl and train/a.jsonl"),
        (["train_gen.jsonl", "train_sft.jsonl"], "train_gen.jsonl and train_sft.jsonl"),
        ([f"train-00000-of-00001-{HASH}.json", f"train-00000-of-00001-{HASH[::-1]}.json"], "0001-a"),
        (["train-00000-of-00001.json", "train-00000-of-00001.parquet"], ".json and train-00000-of-00001.parquet"),
        (["train-00000-of-00001.json", "train-00001-of-00002.json"], "train-00000-of-00001.json and train-00001-of"),
        (["train/a.jsonl", "train/a.json"], "train/a.json and train/a.jsonl"),
        (["en/train.jsonl", "fr/train.jsonl"], "en and fr both hold data"),
    ],
)
def test_of_two_none_is_guessed(tmp_path: Path, names: list[str], both: str) -> None:
    if len({name.lower() for name in names}) < len(names):
        make(tmp_path, *names)
        if len(list(tmp_path.iterdir())) < len(names):
            pytest.skip("this file system takes them for one")
    with pytest.raises(InputError) as caught:
        found(tmp_path, *names)
    assert both in str(caught.value)


def test_shards_that_are_not_there_are_told(tmp_path: Path) -> None:
    whole = find(make(tmp_path / "whole", "train-00000-of-00002.json", "train-00001-of-00002.json"), SUFFIXES)
    assert whole["train"].missing is None
    one = find(make(tmp_path / "one", "train-00000-of-00002.json"), SUFFIXES)
    assert one["train"].missing == "1 of 2 shards are here, train-00000-of-00002.json first; missing: 00001"
    few = find(make(tmp_path / "few", "train/x-00007-of-99999999999.json"), SUFFIXES)
    assert few["train"].missing == (
        "1 of 99,999,999,999 shards are here, x-00007-of-99999999999.json first; missing: 00000, 00001, 00002, 00003, "
        "00004, …"
    )


@pytest.mark.parametrize(
    "names", [[], ["valid.jsonl"], ["a/b/c/d/train.jsonl"], ["train.csv", "train.arrow"], [".train/a.json"]]
)
def test_nothing_to_train_on(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(InputError, match=r"holds no train\.jsonl, train\.json, .*pass it") as caught:
        found(tmp_path, *names)
    assert all(f"{name.partition('/')[0]}" in str(caught.value) for name in names if not name.startswith("."))


@pytest.mark.parametrize(
    ("path", "held_out"),
    [
        ("a.jsonl", False), ("train.jsonl", False), ("valid.jsonl", True), ("Test-00000-of-00001.parquet", True),
        ("val.txt", True), ("dev/a.txt", True), ("x/Validation/a.json", True), ("train/a.json", False),
        ("test_of_time.txt", False), ("test_sft-00000-of-00001.parquet", True), ("test-of-time.txt", True),
        ("testament.txt", False),
    ],
)  # fmt: skip
def test_what_raw_text_is_held_out(path: str, held_out: bool) -> None:
    suffix = ".txt" if path.endswith(".txt") else next(each for each in SUFFIXES if path.endswith(each))
    assert is_held_out(Path(path), suffix) is held_out
