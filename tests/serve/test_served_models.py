"""Models by their names, and adapters that share what they do not change."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import serving
from mlx.utils import tree_flatten

from elm_mlx.errors import InputError
from elm_mlx.inference.generation import generate
from elm_mlx.model import described
from elm_mlx.quantize import recipe
from elm_mlx.quantize.quantization import quantize
from elm_mlx.serve.served_models import ServedModel, load_models
from elm_mlx.store import adapters
from elm_mlx.store.loading import load, load_model


def served(models: Sequence[object], adapters: Sequence[str] = ()) -> dict[str, ServedModel]:
    return dict(load_models([str(model) for model in models], adapters, None, lambda text: None))


def weight_bytes(models: Mapping[str, ServedModel]) -> int:
    """Returns what models take; an array of several counts once."""
    arrays = {id(a): a.nbytes for each in models.values() for _, a in tree_flatten(each.loaded.model.parameters())}
    return sum(arrays.values())


@pytest.fixture(scope="module")
def adapter_dirs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    """Adapters of the tiny model of each kind, each of which changes what it says."""
    root = tmp_path_factory.mktemp("adapters")
    for number, kind in enumerate(("lora", "dora")):
        model = load_model(tiny_model_dir)
        adapter = adapters.plan(model.config, rank=4, dora=kind == "dora")
        adapters.attach(model, adapter)
        drawn = {
            name: mx.random.normal(value.shape, key=mx.random.key(number)) * 0.3
            for name, value in tree_flatten(model.trainable_parameters())
        }
        model.load_weights(list(drawn.items()), strict=False)
        adapters.save(root / kind, model, adapter)
    return {kind: root / kind for kind in ("lora", "dora")}


def test_names_are_those_of_directories_or_given(
    tiny_model_dir: Path, talker_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(served([tiny_model_dir, talker_dir])) == ["model", "talker"]
    assert list(served([f"a={tiny_model_dir}", f"b={tiny_model_dir}"])) == ["a", "b"]
    monkeypatch.chdir(tiny_model_dir)
    assert list(served(["."])) == ["model"]
    for twice in ([tiny_model_dir, tiny_model_dir], [f"a={tiny_model_dir}", f"a={talker_dir}"]):
        with pytest.raises(InputError, match="NAME=DIR"):
            served(twice)


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_costs_itself_alone(
    adapter_dirs: dict[str, Path], tiny_model_dir: Path, tmp_path: Path, packed: bool
) -> None:
    directory, named = tiny_model_dir, "model"
    if packed:
        directory, named = tmp_path / "packed", "packed"
        quantize(tiny_model_dir, directory, recipe.choose(bits=8, group_size=32))
        config = (adapter_dirs["lora"] / adapters.CONFIG).read_text()
        assert "model_sha256" not in config
    alone = served([directory])
    found = served([directory], [f"{kind}={path}" for kind, path in adapter_dirs.items()])
    assert list(found) == [named, "lora", "dora"] and found["lora"].base == named
    own = sum(path.stat().st_size for directory in adapter_dirs.values() for path in directory.glob("*.safetensors"))
    assert weight_bytes(alone) < weight_bytes(found) < weight_bytes(alone) + 2 * own
    texts = set()
    for name, path in {named: None, **adapter_dirs}.items():
        expected = generate(*load(directory, adapter_path=path), "the king", max_tokens=12)
        loaded = found[name].loaded
        assert loaded.tokenizer is not None
        assert (loaded.model.in_c(1) is None) == (described.library() is None), "slow, beside weights that are shared"
        assert generate(loaded.model, loaded.tokenizer, "the king", max_tokens=12) == expected
        texts.add(expected)
    assert len(texts) == 3


def test_requests_choose_an_adapter_by_its_name(adapter_dirs: dict[str, Path], tiny_model_dir: Path) -> None:
    with serving.serving([tiny_model_dir], [f"it={adapter_dirs['lora']}"]) as server:
        assert [(card["id"], card["base"]) for card in server.ask("/v1/models")[2]["data"]] == [
            ("model", None), ("it", "model"),
        ]  # fmt: skip
        for name, path in (("model", None), ("it", adapter_dirs["lora"])):
            body = {"model": name, "prompt": "the king", "max_tokens": 10, "temperature": 0}
            text = server.ask("/v1/completions", body)[2]["choices"][0]["text"]
            assert text == generate(*load(tiny_model_dir, adapter_path=path), "the king", max_tokens=10)


def test_adapters_of_several_models(adapter_dirs: dict[str, Path], tiny_model_dir: Path, talker_dir: Path) -> None:
    found = served([talker_dir, tiny_model_dir], [f"x={adapter_dirs['lora']}@model"])
    assert {name: model.base for name, model in found.items()} == {"talker": None, "model": None, "x": "model"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["x=LORA"], "NAME=DIR@MODEL"),
        (["x=LORA@nothing"], "NAME=DIR@MODEL"),
        (["talker=LORA@model"], "called 'talker'"),
        (["x=LORA@model", "x=LORA@model"], "x"),
        (["x=nowhere@model"], "nowhere"),
    ],
)
def test_adapters_that_cannot_be_served(
    adapter_dirs: dict[str, Path], tiny_model_dir: Path, talker_dir: Path, options: list[str], said: str
) -> None:
    given = [option.replace("LORA", str(adapter_dirs["lora"])) for option in options]
    with pytest.raises(InputError) as caught:
        served([talker_dir, tiny_model_dir], given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_settings_that_a_request_leaves_out_are_the_directorys(
    tiny_model_dir: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    own = tmp_path / "own"
    shutil.copytree(tiny_model_dir, own)
    (own / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.3, "max_new_tokens": 7}')
    with serving.serving([own]) as server:
        body = {"model": "own", "prompt": "the king", "seed": 3}
        text = server.ask("/v1/completions", body)[2]["choices"][0]["text"]
    assert text == generate(*load(own), "the king", temp=0.3, max_tokens=7, seed=3)


def test_every_family_is_served(family_dirs: dict[str, Path]) -> None:
    with serving.serving([*family_dirs.values()]) as server:
        for card in server.ask("/v1/models")[2]["data"]:
            body = {"model": card["id"], "prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0}
            status, _, answer = server.ask("/v1/completions", body)
            assert (status, answer["usage"]["completion_tokens"] > 0) == (200, True), answer
            assert server.ask("/v1/embeddings", {"model": card["id"], "input": [5, 6, 7]})[0] == 200
