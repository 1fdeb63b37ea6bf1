"""`elm-mlx convert` as a user meets it: what it prints, its exit codes, one line for each error."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch_files
from checkpoints import corenet, made, save_hub, save_pt, save_tokenizer, tensors, tiny, weights

from elm_mlx import cli
from elm_mlx.model.config import ModelConfig

CONFIG = tiny()
WEIGHTS = weights(CONFIG)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "in")
    return save_pt(tmp_path / "in" / "model.pt", WEIGHTS)


class Run:
    """`elm-mlx` in this process: exit code, and what went to the two streams."""

    def __init__(self, capture: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capture, self.monkeypatch = capture, monkeypatch

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["elm-mlx", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = self.capture.readouterr()
        return code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(capsys, monkeypatch)


def test_a_tokenizer_that_mlx_lm_reads_otherwise_is_warned_of(run: Run, tmp_path: Path, source: Path) -> None:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words and others, " * 5] * 20), model_writer=out, model_type="word",
        vocab_size=8, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "word.model").write_bytes(out.getvalue())
    code, printed, _ = run("convert", source, tmp_path / "out", "--tokenizer", tmp_path / "word.model")
    assert code == 0 and "warning     " in printed and "mlx-lm" in printed
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_an_empty_source_is_not_the_current_directory(run: Run, tmp_path: Path) -> None:
    code, _, err = run("convert", "", tmp_path / "out")
    assert code == 2 and "SRC is empty" in err and not (tmp_path / "out").exists()


def test_what_it_prints(run: Run, tmp_path: Path, source: Path) -> None:
    code, out, err = run("convert", source, tmp_path / "out", "--verify")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[:10] == [
        "source      model.pt: PyTorch state dict, float32",
        "config      the shapes",
        "model       81,600 parameters, 3 layers of 48",
        "            heads 4 to 6 of 8, key/value heads 2 to 3, FFN 32 to 192",
        "            gated FFN, QK norms, tied head",
        "vocabulary  300 tokens, context 2,048",
        f"tokenizer   {tmp_path / 'in' / 'tokenizer.model'}",
        "write       bfloat16, 0.2 MB",
        "note        dropped 20 rows of the embedding, past the tokenizer's 300 pieces",
        lines[9],
    ]
    assert [line.split()[:2] for line in lines[9:13]] == [
        ["verified", group] for group in ("embedding", "attention", "ffn", "norms")
    ]
    assert lines[13].startswith(f"wrote       {tmp_path / 'out'} in ") and len(lines) == 14


def test_dry_run(run: Run, tmp_path: Path, source: Path) -> None:
    code, out, _ = run("convert", source, tmp_path / "out", "--dry-run")
    assert code == 0 and out.splitlines()[-1] == "dry run     nothing was written"
    assert "write       bfloat16" in out
    assert not (tmp_path / "out").exists()


def test_every_flag_arrives(run: Run, tmp_path: Path) -> None:
    config = tiny(normalize_qk_projections=False)
    tree = {"model_state_dict": {}, "ema_state_dict": tensors(corenet(weights(config)))}
    path = torch_files.save(tmp_path / "a.pt", tree)
    tokenizer = save_tokenizer(tmp_path / "t")
    flags = ["--ema", "--head-dim", 8, "--dtype", "float32", "--tokenizer", tokenizer, "--overwrite"]
    for _ in range(2):
        code, out, err = run("convert", path, tmp_path / "out", *flags)
        assert code == 0, err
    assert "its ema_state_dict" in out and "float32, " in out
    (tmp_path / "c.json").write_text("{}")
    for flag, value, message in (
        ("--config", tmp_path / "c.json", "num_transformer_layers is missing"),
        ("--preset", "OpenELM-270M", "--preset OpenELM-270M says"),
        ("--lora-alpha", 3, "--lora-alpha is for"),
        ("--revision", "main", "--revision main is for"),
    ):
        code, _, err = run("convert", path, tmp_path / "new", "--ema", "--head-dim", 8, flag, value)
        assert code == 2 and message in err


def test_warnings_are_shown(run: Run, tmp_path: Path) -> None:
    config = tiny(ffn_with_glu=False)
    _, out, _ = run("convert", save_pt(tmp_path / "a.pt", weights(config)), tmp_path / "out")
    assert "warning     no tokenizer: " in out
    assert "warning     its FFN has no gate (GLU), which mlx-lm cannot express: only elm-mlx opens the result" in out


def test_a_name_that_is_no_text(run: Run, tmp_path: Path, source: Path) -> None:
    odd = source.rename(source.parent / os.fsdecode(b"caf\xe9\x1b[2J.pt"))
    code, out, err = run("convert", odd, tmp_path / "out")
    assert (code, err) == (0, "") and out.startswith("source      caf\\udce9\\x1b[2J.pt: ")
    assert "caf" in (tmp_path / "out" / "conversion.json").read_text()


def test_errors_are_one_line_and_exit_2(run: Run, tmp_path: Path, source: Path) -> None:
    made(tmp_path / "empty")
    (tmp_path / "text.pt").write_text("hello")
    hub = save_hub(tmp_path / "hub", CONFIG, WEIGHTS)
    (hub / "config.json").write_text("{")
    attack = torch_files.save(tmp_path / "attack.pt", {"a": torch_files.Call("builtins.eval", ("1",))})
    for arguments, message in (
        ([tmp_path / "absent", "out"], "no such file"),
        ([tmp_path / "empty", "out"], "holds no model.safetensors"),
        ([tmp_path / "text.pt", "out"], "not a file of torch.save"),
        ([hub, "out"], "not JSON"),
        ([attack, "out"], "builtins.eval"),
        ([source, tmp_path / "empty"], "exists already; pass --overwrite"),
        ([source, "out", "--dtype", "int4"], "--dtype int4: is not one of float32"),
        (
            [source, "out", "--preset", "OpenELM-1_1B"],
            "has the shape (320, 48), but --preset OpenELM-1_1B says (320, 2048)",
        ),
    ):
        code, out, err = run("convert", *arguments)
        assert (code, out) == (2, ""), err
        assert message in err and err.startswith("elm-mlx: ") and err.count("\n") == 1
    assert not Path("out").exists()


def test_help_is_there(run: Run) -> None:
    code, out, _ = run("convert", "--help")
    assert code == 0
    for flag in ("--tokenizer", "--dtype", "--verify", "--dry-run", "--overwrite", "--lora-alpha", "--revision"):
        assert flag in out


def test_nothing_heavy_is_imported(tmp_path: Path, source: Path) -> None:
    """Neither MLX nor anything that brings it, to convert a file."""
    code = (
        "import sys\nfrom elm_mlx.cli import main\nmain()\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'huggingface_hub', 'torch', 'sentencepiece'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    command = [sys.executable, "-c", code, "convert", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bar_only_where_someone_looks(tmp_path: Path, source: Path) -> None:
    import pexpect

    command = ["-m", "elm_mlx", "convert", str(source), str(tmp_path / "out")]
    child = pexpect.spawn(sys.executable, command, env=os.environ | {"TERM": "xterm"}, encoding="utf-8", timeout=20)
    text = child.read()
    child.close()
    assert child.exitstatus == 0
    assert "100%" in text or "write" in text
    assert "\x1b[" in text and "wrote       " in text
    piped = subprocess.run([sys.executable, *command, "--overwrite"], capture_output=True, text=True, check=True)
    assert piped.stderr == "" and "\x1b" not in piped.stdout


def test_the_function_is_there_to_import() -> None:
    import elm_mlx_convert

    assert callable(elm_mlx_convert.convert) and callable(elm_mlx_convert.ConversionPlan)
    assert ModelConfig.__name__ == "ModelConfig"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = elm_mlx_convert.nothing
