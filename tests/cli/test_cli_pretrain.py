"""`elm-mlx pretrain`: a recipe written, read and carried out; stopped and resumed; by two processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from commands import Run
from mlx.utils import tree_flatten
from training_runs import free_port, gradient_norms, updates

from elm_mlx import directories, files
from elm_mlx.cli.training import RECIPE_KEYS
from elm_mlx.errors import ElmError
from elm_mlx.model import roofline
from elm_mlx.store.loading import load, load_model
from elm_mlx.train import checkpoint, pretraining_recipe, sections


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """With a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return run


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer_file: Path) -> Path:
    """A recipe of a tiny model, and texts for it: of each document, how often a word comes says what comes next."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"]
    for name, count in (("texts", 60), ("valid", 6)):
        texts = (" ".join(words[(i + j * (i % 3 + 1)) % 8] for j in range(80)) for i in range(count))
        lines = (json.dumps({"text": f"{number}. {text}"}) + "\n" for number, text in enumerate(texts))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
tokenizer = "{tiny_tokenizer_file}"
[model]
num_layers = 2
model_dim = 32
head_dim = 16
num_gqa_groups = 1
ffn_dim_divisor = 16
context = 64
[data]
sequence_length = 32
window = 2048
validation = "{tmp_path / "valid.jsonl"}"
validation_rows = 8
[[data.sources]]
path = "{tmp_path / "texts.jsonl"}"
[filters]
min_tokens = 10
max_repetition = 1.0
[optimizer]
lr = 0.01
steps = 6
warmup = 2
[run]
batch_size = 4
accumulate = 2
eval_every = 3
save_every = 2
"""
    )
    return path


def test_from_text_to_a_model(run: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "matmul_speed", lambda dtype: 1e13)  # or a busy machine's share might exceed all
    out = tmp_path / "run"
    code, text, err = run("pretrain", config, "--out", out)
    assert code == 0, err
    losses = updates(out)
    assert [step for step, _ in losses] == [0, 1, 2, 3, 3, 4, 5, 6, 6] and losses[-1][1] < losses[0][1] - 0.3
    assert '"matmul_share": ' in (out / "metrics.jsonl").read_text() and "% of matmul speed" in text
    assert losses[0][1] == pytest.approx(5.77, abs=1.0), "an untrained model knows nothing: log 320"
    assert "updates   6 of 256 tokens, 1,536 in all" in text and "documents kept" in text
    model, tokenizer = load(out)
    assert tokenizer is not None and run("generate", out, "--prompt", "the", "--max-tokens", 2)[0] == 0
    last = mx.load(str(checkpoint.directory(out, 6) / directories.PARAMETERS))
    assert all(mx.array_equal(last[name], value) for name, value in tree_flatten(model.parameters()))
    assert f"wrote     {out}; try: elm-mlx generate {out} --prompt …" in text
    suggested = re.search(r"^average   the last (\d) checkpoints: elm-mlx (.*) DIR$", text, re.M)
    assert suggested and suggested[1] == "4", "3, the best; 2, 4 and 6, by count"
    assert run(*suggested[2].split(), tmp_path / "mean")[0] == 0
    code, _, err = run("pretrain", config, "--out", out)
    assert code == 2 and "holds a run already" in err
    shutil.rmtree(out / "checkpoints")
    kept = {path: path.read_bytes() for path in out.iterdir()}
    code, _, err = run("pretrain", config, "--out", out)
    assert code == 2 and "holds weights already, and no checkpoint to go on from" in err
    assert {path: path.read_bytes() for path in out.iterdir()} == kept


def test_validation_keeps_to_documents_where_training_does(run: Run, config: Path, tmp_path: Path) -> None:
    """At a learning rate of next to nothing both have the loss of the same weights on the same rows."""
    texts = (tmp_path / "texts.jsonl").read_text()
    (tmp_path / "valid.jsonl").write_text(texts)
    few = ["optimizer.lr=1e-12", "optimizer.warmup_from=1e-13", "optimizer.steps=1", "optimizer.warmup=1"]
    few += ["data.window=512", "run.accumulate=1", "data.validation_rows=16", "run.batch_size=16"]
    few += ["filters.duplicates=false", "filters.min_chars=0", "filters.min_tokens=0", "data.sequence_length=64"]
    losses = {}
    for segments in ("true", "false"):
        words = [word for each in (*few, f"data.segments={segments}") for word in ("--set", each)]
        code, _, err = run("pretrain", config, "--out", tmp_path / segments, *words)
        assert code == 0, err
        losses[segments] = [loss for _, loss in updates(tmp_path / segments)]
    assert losses["true"][0] == pytest.approx(losses["true"][1], abs=0.02)
    assert losses["true"][0] != losses["false"][0]


def test_what_is_suggested_at_the_end_works(run: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    set_ = [text for each in ("keep=1", "save_every=1") for text in ("--set", f"run.{each}")]
    lines = [line for line in config.read_text().splitlines() if not line.startswith("validation")]
    config.write_text("\n".join(lines))
    code, text, err = run("pretrain", config, "--out", out, *set_)
    assert code == 0, err
    assert "elm-mlx generate" in text and "average" not in text, "of one checkpoint there is no mean"
    assert "validation" not in text


def test_what_is_suggested_takes_paths_with_spaces(run: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "my run"
    code, text, err = run("pretrain", config, "--out", out)
    assert code == 0 and f"elm-mlx generate '{out}' --prompt" in text and f" '{out}' --out DIR" in text, err
    data = tmp_path / "my data.jsonl"
    data.write_text('{"prompt": "the", "completion": "fox"}\n')
    adapter = tmp_path / "my adapter"
    code, text, err = run("lora", out, "--data", data, "--out", adapter, "--iters", 1, "--max-seq-length", 32)
    assert code == 0, err
    suggested = shlex.split(text.partition("try: elm-mlx ")[2])
    assert suggested == ["generate", str(out), "--adapter", str(adapter), "--prompt", "…"]
    code, text, _ = run("pretrain", "--init", tmp_path / "a recipe.toml")
    assert code == 0 and f"then: elm-mlx pretrain '{tmp_path / 'a recipe.toml'}' --out run" in text


def test_a_model_that_is_worse_than_none_is_not_recommended(run: Run, config: Path, tmp_path: Path) -> None:
    options = ("--set", "optimizer.lr=50", "--set", "optimizer.warmup=0", "--set", "run.on_nan=skip")
    code, text, err = run("pretrain", config, "--out", tmp_path / "run", *options)
    assert code == 0, err
    assert "no validation loss was below the " in err and "a lower optimizer.lr or other data may help" in err
    assert "best" not in text and "try:" not in text and "average" not in text


def test_resumed_it_has_the_same_losses_with_other_workers(run: Run, config: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("pretrain", config, "--out", whole, "--set", "data.workers=0")[0] == 0
    shutil.copytree(whole, cut)
    for step in (4, 6):
        shutil.rmtree(checkpoint.directory(cut, step))
    code, text, err = run("pretrain", config, "--out", cut, "--resume", "--set", "data.workers=2")
    assert code == 0 and "resumed   after 3 updates" in text, err
    assert updates(cut) == updates(whole)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    code, _, err = run("pretrain", config, "--out", cut, "--resume", "--set", "optimizer.lr=0.02")
    assert code == 2 and "was trained with optimizer.lr = 0.01, not 0.02; leave it as it was, or start" in err
    code, _, err = run("pretrain", config, "--out", cut, "--resume", "--set", "optimizer.steps=9")
    assert code == 2 and "was trained with optimizer.steps = 6, not 9" in err and "learning rate is spread" in err
    code, _, err = run("pretrain", config, "--out", cut, "--resume", "--set", "filters.min_tokens=11")
    assert code == 2 and "was trained on other data" in err
    code, _, err = run("pretrain", config, "--out", cut, "--resume", "--set", "data.validation_rows=4")
    assert code == 2 and "was trained with data.validation_rows = 8, not 4" in err, "losses could not be compared"
    lines = (tmp_path / "texts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "texts.jsonl").write_text("".join(lines[::-1]))  # as many bytes
    code, _, err = run("pretrain", config, "--out", cut, "--resume")
    assert code == 2 and "was trained with text (its hash) = " in err
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    code, _, err = run("pretrain", config, "--out", cut, "--resume", "--set", "model.num_layers=1")
    assert code == 2 and "was trained from another model" in err
    about = json.loads((cut / "run.json").read_text())["settings"]
    assert about["optimizer"]["lr"] == 0.01 and load_model(cut).config.num_layers == 2, (
        "what is refused leaves no trace"
    )


def test_what_is_read_is_what_is_trained_on(run: Run, config: Path, tmp_path: Path) -> None:
    """A window that nobody chose is no larger than the run; one that somebody did is."""
    config.write_text(config.read_text().replace("window = 2048\n", ""))
    made = sections.read(config, pretraining_recipe.Recipe)
    assert made.reading().window == 1536 and made.reading(world=2).window == 3072
    assert sections.read(config, pretraining_recipe.Recipe, ["optimizer.steps=100000"]).reading().window == 1 << 22
    assert sections.read(config, pretraining_recipe.Recipe, ["data.window=9999"]).reading().window == 9999
    for name, options in (("small", ()), ("large", ("--set", "data.window=50000"))):
        code, text, err = run("pretrain", config, "--out", tmp_path / name, *options)
        assert code == 0, err
        found = re.search(r"read      .*: (\d+) of \d+ documents kept, ([\d,]+) tokens, epoch (\d+)\n", text)
        assert found and "trained   on 1,536 of these tokens\n" in text
        documents, tokens, epoch = (int(number.replace(",", "")) for number in found.groups())
        longest = 400
        assert (1536 <= tokens < 1536 + longest and epoch == 1 and documents < 60) is (name == "small")
        assert (tokens >= 50_000 and epoch > 1 and documents > 60) is (name == "large")


def test_a_finished_run_that_is_resumed_has_read_nothing(run: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "\nread  " in run("pretrain", config, "--out", out)[1]
    code, text, err = run("pretrain", config, "--out", out, "--resume")
    assert code == 0, err
    assert "done      6 updates, 1,536 tokens" in text and "\nread  " not in text and "of these tokens" not in text


def test_a_run_with_the_window_of_earlier_versions(run: Run, config: Path, tmp_path: Path) -> None:
    """They had four million tokens whatever the run (here fewer); it goes on as it was, if it is told to."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    earlier = ("--set", "data.window=8192", "--set", "data.workers=0")
    config.write_text(config.read_text().replace("window = 2048\n", ""))
    assert run("pretrain", config, "--out", whole, *earlier)[0] == 0
    shutil.copytree(whole, cut)
    for step in (4, 6):
        shutil.rmtree(checkpoint.directory(cut, step))
    before = sorted(path.name for path in (cut / "checkpoints").iterdir())
    code, _, err = run("pretrain", config, "--out", cut, "--resume")
    assert code == 2 and "shuffled windows of 8192 tokens, and this recipe now makes them of 1536" in err
    assert "--set data.window=8192 goes on with the former" in err and err.count("\n") == 1
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == before
    assert run("pretrain", config, "--out", cut, "--resume", *earlier)[0] == 0
    assert updates(cut) == updates(whole)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    (checkpoint.directory(cut, 6) / checkpoint.STATE).write_text("{")
    code, _, err = run("pretrain", config, "--out", cut, "--resume")
    assert code == 2 and "state.json: not JSON" in err


def test_every_key_that_a_run_is_told_by_has_its_name(config: Path) -> None:
    made = sections.read(config, pretraining_recipe.Recipe)
    names = made.loop().identity().keys()
    assert names - RECIPE_KEYS.keys() == {"spike"}, "which no recipe says"
    for key in RECIPE_KEYS.values():
        section, name = key.split(".")
        assert hasattr(getattr(made, section), name)


def test_two_processes_are_one_with_twice_the_batch(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "elm_mlx", "pretrain", str(config), "--set", "data.workers=0"]
    # As many streams of documents on both sides, or they would be dealt otherwise.
    one = [*command, "--out", str(tmp_path / "one"), "--set", "data.shards=2"]
    subprocess.run(one, check=True, capture_output=True)
    launch = [Path(sys.executable).with_name("mlx.launch"), "--backend", "ring", "-n", "2", "-p", str(free_port())]
    two = [*command, "--out", str(tmp_path / "two"), "--set", "run.batch_size=2", "--set", "data.shards=2"]
    subprocess.run([*launch, "--cwd", Path.cwd(), "--", *two], check=True, capture_output=True, timeout=120)
    alone, shared = updates(tmp_path / "one"), updates(tmp_path / "two")
    assert [step for step, _ in alone] == [step for step, _ in shared]
    trained = [[loss for _, loss in each] for each in (shared, alone)]
    assert trained[0] == pytest.approx(trained[1], rel=1e-4)
    norms = gradient_norms(tmp_path / "one")
    assert len(norms) == 6 and gradient_norms(tmp_path / "two") == pytest.approx(norms, rel=1e-3)


def test_a_recipe_to_start_from(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    assert run("pretrain", "--init", path, "--preset", "OpenELM-1_1B")[0] == 0
    made = sections.read(path, pretraining_recipe.Recipe)
    assert made == pretraining_recipe.preset("OpenELM-1_1B")
    assert (made.optimizer.lr, made.optimizer.steps, made.optimizer.warmup_steps()) == (0.0024, 350_000, 5_000)
    assert made.run.batch_size * made.run.accumulate * made.data.sequence_length == 4_194_304
    code, _, err = run("pretrain", "--init", path)
    assert code == 2 and "exists already" in err
    code, _, err = run("pretrain", path, "--data", "a.txt")
    assert code == 2 and "--data: needs --init" in err
    code, _, err = run("pretrain", path, "--out", tmp_path / "run", "--preset", "OpenELM-3B")
    assert code == 2 and "--preset: needs --init" in err, "another model than asked for would train"
    code, _, err = run("pretrain", "--init", tmp_path / "new.toml", "--set", "optimizer.lr=0.5")
    assert code == 2 and "--set: --init writes a recipe to be edited" in err and not (tmp_path / "new.toml").exists()
    code, _, err = run("pretrain", "--init", tmp_path / "other", "--preset", "OpenELM-2B")
    assert code == 2 and "--preset OpenELM-2B: is not one of small, OpenELM-270M" in err


def test_three_commands_make_a_model_of_ones_own_text(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"{first}{second}" for first in ("st", "br", "l", "th") for second in ("ory", "own", "azy", "ings")]
    lines = (f"{words[i % 16]} {words[i * i % 13]} {words[i // 7 % 16]} {i}.\n" for i in range(2000))
    Path("own.txt").write_text("".join(lines))
    assert run("train-tokenizer", "own.txt", "--out", "tokenizer.model", "--vocab-size", 300)[0] == 0
    code, said, _ = run("pretrain", "--init", "recipe.toml", "--data", "own.txt")
    assert code == 0 and "learns from own.txt, in the tokens of tokenizer.model" in said
    assert sections.read(Path("recipe.toml"), pretraining_recipe.Recipe) == pretraining_recipe.preset(
        "small", "own.txt"
    )
    steps = ("--set", "optimizer.steps=2", "--set", "optimizer.warmup=1", "--set", "run.batch_size=1")
    code, _, err = run("pretrain", "recipe.toml", "--out", "run", *steps)
    assert code == 0, err
    assert load_model(Path("run")).config.max_context_length == 512 and len(updates(Path("run"))) == 2


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("optimizer.warm_up=1", "[optimizer] has no key 'warm_up'; the nearest is warmup"),
        ("tokenizer=none.model", "none.model"),
        ("data.sequence_length=65", "exceed the model's context"),
        ("run.compute_dtype=int8", "run.compute_dtype is 'int8'; choose from float32, float16, bfloat16"),
        ("optimizer.betas=0.9", "betas are two numbers"),
        ("model.qkv_multipliers=[1, 2, 3]", "[model] qkv_multipliers are one or two numbers"),
        ("model.ffn_multipliers=[inf, 1]", "[model] ffn_multipliers are one or two numbers"),
        ("model.qkv_multipliers=[]", "[model] qkv_multipliers are one or two numbers"),
        ("filters.min_chars=-1", "min_chars must be at least 0"),
        ("run.seed=-1", "seed is -1: it must be from 0"),
    ],
)
def test_what_makes_no_run_is_refused(override: str, error: str, run: Run, config: Path, tmp_path: Path) -> None:
    code, _, err = run("pretrain", config, "--out", tmp_path / "run", "--set", override)
    assert code == 2 and error in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


_OF_RATES = ("lr", "warmup_from", "end")


@pytest.mark.parametrize("value", ["nan", "inf", "-1.0"])
@pytest.mark.parametrize("name", [*_OF_RATES, "eps", "weight_decay", "z_loss", "qkv_multipliers", "ffn_multipliers"])
def test_what_is_no_number_is_refused_before_the_run(
    name: str, value: str, run: Run, config: Path, tmp_path: Path
) -> None:
    section = "model" if name.endswith("multipliers") else "optimizer"
    code, _, err = run("pretrain", config, "--out", tmp_path / "run", "--set", f"{section}.{name}={value}")
    named = "learning rate" if name in _OF_RATES else name.replace("_", "[_ ]")
    assert code == 2 and re.search(named, err) and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "name", ["num_layers", "model_dim", "head_dim", "num_gqa_groups", "ffn_dim_divisor", "context"]
)
def test_a_network_of_nothing_is_refused_by_the_key(name: str, run: Run, config: Path, tmp_path: Path) -> None:
    code, _, err = run("pretrain", config, "--out", tmp_path / "run", "--set", f"model.{name}=0")
    assert code == 2 and f"[model] {name} must be at least 1, not 0" in err and err.count("\n") == 1


def test_the_warm_up_follows_the_updates(run: Run, config: Path, tmp_path: Path) -> None:
    """A recipe for a long run, cut short: what does not fit becomes a tenth, which is told; what fits is used."""
    said = {}
    for steps in (1, 2):
        code, said[steps], err = run(
            "pretrain", config, "--out", tmp_path / str(steps), "--set", f"optimizer.steps={steps}"
        )
        assert code == 0, err
    assert "warm-up   0 updates of rising learning rate: the recipe's 2 do not fit into 1\n" in said[1]
    assert "warm-up   2 updates of rising learning rate\n" in said[2]
    optimizer = pretraining_recipe.Optimizer(1.0, steps=30)
    assert [replace(optimizer, steps=steps).warmup_steps() for steps in (4, 30, 80_000)] == [0, 3, 5000]
    assert replace(optimizer, warmup=30).warmup_steps() == 30 and replace(optimizer, warmup=31).warmup_steps() == 3
    assert pretraining_recipe.preset("small").optimizer.warmup_steps() == 100


def test_what_is_missing_is_said(run: Run, config: Path) -> None:
    assert "CONFIG is missing; --init FILE writes a first recipe" in run("pretrain")[2]
    assert "CONFIG is missing; --resume takes the one" in run("pretrain", "--resume", "--out", "run")[2]
    assert "--out is missing" in run("pretrain", config)[2]


def test_a_look_at_the_mixture(run: Run, config: Path, tmp_path: Path) -> None:
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"text": "short"}\n{"txt": 1}\n')
    code, text, err = run("data", "--config", config)
    assert code == 0 and "texts.jsonl, line 62: " in err
    assert "all there is" in text and "tokens/s with 1 worker" in text
    assert "share     100.0% of the tokens; the weights say 100.0%" in text
    assert "kept      60 of 62 documents" in text and "dropped   1 short" in text and "bad       1 record" in text
    assert "PATH is missing" in run("data")[2]


@pytest.mark.parametrize("command", [("pretrain",), ("lr-sweep", "--steps", 4)])
def test_two_runs_do_not_write_to_one_directory(
    command: tuple[object, ...], run: Run, config: Path, tmp_path: Path
) -> None:
    with files.hold(tmp_path / "out"):
        code, _, err = run(*command, config, "--out", tmp_path / "out")
    assert code == 1 and f"process {os.getpid()} is writing to it" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_learning_rates_are_tried(run: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    options = ("--steps", 4, "--lr", "0.0001,0.01,1e30")
    code, text, err = run("lr-sweep", config, "--out", out, *options)
    assert code == 0, err
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "the least" in lines["0.01"] and "broke off" in lines["1e+30"]
    assert f"{updates(out / 'lr-0.01')[-1][1]:.4f}" in lines["0.01"]
    assert [step for step, _ in updates(out / "lr-0.0001")] == [0, 1, 2, 3, 4, 4]
    assert (out / "report.html").read_text().count("lr-0.01") > 0
    assert "holds something already" in run("lr-sweep", config, "--out", out, *options)[2]
    assert "needs numbers" in run("lr-sweep", config, "--out", tmp_path / "other", "--lr", "a")[2]


@pytest.mark.parametrize(
    ("rates", "error"),
    [
        ("0.01,-1", "the learning rate must be above 0, not -1.0"),
        ("0.01,nan", "the learning rate must be above 0, not nan"),
        ("0.01,0.02,0.01", "learning rates 0.01, 0.02, 0.01: one is given twice"),
    ],
)
def test_rates_of_which_one_cannot_be_tried_are_none_of_them_tried(
    rates: str, error: str, run: Run, config: Path, tmp_path: Path
) -> None:
    code, said, err = run("lr-sweep", config, "--out", tmp_path / "sweep", "--steps", 2, "--lr", rates)
    assert (code, said, err.count("\n")) == (2, "", 1) and error in err and not (tmp_path / "sweep").exists()


def test_a_full_disk_is_no_learning_rate_that_is_too_high(
    run: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ElmError("checkpoints: cannot be written: No space left on device")

    monkeypatch.setattr(checkpoint, "save", fail)
    code, text, err = run("lr-sweep", config, "--out", tmp_path / "sweep", "--steps", 2, "--lr", "0.01,0.02")
    assert code == 1 and "No space left on device" in err and "broke off" not in text


def test_a_sweep_says_that_no_learning_rate_did_any_good(run: Run, config: Path, tmp_path: Path) -> None:
    code, text, err = run("lr-sweep", config, "--out", tmp_path / "sweep", "--steps", 2, "--lr", "0.8,1e30")
    assert code == 0 and "the least" not in text and "broke off" in text
    loss = float(next(line for line in text.splitlines() if line.startswith("0.8 ")).split()[1])
    assert loss > updates(tmp_path / "sweep" / "lr-0.8")[0][1], "it was lower before training"
    assert "no rate brought the loss below" in err
