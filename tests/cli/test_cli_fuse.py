"""Adapters on the command line: fuse, generate, chat and info with one, and other tools' brought in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from commands import Run

from elm_mlx.safetensors_file import fingerprint
from elm_mlx.store import adapters
from elm_mlx.store.adapters import plan
from elm_mlx.store.loading import load, load_model


@pytest.fixture
def adapter(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """One that changes what the tiny model says, and is said to be made for it."""
    model = load_model(tiny_model_dir, "float32")
    made = replace(plan(model.config, rank=4), model_sha256=fingerprint(tiny_model_dir))
    adapters.attach(model, made)
    for number, (_, module) in enumerate(model.named_modules()):
        if "lora_b" in module:
            module.lora_b = 0.2 * mx.random.normal(module.lora_b.shape, key=mx.random.key(number))
    adapters.save(tmp_path / "adapter", model, made)
    return tmp_path / "adapter"


def test_fused_says_what_model_and_adapter_say(run: Run, tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    options = ("--prompt", "the quick", "--temp", 0, "--max-tokens", 12)
    alone = run("generate", tiny_model_dir, *options)[1]
    code, together, err = run("generate", tiny_model_dir, *options, "--adapter", adapter)
    assert code == 0 and together != alone and f"adapter {adapter}: LoRA of rank 4" in err
    assert load_model(tiny_model_dir, adapter_path=adapter) is not None
    code, out, err = run("fuse", tiny_model_dir, adapter, tmp_path / "fused")
    assert (code, err) == (0, "")
    assert "LoRA of rank 4, scale 2, on 12 modules; moves the logits by" in out
    assert "equal but for rounding to bfloat16, which explains 0.047" in out
    assert (
        "positions: built-in: excerpts of two other books" in out
        and f"wrote       {tmp_path / 'fused'}, bfloat16" in out
    )
    assert run("info", tmp_path / "fused")[0] == 0


def small(model_dir: Path, path: Path, size: float) -> Path:
    """An adapter of hardly any effect."""
    model = load_model(model_dir, "float32")
    made = plan(model.config, rank=4)
    adapters.attach(model, made)
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = size * mx.random.normal(module.lora_b.shape, key=mx.random.key(0))
    adapters.save(path, model, made)
    return path


def test_what_is_lost_in_16_bits_is_kept_by_a_wider_type(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = small(tiny_model_dir, tmp_path / "adapter", 1e-4)
    code, out, _ = run("fuse", tiny_model_dir, adapter, tmp_path / "fused")
    assert code == 0 and "little of it is left; --dtype float32 keeps it\n" in out
    code, out, _ = run("fuse", tiny_model_dir, adapter, tmp_path / "wide", "--dtype", "float32")
    assert code == 0 and "warning" not in out and f"{tmp_path / 'wide'}, float32" in out
    assert (
        "--dtype int4: is not one of float32"
        in run("fuse", tiny_model_dir, adapter, tmp_path / "none", "--dtype", "int4")[2]
    )


def test_what_a_quantized_model_takes_up_is_told(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    code, _, err = run("quantize", tiny_model_dir, base, "--bits", 4, "--group-size", 32)
    assert code == 0, err
    adapter = small(base, tmp_path / "much", 0.2)
    code, out, err = run("fuse", base, adapter, tmp_path / "fused")
    assert code == 0 and "% of the quantized weights that the adapter changes" in out, err
    assert " nats that the adapter moves it" in out and "kept " in out
    adapter = small(base, tmp_path / "little", 1e-5)
    code, out, err = run("fuse", base, adapter, tmp_path / "same")
    assert (code, out, err.count("\n")) == (1, "", 1) and not (tmp_path / "same").exists()
    assert "keep too little of what the adapter changes" in err and "--dequantize keeps it" in err
    code, _, err = run("fuse", base, adapter, tmp_path / "none", "--dtype", "float32")
    assert code == 2 and "float32 needs --dequantize too" in err
    flags = ("--dequantize", "--dtype", "float32")
    code, out, _ = run("fuse", base, adapter, tmp_path / "wide", *flags)
    assert code == 0 and "warning" not in out and "wide, float32" in out


def test_chat_with_an_adapter(run: Run, tiny_model_dir: Path, adapter: Path) -> None:
    options = ("--max-tokens", 8, "--temp", 0)
    code, alone, _ = run("chat", tiny_model_dir, *options, stdin="the fox\n")
    assert code == 0
    code, together, err = run("chat", tiny_model_dir, *options, "--adapter", adapter, stdin="the fox\n")
    assert code == 0 and together != alone and "LoRA" in err


def test_info_shows_it(run: Run, tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    code, out, _ = run("info", tiny_model_dir, "--adapter", adapter)
    assert code == 0 and "LoRA of rank 4, scale 2, on 12 modules" in out
    assert "made for    this model" in out and "qkv_proj                 rank 4, in 3 layers" in out
    about = json.loads(run("info", tiny_model_dir, "--adapter", adapter, "--json")[1])["adapter"]
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    assert about["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert run("info", "--adapter", adapter)[0] == 2
    other = tiny.write_directory(tmp_path / "other", tiny.random_model(load_model(tiny_model_dir).config, 1), None)
    code, _, err = run("info", other, "--adapter", adapter)
    assert code == 2 and "was made for a model with other weights" in err


def test_a_text_to_compare_on(run: Run, tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the quick brown fox")
    tokenizer = load(tiny_model_dir)[1]
    assert tokenizer is not None
    code, out, _ = run("fuse", tiny_model_dir, adapter, tmp_path / "fused", "--text", tmp_path / "text")
    assert code == 0 and f"logits at {len(tokenizer.encode('the quick brown fox'))} positions" in out
    (tmp_path / "text").write_text("")
    code, _, err = run("fuse", tiny_model_dir, adapter, tmp_path / "other", "--text", tmp_path / "text")
    assert code == 2 and "the text to compare logits on is empty" in err
    code, _, err = run("fuse", tiny_model_dir, adapter, tmp_path / "other", "--text", tmp_path / "nowhere")
    assert code == 2 and "nowhere: cannot be read" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fuse", "MODEL", "nowhere", "out"), "nowhere: no such directory; an adapter is one with"),
        (("fuse", "nowhere", "ADAPTER", "out"), "nowhere: no such directory"),
        (("fuse", "MODEL", "MODEL", "out"), "holds no adapter_config.json, so it is not an adapter"),
        (("generate", "MODEL", "-p", "x", "--adapter", "nowhere"), "nowhere: no such directory; an adapter"),
        (("chat", "MODEL", "--adapter", "nowhere"), "nowhere: no such directory; an adapter"),
        (("adapter", "MODEL", "nowhere", "out"), "nowhere: no such file or directory"),
        (("adapter", "MODEL", "ADAPTER", "out", "--to", "onnx"), "--to onnx: is not one of mlx, peft"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    run: Run,
    tiny_model_dir: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": tiny_model_dir, "ADAPTER": adapter}
    code, _, err = run(*(places.get(argument, argument) for argument in arguments))
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_to_peft_and_back(run: Run, tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    code, out, _ = run("adapter", tiny_model_dir, adapter, tmp_path / "peft", "--to", "peft")
    assert code == 0 and "LoRA of rank 4" in out
    assert sorted(entry.name for entry in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    code, out, err = run("info", tiny_model_dir, "--adapter", tmp_path / "peft")
    assert code == 0 and "LoRA of rank 4, scale 2, on 12 modules" in out, err
    options = ("--prompt", "the quick", "--temp", 0, "--max-tokens", 12)
    said = [run("generate", tiny_model_dir, *options, "--adapter", path)[1] for path in (adapter, tmp_path / "peft")]
    assert said[0] == said[1] != run("generate", tiny_model_dir, *options)[1]
    assert run("fuse", tiny_model_dir, tmp_path / "peft", tmp_path / "fused")[0] == 0
    assert run("adapter", tiny_model_dir, tmp_path / "peft", tmp_path / "back")[0] == 0
    first, back = (mx.load(str(path / "adapters.safetensors")) for path in (adapter, tmp_path / "back"))
    assert first.keys() == back.keys() and all(mx.array_equal(first[name], back[name]) for name in first)
    code, _, err = run("adapter", tiny_model_dir, tmp_path / "peft", tmp_path / "back")
    assert code == 2 and "exists already; pass --overwrite" in err
    assert run("adapter", tiny_model_dir, tmp_path / "peft", tmp_path / "back", "--overwrite")[0] == 0
    shutil.copy(adapter / "adapter_config.json", tmp_path / "back" / "mine.txt")
    code, _, err = run("adapter", tiny_model_dir, tmp_path / "peft", tmp_path / "back", "--overwrite")
    assert code == 2 and "it holds 'mine.txt'" in err
