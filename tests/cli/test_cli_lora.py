"""`elm-mlx lora`: what it leaves behind, what it refuses, and that it goes on to the same losses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from commands import Run
from mlx.utils import tree_flatten
from training_runs import free_port, gradient_norms, updates, write_data

from elm_mlx import device, files
from elm_mlx.cli.training import harmed
from elm_mlx.errors import InputError
from elm_mlx.model import roofline
from elm_mlx.store.loading import load_model
from elm_mlx.text.chat_template import OPENELM_INSTRUCT_JINJA
from elm_mlx.train.checkpoint import RunProgress
from elm_mlx.train.run import Result
from elm_mlx.train.settings import MethodSettings


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


QUICK = ("--iters", 6, "--steps-per-eval", 3, "--batch-size", 2, "--max-seq-length", 64, "--learning-rate", 0.01)


def test_a_run_says_what_it_will_do_and_leaves_an_adapter(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "matmul_speed", lambda dtype: 1e13)  # or a busy machine's share might exceed all
    out = tmp_path / "out"
    code, text, err = run("lora", tiny_model_dir, "--data", data, "--out", out, *QUICK, "--rank", 4)
    assert code == 0, err
    assert re.search(r"trained   LoRA of rank 4, scale 2, on 12 modules: [\d,]+ parameters, [\d.]+%", text)
    assert re.search(r"data      24 examples, [\d,]+ tokens, [\d,]+ of them trained, 4 to validate", text)
    assert re.search(r"memory    about [\d.]+ [MG]B", text)
    assert re.search(r"time      about .+ an update", text)
    losses = updates(out)
    assert [step for step, _ in losses] == [0, 1, 2, 3, 3, 4, 5, 6, 6] and losses[-1][1] < losses[0][1]
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert all(line["matmul_share"] > 0 for line in lines if "loss" in line)
    assert re.search(r"step 6 of 6: loss .* tokens/s, \d+% of matmul speed, ", text)
    assert f"best      validation loss {losses[-1][1]:.4f}, after 6 updates" in text
    model = load_model(tiny_model_dir, "float32", adapter_path=out)
    assert any(float(mx.abs(value).max()) > 0 for name, value in tree_flatten(model.parameters()) if "lora_b" in name)
    assert run("generate", tiny_model_dir, "--adapter", out, "--prompt", "the", "--max-tokens", 2)[0] == 0
    # each checkpoint is an adapter too
    assert load_model(tiny_model_dir, adapter_path=out / "checkpoints" / "step-00000003") is not None


def test_no_batches_of_a_validation_are_no_validation(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    options = (*QUICK, "--val-batches", 0)
    code, text, err = run("lora", tiny_model_dir, "--data", data, "--out", tmp_path / "out", *options)
    assert (code, err) == (0, "") and "none to validate" in text
    assert "validation loss" not in text and [loss for step, loss in updates(tmp_path / "out") if step == 0] == []


def test_what_to_try_is_a_chat_where_there_is_a_template(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))

    def tried(*flags: str) -> str:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        code, text, err = run("lora", model, "--data", data, "--out", out, "--iters", 1, *flags)
        assert code == 0, err
        return text.rstrip("\n").rpartition("; try: elm-mlx ")[2].replace(f"{model} --adapter {out}", "BOTH")

    assert tried() == "generate BOTH --prompt …"
    assert tried("--template", "openelm-instruct") == "chat BOTH", "the template is with the adapter"
    (model / "chat_template.jinja").write_text(OPENELM_INSTRUCT_JINJA)
    assert tried() == "chat BOTH"
    assert tried("--template", "none") == "generate BOTH --prompt …"


def test_what_a_run_leaves_is_no_model_and_says_what_it_is(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("lora", tiny_model_dir, "--data", data, "--out", out, "--iters", 1, "--full")[0] == 0
    for command in (("generate", out, "-p", "x"), ("chat", out), ("quantize", out, tmp_path / "small")):
        code, _, err = run(*command)
        assert code == 2 and err.count("\n") == 1
        assert f"give {tiny_model_dir} and `--adapter {out}`" in err
        assert f"`elm-mlx fuse {tiny_model_dir} {out} DST`" in err
    (out / "adapter_config.json").unlink()
    assert f"`elm-mlx lora --out {out} --resume` goes on with it" in run("info", out)[2]


def test_the_best_by_validation_is_kept(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--iters", 6, "--steps-per-eval", 1, "--learning-rate", 0.3, "--lr-schedule", "constant", "--warmup", 5)
    text = run("lora", tiny_model_dir, "--data", data, "--out", out, *options)[1]
    found = re.search(r"best      validation loss [\d.]+, after (\d) updates", text)
    assert found and int(found[1]) < 6, "the learning rate should have been ruinous"
    best = mx.load(str(out / "checkpoints" / f"step-0000000{found[1]}" / "adapters.safetensors"))
    kept = mx.load(str(out / "adapters.safetensors"))
    assert best.keys() == kept.keys() and all(mx.array_equal(best[name], kept[name]) for name in best)


def test_an_adapter_that_is_worse_than_none_is_not_recommended(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    """The base counts among the validations; the last weights are kept, and called what they are."""
    out = tmp_path / "out"
    (data / "valid.jsonl").write_text('{"prompt": "the quick ", "completion": "ZYXWV?"}\n')  # what training unlearns
    options = ("--iters", 12, "--steps-per-eval", 6, "--learning-rate", 0.05, "--warmup", 0)
    options = (*options, "--batch-size", 1, "--max-seq-length", 64)
    code, text, err = run("lora", tiny_model_dir, "--data", data, "--out", out, *options)
    assert code == 0, err
    valid = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "valid_loss" in line]
    base, *others = [line["valid_loss"] for line in valid]
    assert min(others) > base, "training should have been harmful"
    assert [line.get("best") for line in valid] == [True, None, None]
    assert f"step 6: validation loss {others[0]:.4f}, no better than the {base:.4f} before training" in text
    assert "best" not in text and "try:" not in text
    assert (
        f"no validation loss was below the {base:.4f} before training, the last is {others[-1]:.4f}: do not use" in err
    )
    last = mx.load(str(out / "checkpoints" / "step-00000012" / "adapters.safetensors"))
    kept = mx.load(str(out / "adapters.safetensors"))
    assert all(mx.array_equal(last[name], kept[name]) for name in last)
    code, text, err = run("report", out)
    assert "no validation's loss is below the one before training" in text + err
    assert "0, before training" in (out / "report.html").read_text()


def test_a_training_loss_that_rose_is_told_where_nothing_is_validated() -> None:
    progress = RunProgress(step=9, loss_mean=7.5, first_loss=3.0)
    result = Result(progress, False, False, Path("last"), None)
    assert "the training loss rose from 3.0000, of the first update, to 7.5000: do not use it" in harmed(result, "--lr")
    assert Result(replace(progress, loss_mean=4.4), False, False, Path("last"), None).harm is None


def test_one_is_no_plural_and_no_validations_are_none(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    (data / "valid.jsonl").unlink()
    (data / "train.jsonl").write_text('{"prompt": "the quick", "completion": "brown fox"}\n')
    options = ("--iters", 1, "--batch-size", 1)
    code, text, err = run("lora", tiny_model_dir, "--data", data, "--out", tmp_path / "out", *options)
    assert code == 0, err
    assert "data      1 example, " in text and "batches   1 row of " in text and "updates   1, 1 epoch, " in text
    assert "done      1 update, " in text and "validation" not in text


@pytest.mark.parametrize("options", [("--dora",), ("--rslora", "--dropout", 0.1), ("--full",), ("--no-pack",)])
def test_ways_to_train(options: tuple[Any, ...], run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = run("lora", tiny_model_dir, "--data", data, "--out", out, *QUICK, *options)
    assert code == 0, err
    losses = updates(out)
    assert losses[-1][1] < losses[0][1]
    assert run("fuse", tiny_model_dir, out, tmp_path / "fused")[0] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # widened at load; multiplied as it is packed
def test_an_adapter_of_a_quantized_model(
    dtype: str, run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    base = load_model(tiny_model_dir, "float32")
    fits = lambda _, module: hasattr(module, "to_quantized") and module.weight.shape[1] % 32 == 0  # noqa: E731
    nn.quantize(base, group_size=32, bits=4, class_predicate=fits)
    packed = tiny.write_directory(tmp_path / "packed", base, (tiny_model_dir / "tokenizer.model").read_bytes())
    mx.save_safetensors(str(packed / "model.safetensors"), dict(tree_flatten(base.parameters())))
    config = base.config.to_dict() | {"quantization": {"group_size": 32, "bits": 4}}
    (packed / "config.json").write_text(json.dumps(config))
    out, before = tmp_path / "out", (packed / "model.safetensors").read_bytes()
    code, _, err = run("lora", packed, "--data", data, "--out", out, *QUICK, "--compute-dtype", dtype)
    assert code == 0, err
    losses = updates(out)
    assert losses[-1][1] < losses[0][1] and (packed / "model.safetensors").read_bytes() == before
    code, _, err = run("lora", packed, "--data", data, "--out", tmp_path / "full", *QUICK, "--full")
    assert code == 2 and "--full trains weights, and a quantized model's cannot be" in err


def test_options_from_a_file_and_a_recipe(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(
        f"model: {tiny_model_dir}\ndata: {data}\nrank: {{'*': 4, 'qkv_proj': 2}}\nlearning-rate: 0.01\n"
        "target: [qkv_proj, ffn.*]\niters: 3\nmax_seq_length: 64\n"
    )
    out = tmp_path / "out"
    code, text, err = run("lora", "--config", config, "--out", out, "--iters", 2, "--recipe", "openelm")
    assert code == 0, err
    # ranks and targets of the file, alpha of the recipe, iters of the command line
    assert "trained   LoRA of rank 2 to 4, scale 8, on 9 modules" in text and "updates   2," in text
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["dropout"] == 0.1 and settings["rank"] == "*=4,qkv_proj=2" and settings["batch_size"] == 8


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("learning_rte: 1", "learning_rte is not an option; the nearest is learning_rate"),
        ("iters: many", "iters is 'many'; it needs a whole number"),
        ("[1, 2]", "holds no YAML mapping"),
        ("a: [", "not YAML"),
        ("resume: true", "resume is not an option"),
    ],
)
def test_a_bad_file_of_options_is_named(line: str, error: str, run: Run, tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(line + "\n")
    code, _, err = run("lora", "--config", config)
    assert code == 2 and err.startswith(f"elm-mlx: {config}: ") and error in err and err.count("\n") == 1


def test_resuming_needs_no_options_and_gives_the_same_losses(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    options = (*QUICK, "--save-every", 2, "--dropout", 0.1, "--seed", 3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("lora", tiny_model_dir, "--data", data, "--out", whole, *options)[0] == 0
    assert run("lora", tiny_model_dir, "--data", data, "--out", cut, *options)[0] == 0
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    (cut / "adapters.safetensors").unlink()
    code, text, err = run("lora", "--out", cut, "--resume")
    assert code == 0, err
    assert "resumed   after 4 updates" in text
    assert updates(cut) == updates(whole)
    assert (cut / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()
    code, _, err = run("lora", "--out", cut, "--resume", "--rank", 4)
    assert (
        code == 2 and "was trained with --rank = 8, not 4; leave it as it was, or start anew with another --out" in err
    )
    code, _, err = run("lora", tiny_model_dir, "--data", data, "--out", cut, *options)
    assert code == 2 and "holds a run already" in err


@pytest.mark.parametrize("full", [False, True])
def test_a_test_is_by_what_the_run_leaves(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path, full: bool
) -> None:
    """With the best of its checkpoints, whose validation was on the same examples; no part of the run depends on it."""
    shutil.copyfile(data / "valid.jsonl", data / "test.jsonl")
    out, other = tmp_path / "out", tmp_path / "other"
    rising = (*QUICK[:-1], 0.5, "--iters", 9) if not full else (*QUICK, "--full")  # so that the last is not the best
    code, text, err = run("lora", tiny_model_dir, "--data", data, "--out", out, *rising)
    assert code == 0, err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    valid = [line["valid_loss"] for line in lines if "valid_loss" in line]
    (tested,) = [line["test_loss"] for line in lines if "test_loss" in line]
    kept = min(valid) if valid[0] > min(valid) else valid[-1]
    assert tested == pytest.approx(kept, abs=1e-6)
    assert f"test      loss {tested:.4f}, perplexity {2.718281828459045**tested:.4g}\n" in text
    code, text, _ = run("lora", tiny_model_dir, "--data", data, "--out", other, *rising, "--test-batches", 0)
    assert code == 0 and "\ntest " not in text and updates(other) == updates(out)[:-1]
    page = tmp_path / "page.html"
    assert run("report", out, "--out", page)[0] == 0 and f"{tested:.4f}" in page.read_text()


def test_several_sources_by_their_weights_are_resumed(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    table, whole, cut = tmp_path / "more.csv", tmp_path / "whole", tmp_path / "cut"
    table.write_text("Question;Answer\n" + "".join(f"the lazy {i};dogs\n" for i in range(5)))
    options = ("--data", data, "--data", table, "--weight", 1, "--weight", 1, *QUICK[2:], "--save-every", 3)
    code, text, err = run("lora", tiny_model_dir, *options, "--out", whole, "--iters", 9)
    assert code == 0, err
    assert (
        f"columns   train: {table}: fields between semicolons; prompt = `Question`, completion = `Answer` (guessed"
        in text
    )
    assert re.search(rf"mixture   {data}: [\d,]+ tokens, 50.0% of an epoch, which has them once", text)
    assert re.search(rf"mixture   {table}: [\d,]+ tokens, 50.0% of an epoch, which has them [\d.]+ times", text)
    assert "data      29 examples" in text
    shutil.copytree(whole, cut)
    for step in (6, 9):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:08}", ignore_errors=True)
    shutil.copytree(whole / "checkpoints" / "step-00000006", cut / "checkpoints" / "step-00000006")
    code, text, err = run("lora", "--out", cut, "--resume")
    assert code == 0 and "resumed   after 6 updates" in text, err
    assert updates(cut) == updates(whole)
    shutil.rmtree(cut / "checkpoints" / "step-00000009")
    code, _, err = run("lora", "--out", cut, "--resume", "--weight", 1, "--weight", 2)
    assert code == 2 and "was trained with --weight = [1.0, 1.0], not [1.0, 2.0]; leave it as it was" in err
    code, _, err = run("lora", "--out", cut, "--extend", 2)
    assert code == 2 and "MODEL is missing" in err and f"; --resume goes on with the run in {cut}" in err
    code, _, err = run("lora", tiny_model_dir, *options[:-2], "--weight", 3, "--out", tmp_path / "third")
    assert code == 2 and "--weight: 3 for 2 of --data" in err


@pytest.mark.parametrize(
    ("started", "typed", "complaint"),
    [
        (("--iters", 2), ("--iters", 5), "--iters = 2, not 5"),
        (("--epochs", 1), ("--epochs", 2), "updates (--epochs) = 12, not 24"),
        (("--iters", 2), ("--epochs", 1), "updates (--epochs) = 2, not 12"),
        (("--iters", 2), ("--alpha", 3), "scale (--alpha, --rslora) = 2.0, not 0.375"),
        (("--iters", 2), ("--val-batches", 1), "--val-batches = -1, not 1"),
    ],
)
def test_what_a_finished_run_was_not_asked_for_is_called_by_its_option(
    started: tuple[str, int], typed: tuple[str, int], complaint: str,
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path,
) -> None:  # fmt: skip
    out, options = tmp_path / "out", ("--batch-size", 2, "--no-pack")
    assert run("lora", tiny_model_dir, "--data", data, "--out", out, *options, *started)[0] == 0
    before = (out / "run.json").read_text(), updates(out)
    code, _, err = run("lora", "--out", out, "--resume", *typed)
    assert code == 2 and f"was trained with {complaint}; leave it as it was" in err and err.count("\n") == 1
    assert ("--extend N adds N updates" in err and "spread" in err) == (typed[0] not in ("--alpha", "--val-batches"))
    assert before == ((out / "run.json").read_text(), updates(out))


def test_a_finished_run_is_extended(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ("lora", tiny_model_dir, "--data", data, *QUICK, "--iters", 3, "--val-batches", 0)
    assert run(*options, "--out", whole, "--extend", 2, "--extend", 4)[0] == 0
    assert run(*options, "--out", out)[0] == 0
    for added, total in ((2, 5), (4, 9)):
        code, text, err = run("lora", "--out", out, "--resume", "--extend", added, "--steps-per-report", 1)
        assert code == 0 and f"resumed   after {total - added} updates" in text, err
        assert text.count(f" of {total}: loss ") == added
    assert updates(out) == updates(whole) and len(updates(out)) == 9
    assert json.loads((out / "run.json").read_text())["settings"]["extend"] == [2, 4]
    assert run("lora", "--out", out, "--resume")[0] == 0 and len(updates(out)) == 9, "nothing is added twice"
    record = json.loads((out / "run.json").read_text())
    record["settings"]["extend"] = [2, 4, 1]  # as of a start that ended before it saved anything
    (out / "run.json").write_text(json.dumps(record))
    assert run("lora", "--out", out, "--resume", "--extend", 1)[0] == 0 and len(updates(out)) == 10
    assert json.loads((out / "run.json").read_text())["settings"]["extend"] == [2, 4, 1]


def test_patience(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    out, ruinous = tmp_path / "out", ("--learning-rate", 0.3, "--lr-schedule", "constant", "--iters", 20)
    options = (tiny_model_dir, "--data", data, *ruinous, "--steps-per-eval", 1, "--patience", 3)
    code, text, err = run("lora", *options, "--out", out)
    found = re.search(r"ended     early, after (\d+) updates: 3 validations in a row without a lower loss", text)
    assert code == 0 and found and updates(out)[-1][0] == int(found[1]) < 20, err
    (data / "valid.jsonl").unlink()
    code, _, err = run("lora", *options, "--out", tmp_path / "other")
    assert code == 2 and "--patience: counts validations, and this run has none" in err


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_an_adapter_to_begin_with(kind: str, run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """The first validation is the adapter's last; a resumed run does without it."""
    first, out, whole = tmp_path / "first", tmp_path / "out", tmp_path / "whole"
    full = ("--full",) if kind == "full" else ()
    options = ("lora", tiny_model_dir, "--data", data, *QUICK, *full)
    new = full or ("--rank", 3, "--alpha", 5, *(["--dora"] if kind == "dora" else []))
    assert run("lora", tiny_model_dir, "--data", data, *QUICK, *new, "--out", first)[0] == 0
    for path, name in ((whole, "--from"), (out, "--from-adapter")):
        code, _, err = run(*options, "--save-every", 2, "--out", path, name, first)
        assert code == 0, err
    assert updates(out) == updates(whole)
    assert updates(out)[0][1] == pytest.approx(updates(first)[-1][1], rel=1e-6)
    assert (first / "adapter_config.json").read_text() == (out / "adapter_config.json").read_text()
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    shutil.move(first, tmp_path / "gone")
    code, _, err = run("lora", "--out", out, "--resume")
    assert code == 0 and updates(out) == updates(whole), err


@pytest.mark.parametrize("template", ["openelm-instruct", "none"])
@pytest.mark.parametrize("full", [(), ("--full",)])
def test_the_template_of_the_adapter_that_it_begins_with_stays(
    run: Run, tiny_model_dir: Path, tmp_path: Path, template: str, full: tuple[str, ...]
) -> None:
    """Examples are read by it, again after a resume that the adapter is gone in, and it goes with what is left."""
    first, out, model, data = (tmp_path / name for name in ("first", "out", "model", "data.jsonl"))
    shutil.copytree(tiny_model_dir, model)
    if template == "none":
        (model / "chat_template.jinja").write_text(OPENELM_INSTRUCT_JINJA)
    data.write_text('{"prompt": "the quick fox", "completion": "e"}\n' * 8)
    options = ("lora", model, "--data", data, *QUICK, *full)
    assert run(*options, "--out", first, "--template", template)[0] == 0
    code, said, err = run(*options, "--out", out, "--save-every", 2, "--from", first)
    assert code == 0 and ("chat" if template != "none" else "generate") in said.splitlines()[-1], err
    assert updates(out)[0][1] == pytest.approx(updates(first)[-1][1], rel=0.3), "read by the same template"
    kept, whole = (first / "chat_template.jinja").read_text(), updates(out)
    assert (out / "chat_template.jinja").read_text() == kept
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    shutil.move(first, tmp_path / "gone")
    code, _, err = run("lora", "--out", out, "--resume")
    assert code == 0 and updates(out) == whole, err
    assert (out / "chat_template.jinja").read_text() == kept
    shutil.rmtree(out / "checkpoints")  # as of a run that ended before its first checkpoint
    for path in out.glob("adapter*"):
        path.unlink()
    code, _, err = run(*options, "--out", out)
    assert code == 0 and not (out / "chat_template.jinja").exists(), err


def test_adapters_that_no_run_can_begin_with(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    options = ("lora", tiny_model_dir, "--data", data, *QUICK)
    assert run(*options, "--out", first)[0] == 0
    for given, complaint in (
        (("--from", tmp_path / "nothing"), "nothing: no such directory; an adapter is one with"),
        (("--from", first, "--rank", 4), "--rank: --from begins with an adapter, which has its own"),
        (("--from", first, "--dora"), "--dora: --from begins with an adapter, which has its own"),
        (("--from", first, "--full"), "first: LoRA of rank 8, scale 2, on 12 modules, which does not go with --full"),
    ):
        code, _, err = run(*options, "--out", out, *given)
        assert code == 2 and complaint in err and err.count("\n") == 1
    assert not (out / "run.json").exists()
    assert run(*options, "--out", out, "--from", first)[0] == 0
    other = tmp_path / "other"
    assert run(*options, "--seed", 1, "--out", other)[0] == 0
    code, _, err = run("lora", "--out", out, "--resume", "--from", other)
    assert code == 2 and "was trained with adapter to begin with" in err


def test_every_bad_record_is_named_before_anything_is_done(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    with (data / "train.jsonl").open("a") as file:
        file.write('{"prompt": "a"}\n{"text": ""}\n')
    code, _, err = run("lora", tiny_model_dir, "--data", data, "--out", tmp_path / "out", *QUICK)
    assert code == 2 and "line 25: " in err and "line 26: " in err and "2 bad records" in err
    assert not (tmp_path / "out").exists()
    code, text, err = run("lora", tiny_model_dir, "--data", data, "--out", tmp_path / "out", *QUICK, "--skip-bad")
    assert code == 0 and "line 25: " in err and "bad       2 records left out" in text


def test_what_may_not_fit_into_memory_is_told_and_what_cannot_is_refused(
    run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess is no reason to end; `--force` goes on with what is sure to fail, too."""
    monkeypatch.setattr(device, "available_memory", lambda: 50_000_000)
    command = ("lora", tiny_model_dir, "--data", data, "--out", tmp_path / "out", *QUICK, "--iters", 1, "--full")
    monkeypatch.setattr(device, "total_memory", lambda: 100_000)
    code, _, err = run(*command)
    assert code == 2 and "state alone take 2.2 MB, and the machine has 0.1 MB; " in err and "--force tries it" in err
    assert not (tmp_path / "out").exists()
    code, text, err = run(*command, "--force")
    assert code == 0 and re.search(r"about [\d.]+ MB may be too much for the 50 MB that are free: ", err)
    assert "--force" not in (tmp_path / "out" / "run.json").read_text() and "force" not in text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--rank", "a"), "--rank a: needs a number"),
        (("--rank", "1,2"), "rank has 2 entries, and the model 3 layers"),
        (("--target", "head"), "no module is called 'head'"),
        (("--lr-schedule", "step"), "--lr-schedule step: is not one of cosine, linear, constant"),
        (("--optimizer", "sgd"), "--optimizer sgd: is not one of adamw, adafactor"),
        (("--on-nan", "ignore"), "--on-nan ignore: is not one of stop, skip"),
        (("--lr", "-1"), "--learning-rate -1: a number above 0 is needed"),
        (("--warmup", "9"), "--warmup 9: does not fit in 6 updates"),
        (("--recipe", "llama"), "--recipe llama: is not one of openelm"),
        (("--report-to", "stdout"), "--report-to 'stdout' is not one of tensorboard, wandb"),
        (("--compute-dtype", "int8"), "--compute-dtype int8: is not one of float32, float16, bfloat16"),
        (("--max-seq-length", "1"), "must be 2 or more"),
        (("--max-seq-length", "513"), "--max-seq-length 513: the model reads 512 tokens at most"),
    ],
)
def test_what_makes_no_run_is_refused(
    options: tuple[str, str], error: str, run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    code, _, err = run("lora", tiny_model_dir, "--data", data, "--out", tmp_path / "out", *QUICK, *options)
    assert code == 2 and error in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("maker", ["lora", "dpo", "pretrain"])
def test_a_run_of_another_command_is_not_resumed(maker: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"command": maker, "settings": {"model": {"num_layers": 2}}}))
    for command in {"lora", "dpo"} - {maker}:
        code, _, err = run(command, "--out", tmp_path, "--resume")
        assert (code, err) == (2, f"elm-mlx: {tmp_path}: holds a run of `elm-mlx {maker}`; resume it by that command\n")


def test_places_that_are_no_place_for_an_adapter(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    code, _, err = run("lora", tiny_model_dir, "--data", data, "--out", tiny_model_dir, *QUICK)
    assert code == 2 and "is a model directory" in err
    for name in ("adapters.safetensors", "adapter_model.safetensors", "adapter_model.bin"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        code, _, err = run("lora", tiny_model_dir, "--data", data, "--out", tmp_path / name, *QUICK)
        assert code == 2 and "holds an adapter already" in err
    (tmp_path / "file").touch()
    code, _, err = run("lora", tiny_model_dir, "--data", data, "--out", tmp_path / "file", *QUICK)
    assert code == 2 and "is a file" in err
    for missing, given in (("MODEL", ()), ("--data", (tiny_model_dir,)), ("--out", (tiny_model_dir, "--data", data))):
        code, _, err = run("lora", *given)
        assert code == 2 and f"{missing} is missing" in err
    code, _, err = run("lora", tiny_model_dir, "--data", data, "--out", tmp_path / "none", "--resume")
    assert code == 2 and "holds no checkpoint to resume from; without --resume the run begins anew" in err


def test_two_runs_do_not_write_to_one_directory(run: Run, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Neither begun nor resumed, and before anything is read: the data are another run's, and are not complained of."""
    out = tmp_path / "out"
    assert run("lora", tiny_model_dir, "--data", data, "--out", out, *QUICK)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with files.hold(out):
        for more in ((), ("--resume",)):
            code, text, err = run("lora", tiny_model_dir, "--data", tmp_path, "--out", out, *QUICK, *more)
            assert (code, text, err.count("\n")) == (
                1,
                "",
                1,
            ) and f"{out}: process {os.getpid()} is writing to it" in err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_ranks_as_they_are_written() -> None:
    assert MethodSettings("8").ranks() == 8
    assert MethodSettings("4, 8,16").ranks() == [4, 8, 16]
    assert MethodSettings("qkv_proj=8,ffn.*=4").ranks() == {"qkv_proj": 8, "ffn.*": 4}
    with pytest.raises(InputError):
        MethodSettings("qkv_proj=x").ranks()


def test_two_processes_are_one_with_twice_the_batch(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Over MLX's ring: the same losses, and one voice; resumed, to the bit."""
    command = [sys.executable, "-m", "elm_mlx", "lora", str(tiny_model_dir), "--data", str(data)]
    options = ["--iters", "6", "--steps-per-eval", "3", "--save-every", "2", "--max-seq-length", "64"]
    launch = [Path(sys.executable).with_name("mlx.launch"), "--backend", "ring", "-n", "2", "--cwd", Path.cwd()]

    def together(*more: str) -> str:
        two = [*command, "--out", str(tmp_path / "two"), *options, "--batch-size", "2", *more]
        port = ["-p", str(free_port())]
        return subprocess.run(
            [*launch, *port, "--", *two], check=True, capture_output=True, text=True, timeout=120
        ).stdout

    one = [*command, "--out", str(tmp_path / "one"), *options, "--batch-size", "4"]
    subprocess.run(one, check=True, capture_output=True)
    said = together()
    assert said.count("step 6: validation loss") == 1 and "2 rows of 64 tokens in each of 2 processes" in said
    alone, shared = updates(tmp_path / "one"), updates(tmp_path / "two")
    assert [step for step, _ in alone] == [step for step, _ in shared]
    assert [loss for _, loss in shared] == pytest.approx([loss for _, loss in alone], rel=1e-5)
    norms = gradient_norms(tmp_path / "one")
    assert len(norms) == 6 and gradient_norms(tmp_path / "two") == pytest.approx(norms, rel=1e-4)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000006")
    together("--resume")
    assert updates(tmp_path / "two") == shared
