"""Chat templates as text: the same as transformers', and within limits whatever they do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hostile_templates
import pytest
from hostile_templates import TEMPLATES

from elm_mlx.errors import ElmError
from elm_mlx.text import child_process, jinja
from elm_mlx.text.jinja import LimitError

MESSAGES = [{"role": "user", "content": "Hi"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{{ 'x' * 10 ** 9 }}"

# Made by benchmarks/chat_templates.py: transformers' own renderings.
REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "chat_templates.json").read_text(encoding="utf-8"))


def render(source: str, where: str = "there.jinja") -> str:
    text = jinja.render(source, where, [(MESSAGES, True)], {})[0]
    if isinstance(text, jinja.Refusal):
        raise text
    return text


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process of this test alone, whose limits it may set."""
    jinja.stop()
    yield monkeypatch
    jinja.stop()


@pytest.mark.parametrize("name", REFERENCE["templates"])
def test_renders_what_transformers_renders(name):
    entry = REFERENCE["templates"][name]
    asked = [(messages, prompt) for messages in REFERENCE["conversations"] for prompt in (False, True)]
    texts = jinja.render(entry["template"], name, asked, REFERENCE["names"])
    expected = [text for pair in entry["rendered"] for text in pair]
    assert [None if isinstance(text, jinja.Refusal) else text for text in texts] == expected


def test_time_is_that_of_this_machine():
    before = time.strftime("%Y-%m-%d %H:%M")
    shown = render("{{ strftime_now('%Y-%m-%d %H:%M') }}")
    assert before <= shown <= time.strftime("%Y-%m-%d %H:%M")


def test_conversations_are_rendered_one_by_one():
    source = "{{ raise_exception('no') if messages | length == 2 }}{{ messages | length }}{{ add_generation_prompt }}"
    texts = jinja.render(source, "there.jinja", [(MESSAGES, True), (MESSAGES * 2, True), (MESSAGES * 3, False)], {})
    assert (texts[0], texts[2]) == ("1True", "3False")
    assert isinstance(texts[1], jinja.Refusal)
    assert str(texts[1]) == "there.jinja: the chat template fails: no"


class TestLimits:
    def test_no_hostile_template_exceeds_them(self, limits):
        """A third of them and shorter limits than users have; `python tests/hostile_templates.py` takes all."""
        limits.setattr(jinja, "SECONDS", 0.1)
        limits.setattr(jinja, "MEMORY", 80 << 20)
        for name, source in list(TEMPLATES.items())[::3]:
            jinja.render("", "", [], {})  # a process, whose start is not counted
            begin = time.perf_counter()
            try:
                assert len(render(source)) < 150_000, name
            except ElmError as error:
                assert re.fullmatch(r"there\.jinja: the chat template .{1,500}", str(error)), name
                assert str(error).isprintable(), name
            assert time.perf_counter() - begin < 2, name  # a busy machine is slow to end it

    def test_all_of_them_are_within_those_of_users(self):
        command = [sys.executable, hostile_templates.__file__, "doubled", "tojson", "lipsum", "many names", "set block"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        summary = re.fullmatch(r"5 templates: (\S+) s and (\d+) MB at most", printed.splitlines()[-1])
        assert summary is not None
        assert 2 <= float(summary[1]) < 4
        assert 50 < int(summary[2]) <= 215

    def test_memory_is_watched_where_the_kernel_does_not_limit_it(self, limits):
        limits.setattr(child_process, "KERNEL_LIMITS_MEMORY", False)
        limits.setattr(jinja, "SECONDS", 30)
        assert render("{{ messages[0].content }}") == "Hi"
        with pytest.raises(LimitError, match="needs more than 200 MB"):
            render(
                "{% set ns = namespace(s=[]) %}"
                + ENDLESS.replace("%}{% endfor", "%}{% set ns.s = [ns.s, 'x' * 9999 ~ b] %}{% endfor", 1)
            )
        assert render("{{ messages[0].content }}") == "Hi"

    def test_time_is_bounded(self, limits):
        limits.setattr(jinja, "SECONDS", 0.2)
        with pytest.raises(
            LimitError, match=r"takes more than 0\.2 s \(--template FILE takes another, --template none"
        ):
            render(ENDLESS)

    def test_time_is_that_of_one_rendering(self, limits):
        limits.setattr(jinja, "SECONDS", 0.3)
        assert render("x") == "x"
        time.sleep(0.5)
        assert render("y") == "y"

    def test_text_is_bounded_by_what_was_said(self):
        with pytest.raises(LimitError, match="writes without end"):
            render("{{ 'x' * 200000 }}")
        long = [{"role": "user", "content": "é" * 500_000}]
        assert jinja.render("{{ messages[0].content }}", "", [(long, True)], {}) == ["é" * 500_000]


class TestProcess:
    def test_next_template_gets_another_one(self):
        for source in (HUGE, "{{ 'x' * 200000 }}"):
            with pytest.raises(LimitError):
                render(source)
            assert render("{{ messages[0].content }}") == "Hi"

    def test_one_that_was_killed_is_replaced(self):
        render("x")
        process = jinja._process
        assert process is not None
        os.kill(process._process.pid, signal.SIGKILL)
        process._process.wait()
        assert render("y") == "y"

    def test_one_that_is_killed_meanwhile_is_named(self, limits):
        limits.setattr(jinja, "SECONDS", 30)
        render("x")
        process = jinja._process
        assert process is not None
        killer = threading.Timer(0.2, os.kill, (process._process.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(LimitError, match=r"ended the process that rendered it \(signal 9\)"):
            render(ENDLESS)
        killer.join()

    @pytest.mark.parametrize("written", ["", '{"rendered": ["Hi", "a', '{"rendered": ["Hi"]}'])
    def test_one_that_is_ended_amid_its_answer_has_given_none(self, limits, tmp_path, written):
        worker = tmp_path / "worker.py"
        worker.write_text(
            "import os, signal, sys\n"
            "print('{}', flush=True)\n"
            "sys.stdin.readline()\n"
            f"print({written!r}, end='', flush=True)\n"
            "os.kill(os.getpid(), signal.SIGALRM)\n"
        )
        limits.setattr(jinja.jinja_worker, "__file__", str(worker))
        with pytest.raises(LimitError, match=r"takes more than 2 s"):
            render("x")

    def test_interrupted_answer_is_not_taken_for_the_next(self, limits):
        limits.setattr(jinja, "SECONDS", 30)
        render("x")
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(KeyboardInterrupt):
                render(ENDLESS)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert render("y") == "y"

    def test_threads_share_it(self):
        texts: dict[int, str] = {}

        def work(number: int) -> None:
            for _ in range(20):
                texts[number] = render(f"{{{{ messages[0].content }}}}{number}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == {number: f"Hi{number}" for number in range(4)}

    def test_fork_has_its_own(self):
        program = (
            "import os\n"
            "from elm_mlx.text import jinja\n"
            "def show(text): print(jinja.render('{{ a }}', '', [([], True)], {'a': text}), flush=True)\n"
            "show('parent')\n"
            "child = os.fork()\n"
            "if child: os.waitpid(child, 0)\n"
            "show('parent again' if child else 'child')\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout.split("\n") == ["['parent']", "['child']", "['parent again']", ""], done.stderr

    def test_it_ends_with_its_parent(self):
        program = (
            "import os, signal\n"
            "from elm_mlx.text import jinja\n"
            "jinja.render('', '', [], {})\n"
            "print(jinja._process._process.pid, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        pid = int(done.stdout)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.02)
        pytest.fail("it goes on")

    def test_one_that_does_not_start_is_an_error(self, limits):
        limits.setattr(sys, "executable", "/bin/false" if Path("/bin/false").exists() else "/usr/bin/false")
        with pytest.raises(ElmError, match="does not start"):
            render("x")

    def test_nothing_starts_before_it_is_needed(self):
        program = (
            "from elm_mlx.text import chat_template, jinja; import sys; print(jinja._process, 'jinja2' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["None", "False"]
