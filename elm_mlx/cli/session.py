"""A chat at a terminal, with editing and a history that lasts, or through a pipe.

The conversation itself is `inference.conversation`. Answers go to stdout and all else to stderr, so that a pipe gets
answers alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

import typer

from elm_mlx import files, reading
from elm_mlx.cli.screen import Speech, counted, folded, note, show_sources, visible
from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.conversation import DEFAULTS, Chat, Reply
from elm_mlx.inference.sampling import save_settings
from elm_mlx.store.model_names import name_of

BLOCK = '"""'
_KEPT = 1000  # lines of history
_LEAVING = ("exit", "quit", ":q")  # typed alone at a terminal by who is used to other programs

HELP = f"""\
/undo        drop the last message and its answer
/retry       answer the last message anew
/reset       drop everything but the system prompt
/save FILE   write the conversation to a JSON file
/load FILE   go on with the conversation in such a file
/set         show the settings; /set temp 0.7 changes one, /set save keeps all
/stats       show tokens, speed and memory
/quit        leave; so do /exit, Ctrl-D, and exit, quit or :q alone
Ctrl-C       stop an answer, and keep what was said of it; clear a line
{BLOCK}          begins a message of several lines, and ends it
//           begins a message that begins with a /"""
HELP_CONTINUING = """
Enter        alone: let the model go on
a space      at the beginning: go on where the text ends, not in a new line"""

MEANINGS = {
    "temp": "temperature; 0 takes the likeliest token",
    "top_p": "keep the likeliest tokens that reach this probability",
    "top_k": "keep this many of the likeliest tokens; 0 keeps all",
    "min_p": "drop tokens below this share of the likeliest one's probability",
    "repetition_penalty": "penalty on tokens among the last 64; 1 is none",
    "max_tokens": "tokens of an answer, at most",
    "seed": "the same seed gives the same answers; none is random",
}


class Session:
    """A conversation with whoever types; `directory` is the model's, where settings are kept; `first` is said."""

    def __init__(self, chat: Chat, directory: Path, first: str | None = None) -> None:
        self._chat = chat
        self._directory = directory
        self._first = first
        self._interactive = interactive()
        self._lines = Terminal() if self._interactive else Pipe()
        self._exit_code = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "undo": self._undo, "retry": self._retry, "reset": self._reset, "save": self._save, "load": self._load,
            "set": self._set, "stats": self._stats, "help": self._help, "quit": self._quit, "exit": self._quit,
        }  # fmt: skip

    def run(self) -> int:
        """Talks until the end of the input. Returns the exit code: that of the last message that could not be taken."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, _leave)
        self._greet()
        while True:
            try:
                text, literal = self._message()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print()
                continue
            except InputError as error:  # what is no text
                self._fail(error)
                continue
            try:
                self._take(text, literal)
            except EOFError:  # /quit and its like
                return self._exit_code
            except KeyboardInterrupt:  # before an answer began
                if not self._interactive:
                    raise
                print()
            except ElmError as error:
                self._fail(error)
        if self._interactive:
            print()  # the shell's prompt should not stand beside ours
        return self._exit_code

    def _greet(self) -> None:
        name = name_of(self._directory)
        if self._chat.continues:
            what = f"{name} is a base model: it continues what you write."
        else:
            what = f"Talking to {name}."
        if self._interactive or self._chat.continues:
            self._note(what + " /help shows the commands." * self._interactive)

    def _message(self) -> tuple[str, bool]:
        """Reads a message. Returns it, and whether it is to be taken as it is. Raises EOFError at the end."""
        if self._first is not None:
            text, self._first = self._first, None
            if self._interactive:
                print("> " + visible(text))
            return text, True
        line = self._lines.read("> ")
        if not line.startswith(BLOCK):
            return line, False
        lines, line = [], line[len(BLOCK) :]
        while not line.rstrip().endswith(BLOCK):
            lines.append(line)
            try:
                line = self._lines.read("... ")
            except EOFError:
                return "\n".join(lines).strip("\n"), True
        lines.append(line.rstrip()[: -len(BLOCK)])
        return "\n".join(lines).strip("\n"), True

    def _take(self, text: str, literal: bool) -> None:
        if self._interactive and not literal and text.strip() in _LEAVING:
            raise EOFError
        if text.startswith("/") and not literal and not text.startswith("//"):
            name, _, rest = text[1:].partition(" ")
            if name not in self._commands:
                raise InputError(f"no command /{name}: /help lists them; a message may begin with //")
            self._commands[name](rest.strip())
            return
        if text.startswith("//") and not literal:
            text = text[1:]
        if text.strip():
            self._show(self._chat.ask(text))
        elif self._interactive and self._chat.continues:
            self._show(self._chat.ask(""))

    def _show(self, reply: Reply) -> None:
        if reply.forgotten:
            self._note(f"(context full: dropped the oldest {reply.forgotten})")
        speech, said = Speech(), False
        try:
            with self._interruptible() as stopped, closing(reply.stream(stopped)) as pieces:
                for piece in pieces:
                    said = True
                    speech.write(piece)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
        except RuntimeError as error:  # MLX's, such as memory that is not there
            self._fail(ElmError(f"the answer failed: {error}"))
        speech.finish()
        if not (said and speech.at_line_start):
            print(flush=True)
        self._explain(reply, said)
        if self._chat.documents is not None:
            sys.stdout.flush()
            show_sources(self._chat.documents, reply.sources)

    def _explain(self, reply: Reply, said: bool) -> None:
        """Prints how the answer ended, where that is not plain to see."""
        stays = len(self._chat.exchanges) > len(reply.before)
        if reply.finish_reason is None or (reply.finish_reason == "interrupted" and not said):
            self._note(f"(stopped: {'the earlier answer stays' if stays else 'your message is dropped, too'})")
        elif reply.finish_reason == "stop" and not said:
            self._note("(the model says nothing)")
        elif reply.finish_reason == "length" and not self._chat.continues:
            self._note(
                f"(cut off after {counted(reply.statistics.generated_tokens, 'token')}: /set max_tokens allows more)"
            )
        elif reply.finish_reason == "context" and not self._chat.continues:
            self._note("(cut off: the context is full)")

    @contextmanager
    def _interruptible(self) -> Iterator[Callable[[], bool]]:
        """At a terminal, the first Ctrl-C asks the answer to stop; a second one does not wait for that."""
        if not self._interactive:
            yield lambda: False
            return
        pressed = False

        def press(number: int, frame: FrameType | None) -> None:
            nonlocal pressed
            if pressed:
                raise KeyboardInterrupt
            pressed = True

        before = signal.signal(signal.SIGINT, press)
        try:
            with without_echo():
                yield lambda: pressed
        finally:
            signal.signal(signal.SIGINT, before)

    def _undo(self, rest: str) -> None:
        dropped = self._chat.undo().question
        self._note(f"(dropped: {dropped[:60]}{'…' * (len(dropped) > 60)})")

    def _retry(self, rest: str) -> None:
        if self._chat.options["temp"] == 0:
            self._note("(temp is 0: the answer will be the same)")
        self._show(self._chat.retry())

    def _reset(self, rest: str) -> None:
        self._chat.reset()
        self._note("(a new conversation)")

    def _save(self, rest: str) -> None:
        path = _file(rest, "save")
        self._chat.save(path)
        self._note(f"(saved to {path})")

    def _load(self, rest: str) -> None:
        self._chat.load(_file(rest, "load"))
        count = len(self._chat.exchanges)
        self._note(f"(loaded: {'1 message with its answer' if count == 1 else f'{count} messages with their answers'})")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            for name in (*DEFAULTS, "seed"):
                value = str(self._chat.options[name] if name in DEFAULTS else self._chat.seed).lower()
                self._note(f"{name:<18}  {value:<8}  {MEANINGS[name]}")
        elif name == "save" and not value:
            self._note(f"(saved to {save_settings(self._directory, self._chat.options)})")
        elif name not in MEANINGS:
            raise InputError(f"setting {name!r} is not one of {', '.join(MEANINGS)}")
        elif not value.strip():
            raise InputError(f"/set {name} needs a value")
        elif name == "seed":
            self._chat.seed = _seed(value.strip())
        else:
            self._chat.set(name, _number(name, value))

    def _stats(self, rest: str) -> None:
        chat, last = self._chat, self._chat.last
        cache = chat.cache.caches[0]
        used, context = cache.offset, cache.limit or chat.model.config.max_context_length
        self._note(f"context       {used} of {context} tokens, {chat.cache.nbytes / 1e6:.1f} MB")
        if last is None:
            self._note("no answer yet")
            return
        reused = last.prompt_tokens - last.read_tokens
        asked = counted(last.prompt_tokens, "token")
        predicted = f" ({last.predicted_tokens} of them predicted)" if last.predicted_tokens else ""
        self._note(
            f"prompt        {asked}: {last.read_tokens} read{predicted}, {reused} were in the cache\n"
            f"first token   after {last.time_to_first_token:.3f} s\n"
            f"answer        {counted(last.generated_tokens, 'token')}, {last.generation_tps:.1f} tokens/s\n"
            + (f"drafts        {last.drafts}\n" if last.drafts else "")
            + f"memory        {last.peak_memory / 1e9:.2f} GB at most"
        )

    def _help(self, rest: str) -> None:
        self._note(HELP + HELP_CONTINUING * self._chat.continues)

    def _quit(self, rest: str) -> None:
        raise EOFError

    def _note(self, text: str) -> None:
        sys.stdout.flush()
        text = visible(text)
        if sys.stderr.isatty():
            text = "\n".join(map(folded, text.split("\n")))
            if "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
                text = typer.style(text, dim=True)
        print(text, file=sys.stderr, flush=True)

    def _fail(self, error: ElmError) -> None:
        sys.stdout.flush()
        note(error)
        self._exit_code = 0 if self._interactive else error.exit_code


def _file(name: str, command: str) -> Path:
    if not name:
        raise InputError(f"/{command} needs a file name")
    return reading.expanded(name)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{name} is {text.strip()!r}: a number is needed") from None


def _seed(text: str) -> int | None:
    try:
        return None if text == "none" else int(text)
    except ValueError:
        raise InputError(f"seed is {text!r}: a whole number is needed, or none") from None


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def interactive() -> bool:
    """Returns whether a person types to us and reads what we say."""
    return sys.stdin.isatty() and sys.stdout.isatty()


@contextmanager
def without_echo() -> Iterator[None]:
    """Hides what is typed meanwhile at a terminal; the system keeps it for the next line, up to 4,095 bytes.

    Without lines (ICANON) it would keep more, but what it has no room for would stand before a Ctrl-C.
    """
    import termios

    try:
        before = termios.tcgetattr(sys.stdin)
        quiet = list(before)
        quiet[3] &= ~termios.ECHO
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    except (termios.error, OSError):  # no terminal any more
        yield
        return
    try:
        yield
    finally:
        with suppress(termios.error, OSError):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class Pipe:
    """Lines as they come."""

    def __init__(self) -> None:
        self._number = 0

    def read(self, prompt: str) -> str:
        """The next line, without its end. Raises EOFError when there is none, InputError where it is no text."""
        self._number += 1
        where = f"stdin, line {self._number}"
        line = reading.limited_line(sys.stdin.buffer, reading.TEXT_BYTES, where)
        if not line:
            raise EOFError
        return reading.decoded_line(reading.unmarked(line, where) if self._number == 1 else line, where).rstrip("\r\n")


class Terminal:
    """Lines that a person edits, and finds again with arrow-up, next time too, where a history can be kept."""

    def __init__(self) -> None:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        self._history = _history_path()
        self._last = ""
        with suppress(ImportError):  # a Python without it still reads lines
            import readline

            for line in self._recall():
                with suppress(ValueError):  # what no terminal has typed, such as NUL
                    readline.add_history(line)
            if "libedit" not in (readline.__doc__ or "") and os.environ.get("TERM", "dumb") != "dumb":
                readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text is one line, whole

    def read(self, prompt: str) -> str:
        """The next line, without its end. Raises EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C."""
        line = input(prompt)
        if line.strip() and line != self._last:
            self._last = line
            self._remember(line)
        return line

    def _recall(self) -> list[str]:
        if self._history is None:
            return []
        try:
            records = self._history.read_text(encoding="utf-8", errors="replace").splitlines()
            if len(records) > 2 * _KEPT:
                with files.new_file(self._history) as file:
                    os.fchmod(file.fileno(), 0o600)
                    file.write("".join(f"{record}\n" for record in records[-_KEPT:]).encode())
        except Exception:  # of a comfort, nothing is worth an error
            return []
        lines = []
        for record in records[-_KEPT:]:
            with suppress(ValueError, RecursionError):
                lines.append(json.loads(record))
        return [line for line in lines if isinstance(line, str)]

    def _remember(self, line: str) -> None:
        """A line in a file of JSON strings: it may have line ends of its own, if it was pasted."""
        if self._history is None:
            return
        with suppress(OSError):
            descriptor = os.open(self._history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, (json.dumps(line) + "\n").encode())
            finally:
                os.close(descriptor)


def _history_path() -> Path | None:
    """The file in the user's state directory; None where there can be none."""
    try:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        directory = Path(base, "elm-mlx")
        if not directory.is_absolute():  # an empty HOME
            return None
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    return directory / "chat_history"
