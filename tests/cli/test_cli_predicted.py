"""`--kvp`: a KV prediction in place of the prompt's prefill, in every command that reads one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import kv_predictions
import pytest
import serving
from commands import Run

from elm_mlx import generate, load, stream_generate
from elm_mlx.bench import sides
from elm_mlx.bench.sides import Programs, Unavailable
from elm_mlx.bench.suites import Case, prompt_ids
from elm_mlx.cli import bench
from elm_mlx.store import kvp_directory
from elm_mlx.store.loading import load_model

PROMPT = "the quick brown fox jumps over lazy dogs while an old king"


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    base, path = load_model(tiny_model_dir), tmp_path_factory.mktemp("exact")
    twin = load_model(tiny_model_dir, compute_dtype="float32")
    kvp_directory.save(path, kv_predictions.identity_of(base, twin), tiny_model_dir, {})
    return path


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    path = tmp_path_factory.mktemp("predictions") / "wrong"
    return kv_predictions.write_prediction(path, tiny_model_dir, load_model(tiny_model_dir))


@pytest.mark.parametrize("options", [[], ["--prompt-lookup"], ["--temp", "0.9", "--seed", "4"]])
def test_generate_writes_the_very_text_by_an_exact_prediction(
    run: Run, tiny_model_dir: Path, exact: Path, options: list[str]
) -> None:
    _, plain, _ = run("generate", tiny_model_dir, PROMPT, "--max-tokens", 12, *options)
    code, text, said = run("generate", tiny_model_dir, PROMPT, "--max-tokens", 12, *options, "--kvp", exact)
    assert (code, text) == (0, plain)
    assert "lossy" in said and re.search(r"prompt: (\d+) tokens, \d+ of them predicted, not read", said)


def test_generate_says_otherwise_by_another_prediction_and_counts_it(
    run: Run, tiny_model_dir: Path, wrong: Path
) -> None:
    plain, own = (
        json.loads(run("generate", tiny_model_dir, PROMPT, "--json", "--max-tokens", 12, *options)[1])
        for options in ([], ["--kvp", wrong])
    )
    assert own["text"] != plain["text"]
    assert (own["predicted_tokens"], plain["predicted_tokens"]) == (own["prompt_tokens"] - 1, 0)


def test_several_prompts_are_predicted(run: Run, tiny_model_dir: Path, exact: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\nan old king\n")
    command = ["generate", tiny_model_dir, "--prompts", tmp_path / "prompts.txt", "--max-tokens", 8]
    assert run(*command, "--kvp", exact)[:2] == run(*command)[:2]


def test_chat_answers_as_without_by_an_exact_prediction(run: Run, tiny_model_dir: Path, exact: Path) -> None:
    command = ["chat", tiny_model_dir, "--temp", 0, "--max-tokens", 8]
    lines = "the quick brown fox\nan old king\n/stats\n"
    code, said, noted = run(*command, "--kvp", exact, stdin=lines)
    assert (code, said) == run(*command, stdin=lines)[:2] and "lossy" in noted
    read, predicted = re.findall(r"(\d+) read \((\d+) of them predicted\)", noted)[0]
    assert int(predicted) == int(read) - 1 > 8  # the answer before, too


def test_eval_scores_by_the_prediction(
    run: Run, tiny_model_dir: Path, exact: Path, wrong: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(" ".join([PROMPT] * 9))
    found = {}
    for name, options in (("plain", []), ("exact", ["--kvp", exact]), ("wrong", ["--kvp", wrong])):
        out = tmp_path / name
        command = ["eval", tiny_model_dir, "--text", tmp_path / "text.txt", "--window", 32, "--out", out, *options]
        assert run(*command)[0] == 0
        found[name] = json.loads((out / "results.json").read_text())["scores"][0]["value"]
    assert found["exact"] == pytest.approx(found["plain"], rel=1e-5)
    assert abs(found["wrong"] - found["plain"]) > 3e-4
    code, _, said = run(
        "eval",
        tiny_model_dir,
        "--text",
        tmp_path / "text.txt",
        "--window",
        32,
        "--out",
        tmp_path / "plain",
        "--kvp",
        exact,
    )
    assert code == 2 and "holds scores with kvp" in said


def test_eval_names_its_directory_by_the_prediction_too(
    run: Run, tiny_model_dir: Path, wrong: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(PROMPT)
    assert run("eval", tiny_model_dir, "--text", "text.txt", "--kvp", wrong)[0] == 0
    assert (tmp_path / "evals" / f"{tiny_model_dir.name}+wrong" / "results.json").exists()


@pytest.mark.parametrize(("command", "said"), [
    (["info", "KVP"], "a KV Prediction, not a model directory by itself: give its model"),
    (["quantize", "KVP", "OUT"], "a KV Prediction, not a model directory by itself: give its model"),
    (["convert", "KVP", "OUT"], "a KV Prediction, not a model directory by itself: give its model"),
    (["export", "KVP", "OUT.gguf"], "a KV Prediction, not a model directory by itself: give its model"),
    (["average", "KVP", "MODEL", "--out", "OUT"], "a KV Prediction, not a model directory by itself: give its model"),
    (["fuse", "MODEL", "KVP", "OUT"], "is a KV Prediction, not an adapter: give it as --kvp"),
    (["generate", "MODEL", PROMPT, "--adapter", "KVP"], "is a KV Prediction, not an adapter: give it as --kvp"),
    (["generate", "MODEL", PROMPT, "--draft-model", "KVP"], "a KV Prediction, not a model directory by itself"),
])  # fmt: skip
def test_what_is_no_use_of_a_prediction_is_one_line(
    run: Run, tiny_model_dir: Path, wrong: Path, tmp_path: Path, command: list[str], said: str
) -> None:
    places = {"MODEL": tiny_model_dir, "KVP": wrong, "OUT": tmp_path / "out", "OUT.gguf": tmp_path / "out.gguf"}
    code, _, noted = run(*(places.get(word, word) for word in command))
    assert code == 2 and f"{wrong}: {said}" in noted and "Traceback" not in noted
    assert not any(tmp_path.iterdir())


def test_a_server_has_the_prediction_as_a_model_of_its_own(tiny_model_dir: Path, wrong: Path) -> None:
    model, tokenizer = load(tiny_model_dir)
    kvp = kvp_directory.load(wrong, tiny_model_dir, model)
    expected = {
        name: generate(model, tokenizer, PROMPT, max_tokens=10, kvp=each)
        for name, each in (("model", None), ("wrong", kvp))
    }
    with serving.serving([tiny_model_dir], kvps=[str(wrong)]) as server:
        cards = server.ask("/v1/models")[2]["data"]
        assert [(card["id"], card["base"], card["predicts_prompts"]) for card in cards] == [
            ("model", None, False), ("wrong", "model", True),
        ]  # fmt: skip
        for name in ("wrong", "model", "wrong"):
            body = {"model": name, "prompt": PROMPT, "max_tokens": 10, "temperature": 0}
            assert server.ask("/v1/completions", body)[2]["choices"][0]["text"] == expected[name], name
        body = {"model": "wrong", "prompt": PROMPT, "max_tokens": 2, "echo": True, "logprobs": 1}
        status, _, answer = server.ask("/v1/completions", body)
        assert status == 400 and "ask its base" in answer["error"]["message"]


def test_bench_has_it_as_a_side(run: Run, tiny_model_dir: Path, wrong: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(bench, "_measured", lambda suite, out, programs, note: asked.extend([suite, programs]))
    run("bench", tiny_model_dir, "--against", "naive", "--kvp", wrong)
    suite, programs = asked
    assert suite.against == ("kvp", "naive") and programs.kvp == wrong
    side = sides.start("kvp", tiny_model_dir, "float32", programs)
    try:
        assert any("lossy" in note for note in side.about.notes)
        _, alone = side.measure(Case("m", "stored", 20, 5))
        side.measure(Case("m", "stored", 20, 5, batch=2))
    finally:
        side.close()
    model, _ = load(tiny_model_dir)
    kvp, prompt = kvp_directory.load(wrong, tiny_model_dir, model), prompt_ids(20, model.config.vocab_size)
    found = stream_generate(model, None, prompt, max_tokens=5, stop_at_eos=False, kvp=kvp)
    assert alone == [each.token for each in found]
    with pytest.raises(Unavailable, match="--kvp names"):
        sides.start("kvp", tiny_model_dir, "float32", Programs())


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("generate", ["--adapter", "it"], "--adapter makes it another"),
        ("generate", ["--save-cache", "it"], "a saved cache"),
        ("generate", ["--load-cache", "it"], "a saved cache"),
        ("generate", ["--max-kv-size", "64"], "--max-kv-size"),
        ("chat", ["--adapter", "it"], "--adapter makes it another"),
        ("chat", ["--max-kv-size", "64"], "--max-kv-size"),
        ("eval", ["--adapter", "it"], "--adapter makes it another"),
    ],
)
def test_what_it_does_not_go_with(
    run: Run, tiny_model_dir: Path, wrong: Path, command: str, options: list[str], said: str
) -> None:
    code, _, noted = run(
        command, tiny_model_dir, *([PROMPT] if command == "generate" else []), "--kvp", wrong, *options
    )
    assert code == 2 and said in noted and noted.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "serve"])
def test_a_prediction_for_another_model_is_one_line(
    run: Run, wide_model_dir: Path, wrong: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "text.txt").write_text(PROMPT)
    more: dict[str, list[Any]] = {
        "generate": [PROMPT],
        "eval": ["--text", tmp_path / "text.txt"],
        "serve": ["--port", 0],
    }
    code, _, said = run(command, wide_model_dir, *more.get(command, []), "--kvp", wrong)
    assert code == 2 and "belongs to another model" in said.splitlines()[-1] and str(wrong) in said


@pytest.mark.parametrize("damage", ["no record", "cut maps", "no auxiliary", "no directory"])
def test_a_damaged_prediction_is_one_line(
    run: Run, tiny_model_dir: Path, wrong: Path, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "damaged"
    if damage != "no directory":
        shutil.copytree(wrong, path)
    if damage == "no record":
        (path / "kvp.json").unlink()
    elif damage == "cut maps":
        maps = path / kvp_directory.MAPS
        maps.write_bytes(maps.read_bytes()[:-100])
    elif damage == "no auxiliary":
        shutil.rmtree(path / kvp_directory.AUXILIARY)
    code, _, said = run("generate", tiny_model_dir, PROMPT, "--kvp", path)
    assert code == 2 and str(path) in said.splitlines()[-1] and "Traceback" not in said
