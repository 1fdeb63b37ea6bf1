"""A saved cache gives the bits that were saved, to the very model that made them, and never half of them."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_cases
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_map
from safetensors_headers import raw

from elm_mlx import stream_generate
from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.batch import generate_batch
from elm_mlx.inference.generation import Response
from elm_mlx.inference.rows import PREFILL_STEP, prefill
from elm_mlx.inference.saved_cache import CacheFiles, Origin, check_target, load_cache, origin_of, save_cache
from elm_mlx.model.cache import KVCache, make_prompt_cache
from elm_mlx.model.network import Model
from elm_mlx.store import adapters
from elm_mlx.store.loading import load_model

VOCAB, HERE = 96, Origin("a" * 64)
LONG = 2 * PREFILL_STEP + 40


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.random_model(tiny.scaled_config(VOCAB, max_context_length=2048, rope_max_length=4096), seed=3)


def drawn(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab, length).tolist()


def read(model: Model, ids: list[int]) -> list[KVCache]:
    caches = make_prompt_cache(model)
    mx.eval(prefill(model, ids, caches), [cache.state for cache in caches])
    return caches


def run(model: Model, ids: list[int], **options: Any) -> list[Response]:
    return list(stream_generate(model, None, ids, max_tokens=12, stop_at_eos=False, **options))


def saved(path: Path, model: Model, ids: list[int], origin: Origin = HERE) -> Path:
    save_cache(path, origin, ids, read(model, ids))
    return path


def told(responses: list[Response]) -> list[tuple[int, float]]:
    return [(response.token, response.logprob) for response in responses]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_what_is_loaded_is_what_was_saved(model: Model, tmp_path: Path, dtype: mx.Dtype) -> None:
    typed = tiny.random_model(model.config, seed=3)
    typed.update(tree_map(lambda weight: weight.astype(dtype), typed.parameters()))
    ids, caches, loaded = drawn(300), make_prompt_cache(typed), make_prompt_cache(typed)
    prefill(typed, ids, caches)
    save_cache(tmp_path / "c", HERE, ids, caches)
    assert load_cache(tmp_path / "c", HERE, typed, loaded) == ids
    for cache, again in zip(caches, loaded, strict=True):
        assert again.offset == cache.offset == 300 and again.text_length == 300
        for array, expected in zip(again.block(0, 0, 300), cache.block(0, 0, 300), strict=True):
            assert array.dtype == dtype
            assert mx.array_equal(array, expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("end", [LONG, LONG - 100, 5, 0], ids=["all", "most", "a beginning", "nothing"])
@pytest.mark.parametrize("sampling", [{}, {"temp": 0.9, "seed": 5, "repetition_penalty": 1.3}], ids=["greedy", "drawn"])
def test_a_text_after_loading_is_the_one_of_reading_it_again(
    model: Model, tmp_path: Path, end: int, sampling: dict[str, Any]
) -> None:
    """To the bit, whatever it shares with what was saved; and only whole pieces of that are kept."""
    document = drawn(LONG)
    prompt = document[:end] + drawn(PREFILL_STEP + 7, seed=1)
    caches = make_prompt_cache(model)
    cached = load_cache(saved(tmp_path / "c", model, document), HERE, model, caches)
    responses = run(model, prompt, prompt_cache=caches, cached=cached, **sampling)
    assert told(responses) == told(run(model, prompt, **sampling))
    assert responses[0].cached_tokens == end - end % PREFILL_STEP
    assert responses[0].prompt_tokens == len(prompt)


def test_several_prompts_go_on_from_one_document(model: Model, tmp_path: Path) -> None:
    document, caches = drawn(LONG), make_prompt_cache(model)
    prompts = [document + drawn(9, seed=1), [*document[:200], 7, 8, 9], document + drawn(9, seed=1), [5, 6]]
    cached = load_cache(saved(tmp_path / "c", model, document), HERE, model, caches)
    done = generate_batch(model, None, prompts, max_tokens=6, prompt_cache=caches, cached=cached)  # type: ignore[arg-type]
    plain = generate_batch(model, None, prompts, max_tokens=6)  # type: ignore[arg-type]
    assert [each.logprobs for each in done] == [each.logprobs for each in plain]
    assert all(cache.offset == LONG for cache in caches)


def test_a_state_is_saved_and_goes_on(family_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(family_dirs["mamba"])
    ids, caches = drawn(20, vocab=90), make_prompt_cache(model)
    cached = load_cache(saved(tmp_path / "c", model, ids), HERE, model, caches)
    prompt = [*ids, 5, 9]
    responses = run(model, prompt, prompt_cache=caches, cached=cached)
    assert responses[0].cached_tokens == 20
    plain = run(model, prompt)
    assert [each.token for each in responses] == [each.token for each in plain]
    caches = make_prompt_cache(model)
    load_cache(tmp_path / "c", HERE, model, caches)
    changed = [*ids[:9], 5, 9]
    again = run(model, changed, prompt_cache=caches, cached=cached)
    assert again[0].cached_tokens == 0 and told(again) == told(run(model, changed))


@pytest.mark.parametrize("beyond", [-4, 10], ids=["rotated as short", "rotated as long"])
def test_longrope_takes_from_a_file_what_was_rotated_alike(tmp_path: Path, beyond: int) -> None:
    model = load_model(family_cases.write(tmp_path / "phi3", "phi3, longrope, partial, tied"))
    switch, vocab = model.config.rope_switch, model.config.vocab_size
    assert switch is not None
    document = drawn(switch + beyond, vocab=vocab)
    prompt = [*document, *drawn(switch + 20 - len(document), seed=1, vocab=vocab)]
    caches = make_prompt_cache(model)
    save_cache(tmp_path / "c", HERE, document, read(model, document))
    cached = load_cache(tmp_path / "c", HERE, model, caches)
    found = list(stream_generate(model, None, prompt, max_tokens=3, prompt_cache=caches, cached=cached, prefill_step=4))
    plain = list(stream_generate(model, None, prompt, max_tokens=3, prefill_step=4))
    assert (found[0].cached_tokens > 0) == (len(document) > switch)
    assert [each.token for each in found] == [each.token for each in plain]
    assert [each.logprob for each in found] == pytest.approx([each.logprob for each in plain], abs=1e-4)


# --- what is refused


def refused(path: Path, model: Model, reason: str, origin: Origin = HERE) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        load_cache(path, origin, model, make_prompt_cache(model))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_cache_of_something_else_is_refused(model: Model, tmp_path: Path, family_dirs: dict[str, Path]) -> None:
    path = saved(tmp_path / "c", model, drawn(9))
    refused(path, model, "a cache of another model, or of this one before it changed: make it", Origin("b" * 64))
    refused(path, model, "of the model without an adapter: give the same --adapter", Origin("a" * 64, "c" * 64))
    adapted = saved(tmp_path / "adapted", model, drawn(9), Origin("a" * 64, "c" * 64))
    refused(adapted, model, "of the model with an adapter: give", HERE)
    refused(adapted, model, "of another adapter: give", Origin("a" * 64, "d" * 64))
    refused(path, load_model(family_dirs["mamba"]), "holds 'keys and values', and states are wanted")
    refused(path, tiny.random_model(tiny.scaled_config(VOCAB, head_dim=32)), r"damaged: array 0\.0 of shape .* missing")
    refused(path, tiny.random_model(tiny.scaled_config(VOCAB, max_context_length=8)), "no list of up to 8 tokens")
    half = tiny.random_model(model.config)
    half.update(tree_map(lambda weight: weight.astype(mx.float16), half.parameters()))
    refused(path, half, "was computed in float32, and now float16 is: .*choose --compute-dtype")
    rounded = saved(tmp_path / "rounded", model, drawn(9), replace(HERE, products="bfloat16"))
    refused(rounded, model, "has a prompt in bfloat16, which now is in float32: choose --compute-dtype")
    refused(path, model, "has a prompt in float32, which now is in bfloat16", replace(HERE, products="bfloat16"))
    refused(tmp_path / "none", model, "No such file|no such file")


def test_a_model_is_told_by_its_weights_its_config_and_its_adapter(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    directory, config = tmp_path / "m", tiny.scaled_config(320)
    tiny.write_directory(directory, tiny.random_model(config), tiny_tokenizer_file.read_bytes())
    first = origin_of(directory)
    assert origin_of(directory) == first and first.adapter == ""
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "rope_freq_constant": 500_000}))
    assert origin_of(directory).model != first.model
    tiny.write_directory(directory, tiny.random_model(config, seed=1), None)
    assert origin_of(directory).model != first.model
    found = set()
    for seed, scale in ((1, 2.0), (2, 2.0), (1, 4.0)):
        model = tiny.random_model(config)
        adapter = adapters.plan(config, rank=2, alpha=2 * scale)
        adapters.attach(model, adapter, seed)
        path = tmp_path / f"adapter{seed}-{scale}"
        path.mkdir()
        adapters.save(path, model, adapter)
        found.add(origin_of(directory, path))
    assert len(found) == 3 and len({origin.model for origin in found}) == 1


def test_a_file_that_is_cut_or_changed_anywhere_is_refused(model: Model, tmp_path: Path) -> None:
    path = saved(tmp_path / "c", model, drawn(5))
    whole, draw = path.read_bytes(), random.Random(1)
    for length in (0, 7, 8, 100, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(20))):
        path.write_bytes(whole[:length])
        refused(path, model, "safetensors|its tensors take")
    for _ in range(60):
        at = draw.randrange(len(whole) - 8 - int.from_bytes(whole[:8], "little"))
        at = len(whole) - 1 - at
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        refused(path, model, "damaged: its contents are not those that were saved")


def test_a_header_that_lies_is_believed_in_nothing(model: Model, tmp_path: Path) -> None:
    path = saved(tmp_path / "c", model, drawn(5))
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def lie(change: Callable[[dict[str, Any]], object], reason: str) -> None:
        told = json.loads(json.dumps(header))
        change(told)
        refused(raw(path, told, data), model, reason)

    lie(lambda told: told["__metadata__"].update(sha256="0" * 64), "not those that were saved")
    lie(lambda told: told["__metadata__"].update(text_length="9" * 99), "not those that were saved")
    lie(lambda told: told["__metadata__"].update(text_length="x"), "damaged")
    lie(lambda told: told["__metadata__"].pop("text_length"), "damaged")
    lie(lambda told: told["__metadata__"].update(kind=["\x1b"]), "holds ")
    lie(lambda told: told["__metadata__"].update(elm_mlx="elm-mlx cache 9"), "no cache that this version has saved")
    lie(lambda told: told.update(__metadata__=[]), "no cache that this version has saved")
    lie(lambda told: told["tokens"].update(dtype="F32"), "no list of up to 2048 tokens")
    lie(lambda told: told["tokens"].update(shape=[5, 1]), "no list of up to 2048 tokens")
    lie(lambda told: told.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "no layer needs")
    lie(lambda told: told.update({"0.9": told.pop("0.1")}), r"array 0\.1 of shape")
    refused(
        raw(path, {"tokens": {"dtype": "I32", "shape": [2**40], "data_offsets": [0, 2**42]}}), model, "4398046511104"
    )


def test_tokens_outside_the_vocabulary_are_damage(model: Model, tmp_path: Path) -> None:
    caches = read(model, drawn(3))
    save_cache(tmp_path / "c", HERE, [5, 6, 96], caches)
    refused(tmp_path / "c", model, "outside the vocabulary")
    save_cache(tmp_path / "c", HERE, [5, 6, -1], caches)
    refused(tmp_path / "c", model, "outside the vocabulary")


def test_no_other_file_is_replaced(model: Model, tmp_path: Path) -> None:
    for name, content in (("notes.txt", b"mine"), ("w.safetensors", b"")):
        (tmp_path / name).write_bytes(content)
        if not content:
            mx.save_safetensors(str(tmp_path / name), {"a": mx.ones(3)})
        before = (tmp_path / name).read_bytes()
        with pytest.raises(InputError, match="exists, and is no saved cache; choose another name"):
            saved(tmp_path / name, model, drawn(3))
        assert (tmp_path / name).read_bytes() == before
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match="exists, and is no saved cache"):
        check_target(tmp_path / "d")
    with pytest.raises(InputError, match="gone is no directory"):
        check_target(tmp_path / "gone" / "c")
    saved(saved(tmp_path / "c", model, drawn(3)), model, drawn(4))
    assert len(load_cache(tmp_path / "c", HERE, model, make_prompt_cache(model))) == 4


def test_what_cannot_be_used_is_said_before_a_model_is_loaded(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(InputError, match="is no directory"):
        CacheFiles(tiny_model_dir, None, None, tmp_path / "gone" / "c")
    other = tiny.random_model(tiny.scaled_config(VOCAB))
    with pytest.raises(InputError, match="of another model"):
        CacheFiles(tiny_model_dir, None, saved(tmp_path / "c", other, drawn(3)), None)


# --- disks and signals


def test_a_full_disk_leaves_the_old_cache(model: Model, tmp_path: Path) -> None:
    path = saved(tmp_path / "c", model, drawn(5))
    before, caches = path.read_bytes(), read(model, drawn(900))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, hard))
    try:
        with pytest.raises(ElmError, match="cannot be written: File too large; nothing was changed"):
            save_cache(path, HERE, drawn(900), caches)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c"]  # noqa: PTH208


_FOREVER = """
import elm_mlx, sys, tiny
import mlx.core as mx
from pathlib import Path
from elm_mlx.inference.rows import prefill
from elm_mlx.inference.saved_cache import Origin, save_cache
from elm_mlx.model.cache import make_prompt_cache
model = tiny.random_model(tiny.scaled_config(96, max_context_length=2048, rope_max_length=4096), seed=3)
texts = []
for length in (700, 900):
    caches = make_prompt_cache(model)
    mx.eval(prefill(model, [5] * length, caches), [cache.state for cache in caches])
    texts.append(([5] * length, caches))
print("ready", flush=True)
while True:
    for ids, caches in texts:
        save_cache(Path(sys.argv[1]), Origin("a" * 64), ids, caches)
"""


def test_killed_at_any_moment_there_is_one_of_them_whole(model: Model, tmp_path: Path) -> None:
    path = saved(tmp_path / "c", model, [5] * 700)
    draw = random.Random(3)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for _ in range(5):
        command = [sys.executable, "-c", _FOREVER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0.0, 0.1))
            process.send_signal(signal.SIGKILL)
        assert load_cache(path, HERE, model, make_prompt_cache(model)) in ([5] * 700, [5] * 900)
    saved(path, model, [5] * 700)
    assert os.listdir(tmp_path) == ["c"]  # noqa: PTH208  what a killed writer left goes with the next one
