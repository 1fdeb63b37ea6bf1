"""What cannot be converted, or not as asked: refused with the tensor or the flag named, nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_files
from checkpoints import corenet, save_pt, save_tokenizer, tensors, tiny, weights

from elm_mlx.errors import InputError
from elm_mlx_convert import convert

CONFIG = tiny()
WEIGHTS = weights(CONFIG)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A float32 CoreNet checkpoint with its tokenizer of 300 pieces beside it."""
    save_tokenizer(tmp_path / "in")
    return save_pt(tmp_path / "in" / "model.pt", WEIGHTS)


def contents(*changes: tuple[str, Any]) -> dict[str, Any]:
    made = tensors(corenet(WEIGHTS))
    for name, value in changes:
        if value is None:
            del made[name]
        else:
            made[name] = torch_files.tensor(value)
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("more.weight", np.ones(3, np.float32)), r"holds tensors that no OpenELM has: 'more\.weight'"),
        (("norm.weight", None), r"a\.pt: transformer\.norm\.weight is missing"),
        (("norm.weight", np.ones(48, np.int64)), r"transformer\.norm\.weight is int64"),
        (("norm.weight", np.ones(47, np.float32)), r"has the shape \(47,\), but .* says \(48,\)"),
        (("transformer.norm.weight", np.ones(48, np.float32)), "both stand for 'transformer.norm.weight'"),
        (("module.norm.weight", np.ones(48, np.float32)), "'norm.weight' is there twice"),
        (("layers.0.ffn.proj_1.scales", np.ones(3, np.float32)), "already quantized"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: tuple[str, Any], message: str) -> None:
    path = torch_files.save(tmp_path / "a.pt", contents(change))
    with pytest.raises(InputError, match=message):
        convert(path, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.pt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "--dtype int8: is not one of float32, float16, bfloat16"),
        ({"preset": "OpenELM-7B"}, "--preset OpenELM-7B: is not one of OpenELM-270M"),
        ({"preset": "OpenELM-270M"}, r"token_embeddings\.weight has the shape \(320, 48\), but --preset"),
        ({"head_dim": 16}, "but --head-dim says"),
        ({"ema": True}, "no ema_state_dict"),
        ({"revision": "main"}, "--revision main is for a repository"),
        ({"config": Path("absent.json")}, r"absent\.json: cannot be read: No such file"),
        ({"tokenizer": Path("absent.model")}, r"absent\.model"),
    ],
)
def test_flags_that_do_not_fit(tmp_path: Path, source: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_preset_overrides_a_config_that_was_only_found(tmp_path: Path, source: Path) -> None:
    (source.parent / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="model_type is 'llama'"):
        convert(source, tmp_path / "out")
    with pytest.raises(InputError, match="but --preset OpenELM-450M says"):
        convert(source, tmp_path / "out", preset="OpenELM-450M")


def test_an_attack_names_the_global(tmp_path: Path) -> None:
    attack = torch_files.Call("os.system", (f"touch {tmp_path}/pwned",))
    path = torch_files.save(tmp_path / "a.pt", {"norm.weight": attack})
    with pytest.raises(InputError, match=r"os\.system"):
        convert(path, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.pt"]
