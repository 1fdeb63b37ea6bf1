"""`elm-mlx eval` as it is called."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Run
from hub_server import HubServer
from typer.testing import CliRunner

from elm_mlx.cli import app
from elm_mlx.errors import ElmError, InputError
from elm_mlx.evaluate.score_record import ITEMS

RUNNER = CliRunner()


def call(*arguments: object) -> str:
    """What is printed. Raises what the command raises."""
    result = RUNNER.invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    records = [{"query": f"the fox {n} is", "choices": ["quick", "lazy dogs"], "gold": n % 2} for n in range(30)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_table_of_scores_with_their_errors(tiny_model_dir: Path, own: Path, tmp_path: Path) -> None:
    text = tmp_path / "tale.txt"
    text.write_text("the quick brown fox. " * 30)
    out = tmp_path / "out"
    shown = call(tiny_model_dir, "--tasks", own, "--text", text, "--limit", 20, "--window", 64, "--out", out)
    assert re.search(r"own +0 +20 +acc_norm +\d+\.\d\d ± \d+\.\d\d\n +acc +\d", shown)
    assert re.search(r"tale\.txt +0 +1 +bits_per_byte +\d+\.\d{4}\n", shown)
    assert "items/s" in shown
    assert shown.endswith(f"wrote {out}\n")


def test_runs_are_compared_and_drawn(tiny_model_dir: Path, own: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    a, b, png = tmp_path / "a", tmp_path / "b", tmp_path / "c.png"
    call(tiny_model_dir, "-t", own, "--out", a, "--plot", tmp_path / "one.png")
    call(tiny_model_dir, "-t", own, "--out", b, "--compute-dtype", "bfloat16")
    shown = call(a, b, "--compare", "--plot", png)
    assert f"{b} against {a}" in shown
    assert re.search(r"own +0 +30 +acc +\d+\.\d\d +\d+\.\d\d +[+-]\d+\.\d\d +[+-]\d", shown)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.png").stat().st_size > 1000
    call(a, b, "--compare", "--plot", png)  # over its own
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(InputError, match=r"photo.png: exists already; choose another"):
        call(a, b, "--compare", "--plot", photo)


def test_what_the_context_cuts_and_what_a_directory_has_is_said(tiny_model_dir: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    records = [{"query": "the quick brown fox " * 60, "choices": ["a", "b"], "gold": n % 2} for n in range(6)]
    long.write_text("".join(json.dumps(record) + "\n" for record in records))
    shown = call(tiny_model_dir, "--tasks", long, "--shots", 5, "--out", tmp_path / "out")
    assert "6 of 6 questions exceed the model's context with their examples, and lack their beginning" in shown
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["cut"].values()) == [[6, 6]]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "train.jsonl").write_text('{"text": "the quick brown fox"}\n')
    result = RUNNER.invoke(app, ["eval", str(tiny_model_dir), "--text", str(tmp_path / "only"), "--out", str(tmp_path)])
    assert "only: read: its train, for it has no test and no valid" in result.stderr
    call(tiny_model_dir, "--text", tmp_path / "only", "--window", 64, "--out", tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["cut"].values()) == [[6, 6]], "kept"


def test_what_makes_no_sense_is_refused(tiny_model_dir: Path, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, reason in (
        ([tiny_model_dir, tiny_model_dir], "give one model directory"),
        ([tiny_model_dir, "--compare"], "two runs or more"),
        ([tmp_path, tmp_path, "--compare"], "no such file; `elm-mlx eval MODEL --out"),
        ([tiny_model_dir, "--tasks", "nonsense"], "task 'nonsense' is not one of"),
        ([tiny_model_dir, "--tasks", "piqa@x"], "the number of examples is missing after @"),
        ([tmp_path / "none", "--tasks", own], "none"),
        ([tiny_model_dir, "--harness"], "name them with --tasks"),
        ([tiny_model_dir, "--text", tmp_path / "gone.csv"], "gone.csv: no such file or directory"),
        ([tiny_model_dir, "--text", own, "--columns", "fox"], "--columns fox: write KEY=COLUMN"),
        ([tiny_model_dir, "--text", own], "30 bad records; mend them, or --skip-bad leaves them out"),
        ([tiny_model_dir, tiny_model_dir, "--compare", "--limit", 3], "--limit: --compare scores nothing"),
        ([tiny_model_dir, "--tasks", own, "--window", 64], "--window: is for --text"),
        ([tiny_model_dir, "--tasks", own, "--skip-bad"], "--skip-bad: is for --text"),
        ([tiny_model_dir, "--harness", "--tasks", "a", "--plot", out], "--plot: is for our own scores"),
        ([tiny_model_dir, "--tasks", own, "--plot", own], "own.jsonl: exists already; choose another"),
    ):
        with pytest.raises(InputError, match=reason):
            call(*arguments, *([] if "--compare" in arguments else ["--out", out]))
    assert not out.exists()


def test_the_harness_is_asked_for_only_where_it_is_installed(tiny_model_dir: Path, tmp_path: Path) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(ElmError, match="pip install lm_eval"):
            call(tiny_model_dir, "--harness", "--tasks", "wikitext", "--out", tmp_path / "out")


def test_what_a_run_was_tested_on_has_the_same_loss(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A spreadsheet and chats, of the columns and by the template that the run was trained with."""
    data, adapter = tmp_path / "data", tmp_path / "adapter"
    data.mkdir()
    (data / "train.csv").write_text("Nr;Frage;Antwort\n" + "".join(f"{n};the fox {n};lazy dogs\n" for n in range(9)))
    (data / "test.csv").write_text("Nr;Frage;Antwort\n1;the quick;brown fox\n2;the;told stories of dogs\n")
    how = ("--columns", "prompt=Frage,completion=Antwort", "--template", "openelm-instruct")
    code, _, err = run("lora", tiny_model_dir, "--data", data, *how, "--out", adapter, "--iters", 2)
    assert code == 0, err
    tested = json.loads((adapter / "metrics.jsonl").read_text().splitlines()[-1])["test_loss"]
    options = ("eval", tiny_model_dir, "--text", data, "--adapter", adapter, "--out", tmp_path / "out")
    code, out, err = run(*options, *how[:2])
    assert code == 0 and re.search(r"data:test +0 +2 +bits_per_byte", out), err
    assert "data:test: columns: fields between semicolons; prompt = `Frage`, completion = `Antwort`" in err
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    found = next(row["value"] for row in scores if row["metric"] == "perplexity")
    assert found == pytest.approx(math.exp(tested), rel=1e-4)


def test_a_split_on_the_hub_and_a_file_beside_it(
    run: Run, tiny_model_dir: Path, hub: HubServer, tmp_path: Path
) -> None:
    """Of the hub no other split is fetched; each has a row by its name."""
    lines = b"".join(b'{"question": "the fox %d", "answer": "told stories"}\n' % n for n in range(3))
    hub.repositories["datasets/a/b"] = {"data/train.jsonl": lines * 9, "data/test.jsonl": lines}
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "chat.jsonl").write_text(
        '{"conversations": [{"from": "human", "value": "fox?"}, {"from": "gpt", "value": "dogs"}]}\n'
    )
    options = ("eval", tiny_model_dir, "--out", tmp_path / "out", "--columns", "prompt=question,completion=answer")
    code, out, err = run(*options, "--text", "hub:a/b:test", "--text", tmp_path / "a.jsonl")
    assert code == 0 and hub.fetched() == ["data/test.jsonl"], err
    rows = re.findall(r"^(\S+) +0 +3 +bits_per_byte +(\S+)", out, re.M)
    assert [name for name, _ in rows] == ["hub:a/b:test", "a.jsonl"] and rows[0][1] == rows[1][1]
    code, out, err = run("eval", tiny_model_dir, "--out", tmp_path / "out", "--text", tmp_path / "chat.jsonl")
    assert code == 2 and "chat.jsonl, line 1: is a conversation, and the model has no chat template" in err


def test_killed_outright_it_goes_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "many.jsonl", tmp_path / "out"
    texts = ["the quick brown fox jumps over lazy dogs " * (n % 9 + 1) for n in range(900)]
    records = [
        {"query": f"{text} {n}", "choices": ["and", "while", "told", "to us"], "gold": 0}
        for n, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [sys.executable, "-m", "elm_mlx", "eval", str(tiny_model_dir), "-t", str(path), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if (out / ITEMS).exists() and (out / ITEMS).stat().st_size:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
    assert process.returncode == -signal.SIGKILL
    kept = (out / ITEMS).read_bytes().count(b"\n")
    assert 0 < kept < 900
    shown = call(tiny_model_dir, "-t", path, "--out", out)
    assert re.search(rf"^{900 - kept} items in", shown, re.M)
    assert "900" in shown


def test_scores_with_keys_in_few_bits_are_a_run_of_their_own(
    wide_model_dir: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "tale.txt"
    text.write_text("the quick brown fox. " * 30)
    shown = [call(wide_model_dir, "-t", own, "--text", text, *flags) for flags in ((), ("--kv-bits", 4))]
    assert shown[1].endswith("wrote evals/model+kv4\n")
    bits = [float(re.search(r"bits_per_byte +([\d.]+)", each)[1]) for each in shown]  # type: ignore[index]
    assert bits[0] != bits[1] and bits[1] == pytest.approx(bits[0], rel=0.2)
    with pytest.raises(InputError, match=r"holds scores with kv_bits = 4, not 8; choose another"):
        call(wide_model_dir, "-t", own, "--kv-bits", 8, "--out", "evals/model+kv4")
    with pytest.raises(InputError, match=r"kv_bits = none, not 8"):
        call(wide_model_dir, "-t", own, "--kv-bits", 8, "--out", "evals/model")
