"""What a path is: every kind of checkpoint opened, every other thing refused in plain words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_files
from checkpoints import corenet, save_hub, save_pt, tensors, tiny, weights
from hub_server import HubServer
from safetensors.numpy import save_file

from elm_mlx.errors import ElmError, InputError
from elm_mlx_convert import sources
from elm_mlx_convert.sources import open_source

CONFIG = tiny()
WEIGHTS = weights(CONFIG)


def check(path: Path | str, expected: dict[str, np.ndarray], **options: Any) -> Any:
    source = open_source(path, **options)
    assert source.tensors.keys() == expected.keys()
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(tensor.read(), expected[name], err_msg=name)
    return source


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict(tmp_path: Path, legacy: bool) -> None:
    path = save_pt(tmp_path / "c.pt", WEIGHTS, legacy=legacy)
    source = check(path, corenet(WEIGHTS))
    assert (source.label, source.kind, source.files) == ("c.pt", "PyTorch state dict", (path,))


def test_a_training_checkpoint_and_its_average(tmp_path: Path) -> None:
    average = corenet(weights(CONFIG, seed=1))
    tree = {
        "iterations": 7,
        "model_state_dict": tensors(corenet(WEIGHTS)),
        "optim_state_dict": {"state": {0: {"exp_avg": torch_files.tensor(np.ones(3, np.float32))}}},
        "ema_state_dict": tensors(average),
    }
    path = torch_files.save(tmp_path / "t.pt", tree)
    source = check(path, corenet(WEIGHTS))
    assert source.kind == "PyTorch training checkpoint, its model_state_dict (--ema takes its ema_state_dict)"
    assert check(path, average, ema=True).kind == "PyTorch training checkpoint, its ema_state_dict"


def test_numbers_beside_tensors_are_passed_over(tmp_path: Path) -> None:
    tree = tensors(corenet(WEIGHTS)) | {"epoch": 3, "done": True, "note": "x", "nothing": None}
    check(torch_files.save(tmp_path / "t.pt", tree), corenet(WEIGHTS))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({}, "holds no tensors, but nothing"),
        ({"epoch": 3}, "holds no tensors, but 'epoch'"),
        ({"weights": {"a": 1}, "epoch": 3}, "no state dict of named tensors, but 'weights', 'epoch'"),
        ({"model_state_dict": {}}, "holds no tensors, but nothing"),
        ({3: torch_files.tensor(np.ones(2, np.float32))}, "no state dict of named tensors"),
    ],
)
def test_torch_files_without_a_state_dict(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(torch_files.save(tmp_path / "t.pt", tree))


def test_a_safetensors_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(InputError, match=r"model\.safetensors: holds no tensors"):
            open_source(source)


def test_ema_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no ema_state_dict, which --ema asks for"):
        open_source(save_pt(tmp_path / "c.pt", WEIGHTS), ema=True)
    with pytest.raises(InputError, match="this is not"):
        open_source(save_hub(tmp_path / "hub", CONFIG, WEIGHTS), ema=True)


def test_directories(tmp_path: Path) -> None:
    directory = save_hub(tmp_path / "hub", CONFIG, WEIGHTS)
    source = check(directory, WEIGHTS)
    assert (source.label, source.directory) == ("hub", directory)
    check(directory / "model.safetensors", WEIGHTS)
    write_index(directory, "model", {"weight_map": dict.fromkeys(WEIGHTS, "model.safetensors")})
    check(directory, WEIGHTS)  # mlx-lm writes an index even for one file
    (directory / "model.safetensors.index.json").unlink()
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    check(directory, WEIGHTS)
    (directory / "weights.safetensors").unlink()
    torch_files.save(directory / "pytorch_model.bin", tensors(WEIGHTS))
    check(directory, WEIGHTS)
    (directory / "pytorch_model.bin").rename(directory / "some.pt")
    assert check(directory, WEIGHTS).label == "some.pt"
    (directory / "other.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds 'other\.pt', 'some\.pt': name the one"):
        open_source(directory)


def split(directory: Path, kind: str) -> dict[str, str]:
    """Two shards and their index; returns the weight map."""
    directory.mkdir()
    names = list(WEIGHTS)
    halves = {"1": names[: len(names) // 2], "2": names[len(names) // 2 :]}
    suffix = "safetensors" if kind == "model" else "bin"
    weight_map = {}
    for number, part in halves.items():
        file = f"{kind}-0000{number}-of-00002.{suffix}"
        chosen = {name: WEIGHTS[name] for name in part}
        if suffix == "bin":
            torch_files.save(directory / file, tensors(chosen))
        else:
            save_file(chosen, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, kind, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return weight_map


def write_index(directory: Path, kind: str, index: Any) -> None:
    suffix = "safetensors" if kind == "model" else "bin"
    (directory / f"{kind}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["model", "pytorch_model"])
def test_shards(tmp_path: Path, kind: str) -> None:
    split(tmp_path / "d", kind)
    source = check(tmp_path / "d", WEIGHTS)
    assert len(source.files) == 2


@pytest.mark.parametrize(
    "target",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", ".", "a\\b", "a\0b", 3, None, ["x"]],
)
def test_an_index_that_points_elsewhere(tmp_path: Path, target: Any) -> None:
    weight_map = split(tmp_path / "d", "model")
    (tmp_path / "d" / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", tmp_path / "d" / "sub" / "x.safetensors"):
        save_file({"transformer.norm.weight": WEIGHTS["transformer.norm.weight"]}, place)
    write_index(tmp_path / "d", "model", {"weight_map": weight_map | {"transformer.norm.weight": target}})
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: (points to|names)"):
        open_source(tmp_path / "d")


def test_an_index_that_does_not_match_its_files(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    weight_map = split(directory, "model")
    for index, message in (
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": weight_map | {"more": "model-00001-of-00002.safetensors"}}, "do not hold: 'more'"),
        ({"weight_map": weight_map | {"more": "model-00009-of-00002.safetensors"}}, "is not there: was the download"),
        ({"weight_map": {k: v for k, v in weight_map.items() if "norm" not in k}}, "does not put there"),
        ([], "no JSON object"),
    ):
        write_index(directory, "model", index)
        with pytest.raises(InputError, match=message):
            open_source(directory)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("hello")
    (tmp_path / "x.safetensors").write_text("hello")
    for path, message in (
        (tmp_path / "empty", "holds no model.safetensors, no pytorch_model.bin and no .pt"),
        (tmp_path / "x.txt", "not a file of torch.save"),
        (tmp_path / "x.safetensors", "not a safetensors file"),
        (tmp_path / "absent", "no such file or directory"),
        (str(tmp_path / "absent.pt"), "no such file or directory"),
        ("models/absent.pt", "no such file or directory"),
        ("absent", "no such file or directory"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(path)
    with pytest.raises(InputError, match="--revision main is for a repository"):
        open_source(tmp_path / "empty", revision="main")


def test_another_familys_model_needs_no_converting(hub: HubServer, tmp_path: Path) -> None:
    tmp_path /= "model"
    tmp_path.mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "olmo2"}')
    match = r"of the family OLMo 2, used as it is \(OpenELM alone is converted, averaged and exported\): "
    with pytest.raises(InputError, match=f"{match}but its weights must be model"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(InputError, match=f"{match}`elm-mlx generate {tmp_path}`"):
            open_source(source)
    hub.add("a/b", tmp_path)
    with pytest.raises(InputError, match=f"^a/b: {match}`elm-mlx generate a/b`$"):
        open_source("a/b")
    assert hub.fetched() == ["config.json"]  # and none of its weights


def test_what_could_be_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "here").mkdir(parents=True)
    assert str(sources.named_repository("apple/OpenELM-1_1B-Instruct@v2")) == "apple/OpenELM-1_1B-Instruct@v2"
    for name in ("OpenELM", "a/here", "a/b.pt", Path("a/b")):
        assert sources.named_repository(name) is None


def cached_repository(home: Path, config: Any, commit: str = "0123456789abcdef0123456789abcdef01234567") -> Path:
    """What `hf download` of a repository leaves in the cache."""
    repository = home / "hub" / "models--apple--OpenELM-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return save_hub(repository / "snapshots" / commit, config, WEIGHTS)


def open_in_process(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads its environment when it is imported."""
    code = (
        "import sys\nfrom elm_mlx.errors import ElmError\nfrom elm_mlx_convert.sources import open_source\n"
        "try:\n    s = open_source(sys.argv[1], revision=sys.argv[2] if sys.argv[2:] else None)\n"
        "    print(s.label, s.revision, len(s.tensors))\n"
        "except ElmError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_repository_from_the_cache_offline(tmp_path: Path) -> None:
    snapshot = cached_repository(tmp_path, CONFIG)
    done = open_in_process(tmp_path, "apple/OpenELM-tiny")
    assert done.stdout == f"apple/OpenELM-tiny {snapshot.name} {len(WEIGHTS)}\n", done.stderr
    done = open_in_process(tmp_path, f"apple/OpenELM-tiny@{snapshot.name}")
    assert done.stdout == f"apple/OpenELM-tiny {snapshot.name} {len(WEIGHTS)}\n", done.stderr
    done = open_in_process(tmp_path, "apple/OpenELM-tiny", snapshot.name)
    assert done.stdout == f"apple/OpenELM-tiny {snapshot.name} {len(WEIGHTS)}\n", done.stderr


def test_a_repository_that_is_not_in_the_cache_offline(tmp_path: Path) -> None:
    done = open_in_process(tmp_path, "apple/OpenELM-other")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "apple/OpenELM-other: is not in the hub's cache, and HF_HUB_OFFLINE keeps it from being "
    )
    assert done.stdout.count("\n") == 1


def test_a_repository_brings_one_layout_of_its_weights(hub: HubServer, tmp_path: Path) -> None:
    hub.add("a/b", save_hub(tmp_path / "model", CONFIG, WEIGHTS))
    more = {"pytorch_model.bin": b"", "load.py": b"", "tokenizer.model": b"-", "other/model.safetensors": b""}
    hub.repositories["a/b"] |= more
    opened = open_source("a/b")
    assert (opened.label, opened.revision, len(opened.tensors)) == ("a/b", hub.commit("a/b"), len(WEIGHTS))
    assert {*hub.fetched()} == {"config.json", "model.safetensors", "tokenizer.model"}
    del hub.repositories["a/b"]["model.safetensors"]
    with pytest.raises(InputError, match=r"pytorch_model\.bin: "):
        open_source("a/b")


def test_what_the_hub_answers_becomes_one_line(hub: HubServer) -> None:
    with pytest.raises(InputError, match=r"^a/b: no such directory, nor is it in the hub's cache, and http"):
        open_source("a/b")
    hub.repositories["a/b"] = {"config.json": b"{}", "model.safetensors": b""}
    with pytest.raises(InputError, match=r"^a/b@v2: the hub has no such revision of a/b$"):
        open_source("a/b", revision="v2")
    hub.refuses["a/b"] = (403, "GatedRepo")
    with pytest.raises(InputError, match=r"^a/b: is gated: accept its terms"):
        open_source("a/b")


def test_where_the_hub_cannot_be_reached_the_cache_is_enough(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add("a/b", save_hub(tmp_path / "model", CONFIG, WEIGHTS))
    commit = open_source("a/b").revision
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert open_source("a/b").revision == commit
    with pytest.raises(ElmError, match=r"^a/c: not in the hub's cache, and http://127\.0\.0\.1:9 cannot be reached"):
        open_source("a/c")
