"""Vocabularies from raw text: Llama's rules, samples that are fair and repeat, and errors that say where."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.cli import main
from elm_mlx.errors import ElmError, InputError
from elm_mlx.text import sentencepiece_file
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx.train import vocabulary
from elm_mlx.train.vocabulary import measure, sample, train

ROOT = Path(__file__).parents[2]
CLASSICS = ROOT.parent / "shared" / "data" / "classics"
LLAMA = ROOT.parent / "shared" / "data" / "tokenizer" / "llama2.model"

_WORDS = "the a quick slow brown red fox dog jumps sleeps over under lazy old house river 12 2026 naïve"
WORDS = _WORDS.split()


def lines(count: int, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return [f"{number} " + " ".join(chosen.choices(WORDS, k=8)) for number in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    texts = ["\n".join(lines(50, seed)) for seed in range(20)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_ids_are_laid_out_as_in_llamas_tokenizer(corpus: Path, tmp_path: Path) -> None:
    tokenizer = train(sample([corpus]), tmp_path / "a.model", vocab_size=340)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 340)
    pieces = sentencepiece_file.read(tmp_path / "a.model").pieces()
    assert [piece.text for piece in pieces[:3]] == ["<unk>", "<s>", "</s>"]
    assert [piece.text for piece in pieces[3:259]] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert {piece.type for piece in pieces[259:]} == {sentencepiece_file.NORMAL}
    assert "▁the" in tokenizer.pieces


def test_the_rules_are_those_of_llamas_own_file(corpus: Path, tmp_path: Path) -> None:
    if not LLAMA.exists():
        pytest.skip(f"no {LLAMA}")
    train(sample([corpus]), tmp_path / "a.model", vocab_size=340)
    ours, llama = sentencepiece_file.read(tmp_path / "a.model"), sentencepiece_file.read(LLAMA)
    for name in (
        "model_type", "byte_fallback", "whitespace_as_suffix", "unknown_surface", "add_dummy_prefix",
        "remove_extra_whitespaces", "escape_whitespaces", "charsmap", "denormalizes",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(llama, name), name


def test_digits_stand_alone_and_runs_of_spaces_are_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"        x = 2026{number}" for number in range(400)))
    tokenizer = train(sample([path]), tmp_path / "a.model", vocab_size=275)
    assert not [piece for piece in tokenizer.pieces[259:] if len(piece) > 1 and any(c.isdigit() for c in piece)]
    assert [piece for piece in tokenizer.pieces[259:] if len(piece) > 1 and set(piece) == {"▁"}]


def test_equal_input_gives_equal_bytes_in_any_process(corpus: Path, tmp_path: Path) -> None:
    train(sample([corpus], max_bytes=20_000, seed=3), tmp_path / "a.model", vocab_size=330)
    code = (
        "import sys; from pathlib import Path; from elm_mlx.train.vocabulary import sample, train;"
        "train(sample([Path(sys.argv[1])], max_bytes=20_000, seed=3), Path(sys.argv[2]), vocab_size=330)"
    )
    command = [sys.executable, "-c", code, str(corpus), str(tmp_path / "b.model")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a.model").read_bytes()


@settings(max_examples=60)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="▁\0")))
def test_any_text_comes_back(text: str, any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


@pytest.fixture(scope="session")
def any_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary")
    (path / "a.txt").write_text("\n".join(lines(500)))
    return train(sample([path / "a.txt"]), path / "a.model", vocab_size=330)


TEXTS = ["one line\nand another, naïve", "  indented\r\n\n   \nlast"]
ROWS = "".join(json.dumps({"title": 1, "text": text}) + "\n" for text in TEXTS).encode()
FORMS = {
    "a.txt": "\n".join(TEXTS).encode(),
    "a.txt.gz": gzip.compress("\n".join(TEXTS).encode()),
    "a.jsonl": ROWS,
    "a.jsonl.gz": gzip.compress(ROWS),
    "a.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
}


def check_lines(path: Path) -> None:
    drawn = sample([path])
    expected = [b"one line", "and another, naïve".encode(), b"  indented", b"last"]
    assert sorted([*drawn.lines, *drawn.held_out]) == sorted(expected)


@pytest.mark.parametrize("name", FORMS)
def test_every_kind_of_file_gives_the_same_lines(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    check_lines(tmp_path / name)


def test_parquet_gives_the_same_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"title": [1, 2], "text": TEXTS}), tmp_path / "a.parquet")
    check_lines(tmp_path / "a.parquet")


def test_several_files_are_one_corpus(tmp_path: Path) -> None:
    for name, data in FORMS.items():
        (tmp_path / name).write_bytes(data)
    drawn = sample([tmp_path / name for name in FORMS])
    assert len(drawn.lines) + len(drawn.held_out) == 4 * 5
    assert drawn.texts == 4 * 2 + 2 * 3  # a line of a text file is a record, unless it is blank


def test_a_sample_fills_its_bytes_and_keeps_the_order(corpus: Path) -> None:
    whole, drawn = sample([corpus]), sample([corpus], max_bytes=10_000)
    assert 9_900 < sum(map(len, drawn.lines)) <= 10_000
    places = [whole.lines.index(line) for line in drawn.lines]
    assert places == sorted(places) and len(set(places)) == len(places)
    assert drawn.held_out == whole.held_out and not set(drawn.held_out) & set(drawn.lines)
    assert sample([corpus], max_bytes=10_000, seed=1).lines != drawn.lines
    assert whole.nbytes == drawn.nbytes == sum(len(json.loads(row)["text"].encode()) for row in corpus.open())


def test_a_larger_sample_holds_the_smaller(corpus: Path) -> None:
    small, large = (set(sample([corpus], max_bytes=n).lines) for n in (5_000, 20_000))
    assert small < large


def test_every_line_has_the_same_chance(tmp_path: Path) -> None:
    """Wherever it stands, and however long it is."""
    rows = [f"{number:04d}" + "x" * (60 if number % 2 else 0) for number in range(400)]
    (tmp_path / "a.txt").write_text("\n".join(rows))
    early = long = total = 0
    for seed in range(40):
        numbers = [int(line[:4]) for line in sample([tmp_path / "a.txt"], max_bytes=3_000, seed=seed).lines]
        early += sum(number < 200 for number in numbers)
        long += sum(number % 2 for number in numbers)
        total += len(numbers)
    assert total > 2500  # one standard deviation of a share is then under 0.01
    assert abs(early / total - 0.5) < 0.04 and abs(long / total - 0.5) < 0.04


def test_the_stream_is_not_kept(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        for seed in range(300):
            file.write(json.dumps({"text": "\n".join(lines(2, seed)) + "\n" + "word " * 20_000}) + "\n")
    tracemalloc.start()
    drawn = sample([path], max_bytes=50_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawn.nbytes > 30e6 and peak < 4e6


@settings(max_examples=60)
@given(text=st.text(alphabet="ab é漢😀\n\r\t", max_size=400).map(lambda part: part * 60))
def test_long_lines_are_cut_and_nothing_else_is_lost(text: str) -> None:
    cut = list(vocabulary._lines(text.encode()))
    assert all(0 < len(line) <= 4192 and line.decode().strip() for line in cut)
    assert "".join(b"".join(cut).decode().split()) == "".join(text.split())


def test_a_vocabulary_that_is_too_large(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--vocab-size 9000: the data gives at most \d+ pieces") as error:
        train(sample([corpus]), tmp_path / "a.model", vocab_size=9000)
    most = int(str(error.value).split("give --vocab-size ")[1].split()[0])
    assert not list(tmp_path.glob("*a.model*"))
    assert train(sample([corpus]), tmp_path / "a.model", vocab_size=most).vocab_size == most


def test_a_vocabulary_that_is_too_small(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--vocab-size 260: control pieces, 256 bytes and .* are (\d+); ask for more"):
        train(sample([corpus]), tmp_path / "a.model", vocab_size=260)
    with pytest.raises(InputError, match="--vocab-size -1: must be 1 or more"):
        train(sample([corpus]), tmp_path / "a.model", vocab_size=-1)
    with pytest.raises(InputError, match=r"--character-coverage 0\.5: must be from 0\.98 to 1"):
        train(sample([corpus]), tmp_path / "a.model", vocab_size=330, character_coverage=0.5)


def test_whatever_else_sentencepiece_says_is_passed_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**options: object) -> None:
        raise RuntimeError("Internal: something\nodd")

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", fails)
    with pytest.raises(ElmError, match="SentencePiece failed: Internal: something odd"):
        train(sample([corpus]), tmp_path / "a.model", vocab_size=330)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", b"good\nb\xffd\n", r"a\.txt, line 2: not UTF-8 at byte 2 of the line"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8 at byte 11"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: not valid Unicode: character 1 is half"),
        ("a.jsonl", b'{"content": "x"}\n', r"a\.jsonl, line 1: `text` is missing; it has `content`"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: is a number, not an object"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=says + ".*; --skip-bad leaves such records out"):
        sample([tmp_path / name])
    (tmp_path / "good.txt").write_text("good")
    drawn = sample([tmp_path / name, tmp_path / "good.txt"], skip_bad=True)
    assert len(drawn.bad) == 1 and b"good" in drawn.lines


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:-20])
    (tmp_path / "no.txt.gz").write_bytes(b"text")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n\n")
    for name in ("a.xls", "a.bin"):
        (tmp_path / name).write_text("a,b")
    for name, says in (
        ("cut.txt.gz", "damaged gzip"), ("no.txt.gz", "damaged gzip"), ("empty.jsonl", "no text to train on"),
        ("blank.txt", "no text to train on"), ("a.xls", "a spreadsheet; save it as CSV"), ("none.txt", "no such file"),
        ("a.bin", "not a kind of data file"), ("", "is a directory: name the files in it"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            sample([tmp_path / name])
    with pytest.raises(InputError, match="--max-bytes 0"):
        sample([tmp_path / "blank.txt"], max_bytes=0)


def test_destinations(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "there.model").write_text("mine")
    with pytest.raises(InputError, match=r"there\.model: exists already; pass --overwrite"):
        train(sample([corpus]), tmp_path / "there.model", vocab_size=330)
    assert (tmp_path / "there.model").read_text() == "mine"
    assert train(sample([corpus]), tmp_path / "there.model", vocab_size=330, overwrite=True).vocab_size == 330
    with pytest.raises(InputError, match="is a directory"):
        train(sample([corpus]), tmp_path, vocab_size=330, overwrite=True)
    with pytest.raises(InputError, match=r"there is no directory .*none"):
        train(sample([corpus]), tmp_path / "none" / "a.model", vocab_size=330)


def test_measures_are_sentencepieces_own(any_tokenizer: Tokenizer) -> None:
    texts = [*lines(30, seed=9), "漢字 ▁"]
    found = measure(any_tokenizer, [text.encode() for text in texts])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(any_tokenizer.path))
    ids = [processor.encode(text) for text in texts]
    assert found.tokens == sum(map(len, ids)) and found.nbytes == sum(len(text.encode()) for text in texts)
    assert found.byte_tokens == sum(processor.is_byte(token) for row in ids for token in row) >= 6
    assert (found.lines, found.returned) == (31, 30)  # "▁" is how SentencePiece writes a space
    assert found.bytes_per_token == found.nbytes / found.tokens > 1
    assert measure(any_tokenizer, []).bytes_per_token == 0


def test_the_classics_are_as_short_as_in_their_own_tokenizer(tmp_path: Path) -> None:
    if not (CLASSICS / "train.jsonl.gz").exists():
        pytest.skip(f"no {CLASSICS}")
    drawn = sample([CLASSICS / "train.jsonl.gz"])
    ours = train(drawn, tmp_path / "a.model", vocab_size=4096, character_coverage=0.9995)
    books = [json.loads(row)["text"].encode() for row in (CLASSICS / "valid.jsonl").open()]
    ours_size, theirs = (measure(t, books).tokens for t in (ours, Tokenizer.load(CLASSICS / "tokenizer.model")))
    assert ours_size < 1.005 * theirs


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command in this process: exit code, stdout and stderr, with what C++ writes there."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["elm-mlx", "train-tokenizer", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0, *capfd.readouterr())

    return call


def test_the_command(command: Command, corpus: Path, tmp_path: Path, any_tokenizer: Tokenizer) -> None:
    out = tmp_path / "a.model"
    before = signal.getsignal(signal.SIGINT)
    code, printed, err = command(corpus, "--out", out, "--vocab-size", 340, "--compare", any_tokenizer.path)
    assert (code, err) == (0, "") and signal.getsignal(signal.SIGINT) == before
    names = [line[:10].strip() for line in printed.splitlines()]
    assert names == ["read", "sample", "held out", "trained", "measured", "", "compared", "", "wrote"]
    drawn = sample([corpus])
    assert f"{measure(Tokenizer.load(out), drawn.held_out).bytes_per_token:.3f} bytes a token" in printed
    assert f"{len(drawn.held_out)} of {len(drawn.held_out)} lines decode to themselves" in printed


def test_the_commands_errors(command: Command, corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\n" * 7 + "\n".join(lines(900)).encode())
    code, out, err = command(bad, "--out", tmp_path / "a.model")
    assert (code, out, err.count("\n")) == (2, "", 1) and "bad.txt, line 1: not UTF-8" in err
    code, out, err = command(bad, "--out", tmp_path / "a.model", "--skip-bad", "--vocab-size", 330)
    assert (code, err, out.count("\nbad  ")) == (0, "", 6) and "bad         2 more" in out
    code, out, err = command(corpus, "--out", tmp_path / "a.model")
    assert (code, out, err.count("\n")) == (2, "", 1) and "exists already" in err
    code, out, err = command(corpus, "--out", tmp_path / "b.model", "--vocab-size", 9000)
    assert (code, err.count("\n")) == (2, 1) and err.startswith("elm-mlx: --vocab-size 9000: the data gives at most")


def test_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    """While SentencePiece works, too, which knows nothing of signals."""
    chosen = random.Random(0)
    path = tmp_path / "a.txt"
    words = ["".join(chosen.choices("abcdefghijklmnop", k=9)) for _ in range(200_000)]
    path.write_text("\n".join(" ".join(chosen.choices(words, k=20)) for _ in range(20_000)))
    command = [sys.executable, "-m", "elm_mlx", "train-tokenizer", str(path), "--out", str(tmp_path / "a.model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("held out"):
            assert process.poll() is None
        time.sleep(0.3)
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait() == -signal.SIGINT and time.monotonic() - start < 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
