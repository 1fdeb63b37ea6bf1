"""Questions against an index: any text is a safe query, and rankings join by rank."""

from __future__ import annotations

import sqlite3
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elm_mlx.documents.index_file import TOKENIZER, separated
from elm_mlx.documents.indexing import index_documents
from elm_mlx.documents.retrieval import NEAR, DocumentIndex, fused, match_expression

TEXTS = {
    "tea.md": "# Tea\n\nGreen tea steeps at 80 degrees.\n\n## Black\n\nBlack tea likes boiling water.\n",
    "bread.md": "# Bread\n\nA dough rests overnight. Yeast was fed; the `--kv-bits` flag of read_file is here.\n",
    "ja.md": "# 図書館\n\n東京の図書館は毎週月曜日が休館日で、Python入門の本は二階にあります。猫も住んでいる。\n\n"
    "## 食堂\n\nカレーライスは八百円です。\n",
    "zh.md": "# 茶\n\n龙井茶产于杭州，每年清明节前采摘的茶叶最为珍贵。\n",
    "ko.md": "# 학교\n\n우리 학교에서는 매주 금요일에 도서관이 열립니다.\n",
    "th.md": "# ห้องสมุด\n\nห้องสมุดในกรุงเทพปิดทุกวันจันทร์และมีหนังสือภาษาPythonด้วย\n",
    "lo.md": "# ຫໍສະໝຸດ\n\nຫໍສະໝຸດປິດທຸກວັນຈັນ\n",
    "my.md": "# စာကြည့်တိုက်\n\nစာကြည့်တိုက်ကိုတနင်္လာနေ့တွင်ပိတ်သည်။\n",
    "km.md": "# បណ្ណាល័យ\n\nបណ្ណាល័យបិទនៅថ្ងៃច័ន្ទ។\n",
    "hi.md": "# पुस्तकालय\n\nपुस्तकालय सोमवार को बंद रहता है।\n",
    "ar.md": "# كتاب\n\nهذا الكتاب على الطاولة.\n",
    "cafe.md": "# Café\n\nDie Straße zum Café ist über die Brücke.\n",
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DocumentIndex:
    directory = tmp_path_factory.mktemp("notes")
    for name, text in TEXTS.items():
        (directory / name).write_text(text)
    path = tmp_path_factory.mktemp("index") / "notes.db"
    index_documents(directory, path)
    return DocumentIndex(path)


def first(index: DocumentIndex, question: str, *earlier: str) -> str:
    found = index.search(question, earlier)
    return found[0].title if found else ""


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("How hot is the water for green teas?", "tea.md:3 (Tea)"),
        ("boil", "tea.md:7 (Tea > Black)"),
        ("resting doughs", "bread.md:3 (Bread)"),
        ("what is --kv-bits", "bread.md:3 (Bread)"),
        ("read_file()", "bread.md:3 (Bread)"),
        ("uber cafe", "cafe.md:3 (Café)"),
        ("図書館はいつ休みますか", "ja.md:3 (図書館)"),
        ("休館日", "ja.md:3 (図書館)"),
        ("ｶﾚｰﾗｲｽはいくら？", "ja.md:7 (図書館 > 食堂)"),  # half as wide
        ("猫", "ja.md:3 (図書館)"),
        ("python入門", "ja.md:3 (図書館)"),
        ("python", "ja.md:3 (図書館)"),
        ("龙井茶什么时候采摘？", "zh.md:3 (茶)"),
        ("杭州", "zh.md:3 (茶)"),
        ("叶", "zh.md:3 (茶)"),
        ("도서관은 언제 열려요?", "ko.md:3 (학교)"),
        (unicodedata.normalize("NFD", "금요일"), "ko.md:3 (학교)"),  # as macOS writes names
        ("飛行機", ""),
        ("เปิดวันจันทร์ไหม", "th.md:3 (ห้องสมุด)"),
        ("หนังสือ", "th.md:3 (ห้องสมุด)"),
        ("ด้", "th.md:3 (ห้องสมุด)"),
        ("python ด้วย", "th.md:3 (ห้องสมุด)"),
        ("ฝนตก", ""),
        ("ວັນຈັນ", "lo.md:3 (ຫໍສະໝຸດ)"),
        ("တနင်္လာနေ့", "my.md:3 (စာကြည့်တိုက်)"),
        ("ថ្ងៃច័ន្ទ", "km.md:3 (បណ្ណាល័យ)"),
        ("सोमवार", "hi.md:3 (पुस्तकालय)"),
        ("सम वर", ""),  # vowels are marks, and belong to a word
        ("الكِتَاب", "ar.md:3 (كتاب)"),
        ("the of and", "bread.md:3 (Bread)"),  # nothing but stop words
        ("zebra", ""),
        ("?!", ""),
        ("", ""),
    ],
)
def test_words_find_passages(index: DocumentIndex, question: str, title: str) -> None:
    assert first(index, question) == title


def test_a_follow_up_is_found_by_the_question_before(index: DocumentIndex) -> None:
    assert first(index, "And how hot?") == ""
    assert first(index, "And how hot?", "bread?", "Tell me of green tea") == "tea.md:3 (Tea)"
    assert first(index, "Is it?", "Tell me of green tea") == "tea.md:3 (Tea)"  # "is" stands elsewhere
    assert first(index, "What of the dough?", "Tell me of green tea") == "bread.md:3 (Bread)"


SYNTAX = st.lists(
    st.sampled_from(
        ["NEAR(", "AND", "OR", "NOT", '"', "'", "*", "^", ":", "heading:", "{text}", "-", "+", "(", ")", "\0", "tea",
         "\ud800", "漢", "é", "a.b", "__", "\\"]
    ),
    max_size=30,
).map(" ".join)  # fmt: skip


@settings(max_examples=120)
@given(st.text(max_size=80) | SYNTAX | SYNTAX.map(lambda text: text.replace(" ", "")))
@example("word " * 5000)
@example(" ".join(map(str, range(5000))))
@example("x" * 100_000)
def test_no_question_is_a_syntax_error(index: DocumentIndex, question: str) -> None:
    for passage in index.search(question, [question]):
        assert passage.path in TEXTS


@settings(max_examples=100)
@given(st.text(max_size=60))
def test_every_letter_word_finds_the_passage_that_it_stands_in(question: str) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute(f"CREATE VIRTUAL TABLE words USING fts5 (text, tokenize='{TOKENIZER}')")
    text = f"{question} tail".replace("\0", " ").encode("utf-8", "replace").decode()
    connection.execute("INSERT INTO words VALUES (?)", (separated(text),))
    expression = match_expression(text, stop_words=True)
    assert connection.execute("SELECT count(*) FROM words WHERE words MATCH ?", (expression,)).fetchone() == (1,)


LETTERS = st.lists(
    st.sampled_from([*"東京都の図書館ガレー은학교龙井𠮷々กงเ", "กั", "ที่", "กำ", "ວັ", "ន្ទ", "လာ", "နေ့"]),
    min_size=1,
    max_size=12,
).map("".join)


@settings(max_examples=150)
@given(LETTERS, LETTERS, LETTERS)
@example("", "猫", "")
@example("私の", "猫", "")
def test_a_word_without_spaces_is_found_wherever_it_stands(before: str, word: str, after: str) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute(f"CREATE VIRTUAL TABLE words USING fts5 (text, tokenize='{TOKENIZER}')")
    connection.execute("INSERT INTO words VALUES (?)", (separated(f"{before}{word}{after}。"),))
    found = connection.execute("SELECT count(*) FROM words WHERE words MATCH ?", (match_expression(word),))
    assert found.fetchone() == (1,)


@given(st.text(st.characters(max_codepoint=0x590) | st.characters(min_codepoint=0x900, max_codepoint=0xDFF)))
def test_other_letters_stay_as_they_are(text: str) -> None:
    assert separated(text) == separated(text, asked=True) == text


def test_rankings_are_fused_by_rank() -> None:
    assert fused({1.0: [1, 2, 3], 0.99: [3, 9]}) == [3, 1, 2, 9]
    assert fused({1.0: [1], 0.5: [2, 1]}) == [1, 2]
    assert fused({1.0: [], 0.25: [7]}) == [7]


def test_what_scores_far_below_the_best_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for name, text in {
        "lamp": "The lamp of Varo weighs ninety grams.",
        "copy": "The lamp of Varo weighs eighty grams.",
        "pump": "A pump weighs more than most things do.",
        **{f"other{number}": f"A thing, number {number}, of no interest." for number in range(9)},
    }.items():
        (tmp_path / "notes" / f"{name}.txt").write_text(text)
    index_documents(tmp_path / "notes", tmp_path / "notes.db")
    index = DocumentIndex(tmp_path / "notes.db")

    def found(question: str, *earlier: str) -> list[str]:
        return [each.path for each in index.search(question, earlier)]

    assert found("What weighs the lamp of Varo?") == ["copy.txt", "lamp.txt"]
    assert "pump.txt" in found("What weighs so much?")  # where it is as near as any
    assert found("And what weighs the pump?", "What weighs the lamp of Varo?")[0] == "pump.txt"
    for question in ("What weighs the lamp of Varo?", "pump", "number of things"):
        scores = index._by_words([question])
        assert [*scores.values()] == sorted(scores.values(), reverse=True)
        near = [score >= NEAR * max(scores.values()) for score in scores.values()]
        assert len(found(question)) == sum(near) and near == sorted(near, reverse=True)
