"""`elm-mlx data`: figures that are the data's, examples with trained tokens marked, and every bad record named."""

from __future__ import annotations

import json
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import Run, modules_of, packages

from elm_mlx.text.chat_template import OPENELM_INSTRUCT_JINJA
from elm_mlx.text.tokenizer import Tokenizer

BAR = "[█▏▎▍▌▋▊▉]"


@pytest.fixture
def run(run: Run, tiny_model_dir: Path) -> Run:
    """`elm-mlx data`, on the tiny model unless told otherwise."""

    def call(*arguments: object, model: Path = tiny_model_dir) -> tuple[int, str, str]:
        return run("data", *arguments, "--model", model)

    return call


def write(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def turns(count: int) -> list[dict[str, str]]:
    return [{"prompt": "the quick " * (i % 7 + 1), "completion": f"fox {i}"} for i in range(count)]


def test_counts_lengths_and_fill(run: Run, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = turns(70)
    code, out, err = run(write(tmp_path / "a.jsonl", *rows), "--max-seq-length", 64)
    assert code == 0 and err == ""
    # The words of these are whole before the answer, so ids of the two together are those of the example.
    lengths = [len(tiny_tokenizer.encode(row["prompt"] + row["completion"])) + 1 for row in rows]
    answers = [length - len(tiny_tokenizer.encode(row["prompt"])) for length, row in zip(lengths, rows, strict=True)]
    assert out.startswith("train: 70 examples of 70 completions\n")
    share = sum(answers) / sum(lengths)
    assert f"tokens    {sum(lengths):,}, {sum(answers):,} of them trained ({share:.1%})\n" in out
    assert f"lengths   median {sorted(lengths)[34]}, longest {max(lengths)}\n" in out
    packed = re.search(r"packed    (\d+) rows of 64 tokens, ([\d.]+)% full", out)
    assert packed and float(packed[2]) == pytest.approx(
        100 * sum(length - 1 for length in lengths) / (int(packed[1]) * 64), abs=0.051
    )
    assert re.search(r"unpacked  batches of 4 by length, [\d.]+% full", out)


SPECIAL = [
    {"messages": [{"role": "user", "content": "the </s> fox"}, {"role": "assistant", "content": "us<|im_end|>"}]},
    {"prompt": "<s>the", "completion": "fox</s>"},
    {"instruction": "the", "input": "<|im_end|><|im_end|>", "output": "us"},
]


def test_names_of_special_tokens_are_shown_as_letters_and_counted(
    run: Run, tmp_path: Path, family_dirs: dict[str, Path]
) -> None:
    """By a SentencePiece model, whose own are `<s>` and `</s>`, and by a tokenizer.json, whose own is `<|im_end|>`."""
    path = write(tmp_path / "a.jsonl", *SPECIAL)
    for model in ({}, {"model": family_dirs["mistral"]}):
        code, out, err = run(path, *([] if model else ["--template", "openelm-instruct"]), **model)
        assert code == 0, err
        named = re.search(r"special +names of special tokens in the texts: (.*): they are trained as letters", out)
        assert named and sorted(named[1].split(", ")) == ["</s> (2)", "<s> (1)", "<|im_end|> (3)"]
        assert "the ‹</s>› fox" in out and "us‹<|im_end|>›" in out and "‹<s>›the" in out
        assert "‹</s>› is that name in letters" in out or "‹<|im_end|>› is that name in letters" in out
        end = "<|im_end|>" if model else "</s>"
        assert f"us‹<|im_end|>›{end}⟧" in out, "the token itself is shown without"
    code, out, err = run(write(tmp_path / "b.jsonl", *turns(3)))
    assert code == 0 and "  special" not in out and "‹" not in out


def test_names_in_pairs_are_counted_once_a_pair(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "the </s>", "chosen": "fox</s>", "rejected": "us"})
    code, out, err = run(path)
    assert code == 0 and "</s> (2): they are trained as letters" in out, err


def test_a_piece_that_text_can_have_is_no_letters(tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    from elm_mlx.data.encoding import Names

    (tmp_path / "tokenizer.model").write_bytes(tiny.with_piece(tiny_tokenizer_file.read_bytes(), "<|im_end|>"))
    found = list(Names(Tokenizer.load(tmp_path)).find(["a<|im_end|>b</s><|x|><|user|>"]))
    assert found == ["</s>", "<|x|>"]


def test_the_histogram_counts_every_record(run: Run, tmp_path: Path) -> None:
    rows = [*turns(70), {"prompt": "the quick " * 99, "completion": "fox"}]
    out = run(write(tmp_path / "a.jsonl", *rows), "--max-seq-length", 64)[1]
    bins = re.findall(rf"^ +(?:(\d+) to )?(over )?([\d,]+)  ({BAR}*) +(\d+)$", out, re.M)
    assert sum(int(count) for *_, count in bins) == 71
    assert bins[-1][1:3] == ("over ", "64") and bins[-1][4] == "1"
    inside = [(int(low or high), int(high)) for low, _, high, *_ in bins[:-1]]
    assert all(low == last + 1 for (_, last), (low, _) in pairwise(inside))
    most = max(int(count) for *_, count in bins)
    for *_, bar, count in bins:
        assert abs(len(bar) - 40 * int(count) / most) <= 1 and bool(bar) == bool(int(count))
    assert all(len(line) <= 80 for line in out.splitlines() if re.search(BAR, line))


@pytest.mark.parametrize("columns", [1, 10, 26, 40])
def test_a_narrow_terminal_has_bars_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run(write(tmp_path / "a.jsonl", *turns(70)), "--max-seq-length", 64)
    assert code == 0 and re.search(f"  {BAR}+ ", out), err


def test_what_a_mixture_has_no_use_for_is_refused(run: Run, tmp_path: Path) -> None:
    code, _, err = run("--config", tmp_path / "recipe.toml")
    assert code == 2 and "--model: --config has all that a mixture is read by" in err


def test_examples_as_the_model_sees_them(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *turns(11))
    out = run(path)[1]
    shown = out.partition("What is trained is in ⟦ ⟧.\n")[2]
    assert re.findall(r"^example (\d+): (.*), \d+ tokens$", shown, re.M) == [
        (str(number), f"{path}, line {number}") for number in (1, 3, 5, 7, 9)
    ]
    assert "    <s>the quick ⟦fox 0</s>⟧\n" in shown
    assert "⟦fox 2</s>⟧" in shown and "⟦fox 1" not in shown


def test_the_prompt_too(run: Run, tmp_path: Path) -> None:
    out = run(write(tmp_path / "a.jsonl", *turns(1)), "--train-on-prompt")[1]
    assert "<s>⟦the quick fox 0</s>⟧" in out


def test_template_beyond_its_limits_is_no_matter_of_a_record(run: Run, tmp_path: Path) -> None:
    """The next record would take the template as long."""
    template = tmp_path / "huge.jinja"
    template.write_text("{% for m in messages %}{{ 'x' * 10 ** 9 if m.content == 'hi' else m.content }}{% endfor %}")
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps(record)}\n" * 100)
    code, said, told = run(data, "--template", template, "--skip-bad")
    assert (code, said) == (2, "")
    assert told.startswith(f"elm-mlx: {template}: the chat template needs more than 200 MB (--template FILE")
    assert told.count("\n") == 1


def test_the_models_template_or_another(run: Run, tmp_path: Path, tiny_model_dir: Path) -> None:
    path = write(tmp_path / "a.jsonl", *turns(1))
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(OPENELM_INSTRUCT_JINJA)
    instruct = "<s><|system|>\n    </s> \n    <|user|>\n    the quick </s> \n    <|assistant|>\n    ⟦fox 0</s>⟧\n"
    assert instruct in run(path, model=model)[1]
    assert instruct in run(path, "--template", "openelm-instruct")[1]
    assert "<s>the quick ⟦fox 0</s>⟧" in run(path, "--template", "none", model=model)[1]


def test_colour_on_a_terminal(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", *turns(1))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = run(path)[1]
    assert "<s>the quick \x1b[32mfox 0</s>\x1b[0m" in out and "⟦" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "⟦fox 0</s>⟧" in run(path)[1]


def test_data_cannot_command_the_terminal(run: Run, tmp_path: Path) -> None:
    out = run(write(tmp_path / "a.jsonl", {"text": "a\x1b[2Jb\rc\x9bd\te"}))[1]
    assert "⟦a\\x1b[2Jb\\x0dc\\x9bd\te</s>⟧" in out


def test_a_long_example_shows_both_ends(run: Run, tmp_path: Path) -> None:
    out = run(write(tmp_path / "a.jsonl", {"prompt": "the quick " * 50 + "end", "completion": " dogs"}))[1]
    tokens = int(re.search(r"line 1, (\d+) tokens", out)[1])  # type: ignore[index]
    assert f"\n    … {tokens - 240:,} tokens …\n" in out and out.rstrip().endswith("end⟦ dogs</s>⟧")


def test_what_is_too_long(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *turns(3), {"prompt": "the", "completion": "quick " * 99})
    out = run(path, "--max-seq-length", 32)[1]
    assert out.startswith("train: 3 examples of 4 completions\n")
    assert re.search(r"length    1 of 4 records longer than 32 tokens: left out; the longest, .* line 4, has ", out)
    out = run(path, "--max-seq-length", 32, "--truncate")[1]
    assert "train: 4 examples" in out and "1 of 4 records longer than 32 tokens: their end is cut off" in out


def test_by_default_the_models_context_is_the_limit(run: Run, tmp_path: Path) -> None:
    out = run(write(tmp_path / "a.jsonl", {"text": "the quick brown fox " * 300}))[1]
    assert "1 text longer than 512 tokens split into" in out and "rows of 512 tokens" in out


def test_every_bad_record_is_named(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *turns(2), {"prompt": "a"}, {"text": "\ud800"}, 7)
    code, out, err = run(path)
    named = [
        f"{path}, line 3: has none of these sets of keys: `prompt`, `completion`; `messages`; `conversations`; "
        "`mapping`; `instruction`, `output`; `text`; it has `prompt`",
        f"{path}, line 4: the text is not valid Unicode: character 1 is U+D800",
        f"{path}, line 5: is a number, not an object",
    ]
    assert (code, out) == (2, "")
    assert err.splitlines() == [*named, f"elm-mlx: {path}: 3 bad records; mend them, or --skip-bad leaves them out"]
    code, out, err = run(path, "--skip-bad")
    assert code == 0 and err.splitlines() == named
    assert out.startswith("train: 2 examples of 2 completions\n  bad       3 records left out\n")


def test_of_very_many_bad_records_the_first_are_named(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *turns(1), *({"prompt": "a"} for _ in range(1051)))
    code, out, err = run(path)
    named = err.splitlines()
    assert (code, out) == (2, "") and len(named) == 52
    assert named[0].startswith(f"{path}, line 2: ") and named[49].startswith(f"{path}, line 51: ")
    assert named[50] == "… and 1,001 more" and ": 1051 bad records; " in named[51].replace(",", "")
    assert len(run(path, "--skip-bad")[2].splitlines()) == 51


def test_every_split_is_shown(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"text": "the fox"}, {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    ]})  # fmt: skip
    write(tmp_path / "valid.jsonl", {"text": "the king"})
    out = run(tmp_path, "--template", "openelm-instruct")[1]
    assert "train: 2 examples of 1 text, 1 conversation\n" in out and "valid: 1 example of 1 text\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such file or directory"),
        (["a.jsonl", "--format", "csv"], "--format csv: is not one of completion, messages, sharegpt, chatgpt, alpaca"),
        (["a.jsonl", "--max-seq-length", "1"], "--max-seq-length 1: must be 2 or more"),
        (["a.jsonl", "--max-seq-length", "513"], "--max-seq-length 513: the model reads 512 tokens at most"),
        (["a.jsonl", "--template", "nowhere"], "nowhere: not a chat template"),
        (["a.jsonl", "--model", "nowhere"], "nowhere: no such directory"),
        (["talk.jsonl"], "talk.jsonl, line 1: is a conversation, and the model has no chat template"),
    ],
)
def test_what_is_wrong_is_one_line_and_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", *turns(1))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write(tmp_path / "talk.jsonl", {"messages": talk})
    model = Path("nowhere") if "--model" in arguments else tiny_model_dir
    code, out, err = run(*arguments[:1], *(arguments[1:] if "--model" not in arguments else []), model=model)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith(f"elm-mlx: {message}")


def test_a_model_without_a_tokenizer(run: Run, tmp_path: Path, tiny_model_dir: Path) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (model / "tokenizer.model").unlink()
    code, _, err = run(write(tmp_path / "a.jsonl", *turns(1)), model=model)
    assert code == 2 and "holds no tokenizer.model" in err


def test_nothing_heavy_is_imported(tmp_path: Path, tiny_model_dir: Path) -> None:
    path = write(tmp_path / "a.jsonl", *turns(3))
    out, _, modules = modules_of("data", path, "--model", tiny_model_dir)
    assert "3 examples" in out
    assert not packages(modules) & {"mlx", "mlx_lm", "transformers", "huggingface_hub", "pyarrow", "rich"}


PAIRS = [
    {"prompt": "the quick", "chosen": " brown fox", "rejected": " lazy dogs jumps", "id": 1},
    {"prompt": "an old", "chosen": " king", "rejected": " told\nstories", "id": 2, "score": None},
]


class TestPairs:
    def test_they_are_shown_as_dpo_sees_them(self, run: Run, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
        code, out, err = run(write(tmp_path / "a.jsonl", *PAIRS * 3))
        assert code == 0 and err == ""
        assert out.startswith("train: 6 pairs of answers, for `elm-mlx dpo`\n")
        assert "ignored   keys without meaning here: `id` (6), `score` (3)\n" in out
        whole = [
            [len(tiny_tokenizer.encode(pair["prompt"] + pair[key])) + 1 for key in ("chosen", "rejected")]  # type: ignore[operator]
            for pair in PAIRS
        ]
        assert f"tokens    {3 * sum(map(sum, whole)):,}, " in out
        longer = sorted(map(max, whole))
        assert f"lengths   of the longer answer: median {longer[0]}, longest {longer[1]}\n" in out
        assert f"pair 1: {tmp_path}/a.jsonl, line 1, {whole[0][0]} tokens and {whole[0][1]} tokens\n" in out
        assert "            <s>the quick\nchosen      ⟦ brown fox</s>⟧\nrejected    ⟦ lazy dogs jumps</s>⟧\n" in out
        assert "rejected    ⟦ told\n            stories</s>⟧\n" in out
        assert out.count("\npair ") == 5

    def test_bad_ones_are_named(self, run: Run, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", PAIRS[0], PAIRS[0] | {"rejected": " brown fox"}, {"text": "a"})
        code, out, err = run(path)
        assert code == 2 and out == ""
        assert [line.partition(": ")[2] for line in err.splitlines()[:2]] == [
            "`chosen` and `rejected` are the same",
            "`chosen` is missing; a pair has `prompt`, `chosen` and `rejected`; `elm-mlx lora` trains on such records",
        ]
        code, out, _ = run(path, "--skip-bad")
        assert code == 0 and "train: 1 pair of answers" in out and "bad       2 records left out" in out

    def test_what_is_no_pair_first_makes_pairs_bad(self, run: Run, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", {"text": "a"}, *PAIRS)
        code, _, err = run(path)
        assert (
            code == 2 and err.count("is a pair of answers, `chosen` and `rejected`: `elm-mlx dpo` trains on those") == 2
        )
        code, _, err = run(path, "--format", "pairs")
        assert code == 2 and err.count("`chosen` is missing") == 1 and "1 bad record;" in err
        assert run(write(tmp_path / "b.jsonl", PAIRS[0] | {"text": "a"}), "--format", "text")[0] == 0

    def test_options_that_pairs_have_not(self, run: Run, tmp_path: Path) -> None:
        code, _, err = run(write(tmp_path / "a.jsonl", *PAIRS), "--train-on-prompt")
        assert code == 2 and "answers alone are trained: leave out --train-on-prompt" in err


def test_keys_and_shards_that_are_not_used_are_told(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "train-00001-of-00003.jsonl", *({"text": "the fox", f"k\x1b{i}": 1, "id": 1} for i in range(9)))
    code, out, _ = run(tmp_path)
    assert code == 0 and "\x1b" not in out
    assert "files     1 of 3 shards are here, train-00001-of-00003.jsonl first; missing: 00000, 00002\n" in out
    assert "ignored   keys without meaning here: `id` (9), `k\\x1b0` (1), " in out and " and 2 more\n" in out


def test_no_tokens_at_all_are_not_the_default(run: Run, tmp_path: Path) -> None:
    code, _, err = run(write(tmp_path / "a.jsonl", {"text": "the fox"}), "--max-seq-length", 0)
    assert code == 2 and "--max-seq-length 0: must be 2 or more" in err
