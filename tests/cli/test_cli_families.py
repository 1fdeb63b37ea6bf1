"""Other families by the commands: fine-tuned, fused and asked; what mlx-lm makes of what is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import other_models
import pytest
from commands import Run
from mlx.utils import tree_flatten

from elm_mlx.errors import InputError
from elm_mlx.model.config import read_config
from elm_mlx.store import fusion, loading
from elm_mlx.train.finetuning import Finetuning
from elm_mlx.train.settings import LoraSettings, MethodSettings

IDS = mx.array([[(i * 37 + 11) % 380 for i in range(24)]])
SMOL = Path(__file__).parents[3] / "shared" / "data" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = ({"prompt": "the crow " * (i % 3 + 1), "completion": f"the pebble {i % 4}"} for i in range(16))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def _by_mlx_lm(path: Path, adapter: Path | None = None) -> mx.array:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model as load_theirs

    model = load_theirs(path)[0]
    if adapter is not None:
        model = load_adapters(model, str(adapter))
        model.eval()
    return model(IDS)


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", ("--grad-checkpoint",)), ("mistral", ("--dora",)), ("phi3", ()), ("olmo2", ()), ("mamba", ())],
)
def test_an_adapter_is_trained_and_fused(
    name: str, options: tuple[str, ...], run: Run, family_dirs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    model, out, fused = family_dirs[name], tmp_path / "out", tmp_path / "fused"
    code, shown, error = run(
        "lora", model, "--data", data, "--out", out, "--iters", 12, "--rank", 4, "--learning-rate", 0.02,
        "--batch-size", 2, "--max-seq-length", 32, *options,
    )  # fmt: skip
    assert code == 0, error
    assert ("one example in each row" in shown + error) == (name == "mamba")
    losses = _losses(out)
    assert losses[-1] < 0.8 * losses[0]
    adapted = loading.open_model(model, adapter_path=out)
    plain = loading.load_model(model)(IDS)
    assert not mx.allclose(adapted.model(IDS), plain, atol=1e-2)
    assert mx.allclose(adapted.model(IDS), _by_mlx_lm(model, out), atol=1e-3)
    code, _, error = run("fuse", model, out, fused)
    assert code == 0, error
    assert mx.allclose(_by_mlx_lm(fused), adapted.model(IDS), atol=1e-3)
    assert mx.allclose(loading.load_model(fused)(IDS), adapted.model(IDS), atol=1e-3)


@pytest.mark.parametrize(("said", "command"), [(True, "fuse"), (None, "fuse"), (True, "quantize")])
def test_what_is_made_of_a_model_says_how_its_head_is_tied(
    said: bool | None, command: str, run: Run, data: Path, tmp_path: Path
) -> None:
    """A head of its own, whatever config.json says: mlx-lm, which does not look, reads what is left behind alike."""
    wide = {"hidden_size": 96, "intermediate_size": 192, "tie_word_embeddings": False}
    model, made, adapter = other_models.write_model(tmp_path / "model", "llama", wide), tmp_path / "made", []
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": said}))
    if command == "fuse":
        adapter = [tmp_path / "out"]
        code, _, error = run("lora", model, "--data", data, "--out", *adapter, "--iters", 1, "--max-seq-length", 32)
        assert code == 0, error
    code, _, error = run(command, model, *adapter, made)
    assert code == 0, error
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False
    theirs, ours = _by_mlx_lm(made), loading.load(made)[0](IDS)
    assert mx.abs(theirs - ours).mean() < 0.1 * ours.std()  # mlx-lm computes in bfloat16


def test_grad_checkpoint_changes_no_loss(run: Run, family_dirs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    found = []
    for options in ((), ("--grad-checkpoint",)):
        out = tmp_path / f"out{len(options)}"
        run("lora", family_dirs["olmo2"], "--data", data, "--out", out, "--iters", 3, "--max-seq-length", 64, *options)
        found.append(_losses(out))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_examples_are_as_long_as_the_family_can_read(run: Run, family_dirs: dict[str, Path], data: Path) -> None:
    context = read_config(family_dirs["llama"]).max_context_length
    assert run("data", data, "--model", family_dirs["llama"], "--max-seq-length", context)[0] == 0
    code, _, error = run("data", data, "--model", family_dirs["llama"], "--max-seq-length", context + 1)
    assert code == 2 and f"the model reads {context} tokens at most" in error
    # a state has no end
    assert run("data", data, "--model", family_dirs["mamba"], "--max-seq-length", 1 << 20)[0] == 0


def test_an_adapter_of_mlx_lm(family_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Its defaults: all linears of the last layers, no names."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model as load_theirs

    model = load_theirs(family_dirs["llama"])[0]
    model.freeze()
    settings = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    linear_to_lora_layers(model, 1, settings)
    trained = {name: mx.random.normal(value.shape) * 0.1 for name, value in tree_flatten(model.trainable_parameters())}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), trained)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours = loading.load_model(family_dirs["llama"], adapter_path=tmp_path)
    assert mx.allclose(ours(IDS), _by_mlx_lm(family_dirs["llama"], tmp_path), atol=1e-3)


def test_what_cannot_be_done_is_said(run: Run, family_dirs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    def refused(match: str, *arguments: object) -> None:
        code, _, error = run(*arguments)
        assert code == 2 and match in error and error.count("\n") == 1, error

    out = ("--data", data, "--out", tmp_path / "out")
    refused("no module is called 'embed_tokens'", "lora", family_dirs["llama"], *out, "--target", "embed_tokens")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    refused("dpo puts two answers in a row", "dpo", family_dirs["mamba"], "--data", pairs, "--out", tmp_path / "out")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"lora_parameters": {"rank": 4, "scale": 1.0, "keys": ["model.embed_tokens"]}})
    )
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    refused("adapts the embedding", "generate", family_dirs["llama"], "-p", "a", "--adapter", tmp_path)


def test_info_shows_what_there_is(run: Run, family_dirs: dict[str, Path]) -> None:
    _, shown, _ = run("info", family_dirs["llama"])
    assert "Llama, " in shown and "q_proj, k_proj, v_proj, o_proj, gate_proj, down_proj, up_proj" in shown
    assert "512 tokens" in shown and "untied head" in shown
    _, shown, _ = run("info", family_dirs["mamba"], "--json")
    found: dict[str, Any] = json.loads(shown)
    assert found["family"] == "Mamba" and found["keeps"] == "a state" and found["kv_bytes_per_token"]["float32"] == 0
    _, shown, _ = run("info", family_dirs["mamba"])
    assert "which cannot be rewound" in shown


def test_the_commands_answer(run: Run, family_dirs: dict[str, Path]) -> None:
    code, said, error = run("generate", family_dirs["llama"], "-p", "the crow", "--max-tokens", 5)
    assert code == 0 and said and "5 tokens" in error
    code, shown, error = run("generate", family_dirs["phi3"], "-p", "the crow", "--max-tokens", 2, "--json")
    assert code == 0 and json.loads(shown)["prompt"] == "the crow", error


def test_a_quantized_model_is_tuned_and_fused(run: Run, data: Path, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model as load_theirs
    from mlx_lm.utils import quantize_model, save_config

    wide = {"hidden_size": 96, "intermediate_size": 192}
    model, config = load_theirs(other_models.write_model(tmp_path / "dense", "llama", wide))
    quantized, config = quantize_model(model, config, 32, 8)
    path = tmp_path / "quantized"
    shutil.copytree(tmp_path / "dense", path)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(quantized.parameters())))
    save_config(config, path / "config.json")
    options = ("--iters", 6, "--learning-rate", 0.02, "--max-seq-length", 64)
    code, _, error = run("lora", path, "--data", data, "--out", tmp_path / "out", *options)
    assert code == 0, error
    adapted = loading.load_model(path, adapter_path=tmp_path / "out")(IDS)
    done = fusion.fuse(path, tmp_path / "out", tmp_path / "again")
    assert done.tolerance is None and "8-bit" in done.dtype
    fusion.fuse(path, tmp_path / "out", tmp_path / "wide", dequantize=True)
    assert mx.allclose(_by_mlx_lm(tmp_path / "wide"), adapted, atol=1e-3)
    with pytest.raises(InputError, match="give the model that it was quantized from"):
        Finetuning(LoraSettings(path, (str(data),), tmp_path / "full", method=MethodSettings(full=True)))


@pytest.mark.skipif(not SMOL.exists(), reason=f"no {SMOL}")
def test_a_real_chat_model_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said, error = run("chat", SMOL, "--temp", 0, stdin="What is the capital of France?\n")
    assert code == 0 and said == "The capital of France is Paris.\n", error


@pytest.mark.parametrize("content", ["{}".encode("utf-16"), b"[]", b"{"])
def test_a_config_that_cannot_be_read_is_what_is_named(
    content: bytes, run: Run, family_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """And no tokenizer that another family would have."""
    broken = Path(shutil.copytree(family_dirs["llama"], tmp_path / "broken"))
    (broken / "config.json").write_bytes(content)
    for command in (("generate", broken, "-p", "a"), ("chat", broken), ("info", broken)):
        code, _, err = run(*command)
        assert code == 2 and "config.json" in err and "tokenizer" not in err, err
