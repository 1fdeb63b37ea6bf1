"""Conversations without a terminal: what is read, what is kept, what is forgotten, and that no answer depends on it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny

from elm_mlx.errors import InputError
from elm_mlx.inference import generation, prefix
from elm_mlx.inference.conversation import DEFAULTS, Chat, Reply
from elm_mlx.inference.generation import prefill, stream_generate
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.network import Model
from elm_mlx.text.chat_template import JinjaTemplate, OpenELMInstruct, Template
from elm_mlx.text.tokenizer import Tokenizer

GREEDY = {"temp": 0.0, "top_p": 1.0, "max_tokens": 12}
REWRITING = (  # nothing closes an answer, and only the last message is whole
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last else m.content[:3]) + '\n' }}"
    "{% endfor %}{{ 'assistant:\n' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> Model:
    return tiny.random_model(tiny_config)


@pytest.fixture
def template(tiny_tokenizer: Tokenizer) -> Template:
    return OpenELMInstruct(tiny_tokenizer)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass over a prompt has read."""
    counts: list[int] = []

    def counting(model: Model, ids: list[int], *rest: object) -> mx.array:
        counts.append(len(ids))
        return prefill(model, ids, *rest)

    monkeypatch.setattr(prefix, "prefill", counting)
    return counts


def say(reply: Reply, stop_after: int | None = None) -> str:
    """The answer; stopped when it has been asked about `stop_after` times."""
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked > stop_after

    return "".join(reply.stream(stopped))


def check_cache(chat: Chat) -> None:
    """The caches hold what `ids` says, by reading it all anew."""
    held, ids = chat.cache.caches, chat.cache.ids
    assert [cache.offset for cache in held] == [len(ids)] * len(held)
    if ids:
        fresh = make_prompt_cache(chat.model)
        prefill(chat.model, ids, fresh)
        for ours, theirs in zip(held, fresh, strict=True):
            for mine, other in zip(ours.state, theirs.state, strict=True):
                used = np.array(mine[:, :, : len(ids)]), np.array(other[:, :, : len(ids)])
                np.testing.assert_allclose(*used, atol=1e-4)


def without_cache(chat: Chat, reply: Reply) -> list[int]:
    """What the model, knowing nothing, answers to the prompt of `reply`."""
    responses = stream_generate(chat.model, None, reply.prompt.ids, max_tokens=12, repetition_penalty=1.1)
    return [response.token for response in responses if response.token != chat.tokenizer.eos_id]


@pytest.mark.parametrize("kind", ["instruct", "rewriting", "base"])
def test_answers_are_those_of_a_model_without_cache(model: Model, tiny_tokenizer: Tokenizer, kind: str) -> None:
    rewriting = JinjaTemplate(tiny_tokenizer, REWRITING, "x.jinja", {"bos_token": "<s>"})
    template = {"instruct": OpenELMInstruct(tiny_tokenizer), "rewriting": rewriting, "base": None}[kind]
    chat = Chat(model, tiny_tokenizer, template, options={**GREEDY, "repetition_penalty": 1.1}, system="be brief")
    for message in ("the quick fox", "漢字 and more", "", "why?"):
        reply = chat.ask(message)
        expected = without_cache(chat, reply)
        text = say(reply)
        ids = chat.exchanges[-1].ids
        assert list(ids[len(reply.prompt.ids) :]) == expected[: len(ids) - len(reply.prompt.ids)]
        beginning = {"instruct": "<|system|>\nbe brief", "rewriting": "system: be", "base": "be brief"}[kind]
        assert tiny_tokenizer.decode(ids).startswith(beginning)
        assert chat.exchanges[-1].answer.strip() == text.strip()
        check_cache(chat)


def test_only_what_is_new_is_read(model: Model, tiny_tokenizer: Tokenizer, template: Template, read: list[int]) -> None:
    chat = Chat(model, tiny_tokenizer, template, options=GREEDY, system="be brief and kind")
    first = chat.ask("the quick fox")
    say(first)
    assert sum(read) == len(first.prompt.ids) == first.statistics.read_tokens
    held = len(chat.cache.ids)
    read.clear()
    second = chat.ask("jumps")
    assert second.prompt.ids[: len(first.prompt.ids)] == first.prompt.ids
    say(second)
    # With the newest token, which was shown and never fed, and the end mark that the model did not say.
    assert sum(read) == len(second.prompt.ids) - held == second.statistics.read_tokens
    assert 0 < sum(read) < 40
    new = "\n<|user|>\njumps", "\n<|assistant|>\n"
    assert sum(read) <= 1 + 1 + 1 + sum(len(tiny_tokenizer.encode(text, add_bos=False)) for text in new)


def test_undo_retry_and_reset_read_nothing_again(
    model: Model, tiny_tokenizer: Tokenizer, template: Template, read: list[int]
) -> None:
    chat = Chat(model, tiny_tokenizer, template, options=GREEDY, system="be brief and kind")
    say(chat.ask("one"))
    once = chat.exchanges[-1]
    before = say(chat.ask("two"))
    read.clear()
    assert say(chat.retry()) == before  # greedy
    assert read == [1]
    assert chat.undo().question == "two"
    assert chat.exchanges == [once]
    read.clear()
    reply = chat.ask("two")
    assert say(reply) == before
    assert sum(read) == 1, "the same again: all but the last token is there"
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be brief and kind"}]
    read.clear()
    reply = chat.ask("other")
    say(reply)
    shared = len(tiny_tokenizer.encode("<|system|>\nbe brief and kind"))
    assert sum(read) <= len(reply.prompt.ids) - shared
    check_cache(chat)


def test_nothing_to_undo_or_retry(model: Model, tiny_tokenizer: Tokenizer) -> None:
    chat = Chat(model, tiny_tokenizer)
    for action in (chat.undo, chat.retry):
        with pytest.raises(InputError):
            action()


def test_cache_and_ids_agree_whatever_happens(model: Model, tiny_tokenizer: Tokenizer, template: Template) -> None:
    """Long sessions of random deeds, the context overflowing many times."""
    for seed, kind in enumerate((template, None, template)):
        draw = random.Random(seed)
        chat = Chat(model, tiny_tokenizer, kind, options={"max_tokens": 60, "temp": 1.0}, system="kind", seed=seed)
        deeds: dict[str, Callable[[], object]] = {
            "ask": lambda chat=chat, draw=draw: say(chat.ask("fox " * draw.randrange(60))),
            "stop": lambda chat=chat, draw=draw: say(chat.ask("dogs " * draw.randrange(60)), draw.randrange(9)),
            "leave": lambda chat=chat: next(iter(chat.ask("the king"))),
            "retry": lambda chat=chat: chat.exchanges and say(chat.retry()),
            "undo": lambda chat=chat: chat.exchanges and chat.undo(),
        }
        for _ in range(15):
            deeds[draw.choice([*deeds, "ask", "ask"])]()
            check_cache(chat)
            for exchange in chat.exchanges:
                assert not exchange.ids or exchange.answer.strip() in tiny_tokenizer.decode(exchange.ids)


def test_stopped_answer_is_kept(tiny_tokenizer: Tokenizer, template: Template, read: list[int]) -> None:
    chat = Chat(tiny.spelling_model(tiny_tokenizer, "abcdefgh"), tiny_tokenizer, template)
    reply = chat.ask("?")
    assert say(reply, 2) == "ab"  # asked before reading, and after each token
    assert reply.finish_reason == "interrupted"
    assert chat.messages[-1] == {"role": "assistant", "content": "ab"}
    read.clear()
    following = chat.ask("more")
    assert tiny_tokenizer.decode(following.prompt.ids).endswith("ab \n<|user|>\nmore \n<|assistant|>\n")
    say(following)
    assert sum(read) == len(following.prompt.ids) - len(reply.prompt.ids) - 2
    assert following.finish_reason == "stop"
    check_cache(chat)


def test_leaving_the_loop_keeps_what_was_said(tiny_tokenizer: Tokenizer, template: Template) -> None:
    chat = Chat(tiny.spelling_model(tiny_tokenizer, "abcdefgh"), tiny_tokenizer, template)
    reply = chat.ask("?")
    for piece in reply:
        if piece == "c":
            break
    assert reply.finish_reason == "interrupted"
    assert chat.exchanges[-1].answer == "abc"
    check_cache(chat)


def test_message_stopped_before_its_answer_is_dropped(
    model: Model, tiny_tokenizer: Tokenizer, template: Template, read: list[int]
) -> None:
    chat = Chat(model, tiny_tokenizer, template, options=GREEDY)
    reply = chat.ask("fox " * 80)
    assert len(reply.prompt.ids) > 2 * prefix.READ_STEP
    assert say(reply, 1) == ""
    assert (reply.finish_reason, chat.exchanges) == ("interrupted", [])
    assert read == [prefix.READ_STEP], "one chunk, and then it stops"
    assert len(chat.cache.ids) == prefix.READ_STEP
    check_cache(chat)
    read.clear()
    again = chat.ask("fox " * 80)
    say(again)
    assert sum(read) == len(again.prompt.ids) - prefix.READ_STEP
    check_cache(chat)


def test_stopped_retry_keeps_the_earlier_answer(model: Model, tiny_tokenizer: Tokenizer, template: Template) -> None:
    chat = Chat(model, tiny_tokenizer, template, options=GREEDY)
    say(chat.ask("one"))
    exchanges = list(chat.exchanges)
    assert say(chat.retry(), 0) == ""
    assert chat.exchanges == exchanges


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failure_amid_a_step_loses_the_cache_alone(
    model: Model,
    tiny_tokenizer: Tokenizer,
    template: Template,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    def half_a_step(decoder: generation.Decoder) -> None:
        decoder.rows.caches[0].trim(3)
        raise error

    chat = Chat(model, tiny_tokenizer, template, options=GREEDY)
    say(chat.ask("one"))
    exchanges = list(chat.exchanges)
    with monkeypatch.context() as patch:
        patch.setattr(generation.Decoder, "advance", half_a_step)
        with pytest.raises(error):
            say(chat.ask("two"))
    assert chat.exchanges == exchanges
    assert chat.cache.ids == []
    reply = chat.ask("two")
    say(reply)
    assert reply.statistics.read_tokens == len(reply.prompt.ids)
    check_cache(chat)


def test_oldest_exchanges_go_and_the_system_prompt_stays(
    model: Model, tiny_tokenizer: Tokenizer, template: Template, tmp_path: Path
) -> None:
    chat = Chat(model, tiny_tokenizer, template, options={**GREEDY, "max_tokens": 20}, system="be brief")
    forgotten = []
    for number in range(30):
        reply = chat.ask(f"message {number}")
        forgotten.append(reply.forgotten)
        shown = tiny_tokenizer.decode(reply.prompt.ids)
        assert shown.startswith("<|system|>\nbe brief")
        assert f"message {number} \n<|assistant|>" in shown
        assert number == 0 or f"message {number - 1} \n" in shown, "the last exchange stays"
        assert len(reply.prompt.ids) + 20 <= tiny.CONTEXT
        say(reply)
        assert reply.finish_reason in ("stop", "length")
    times = [text for text in forgotten if text]
    assert 1 < len(times) < 10, "not with each message"
    assert all(text.endswith("exchanges") for text in times)
    assert "message 0" not in shown
    assert len(chat.messages) == 61, "forgotten by the model, not by us"
    chat.undo()
    kept = chat.ask("message 29")
    assert kept.prompt.first == reply.prompt.first and not kept.forgotten


def test_message_too_long_loses_nothing(model: Model, tiny_tokenizer: Tokenizer, template: Template) -> None:
    for kind in (template, None):
        chat = Chat(model, tiny_tokenizer, kind, options=GREEDY)
        say(chat.ask("one"))
        exchanges, ids = list(chat.exchanges), chat.cache.ids[:]
        with pytest.raises(InputError) as raised:
            chat.ask("漢" * 600)
        numbers = [int(word.strip(",:")) for word in str(raised.value).split() if word.strip(",:").isdigit()]
        assert numbers[0] > 600 and numbers[1] == tiny.CONTEXT
        assert (chat.exchanges, chat.cache.ids) == (exchanges, ids)
        say(chat.ask("two"))
        assert len(chat.exchanges) == 2


def test_answer_ends_where_the_context_does(tiny_tokenizer: Tokenizer, template: Template) -> None:
    chat = Chat(tiny.spelling_model(tiny_tokenizer, "xyzx"), tiny_tokenizer, template, options={"max_tokens": 9999})
    reply = chat.ask("?")
    text = say(reply)
    assert reply.finish_reason == "context"
    assert len(reply.prompt.ids) + reply.statistics.generated_tokens == tiny.CONTEXT
    assert text == ("xyz" * 999)[: len(text)]
    second = chat.ask("!")
    assert second.forgotten == "exchange"
    say(second)


def test_end_marks_and_stop_strings_are_not_shown(tiny_tokenizer: Tokenizer, template: Template) -> None:
    chat = Chat(tiny.spelling_model(tiny_tokenizer, "so it goes"[:3] + "be"), tiny_tokenizer, template)
    reply = chat.ask("?")
    assert say(reply) == "so be"
    assert reply.finish_reason == "stop"
    assert chat.cache.ids[-1] == tiny_tokenizer.eos_id
    assert chat.ask("x").prompt.ids[: len(chat.cache.ids)] == chat.cache.ids, "the end mark serves on"
    stopping = Chat(tiny.spelling_model(tiny_tokenizer, "abcdefgh"), tiny_tokenizer, template, stop=["de"])
    pieces = list(stopping.ask("?"))
    assert pieces == ["a", "b", "c"], "d is held back"
    assert tiny_tokenizer.decode(stopping.exchanges[0].ids).endswith("abc")
    held = Chat(tiny.spelling_model(tiny_tokenizer, "abcd"), tiny_tokenizer, template, stop=["dx"])
    assert say(held.ask("?")) == "abcd", "no stop string after all"
    assert tiny_tokenizer.decode(held.exchanges[0].ids).endswith("abcd")


def test_stop_string_amid_a_token_leaves_the_text(tiny_tokenizer: Tokenizer, template: Template) -> None:
    assert "▁dogs" in tiny_tokenizer.pieces
    chat = Chat(tiny.spelling_model(tiny_tokenizer, "a dogs"), tiny_tokenizer, template, stop=["gs"])
    assert say(chat.ask("?")) == "a do"
    assert chat.exchanges[0].ids == (), "no tokens are just this"
    assert "a do \n<|user|>" in tiny_tokenizer.decode(chat.ask("on").prompt.ids)


def test_template_stop_strings_end_an_answer(tiny_tokenizer: Tokenizer) -> None:
    template = JinjaTemplate(tiny_tokenizer, REWRITING.replace("[:3]", ""), "x.jinja", {"bos_token": "<s>"})
    template.stop_strings = ("#",)
    chat = Chat(tiny.spelling_model(tiny_tokenizer, "ab#c"), tiny_tokenizer, template)
    assert say(chat.ask("?")) == "ab"


def test_characters_come_whole(tiny_tokenizer: Tokenizer, template: Template) -> None:
    text = "né 漢😀"
    assert len(tiny_tokenizer.encode(text)) > len(text) + 3, "several bytes a character"
    chat = Chat(tiny.spelling_model(tiny_tokenizer, text), tiny_tokenizer, template)
    assert "".join(pieces := list(chat.ask("?"))) == text
    assert all("\ufffd" not in piece for piece in pieces)
    for count in range(1, len(tiny_tokenizer.encode(text)) + 1):
        cut = Chat(chat.model, tiny_tokenizer, template, options={"max_tokens": count})
        shown = say(cut.ask("?"))
        assert text.startswith(shown)
        assert shown.strip() == "" or tiny_tokenizer.decode(cut.exchanges[-1].ids).endswith(shown.strip())


def test_white_space_before_an_answer_is_not_shown(tiny_tokenizer: Tokenizer, template: Template) -> None:
    model = tiny.spelling_model(tiny_tokenizer, " \tok")
    assert list(Chat(model, tiny_tokenizer, template).ask("?")) == ["o", "k"]
    base = Chat(model, tiny_tokenizer)
    assert say(base.ask("?\n")) == "ok"
    assert base.exchanges[0].answer == " \tok", "but it is part of a base model's text"


def test_empty_answer(tiny_tokenizer: Tokenizer, template: Template) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "abc")
    model.lm_head.weight = mx.zeros_like(model.lm_head.weight)
    model.lm_head.weight[tiny_tokenizer.eos_id] = 9.0
    chat = Chat(model, tiny_tokenizer, template)
    reply = chat.ask("?")
    assert (say(reply), reply.finish_reason) == ("", "stop")
    assert chat.messages[-1]["content"] == ""
    say(chat.ask("more"))
    check_cache(chat)


def test_seed_reproduces_a_session(model: Model, tiny_tokenizer: Tokenizer, template: Template) -> None:
    def session(seed: int) -> list[str]:
        chat = Chat(model, tiny_tokenizer, template, options={"max_tokens": 15, "temp": 1.0}, seed=seed)
        return [say(chat.ask("one")), say(chat.retry()), say(chat.ask("two"))]

    first = session(7)
    assert session(7) == first
    assert session(8) != first
    assert first[0] != first[1], "a retry is a new draw"


def test_base_model_continues_one_text(model: Model, tiny_tokenizer: Tokenizer) -> None:
    chat = Chat(tiny.spelling_model(tiny_tokenizer, "xyzx"), tiny_tokenizer, options={"max_tokens": 3})
    assert chat.continues
    assert chat.ask("the fox").prompt.ids == tiny_tokenizer.encode("the fox")
    say(chat.ask("the fox\n"))
    assert say(chat.ask("")) == "xyz", "nothing said: it goes on"
    for message, text in (("the", "the fox\nxyzxyz\nthe"), (" the", "the fox\nxyzxyz the"), ("", "the fox\nxyzxyz")):
        ids = chat.ask(message).prompt.ids
        assert tiny_tokenizer.decode(ids) == text, "and no space of SentencePiece's own"
    say(chat.ask("the\n"))
    assert tiny_tokenizer.decode(chat.exchanges[-1].ids) == "the fox\nxyzxyz\nthe\nxyz"


def test_base_model_with_a_system_text(model: Model, tiny_tokenizer: Tokenizer) -> None:
    chat = Chat(model, tiny_tokenizer, system="An old story", options={"max_tokens": 100})
    dropped = asked = 0
    while dropped < 2:
        asked += 1
        assert asked < 100
        reply = chat.ask("")
        assert tiny_tokenizer.decode(reply.prompt.ids).startswith("An old story")
        if reply.forgotten:
            dropped += 1
            assert reply.forgotten.endswith(" tokens")
            assert len(reply.prompt.ids) == tiny.CONTEXT // 2
            assert list(chat.exchanges[-1].ids[-100:]) == reply.prompt.ids[-100:], "the newest stays"
        say(reply)
    assert Chat(model, tiny_tokenizer).ask("").prompt.ids == [1], "from nothing at all"


def test_base_model_goes_on_after_its_end_mark(tiny_tokenizer: Tokenizer, read: list[int]) -> None:
    chat = Chat(tiny.spelling_model(tiny_tokenizer, "abc"), tiny_tokenizer)
    assert say(chat.ask("?\n")) == "abc"
    assert chat.cache.ids[-1] == tiny_tokenizer.eos_id
    ids = chat.ask("more\n").prompt.ids
    assert tiny_tokenizer.eos_id not in ids
    read.clear()
    say(chat.ask("more\n"))
    assert sum(read) == len(tiny_tokenizer.encode("\nmore\n")) - 2
    check_cache(chat)


def test_saved_conversation_goes_on(
    model: Model, tiny_tokenizer: Tokenizer, template: Template, tmp_path: Path
) -> None:
    path = tmp_path / "talk 漢.json"
    for kind in (template, None):
        chat = Chat(model, tiny_tokenizer, kind, options=GREEDY, system="be brief")
        say(chat.ask("one"))
        say(chat.ask("two 漢"))
        chat.save(path)
        assert json.loads(path.read_text("utf-8")) == {"messages": chat.messages}
        other = Chat(model, tiny_tokenizer, kind, options=GREEDY)
        say(other.ask("else"))
        other.load(path)
        assert other.messages == chat.messages and other.system == "be brief"
        reply = other.ask("three")
        say(reply)
        shown, expected = (tiny_tokenizer.decode(r.prompt.ids).replace(" ", "") for r in (reply, chat.ask("three")))
        assert shown == expected, "white space around answers apart"
        held = len(other.cache.ids)
        following = other.ask("four")
        say(following)
        assert following.statistics.read_tokens <= len(following.prompt.ids) - held + 1, "read once, and not again"
        check_cache(other)
        chat.undo()
        chat.save(path)  # over its own
        with pytest.raises(InputError, match="holds another conversation; /load goes on with it"):
            Chat(model, tiny_tokenizer, kind, options=GREEDY).save(path)
        path.unlink()


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "UTF-16"),
        (b"[" * 100_000, "not JSON"),
        ([], "`messages`"),
        ({"messages": {}}, "`messages`"),
        ({"messages": ["a"]}, "message 1"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 2"),
        ({"messages": [USER, {"content": "b"}]}, "message 2"),
        ({"messages": [USER, USER]}, "message 2"),
        ({"messages": [ASSISTANT]}, "message 1"),
        ({"messages": [USER, ASSISTANT, {"role": "system", "content": "c"}, ASSISTANT]}, "message 3"),
        ({"messages": [USER, ASSISTANT, USER]}, "no answer"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}, "Unicode"),
        ({"messages": [{"role": "system", "content": "fox " * 900}]}, "context"),
    ],
)
def test_file_that_is_no_conversation(
    model: Model, tiny_tokenizer: Tokenizer, template: Template, tmp_path: Path, content: object, reason: str
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    chat = Chat(model, tiny_tokenizer, template, options=GREEDY, system="be brief")
    say(chat.ask("one"))
    messages = chat.messages
    with pytest.raises(InputError, match=reason) as raised:
        chat.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert chat.messages == messages
    if content is not None and reason not in ("Unicode", "context"):
        before = path.read_bytes()
        with pytest.raises(InputError, match="no saved conversation"):
            chat.save(path)
        assert path.read_bytes() == before


def test_conversation_longer_than_the_context_is_loaded(
    model: Model, tiny_tokenizer: Tokenizer, template: Template, tmp_path: Path
) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"messages": [USER, {"role": "assistant", "content": "fox " * 30}] * 40}))
    for kind in (template, None):
        chat = Chat(model, tiny_tokenizer, kind, options=GREEDY)
        chat.load(path)
        reply = chat.ask("on")
        assert reply.forgotten
        say(reply)
        assert len(chat.exchanges) == 41


def test_settings_are_checked(model: Model, tiny_tokenizer: Tokenizer) -> None:
    chat = Chat(model, tiny_tokenizer)
    assert chat.options == DEFAULTS
    chat.set("temp", 0.5)
    chat.set("top_k", 40.0)
    assert (chat.options["temp"], chat.options["top_k"]) == (0.5, 40)
    assert isinstance(chat.options["top_k"], int)
    before = dict(chat.options)
    wrong = [("temp", -1), ("temp", float("inf")), ("temp", float("nan")), ("top_p", 0), ("top_k", 1.5), ("tmp", 1)]
    wrong += [("max_tokens", 0), ("max_tokens", float("inf")), ("top_k", float("nan")), ("min_p", 2)]
    for name, value in wrong:
        with pytest.raises(InputError, match=name):
            chat.set(name, value)
    assert chat.options == before
    with pytest.raises(InputError, match="top_p"):
        Chat(model, tiny_tokenizer, options={"top_p": 7})
    with pytest.raises(InputError, match="stop string"):
        Chat(model, tiny_tokenizer, stop=[""])


def test_statistics(tiny_tokenizer: Tokenizer, template: Template) -> None:
    chat = Chat(tiny.spelling_model(tiny_tokenizer, "abcdef"), tiny_tokenizer, template)
    assert chat.last is None
    reply = chat.ask("?")
    say(reply)
    assert chat.last is reply.statistics
    assert chat.last.generated_tokens == 7  # the end mark too
    assert chat.last.prompt_tokens == chat.last.read_tokens == len(reply.prompt.ids)
    assert chat.last.time_to_first_token > 0 and chat.last.generation_tps > 0 and chat.last.peak_memory > 1e6


def test_text_that_is_no_unicode_is_refused(model: Model, tiny_tokenizer: Tokenizer, template: Template) -> None:
    for kind in (template, None):
        chat = Chat(model, tiny_tokenizer, kind)
        with pytest.raises(InputError, match="Unicode"):
            chat.ask("a\udcff")
        assert chat.exchanges == []


def test_real_model(classics_dir: Path) -> None:
    """A text, in pieces, is the text in one: greedy, and not a token of it read twice."""
    from elm_mlx import load

    model, tokenizer = load(classics_dir)
    assert tokenizer is not None
    chat = Chat(model, tokenizer, options={**GREEDY, "max_tokens": 20})
    pieces = [say(chat.ask("Once upon a time"))] + [say(chat.ask("")) for _ in range(3)]
    assert all(pieces)
    assert chat.last is not None and chat.last.read_tokens == 1
    whole = [r.token for r in stream_generate(model, None, tokenizer.encode("Once upon a time"), max_tokens=80)]
    assert list(chat.exchanges[-1].ids) == tokenizer.encode("Once upon a time") + whole
