"""Pairs: every layout gives the same, what is wrong is named, both answers follow the same ids; batches hold both."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import CHATML
from sentencepiece_models import EXACT, train

from elm_mlx.data import examples
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.data.batches import Batches, Joined, PairBatch, PairBatches
from elm_mlx.data.encoding import Encoder, Example
from elm_mlx.data.examples import BadRecords, Prepared, prepare
from elm_mlx.data.records import Conversation, Preference, PromptAnswer, Split, record_of
from elm_mlx.errors import InputError
from elm_mlx.text.chat_template import JinjaTemplate, OpenELMInstruct, Template
from elm_mlx.text.tokenizer import Tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("pairs") / "tokenizer.model"
    return Tokenizer.load(train(path, **EXACT, control_symbols="<|im_start|>,<|im_end|>"))


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> Template:
    return OpenELMInstruct(tokenizer)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TEXTS = {"prompt": "the fox", "chosen": "jumps", "rejected": "told"}
ULTRAFEEDBACK = {
    "prompt": "the fox", "prompt_id": "f0", "messages": [user("the fox"), assistant("jumps")], "score_chosen": 9.0,
    "chosen": [user("the fox"), assistant("jumps")], "rejected": [user("the fox"), assistant("told")],
}  # fmt: skip
LAYOUTS = [
    TEXTS,
    ULTRAFEEDBACK,
    {name: ULTRAFEEDBACK[name] for name in ("chosen", "rejected")},
    {"prompt": [user("the fox")], "chosen": [assistant("jumps")], "rejected": [assistant("told")]},
    {"prompt": [user("the fox")], "chosen": "jumps", "rejected": "told"},
    {"prompt": "the fox", "chosen": [assistant("jumps")], "rejected": [assistant("told")]},
]
LONG = [user("an old king"), assistant("told stories"), user("the fox")]


def preference(where: str, value: Any) -> Preference:
    record, _, _ = record_of(where, value, "pairs")
    assert isinstance(record, Preference)
    return record


def load(*arguments: Any, **options: Any) -> dict[str, Prepared]:
    return examples.load(*arguments, paired=True, **options)


def prepared(value: Any, tokenizer: Tokenizer, template: Template | None, length: int = 512, **more: Any) -> Prepared:
    return prepare(Split([preference("here", value)]), tokenizer, template, length, **more)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_are_the_same_pair(tokenizer: Tokenizer, template: Template, layout: dict[str, Any]) -> None:
    found = prepared(layout, tokenizer, template)
    encoder = Encoder(tokenizer, template)
    wanted = [encoder.encode(PromptAnswer("", "the fox", answer)) for answer in ("jumps", "told")]
    assert found.examples == wanted
    assert found.sources == ["here", "here"] and found.counts == {"pair": 1}
    assert found.lengths == [max(len(example.ids) for example in wanted)]


def test_a_system_prompt_stands_before_the_prompt(tokenizer: Tokenizer, template: Template) -> None:
    for layout in LAYOUTS:
        found = preference("here", layout | {"system": "an old king"})
        assert found.prompt == ({"role": "system", "content": "an old king"}, user("the fox"))
        assert preference("here", layout | {"system": "", "system_prompt": None}) == preference("here", layout)
    told = [{"role": "system", "content": "an old king"}, user("the fox")]
    assert preference("here", TEXTS | {"prompt": told, "system": "an old king"}).prompt == tuple(told)
    with pytest.raises(InputError, match="has a system prompt, and the model has no chat template"):
        prepared(TEXTS | {"system": "an old king"}, tokenizer, None)


def test_what_messages_carry_besides_makes_them_no_others() -> None:
    ids = {
        "chosen": [user("the fox") | {"id": 1}, assistant("jumps")],
        "rejected": [user("the fox"), assistant("told")],
    }
    assert preference("here", ids) == preference("here", ULTRAFEEDBACK)


def test_without_a_template_the_answer_goes_on(tokenizer: Tokenizer) -> None:
    found = prepared(TEXTS | {"chosen": " jumps"}, tokenizer, None)
    assert found.examples[0] == Encoder(tokenizer, None).encode(PromptAnswer("", "the fox", " jumps"))
    with pytest.raises(InputError, match=r"^here: is a conversation, and the model has no chat template"):
        prepared(ULTRAFEEDBACK, tokenizer, None)


@pytest.mark.parametrize("source", ["openelm", "chatml"])
def test_of_a_conversation_the_last_answer_alone_counts(tokenizer: Tokenizer, source: str, template: Template) -> None:
    used = template if source == "openelm" else JinjaTemplate(tokenizer, CHATML, source, NAMES)
    value = {"chosen": [*LONG, assistant("jumps over")], "rejected": [*LONG, assistant("to us")], "prompt": "the fox"}
    for example, answer in zip(prepared(value, tokenizer, used).examples, ("jumps over", "to us"), strict=True):
        whole = Encoder(tokenizer, used).encode(Conversation("", (*LONG, assistant(answer))))
        assert example.ids == whole.ids and sum(example.trained) < sum(whole.trained)
        asked = used.encode(LONG)
        assert list(example.ids[: len(asked)]) == asked
        assert example.trained == (False,) * len(asked) + (True,) * (len(whole.ids) - len(asked))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (7, "is a number, not an object"),
        ({"prompt": "a", "chosen": "b"}, "`rejected` is missing"),
        ({"chosen": "b", "rejected": "c"}, "`prompt` is missing"),
        (TEXTS | {"prompt": 3}, "`prompt` is neither a string nor a list of messages"),
        (TEXTS | {"prompt": " "}, "`prompt` is neither"),
        (TEXTS | {"chosen": None}, "`chosen` is neither a string nor a list of messages"),
        (TEXTS | {"rejected": "\n"}, "`rejected` is empty"),
        (TEXTS | {"rejected": "jumps"}, "`chosen` and `rejected` are the same"),
        (ULTRAFEEDBACK | {"prompt": "the dog"}, "`prompt` is not what `chosen` and `rejected` answer"),
        (ULTRAFEEDBACK | {"prompt": [user("the dog")]}, "`prompt` is not what"),
        (ULTRAFEEDBACK | {"rejected": [user("the dog"), assistant("told")]}, "differ in more than their last answer"),
        (ULTRAFEEDBACK | {"rejected": [user("the fox")]}, "`rejected` doesn't end with a message of the assistant's"),
        (ULTRAFEEDBACK | {"rejected": [user("the fox"), assistant(" ")]}, "`rejected` is empty"),
        (ULTRAFEEDBACK | {"chosen": [user("a"), assistant("b") | {"tool_calls": [{"name": "f"}]}]}, "ends with a call"),
        (TEXTS | {"prompt": [{"role": "robot", "content": "a"}]}, "`prompt`, message 1: role is 'robot'"),
        ({"prompt": "a", "completion": "b"}, "`rejected`; `elm-mlx lora` trains on such records"),
        (TEXTS | {"tools": [{}]}, "`tools`, function 1: an object with a `name` is needed"),
        (TEXTS | {"history": [["a", "b"]]}, "has `history`, earlier turns"),
        (TEXTS | {"weight": 0}, "has a `weight`, but"),
        (TEXTS | {"system": 0}, "`system` is a number, not a string"),
        (TEXTS | {"system": "A", "prompt": [{"role": "system", "content": "B"}, user("a")]}, "a system prompt"),
        (ULTRAFEEDBACK | {"chosen": [user("the fox"), assistant("a") | {"weight": 0}]}, "not to be trained on"),
        (ULTRAFEEDBACK | {"chosen": [user("the fox") | {"name": "Ann"}, assistant("a")]}, "message 1 has `name`"),
        (TEXTS | {"prompt": [{"from": "narrator", "value": "a"}]}, "`prompt`, message 1: role is 'narrator'"),
        (TEXTS | {"prompt": [assistant("a")]}, "`chosen`: message 1 is the assistant's"),
    ],
)  # fmt: skip
def test_what_is_no_pair_says_why(value: Any, reason: str) -> None:
    with pytest.raises(BadRecord) as error:
        preference("here", value)
    assert reason in str(error.value)


def test_bad_pairs_are_named_by_file_and_line(tokenizer: Tokenizer, template: Template, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([json.dumps(TEXTS), "{", json.dumps(TEXTS | {"rejected": "jumps"})]) + "\n")
    with pytest.raises(BadRecords) as error:
        load(path, tokenizer, template, 512)
    assert [reason.split(":")[0] for reason in error.value.reasons] == [f"{path}, line 2", f"{path}, line 3"]
    left = load(path, tokenizer, template, 512, skip_bad=True)["train"]
    assert len(left.examples) == 2 and len(left.bad) == 2
    path.write_text("{}\n")
    with pytest.raises(InputError, match="no example is left to train on"):
        load(path, tokenizer, template, 512, skip_bad=True)


def test_splits_and_parquet_as_everywhere(tokenizer: Tokenizer, template: Template, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([ULTRAFEEDBACK] * 3), tmp_path / "train-00000-of-00001.parquet")
    (tmp_path / "valid.json").write_text(json.dumps([TEXTS]))
    found = load(tmp_path, tokenizer, template, 512)
    assert list(found) == ["train", "valid"]
    assert found["train"].examples == found["valid"].examples * 3
    assert found["train"].sources[-1].endswith("row 3 (row group 0)")


def test_long_pairs_are_left_out_or_lose_their_ends(tokenizer: Tokenizer, template: Template) -> None:
    value = TEXTS | {"chosen": "the quick brown fox jumps over lazy dogs"}
    whole = prepared(value, tokenizer, template)
    size, short = (len(example.ids) for example in whole.examples)
    assert size > short
    kept = prepared(value, tokenizer, template, size)
    assert kept.examples == whole.examples and not kept.warnings()
    out = prepared(value, tokenizer, template, size - 1)
    assert not out.examples and out.left_out == 1 and "--truncate cuts them" in out.warnings()[0]
    cut = prepared(value, tokenizer, template, size - 1, truncate=True)
    assert cut.cut == 1 and [len(example.ids) for example in cut.examples] == [size - 1, short]
    assert cut.examples[0].ids == whole.examples[0].ids[:-1] and cut.examples[1] == whole.examples[1]
    prompt = size - sum(whole.examples[0].trained)
    assert prepared(value, tokenizer, template, prompt, truncate=True).left_out == 1


def test_what_is_left_of_a_cut_pair_differs(tokenizer: Tokenizer, template: Template) -> None:
    value = TEXTS | {"chosen": "the fox jumps", "rejected": "the fox told"}
    first, second = prepared(value, tokenizer, template).examples
    alike = next(i for i, pair in enumerate(zip(first.ids, second.ids, strict=False)) if pair[0] != pair[1])
    assert prepared(value, tokenizer, template, alike, truncate=True).left_out == 1
    assert prepared(value, tokenizer, template, alike + 1, truncate=True).cut == 1


def drawn(count: int, seed: int = 0) -> list[Example]:
    """Pairs of which every id tells the pair and the answer."""
    draw, made = np.random.default_rng(seed), []
    for number in range(2 * count):
        length = int(draw.integers(3, 20))
        ids = tuple(number * 100 + i + 1 for i in range(length))
        made.append(Example(ids, (False, *(i > length // 2 for i in range(1, length)))))
    return made


def answers(batch: PairBatch) -> dict[int, list[Example]]:
    """The pairs of a batch, read off its arrays."""
    found: dict[int, list[Example]] = {}
    assert batch.segments is not None
    for row in range(len(batch.inputs)):
        for place, number in enumerate(batch.pairs[row]):
            for half in (0, 1):
                at = np.flatnonzero(batch.segments[row] == 2 * place + half + 1)
                if number < 0:
                    assert not len(at)
                    continue
                assert at[-1] - at[0] + 1 == len(at)
                if half == 0:  # the last token predicts nothing
                    assert not batch.trained[row, at[-1]]
                    at = at[:-1]
                ids = (*batch.inputs[row, at].tolist(), int(batch.targets[row, at[-1]]))
                marks = (False, *batch.trained[row, at].tolist())
                found.setdefault(int(number), []).append(Example(ids, marks))
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_every_pair_is_in_an_epoch_once_with_both_answers(packed: bool, world: int) -> None:
    pairs = drawn(23)
    found: dict[int, list[Example]] = {}
    for rank in range(world):
        made = PairBatches(pairs, 4 // world, 64, packed=packed, rank=rank, world=world)
        made.reference = np.arange(46, dtype=np.float32).reshape(23, 2)
        for batch in islice(made, made.steps()):
            new = answers(batch)
            assert not new.keys() & found.keys()
            found |= new
            assert batch.pairs.shape[1] in (1, 2, 4, 8)
            for row, place in zip(*np.nonzero(batch.pairs >= 0), strict=True):
                number = batch.pairs[row, place]
                assert batch.reference[row, place].tolist() == [2 * number, 2 * number + 1]
            assert not batch.reference[batch.pairs < 0].any()
    assert {number: list(pairs[2 * number : 2 * number + 2]) for number in range(23)} == found


def test_batches_of_pairs_resume(tmp_path: Path) -> None:
    pairs = drawn(23)
    made = PairBatches(pairs, 2, 64, seed=3)
    for _ in range(made.steps() + 2):
        next(made)
    state = json.loads(json.dumps(made.state()))
    again = PairBatches(pairs, 2, 64, seed=3)
    again.resume(state)
    for _ in range(5):
        one, other = next(made), next(again)
        assert isinstance(one, PairBatch) and isinstance(other, PairBatch)
        assert np.array_equal(one.inputs, other.inputs) and np.array_equal(one.pairs, other.pairs)
    swapped = [pairs[1], pairs[0], *pairs[2:]]
    with pytest.raises(InputError, match="cannot resume: the data changed"):
        PairBatches(swapped, 2, 64, seed=3).resume(state)
    with pytest.raises(InputError, match="doesn't fit rows"):
        PairBatches(pairs, 2, 8)


def test_joined_pairs_are_a_sequence() -> None:
    pairs = drawn(3)
    joined = Joined(pairs)
    assert len(joined) == 3 and len(list(joined)) == 3 and list(joined)[:2] == [joined[0], joined[1]]
    assert joined[1].ids == pairs[2].ids + pairs[3].ids
    with pytest.raises(IndexError):
        joined[3]
    assert isinstance(PairBatches(pairs, 1, 64), Batches)


def test_a_record_says_what_it_is() -> None:
    assert preference("here", TEXTS) == Preference("here", "the fox", "jumps", "told")
    assert preference("here", ULTRAFEEDBACK) == Preference("here", (user("the fox"),), "jumps", "told")


def test_records_for_the_other_training_are_one_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError) as error:
        load(path, tokenizer, None, 512, skip_bad=True)
    assert str(error.value) == (
        f"{path}: holds no pairs of answers, `chosen` and `rejected`; `elm-mlx lora` trains on such records"
    )
