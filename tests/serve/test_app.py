"""The server, as OpenAI's own client sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import tiny
from openai import OpenAI
from serving import Served, make_chat, serving

from elm_mlx.inference.generation import generate
from elm_mlx.store.loading import load


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny.train_tokenizer()
    path = tmp_path_factory.mktemp("served") / "tiny"
    return make_chat(tiny.write_directory(path, tiny.random_model(tiny.scaled_config(320)), tokenizer))


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[Served]:
    with serving([directory]) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_models_are_listed(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "elm-mlx")
    assert client.models.retrieve("tiny") == model


@pytest.mark.parametrize("seed", [None, 7])
def test_a_text_is_continued_as_generate_does(client: OpenAI, directory: Path, seed: int | None) -> None:
    temp = 0.0 if seed is None else 0.9
    answer = client.completions.create(model="tiny", prompt="the quick", max_tokens=12, temperature=temp, seed=seed)
    model, tokenizer = load(directory)
    assert answer.choices[0].text == generate(model, tokenizer, "the quick", max_tokens=12, temp=temp, seed=seed)
    assert answer.usage is not None and answer.usage.completion_tokens == 12


def test_a_stream_has_the_text_of_the_whole(client: OpenAI) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "a king"}], "max_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    chunks = [*client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})]  # type: ignore[call-overload]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_field_that_is_unknown_is_named(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="a", extra_body={"frobnicate": 1})
    assert (refused.value.param, refused.value.code) == ("frobnicate", "unknown_parameter")


def test_a_model_that_is_not_served_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="/etc/passwd", prompt="a")
    assert refused.value.code == "model_not_found"
