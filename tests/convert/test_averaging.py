"""The mean of checkpoints: equal to NumPy's, whatever files they come in, and refused where there is none."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch_files
from checkpoints import (
    Weights,
    bfloat16,
    save_hub,
    save_pt,
    save_tokenizer,
    save_yaml,
    snapshot,
    tensors,
    tiny,
    weights,
)
from safetensors.numpy import load_file, save_file

from elm_mlx import directories, files
from elm_mlx.cli import main
from elm_mlx.errors import ElmError, InputError
from elm_mlx.files import hold
from elm_mlx.model.config import ModelConfig
from elm_mlx.train import checkpoint
from elm_mlx.train.checkpoint import Identity, RunProgress
from elm_mlx_convert.averaging import average, last

CONFIG = tiny(300)
SETS = [weights(CONFIG, seed) for seed in range(5)]


def mean(sets: list[Weights]) -> Weights:
    """By another route than the code's: NumPy's own mean over a stack, in extended precision."""
    return {name: np.stack([w[name] for w in sets]).astype(np.longdouble).mean(0) for name in sets[0]}


def check(directory: Path, expected: Weights) -> None:
    found = load_file(directory / "model.safetensors")
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values.astype(np.float32), err_msg=name)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished training run: its config and tokenizer, and checkpoints as the trainer writes them."""
    out = tmp_path / "run"
    save_tokenizer(out)
    (out / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    for number, values in enumerate(SETS, 1):
        state = {name: mx.array(value) for name, value in values.items()}
        checkpoint.save(out, state, {"step": mx.array(1)}, RunProgress(step=100 * number), Identity("m", "d", {}))
    return out


@pytest.fixture
def pts(tmp_path: Path) -> list[Path]:
    save_yaml(tmp_path / "config.yaml", "tiny", 300)
    save_tokenizer(tmp_path)
    return [save_pt(tmp_path / f"checkpoint_{number}.pt", values) for number, values in enumerate(SETS)]


def test_the_last_checkpoints_of_a_run(run: Path, tmp_path: Path) -> None:
    chosen = last(run, 3)
    assert [path.name for path in chosen] == ["step-00000300", "step-00000400", "step-00000500"]
    done = average(chosen, tmp_path / "out")
    check(tmp_path / "out", mean(SETS[2:]))
    assert ModelConfig.load(tmp_path / "out" / "config.json") == CONFIG
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (run / "tokenizer.model").read_bytes()
    assert done.warnings == () and done.plan.config_origin == "config.json"


def test_distances_are_relative_norms(run: Path, tmp_path: Path) -> None:
    done = average(last(run, 5), tmp_path / "out")
    flat = np.stack([np.concatenate([v.ravel() for v in values.values()]) for values in SETS]).astype(np.float64)
    middle = flat.mean(0)
    expected = np.linalg.norm(flat - middle, axis=1) / np.linalg.norm(middle)
    np.testing.assert_allclose(done.distances, expected, rtol=1e-12)


def test_one_checkpoint_is_its_own_mean(run: Path, tmp_path: Path) -> None:
    assert average(last(run, 1), tmp_path / "out").distances == (0.0,)
    check(tmp_path / "out", SETS[4])


def test_the_result_opens_and_computes(run: Path, tmp_path: Path) -> None:
    from elm_mlx.store.loading import load

    average(last(run, 2), tmp_path / "out")
    model, tokenizer = load(tmp_path / "out")
    assert model(mx.array([tokenizer.encode("the fox")])).shape[-1] == 300


@pytest.mark.parametrize("legacy", [False, True])
def test_corenets_files(pts: list[Path], tmp_path: Path, legacy: bool) -> None:
    if legacy:
        pts = [save_pt(path, values, legacy=True) for path, values in zip(pts, SETS, strict=True)]
    average(pts, tmp_path / "out")
    check(tmp_path / "out", mean(SETS))
    assert ModelConfig.load(tmp_path / "out" / "config.json").max_context_length == 512


def test_sixteen_bits_are_averaged_in_float64_and_rounded_once(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    paths = [save_pt(tmp_path / f"{i}.pt", values, "bfloat16") for i, values in enumerate(SETS)]
    average(paths, tmp_path / "out")
    wide = [{n: (bfloat16(v).astype(np.uint32) << 16).view(np.float32) for n, v in values.items()} for values in SETS]
    check(tmp_path / "out", mean(wide))


@pytest.mark.parametrize(("dtype", "mlx_dtype"), [("float16", mx.float16), ("bfloat16", mx.bfloat16)])
def test_the_type_that_is_asked_for(run: Path, tmp_path: Path, dtype: str, mlx_dtype: mx.Dtype) -> None:
    average(last(run, 5), tmp_path / "out", dtype=dtype)
    found = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for name, values in mean(SETS).items():
        assert mx.array_equal(found[name], mx.array(values.astype(np.float32)).astype(mlx_dtype)), name


def test_different_kinds_of_files_mix(run: Path, tmp_path: Path) -> None:
    hub = save_hub(tmp_path / "hub", CONFIG, SETS[0])
    pt = save_pt(tmp_path / "pt" / "a.pt", SETS[1])
    average([hub, pt, last(run, 1)[0]], tmp_path / "out", config=run / "config.json", tokenizer=run)
    check(tmp_path / "out", mean([SETS[0], SETS[1], SETS[4]]))


def test_a_chat_template_and_sampling_settings_come_along(run: Path, tmp_path: Path) -> None:
    (run / "chat_template.jinja").write_text("{{ messages }}")
    (run / "generation_config.json").write_text('{"temperature": 0.5}')
    average(last(run, 2), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.5}


def test_the_record_names_every_file_and_repeats_to_the_byte(run: Path, tmp_path: Path) -> None:
    import hashlib

    for out in ("a", "b"):
        average(last(run, 2), tmp_path / out)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    record = json.loads((tmp_path / "a" / "conversion.json").read_text())
    assert [part["name"] for part in record["average"]] == ["step-00000400", "step-00000500"]
    (file,) = record["average"][0]["files"]
    assert file["sha256"] == hashlib.sha256((last(run, 2)[0] / file["name"]).read_bytes()).hexdigest()


def test_memory_is_bounded(tmp_path: Path) -> None:
    large = tiny(120_000)
    paths = []
    for seed in range(3):
        save_hub(tmp_path / f"{seed}", large, weights(large, seed))
        paths.append(tmp_path / f"{seed}")
    tracemalloc.start()
    average(paths, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 23e6
    assert peak < 20e6  # of which 17 are for the JSON of a config, before any weight is read


def refused(arguments: list[Path], tmp_path: Path, match: str, **options: object) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=match) as error:
        average(arguments, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value) and snapshot(tmp_path) == before


def test_another_shape(run: Path, tmp_path: Path) -> None:
    other = ModelConfig.scaled(vocab_size=300, num_layers=3, model_dim=64, head_dim=8, num_gqa_groups=2)
    save_hub(tmp_path / "other", other, weights(other))
    refused(
        [last(run, 1)[0], tmp_path / "other"], tmp_path,
        r"other: transformer\.token_embeddings\.weight has the shape \(300, 64\), and in .*step-00000500 \(300, 48\)",
    )  # fmt: skip


def test_other_tensors(run: Path, tmp_path: Path) -> None:
    untied = tiny(300, share_input_output_layers=False)
    save_hub(tmp_path / "untied", untied, weights(untied))
    refused(
        [last(run, 1)[0], tmp_path / "untied"], tmp_path, r"untied: has the tensor lm_head\.weight, which .*500 lacks"
    )
    refused(
        [tmp_path / "untied", last(run, 1)[0]], tmp_path, r"500: lacks the tensor lm_head\.weight, which .*untied has"
    )


def test_another_config(run: Path, tmp_path: Path) -> None:
    save_hub(tmp_path / "other", tiny(300, rope_freq_constant=500.0), SETS[0])
    refused([last(run, 1)[0], tmp_path / "other"], tmp_path, r"other: rope_freq_constant is 500\.0 .*--config decides")


def test_another_tokenizer(run: Path, tmp_path: Path) -> None:
    save_hub(tmp_path / "other", CONFIG, SETS[0])
    data = bytearray((run / "tokenizer.model").read_bytes())
    at = data.index("▁dog".encode())
    data[at : at + 6] = "▁god".encode()
    (tmp_path / "other" / "tokenizer.model").write_bytes(data)
    refused([last(run, 1)[0], tmp_path / "other"], tmp_path, "other: has another tokenizer than .*step-00000500")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(pts: list[Path], tmp_path: Path, value: float) -> None:
    name = "transformer.layers.1.ffn.proj_2.weight"
    broken = {n: v.copy() for n, v in SETS[1].items()}
    broken[name][-1, -1] = value
    save_pt(pts[1], broken)
    refused(
        pts,
        tmp_path,
        r"checkpoint_1\.pt: transformer\.layers\.1\.ffn\.proj_2\.weight holds NaN or infinite values; leave it out",
    )


def test_adapters(run: Path, tmp_path: Path) -> None:
    step = last(run, 1)[0]
    save_file({"transformer.layers.0.attn.qkv_proj.lora_a": np.zeros((48, 2), "f4")}, step / directories.PARAMETERS)
    refused([step], tmp_path, "step-00000500: holds an adapter, .*`convert` or `fuse`")
    lora = {**tensors(SETS[0]), "layers.0.attn.qkv_proj.lora_A.default.weight": torch_files.tensor(np.zeros((2, 48)))}
    refused([torch_files.save(tmp_path / "lora.pt", lora)], tmp_path, r"lora\.pt: holds an adapter")


def test_a_run_is_no_checkpoint(run: Path, tmp_path: Path) -> None:
    refused([run], tmp_path, "run: is a run with 5 checkpoints: pass --last N, or name some of them")
    with pytest.raises(InputError, match=r"run: holds 5 checkpoints .*--last asks for 6"):
        last(run, 6)
    with pytest.raises(InputError, match="none: no such directory"):
        last(tmp_path / "none", 1)
    with pytest.raises(InputError, match="--last 0: must be 1 or more"):
        last(run, 0)


def test_a_pretraining_run_is_not_averaged_with_itself(run: Path, tmp_path: Path) -> None:
    """Its directory is a model too, its last one: that is no mean of anything, unless it is one among others."""
    (run / "model.safetensors").write_bytes(Path(last(run, 1)[0], "parameters.safetensors").read_bytes())
    refused([run], tmp_path, "run: is a run with 5 checkpoints: pass --last N, or name some of them")
    average([run, last(run, 2)[0]], tmp_path / "two")
    for path in last(run, 5)[:-1]:
        shutil.rmtree(path)
    refused([run], tmp_path, r"run: is a run that kept 1 checkpoint, .*let it keep more .*, or name .*/step-00000500")
    with pytest.raises(InputError, match=r"run: holds 1 checkpoint .*--last asks for 2"):
        last(run, 2)


def test_named_twice_or_not_at_all(run: Path, tmp_path: Path) -> None:
    refused([*last(run, 2), last(run, 1)[0]], tmp_path, "step-00000500: is named twice")
    refused([], tmp_path, "no checkpoint was named")
    refused([tmp_path / "none"], tmp_path, "none: no such file or directory")


def test_destinations(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path / "out")
    refused(last(run, 2), tmp_path, "out: exists already; pass --overwrite")
    refused(last(run, 2), tmp_path, "out: is not just a model directory: .*'checkpoints'", overwrite=True)
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(ElmError, match=r"needs 1\d(\.\d)? MB, and 0 MB are free"):
        average(last(run, 2), tmp_path / "elsewhere")


def test_two_processes_do_not_make_one_directory(run: Path, tmp_path: Path) -> None:
    with hold(tmp_path / "out", beside=True), pytest.raises(ElmError, match=r"out: process \d+ is writing"):
        average(last(run, 2), tmp_path / "out")
    average(last(run, 2), tmp_path / "out")
    assert not (tmp_path / ".out.lock").exists()


def test_replacing_one_of_the_sources_is_refused(tmp_path: Path) -> None:
    hubs = [save_hub(tmp_path / name, CONFIG, values) for name, values in zip(("a", "out"), SETS, strict=False)]
    refused(hubs, tmp_path, r"out: holds the source, model\.safetensors", overwrite=True)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["elm-mlx", "average", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


def test_the_command(command: Command, run: Path, tmp_path: Path) -> None:
    code, out, err = command(run, "--last", 2, "--out", tmp_path / "mean", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert f"2 checkpoints of {CONFIG.parameters:,} parameters" in out
    assert out.count("\ndistance ") == 2 and "step-00000400\n" in out and "step-00000500\n" in out
    assert out.endswith("mean, bfloat16, 0.2 MB\n")


def test_the_commands_errors_are_one_line(command: Command, run: Path, tmp_path: Path) -> None:
    code, out, err = command(run, run, "--last", 2, "--out", tmp_path / "mean")
    assert (code, out, err.count("\n")) == (2, "", 1) and "takes the checkpoints of one run, and 2 are named" in err
    code, _, err = command(*last(run, 2), "--out", tmp_path / "mean", "--dtype", "int4")
    assert code == 2 and "--dtype int4: is not one of float32, float16, bfloat16" in err


def test_a_run_that_trained_a_model_has_that_ones_config_and_tokenizer(
    monkeypatch: pytest.MonkeyPatch, command: Command, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "the quick brown fox"}\n')
    trained = tmp_path / "trained"
    lora = ["lora", model, "--data", data, "--out", trained, "--full", "--iters", 2]
    monkeypatch.setattr(sys, "argv", ["elm-mlx", *map(str, lora)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    code, out, err = command(trained, "--last", 1, "--out", tmp_path / "mean")
    assert code == 0 and "warning" not in out + err
    assert ModelConfig.load(tmp_path / "mean" / "config.json") == ModelConfig.load(model / "config.json")
    assert (tmp_path / "mean" / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()
    assert "chat_template" in json.loads((tmp_path / "mean" / "tokenizer_config.json").read_text())

    # a model of other shapes, or none, is there now
    other = ModelConfig.load(model / "config.json").with_vocab_size(300)
    for changed in (json.dumps(other.to_dict()), "{", None):
        shutil.rmtree(model) if changed is None else (model / "config.json").write_text(changed)
        code, out, err = command(trained, "--last", 1, "--out", tmp_path / "mean", "--overwrite")
        assert code == 0 and "config      the shapes\n" in out
        assert "a context of 2,048 tokens, and what else the shapes do not give, is a guess: pass --config FILE" in err
        assert "no tokenizer" in err and "warning" not in out


@pytest.mark.parametrize("about", ["[]", "{}", '{"settings": null}', '{"settings": {"model": 3}}', "no JSON"])
def test_a_run_that_does_not_say_what_it_trained(run: Path, tmp_path: Path, about: str) -> None:
    (run / "config.json").unlink()
    (run / "run.json").write_text(about)
    done = average(last(run, 1), tmp_path / "out")
    assert done.plan.config_origin == "the shapes" and "is a guess" in done.warnings[-1]
    (tmp_path / "said.json").write_text(json.dumps(CONFIG.to_dict()))
    assert average(last(run, 1), tmp_path / "other", config=tmp_path / "said.json").warnings == ()
