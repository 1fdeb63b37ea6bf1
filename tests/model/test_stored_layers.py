"""Products with weights as they are stored, against MLX's own dequantization and float32 products."""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import family_cases
import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from mlx.utils import tree_flatten

from elm_mlx import blas, device
from elm_mlx.inference.rows import Rows, prefill
from elm_mlx.model import lora_layers
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.stored_layers import StoredLayer, read_as_stored, read_replaced
from elm_mlx.store import loading

pytestmark = pytest.mark.skipif(not blas.reads_stored(), reason="cblas.c is not compiled here")
FLOATS = ["bfloat16", "float16"]
AFFINE = [f"affine {bits} {group}" for bits, group in itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128))]
SHAPES = [(2, 8), (3, 9), (13, 33), (29, 100), (131, 640), (12, 1152), (33, 523)]  # (outputs, inputs)
PROMPTS = blas.computes_many_rows()  # else OpenBLAS multiplies many rows
SMOLLM2 = Path(__file__).parents[3] / "shared" / "data" / "smollm2-135m-instruct"


def linear(kind: str, rows: int, columns: int, scales: mx.Dtype = mx.bfloat16, bias: bool = False) -> nn.Module:
    """One of MLX's, with seeded weights stored in `kind`."""
    made = nn.Linear(columns, rows, bias=bias)
    made.weight = mx.random.normal((rows, columns), key=mx.random.key(rows * columns))
    if kind in FLOATS:
        made.weight = made.weight.astype(device.DTYPES[kind])
        return made
    mode, bits, group = kind.split()
    made = made.to_quantized(int(group), int(bits), mode=mode)
    if mode == "affine":
        made.scales, made.biases = made.scales.astype(scales), made.biases.astype(scales)
    return made


def stored(kind: str, rows: int, columns: int, scales: mx.Dtype = mx.bfloat16) -> tuple[StoredLayer, mx.array]:
    """A layer that reads its weight as it is stored; and that weight in float32."""
    layer = linear(kind, rows, columns, scales)
    wide = lora_layers.dense_weight(layer)
    mx.eval(wide)
    assert read_as_stored(layer) and isinstance(layer, StoredLayer)
    assert mx.array_equal(lora_layers.dense_weight(layer), wide)  # its parameters are what they were
    return layer, wide


def drawn(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


def close(found: mx.array, expected: mx.array) -> bool:
    return bool((mx.abs(found - expected).max() <= 3e-6 * mx.abs(expected).max()).item())


@pytest.mark.parametrize("kind", [*FLOATS, *AFFINE, "mxfp4 4 32"])
@pytest.mark.usefixtures("two_threads")
def test_products_are_those_of_the_widened_weight(kind: str) -> None:
    """To the bit for up to eight rows, and for a prompt's; up to sixteen a row's result is the same whatever their
    number."""
    group = 1 if kind in FLOATS else int(kind.split()[2])
    for rows, columns in SHAPES:
        layer, wide = stored(kind, rows, max(columns // group, 1) * group)
        x = drawn(40, wide.shape[1])
        assert close(layer(x), x @ wide.T)
        assert not PROMPTS or (mx.array_equal(layer(x), x @ wide.T) and mx.array_equal(layer(x[:17]), layer(x)[:17]))
        for count in range(1, 17):
            found = layer(x[:count])
            assert mx.array_equal(found, layer(x[:16])[:count]), (rows, columns, count)
            assert count > 8 or mx.array_equal(found, x[:count] @ wide.T), (rows, columns, count)


@pytest.mark.usefixtures("two_threads")
def test_any_number_of_threads_shares_the_columns() -> None:
    """More than there are processors or portions too, and fewer again, whose threads still wait for work."""
    change = blas._openblas("openblas_set_num_threads")
    assert change is not None
    for outputs in (131, 1000, 4099):
        layer, wide = stored("affine 4 32", outputs, 2048)
        x = drawn(2, 2048)
        for threads in (1, 2, 7, 3, 2):
            change(threads)
            assert mx.array_equal(layer(x), x @ wide.T), (outputs, threads)


@pytest.mark.skipif(not blas.rounds_rows(), reason="this processor does not multiply bfloat16")
@pytest.mark.usefixtures("two_threads")
def test_many_rows_are_rounded_to_bfloat16_on_request() -> None:
    """Few are not, and a row's result depends on no other row."""
    for rows, columns in [*SHAPES, (70, 2000)]:
        layer, exact = linear("bfloat16", rows, columns), lora_layers.dense_weight(linear("bfloat16", rows, columns))
        x = drawn(600, columns)
        assert read_as_stored(layer, rounds=True) and isinstance(layer, StoredLayer) and layer.rounds
        rounded = x.astype(mx.bfloat16).astype(mx.float32) if columns % 2 == 0 else x
        found = layer(x)
        assert close(found, rounded @ exact.T), (rows, columns)
        for count in (17, 23, 24, 25, 128):
            assert mx.array_equal(layer(x[:count]), found[:count])
        for count in (1, 16):
            assert close(layer(x[:count]), x[:count] @ exact.T)
        biased = linear("bfloat16", rows, columns, bias=True)
        assert read_as_stored(biased, rounds=True)
        assert close(biased(x[:30]), rounded[:30] @ exact.T + biased.bias)


@pytest.mark.parametrize("scales", [mx.float32, mx.float16])
@pytest.mark.parametrize("kind", AFFINE[::3])
def test_scales_of_each_type(kind: str, scales: mx.Dtype) -> None:
    layer, wide = stored(kind, 77, 320, scales)
    for count in (1, 4, 20):
        assert close(layer(drawn(count, 320)), drawn(count, 320) @ wide.T)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_16_bit_number_is_widened_as_mlx_widens_it(kind: str) -> None:
    """NaN and the infinities too: each number in a row and a column of its own, times one."""
    every = mx.arange(1 << 16, dtype=mx.uint32).astype(mx.uint16).view(device.DTYPES[kind]).reshape(-1, 64)
    layer = nn.Linear(64, 1024, bias=False)
    expected = every.astype(mx.float32)
    finite = mx.isfinite(expected).all(axis=1, keepdims=True)
    layer.weight = mx.where(finite, every, 0)
    assert read_as_stored(layer)
    for count in (4, 64):
        assert mx.array_equal(layer(mx.eye(64))[:count], mx.where(finite, expected, 0).T[:count])
    layer = nn.Linear(64, 1024, bias=False)
    layer.weight = mx.where(finite, 0, every)
    assert read_as_stored(layer)
    assert mx.array_equal(mx.isnan(layer(mx.ones((1, 64))))[0], mx.isnan(mx.where(finite, 0, expected).sum(axis=1)))


@pytest.mark.parametrize("kind", ["bfloat16", "affine 4 32"])
def test_other_forms_of_products(kind: str) -> None:
    """Rows that don't lie side by side, columns for rows, a bias, a batch, and the gradient of what comes in."""
    layer, wide = stored(kind, 129, 160)
    x = drawn(6, 20, 320)[:, ::2, ::2]
    assert close(layer(x), x @ wide.T)
    turned = mx.contiguous(drawn(30, 160).T).T
    for rows in (turned, turned[:3]):
        assert close(layer(rows), rows @ wide.T)
    for count in (3, 30):
        rows, cotangent = drawn(count, 160), drawn(count, 129)
        assert close(mx.vjp(layer, [rows], [cotangent])[1][0], cotangent @ wide)
    biased = linear(kind, 129, 160, bias=True)
    expected = mx.addmm(biased.bias, drawn(3, 160), lora_layers.dense_weight(biased).T)
    assert read_as_stored(biased) and close(biased(drawn(3, 160)), expected)
    assert mx.array_equal(mx.compile(layer)(drawn(2, 160)), layer(drawn(2, 160)))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "affine 8 64", "mxfp4 4 32"])
def test_an_embedding_and_its_head(kind: str) -> None:
    embedding = nn.Embedding(50, 64)
    embedding.weight = drawn(50, 64)
    if kind in FLOATS:
        embedding.weight = embedding.weight.astype(device.DTYPES[kind])
    else:
        mode, bits, group = kind.split()
        embedding = embedding.to_quantized(int(group), int(bits), mode=mode)
    wide = lora_layers.dense_weight(embedding)
    assert read_as_stored(embedding)
    ids = mx.array([[1, 49, 0], [7, 7, 2]])
    assert embedding(ids).dtype == mx.float32 and mx.array_equal(embedding(ids), wide[ids])
    assert close(embedding.as_linear(drawn(3, 64)), drawn(3, 64) @ wide.T)


def test_what_cannot_be_read_stays_mlxs() -> None:
    for layer in (
        nn.Linear(64, 64), linear("bfloat16", 1, 64), linear("bfloat16", 64, 7), linear("bfloat16", 2, (1 << 15) + 1),
        nn.Linear(64, 64).to_quantized(mode="mxfp8"), nn.Conv1d(4, 4, 3), lora_layers.LoRALinear,
    ):  # fmt: skip
        before = type(layer)
        assert not read_as_stored(layer) and type(layer) is before


@pytest.mark.parametrize("kind", ["bfloat16", "affine 4 32"])
def test_a_weight_that_is_replaced_is_used(kind: str) -> None:
    layer, wide = stored(kind, 64, 64)
    kept = layer.weight
    if kind == "bfloat16":
        layer.weight = 2 * kept
        assert layer.handle() is None and close(layer(drawn(3, 64)), drawn(3, 64) @ (2 * wide).T)
        layer.weight = kept
    else:
        layer.update({"weight": mx.zeros_like(kept)})
        assert layer.handle() is None
        layer["weight"] = kept
    assert layer.handle() is not None and mx.array_equal(layer(drawn(3, 64)), drawn(3, 64) @ wide.T)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "affine 4 32"])
def test_a_weight_that_is_replaced_is_read_as_stored_again_when_asked(kind: str) -> None:
    layer, _ = stored(kind, 64, 64)
    other, wide = stored(kind, 64, 64)
    kept = layer.handle()
    model = nn.Sequential(layer, other)
    layer.update({name: value[::-1] for name, value in layer.parameters().items()})
    read_replaced(model)
    assert layer.handle() is not None and layer.handle() is not kept and isinstance(layer, StoredLayer)
    assert mx.array_equal(layer(drawn(3, 64)), other(drawn(3, 64))[:, ::-1])
    assert mx.array_equal(lora_layers.dense_weight(layer), wide[::-1])


def test_parameters_hold_no_handle() -> None:
    """What saves, counts or copies parameters sees weights as they are stored."""
    layer, wide = stored("affine 4 64", 64, 128)
    assert {name: value.nbytes for name, value in tree_flatten(layer.parameters())} == {
        "weight": 64 * 64, "scales": 64 * 4, "biases": 64 * 4,
    }  # fmt: skip
    copied = copy.deepcopy(layer)
    assert copied.handle() is not None and mx.array_equal(copied(drawn(2, 128)), layer(drawn(2, 128)))
    del layer
    gc.collect()
    assert mx.array_equal(copied(drawn(2, 128)), drawn(2, 128) @ wide.T)


def test_a_product_outlives_its_layer_and_an_address_is_used_again() -> None:
    """A description goes with the bytes that it is of: a float32 matrix that comes to lie there is one."""
    x = drawn(3, 256)
    for number in range(40):
        layer, wide = stored("bfloat16" if number % 2 else "affine 8 32", 96, 256)
        later = layer(x)
        del layer
        gc.collect()
        plain = [drawn(96, 256) + number for _ in range(3)]
        mx.eval(plain)
        assert mx.array_equal(later, x @ wide.T)
        assert all(close(x @ matrix.T, x @ (drawn(96, 256) + number).T) for matrix in plain)


@pytest.mark.usefixtures("two_threads")
def test_many_threads_at_once() -> None:
    layers = [stored(kind, 300, 512) for kind in ("bfloat16", "affine 4 32", "affine 8 64", "mxfp4 4 32")]
    expected = {(at, count): x @ wide.T for at, (_, wide) in enumerate(layers) for count in (1, 5, 60)
                for x in [drawn(count, 512)]}  # fmt: skip
    mx.eval(*expected.values(), [layer.parameters() for layer, _ in layers])

    def check(number: int) -> bool:
        with mx.stream(mx.new_stream(mx.cpu)):
            for (at, count), result in itertools.islice(itertools.cycle(expected.items()), number, number + 24):
                found = layers[at][0](drawn(count, 512))
                mx.eval(found)
                if not close(found, result):
                    return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(check, range(12)))


def test_a_forked_process_reads_them_too() -> None:
    layer, wide = stored("affine 4 64", 300, 512)
    address, x = layer.address, drawn(2, 512)
    mx.eval(x)
    expected = x @ wide.T
    result, rows = memoryview(mx.zeros((2, 300))), memoryview(x)
    mx.eval(expected)
    gemm = blas.own("elm_mlx_mark").cblas_sgemm  # type: ignore[union-attr]
    pid = os.fork()
    if pid == 0:  # MLX's own threads are not there: only the library is called
        pointers = [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (rows, result)]
        gemm(
            101, 111, 112, 2, 300, 512, ctypes.c_float(1), ctypes.c_void_p(pointers[0]), 512, ctypes.c_void_p(address),
            512, ctypes.c_float(0), ctypes.c_void_p(pointers[1]), 300,
        )  # fmt: skip
        os._exit(0 if result.tolist() == expected.tolist() else 1)
    assert os.waitpid(pid, 0)[1] == 0


# --- whole models


def decoded(model: Any, new: int) -> list[int]:
    """Greedy tokens after a short prompt, by the steps of `Rows`."""
    ids = [1, 9, 40, 7, 12, 33]
    caches = make_prompt_cache(model)
    token = mx.argmax(prefill(model, ids, caches), axis=-1)
    rows, found = Rows(model), []
    rows.join(caches, ids)
    for _ in range(new):
        found.append(int(token.item()))
        token = mx.argmax(rows.step(token), axis=-1)
    return found


def quantized(source: Path, target: Path, bits: int) -> Path:
    from mlx_lm import convert

    convert(str(source), str(target), quantize=True, q_group_size=64, q_bits=bits)
    return target


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_greedy_tokens_are_those_of_widened_weights(bits: int, classics_dir: Path, tmp_path: Path) -> None:
    path = classics_dir if bits == 16 else quantized(classics_dir, tmp_path / "q", bits)
    model = loading.load_model(path)
    assert sum(isinstance(module, StoredLayer) for module in model.modules()) > 8
    assert decoded(model, 100) == decoded(loading.open_model(path, widen=True).model, 100)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no ../shared with SmolLM2")
def test_greedy_tokens_of_a_real_chat_model() -> None:
    assert decoded(loading.load_model(SMOLLM2), 100) == decoded(loading.open_model(SMOLLM2, widen=True).model, 100)


@pytest.mark.parametrize("name", ["llama, biases", "phi3, partial", "olmo2", "mamba"])
def test_families(name: str, tmp_path: Path) -> None:
    path = family_cases.write(tmp_path / "model", name)
    weights = {name: weight.astype(mx.bfloat16) for name, weight in mx.load(str(path / "model.safetensors")).items()}
    mx.eval(weights)  # before the file is written anew
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    model, wide = loading.load_model(path), loading.open_model(path, widen=True).model
    assert any(isinstance(module, StoredLayer) for module in model.modules())
    assert decoded(model, 12) == decoded(wide, 12)


def test_a_model_is_trained_with_widened_weights(tiny_model_dir: Path) -> None:
    model = loading.open_model(tiny_model_dir, "float32", widen=True).model
    assert not any(isinstance(module, StoredLayer) for module in model.modules())
    assert {weight.dtype for _, weight in tree_flatten(model.parameters())} == {mx.float32}


def test_adapters_stand_beside_stored_weights(tmp_path: Path) -> None:
    """Also a copy's, which shares the weights: the memory of two is that of one and two thin matrices."""
    base = tiny.write_directory(tmp_path / "m", tiny.random_model(tiny.scaled_config(320)), None, mx.bfloat16)
    ids = mx.array([[1, 9, 40, 7]])
    found = []
    for widen in (False, True):
        model = loading.open_model(base, widen=widen).model
        memory = mx.get_active_memory()
        copied = copy.deepcopy(model, {id(array): array for _, array in tree_flatten(model.parameters())})
        for number, layer in enumerate(copied.layers):
            key = mx.random.key(number)
            layer.ffn.proj_1 = lora_layers.wrap(
                layer.ffn.proj_1, 4, 2.0, 0.0, key, dora=number % 2 == 0, adapted_head=False
            )
            layer.ffn.proj_1.lora_b = mx.random.normal(layer.ffn.proj_1.lora_b.shape, key=key)
        copied.eval()
        found.append(copied(ids))
        mx.eval(found, copied.parameters())
        assert mx.get_active_memory() - memory < 0.5 * sum(x.nbytes for _, x in tree_flatten(model.parameters()))
        assert not mx.allclose(model(ids), found[-1])
    assert mx.allclose(*found, rtol=1e-5, atol=1e-5)
