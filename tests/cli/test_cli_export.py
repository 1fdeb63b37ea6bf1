"""`elm-mlx export` to a GGUF file: what it prints, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import gguf_cases
import pytest
from checkpoints import save_hub, save_pt, tiny, weights
from commands import Run

CONFIG = tiny()


def test_a_model_of_floats(run: Run, tmp_path: Path) -> None:
    model = save_hub(tmp_path / "model", CONFIG, weights(CONFIG))
    code, output, error = run("export", model, tmp_path / "a.gguf", "--verify")
    assert (code, error) == (0, "")
    assert f"verified    {CONFIG.parameters:,} values, each the same\n" in output
    assert "parameters in F32, nothing rounded, 0.3 MB" in output
    code, output, _error = run("export", model, tmp_path / "a.gguf", "--type", "q8_0", "--overwrite", "--modelfile")
    assert code == 0
    assert "values from float32 to Q8_0: largest difference 0.0" in output
    assert "Modelfile: ollama create a -f " in output


def test_an_adapter(run: Run, tmp_path: Path) -> None:
    case = gguf_cases.write(tmp_path / "case", "OpenELM, adapter")
    assert case.adapter_directory is not None
    to = tmp_path / "a.gguf"
    code, output, _error = run("export", case.directory, to, "--adapter", case.adapter_directory)
    assert code == 0
    assert output.startswith(f"wrote       {to}: LoRA of rank 4, scale 1.5, on 12 modules, ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["out", "--type", "f16"], "--type is for a GGUF file, and out does not end with .gguf"),
        (["out", "--modelfile"], "--modelfile is for a GGUF file"),
        (["a.gguf", "--dtype", "float16"], "--dtype is for a PyTorch checkpoint"),
        (["a.gguf", "--adapter", "b", "--verify"], "--verify is for a model, and --adapter writes an adapter alone"),
    ],
)
def test_what_does_not_go_together(
    options: list[str], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pt(tmp_path / "model.pt", weights(CONFIG))
    code, _output, error = run("export", "model.pt", *options)
    assert code == 2
    assert message in " ".join(error.split())
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_adapters_that_llama_cpp_does_not_have(run: Run, tmp_path: Path) -> None:
    import mlx.core as mx
    import numpy as np

    from elm_mlx.store import adapters

    model = save_hub(tmp_path / "model", CONFIG, weights(CONFIG))
    for name, options, message in (
        ("dora", {"dora": True}, "is a DoRA adapter, which llama.cpp does not have: fuse it"),
        ("embedding", {"targets": ["token_embeddings"]}, "adapts the embedding, which is the head too"),
    ):
        adapter = adapters.plan(CONFIG, rank=2, **options)  # type: ignore[arg-type]
        values = {key: mx.array(np.ones(shape, np.float32)) for key, shape in adapter.shapes(CONFIG).items()}
        (tmp_path / name).mkdir()
        adapters.write(tmp_path / name, adapter, values, CONFIG)
        code, _output, error = run("export", model, tmp_path / "a.gguf", "--adapter", tmp_path / name)
        assert code == 2
        assert message in " ".join(error.split())
    assert not (tmp_path / "a.gguf").exists()


def test_the_ending_of_a_gguf_file_may_be_in_capitals(run: Run, tmp_path: Path) -> None:
    model = save_hub(tmp_path / "model", CONFIG, weights(CONFIG))
    code, _output, error = run("export", model, tmp_path / "a.GGUF", "--verify")
    assert (code, error) == (0, "")
    assert (tmp_path / "a.GGUF").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("file", "name", "modelfile"),
    [
        ("a.gguf", "a", "Modelfile"),
        ("my model.gguf", "my-model", "Modelfile"),
        ("my files/Ä-b.gguf", "b", "'my files/Modelfile'"),
    ],
)
def test_the_printed_command_is_one_that_ollama_takes(
    file: str, name: str, modelfile: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_hub(tmp_path / "model", CONFIG, weights(CONFIG))
    (tmp_path / "my files").mkdir()
    code, output, _error = run("export", "model", file, "--modelfile")
    assert code == 0
    assert output.endswith(f": ollama create {name} -f {modelfile}\n")


def test_a_gguf_file_of_quantized_weights_is_not_quantized_again(run: Run, tmp_path: Path) -> None:
    model = save_hub(tmp_path / "model", CONFIG, weights(CONFIG))
    for kind, expected in (("q8_0", 2), ("f16", 0)):
        assert run("export", model, tmp_path / f"{kind}.gguf", "--type", kind)[0] == 0
        code, output, error = run("convert", tmp_path / f"{kind}.gguf", tmp_path / kind, "--quantize", "4")
        assert code == expected
        assert (tmp_path / kind).exists() is (expected == 0)
        if expected:
            assert output == ""
            assert (
                "q8_0.gguf: is quantized already (8-bit in groups of 32 and float16): leave out --quantize"
                in " ".join(error.split())
            )
