"""Conversations with documents: as many passages as there is room for, and none of them stays in what is kept."""

from __future__ import annotations

import pytest
import tiny

from elm_mlx.documents.indexing import index_documents
from elm_mlx.documents.retrieval import DocumentIndex
from elm_mlx.errors import InputError
from elm_mlx.inference.conversation import Chat
from elm_mlx.inference.window import Templated
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.network import Model
from elm_mlx.text.chat_template import OpenELMInstruct
from elm_mlx.text.tokenizer import Tokenizer

OPTIONS = {"temp": 0.0, "top_p": 1.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> Model:
    return tiny.random_model(tiny_config)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> DocumentIndex:
    directory = tmp_path_factory.mktemp("documents") / "notes"
    directory.mkdir()
    for number, town in enumerate(["Ardun", "Belo", "Corvo", "Dimmen", "Eswick", "Farrow"]):
        (directory / f"{town}.md").write_text(f"# {town}\n\nThe tower of {town} has {number + 3} floors.\n")
    index_documents(directory, directory.parent / "notes.db")
    return DocumentIndex(directory.parent / "notes.db")


def chat_of(model: Model, tokenizer: Tokenizer, documents: DocumentIndex | None, base: bool = False) -> Chat:
    return Chat(model, tokenizer, None if base else OpenELMInstruct(tokenizer), options=OPTIONS, documents=documents)


def test_the_model_sees_the_passages_and_the_conversation_does_not(
    model: Model, tiny_tokenizer: Tokenizer, documents: DocumentIndex
) -> None:
    chat = chat_of(model, tiny_tokenizer, documents)
    reply = chat.ask("How high is the tower of Corvo?")
    assert reply.sources is not None and reply.sources[0].title == "Corvo.md:3 (Corvo)"
    shown = tiny_tokenizer.decode(reply.prompt.ids)
    for number, passage in enumerate(reply.sources, 1):
        assert f"[{number}] {passage.title}\n> {passage.text}" in shown
    answer = "".join(reply).strip()
    assert chat.messages == [
        {"role": "user", "content": "How high is the tower of Corvo?"}, {"role": "assistant", "content": answer},
    ]  # fmt: skip
    following = chat.ask("And its floors?")
    assert following.sources is not None and following.sources[0].path == "Corvo.md"  # by the question before
    shown = tiny_tokenizer.decode(following.prompt.ids)
    assert shown.count("> The tower of Corvo") == 1 and "How high is the tower" in shown
    assert chat.retry().sources is not None


@pytest.mark.parametrize("base", [False, True])
def test_as_many_passages_as_fit(model: Model, tiny_tokenizer: Tokenizer, documents: DocumentIndex, base: bool) -> None:
    chat = chat_of(model, tiny_tokenizer, documents, base)
    limit = model.config.max_context_length - 12
    counts = []
    for length in (0, 100, 200, 290, 300, 310, 320, 330, 400):
        reply = chat.ask("the tower " + "x" * length)
        assert reply.sources is not None and len(reply.prompt.ids) <= limit
        counts.append(len(reply.sources))
    assert counts == sorted(counts, reverse=True) and counts[0] > 1 and counts[-1] == 0
    with pytest.raises(InputError, match="the message has"):
        chat.ask("the tower " + "x" * 600)


def test_one_more_passage_would_not_fit(tiny_tokenizer: Tokenizer) -> None:
    for context in range(60, 300, 7):
        window = Templated(OpenELMInstruct(tiny_tokenizer), context)
        prompt, count = window.grounded([], "who", lambda number: "passage " * number + "who", 8, 12)
        longer = window.prompt([], "passage " * (count + 1) + "who", 12)
        assert len(prompt.ids) <= context - 12
        assert count == 8 or len(window._ids([], 0, "passage " * (count + 1) + "who")) > context - 12
        del longer


def test_the_conversation_leaves_room_for_passages(
    model: Model, tiny_tokenizer: Tokenizer, documents: DocumentIndex
) -> None:
    chat = chat_of(model, tiny_tokenizer, documents)
    limit = model.config.max_context_length - 12
    for number in range(8):
        reply = chat.ask(f"Say more of the tower of Belo, part {number}")
        "".join(reply)
        assert reply.sources and len(reply.prompt.ids) <= limit
    assert chat.exchanges[-1].first > 0


def test_nothing_found_is_the_question_alone(model: Model, tiny_tokenizer: Tokenizer, documents: DocumentIndex) -> None:
    with_documents, without = chat_of(model, tiny_tokenizer, documents), chat_of(model, tiny_tokenizer, None)
    reply, plain = with_documents.ask("zebra?"), without.ask("zebra?")
    assert reply.sources == () and plain.sources is None
    assert reply.prompt.ids == plain.prompt.ids and "".join(reply) == "".join(plain)
    assert with_documents.exchanges[-1].ids  # and its cache serves on


def test_a_base_model_converses(model: Model, tiny_tokenizer: Tokenizer, documents: DocumentIndex) -> None:
    chat = chat_of(model, tiny_tokenizer, documents, base=True)
    assert not chat.continues
    "".join(chat.ask("How high is Ardun?"))
    shown = tiny_tokenizer.decode(chat.ask("zebra?").prompt.ids)
    assert shown.startswith("Question: How high is Ardun?\nAnswer:")
    assert "Question: zebra?\nAnswer:" in shown


def test_not_with_a_text_without_end(model: Model, tiny_tokenizer: Tokenizer, documents: DocumentIndex) -> None:
    with pytest.raises(InputError, match="--max-kv-size"):
        Chat(model, tiny_tokenizer, OpenELMInstruct(tiny_tokenizer), max_kv_size=64, documents=documents)
