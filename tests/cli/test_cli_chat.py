"""`elm-mlx chat` as people meet it: at a pseudo-terminal, and in a pipe."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
import tiny
from commands import Run

from elm_mlx.text.tokenizer import Tokenizer

ANSWER = "né 漢😀!"
PROMPT = "\n> "  # what ends all that is shown before a person may type

Start = Callable[..., pexpect.spawn]


@pytest.fixture(scope="module")
def speaking_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Answers by ANSWER, whatever is said."""
    model = tiny.spelling_model(tiny_tokenizer, ANSWER)
    return tiny.write_directory(
        tmp_path_factory.mktemp("speaking") / "speaker", model, tiny_tokenizer.path.read_bytes()
    )


@pytest.fixture(scope="module")
def endless_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Never comes to an end by itself."""
    model = tiny.spelling_model(tiny_tokenizer, "xyzx", context=200_000)
    path = tmp_path_factory.mktemp("endless") / "endless"
    return tiny.write_directory(path, model, tiny_tokenizer.path.read_bytes())


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home of its own, and a terminal without tricks."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_STATE", "NO_COLOR"))}
    cache = kept.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return kept | {
        "HOME": str(tmp_path), "XDG_CACHE_HOME": cache, "TERM": "dumb", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8",
        "INPUTRC": "/dev/null",
    }  # fmt: skip


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """Begins a session and waits for its prompt."""
    running: list[pexpect.spawn] = []

    def begin(model: Path, *flags: str, **variables: str) -> pexpect.spawn:
        arguments = ["-m", "elm_mlx", "chat", str(model), *flags]
        child = pexpect.spawn(
            sys.executable,
            arguments,
            cwd=environment["HOME"],
            env=environment | variables,
            encoding="utf-8",
            timeout=30,
            dimensions=(40, 200),
        )
        running.append(child)
        child.delaybeforesend = None
        child.expect_exact("> ")
        return child

    yield begin
    for child in running:
        child.close(force=True)


def say(child: pexpect.spawn, line: str) -> str:
    """Type a line, and return all that is shown until the next prompt."""
    child.sendline(line)
    child.expect_exact(line)
    child.expect(r"\r\n> $")
    return child.before.replace("\r\n", "\n").strip("\n")


def leave(child: pexpect.spawn) -> int:
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def piped(
    model: Path, text: str | bytes, *flags: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "elm_mlx", "chat", str(model), *flags],
        input=text.encode() if isinstance(text, str) else text, capture_output=True, env=environment, timeout=60,
    )  # fmt: skip


def test_pipe_gets_answers_alone(speaking_dir: Path, environment: dict[str, str]) -> None:
    done = piped(speaking_dir, "a\n\nb\nc", "--template", "openelm-instruct", environment=environment)
    assert done.stdout.decode() == f"{ANSWER}\n" * 3, "an empty line is no message, a last line without end is one"
    assert done.returncode == 0
    assert b"\x1b" not in done.stderr
    assert not (Path(environment["HOME"]) / ".local").exists(), "no history of a pipe"


def test_pipe_through_a_base_model(tiny_model_dir: Path, environment: dict[str, str]) -> None:
    flags = ("--seed", "3", "--max-tokens", "9", "--temp", "1")
    first = piped(tiny_model_dir, "the fox\nan old king\n", *flags, environment=environment)
    assert first.returncode == 0
    assert b"base model" in first.stderr and first.stdout.count(b"\n") >= 2
    assert piped(tiny_model_dir, "the fox\nan old king\n", *flags, environment=environment).stdout == first.stdout


def test_pipe_goes_on_after_a_message_that_cannot_be_taken(
    speaking_dir: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    text = "fox " * 600 + "\n/nonsense\n" + "fine\n"
    done = piped(speaking_dir, text.encode() + b"\xff\n", "--template", "openelm-instruct", environment=environment)
    assert done.stdout.decode() == f"{ANSWER}\n"
    errors = [line for line in done.stderr.decode().splitlines() if "float32" not in line]
    assert len(errors) == 3 and all(line.startswith("elm-mlx: ") for line in errors)
    assert "512" in errors[0] and "/nonsense" in errors[1] and "stdin, line 4: not UTF-8" in errors[2]
    assert done.returncode == 2


def test_what_a_template_raises_is_one_line_that_moves_no_cursor(speaking_dir: Path, tmp_path: Path, run: Run) -> None:
    source = tmp_path / "raising.jinja"
    source.write_text(
        "{{ raise_exception('\x1b]0;title\x07\u202eno\nmore ' ~ 'x' * 9999) if messages[-1].content == 'no' }}hi"
    )
    code, said, told = run("chat", speaking_dir, "--template", source, stdin="no\nyes\n")
    assert (code, said) == (2, f"{ANSWER}\n")
    (line,) = [line for line in told.splitlines() if "float32" not in line]
    assert line.startswith(f"elm-mlx: {source}: the chat template fails: \\x1b]0;title\\x07\\u202eno more xxx")
    assert line.isprintable() and len(line) < 600


def test_template_without_end_costs_its_message_and_not_the_chat(speaking_dir: Path, tmp_path: Path, run: Run) -> None:
    source = tmp_path / "endless.jinja"
    source.write_text("{{ 'x' * 10 ** 9 if messages[-1].content == 'no' }}hi")
    code, said, told = run("chat", speaking_dir, "--template", source, stdin="no\nyes\n")
    assert (code, said) == (2, f"{ANSWER}\n")
    assert f"{source}: the chat template needs more than 200 MB" in told


def test_commands_and_blocks_in_a_pipe(speaking_dir: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    path = tmp_path / "talk.json"
    text = f'//slash\n"""one\n/two\nthree"""\n"""alone"""\n/save {path}\n/stats\n"""to the\nend'
    done = piped(speaking_dir, text, "--template", "openelm-instruct", "--system", "kind", environment=environment)
    assert done.stdout.decode() == f"{ANSWER}\n" * 4, "what commands say is no answer"
    assert b"tokens/s" in done.stderr
    assert done.returncode == 0
    messages = json.loads(path.read_text("utf-8"))["messages"]
    assert [m["content"] for m in messages if m["role"] != "assistant"] == [
        "kind",
        "/slash",
        "one\n/two\nthree",
        "alone",
    ]
    assert {m["content"] for m in messages if m["role"] == "assistant"} == {ANSWER}


def test_empty_input(speaking_dir: Path, environment: dict[str, str]) -> None:
    done = piped(speaking_dir, "", environment=environment)
    assert (done.returncode, done.stdout) == (0, b"")


def test_reader_that_leaves_is_no_error(endless_dir: Path, environment: dict[str, str]) -> None:
    command = f"echo hi | {sys.executable} -m elm_mlx chat {endless_dir} --max-tokens 99999 | head -c 5"
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=environment, timeout=60)
    assert done.stdout == b"xyzxy"
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--temp", "-1"), "temp"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--stop", ""), "stop string"),
        (("--template", "nowhere.jinja"), "nowhere.jinja"),
        (("--compute-dtype", "int8"), "int8"),
    ],
)
def test_bad_flags(speaking_dir: Path, environment: dict[str, str], flags: tuple[str, ...], reason: str) -> None:
    done = piped(speaking_dir, "a\n", *flags, environment=environment)
    lines = [line for line in done.stderr.decode().splitlines() if "computed in" not in line]
    assert done.returncode == 2 and done.stdout == b""
    assert len(lines) == 1 and reason in lines[0]


def test_directory_without_tokenizer(speaking_dir: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / name).write_bytes((speaking_dir / name).read_bytes())
    for path, reason in ((tmp_path / "bare", "tokenizer"), (tmp_path / "none", "convert")):
        done = piped(path, "a\n", environment=environment)
        assert done.returncode == 2 and reason in done.stderr.decode() and done.stdout == b""


def test_conversation_at_a_terminal(speaking_dir: Path, start: Start) -> None:
    child = start(speaking_dir, "--template", "openelm-instruct")
    assert "speaker" in child.before and "/help" in child.before
    assert say(child, "hello") == ANSWER
    assert say(child, "漢字, ça va? 😀") == ANSWER
    assert say(child, "   ") == "", "an empty line is no message here"
    assert "in the cache" in (shown := say(child, "/stats")) and "tokens/s" in shown
    assert "no command /nonsense" in say(child, "/nonsense")
    assert say(child, "//nonsense") == ANSWER
    assert "/undo" in (shown := say(child, "/help")) and '"""' in shown
    assert say(child, "/retry") == ANSWER
    assert "//nonsense"[1:] in say(child, "/undo")
    assert "hello" not in say(child, "/undo")
    assert "hello" in say(child, "/undo")
    assert "nothing to undo" in say(child, "/undo")
    assert "no answer yet" in say(child, "/retry")
    assert leave(child) == 0


@pytest.mark.parametrize("typed", ["/quit", "exit", " :q"])
def test_quit(speaking_dir: Path, start: Start, typed: str) -> None:
    child = start(speaking_dir)
    if typed == "exit":
        assert say(child, '"""exit"""') == ANSWER
    child.sendline(typed)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_words_from_a_pipe_are_messages(speaking_dir: Path, environment: dict[str, str]) -> None:
    done = piped(speaking_dir, "exit\n/exit\nhello\n", "--template", "openelm-instruct", environment=environment)
    assert done.stdout.decode() == f"{ANSWER}\n" and done.returncode == 0


def test_base_model_says_so_and_goes_on_by_enter(endless_dir: Path, start: Start) -> None:
    child = start(endless_dir, "--max-tokens", "6")
    assert "base model" in child.before
    assert say(child, "once") == "xyzxyz"
    child.sendline("")
    child.expect_exact("xyzxyz")
    child.expect(r"\r\n> $")
    assert "Enter" in say(child, "/help")
    assert leave(child) == 0


def test_settings(speaking_dir: Path, tmp_path: Path, tiny_tokenizer: Tokenizer, start: Start) -> None:
    own = tmp_path / "own"
    tiny.write_directory(own, tiny.spelling_model(tiny_tokenizer, "abcdef"), tiny_tokenizer.path.read_bytes())
    child = start(own, "--template", "openelm-instruct", "--top-k", "9")
    shown = say(child, "/set")
    rows = {line.split()[0]: line.split()[1] for line in shown.splitlines()}
    assert rows == {
        "temp": "0.7", "top_p": "0.9", "top_k": "9", "min_p": "0.0", "repetition_penalty": "1.0", "max_tokens": "512",
        "seed": "none",
    }  # fmt: skip
    for wrong in ("temp hot", "temp -1", "temp nan", "temp", "top_k 1.5", "heat 3", "seed x", "max_tokens 0"):
        assert say(child, f"/set {wrong}").startswith("elm-mlx: "), wrong
    for unknown in ("system Be brief", "system"):
        assert say(child, f"/set {unknown}").startswith("elm-mlx: setting 'system' is not one of temp, top_p")
    assert say(child, "/set temp hot") == "elm-mlx: temp is 'hot': a number is needed"
    assert say(child, "/set max_tokens 3") == say(child, "/set seed 5") == ""
    assert say(child, "hello").startswith("abc\n(cut off after 3 tokens")
    assert "generation_config.json" in say(child, "/set save")
    assert leave(child) == 0
    saved = json.loads((own / "generation_config.json").read_text())
    assert (saved["max_new_tokens"], saved["top_k"], saved["temperature"]) == (3, 9, 0.7)
    again = start(own, "--temp", "0.1")
    shown = say(again, "/set")
    assert "max_tokens          3" in shown and "temp                0.1" in shown
    assert leave(again) == 0


def test_save_and_load(speaking_dir: Path, tmp_path: Path, start: Start) -> None:
    child = start(speaking_dir, "--template", "openelm-instruct")
    say(child, "hello")
    assert "saved to" in say(child, f"/save {tmp_path}/a talk.json")
    assert "needs a file" in say(child, "/save")
    assert "new conversation" in say(child, "/reset")
    assert "nothing to undo" in say(child, "/undo")
    assert "No such file" in say(child, "/load ~/nothing.json")
    assert say(child, "/load ~/a talk.json") == "(loaded: 1 message with its answer)"
    say(child, "hello")
    say(child, f"/save {tmp_path}/a talk.json")
    assert say(child, "/load ~/a talk.json") == "(loaded: 2 messages with their answers)"
    assert "hello" in say(child, "/undo")
    say(child, f"/save {tmp_path}/a talk.json")
    assert say(child, "/load ~/a talk.json") == "(loaded: 1 message with its answer)"
    say(child, "/reset")
    assert "a talk.json: holds another conversation; /load goes on with it" in say(child, "/save ~/a talk.json")
    say(child, "hello")
    assert "saved to" in say(child, "/save ~/a talk.json"), "it is the beginning of this one"
    say(child, "/reset")
    say(child, "other")
    assert "holds another conversation" in say(child, "/save ~/a talk.json")
    assert "saved to" in say(child, "/save ~/new.json")
    say(child, "/undo")
    assert "saved to" in say(child, "/save ~/new.json"), "it was saved by this one"
    assert leave(child) == 0


@pytest.mark.parametrize("drafts", [(), ("--prompt-lookup",)])
def test_ctrl_c_stops_the_answer_and_not_the_session(endless_dir: Path, start: Start, drafts: tuple[str, ...]) -> None:
    child = start(endless_dir, "--max-tokens", "150000", "--template", "openelm-instruct", *drafts)
    for _ in range(2):
        child.sendline("hello")
        child.expect_exact("xyzxyzxyz")
        child.sendintr()
        child.expect(r"\r\n> $")
    shown = say(child, "/stats")
    assert "context" in shown and ("tokens a pass" in shown) == bool(drafts)
    assert "(dropped: hello)" in say(child, "/undo"), "what had been said was kept"
    assert "(dropped: hello)" in say(child, "/undo")
    say(child, "/set max_tokens 5")
    assert say(child, "again").startswith("xyzxy\n")
    assert leave(child) == 0


def test_typing_ahead_does_not_show_amid_an_answer(endless_dir: Path, start: Start) -> None:
    child = start(endless_dir, "--max-tokens", "150000", "--template", "openelm-instruct")
    child.sendline("hello")
    child.expect_exact("xyzxyzxyz")
    child.sendline("/stats")
    time.sleep(0.2)
    child.sendintr()
    child.expect(r"([^\r]*)\r\n> ")
    assert set(child.match[1]) == set("xyz"), "no ^C either"
    assert leave(child) == 0


def test_ctrl_c_at_the_prompt_clears_the_line(speaking_dir: Path, start: Start) -> None:
    child = start(speaking_dir, "--template", "openelm-instruct")
    child.send("half a thou")
    child.expect_exact("half a thou")
    child.sendintr()
    child.expect(r"\r\n> $")
    child.sendline('"""a block')
    child.expect_exact("... ")
    child.sendintr()
    child.expect(r"\r\n> $")
    assert say(child, "hello") == ANSWER
    assert "hello" in say(child, "/undo")
    assert "nothing to undo" in say(child, "/undo")
    assert leave(child) == 0


def test_blocks_at_a_terminal(speaking_dir: Path, start: Start) -> None:
    child = start(speaking_dir, "--template", "openelm-instruct")
    child.sendline('"""one')
    child.expect_exact("... ")
    child.sendline('/two"""')
    child.expect_exact(ANSWER)
    child.expect(r"\r\n> $")
    assert "one" in say(child, "/undo")
    assert leave(child) == 0


def test_pasted_lines_are_one_message(speaking_dir: Path, start: Start, tmp_path: Path) -> None:
    child = start(speaking_dir, "--template", "openelm-instruct", TERM="xterm")
    if "\x1b[?2004h" not in child.before:
        pytest.skip("this readline has no bracketed paste")
    child.send("\x1b[200~one\ntwo\nthree\x1b[201~\r")
    child.expect_exact(ANSWER)
    child.expect_exact("> ")
    child.sendline("/save talk.json")
    child.expect_exact("saved to")
    child.expect_exact("> ")
    assert leave(child) == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"][0]["content"] == "one\ntwo\nthree"


def test_history_lasts(speaking_dir: Path, start: Start, tmp_path: Path) -> None:
    first = start(speaking_dir, "--template", "openelm-instruct")
    assert say(first, "hello 漢") == ANSWER
    first.send("\x1b[A")  # arrow up
    first.expect_exact("hello 漢")
    first.send("!\r")
    first.expect_exact(ANSWER)
    first.expect(r"\r\n> $")
    assert "hello 漢!" in say(first, "/undo")
    assert leave(first) == 0
    path = tmp_path / ".local" / "state" / "elm-mlx" / "chat_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.write_text("[" * 99_999 + '\nnot json\n3\n"\\u0000"\n"\\ud800"\n' + path.read_text())
    second = start(speaking_dir, "--template", "openelm-instruct")
    second.send("\x1b[A\x1b[A")
    second.expect_exact("hello 漢!")
    second.send("\r")
    second.expect_exact(ANSWER)
    second.expect(r"\r\n> $")
    assert leave(second) == 0


def test_long_history_is_cut(speaking_dir: Path, start: Start, tmp_path: Path) -> None:
    path = tmp_path / "state" / "elm-mlx" / "chat_history"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f'"line {number}"\n' for number in range(3000)))
    child = start(speaking_dir, XDG_STATE_HOME=str(tmp_path / "state"))
    assert leave(child) == 0
    assert path.read_text() == "".join(f'"line {number}"\n' for number in range(2000, 3000))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null", ""])
def test_home_that_cannot_be_written_to(speaking_dir: Path, start: Start, home: str) -> None:
    child = start(speaking_dir, "--template", "openelm-instruct", XDG_STATE_HOME=home, HOME=home or "/proc/nowhere")
    assert "elm-mlx:" not in child.before.replace("elm-mlx: bfloat16", "")
    assert say(child, "hello") == ANSWER
    child.send("\x1b[A")
    child.expect_exact("hello")
    child.send("\r")
    child.expect_exact(ANSWER)
    child.expect(r"\r\n> $")
    assert leave(child) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("busy", [False, True])
def test_told_to_leave(endless_dir: Path, start: Start, number: signal.Signals, busy: bool) -> None:
    child = start(endless_dir, "--max-tokens", "150000")
    if busy:
        child.sendline("hello")
        child.expect_exact("xyzxyzxyz")
    for _ in range(10):  # one that comes just before readline begins to wait is heard with the next key
        child.kill(number)
        if child.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=5) == 0:
            break
    child.close()
    assert child.exitstatus == 128 + number
    assert "Traceback" not in child.before


def test_terminal_that_goes_away_ends_the_session(endless_dir: Path, start: Start) -> None:
    child = start(endless_dir, "--max-tokens", "150000")
    child.sendline("hello")
    child.expect_exact("xyzxyzxyz")
    child.ptyproc.fileobj.close()
    deadline = time.monotonic() + 20
    while child.isalive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.exitstatus == 128 + signal.SIGHUP


def test_context_that_fills_says_so(tiny_model_dir: Path, start: Start) -> None:
    child = start(tiny_model_dir, "--template", "openelm-instruct", "--max-tokens", "40", "--seed", "1")
    lines = [say(child, f"message {number} " + "dogs " * 30) for number in range(6)]
    assert any(line.startswith("(context full: dropped the oldest") for line in lines)
    child.sendline("dogs " * 700)
    child.expect(r"the message has \d+ tokens, and the model's context is 512")
    child.expect(r"\r\n> $")
    assert "message 5" in say(child, "/undo"), "nothing was lost"
    assert leave(child) == 0


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, tiny_tokenizer: Tokenizer, start: Start) -> None:
    path = tmp_path / "rude"
    model = tiny.spelling_model(tiny_tokenizer, "a\x1b[2J\x07b")
    tiny.write_directory(path, model, tiny_tokenizer.path.read_bytes())
    child = start(path, "--template", "openelm-instruct")
    assert say(child, "hello") == "a[2Jb"
    assert leave(child) == 0


def test_a_message_on_the_command_line_is_said_first(speaking_dir: Path, environment: dict[str, str]) -> None:
    flags = ("/hello", "--template", "openelm-instruct")
    done = piped(speaking_dir, "more\n", *flags, environment=environment)
    assert (done.returncode, done.stdout.decode()) == (0, f"{ANSWER}\n" * 2), "and is no command"


def test_a_later_session_reads_only_what_is_new(
    tiny_model_dir: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    cache, line = str(tmp_path / "talk.cache"), "the quick brown fox jumps over lazy dogs\n"
    flags = ("--seed", "3", "--max-tokens", "5", "--temp", "0")
    first = piped(tiny_model_dir, line, *flags, "--save-cache", cache, environment=environment)
    assert first.returncode == 0 and Path(cache).exists()
    again = piped(tiny_model_dir, line + "/stats\n", *flags, "--load-cache", cache, environment=environment)
    assert again.returncode == 0 and again.stdout == first.stdout
    assert b" 1 read, " in again.stderr, again.stderr
    empty = piped(tiny_model_dir, "", "--save-cache", str(tmp_path / "empty"), environment=environment)
    assert empty.returncode == 0 and not (tmp_path / "empty").exists(), "nothing was read"
    Path(cache).write_bytes(b"x")
    done = piped(tiny_model_dir, line, "--save-cache", cache, environment=environment)
    assert done.returncode == 2 and b"exists, and is no saved cache" in done.stderr and not done.stdout


def test_a_conversation_in_few_bits(wide_model_dir: Path, tiny_model_dir: Path, environment: dict[str, str]) -> None:
    used = []
    for flags in ((), ("--kv-bits", "4")):
        done = piped(wide_model_dir, "the fox\n/stats\n", "--max-tokens", "5", *flags, environment=environment)
        assert done.returncode == 0
        used.append(float(re.search(rb"context .* ([\d.]+) MB", done.stderr)[1]))  # type: ignore[index]
    assert used[1] <= used[0] / 4
    done = piped(tiny_model_dir, "the fox\n", "--kv-bits", "8", environment=environment)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"heads of 16 values" in done.stderr


def test_a_conversation_without_end(tiny_model_dir: Path, environment: dict[str, str]) -> None:
    lines = "the quick brown fox jumps over lazy dogs\n" * 12 + "/stats\n"
    flags = ("--seed", "3", "--max-tokens", "60", "--temp", "1.5")
    usual = piped(tiny_model_dir, lines, *flags, environment=environment)
    assert usual.returncode == 0 and b"(context full: dropped the oldest" in usual.stderr
    done = piped(tiny_model_dir, lines, *flags, "--max-kv-size", "128", environment=environment)
    assert done.returncode == 0 and b"context full" not in done.stderr
    assert re.search(rb"context +\d+ of 128 tokens", done.stderr)
