"""Answers of the server from documents: the passages are in the prompt, and the answer says which."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serving
from openai import OpenAI
from serving import Served

from elm_mlx.documents.indexing import index_documents
from elm_mlx.documents.retrieval import DocumentIndex
from elm_mlx.text.tokenizer import Tokenizer

QUESTION: Any = [{"role": "user", "content": "How high is the tower?"}]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> DocumentIndex:
    directory = tmp_path_factory.mktemp("documents") / "notes"
    directory.mkdir()
    (directory / "a.md").write_text("# Towers\n\nThe tower has seven floors.\n")
    (directory / "b.md").write_text("# Towers\n\nThe old tower has no more floors than a house.\n")
    index_documents(directory, directory.parent / "notes.db")
    return DocumentIndex(directory.parent / "notes.db")


@pytest.fixture(scope="module")
def served(talker_dir: Path, tiny_model_dir: Path, documents: DocumentIndex) -> Iterator[Served]:
    with serving.serving([talker_dir, tiny_model_dir], documents=documents) as found:
        yield found


def test_an_openai_client_gets_sources_it_does_not_know(served: Served) -> None:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(model="talker", messages=QUESTION, max_tokens=5)
        assert answer.model_extra is not None
        assert answer.model_extra["sources"][0] == {
            "number": 1, "file": "a.md", "first_line": 3, "last_line": 3, "heading": "Towers",
            "text": "The tower has seven floors.",
        }  # fmt: skip
        chunks = list(client.chat.completions.create(model="talker", messages=QUESTION, max_tokens=5, stream=True))
        assert [each.model_extra["sources"][0]["file"] for each in chunks if each.model_extra] == ["a.md"]
        plain = client.chat.completions.create(
            model="talker", messages=QUESTION, max_tokens=5, extra_body={"documents": False}
        )
        assert not plain.model_extra and plain.usage and answer.usage
        assert plain.usage.prompt_tokens < answer.usage.prompt_tokens
        text = client.completions.create(model="model", prompt="the tower", max_tokens=2)
        assert not text.model_extra


def test_the_prompt_holds_passages_as_room_is(
    served: Served, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []
    submit = served.engine.submit
    monkeypatch.setattr(
        served.engine, "submit", lambda request, *rest: requests.append(request) or submit(request, *rest)
    )
    answered = [*QUESTION, {"role": "assistant", "content": "High."}]
    conversations: list[tuple[Any, int]] = [
        (QUESTION, 2),
        ([*answered, {"role": "user", "content": "And its floors?"}], 2),
        ([{"role": "user", "content": "tower floors " + "x" * 320}], 1),
        ([{"role": "user", "content": "zebra"}], 0),
        (answered, 0),
    ]
    for messages, count in conversations:
        body = {"model": "talker", "messages": messages, "max_tokens": 20}
        answer = served.post("/v1/chat/completions", body).json()
        ids = requests[-1].ids
        shown = tiny_tokenizer.decode(ids)
        assert shown.count("\n> ") == count == len(answer["sources"]) and len(ids) <= 512 - 20
        assert ("[1] a.md:3 (Towers)\n> The tower has seven floors." in shown) == (count > 0)


def test_what_is_refused(served: Served, server: Served) -> None:
    body = {"model": "talker", "messages": QUESTION, "max_tokens": 2}
    for where, value, status in ((served, "yes", 400), (server, True, 400), (server, False, 200), (served, None, 200)):
        response = where.post("/v1/chat/completions", {**body, "documents": value})
        assert response.status_code == status
        if status == 400:
            assert response.json()["error"]["param"] == "documents"
        else:
            assert ("sources" in response.json()) == (where is served)
    assert json.loads(served.get("/v1/models").text)["data"][0]["id"] == "talker"
