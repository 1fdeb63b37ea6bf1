"""mlx-lm's tools on our model, and its own model on our directories: the same tokens."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from elm_mlx import generate, load, load_model, stream_generate
from elm_mlx.model.network import Model
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx_convert import tokenizers

PROMPT = [1, 50, 7, 31, 9, 80]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"share_input_output_layers": False},
    "no QK norm": {"normalize_qk_projections": False},
    "uniform": {"qkv_multipliers": 1.0, "ffn_multipliers": 2.0},
    "no GQA": {"num_gqa_groups": 1},
}


@pytest.fixture(scope="module")
def complete_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The tiny model in float32, with the tokenizer files that `convert` writes for mlx-lm."""
    path = Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("complete") / "model"))
    weights = {name: weight.astype(mx.float32) for name, weight in mx.load(str(path / "model.safetensors")).items()}
    mx.eval(list(weights.values()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    tokenizers.write(path / "tokenizer.model", path, max_length=512)
    return path


def theirs_of(model: Model) -> Any:
    """mlx-lm's model of the same weights."""
    from mlx_lm.models import openelm

    theirs = openelm.Model(openelm.ModelArgs.from_dict(model.config.to_dict()))
    theirs.load_weights(tree_flatten(model.parameters()))
    return theirs


def ours(model: Model, prompt: list[int], count: int) -> list[int]:
    return [r.token for r in stream_generate(model, None, prompt, max_tokens=count, stop_at_eos=False)]


def by_step(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """What mlx-lm's `generate_step` draws from a model."""
    from mlx_lm.generate import generate_step

    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count, **options)]


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("name", VARIANTS)
def test_mlx_lms_model_has_our_weights_names_and_logits(name: str) -> None:
    model = tiny.random_model(tiny.scaled_config(96, **VARIANTS[name]), seed=4)
    ids = mx.random.randint(0, 96, (2, 300), key=mx.random.key(0))
    truth = np.array(theirs_of(model)(ids))
    assert np.abs(np.array(model(ids)) - truth).max() / truth.std() < 1e-4


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("name", VARIANTS)
def test_generate_step_drives_our_model(name: str) -> None:
    model = tiny.random_model(tiny.scaled_config(96, **VARIANTS[name]), seed=4)
    expected = by_step(theirs_of(model), PROMPT, 20)
    assert by_step(model, PROMPT, 20) == expected
    assert by_step(model, PROMPT, 20, prefill_step_size=2) == expected
    assert ours(model, PROMPT, 20) == expected


@pytest.mark.usefixtures("branch")
def test_across_the_growth_of_the_cache() -> None:
    model = tiny.random_model(tiny.scaled_config(96), seed=4)
    prompt = [1, *np.random.default_rng(0).integers(3, 96, 250).tolist()]
    expected = by_step(theirs_of(model), prompt, 16)
    assert by_step(model, prompt, 16) == ours(model, prompt, 16) == expected


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("size", [8, 300])
def test_a_rotating_cache(size: int) -> None:
    model = tiny.random_model(tiny.scaled_config(96), seed=4)
    assert by_step(model, PROMPT, 20, max_kv_size=size) == by_step(theirs_of(model), PROMPT, 20, max_kv_size=size)


@pytest.mark.usefixtures("branch")
def test_their_caches_are_trimmed_and_reused() -> None:
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    model = tiny.random_model(tiny.scaled_config(96), seed=4)
    results = []
    for driven in (model, theirs_of(model)):
        cache = make_prompt_cache(driven)
        assert len(cache) == model.config.num_layers
        first = by_step(driven, PROMPT, 5, prompt_cache=cache)
        trim_prompt_cache(cache, 3)
        results.append((first, by_step(driven, [9, 8, 7], 8, prompt_cache=cache)))
    assert results[0] == results[1]


def test_plain_mlx_lm_opens_a_directory_and_says_the_same(complete_dir: Path) -> None:
    import mlx_lm

    model, tokenizer = load(complete_dir)
    assert tokenizer is not None
    theirs, their_tokenizer, *_ = mlx_lm.load(str(complete_dir))
    for text in ("the quick brown fox", "漢字 naïve", "x"):
        ids = tokenizer.encode(text)
        assert list(their_tokenizer.encode(text)) == ids
        answer = generate(model, tokenizer, text, max_tokens=12)
        assert mlx_lm.generate(theirs, their_tokenizer, prompt=text, max_tokens=12) == answer


@pytest.mark.usefixtures("branch")
def test_their_tools_take_our_model_and_their_tokenizer(complete_dir: Path) -> None:
    import mlx_lm

    model, tokenizer = load(complete_dir)
    assert tokenizer is not None
    theirs, their_tokenizer, *_ = mlx_lm.load(str(complete_dir))
    text = "an old king told stories"
    expected = [r.token for r in mlx_lm.stream_generate(theirs, their_tokenizer, text, max_tokens=12)]
    driven = [r.token for r in mlx_lm.stream_generate(model, their_tokenizer, text, max_tokens=12)]
    assert driven == expected
    assert [r.token for r in stream_generate(model, tokenizer, text, max_tokens=12)] == expected


@pytest.mark.usefixtures("branch")
def test_their_batches_take_our_model(complete_dir: Path, tiny_tokenizer: Tokenizer) -> None:
    import mlx_lm

    model = load_model(complete_dir)
    theirs, their_tokenizer, *_ = mlx_lm.load(str(complete_dir))
    prompts = [tiny_tokenizer.encode(text) for text in ("the", "quick brown fox jumps over lazy dogs", "漢字")]
    driven, expected = (
        mlx_lm.batch_generate(each, their_tokenizer, prompts, max_tokens=8).texts for each in (model, theirs)
    )
    assert driven == expected


def test_the_real_model_says_the_same_in_both(classics_dir: Path) -> None:
    import mlx_lm

    model, tokenizer = load(classics_dir, "float32")
    assert tokenizer is not None
    theirs, their_tokenizer, *_ = mlx_lm.load(str(classics_dir))
    theirs.set_dtype(mx.float32)
    text = "It was a dark night, and the old man"
    expected = [r.token for r in mlx_lm.stream_generate(theirs, their_tokenizer, text, max_tokens=60)]
    responses = list(stream_generate(model, tokenizer, text, max_tokens=60))
    assert [response.token for response in responses] == expected
    driven = mlx_lm.generate(model, their_tokenizer, prompt=text, max_tokens=60)
    assert driven.lstrip() == "".join(response.text for response in responses).lstrip()


@pytest.mark.skipif(
    tuple(map(int, version("mlx-lm").split(".")[:2])) < (0, 32),
    reason="before 0.32 a processor is shown the last token of a prompt alone",
)
def test_samplers_and_processors_mean_what_they_mean_in_mlx_lm(tiny_model_dir: Path) -> None:
    from mlx_lm.generate import generate_step
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    model, tokenizer = load(tiny_model_dir, compute_dtype="float32")
    seen: dict[str, list[list[int]]] = {"ours": [], "theirs": []}

    def noting(name: str) -> Any:
        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            seen[name].append([tokens.tolist(), list(logits.shape)])
            return mx.where(mx.arange(logits.shape[-1]) % 2 == 0, -mx.inf, logits)

        return [process, *make_logits_processors(logit_bias={7: 3.0}, repetition_penalty=1.3)]

    for settings in ({"temp": 0.0}, {"temp": 0.9, "top_p": 0.9}, {"temp": 1.2, "top_k": 20}):
        mx.random.seed(5)
        stepped = generate_step(
            mx.array(PROMPT), model, max_tokens=12, sampler=make_sampler(**settings), logits_processors=noting("theirs")
        )
        theirs = [int(token) for token, _ in stepped]
        mx.random.seed(5)
        options = {"sampler": make_sampler(**settings), "logits_processors": noting("ours")}
        answered = list(stream_generate(model, None, PROMPT, max_tokens=12, stop_at_eos=False, **options))
        assert [response.token for response in answered] == theirs and all(token % 2 for token in theirs)
        assert seen["ours"][:12] == seen["theirs"][:12], "the prompt and all that followed, logits of one row"
        seen["ours"].clear()
        seen["theirs"].clear()
    text = generate(model, tokenizer, PROMPT, max_tokens=12, stop_at_eos=False, logits_processors=noting("ours"))
    assert text and len(seen["ours"]) >= 12
