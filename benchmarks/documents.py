"""Answers from documents, on facts that no model can know: `python benchmarks/documents.py [--model MODEL] …`.

A generated corpus of made-up towns, a Markdown file each, six facts a town under a heading each, with sentences around
them that name other towns. Each fact is asked in the text's words and in others. Counted is whether the passage with
the fact is found (recall@1 and @5) by words, by vectors and by both; whether a model's answer holds the fact, with
documents and without; and what an index, a question, and prompt lookup cost.

    python benchmarks/documents.py                                    recall by words
    python benchmarks/documents.py --embeddings DIR                   by vectors and both as well
    python benchmarks/documents.py --embeddings wordllama             those that come with the package wordllama
    python benchmarks/documents.py --model MODEL --questions 40       answers too
    python benchmarks/documents.py --megabytes 100                    speed of an index, and of a question to it
    python benchmarks/documents.py --megabytes 24 --embeddings DIR    with vectors
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elm_mlx.documents import retrieval
from elm_mlx.documents.indexing import index_documents
from elm_mlx.documents.retrieval import NEAR, VECTOR_WEIGHT, DocumentIndex, fused
from elm_mlx.documents.static_embeddings import StaticEmbeddings

ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "k", "kl", "l", "m", "n", "p", "pr", "r", "s", "st", "t", "tr", "v")
VOWELS, ENDS = "aeiou", ("n", "r", "l", "m", "s", "th", "nd", "rk")
GIVEN = ("Ilsa", "Bram", "Oda", "Teun", "Mirel", "Jorik", "Saskia", "Albin", "Petra", "Edvar", "Lene", "Rutger", "Yda")
GOODS = (
    "copper bells", "felt hats", "walnut clocks", "blue glass", "rope ladders", "cheese knives", "paper lanterns",
    "tin whistles",
)  # fmt: skip
TRADES = ("miller", "surveyor", "glassblower", "shepherd", "printer", "ferryman", "apothecary", "mason")
MONTHS = ("July", "August", "September", "October", "November")
RIVERS = ("Ossel", "Vint", "Marrow")
FILLER = (
    "The road to {other} is closed in winter, and then the post comes by sledge.",
    "Visitors mostly come from {other}, which is half a day away on foot.",
    "An older account, which was printed in {other}, says little about it.",
    "The archive burned down once and was set up again with help from {other}.",
    "People from {other} tell it differently, as neighbours do.",
    "In wet years the lower meadows stand under water until the end of spring.",
)


@dataclass(frozen=True)
class Fact:
    """A section's heading and sentence, questions in its words and in others, and what an answer must hold."""

    heading: str
    sentence: str
    questions: tuple[str, str]
    answer: str


@dataclass(frozen=True)
class Question:
    """A question, its answer, and where that stands; `kind` is "same words" or "other words"."""

    text: str
    answer: str
    path: str
    heading: str
    kind: str


def made_up_word(draw: random.Random, syllables: int) -> str:
    """Returns a name that no model has read."""
    parts = [draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(syllables)]
    return ("".join(parts) + draw.choice(ENDS)).capitalize()


def facts_of(town: str, draw: random.Random) -> list[Fact]:
    """Returns what a file says of a town, each fact with its questions and the words of a right answer."""
    founder, mayor = (f"{draw.choice(GIVEN)} {made_up_word(draw, 2)}" for _ in range(2))
    year, metres, minutes = (str(draw.randrange(*each)) for each in ((1200, 1900), (40, 900), (12, 95)))
    goods, trade, month, river = (draw.choice(each) for each in (GOODS, TRADES, MONTHS, RIVERS))
    return [
        Fact(
            "History",
            f"{town} was founded in {year} by a {trade}.",
            (f"In which year was {town} founded?", f"How old is {town}: when did the first settlers come?"),
            year,
        ),
        Fact(
            "Names",
            f"The founder's name was {founder}, after whom the main square is called.",
            (f"What was the name of the founder of {town}?", f"Which person created the settlement of {town}?"),
            founder,
        ),
        Fact(
            "Council",
            f"The mayor is {mayor}, who was elected twice.",
            (f"Who is the mayor of {town}?", f"Which politician governs {town}?"),
            mayor,
        ),
        Fact(
            "Trade",
            f"The workshops are known for {goods}.",
            (f"What are the workshops of {town} known for?", f"Which product is manufactured in {town}?"),
            goods,
        ),
        Fact(
            "The bridge",
            f"The bridge over the {river} is {metres} metres long.",
            (f"How long is the bridge of {town} in metres?", f"What is the length of the river crossing at {town}?"),
            metres,
        ),
        Fact(
            "Ferry",
            f"The ferry leaves every {minutes} minutes from May to {month}.",
            (f"How often does the ferry of {town} leave, in minutes?", f"At what interval do boats leave {town}?"),
            minutes,
        ),
    ]


def write_corpus(directory: Path, towns: int, seed: int = 1) -> list[Question]:
    """Writes a file for each town. Returns the questions, in a random order."""
    draw = random.Random(seed)
    names = list(dict.fromkeys(made_up_word(draw, 2 + number % 2) for number in range(2 * towns)))[:towns]
    questions = []
    for town in names:
        text = f"# {town}\n\n{town} is a small town in the hills.\n"
        for fact in facts_of(town, draw):
            around = [each.format(other=draw.choice(names)) for each in draw.sample(FILLER, 3)]
            around.insert(draw.randrange(4), fact.sentence)
            text += f"\n## {fact.heading}\n\n{' '.join(around)}\n"
            for asked, kind in zip(fact.questions, ("same words", "other words"), strict=True):
                questions.append(Question(asked, fact.answer, f"{town}.md", f"{town} > {fact.heading}", kind))
        (directory / f"{town}.md").write_text(text, "utf-8")
    draw.shuffle(questions)
    return questions


KINDS = ("lamp", "pump", "drill", "scale", "kettle", "radio", "heater", "printer")
COLOURS = ("dark green", "grey", "sand", "cobalt blue", "orange", "ivory")
ROOMS = ("the cellar", "the workshop", "room 12", "the shed", "the attic", "the kitchen")
ADVICE = (
    "Keep it dry when it is not used.",
    "The plug must not be pulled by its cable.",
    "A yellow light means that it rests.",
    "It was tested before it was packed.",
    "Clean it with a soft cloth alone.",
    "Its noise is that of a refrigerator.",
)


def write_devices(directory: Path, count: int, seed: int) -> list[Question]:
    """Writes a page for each made-up device, in lists and sentences. Returns the questions, in a random order."""
    draw = random.Random(seed)
    names = list(dict.fromkeys(f"{made_up_word(draw, 2)} {draw.randrange(10, 99)}" for _ in range(2 * count)))[:count]
    questions = []
    for name in names:
        kind = draw.choice(KINDS)
        grams, hours, volts = draw.randrange(150, 4000), draw.randrange(3, 40), draw.choice((12, 24, 110, 230, 400))
        colour, room, months = draw.choice(COLOURS), draw.choice(ROOMS), draw.randrange(6, 72)
        who, price = (
            f"{draw.choice(GIVEN)} {made_up_word(draw, 2)}",
            f"{draw.randrange(20, 900)}.{draw.randrange(10, 99)}",
        )
        facts = {
            f"- Weight: {grams} g\n- Voltage: {volts} V\n- Colour: {colour}": {
                f"What is the weight of the {name}?": str(grams),
                f"Which voltage does the {name} need?": str(volts),
                f"Which colour has the {name}?": colour,
            },
            f"The {name} is a {kind} that stands in {room}. {who} looks after it.": {
                f"Where does the {name} stand?": room.split()[-1],
                f"Who looks after the {name}?": who,
            },
            f"It was bought for {price} euros and has a guarantee of {months} months. "
            f"The battery of the {name} lasts {hours} hours.": {
                f"What did the {name} cost?": price,
                f"How many hours does the battery of the {name} last?": str(hours),
            },
        }
        text = f"{name}\n{'=' * len(name)}\n\n"
        path = f"{name.replace(' ', '-')}.md"
        for said, asked in facts.items():
            text += f"{draw.choice(ADVICE)}\n\n{said}\n\n{draw.choice(ADVICE)} "
            text += f"The {draw.choice(names)} is another matter.\n\n"
            questions += [Question(each, answer, path, name, "same words") for each, answer in asked.items()]
        (directory / path).write_text(text, "utf-8")
    draw.shuffle(questions)
    return questions


def recall(questions: Sequence[Question], ranked: Callable[[str], list[tuple[str, str]]]) -> tuple[float, float]:
    """Returns the shares of questions whose passage is the first, and among the first five."""
    first = five = 0
    for question in questions:
        found = ranked(question.text)[:5]
        first += found[:1] == [(question.path, question.heading)]
        five += (question.path, question.heading) in found
    return first / len(questions), five / len(questions)


def rankings(index: DocumentIndex) -> dict[str, Callable[[str], list[tuple[str, str]]]]:
    """Returns each way to rank passages by its name; a passage as its path and heading."""
    rows = index._connection.execute("SELECT passages.id, path, heading FROM passages JOIN files ON files.id = file")
    titles = {number: (path, heading) for number, path, heading in rows}

    def by(way: Callable[[str], list[int]]) -> Callable[[str], list[tuple[str, str]]]:
        return lambda text: [titles[number] for number in way(text)]

    def words(text: str) -> list[int]:
        return [*index._by_words([text])]

    def vectors(text: str) -> list[int]:
        return index._by_vectors([text])

    def both(text: str) -> list[int]:
        return fused({1.0: words(text), VECTOR_WEIGHT: vectors(text)})

    def alike(text: str) -> list[int]:
        return fused({1.0: words(text), 1.0 + 1e-9: vectors(text)})

    if index._embeddings is None:
        return {"words": by(words)}
    return {"words": by(words), "vectors": by(vectors), "both": by(both), "both, of equal weight": by(alike)}


def print_recall(index: DocumentIndex, questions: Sequence[Question]) -> None:
    """Prints how often the right passage is the first, and among the first five, by words, by vectors and by both."""
    print(f"| {len(index):,} passages | same words @1 | @5 | other words @1 | @5 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, ranked in rankings(index).items():
        cells = []
        for kind in ("same words", "other words"):
            cells += [f"{share:.1%}" for share in recall([each for each in questions if each.kind == kind], ranked)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def print_follow_ups(index: DocumentIndex, questions: Sequence[Question]) -> None:
    """Asks each question after another: one of the same town, without its name, or one of another town, with it."""
    draw, towns = random.Random(3), {}
    for question in questions:
        towns.setdefault(question.path, []).append(question)
    cases: dict[str, list[tuple[str, str, Question]]] = {"of the same town": [], "of another town": []}
    for question in questions:
        town = question.path.removesuffix(".md")
        bare = question.text.replace(f"of {town}", "there").replace(town, "it")
        cases["of the same town"].append((draw.choice(towns[question.path]).text, bare, question))
        cases["of another town"].append((draw.choice(questions).text, question.text, question))
    print("| a question after another | by itself @1 | @5 | with the one before @1 | @5 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, asked in cases.items():
        cells = []
        for alone in (True, False):
            found = [index.search(text, () if alone else (before,), 5) for before, text, _ in asked]
            places = [[(each.path, each.heading) for each in passages] for passages in found]
            wanted = [(question.path, question.heading) for _, _, question in asked]
            cells.append(statistics.fmean(place == own[0] for own, place in zip(places, wanted, strict=True) if own))
            cells.append(statistics.fmean(place in own for own, place in zip(places, wanted, strict=True)))
        print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in cells) + " |", flush=True)


def wordllama_embeddings(directory: Path) -> Path:
    """Writes the vectors that come with the package wordllama in model2vec's layout."""
    import wordllama
    from model2vec import StaticModel
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    home = Path(wordllama.__file__).parent
    (weights,) = load_file(home / "weights" / "l2_supercat_256.safetensors").values()
    tokenizer = Tokenizer.from_file(str(home / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    tokenizer.no_padding()
    StaticModel(weights.astype("float32"), tokenizer, normalize=True).save_pretrained(str(directory))
    return directory


WAYS = (  # each its name, the least share of the best score that a passage has, and prompt lookup
    ("none", None, False),
    ("yes", NEAR, False),
    ("the eight best", 0.0, False),
    ("yes, and prompt lookup", NEAR, True),
)


def says(text: str, answer: str) -> bool:
    """True where a text has a right answer's words, in whatever case."""
    return answer.lower() in text.lower()


def print_answers(model: Path, index: DocumentIndex, questions: Sequence[Question], max_tokens: int) -> None:
    """Asks a model with documents and without, greedily, and with prompt lookup again."""
    from elm_mlx import load
    from elm_mlx.inference.conversation import Chat
    from elm_mlx.text.chat_template import choose

    network, tokenizer = load(model)
    template = choose(model, tokenizer)
    rows: dict[str, list[tuple[bool, int, float, float]]] = {}
    same = 0
    for question in questions:
        answers = []
        for name, near, lookup in WAYS:
            options = {"temp": 0.0, "max_tokens": max_tokens}
            shown = None if near is None else index
            retrieval.NEAR = near or 0.0
            chat = Chat(network, tokenizer, template, options=options, documents=shown, prompt_lookup=lookup)
            begun = time.perf_counter()
            reply = chat.ask(question.text)
            answers.append("".join(reply))
            figures = reply.statistics
            first = figures.time_to_first_token
            seconds = time.perf_counter() - begun - first
            right = says(answers[-1], question.answer)
            rows.setdefault(name, []).append((right, figures.prompt_tokens, first, seconds))
        same += answers[1] == answers[3]
    print("| documents | right | tokens of the prompt | seconds to the first token | speed of decoding |")
    print("| --- | ---: | ---: | ---: | ---: |")
    usual = statistics.fmean(seconds for *_, seconds in rows["yes"])
    for name, every in rows.items():
        share, tokens, first, seconds = (statistics.fmean(column) for column in zip(*every, strict=True))
        speed = f"{usual / seconds:.2f}" if name != "none" else ""
        print(f"| {name} | {share:.0%} | {tokens:.0f} | {first:.2f} | {speed} |")
    pairs = [(near[0], eight[0]) for near, eight in zip(rows["yes"], rows["the eight best"], strict=True)]
    fewer, more = pairs.count((True, False)), pairs.count((False, True))
    print(f"{len(questions)} questions: {fewer} right by the near passages alone, {more} by the eight best alone")
    print(f"{same} answers the same with prompt lookup", flush=True)


def print_speed(megabytes: float, embeddings: StaticEmbeddings | None) -> None:
    """Prints how long so much text takes to index, to index again, and to be asked."""
    with tempfile.TemporaryDirectory() as folder:
        directory, path = Path(folder, "corpus"), Path(folder, "notes.db")
        directory.mkdir()
        size = number = 0
        questions: list[Question] = []
        while size < megabytes * 1e6:
            part = directory / str(number)
            part.mkdir()
            questions = write_corpus(part, 500, seed=100 + number)
            size, number = size + sum(each.stat().st_size for each in part.iterdir()), number + 1
        times: list[float] = []
        for _ in range(2):
            begun = time.perf_counter()
            report = index_documents(directory, path, embeddings)
            times.append(time.perf_counter() - begun)
        held = f"{size / 1e6:.0f} MB, {report.files:,} files, {report.passages:,} passages"
        print(f"{held}: indexed in {times[0]:.1f} s, {times[1]:.1f} s again with nothing new", flush=True)
        print(f"the index: {path.stat().st_size / 1e6:.0f} MB", flush=True)
        index = DocumentIndex(path)
        begun = time.perf_counter()
        index.search(questions[0].text)
        first = time.perf_counter() - begun
        asked = []
        for question in questions[:200]:
            begun = time.perf_counter()
            index.search(question.text)
            asked.append(time.perf_counter() - begun)
        asked.sort()
        median, most = (f"{1000 * asked[int(share * len(asked))]:.1f} ms" for share in (0.5, 0.95))
        print(f"a question: the first {1000 * first:.0f} ms, then {median} in the median, 95 % below {most}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towns", type=int, default=150)
    parser.add_argument("--embeddings", help="a directory, or wordllama")
    parser.add_argument("--model", type=Path, help="also ask this model")
    parser.add_argument("--seed", type=int, default=1, help="of the corpus")
    parser.add_argument("--devices", action="store_true", help="ask the model of devices in place of towns")
    parser.add_argument("--questions", type=int, default=40, help="to the model")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--megabytes", type=float, help="measure an index of so much text, and nothing else")
    args: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        embeddings = None
        if args.embeddings is not None:
            own = args.embeddings == "wordllama"
            directory = wordllama_embeddings(Path(folder, "static")) if own else Path(args.embeddings)
            embeddings = StaticEmbeddings(directory)
        if args.megabytes is not None:
            print_speed(args.megabytes, embeddings)
            return
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        questions = (
            write_devices(corpus, 60, args.seed) if args.devices else write_corpus(corpus, args.towns, args.seed)
        )
        index_documents(corpus, Path(folder, "notes.db"), embeddings)
        index = DocumentIndex(Path(folder, "notes.db"))
        same_words = [each for each in questions if each.kind == "same words"]
        if not args.devices:
            print_recall(index, questions)
            print_follow_ups(index, same_words[:500])
        if args.model is not None:
            print_answers(args.model, index, same_words[: args.questions], args.max_tokens)


if __name__ == "__main__":
    main()
