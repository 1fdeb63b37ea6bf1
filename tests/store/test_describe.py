"""What is said of a directory, against the directory."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from mlx.utils import tree_flatten

from elm_mlx.errors import InputError
from elm_mlx.model.config import ModelConfig
from elm_mlx.store.describe import describe


def test_it_counts_what_is_there(tiny_model_dir: Path, tiny_config: ModelConfig) -> None:
    about = describe(tiny_model_dir)
    stored = mx.load(str(tiny_model_dir / "model.safetensors"))
    assert about.parameters == sum(weight.size for weight in stored.values())
    assert about.embedding_parameters == 320 * 64
    assert about.dtype == "bfloat16"
    assert about.file_bytes == (tiny_model_dir / "model.safetensors").stat().st_size
    assert about.memory == {"float32": 4 * about.parameters, "16 bits": 2 * about.parameters}
    assert about.kv_bytes_per_token["16 bits"] == tiny_config.kv_bytes_per_token(2)
    assert about.kv_bytes_per_token["float32"] == 2 * about.kv_bytes_per_token["16 bits"]
    assert (about.vocab_size, about.model_dim, about.head_dim, about.context) == (320, 64, 16, 512)
    assert about.glu and about.qk_norm and about.tied_head and about.tokenizer
    assert json.loads(json.dumps(about.to_dict()))["parameters"] == about.parameters


def test_the_layers_are_the_configs(tiny_model_dir: Path, tiny_config: ModelConfig) -> None:
    about = describe(tiny_model_dir)
    assert tuple(layer.query_heads for layer in about.layers) == tiny_config.num_query_heads
    assert tuple(layer.kv_heads for layer in about.layers) == tiny_config.num_kv_heads
    assert tuple(layer.ffn_dim for layer in about.layers) == tiny_config.ffn_dims
    rest = about.embedding_parameters + about.model_dim
    assert sum(layer.parameters for layer in about.layers) + rest == about.parameters


def test_ten_layers_and_more_are_told_apart(tmp_path: Path) -> None:
    config = tiny.scaled_config(64, num_layers=12, model_dim=32, head_dim=8)
    about = describe(tiny.write_directory(tmp_path, tiny.random_model(config), None))
    shapes = config.shapes()
    for i, layer in enumerate(about.layers):
        own = [math.prod(shape) for name, shape in shapes.items() if name.split(".")[2] == str(i)]
        assert layer.parameters == sum(own)
    assert not about.tokenizer


def test_the_deepest_config_takes_no_time(tmp_path: Path) -> None:
    layers = 10_000
    config = ModelConfig(4, 2, 2, (1,) * layers, (1,) * layers, (1.0,) * layers, ffn_dim_divisor=1)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    entries, end = {}, 0
    for name, shape in config.shapes().items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))
    started = time.process_time()
    about = describe(tmp_path)
    assert time.process_time() - started < 5, "seconds of this process; a quadratic one took a minute"
    assert len(about.layers) == layers and {layer.parameters for layer in about.layers} == {36}


def test_variants_are_named(tmp_path: Path) -> None:
    config = tiny.scaled_config(64, ffn_with_glu=False, normalize_qk_projections=False, share_input_output_layers=False)
    about = describe(tiny.write_directory(tmp_path, tiny.random_model(config), None, mx.float16))
    assert not about.glu and not about.qk_norm and not about.tied_head
    assert about.dtype == "float16"


def test_types_that_differ_are_all_named(tmp_path: Path) -> None:
    path = tiny.write_directory(tmp_path, tiny.random_model(tiny.scaled_config(64)), None)
    stored = dict(mx.load(str(path / "model.safetensors")))
    stored["transformer.norm.weight"] = stored["transformer.norm.weight"].astype(mx.float32)
    mx.save_safetensors(str(path / "model.safetensors"), stored)
    assert describe(path).dtype == "bfloat16 and float32"


def test_quantized_weights_are_described_as_such(tmp_path: Path) -> None:
    model = tiny.random_model(tiny.scaled_config(64, ffn_dim_divisor=32))
    parameters = sum(weight.size for _, weight in tree_flatten(model.parameters()))
    path = tiny.write_directory(tmp_path, model, None)
    nn.quantize(model, 32, 8)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = json.loads((path / "config.json").read_text()) | {"quantization": {"group_size": 32, "bits": 8}}
    (path / "config.json").write_text(json.dumps(config))
    about = describe(path)
    assert about.parameters == parameters
    assert about.dtype.startswith("8-bit, group 32")


def test_shards_are_added_up(tmp_path: Path, tiny_model_dir: Path) -> None:
    path = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    stored = sorted(mx.load(str(path / "model.safetensors")).items())
    mx.save_safetensors(str(path / "model-00001-of-00002.safetensors"), dict(stored[:5]))
    mx.save_safetensors(str(path / "model-00002-of-00002.safetensors"), dict(stored[5:]))
    (path / "model.safetensors").unlink()
    about = describe(path)
    assert about.file_bytes == sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert about.parameters == describe(tiny_model_dir).parameters


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0{}"])
def test_damaged_weights_are_named(tmp_path: Path, tiny_model_dir: Path, content: bytes) -> None:
    path = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model/model\.safetensors: "):
        describe(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        describe(path)


def test_a_directory_is_described_without_mlx(tiny_model_dir: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from elm_mlx.store.describe import describe; "
        f"describe(Path({str(tiny_model_dir)!r})); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "mlx" not in {name.split(".")[0] for name in done.stdout.split()}
