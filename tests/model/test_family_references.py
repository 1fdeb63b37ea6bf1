"""Other families against transformers 4 and 5: the logits, answers and configs that `benchmarks/families.py` kept."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import family_cases
import mlx.core as mx
import numpy as np
import pytest
from family_cases import IDS, LENGTHS, NEW_TOKENS, ORIGINAL

from elm_mlx import device
from elm_mlx.errors import InputError
from elm_mlx.inference import batch, generation, rows
from elm_mlx.inference.prefix import PrefixCache
from elm_mlx.inference.sampling import Sampler
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.config import read_config
from elm_mlx.store import loading
from elm_mlx.store.describe import describe

DATA = Path(__file__).parents[1] / "fixtures" / "families.json"
CLOSE = 1e-4  # of the logits' spread


@cache
def kept() -> dict[str, dict[str, Any]]:
    """version -> case -> what transformers computed and wrote; of those that it could."""
    versions = json.loads(DATA.read_text())
    return {
        version: {name: case for name, case in found["cases"].items() if "error" not in case}
        for version, found in versions.items()
    }


LONG_ROPES = [name for name in family_cases.CASES if "longrope" in name]
# What version 4 reads otherwise: it does not know `rope_parameters`, ties whatever the file holds, and looks for the
# length before LongRoPE outside `rope_scaling` alone.
ONLY_5 = [
    "llama, longrope", "llama, `rope_parameters`", "llama, tied and a head", "phi3, `rope_parameters`",
    "olmo3, layers apart",
]  # fmt: skip
CASES = [(version, name) for version, cases in kept().items() for name in cases if version == "5" or name not in ONLY_5]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


def directory(root: Path, name: str, version: str | None = None) -> Path:
    """The case's model; with the config as that version of transformers writes it, or as it was written for it."""
    path = root / f"{list(family_cases.CASES).index(name)}-{version}"
    if not path.exists():
        family_cases.write(path, name, None if version is None else kept()[version][name]["config"])
    return path


def far(logits: mx.array, expected: Any) -> float:
    return float(np.abs(np.array(logits, np.float32) - expected).max() / np.std(expected))


def test_both_versions_are_there_and_little_is_missing() -> None:
    assert set(kept()) == {"4", "5"}
    assert all(len(cases) >= len(family_cases.CASES) - 3 for cases in kept().values())


@pytest.mark.parametrize(("version", "name"), CASES)
@pytest.mark.parametrize("rewritten", [False, True], ids=["as it was given", "as it was written"])
def test_logits_are_those_of_transformers(version: str, name: str, rewritten: bool, root: Path) -> None:
    model = loading.load_model(directory(root, name, version if rewritten else None))
    for length, expected in zip(LENGTHS, kept()[version][name]["logits"], strict=True):
        assert far(model(mx.array([IDS[:length]]))[0, -1], expected) < CLOSE


@pytest.mark.parametrize("name", ONLY_5)
def test_version_4_reads_some_otherwise(name: str) -> None:
    four, five = (kept()[version][name]["logits"] for version in ("4", "5"))
    assert far(mx.array(four), five) > 0.1


def test_the_kinds_differ() -> None:
    """Else nothing above would show which RoPE it was."""
    cases = kept()["5"]
    families = ("llama", "phi3", "olmo2", "olmo3")
    for family in families:
        own = {name: case["logits"] for name, case in cases.items() if name.split(",")[0] == family}
        alike = {json.dumps(logits) for logits in own.values()}
        assert len(alike) >= {"llama": 11, "phi3": 4, "olmo2": 2, "olmo3": 3}[family]


@pytest.mark.parametrize("name", [name for name in family_cases.CASES if not name.startswith("llama, dynamic")])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_prompt_in_parts_is_the_prompt(name: str, on_gpu: bool, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loading.load_model(directory(root, name))
    monkeypatch.setattr(device, "on_gpu", lambda: on_gpu)
    for length in LENGTHS:
        expected = np.array(model(mx.array([IDS[:length]]))[0, -1])
        assert far(generation.prefill(model, IDS[:length], make_prompt_cache(model), step=7)[0], expected) < CLOSE
        cache = PrefixCache(model)
        cache.read(IDS[: length - 3])
        logits = cache.read(IDS[:length])
        assert logits is not None and far(logits[0], expected) < CLOSE


@pytest.mark.parametrize(("version", "name"), CASES)
def test_answers_are_those_of_transformers(version: str, name: str, root: Path) -> None:
    """Prompts of 12 tokens, 8 more: with longrope past the length where factors change.

    The reference takes each token by a forward pass over all before it.
    """
    model = loading.load_model(directory(root, name))
    prompt = IDS[: ORIGINAL - 4]
    said = generation.stream_generate(model, None, prompt, max_tokens=NEW_TOKENS, stop_at_eos=False, prefill_step=5)
    assert [response.token for response in said] == kept()[version][name]["answer"]


@pytest.mark.parametrize("name", LONG_ROPES)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_chat_passes_the_length_where_factors_change(
    name: str, on_gpu: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes back behind it, when the text is cut."""
    model = loading.load_model(directory(root, name))
    monkeypatch.setattr(device, "on_gpu", lambda: on_gpu)
    monkeypatch.setattr(rows, "compile_hindrance", lambda: None)
    cache = PrefixCache(model)
    logits = cache.read(IDS[: ORIGINAL - 4])
    assert logits is not None
    said = list(cache.decode(logits, Sampler(), 0, NEW_TOKENS))
    alone = generation.stream_generate(model, None, IDS[: ORIGINAL - 4], max_tokens=NEW_TOKENS, stop_at_eos=False)
    assert said == [response.token for response in alone]
    for prompt in ([*cache.ids, 5, 6], IDS[: ORIGINAL - 2], IDS[:ORIGINAL], IDS[: ORIGINAL + 1], IDS[:9]):
        found = cache.read(prompt)
        assert found is not None and far(found[0], np.array(model(mx.array([prompt]))[0, -1])) < CLOSE


@pytest.mark.parametrize("name", LONG_ROPES)
def test_each_row_of_a_batch_passes_it_by_itself(name: str, root: Path) -> None:
    model = loading.load_model(directory(root, name))
    prompts = [IDS[:3], IDS[: ORIGINAL - 2], IDS[: ORIGINAL + 5], IDS[: ORIGINAL - 6]]
    logits, together = batch.prefill_each(model, prompts, 5)
    said = [[token] for token in mx.argmax(logits, axis=-1).tolist()]

    def step(texts: list[list[int]]) -> None:
        logits = together.step(mx.array([text[-1] for text in texts]))
        for text, token in zip(texts, mx.argmax(logits, axis=-1).tolist(), strict=True):
            text.append(token)

    for _ in range(5):
        step(said)
    together.leave(2)
    together.leave(0)
    for _ in range(4):
        step([said[1], said[3]] if together.lengths[0] > together.lengths[1] else [said[3], said[1]])
    for number, prompt in enumerate(prompts):
        found = generation.stream_generate(model, None, prompt, max_tokens=10, stop_at_eos=False)
        alone = [response.token for response in found]
        assert said[number] == alone[: 10 if number in (1, 3) else 6]


@pytest.mark.parametrize("name", LONG_ROPES)
def test_what_cannot_be_read_again_is_said(name: str, root: Path) -> None:
    """A cache whose text is not known, short of where factors change."""
    model = loading.load_model(directory(root, name))
    cache = make_prompt_cache(model)
    list(generation.stream_generate(model, None, IDS[:6], max_tokens=2, prompt_cache=cache))
    with pytest.raises(InputError, match="grows past 16 tokens, where this model's RoPE changes"):
        list(generation.stream_generate(model, None, IDS[:4], max_tokens=12, stop_at_eos=False, prompt_cache=cache))
    with pytest.raises(InputError, match="give the whole text, without a prompt_cache"):
        list(generation.stream_generate(model, None, IDS[:20], max_tokens=2, prompt_cache=cache))
    cache = make_prompt_cache(model)
    list(generation.stream_generate(model, None, IDS[:12], max_tokens=8, stop_at_eos=False, prompt_cache=cache))
    for layer in cache:  # which are rotated as in a long text, though few are left
        layer.trim(layer.offset - 5)
    with pytest.raises(InputError, match="give the whole text, without a prompt_cache"):
        list(generation.stream_generate(model, None, IDS[:4], max_tokens=2, prompt_cache=cache))


def test_a_contradicted_tie_is_shown_and_told(root: Path) -> None:
    own, same = (directory(root, f"llama, tied and {what}") for what in ("a head", "the head again"))
    assert not describe(own).tied_head and describe(same).tied_head
    assert describe(own).parameters == describe(same).parameters + 64 * 32
    assert [note for note in loading.open_model(own).notes if "tie_word_embeddings" in note]
    assert not [note for note in loading.open_model(same).notes if "tie_word_embeddings" in note]


def test_the_context_is_what_the_model_was_made_for(root: Path) -> None:
    contexts = {
        "llama": 64, "llama, linear": 64, "llama, dynamic": 24, "llama, yarn": 64, "llama, yarn from its context": 64,
        "llama, llama3": 64, "phi3, longrope": 64, "mistral, window": 40, "olmo3": 64, "mistral": 64,
    }  # fmt: skip
    assert {name: read_config(directory(root, name)).max_context_length for name in contexts} == contexts
