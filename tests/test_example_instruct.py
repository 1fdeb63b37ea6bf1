"""The instruction example: its check, its data, its figures, and a short run of the whole."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from elm_mlx.store.loading import load

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parent.parent
INSTRUCT = ROOT / "examples" / "instruct"

sys.path.insert(0, str(INSTRUCT))
import cut  # noqa: E402
import scores  # noqa: E402
import task  # noqa: E402
from pairs import PAIRS, pairs  # noqa: E402
from scores import Answer  # noqa: E402

sys.path.remove(str(INSTRUCT))

FOX = task.Wish("short", "statement", "The fox")
NAMES = ("train", "valid", "practice", "held-out")


def records(name: str) -> list[dict[str, Any]]:
    with gzip.open(INSTRUCT / "data" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    "answer", ["The fox ran away.", "  The fox, said he, is in.\n", "The fox--poor thing--ran off."]
)
def test_an_answer_passes(answer: str) -> None:
    assert task.check(answer, FOX) == (True, True, True, True)
    assert task.check(answer, FOX).passes


@pytest.mark.parametrize(
    ("answer", "failing"),
    [
        ("", {"sentence", "kind", "length", "beginning"}),
        ("The foxes ran away.", {"beginning"}),
        ("The fox's den was empty.", {"beginning"}),
        ("The fox-hunters ran away.", {"beginning"}),
        ("The, fox ran away.", {"beginning"}),
        ("And the fox ran away.", {"beginning"}),
        ("THE fox ran away.", {"beginning"}),
        ("The fox did run away?", {"kind"}),
        ("The fox is here!", {"kind"}),
        ("The fox ran.", {"length"}),
        ("The fox ran away from them all over again.", {"length"}),
        ("The fox ran away. He was gone.", {"sentence"}),
        ("The fox! he said aloud.", {"sentence"}),
        ("the fox ran away.", {"sentence", "beginning"}),
        ('"The fox ran away."', {"sentence", "kind", "beginning"}),
        ("The fox ran away", {"sentence", "kind"}),
        ("The fox ran away..", {"sentence"}),
        ("The fox ate 2 other foxes.", {"sentence"}),
        ("The fox ran away.\nThe fox ran away.", {"sentence"}),
        ("The fox ran\naway.", {"sentence"}),
        ("The fox, ein Füchslein, slept.", {"sentence"}),
    ],
)
def test_an_answer_fails_for_what_is_wrong_with_it(answer: str, failing: set[str]) -> None:
    verdict = task.check(answer, FOX)
    assert {name for name, good in verdict._asdict().items() if not good} == failing
    assert not verdict.passes


@pytest.mark.parametrize(("kind", "end"), [("statement", "."), ("question", "?"), ("exclamation", "!")])
@pytest.mark.parametrize(
    ("length", "good", "bad"), [("short", (4, 5, 6, 7, 8), (3, 9, 12)), ("long", (11, 15, 18), (8, 10, 19))]
)
def test_kinds_and_lengths(kind: str, end: str, length: str, good: tuple[int, ...], bad: tuple[int, ...]) -> None:
    asked = task.Wish(length, kind, "So fox")
    for count in (*good, *bad):
        sentence = "So" + " fox" * (count - 1) + end
        assert task.check(sentence, asked) == (True, True, count in good, True)
        assert (task.wishes(sentence) == asked) == (count in good)


@pytest.mark.parametrize(
    "sentence",
    ["", "Go.", "Well, well, said the fox.", "The fox ran. He was gone.", "The fox ran away from them all at once."],
)
def test_what_answers_no_question(sentence: str) -> None:
    assert task.wishes(sentence) is None


def test_a_question_says_what_is_wished() -> None:
    assert FOX.prompt() == "Write a short statement that begins with: The fox\n"
    assert task.wish(FOX.prompt()) == task.wishes("The fox ran away.") == FOX
    shown = "Write a long question that begins with: It's half-past\nIt's half-past nine?\n" + FOX.prompt()
    assert task.wish(shown) == FOX
    with pytest.raises(ValueError, match="no question: 'Once upon a time'"):
        task.wish("Once upon a time")


@pytest.mark.parametrize("name", ["train", "valid"])
def test_the_lessons_pass(name: str) -> None:
    for lesson in records(name):
        assert task.check(lesson["completion"], task.wish(lesson["prompt"])).passes


def test_what_is_measured_is_asked_nowhere_else() -> None:
    asked = {name: {record["prompt"] for record in records(name)} for name in NAMES}
    elsewhere = asked["train"] | asked["valid"] | asked["practice"]
    assert not asked["held-out"] & elsewhere
    beginnings = {task.wish(prompt).beginning for prompt in elsewhere}
    assert {r["prompt"]: r["new"] for r in records("held-out")} == {
        prompt: task.wish(prompt).beginning not in beginnings for prompt in asked["held-out"]
    }
    for name in ("practice", "held-out"):
        assert len(asked[name]) == len(records(name))


def test_every_kind_and_length_is_there_as_often_as_another() -> None:
    for name, each in zip(NAMES, (1200, 30, 200, 50), strict=True):
        kinds = Counter(task.wish(record["prompt"])[:2] for record in records(name))
        assert len(kinds) == 6 and set(kinds.values()) == {each}


def test_the_extract_is_small_and_holds_each_sentence_once() -> None:
    assert sum(file.stat().st_size for file in (INSTRUCT / "data").iterdir()) < 300_000
    sentences = [lesson["completion"] for name in ("train", "valid") for lesson in records(name)]
    assert len(set(sentences)) == len(sentences)


def test_questions_are_cut_out_of_books(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HELD_OUT", "PRACTICE", "VALID", "TRAIN"):
        monkeypatch.setattr(cut, name, 1)
    animals, ends = ("fox", "cat", "owl", "dog", "hen"), ("far away.", "very old?", "not here!")
    book = "\n".join(f'"The {animal} is {end}" It was so.' for animal in animals for end in ends)
    parts = cut.split([book, book])
    assert {name: len(part) for name, part in parts.items()} == dict.fromkeys(NAMES, 3)
    for lesson in [*parts["train"], *parts["valid"]]:
        assert task.wishes(lesson["completion"]) == task.wish(lesson["prompt"])
        assert lesson["completion"] in book


def test_pairs_are_of_one_question_answered_both_ways() -> None:
    good = [f"The fox ran to {place}." for place in ("town", "church", "school", "market")]
    bad = ["The foxes ran to town.", "Where is the fox?", "", "The owl ran to town.", "Where is the owl?"]
    answers = [Answer(FOX.prompt(), text) for text in (*good, *good, *bad)]
    answers += [Answer(FOX._replace(kind="question").prompt(), text) for text in good]  # none passes
    found = list(pairs(answers, seed=1))
    assert len(found) == PAIRS == 3
    assert {pair["prompt"] for pair in found} == {FOX.prompt()}
    assert {pair["chosen"] for pair in found} < set(good) and {pair["rejected"] for pair in found} < set(bad) - {""}
    assert len({pair["chosen"] for pair in found}) == 3
    assert found == list(pairs(answers, seed=1))


@pytest.mark.parametrize(
    ("passed", "trials", "low", "high"),  # Newcombe, 1998, table I, method 3; the last by symmetry
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],
)
def test_wilsons_interval(passed: int, trials: int, low: float, high: float) -> None:
    assert scores.wilson(passed, trials) == pytest.approx((low, high), abs=1e-4)


def test_surprise_is_the_mean_over_all_tokens(tiny_model_dir: Path) -> None:
    model, tokenizer = load(tiny_model_dir, compute_dtype="float32")
    assert tokenizer is not None
    texts, logprobs = ["the quick brown fox", "", "jumps over lazy dogs while"], list[float]()
    for text in filter(None, texts):
        ids = tokenizer.encode(text)
        logits = np.array(model(mx.array(ids)[None])[0, :-1], np.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        logprobs += logits[np.arange(len(ids) - 1), ids[1:]].tolist()
    assert scores.surprise(tiny_model_dir, texts) == pytest.approx(-np.mean(logprobs), rel=1e-5)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """The example run on short statements: what it wrote, how it was called, and what it printed."""
    directory = tmp_path_factory.mktemp("instruct")
    lessons = [lesson for lesson in records("train") if task.wish(lesson["prompt"])[:2] == FOX[:2]]
    asked = Counter(lesson["prompt"] for lesson in lessons).most_common(20)
    practice = [{"prompt": prompt} for prompt, _ in asked]
    held_out = [record for record in records("held-out") if task.wish(record["prompt"])[:2] == FOX[:2]][:10]
    for name, part in zip(NAMES, (lessons, lessons[:20], practice, held_out), strict=True):
        text = "".join(json.dumps(record) + "\n" for record in part)
        (directory / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    options = ["--data", directory, "--out", directory / "out", "--iters", "24"]
    command = [*map(str, [sys.executable, INSTRUCT / "run.py", *options])]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "out", command, done.stdout


def test_the_whole_runs_and_its_table_is_what_was_answered(short: tuple[Path, list[str], str]) -> None:
    out, _, printed = short
    assert len(re.findall(r"^\$ elm-mlx (?:lora|dpo|fuse|report) ", printed, re.M)) == 6
    rows = dict(re.findall(r"^\| (as it was(?:, after examples)?|after SFT|after DPO) \| (.*\(.*) \|$", printed, re.M))
    assert len(rows) == 4
    for name, label in zip(rows, ("base", "shown", "sft", "dpo"), strict=True):
        for temperature, column in ((0, 0), (0.7, 1)):
            answers = scores.read(out / "answers" / f"{label}-{temperature}.jsonl")
            assert len(answers) == 10
            passed = sum(task.check(answer.text, task.wish(answer.prompt)).passes for answer in answers)
            assert float(rows[name].split(" | ")[column].split()[0]) == pytest.approx(
                100 * passed / len(answers), abs=0.05
            )


def test_the_pairs_are_the_models_own_answers(short: tuple[Path, list[str], str]) -> None:
    out, _, _ = short
    tries = scores.read(out / "tries.jsonl")
    assert len(tries) == 20 * 8
    answered = {(answer.prompt, answer.text) for answer in tries}
    for name in ("train", "valid"):
        for pair in map(json.loads, (out / "pairs" / f"{name}.jsonl").read_text("utf-8").splitlines()):
            wish = task.wish(pair["prompt"])
            assert task.check(pair["chosen"], wish).passes and not task.check(pair["rejected"], wish).passes
            assert {(pair["prompt"], pair["chosen"]), (pair["prompt"], pair["rejected"])} <= answered


def test_run_again_it_goes_on_where_it_was(short: tuple[Path, list[str], str]) -> None:
    out, command, printed = short
    (out / "answers" / "dpo-0.7.jsonl").unlink()
    again = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600, cwd=ROOT)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("--resume") == 2 and again.stdout.count("$ elm-mlx generate ") == 1
    tables = [text[text.index("| passes") :] for text in (printed, again.stdout)]
    assert tables[0] == tables[1]


def test_too_few_pairs_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(INSTRUCT))
    found = importlib.util.spec_from_file_location("instruct_run", INSTRUCT / "run.py")  # every example has a run.py
    assert found is not None and found.loader is not None
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    with pytest.raises(SystemExit, match="0 pairs: too few answers pass"):
        example.write_pairs([Answer(FOX.prompt(), "The owl ran away.")], Path("nowhere"))
