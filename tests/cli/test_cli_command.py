"""The command line's grammar: help everywhere, `--model`, positional prompts, the nearest option, completion."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
from commands import Run
from typer.main import get_command

from elm_mlx import device
from elm_mlx.bench import suites
from elm_mlx.cli import app, dpo, lora
from elm_mlx.evaluate import tasks
from elm_mlx.model.config import PRESETS
from elm_mlx.quantize import recipe
from elm_mlx.train.preference import LOSSES

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
WITH_MODEL = {
    "adapter", "bench", "chat", "dpo", "eval", "export", "fuse", "generate", "grpo", "info", "kvp", "lora", "quantize",
    "serve", "synthesize",
}  # fmt: skip


@pytest.mark.parametrize("columns", ["60", "80"])
def test_help_cuts_nothing_off_in_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = run("-h")
    assert code == 0 and "…" not in out.replace("[MODEL…]", "") and "..." not in out.replace("[ARGS]...", "")
    assert max(map(len, out.splitlines())) <= int(columns)
    for name, command in COMMANDS.items():
        code, out, _ = run(name, "-h")
        assert (code, out) == (0, run(name, "--help")[1])
        assert all(option in out for each in command.params for option in each.opts if option.startswith("-"))
        assert " ".join(command.help.split()) in " ".join(out.split())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_says_its_default(name: str) -> None:
    command = COMMANDS[name]
    context = command.context_class(command, info_name=name)
    for each in command.params:
        if each.param_type_name == "option" and (not each.is_flag or each.secondary_opts):
            said = each.get_help_record(context)[1]
            assert re.search(r"default|\[required\]", said), f"{name} {each.opts}: {said}"


def test_commands_stand_in_groups(run: Run) -> None:
    out = run("--help")[1]
    groups = re.findall(r"^(\w+):\n((?:  .*\n)+)", out, re.M)
    assert [name for name, _ in groups] == ["Options", "Models", "Talk", "Train", "Measure"]
    named = [re.findall(r"^  (\S+)", text, re.M) for _, text in groups[1:]]
    assert sorted(chain(*named)) == sorted(COMMANDS) and named[1] == ["generate", "chat", "serve", "index"]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_options_stand_in_panels(name: str, run: Run) -> None:
    out = run(name, "--help")[1]
    command, sections = COMMANDS[name], re.findall(r"^([\w ]+):\n((?:  .*\n)+)", out, re.M)
    panels = getattr(import_module(f"elm_mlx.cli.{name.replace('-', '_')}"), "PANELS", {})
    assert {each for names in panels.values() for each in names} <= {each.name for each in command.params}
    titles = [title for title, _ in sections]
    assert len({*titles}) == len(titles) and titles[-len(panels) :] == [*panels] if panels else "Options" in titles
    if name in ("lora", "dpo"):
        of_training = ["Data", "Method", "Optimizer", "Computation", "Checkpoints", "Reports"]
        assert titles == ["Arguments", "Options", *of_training] + (["Loss"] if name == "dpo" else [])
        assert dict(sections)["Optimizer"].count("\n  --") == 10  # and the first
    assert sum(text.count("\n  -") + text.startswith("  -") for _, text in sections) == 1 + sum(
        each.param_type_name == "option" for each in command.params
    )


@pytest.mark.parametrize(
    ("command", "option", "choices"),
    [
        *((name, "compute_dtype", device.DTYPES) for name in ("generate", "chat", "lora", "dpo", "eval", "bench")),
        *((name, "dtype", device.DTYPES) for name in ("convert", "export", "average", "fuse", "quantize")),
        ("lora", "optimizer", ("adamw", "adafactor")), ("lora", "recipe", lora.RECIPES), ("dpo", "recipe", dpo.RECIPES),
        ("dpo", "loss", LOSSES), ("convert", "preset", PRESETS), ("pretrain", "preset", ("small", *PRESETS)),
        ("bench", "suite", suites.SUITES), ("eval", "suite", tasks.SUITES),
        ("quantize", "mode", (recipe.AFFINE, *recipe.FLOATS)), ("quantize", "method", recipe.METHODS),
    ],
)  # fmt: skip
def test_choices_are_all_there_are(command: str, option: str, choices: Iterable[str], run: Run) -> None:
    (parameter,) = (each for each in COMMANDS[command].params if each.name == option)
    assert sorted(parameter.type.choices) == sorted(choices)
    shown = run(command, "--help")[1]
    assert "|".join(parameter.type.choices) in re.sub(r"\|\s+", "|", shown)


def test_without_a_command_help_is_shown(run: Run) -> None:
    code, out, err = run()
    assert code == 2 and "Models:" in out and err == ""


def test_a_model_may_be_named_by_an_option(run: Run, tiny_model_dir: Path) -> None:
    usual = run("info", tiny_model_dir)
    assert usual[0] == 0
    assert run("info", "--model", tiny_model_dir) == run("info", f"--model={tiny_model_dir}") == usual
    said = run("generate", tiny_model_dir, "the fox", "--max-tokens", 5)[1]
    assert run("generate", "--max-tokens", 5, "the fox", "--model", tiny_model_dir)[1] == said
    assert run("generate", "--model", tiny_model_dir, "--prompt", "the fox", "--max-tokens", 5)[1] == said


def test_an_options_value_and_what_follows_two_dashes_name_no_model(run: Run, tiny_model_dir: Path) -> None:
    code, out, _ = run("generate", tiny_model_dir, "-p", "--model", "--json", "--max-tokens", 2)
    assert code == 0 and json.loads(out)["prompt"] == "--model"
    code, out, _ = run("generate", tiny_model_dir, "--json", "--max-tokens", 2, "--", "--model")
    assert code == 0 and json.loads(out)["prompt"] == "--model"


@pytest.mark.parametrize("name", sorted(WITH_MODEL))
def test_every_command_of_a_model_takes_it_by_name(run: Run, tmp_path: Path, name: str) -> None:
    missing = tmp_path / "no-such-model"
    more = {"fuse": ["A", "B"], "adapter": ["A", "B"], "quantize": ["B"], "export": ["B"], "generate": ["text"]}
    flags = ["--data", tmp_path, "--out", tmp_path / "out"] if name in ("lora", "dpo") else []
    if name == "grpo":
        flags = ["--task", "arithmetic", "--out", tmp_path / "out"]
    if name == "kvp":
        assert run("kvp", "--init", tmp_path / "kvp.toml")[0] == 0
        more["kvp"], flags = [str(tmp_path / "kvp.toml")], ["--keep", 0.5, "--out", tmp_path / "out"]
    if name == "bench":
        flags = ["--out", tmp_path / "bench", "--against", "none"]
    if name == "synthesize":
        flags = ["--task", "arithmetic", "--measure", 1]
    by_name = run(name, "--model", missing, *more.get(name, []), *flags)
    assert by_name == run(name, missing, *more.get(name, []), *flags)
    assert by_name[0] == 2 and "no-such-model" in by_name[2] and by_name[2].count("\n") == 1


def test_an_adapter_may_be_named_by_an_option(run: Run, tmp_path: Path) -> None:
    model, adapter, fused = (str(tmp_path / name) for name in ("model", "adapter", "fused"))
    usual = run("fuse", model, adapter, fused, "--dtype", "float32")
    assert usual[0] == 2 and f"{model}: no such directory" in usual[2]
    for words in (
        [model, fused, "--adapter", adapter], [f"--adapter={adapter}", "--model", model, fused],
        ["--adapter", adapter, model, "--", fused], ["--model", model, adapter, fused],
    ):  # fmt: skip
        assert run("fuse", "--dtype", "float32", *words) == usual
    for words, says in (
        (["--adapter", adapter], "missing argument 'MODEL'"), ([model, "--adapter", adapter], "missing argument 'DST'"),
        ([model, fused, "--adapter"], "--adapter needs a path"), (["--adapter=A", "--adapter", "B"], "given twice"),
    ):  # fmt: skip
        code, _, err = run("fuse", *words)
        assert code == 2 and says in err and err.count("\n") == 1


def test_an_argument_has_the_option_that_other_commands_give_it_by() -> None:
    options = {name for command in COMMANDS.values() for each in command.params for name in each.opts}
    for name, command in COMMANDS.items():
        own = {option for each in command.params for option in each.opts}
        for each in command.params:
            word = (each.metavar or "").strip("[]…").lower()
            if each.param_type_name == "argument" and f"--{word}" in options:
                assert f"--{word}" in own, (name, word)


def test_a_recipe_may_be_named_by_an_option(run: Run, tmp_path: Path) -> None:
    for command in ("pretrain", "lr-sweep"):
        usual = run(command, tmp_path / "no.toml", "--out", tmp_path / "run")
        assert run(command, "--out", tmp_path / "run", "--config", tmp_path / "no.toml") == usual
        assert usual[0] == 2 and "no.toml" in usual[2]


def test_no_other_command_takes_it() -> None:
    named = {name for name, command in COMMANDS.items() if any(each.name == "model_by_name" for each in command.params)}
    assert named == WITH_MODEL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["M", "a", "-p", "b"], "the prompt is given twice"),
        (["M", "-p", "a", "-p", "b"], "the prompt is given twice"),
        (["--model", "M", "--model", "N", "a"], "--model is given twice"),
        (["M", "a", "--prompts", "f"], "give one of --prompt TEXT and --prompts FILE"),
        (["M", "a", "b"], "unexpected extra argument"),
        (["M", "--model"], "--model needs a path"),
        (["M", "a", "--temp"], "--temp"),
        (["M", "a", "--tmep", "1"], "no such option: --tmep; did you mean --temp?; elm-mlx generate -h"),
        (["M", "a", "--xyzzy"], "no such option: --xyzzy; elm-mlx generate -h"),
        (["M", "a", "--temp", "hot"], "'hot' is not a valid float"),
    ],
)
def test_a_wrong_command_line_is_one_line(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run("generate", *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and err.startswith("elm-mlx: ")


def test_a_wrong_command_names_the_nearest(run: Run) -> None:
    code, _, err = run("generat")
    assert code == 2 and "generate" in err and err.count("\n") == 1


def test_a_prompt_by_position_may_be_stdin(run: Run, tiny_model_dir: Path) -> None:
    code, out, _ = run("generate", tiny_model_dir, "-", "--json", "--max-tokens", 2, stdin="the fox\n")
    assert code == 0 and json.loads(out)["prompt"] == "the fox"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    def completed(line: str) -> str:
        words = line.split(" ")
        variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
        environment = os.environ | variables | {"_ELM_MLX_COMPLETE": f"complete_{shell}"}
        environment["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
        program = "from elm_mlx.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=60)
        return done.stdout.decode()

    names = completed("elm-mlx ")
    assert all(name in names for name in COMMANDS)
    assert "--temp" in completed("elm-mlx generate M --te") and "--top-k" not in completed("elm-mlx generate M --te")
    assert all(name in completed("elm-mlx lora M --optimizer ") for name in ("adamw", "adafactor"))
    assert "mxfp8" in completed("elm-mlx quantize M D --mode mx") and "affine" not in completed(
        "elm-mlx quantize M D --mode mx"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_one(shell: str, tmp_path: Path) -> None:
    program = "from elm_mlx.cli import main; main()"
    environment = os.environ | {"_ELM_MLX_COMPLETE": f"source_{shell}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=60)
    assert b"_ELM_MLX_COMPLETE=complete_" + shell.encode() in done.stdout
    if (found := shutil.which(shell)) is not None:
        subprocess.run([found, "-n"], input=done.stdout, check=True, timeout=60)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("[read] Unable to read from file."), r"MLX failed: \[read\] Unable to read .*--debug"),
        (ValueError("[reshape] Cannot reshape array of size 6"), r"MLX failed: \[reshape\] Cannot .*--debug"),
        (
            ValueError("[metal::malloc] No 7 bytes\nmore"),
            r"MLX failed: \[metal::malloc\] .*--debug",
        ),
        (MemoryError(), "out of memory; a smaller model, batch or context needs less .*--debug"),
        (ValueError("something else"), "a bug in elm-mlx: ValueError: something else .*--debug"),
        (RecursionError("too deep"), "a bug in elm-mlx: RecursionError: too deep .*--debug"),
    ],
)
def test_nothing_that_mlx_raises_is_a_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, error: Exception, line: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("elm_mlx.store.describe.describe", fail)
    code, out, err = run("info", tiny_model_dir)
    assert (code, out) == (1, "") and re.fullmatch(rf"elm-mlx: {line}.*\n", err), err
    with pytest.raises(type(error)):
        run("--debug", "info", tiny_model_dir)
