"""Models back in PyTorch's files: what a reader finds in them, and what is refused."""

from __future__ import annotations

import pickletools
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoints import VARIANTS, bfloat16, corenet, read, save_hub, save_pt, save_tokenizer, snapshot, tiny, weights
from typer.testing import CliRunner

from elm_mlx.cli import app
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import ModelConfig
from elm_mlx_convert import convert, export, torch_files
from elm_mlx_convert.conversion import corenet_yaml

CONFIG = tiny()
WEIGHTS = weights(CONFIG)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_hub(tmp_path / "model", CONFIG, WEIGHTS)


def test_the_file_holds_the_weights_in_corenets_names_and_order(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out")
    found = torch_files.load(tmp_path / "out" / "checkpoint.pt")
    expected = corenet(WEIGHTS)
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].dtype == "float32"
        np.testing.assert_array_equal(found[name].read(), values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_the_same_model(variant: str, tmp_path: Path) -> None:
    config = tiny(**VARIANTS[variant])
    save_tokenizer(tmp_path / "in", 320)
    head_dim = None if config.normalize_qk_projections else config.head_dim
    convert(save_pt(tmp_path / "in" / "first.pt", weights(config)), tmp_path / "model", head_dim=head_dim)
    export(tmp_path / "model", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again", head_dim=head_dim)
    assert read(tmp_path / "again").keys() == read(tmp_path / "model").keys()
    for name in ("model.safetensors", "tokenizer.model"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    ours, before = (ModelConfig.load(tmp_path / name / "config.json") for name in ("again", "model"))
    assert (ours.shapes(), ours.max_context_length) == (before.shapes(), before.max_context_length)


def test_types_are_the_models_own_or_asked_for(model: Path, tmp_path: Path) -> None:
    assert export(model, tmp_path / "own").dtype == "float32"
    assert export(model, tmp_path / "half", dtype="bfloat16").dtype == "bfloat16"
    found = torch_files.load(tmp_path / "half" / "checkpoint.pt")
    for name, values in corenet(WEIGHTS).items():
        np.testing.assert_array_equal(found[name].read(), bfloat16(values))


def test_the_pickle_asks_for_no_more_than_a_reader_of_weights_alone_allows(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out", dtype="float16")
    with zipfile.ZipFile(tmp_path / "out" / "checkpoint.pt") as archive:
        operations = list(pickletools.genops(archive.read("checkpoint/data.pkl")))
    asked = {argument for opcode, argument, _ in operations if opcode.name == "GLOBAL"}
    assert asked == {"torch._utils _rebuild_tensor_v2", "torch HalfStorage", "collections OrderedDict"}
    assert {opcode.name for opcode, _, _ in operations} >= {"BINPERSID", "SETITEMS", "STOP"}


def test_the_archive_is_sound_and_its_storages_can_be_mapped(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out")
    path = tmp_path / "out" / "checkpoint.pt"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("checkpoint/version") == b"3\n" and archive.read("checkpoint/byteorder") == b"little"
        storages = [info for info in archive.infolist() if "/data/" in info.filename]
        assert len(storages) == len(WEIGHTS)
        for info in storages:
            head = path.read_bytes()[info.header_offset : info.header_offset + 30]
            name, extra = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
            assert (info.header_offset + 30 + name + extra) % 64 == 0 and info.compress_type == zipfile.ZIP_STORED


def test_equal_models_give_equal_bytes(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "a")
    export(model, tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_corenet_knows_the_papers_models_by_name() -> None:
    assert "model_name: OpenELM-450M\n" in corenet_yaml(ModelConfig.preset("OpenELM-450M", 32_000))
    assert "model_name: custom\n" in corenet_yaml(CONFIG)


def test_what_the_format_has_no_place_for_is_said(tmp_path: Path) -> None:
    assert not export(save_hub(tmp_path / "usual", CONFIG, WEIGHTS), tmp_path / "first").warnings[1:]
    config = tiny(rope_freq_constant=500_000.0, rms_norm_eps=1e-5)
    found = export(save_hub(tmp_path / "model", config, weights(config)), tmp_path / "out").warnings[-2:]
    assert found[0].startswith("rope_freq_constant is 500000, and the format has no place for it")
    assert found[1].startswith("rms_norm_eps is 1e-05, and the format")
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "out" / "config.json")
    convert(tmp_path / "out" / "checkpoint.pt", tmp_path / "again", config=tmp_path / "out" / "config.json")
    again = ModelConfig.load(tmp_path / "again" / "config.json")
    assert (again.rope_freq_constant, again.rms_norm_eps) == (500_000.0, 1e-5)


def test_a_value_that_overflows_leaves_nothing(tmp_path: Path) -> None:
    large = {**WEIGHTS, "transformer.norm.weight": np.full(48, 1e6, np.float32)}
    model = save_hub(tmp_path / "model", CONFIG, large)
    with pytest.raises(InputError, match=r"transformer\.norm\.weight.*float16"):
        export(model, tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_is_there_is_kept_unless_it_is_an_export(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(model, out)
    with pytest.raises(InputError, match="--overwrite"):
        export(model, out)
    export(model, out, dtype="bfloat16", overwrite=True)
    assert torch_files.load(out / "checkpoint.pt")["norm.weight"].dtype == "bfloat16"
    (out / "letter.txt").write_text("mine")
    before = snapshot(out)
    with pytest.raises(InputError, match=r"letter\.txt"):
        export(model, out, overwrite=True)
    assert snapshot(out) == before


def test_a_source_is_not_written_over(tmp_path: Path) -> None:
    source = save_pt(tmp_path / "in" / "checkpoint.pt", WEIGHTS)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="holds the source"):
        export(source, tmp_path / "in", overwrite=True)
    assert snapshot(tmp_path) == before


def test_a_directory_that_cannot_be_made_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ElmError, match="file"):
        export(model, tmp_path / "file" / "out")


def test_the_command_says_what_it_wrote_and_what_is_wrong(model: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(model), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    parameters = sum(values.size for values in WEIGHTS.values())
    assert f"{parameters:,} parameters in bfloat16" in done.output and "no tokenizer" in done.output
    again = CliRunner().invoke(app, ["export", str(model), str(tmp_path / "out")])
    assert isinstance(again.exception, InputError)
