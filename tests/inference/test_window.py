"""What of a conversation is shown when not all of it fits: in ids that are counted here by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.errors import InputError
from elm_mlx.inference.window import Continued, Exchange, Templated, Window, as_messages
from elm_mlx.text.chat_template import OpenELMInstruct
from elm_mlx.text.tokenizer import Tokenizer

WORD = " the"  # one token


def words(count: int) -> str:
    return "the" + WORD * (count - 1)


def talk(window: Window, questions: list[str], answers: list[str], max_tokens: int = 8) -> tuple[list[Exchange], str]:
    """The exchanges, each shown as `window` says, and what was forgotten last."""
    before: list[Exchange] = []
    forgotten = ""
    for question, answer in zip(questions, answers, strict=True):
        shown = window.prompt(before, question, max_tokens)
        assert len(shown.ids) < window.context
        before.append(Exchange(question, answer, shown.first))
        forgotten = shown.forgotten
    return before, forgotten


class TestByATemplate:
    def window(self, tokenizer: Tokenizer, context: int, system: str | None = None) -> Templated:
        return Templated(OpenELMInstruct(tokenizer), context, system)

    def ids(
        self, tokenizer: Tokenizer, exchanges: list[Exchange], question: str, system: str | None = None
    ) -> list[int]:
        messages = [*as_messages(system, exchanges), {"role": "user", "content": question}]
        return OpenELMInstruct(tokenizer).encode(messages)

    def test_all_of_it_while_it_fits(self, tiny_tokenizer: Tokenizer) -> None:
        before, forgotten = talk(self.window(tiny_tokenizer, 512), ["one", "two"], ["a", "b"])
        shown = self.window(tiny_tokenizer, 512).prompt(before, "three", 8)
        assert shown.ids == self.ids(tiny_tokenizer, before, "three")
        assert (shown.first, shown.forgotten, forgotten) == (0, "", "")

    @settings(max_examples=40)
    @given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=8), st.booleans())
    def test_the_oldest_goes_and_the_rest_is_whole(
        self, tiny_tokenizer: Tokenizer, sizes: list[tuple[int, int]], told: bool
    ) -> None:
        system = "be brief" if told else None
        window = self.window(tiny_tokenizer, 200, system)
        before: list[Exchange] = []
        for asked, answered in sizes:
            question = words(asked)
            shown = window.prompt(before, question, 20)
            first = before[-1].first if before else 0
            assert shown.ids == self.ids(tiny_tokenizer, before[shown.first :], question, system)
            assert len(shown.ids) <= 200 - 20 or shown.first == len(before)
            assert shown.first >= first  # nothing that went comes back
            assert bool(shown.forgotten) == (shown.first > first)
            if first < shown.first < len(before) - 1:  # down to half, or it would happen again at once
                assert len(shown.ids) <= 100
                assert len(self.ids(tiny_tokenizer, before[shown.first - 1 :], question, system)) > 100
            before.append(Exchange(question, words(answered), shown.first))

    def test_the_last_exchange_stays_where_it_can(self, tiny_tokenizer: Tokenizer) -> None:
        window = self.window(tiny_tokenizer, 200)
        before = [Exchange(words(10), words(10)), Exchange(words(30), words(40))]
        last = len(self.ids(tiny_tokenizer, before[1:], words(30)))
        assert 100 < last <= 180 < len(self.ids(tiny_tokenizer, before, words(30)))
        assert window.prompt(before, words(30), 20).first == 1
        assert window.prompt(before, words(30), 20).forgotten == "exchange"

    def test_room_for_an_answer_is_a_quarter_at_most(self, tiny_tokenizer: Tokenizer) -> None:
        before = [Exchange(words(20), words(20))]
        window = self.window(tiny_tokenizer, 200)
        length = len(self.ids(tiny_tokenizer, before, words(10)))
        assert 100 < length <= 150
        assert window.prompt(before, words(10), 50).first == 0
        assert window.prompt(before, words(10), 10_000).first == 0

    def test_a_message_that_never_fits_says_both_lengths(self, tiny_tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match=r"has \d{3} tokens, and the model's context is 100: shorten it"):
            self.window(tiny_tokenizer, 100).prompt([], words(200), 8)
        with pytest.raises(InputError, match="tokens with the system prompt, and"):
            self.window(tiny_tokenizer, 100, "be brief").prompt([], words(200), 8)


class TestAsOneText:
    def test_a_line_a_message_unless_it_begins_with_a_space(self, tiny_tokenizer: Tokenizer) -> None:
        window = Continued(tiny_tokenizer, 512)
        before = [Exchange("the quick", " brown fox")]
        for question, text in (("jumps", "the quick brown fox\njumps"), (" jumps", "the quick brown fox jumps")):
            assert tiny_tokenizer.decode(window.prompt(before, question, 8).ids) == text
        before = [Exchange("the quick", " brown fox\n")]
        assert tiny_tokenizer.decode(window.prompt(before, "jumps", 8).ids) == "the quick brown fox\njumps"

    def test_the_ids_that_were_chosen_are_kept(self, tiny_tokenizer: Tokenizer) -> None:
        spelt = (tiny_tokenizer.bos_id or 0, *[tiny_tokenizer.encode(letter, False)[-1] for letter in "fox"])
        shown = Continued(tiny_tokenizer, 512).prompt([Exchange("", "fox", 0, spelt)], " over", 8)
        assert shown.ids[: len(spelt)] == list(spelt) and len(shown.ids) > len(spelt)

    @settings(max_examples=30)
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.booleans())
    def test_the_beginning_stays_and_the_oldest_tokens_go(
        self, tiny_tokenizer: Tokenizer, sizes: list[int], told: bool
    ) -> None:
        system = "an old king" if told else None
        window = Continued(tiny_tokenizer, 100, system)
        head = tiny_tokenizer.encode(system or "")
        before: list[Exchange] = []
        for size in sizes:
            shown = window.prompt(before, words(size), 20)
            assert shown.ids[: len(head)] == head and len(shown.ids) <= 80
            assert tiny_tokenizer.decode(shown.ids).endswith(words(size))
            if shown.forgotten:
                assert shown.forgotten.endswith(" tokens")
                assert len(shown.ids) <= max(50, len(head) + len(tiny_tokenizer.encode("\n" + words(size))))
            before.append(Exchange(words(size), WORD, 0, (*shown.ids, *tiny_tokenizer.encode(WORD, False))))

    def test_nothing_to_go_on_with(self, tiny_tokenizer: Tokenizer) -> None:
        bare = Tokenizer.load(tiny_tokenizer.path)
        bare.bos_id = None
        with pytest.raises(InputError, match="there is no text yet"):
            Continued(bare, 100).prompt([], "", 8)
        with pytest.raises(InputError, match="shorten it"):
            Continued(tiny_tokenizer, 100).prompt([], words(300), 8)
