"""Options from files: however YAML has a value it is taken as meant, or refused by file and key; mlx-lm's keys too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elm_mlx.cli import _Commands, lora, training
from elm_mlx.errors import InputError
from elm_mlx.train.settings import LoraSettings

Options = Callable[..., dict[str, Any]]


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """What `lora -c FILE` would run with."""

    def call(text: str, *arguments: str) -> dict[str, Any]:
        (tmp_path / "c.yaml").write_text(text, "utf-8")
        return chosen("-c", str(tmp_path / "c.yaml"), *arguments)

    return call


def chosen(*arguments: str) -> dict[str, Any]:
    """The settings of `lora` with these arguments, the defaults among them."""
    context = _Commands()["lora"].make_context("lora", list(arguments))
    found = training.chosen(LoraSettings, lora.RECIPES, context, context.params)
    return {name: found.get(name, setting.default) for name, setting in LoraSettings.options().items()}


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # a text in YAML 1.1
        ("learning-rate: '2e-4'", "learning_rate", 2e-4),
        ("lr: 3e-4", "learning_rate", 3e-4),
        ("warmup: 100", "warmup", 100.0),
        ("iters: 1e3", "iters", 1000),
        ("iters: 200.0", "iters", 200),
        ("iters: '20'", "iters", 20),
        ("batch-size: [2]", "batch_size", 2),
        ("rank: 8", "rank", "8"),
        ("rank: 8.0", "rank", "8"),
        ("rank: [4, '4', 8.0]", "rank", "4,4,8"),
        ("rank: {'*': 4, qkv_proj: '2'}", "rank", "*=4,qkv_proj=2"),
        ("target: qkv_proj", "target", ("qkv_proj",)),
        ("target: [qkv_proj, ffn.*]", "target", ("qkv_proj", "ffn.*")),
        ("data: [x.jsonl]", "data", ("x.jsonl",)),
        ("out: 2026", "out", Path("2026")),
        ("pack: false", "pack", False),
        ("pack: 'off'", "pack", False),
        ("pack: no", "pack", False),
        ("full: 'Yes'", "full", True),
        ("lora-layers: 4", "num_layers", 4),
        ("template: [none]", "template", "none"),
        ("template:", "template", None),
    ],
)
def test_values_as_people_write_them(line: str, name: str, value: Any, options: Options) -> None:
    assert options(line)[name] == value


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("iters: true", "iters is True; it needs a whole number"),
        ("iters: 2.5", "iters is 2.5; it needs a whole number"),
        ("iters: [1, 2]", "iters is [1, 2]; it needs a whole number"),
        ("iters: .inf", "iters is inf; it needs a whole number"),
        ("iters: 1" + 30 * "0", "; it needs a whole number"),
        ("learning_rate: fast", "learning_rate is 'fast'; it needs a number"),
        ("learning_rate: {a: 1}", "learning_rate is an object of 1; it needs a number"),
        ("warmup: 2026-01-01", "warmup is datetime.date(2026, 1, 1); it needs a number"),
        ("rank: true", "rank is True; it needs a text"),
        ("rank: [4, x]", "rank is 'x'; it needs a whole number"),
        ("rank: {a: 1.5}", "rank is 1.5; it needs a whole number"),
        ("target: []", "target is an empty list"),
        ("target: [qkv_proj, 3]", "target is 3; it needs a text"),
        ("data: {a: b}", "a source of data has a: path"),
        ("data: true", "data is True; it needs a text"),
        ("template: {a: b}", "template is an object of 1; it needs a text"),
        ("pack: nein", "pack is 'nein'; it needs true or false"),
        ("pack: 1", "pack is 1; it needs true or false"),
        ("seed: 1\nseed: 2", "the key seed stands twice"),
        ("batch-size: 1\nbatch_size: 2", "batch_size is given twice, in two spellings"),
        ("lr: 1\nlearning_rate: 2", "learning_rate is given twice"),
        ("optimizer: [" + "x, " * 99 + "x]", "optimizer is a list of 100; it needs a text"),
        ("", "holds no YAML mapping, which has lines like `key: value`"),
        ("# rank: 8\n", "holds no YAML mapping"),
    ],
)
def test_what_is_no_value_is_named_by_file_and_key(text: str, error: str, options: Options, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        options(text)
    assert str(caught.value).startswith(f"{tmp_path}/c.yaml: ") and error in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "c.json"

    def read(text: str) -> dict[str, Any]:
        path.write_text(text)
        return chosen("-c", str(path))

    assert read('{\n\t"iters": 3,\n\t"learning_rate": 1e-4\n}')["learning_rate"] == 1e-4
    for text, error in (
        ('{"iters": 3,}', "not JSON: "), ("[3]", "holds no JSON object"),
        ('{"seed": 1, "seed": 2}', "has the key 'seed' twice"),
        ("", "not JSON: "), ('{"iters": null, "seed": "x"}', "seed is 'x'; it needs a whole number"),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            read(text)
        assert str(caught.value).startswith(f"{path}: ") and error in str(caught.value)


MLX_LM = """
model: mlx_model
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config: {adam: {betas: [0.9, 0.98]}, adamw: {weight_decay: 0.1}}
data: some/data
seed: 7
num_layers: 4
batch_size: 1
iters: 600
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 150
resume_adapter_file: null
adapter_path: adapters
save_every: 50
test: false
test_batches: 100
max_seq_length: 512
grad_checkpoint: false
report_to: null
lora_parameters: {keys: ["self_attn.q_proj"], rank: 4, scale: 20.0, dropout: 0.05}
mask_prompt: false
"""


def test_mlx_lms_own_file(options: Options) -> None:
    found = options(MLX_LM)
    wanted = {
        "model": Path("mlx_model"), "optimizer": "adamw", "weight_decay": 0.1, "data": ("some/data",), "seed": 7,
        "num_layers": 4, "batch_size": 1, "iters": 600, "val_batches": 25, "learning_rate": 1e-5, "steps_per_eval": 150,
        "out": Path("adapters"), "save_every": 50, "max_seq_length": 512, "target": ("self_attn.q_proj",), "rank": "4",
        "alpha": 80.0, "dropout": 0.05, "train_on_prompt": True, "full": False, "dora": False, "grad_checkpoint": False,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("text", "arguments", "alpha"),
    [
        ("lora_parameters: {rank: 4, scale: 10}", [], 40.0),
        ("lora_parameters: {rank: 4, scale: '10'}", ["--rank", "2"], 20.0),
        ("lora_parameters: {rank: 4, scale: 10}\nrslora: true", [], 20.0),
        ("lora_parameters: {scale: 10}\nrank: [2, 4]", [], 40.0),
        ("lora_parameters: {scale: 10}", ["--recipe", "openelm"], 320.0),
        ("lora_parameters: {rank: 4, scale: 10}", ["--alpha", "3"], 3.0),
        ("lora_parameters: {rank: 4}", [], None),
    ],
)
def test_a_scale_is_that_of_the_rank(text: str, arguments: list[str], alpha: float | None, options: Options) -> None:
    assert options(text, *arguments)["alpha"] == alpha


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("test: false", "test_batches", 0),
        ("test: true\ntest_batches: 5", "test_batches", 5),
        ("data: {path: a, weight: 2}", "data", ("a",)),
        ("data: [{path: a, weight: 2}, hub:b/c]", "data", ("a", "hub:b/c")),
        ("data: [{path: a, weight: 2}, hub:b/c]", "weight", (2.0, 1.0)),
        ("data: [a, b]\nweight: ['1e-1', 3]", "weight", (0.1, 3.0)),
        ("columns: {prompt: Frage, completion: Antwort}", "columns", ("prompt=Frage", "completion=Antwort")),
        ("columns: prompt=Frage,completion=Antwort", "columns", ("prompt=Frage,completion=Antwort",)),
        ("prompt_feature: Frage", "columns", ("prompt=Frage", "completion=completion")),
        ("text_feature: body", "columns", ("text=body",)),
        ("fine_tune_type: dora", "dora", True),
        ("fine_tune_type: full", "full", True),
        ("use_dora: true", "dora", True),
        ("mask_prompt: true", "train_on_prompt", False),
        ("mask_prompt: 'false'", "train_on_prompt", True),
        ("train: yes", "full", False),
        ("grad_accumulation_steps: 4\niters: 9", "iters", 9),
        ("optimizer_config: {muon: {momentum: 0.9}}", "weight_decay", 0.0),
    ],
)
def test_mlx_lms_keys_that_mean_the_same(line: str, name: str, value: Any, options: Options) -> None:
    assert options(line)[name] == value


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("train: false", "train is false, and this command trains"),
        ("train: 3", "train is 3; it needs true or false"),
        ("test: maybe", "test is 'maybe'; it needs true or false"),
        ("fine_tune_type: qlora", "fine_tune_type is 'qlora': one of lora, dora, full is needed"),
        ("fine_tune_type: [lora]", "fine_tune_type is ['lora']"),
        ("resume_adapter_file: a.safetensors", "write from_adapter: DIR"),
        ("hf_dataset: {path: a/b}", "write data: hub:OWNER/NAME"),
        ("data: {path: a, name: b}", "a source of data has path, name: path and weight are its keys"),
        ("data: [{path: a}]\nweight: 2", "weight stands beside data, and sources in it have their own"),
        ("prompt_feature: question\ncolumns: {text: a}", "columns and mlx-lm's names of features say the same"),
        ("trust_remote_code: true", "no code that comes with a model is run here"),
        ("report_to: swanlab", "report_to is 'swanlab'; choose from tensorboard, wandb"),
        ("wandb: mine", "write report_to: wandb"),
        ("optimizer: adam", "write adamw, which without weight_decay is Adam"),
        ("optimizer_config: {adamw: {betas: [0.9, 0.98]}}", "optimizer_config has betas: of these, weight_decay alone"),
        ("optimizer_config: 3", "optimizer_config is not a table"),
        ("optimizer_config: {}\noptimizer: [adamw, sgd]", "optimizer is ['adamw', 'sgd']; it needs a text"),
        ("lr_schedule: {name: cosine_decay, warmup: 100}", "lr_schedule is mlx-lm's: write cosine, linear or constant"),
        ("lora_parameters: 8", "lora_parameters is not a table"),
        ("lora_parameters: {rank: 8, alpha: 16}", "write alpha beside lora_parameters, or scale in it"),
        ("lora_parameters: {rank: 8, scale: much}", "lora_parameters.scale is 'much'; it needs a number"),
        ("lora_parameters: {rank: 8}\nrank: 4", "lora_parameters and rank say the same"),
        ("lora_parameters: {scale: 8}\nalpha: 4", "and both are there: keep one"),
        ("adapter_path: a\nout: b", "adapter_path and out say the same"),
        ("train: true\niters: 100\ngrad_accumulation_steps: 4", "iters counts batches in mlx-lm and updates here"),
        ("scale: 3", "scale is not an option"),
    ],
)
def test_mlx_lms_keys_that_mean_something_else(text: str, error: str, options: Options, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        options(text)
    assert str(caught.value).startswith(f"{tmp_path}/c.yaml: ") and error in str(caught.value)


def test_all_of_mlx_lms_defaults_are_known(options: Options) -> None:
    """A key that a later mlx-lm has besides is to be looked at: taken, or refused with what to write instead."""
    defaults = pytest.importorskip("mlx_lm.lora").CONFIG_DEFAULTS
    values = dict(defaults) | {"train": True, "optimizer": "adamw"}
    found = options(json.dumps(values))
    assert (
        found["rank"] == "8" and found["alpha"] == 160.0 and found["iters"] == 1000 and found["out"] == Path("adapters")
    )


def test_a_runs_settings_that_were_edited(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"iters": "many"}}))
    with pytest.raises(InputError, match=r"run\.json: iters is 'many'; it needs a whole number"):
        chosen("--out", str(tmp_path), "--resume")
