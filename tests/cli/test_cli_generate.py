"""`elm-mlx generate` as people run it: in a shell, in a pipe, with a finger on Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from commands import Run, modules_of, packages

from elm_mlx import blas, cli, generate, stream_generate
from elm_mlx.store.loading import load
from elm_mlx.text.chat_template import choose
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx.version import __version__

ANSWER = "thequickbrownfoxs漢😀"
STATISTICS = re.compile(
    r"^prompt: \d+ tokens, [\d.]+ tokens/s \| generation: \d+ tokens, [\d.]+ tokens/s \| "
    r"first token: [\d.]+ s \| peak memory: (\d+\.\d\d) GB( \| ended by: (stop|length|context))?$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Answers by ANSWER, whatever is said."""
    model = tiny.spelling_model(tiny_tokenizer, ANSWER)
    return tiny.write_directory(tmp_path_factory.mktemp("speaker"), model, tiny_tokenizer.path.read_bytes())


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Never comes to an end by itself."""
    model = tiny.spelling_model(tiny_tokenizer, "xyzx", context=1_000_000)
    return tiny.write_directory(tmp_path_factory.mktemp("endless"), model, tiny_tokenizer.path.read_bytes())


def shell(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elm_mlx", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)  # type: ignore[call-overload, no-any-return]


def refused(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if "computed in float32" not in line]
    assert len(lines) == 1 and lines[0].startswith("elm-mlx: ")
    assert re.search(message, lines[0]), lines[0]


# --- what comes out


def test_text_goes_to_stdout_and_figures_to_stderr(speaker: Path) -> None:
    done = shell("generate", speaker, "--prompt", "\n")
    assert done.returncode == 0
    assert done.stdout == ANSWER + "\n"
    (figures,) = STATISTICS.finditer(done.stderr)
    assert figures[3] == "stop" and float(figures[1]) > 0
    assert "Traceback" not in done.stderr


def test_the_script_is_the_module(speaker: Path) -> None:
    script = shutil.which("elm-mlx", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the script is not installed beside this Python")
    arguments = ["generate", str(speaker), "--prompt", "\n"]
    done = subprocess.run([script, *arguments], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == shell(*arguments).stdout == ANSWER + "\n"


def test_it_says_what_python_says(run: Run, tiny_model_dir: Path) -> None:
    model, tokenizer = load(tiny_model_dir)
    assert tokenizer is not None
    flags = {"max_tokens": 20, "temp": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    code, out, _ = run("generate", tiny_model_dir, "--prompt", "the fox", "--seed", 7, *arguments)
    assert code == 0
    assert out == generate(model, tokenizer, "the fox", seed=7, **flags) + "\n"
    assert run("generate", tiny_model_dir, "--prompt", "the fox", "--seed", 7, *arguments)[1] == out
    assert run("generate", tiny_model_dir, "--prompt", "the fox", "--seed", 8, *arguments)[1] != out


def test_drafts_change_nothing_and_their_figures_are_shown(run: Run, endless: Path) -> None:
    flags = (endless, "-p", "xyzxyzxyz", "--max-tokens", 80)
    plain = run("generate", *flags)
    for drafts in (("--prompt-lookup",), ("--draft-model", endless), ("--prompt-lookup", "--num-draft-tokens", 3)):
        code, out, err = run("generate", *flags, *drafts)
        assert (code, out) == (0, plain[1])
        assert re.search(
            r"\| drafts: (\d+ of \d+ tokens right|none was worth it), \d\.\d\d tokens a pass \| first", err
        )
        result = json.loads(run("generate", *flags, *drafts, "--json")[1])
        assert set(result["drafts"]) == {"drafted", "accepted", "passes"}
    assert json.loads(run("generate", *flags, "--json")[1])["drafts"] is None


def test_drafts_that_cannot_be_are_refused(run: Run, endless: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "other"
    shutil.copytree(endless, tokenizer)
    (tokenizer / "tokenizer.model").write_bytes(tiny.with_piece(tiny.train_tokenizer(319), "ab "))
    for flags, message in (
        (("--draft-model", tmp_path / "none"), "none"),
        (("--draft-model", tokenizer), r"token \d+ is '.*' and the model's '.*': a draft needs the same vocabulary"),
        (("--draft-model", endless, "--prompt-lookup"), "give one of the two"),
        (("--num-draft-tokens", 3), "--prompt-lookup or --draft-model"),
        (("--prompt-lookup", "--num-draft-tokens", 99), "from 1 to 31"),
    ):
        refused(run("generate", endless, "-p", "x", *flags), message)
    (tmp_path / "prompts").write_text("a\nb\n")
    refused(run("generate", endless, "--prompts", tmp_path / "prompts", "--prompt-lookup"), "leave out --prompts")


def test_json_has_it_all(run: Run, tiny_model_dir: Path) -> None:
    code, out, err = run("generate", tiny_model_dir, "-p", "the 漢", "--max-tokens", 5, "--json")
    assert code == 0 and not STATISTICS.search(err)
    result = json.loads(out)
    model, tokenizer = load(tiny_model_dir)
    assert tokenizer is not None
    expected = list(stream_generate(model, tokenizer, "the 漢", max_tokens=5))
    assert result["prompt"] == "the 漢"
    assert result["text"] == "".join(response.text for response in expected)
    assert result["tokens"] == [response.token for response in expected]
    assert result["finish_reason"] == "length" and result["generation_tokens"] == 5
    assert result["prompt_tokens"] == len(tokenizer.encode("the 漢"))
    assert result["peak_memory"] > 0 and result["time_to_first_token"] > 0
    assert "logprobs" not in result
    result = json.loads(run("generate", tiny_model_dir, "-p", "the 漢", "--max-tokens", 5, "--json", "--logprobs")[1])
    assert result["logprobs"] == pytest.approx([response.logprob for response in expected], abs=1e-4)


def test_logprobs_are_a_line_a_token(run: Run, speaker: Path) -> None:
    code, out, err = run("generate", speaker, "--prompt", "\n", "--logprobs")
    assert code == 0 and STATISTICS.search(err)
    rows = [line.split(maxsplit=2) for line in out.splitlines()]
    assert "".join(json.loads(text) for _, _, text in rows) == ANSWER
    assert all(float(logprob) <= 0 for _, logprob, _ in rows)
    assert int(rows[-1][0]) == 2  # EOS


# --- by a chat template

QUESTION = "the fox"
TEMPLATED = "answered by the chat template; --no-template continues the text"


@pytest.fixture(scope="module")
def converser(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The tiny model with a template of its own."""
    path = Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("converser") / "model"))
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}[assistant]"
    (path / "chat_template.jinja").write_text(source)
    return path


def spoken(path: Path, *messages: tuple[str, str]) -> list[int]:
    """The ids of a conversation by the directory's own template."""
    tokenizer = Tokenizer.load(path)
    template = choose(path, tokenizer)
    assert template is not None
    return template.encode([{"role": role, "content": content} for role, content in messages])


def test_a_prompt_is_a_message_where_the_model_has_a_template(run: Run, converser: Path) -> None:
    model, tokenizer = load(converser)
    assert tokenizer is not None
    for flags, messages in (
        ((), [("user", QUESTION)]),
        (("--system", "be brief"), [("system", "be brief"), ("user", QUESTION)]),
    ):
        ids = spoken(converser, *messages)
        code, out, err = run("generate", converser, "-p", QUESTION, "--max-tokens", 9, *flags)
        assert code == 0 and out == generate(model, tokenizer, ids, max_tokens=9) + "\n"
        assert err.count(TEMPLATED) == 1 and f"prompt: {len(ids)} tokens" in err
        code, out, err = run("generate", converser, "-p", QUESTION, "--max-tokens", 9, "--json", *flags)
        expected = list(stream_generate(model, tokenizer, ids, max_tokens=9))
        assert json.loads(out)["tokens"] == [response.token for response in expected] and TEMPLATED in err
        assert json.loads(out)["prompt"] == QUESTION
        rows = run("generate", converser, "-p", QUESTION, "--max-tokens", 9, "--logprobs", *flags)[1].splitlines()
        assert [int(row.split()[0]) for row in rows] == [response.token for response in expected]


def test_several_messages_are_answered_each_alone(run: Run, converser: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the\nquick brown fox\n")
    flags = ("--max-tokens", 8, "--system", "be brief", "--json")
    code, out, err = run("generate", converser, "--prompts", tmp_path / "prompts.txt", *flags)
    assert code == 0 and err.count(TEMPLATED) == 1
    for line in map(json.loads, out.splitlines()):
        alone = json.loads(run("generate", converser, "-p", line["prompt"], *flags)[1])
        assert line["tokens"] == alone["tokens"] and line["prompt_tokens"] == alone["prompt_tokens"]


def test_a_message_may_come_from_a_pipe(run: Run, converser: Path) -> None:
    flags = ("--max-tokens", 5, "--json")
    piped = json.loads(run("generate", converser, "-p", "-", *flags, stdin=QUESTION + "\n")[1])
    assert piped["tokens"] == json.loads(run("generate", converser, "-p", QUESTION, *flags)[1])["tokens"]


def test_a_text_is_continued_all_the_same_if_asked(run: Run, converser: Path, tiny_model_dir: Path) -> None:
    base = run("generate", tiny_model_dir, "-p", QUESTION, "--max-tokens", 9)
    assert base[0] == 0 and "template" not in base[2]
    for flags in (["--no-template"], ["--template", "none"]):
        code, out, err = run("generate", converser, "-p", QUESTION, "--max-tokens", 9, *flags)
        assert (code, out) == (0, base[1]) and "template" not in err


def test_a_base_model_may_be_given_a_template(run: Run, converser: Path, tiny_model_dir: Path, speaker: Path) -> None:
    given = run("generate", tiny_model_dir, "-p", "x", "--template", converser / "chat_template.jinja", "--json")[1]
    own = run("generate", converser, "-p", "x", "--json")[1]
    assert json.loads(given)["tokens"] == json.loads(own)["tokens"]
    code, out, err = run("generate", speaker, "-p", "x", "--template", "openelm-instruct")
    assert (code, out) == (0, ANSWER + "\n") and TEMPLATED in err


def test_what_the_template_ends_an_answer_by_ends_it(run: Run, speaker: Path, tmp_path: Path) -> None:
    """A token that no EOS is, and a text; beside those that were asked for."""
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    path = Path(shutil.copytree(speaker, tmp_path / "model"))
    config = json.loads((path / "config.json").read_text()) | {"eos_token_id": 0}
    (path / "config.json").write_text(json.dumps(config))
    turns = "{% for m in messages %}{{ m.content }}END{{ '\n' }}{% endfor %}"
    (path / "chat_template.jinja").write_text(turns.replace("END", "</s>"))
    for prompts in (["-p", "a"], ["--prompts", tmp_path / "prompts.txt"]):
        for line in run("generate", path, *prompts, "--json", "--max-tokens", 99)[1].splitlines():
            assert json.loads(line)["text"] == ANSWER and json.loads(line)["finish_reason"] == "stop"
    (path / "chat_template.jinja").write_text(turns.replace("END", "kbr"))
    assert run("generate", path, "-p", "a")[1] == "thequic\n"
    assert run("generate", path, "-p", "a", "--stop", "qu")[1] == "the\n"


def test_on_a_terminal_an_answer_begins_its_own_line(speaker: Path, tmp_path: Path) -> None:
    def shown(*flags: str) -> str:
        ours, terminal = pty.openpty()
        command = [sys.executable, "-m", "elm_mlx", "generate", str(speaker), "-p", "say\n", *flags]
        subprocess.run(command, stdout=terminal, stderr=subprocess.DEVNULL, check=True, timeout=60)
        text = os.read(ours, 1 << 16).decode()
        os.close(terminal)
        os.close(ours)
        return re.sub(r"\x1b\[\d*m", "", text).replace("\r\n", "\n")

    assert shown() == f"say\n{ANSWER}\n"
    assert shown("--template", "openelm-instruct") == f"say\n\n{ANSWER}\n"


def test_stop_strings_may_be_repeated(run: Run, speaker: Path) -> None:
    assert run("generate", speaker, "--prompt", "\n", "--stop", "foxs", "--stop", "kbr")[1] == "thequic\n"


def test_the_prompt_may_come_from_a_pipe(speaker: Path, tiny_model_dir: Path) -> None:
    by_pipe = shell("generate", tiny_model_dir, "--prompt", "-", "--max-tokens", 9, "--json", input="the fox\n")
    assert json.loads(by_pipe.stdout)["prompt"] == "the fox"  # without what `echo` adds
    by_flag = shell("generate", tiny_model_dir, "--prompt", "the fox", "--max-tokens", 9, "--json")
    assert json.loads(by_pipe.stdout)["text"] == json.loads(by_flag.stdout)["text"]


def test_an_empty_prompt_begins_a_text(run: Run, tiny_model_dir: Path) -> None:
    code, out, _ = run("generate", tiny_model_dir, "--prompt", "", "--max-tokens", 3, "--json")
    assert code == 0 and json.loads(out)["prompt_tokens"] == 1


def test_several_prompts_say_what_each_alone_would(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    prompts = ["the", "quick brown fox jumps", "漢字"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff".encode() + "\r\n\n".join(prompts).encode() + b"\n")
    code, out, _ = run("generate", tiny_model_dir, "--prompts", file, "--max-tokens", 12, "--json")
    assert code == 0
    for prompt, line in zip(prompts, out.splitlines(), strict=True):
        alone = json.loads(run("generate", tiny_model_dir, "--prompt", prompt, "--max-tokens", 12, "--json")[1])
        together = json.loads(line)
        assert {key: together[key] for key in ("prompt", "text", "tokens", "finish_reason", "prompt_tokens")} == {
            key: alone[key] for key in ("prompt", "text", "tokens", "finish_reason", "prompt_tokens")
        }
    code, out, _ = run("generate", tiny_model_dir, "--prompts", file, "--max-tokens", 12)
    assert [line for line in out.splitlines() if line.startswith("--- ")] == [
        f"--- {number}: {prompt}" for number, prompt in enumerate(prompts, start=1)
    ]


def test_json_lines_may_hold_any_text(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    prompts = ["two\nlines", "a \u2028 separator\x0c and a form feed", ""]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(json.dumps({"prompt": text, "id": 1}, ensure_ascii=False) for text in prompts))
    code, out, _ = run("generate", tiny_model_dir, "--prompts", file, "--max-tokens", 2, "--json")
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.split("\n")[:-1]] == prompts


def test_the_directorys_settings_hold_unless_a_flag_says_else(run: Run, speaker: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(speaker, tmp_path / "model"))
    (path / "generation_config.json").write_text('{"max_new_tokens": 3}')
    assert run("generate", path, "--prompt", "\n")[1] == "theq\n"
    assert run("generate", path, "--prompt", "\n", "--max-tokens", 2)[1] == "the\n"
    (path / "generation_config.json").write_text('{"top_p": 7}')
    refused(run("generate", path, "--prompt", "\n"), "top_p is 7")
    (path / "generation_config.json").write_text("{")
    refused(run("generate", path, "--prompt", "\n"), r"generation_config\.json: not JSON")


def test_a_compute_dtype_is_obeyed(run: Run, speaker: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        code, out, err = run("generate", speaker, "--prompt", "\n", "--compute-dtype", dtype)
        assert (code, out) == (0, ANSWER + "\n")
        stored = dtype == "bfloat16" and blas.reads_stored()
        assert ("computed in float32, " in err) == ("computed in" in err) == stored
        assert ("prompts in bfloat16" in err) == (stored and blas.rounds_rows())


def test_a_terminal_that_cannot_show_a_character_shows_question_marks(speaker: Path) -> None:
    done = shell("generate", speaker, "--prompt", "\n", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "thequickbrownfoxs??\n")


# --- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --prompt TEXT and --prompts FILE"),
        (["--prompt", "x", "--prompts", "y"], "give one of --prompt TEXT and --prompts FILE"),
        (["--prompts", "y", "--logprobs"], "--logprobs with --prompts needs --json"),
        (["--prompts", "nowhere.txt"], r"nowhere\.txt: cannot be read: .*No such file"),
        (["--prompt", "fox " * 500], r"the prompt has \d+ tokens, and the model's context is 512"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens is 0"),
        (["--prompt", "x", "--temp", "nan"], "temp is nan"),
        (["--prompt", "x", "--temp", "-1"], "temp is -1"),
        (["--prompt", "x", "--top-p", "0"], "top_p is 0"),
        (["--prompt", "x", "--top-k", "-1"], "top_k is -1"),
        (["--prompt", "x", "--min-p", "2"], "min_p is 2"),
        (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["--prompt", "x", "--prefill-step", "0"], "prefill_step is 0"),
        (["--prompt", "x", "--temp", "1", "--seed", "-1"], "seed is -1"),
        (["--prompt", "x", "--stop", ""], "a stop string is empty"),
        (["--prompt", "x", "--compute-dtype", "int4"], "--compute-dtype int4: is not one of float32"),
        (["--prompt", "x", "--system", "be brief"], "--system needs a chat template"),
        (["--prompt", "x", "--template", "none", "--system", "be brief"], "--system needs a chat template"),
        (
            ["--prompt", "x", "--template", "nowhere"],
            "nowhere: not a chat template: give openelm-instruct, none, or a file",
        ),
        (["--prompt", "x", "--template", "none", "--no-template"], "give --template or --no-template"),
        (["--prompt", "x\udcff"], "the text is not valid Unicode: character 2"),
    ],
    ids=lambda value: " ".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_2(run: Run, tiny_model_dir: Path, arguments: list[str], message: str) -> None:
    refused(run("generate", tiny_model_dir, *arguments), message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no prompts"),
        ("p.txt", b"\n \n\t\n", "holds no prompts"),
        ("p.txt", b"\xff\xfe", "not UTF-8 but UTF-16"),
        ("p.jsonl", b'\n{"prompt": "a"}\n\n{"prompt"', r"p\.jsonl, line 4: not JSON"),
        ("p.jsonl", b"\n" * 9 + b'{"text": "a"}', r"p\.jsonl, line 10: is not an object with a string `prompt`"),
        ("p.jsonl", b'{"prompt": 7}', "line 1: is not an object"),
        ("p.jsonl", b"[]", "line 1: is not an object"),
        ("p.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_a_file_of_prompts_that_makes_no_sense(
    run: Run, tiny_model_dir: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(run("generate", tiny_model_dir, "--prompts", tmp_path / name), message)


def test_a_directory_that_is_none(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    refused(run("generate", tmp_path / "nowhere", "--prompt", "x"), "nowhere: no such directory")
    refused(run("generate", tmp_path, "--prompt", "x"), r"holds no config\.json")
    path = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (path / "tokenizer.model").unlink()
    refused(run("generate", path, "--prompt", "x"), r"holds no tokenizer\.model, .* with --tokenizer")
    shutil.copy(tiny_model_dir / "tokenizer.model", path)
    (path / "model.safetensors").write_bytes(b"{}")
    refused(run("generate", path, "--prompt", "x"), r"model\.safetensors: ")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = shell("--debug", "generate", tmp_path / "nowhere", "--prompt", "x")
    assert done.returncode != 0 and done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("elm_mlx.errors.InputError: ")
    done = shell("generate", tmp_path / "nowhere", "--prompt", "x")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--max-tokens", "many"], ["--bogus"], ["--temp"]])
def test_a_flag_that_is_wrong_is_a_usage_error(run: Run, tiny_model_dir: Path, arguments: list[str]) -> None:
    code, out, err = run("generate", tiny_model_dir, "--prompt", "x", *arguments)
    assert code == 2 and out == "" and arguments[0] in err and "Traceback" not in err


def test_the_command_explains_itself(run: Run) -> None:
    assert run("--version")[:2] == (0, f"elm-mlx {__version__}\n")
    code, out, _ = run("generate", "--help")
    assert code == 0
    for flag in ("max-tokens", "temp", "top-p", "top-k", "min-p", "repetition-penalty", "seed", "stop", "json",
                 "logprobs", "prefill-step", "prompts", "compute-dtype"):  # fmt: skip
        assert f"--{flag}" in out


@pytest.mark.parametrize("flags", [[], ["--logprobs"]])
def test_who_has_read_enough_may_go(endless: Path, flags: list[str]) -> None:
    command = [sys.executable, "-m", "elm_mlx", "generate", str(endless), "--prompt", "\n", *flags]
    command += ["--max-tokens", "900000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode != 0
    assert "Traceback" not in err and "Exception" not in err and "Error" not in err


def test_closed_streams_are_no_error(speaker: Path) -> None:
    for closed in ("<&-", ">&-", "<&- >&-"):
        command = f"{sys.executable} -m elm_mlx generate {speaker} --prompt Z {closed}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0 and STATISTICS.search(done.stderr)
        assert done.stdout == ("" if ">" in closed else ANSWER + "\n")


def test_a_full_disk_is_one_line(speaker: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    for flags in ([], ["--json"]):
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "elm_mlx", "generate", str(speaker), "--prompt", "\n", *flags]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert "No space left" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("flags", [[], ["--logprobs"]])
def test_ctrl_c_ends_it_with_what_there_is_to_say(endless: Path, flags: list[str]) -> None:
    command = [sys.executable, "-m", "elm_mlx", "generate", str(endless), "--prompt", "\n", *flags]
    command += ["--max-tokens", "900000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        begun = b""
        while len(begun) < 500:  # MLX's first compilation asks for g++ by system(), during which signals are lost
            read = os.read(process.stdout.fileno(), 500)  # past Python's buffer, which `communicate` forgets
            assert read
            begun += read
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert flags or out.endswith("\n")
    (figures,) = STATISTICS.finditer(err)
    assert figures[2] is None and float(figures[1]) > 0
    assert "Traceback" not in err


def test_a_bar_stands_for_texts_that_go_into_a_file(speaker: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    ours, terminal = pty.openpty()
    command = [sys.executable, "-m", "elm_mlx", "generate", speaker, "--prompts", tmp_path / "prompts.txt"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([*map(str, command)], stdout=out, stderr=terminal, env=environment, check=True, timeout=60)
    shown = os.read(ours, 1 << 16).decode()
    os.close(terminal)
    os.close(ours)
    assert "3/3" in shown and "3 prompts:" in shown
    assert (tmp_path / "out").read_text("utf-8").count("--- ") == 3


def test_nothing_heavy_is_imported(speaker: Path) -> None:
    out, code, modules = modules_of("generate", speaker, "--prompt", "\n")
    assert (out, code) == (ANSWER + "\n", 0)
    found = packages(modules)
    heavy = {"mlx_lm", "transformers", "huggingface_hub", "tokenizers", "pyarrow", "matplotlib", "torch", "yaml"}
    assert not found & heavy
    assert {"mlx", "sentencepiece"} <= found
    shared = {"__init__", "options", "screen", "generate"}
    commands = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - shared
    assert "lora" in commands
    assert not {f"elm_mlx.cli.{command}" for command in commands} & modules  # the other commands' options
    assert "elm_mlx.store.adapters" not in modules


# --- saved caches


def test_a_document_is_read_once_and_asked_many_times(tiny_model_dir: Path, tmp_path: Path, run: Run) -> None:
    document, cache = "the quick brown fox jumps over lazy dogs, " * 12, tmp_path / "fox.cache"
    code, first, _ = run("generate", tiny_model_dir, document, "--save-cache", cache, "--max-tokens", 3)
    assert code == 0 and cache.exists()
    for question in ("while an old king", "the naïve cafés"):
        command = ("generate", tiny_model_dir, document + question, "--max-tokens", 9, "--logprobs")
        _, expected, _ = run(*command)
        code, out, err = run(*command, "--load-cache", cache)
        assert code == 0 and out == expected
        assert re.search(r"^prompt: \d+ tokens, 256 of them from the cache, [\d.]+ tokens/s", err, re.MULTILINE), err
    code, out, err = run("generate", tiny_model_dir, document, "--max-tokens", 3, "--load-cache", cache, "--json")
    assert json.loads(out)["text"] + "\n" == first and json.loads(out)["cached_tokens"] == 256


def test_lines_of_a_file_may_go_on_from_one_document(tiny_model_dir: Path, tmp_path: Path, run: Run) -> None:
    document, cache = "the quick brown fox jumps over lazy dogs, " * 12, tmp_path / "fox.cache"
    run("generate", tiny_model_dir, document, "--save-cache", cache, "--max-tokens", 1)
    (tmp_path / "p.txt").write_text(f"{document}while an old king\n{document}told stories\nthe fox\n")
    command = ("generate", tiny_model_dir, "--prompts", tmp_path / "p.txt", "--max-tokens", 5, "--json")
    assert run(*command, "--load-cache", cache)[1] == run(*command)[1]
    refused(run(*command, "--save-cache", cache), "--save-cache keeps one prompt, and --prompts has several")


def test_a_cache_that_is_another_models_is_one_line(
    tiny_model_dir: Path, speaker: Path, tmp_path: Path, run: Run
) -> None:
    cache = tmp_path / "fox.cache"
    run("generate", tiny_model_dir, "the quick", "--save-cache", cache, "--max-tokens", 1)
    refused(run("generate", speaker, "the", "--load-cache", cache), "fox.cache: a cache of another model")
    refused(
        run("generate", speaker, "the", "--load-cache", tmp_path / "x"), "/x: cannot be opened|/x: .*[Nn]o such file"
    )
    (tmp_path / "mine").write_text("mine")
    refused(run("generate", speaker, "the", "--save-cache", tmp_path / "mine"), "exists, and is no saved cache")
    cache.write_bytes(cache.read_bytes()[:-1])
    refused(run("generate", tiny_model_dir, "the", "--load-cache", cache), "fox.cache: its tensors take")


# --- keys and values in few bits


def test_keys_in_few_bits_are_asked_for(wide_model_dir: Path, tiny_model_dir: Path, tmp_path: Path, run: Run) -> None:
    command, cache = ("generate", wide_model_dir, "the quick", "--max-tokens", 6, "--logprobs"), tmp_path / "c"
    texts = [run(*command, *flags)[1] for flags in ((), ("--kv-bits", 8), ("--kv-bits", 4))]
    assert len(set(texts)) == 3, "the log-probabilities differ"
    assert run(*command, "--kv-bits", 8, "--save-cache", cache)[1] == texts[1]
    refused(run(*command, "--load-cache", cache), "holds 'keys and values in 8 bits', and keys and values are wanted")
    assert run(*command, "--kv-bits", 8, "--load-cache", cache)[1] == texts[1]
    refused(run(*command, "--kv-bits", 5), "--kv-bits 5: 8 or 4 are possible")
    refused(run("generate", tiny_model_dir, "the", "--kv-bits", 8), "--kv-bits: heads of 16 values cannot be quantized")
    (tmp_path / "p.txt").write_text("the quick\nfox\n")
    code, out, _ = run(
        "generate", wide_model_dir, "--prompts", tmp_path / "p.txt", "--kv-bits", 4, "--json", "--logprobs"
    )
    shown = [float(line.split()[1]) for line in texts[2].splitlines()]
    assert code == 0 and json.loads(out.splitlines()[0])["logprobs"][:6] == pytest.approx(shown, abs=1e-3)


# --- texts without end


def test_a_text_goes_on_past_the_context(
    tiny_model_dir: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, run: Run
) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "xyzx", context=128)
    path = tiny.write_directory(tmp_path / "round", model, tiny_tokenizer.path.read_bytes())
    command, flags = ("generate", path, "\n", "--max-tokens", 700, "--json"), ("--max-kv-size", 64)
    ended, streamed = json.loads(run(*command)[1]), json.loads(run(*command, *flags)[1])
    assert ended["finish_reason"] == "context" and ended["generation_tokens"] < 128
    assert streamed["finish_reason"] == "length" and streamed["generation_tokens"] == 700
    assert streamed["text"].startswith(ended["text"])
    guessed = json.loads(run(*command, *flags, "--prompt-lookup")[1])
    assert guessed["text"] == streamed["text"] and guessed["drafts"]["accepted"] > 0
    code, _, err = run("generate", tiny_model_dir, "the quick brown fox " * 200, "--max-tokens", 5, *flags)
    assert code == 0 and re.search(r"the prompt has \d+ tokens: of them 4 and the last are in view, 64 at most", err)
    (tmp_path / "p.txt").write_text("the\nfox\n")
    for other, reason in (
        (("--max-kv-size", 9), "--max-kv-size 9: 32 to 512 are possible for this model"),
        ((*flags, "--kv-bits", 8), "cannot be in --kv-bits: choose one"),
        ((*flags, "--save-cache", tmp_path / "c"), "a saved cache holds a whole text"),
    ):
        refused(run("generate", tiny_model_dir, "the", *other), reason)
    refused(run("generate", tiny_model_dir, "--prompts", tmp_path / "p.txt", *flags), "is for one text without end")
