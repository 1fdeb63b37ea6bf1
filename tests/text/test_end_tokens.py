"""Which tokens end a text: one set, of all that a directory says, for whatever is done with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import other_models
import pytest
import tiny
from commands import Run

from elm_mlx import generate, load, stream_generate
from elm_mlx.errors import InputError
from elm_mlx.inference.batch import generate_batch
from elm_mlx.model.config import read_config
from elm_mlx.store import loading
from elm_mlx.text.chat_template import choose
from elm_mlx.text.tokenizer import Tokenizer, Vocabulary, read_vocabulary


@pytest.fixture
def llama(family_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """Of the style `llama3`: its tokenizer ends texts with `<|eot_id|>`."""
    return Path(shutil.copytree(family_dirs["llama"], tmp_path / "llama"))


@pytest.fixture
def exact(tmp_path: Path) -> Path:
    """The same, with as many rows as the tokenizer has pieces."""
    size = other_models.train_tokenizer("llama3").get_vocab_size()
    return other_models.write_model(tmp_path / "exact", "llama", {"vocab_size": size})


@pytest.fixture
def openelm(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """With a SentencePiece model, whose EOS is 2."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "openelm"))


def say(directory: Path, name: str, **values: Any) -> None:
    """Changes keys of a JSON file; None takes one out."""
    path = directory / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in {**old, **values}.items() if value is not None}))


def ends(directory: Path) -> Vocabulary:
    return read_vocabulary(directory, read_config(directory))


def test_all_three_are_joined_and_the_tokenizers_own_is_first(llama: Path) -> None:
    say(llama, "config.json", eos_token_id=[7, 8])
    say(llama, "generation_config.json", eos_token_id=[8, 9.0])
    found = ends(llama)
    assert found.tokenizer is not None and found.tokenizer.eos_id is not None
    assert found.end_ids == (found.tokenizer.eos_id, 7, 8, 9)
    assert found.tokenizer.eos_ids == found.end_ids and found.notes == ()
    say(llama, "tokenizer_config.json", eos_token=None)
    assert ends(llama).end_ids == (7, 8, 9)
    say(llama, "config.json", eos_token_id=None)
    assert ends(llama).end_ids == (8, 9)


def test_openelm_alike(openelm: Path) -> None:
    assert ends(openelm).end_ids == (2,)
    say(openelm, "config.json", eos_token_id=7)
    say(openelm, "generation_config.json", eos_token_id=[2, 9])
    say(openelm, "tokenizer_config.json", eos_token={"content": "<s>"})
    assert ends(openelm).end_ids == (1, 2, 7, 9)
    (openelm / "tokenizer.model").unlink()
    assert ends(openelm) == Vocabulary(None, (7, 2, 9))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("command", ["convert", "export"])
def test_they_go_where_the_model_goes(command: str, name: str, openelm: Path, tmp_path: Path, run: Run) -> None:
    """An export has neither `config.json` nor `tokenizer_config.json`."""
    values: dict[str, object] = {"eos_token": "<s>"} if name == "tokenizer_config.json" else {"eos_token_id": [2, 9]}
    say(openelm, name, **values)
    made = tmp_path / "made"
    code, _, err = run(command, openelm, made)
    assert code == 0, err
    if command == "export":
        code, _, err = run("convert", made, tmp_path / "back")
        assert code == 0, err
        made = tmp_path / "back"
    assert {*ends(made).end_ids} == {*ends(openelm).end_ids} == {2, 1 if "eos_token" in values else 9}


def test_an_export_says_nothing_of_a_tokenizers_own_end(openelm: Path, tmp_path: Path, run: Run) -> None:
    code, _, err = run("export", openelm, tmp_path / "made")
    assert code == 0 and not (tmp_path / "made" / "generation_config.json").exists(), err


def test_a_default_counts_only_where_nothing_is_said(openelm: Path) -> None:
    say(openelm, "config.json", eos_token_id=None)
    say(openelm, "generation_config.json", eos_token_id=9)
    (openelm / "tokenizer.model").unlink()
    assert ends(openelm).end_ids == (9,)
    (openelm / "generation_config.json").unlink()
    assert ends(openelm).end_ids == (2,), "transformers' own, too"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", [1, "2"], True, 2.5, {}, [[2]], float("nan")])
def test_what_is_no_id_is_named(llama: Path, name: str, value: Any) -> None:
    say(llama, name, eos_token_id=value)
    message = rf"{name}: eos_token_id is .*: a token's number, or a list of them, is needed"
    with pytest.raises(InputError, match=message) as error:
        ends(llama)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("token", [-1, 100_000])
def test_an_id_that_the_model_lacks_ends_nothing_and_is_said(llama: Path, token: int) -> None:
    before = ends(llama).end_ids
    say(llama, "generation_config.json", eos_token_id=[token, 5])
    found = ends(llama)
    assert found.end_ids == (*before, 5)
    assert [note for note in found.notes if f"end token {token}" in note] == list(found.notes) != []
    assert found.notes[0] in loading.open_model(llama).notes


def test_an_end_token_that_was_never_trained_is_not_what_training_writes(exact: Path) -> None:
    rows = read_config(exact).vocab_size
    _add(exact, "[END]", rows)
    say(exact, "tokenizer_config.json", eos_token="[END]")
    say(exact, "config.json", eos_token_id=7)
    found = ends(exact)
    assert found.end_ids == (7,) and f"end token {rows}" in found.notes[0]
    assert found.tokenizer is not None and found.tokenizer.eos_id is None, "nor what evaluation reads before a text"


@pytest.mark.parametrize("kind", ["openelm", "llama"])
def test_it_is_the_same_for_all(kind: str, request: pytest.FixtureRequest, run: Run, tmp_path: Path) -> None:
    directory: Path = request.getfixturevalue(kind)
    say(directory, "generation_config.json", eos_token_id=[30])
    model, tokenizer = load(directory)
    assert tokenizer is not None
    joined = ends(directory).end_ids
    assert 30 in joined and len(joined) > 1
    assert model.config.eos_token_ids == tokenizer.eos_ids == joined
    template = choose(directory, tokenizer)
    assert template is None or {*joined} <= {*template.stop_ids}
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "the fox"}\n')
    code, out, err = run("data", data, "--model", directory, "--template", "none")
    assert code == 0, err
    assert out.rstrip().endswith(f"{tokenizer.piece_of(joined[0])}⟧")


@pytest.mark.parametrize("end", ["tokenizer", "config.json", "generation_config.json"])
def test_each_of_them_ends_generation(tmp_path: Path, end: str) -> None:
    path = other_models.write_chain(tmp_path / "m", ["crow", "pitcher", "END", "water", "thirst"])
    tokenizer = ends(path).tokenizer
    assert tokenizer is not None
    token = other_models.word(path, "END")
    if end == "tokenizer":
        say(path, "tokenizer_config.json", eos_token=tokenizer.piece_of(token))
    else:
        say(path, end, eos_token_id=token)
    model, tokenizer = load(path)
    assert tokenizer is not None
    responses = list(stream_generate(model, tokenizer, "crow", max_tokens=9))
    assert "".join(response.text for response in responses) == "pitcher"
    assert responses[-1].finish_reason == "stop"
    batch = list(generate_batch(model, tokenizer, ["crow", "pitcher", "water"], max_tokens=9))
    assert [row.text for row in batch] == ["pitcher", "", "thirst"]


def _add(directory: Path, content: str, token: int) -> None:
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text())
    entry = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"].append({"id": token, "content": content, "special": True, **entry})
    path.write_text(json.dumps(values))


def test_unused_added_tokens_past_the_rows_are_taken_and_using_one_is_an_error(
    exact: Path, run: Run, tmp_path: Path
) -> None:
    rows = read_config(exact).vocab_size
    for extra, name in enumerate(("[PAD]", "<|tool|>")):
        _add(exact, name, rows + extra)
    model, tokenizer = load(exact)
    assert tokenizer is not None and tokenizer.vocab_size == rows + 2
    assert generate(model, tokenizer, "the crow", max_tokens=3) is not None
    refusal = rf"'\[PAD\]' is token {rows}, but the model has only {rows} tokens"
    with pytest.raises(InputError, match=refusal):
        tokenizer.encode_parts(["a", rows, "b"])
    data = tmp_path / "a.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] + '[PAD]' }}{% endfor %}")
    code, _, err = run("generate", exact, "-p", "hi", "--template", template, "--max-tokens", 2)
    assert code == 2 and "'[PAD]' is token" in err and err.count("\n") == 1
    code, _, err = run("data", data, "--model", exact, "--template", template)
    assert code == 2 and "a.jsonl, line 1: '[PAD]' is token" in err
    say(exact, "tokenizer_config.json", add_bos_token=True, bos_token="[PAD]")
    code, _, err = run("generate", exact, "-p", "hi", "--no-template", "--max-tokens", 2)
    assert code == 2 and "'[PAD]' is token" in err and err.count("\n") == 1


def test_another_models_tokenizer_is_refused(llama: Path, openelm: Path) -> None:
    (llama / "tokenizer.json").write_text(other_models.train_tokenizer("llama3", 800).to_str())
    (openelm / "tokenizer.model").write_bytes(tiny.train_tokenizer(330))
    for path in (llama, openelm):
        with pytest.raises(InputError, match="it is another model's tokenizer"):
            load(path)


def test_sentencepiece_with_added_pieces_past_the_rows(openelm: Path) -> None:
    """Pieces defined by a user, behind all others."""
    rows = read_config(openelm).vocab_size
    model = tiny.with_piece((openelm / "tokenizer.model").read_bytes(), "[PAD]")
    (openelm / "tokenizer.model").write_bytes(model)
    _, tokenizer = load(openelm)
    assert tokenizer is not None and tokenizer.vocab_size == rows + 1 and tokenizer.base_size == rows
    with pytest.raises(InputError, match=rf"'\[PAD\]' is token {rows}"):
        tokenizer.encode("fox [PAD]")
    assert tokenizer.encode("fox")


@pytest.mark.parametrize("kind", ["openelm", "llama"])
def test_a_padded_model_may_say_an_id_without_a_piece(
    kind: str, run: Run, tmp_path: Path, tiny_tokenizer_file: Path
) -> None:
    """The text goes on after it: in `generate`, in a batch beside other prompts, in a chat, with a penalty."""
    path = tmp_path / "m"
    if kind == "llama":
        other_models.write_chain(path, ["crow", None, "pitcher", "\n", None, "water", None])
        said = {"crow": "pitcher\nwater", "pitcher": "\nwater", "\n": "water"}
    else:
        tokenizer = Tokenizer.load(tiny_tokenizer_file)
        model = tiny.spelling_model(tokenizer, "quick fox", padding=2)
        tiny.write_directory(path, model, tiny_tokenizer_file.read_bytes())
        said = {"\n": "quick fox", "a": "quick fox"}
    for prompt, text in said.items():
        for penalty in (1.0, 1.1):
            code, out, err = run(
                "generate", path, "-p", prompt, "--no-template", "--max-tokens", 30, "--repetition-penalty", penalty
            )
            assert (code, out.strip()) == (0, text.strip()), err
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in said))
    code, out, err = run("generate", path, "--prompts", prompts, "--no-template", "--max-tokens", 30, "--json")
    assert code == 0, err
    assert [json.loads(line)["text"].strip() for line in out.splitlines()] == [text.strip() for text in said.values()]
    prompt, text = list(said.items())[-1 if kind == "openelm" else 0]
    message = f"{prompt}\n"
    code, out, err = run("chat", path, "--template", "none", "--temp", 0, "--max-tokens", 30, stdin=message)
    assert code == 0 and text in out, err
