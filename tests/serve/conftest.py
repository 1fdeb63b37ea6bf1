"""What tests of the server share: a model that talks, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import serving
from serving import Served

from elm_mlx.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def talker_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A model with a chat template, whose every answer is `serving.ANSWER`. Not to be written to."""
    return serving.make_talker(tmp_path_factory.mktemp("served") / "talker", tiny_tokenizer)


@pytest.fixture(scope="module")
def server(talker_dir: Path, tiny_model_dir: Path) -> Iterator[Served]:
    """A server of two models: `talker`, which answers, and `model`, a base model of random weights."""
    with serving.serving([talker_dir, tiny_model_dir]) as found:
        yield found
