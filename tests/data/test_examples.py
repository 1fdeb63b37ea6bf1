"""Records as ids: what chat would ask with, what mlx-lm would train on, which tokens count; what is too long or bad."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, LLAMA_CHAT, PLAIN
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_models import EXACT, train

from elm_mlx.data.encoding import Encoder, Example
from elm_mlx.data.examples import BadRecords, Prepared, load, prepare
from elm_mlx.data.records import Conversation, Instruction, PlainText, PromptAnswer, Split
from elm_mlx.errors import InputError
from elm_mlx.text.chat_template import OPENELM_INSTRUCT_JINJA, JinjaTemplate, OpenELMInstruct, Template
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx_convert import tokenizers

LLAMA = Path(__file__).parents[2] / ".." / "shared" / "data" / "tokenizer" / "llama2.model"
TRL = Path(__file__).parents[1] / "fixtures" / "chat_templates.json"
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
SOURCES = {"openelm": OPENELM_INSTRUCT_JINJA, "chatml": CHATML, "llama": LLAMA_CHAT, "plain": PLAIN}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("examples") / "tokenizer.model"
    return Tokenizer.load(train(path, **EXACT, control_symbols="<|im_start|>,<|im_end|>"))


@pytest.fixture(scope="module")
def templates(tokenizer: Tokenizer) -> dict[str, Template]:
    found: dict[str, Template] = {"ours": OpenELMInstruct(tokenizer)}
    return found | {name: JinjaTemplate(tokenizer, source, name, NAMES) for name, source in SOURCES.items()}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversation(*messages: dict[str, str]) -> Conversation:
    return Conversation("here, line 1", messages)


def shown(tokenizer: Tokenizer, example: Example) -> str:
    """The example as text, runs of trained tokens in brackets, control tokens by name."""
    names = {token: name for name, token in tokenizer.control_ids.items()}
    text, inside = "", False
    decoder = tokenizer.detokenizer()
    for token, trained in zip(example.ids, example.trained, strict=True):
        text += ("[" if trained else "]") if trained != inside else ""
        inside = trained
        text += decoder.add(token) + names.get(token, "")
    return text + decoder.finish() + ("]" if inside else "")


class TestPlain:
    def test_a_text_stands_between_bos_and_eos(self, tokenizer: Tokenizer) -> None:
        example = Encoder(tokenizer, None).encode(PlainText("", "the fox"))
        assert example.ids == (1, *tokenizer.encode("the fox")[1:], 2)
        assert example.trained == (False, *[True] * (len(example.ids) - 1))
        assert shown(tokenizer, example) == "<s>[the fox</s>]"

    def test_a_text_is_no_conversation(self, tokenizer: Tokenizer, templates: dict[str, Template]) -> None:
        text = PlainText("", "the </s> fox")
        assert Encoder(tokenizer, templates["ours"]).encode(text) == Encoder(tokenizer, None).encode(text)
        assert Encoder(tokenizer, None).encode(text).ids.count(2) == 1

    @pytest.mark.parametrize(
        ("prompt", "completion"), [("Q: the", " fox"), ("Q: ", "the fox"), ("qu", "ick"), ("a\n", "b"), ("a", "\nb")]
    )
    def test_a_completion_goes_on_where_generate_would(
        self, tokenizer: Tokenizer, prompt: str, completion: str
    ) -> None:
        example = Encoder(tokenizer, None).encode(PromptAnswer("", prompt, completion))
        asked = tokenizer.encode(prompt)
        assert list(example.ids[: len(asked)]) == asked
        assert example.trained == (*[False] * len(asked), *[True] * (len(example.ids) - len(asked)))
        assert example.ids[-1] == 2 and tokenizer.decode(example.ids) == prompt + completion

    @given(prompt=st.text(min_size=1), completion=st.text(min_size=1))
    @settings(max_examples=150)
    def test_any_completion(self, tokenizer: Tokenizer, prompt: str, completion: str) -> None:
        example = Encoder(tokenizer, None).encode(PromptAnswer("", prompt, completion))
        asked = tokenizer.encode(prompt)
        assert list(example.ids[: len(asked)]) == asked
        assert tokenizer.decode(example.ids) == tokenizer.decode(tokenizer.encode(prompt + completion))
        assert example.trained.index(True) == len(asked)

    def test_alpacas_prompts(self, tokenizer: Tokenizer) -> None:
        encode = Encoder(tokenizer, None).encode
        assert shown(tokenizer, encode(Instruction("", "Do {it}.", "", "Done"))) == (
            "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nDo {it}.\n\n### Response:\n[Done</s>]"
        )
        assert shown(tokenizer, encode(Instruction("", "Do it.", "x", "Done"))) == (
            "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\nDo it.\n\n### Input:\nx"
            "\n\n### Response:\n[Done</s>]"
        )

    def test_all_of_it_if_wanted(self, tokenizer: Tokenizer) -> None:
        record = PromptAnswer("", "the quick", " fox")
        some, every = Encoder(tokenizer, None).encode(record), Encoder(tokenizer, None, True).encode(record)
        assert every.ids == some.ids and every.trained == (False, *[True] * (len(some.ids) - 1))

    def test_a_tokenizer_without_bos(self, tmp_path: Path) -> None:
        bare = Tokenizer.load(train(tmp_path / "t.model", **EXACT, bos_id=-1))
        example = Encoder(bare, None).encode(PlainText("", "the fox"))
        assert example.ids == (*bare.encode("the fox"), bare.eos_id)
        assert not example.trained[0] and all(example.trained[1:])

    def test_one_token_is_nothing_to_learn(self, tmp_path: Path) -> None:
        bare = Tokenizer.load(train(tmp_path / "t.model", **EXACT, bos_id=-1, eos_id=-1))
        with pytest.raises(InputError, match="one token, and a loss needs two"):
            Encoder(bare, None).encode(PlainText("", "the"))

    def test_half_a_surrogate_pair(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match="character 2 is U\\+D800"):
            Encoder(tokenizer, None).encode(PlainText("", "a\ud800"))


CALLS = """{{ '<s>' }}{% if tools %}<|im_start|>system
{{ tools[0].function.name }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}{{ c.function.arguments | tojson }}<|end|>\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


CALLING = {
    "role": "assistant", "content": "",
    "tool_calls": [{"type": "function", "function": {"name": name, "arguments": {"an": 1}}} for name in ("fox", "dog")],
}  # fmt: skip


class TestCalls:
    """Calls of functions, with control tokens of their own in them."""

    TOOLS = ({"type": "function", "function": {"name": "fox", "description": "", "parameters": {}}},)
    TALK = (user("quick?"), CALLING, {"role": "tool", "content": "lazy"}, assistant("old"), user("more"))

    @pytest.fixture
    def tokenizer(self, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
        path = tmp_path_factory.mktemp("calls") / "tokenizer.model"
        return Tokenizer.load(train(path, **EXACT, control_symbols="<|im_start|>,<|im_end|>,<|call|>,<|end|>"))

    def test_calls_and_answers_are_trained_and_results_are_read(self, tokenizer: Tokenizer) -> None:
        template = JinjaTemplate(tokenizer, CALLS, "calls", NAMES)
        example = Encoder(tokenizer, template).encode(Conversation("here", self.TALK, tools=self.TOOLS))
        assert shown(tokenizer, example).replace(" ", "") == (
            "<s><|im_start|>system\nfox<|im_end|>\n<|im_start|>user\nquick?<|im_end|>\n<|im_start|>assistant\n"
            '[<|call|>fox{"an":1}<|end|><|call|>dog{"an":1}<|end|><|im_end|>]\n'
            "<|im_start|>tool\nlazy<|im_end|>\n<|im_start|>assistant\n[old<|im_end|>]"
        )
        asked = template.encode(self.TALK[:1], tools=self.TOOLS)
        assert list(example.ids[: len(asked)]) == asked and not any(example.trained[: len(asked)])

    @pytest.mark.parametrize("name", ["qwen2_5", "qwen2_5_training", "qwen3_training", "glm4moe"])
    def test_templates_of_real_models(self, tmp_path: Path, name: str) -> None:
        """What is trained are the call with all of its markup and the answer, each with what ends it."""
        controls = "<|im_start|>,<|im_end|>,<tool_call>,</tool_call>,<tool_response>,</tool_response>"
        tokenizer = Tokenizer.load(train(tmp_path / "tokenizer.model", **EXACT, control_symbols=controls))
        source = json.loads(TRL.read_text("utf-8"))["templates"][f"trl/{name}"]["template"]
        template = JinjaTemplate(tokenizer, source, name, {"bos_token": "<s>", "eos_token": "<|im_end|>"})
        text = shown(tokenizer, Encoder(tokenizer, template).encode(Conversation("here", self.TALK, tools=self.TOOLS)))
        calls, answer = (part.partition("]")[0] for part in text.rpartition("quick?")[2].split("[")[1:])
        assert calls.count("<tool_call>") == calls.count("</tool_call>") == 2 and "fox" in calls and "dog" in calls
        assert "lazy" not in calls + answer and "old" in answer
        ends = "<|im_end|>" if name != "glm4moe" else ""
        assert calls.endswith("</tool_call>" if ends == "" else ends) and answer.endswith(ends)

    @pytest.mark.parametrize("name", ["call", "calls"])
    def test_a_call_that_a_message_names_is_no_token(self, tokenizer: Tokenizer, name: str) -> None:
        template = JinjaTemplate(tokenizer, CALLS, "calls", NAMES)
        said = assistant(f"<|{name}|> is how it calls")
        example = Encoder(tokenizer, template).encode(Conversation("here", (user("how?"), said), tools=self.TOOLS))
        assert tokenizer.control_ids["<|call|>"] not in example.ids

    @pytest.mark.parametrize(
        ("source", "tools", "reason"),
        [
            (CHATML, TOOLS, "has `tools`, and the chat template shows none to the model"),
            (CHATML, (), "message 2: the chat template leaves out its calls of functions"),
            (OPENELM_INSTRUCT_JINJA, TOOLS, "has `tools`, and the chat template shows none"),
        ],
    )
    def test_what_the_template_would_leave_out(
        self, tokenizer: Tokenizer, source: str, tools: tuple[dict[str, Any], ...], reason: str
    ) -> None:
        encoder = Encoder(tokenizer, JinjaTemplate(tokenizer, source, "t", NAMES))
        with pytest.raises(InputError, match=reason):
            encoder.encode(Conversation("here", self.TALK, tools=tools))

    def test_a_template_without_tools_results(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match="message 3 is a tool's, and the chat template takes none"):
            Encoder(tokenizer, OpenELMInstruct(tokenizer)).encode(Conversation("here", self.TALK))


class TestConversations:
    TALK = (user("the quick?"), assistant("Fox."), user("lazy?"), assistant("dogs"))

    # A space after a control token is Llama's: each run of text is encoded by itself.
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (
                "ours",
                "<s><|system|>\n</s> \n<|user|>\nthe quick?</s> \n<|assistant|>\n[Fox.</s>]"
                " \n<|user|>\nlazy?</s> \n<|assistant|>\n[dogs</s>]",
            ),
            (
                "chatml",
                "<s><|im_start|>user\nthe quick?<|im_end|> \n<|im_start|> assistant\n[Fox.<|im_end|>] \n"
                "<|im_start|> user\nlazy?<|im_end|> \n<|im_start|> assistant\n[dogs<|im_end|>]",
            ),
            ("llama", "<s>[INST] the quick? [/INST][ Fox. </s>]<s> [INST] lazy? [/INST][ dogs </s>]"),
            ("plain", "<s>user: the quick?\nassistant:[ Fox.\n]user: lazy?\nassistant:[ dogs\n</s>]"),
        ],
    )
    def test_answers_are_trained_with_what_ends_them(
        self, tokenizer: Tokenizer, templates: dict[str, Template], name: str, text: str
    ) -> None:
        assert shown(tokenizer, Encoder(tokenizer, templates[name]).encode(conversation(*self.TALK))) == text

    def test_what_is_said_after_the_last_answer_is_left_out(
        self, tokenizer: Tokenizer, templates: dict[str, Template]
    ) -> None:
        encode = Encoder(tokenizer, templates["ours"]).encode
        assert encode(conversation(*self.TALK, user("more"))) == encode(conversation(*self.TALK))
        every = Encoder(tokenizer, templates["ours"], True).encode(conversation(*self.TALK))
        assert list(every.ids) == templates["ours"].encode(self.TALK, False)
        assert every.trained == (False, *[True] * (len(every.ids) - 1))

    @pytest.mark.parametrize("name", ["ours", "openelm", "chatml", "llama"])
    @given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=5))
    @settings(max_examples=60)
    def test_ids_are_those_of_the_chat(
        self, tokenizer: Tokenizer, templates: dict[str, Template], name: str, texts: list[str]
    ) -> None:
        template = templates[name]
        messages = [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]
        example = Encoder(tokenizer, template).encode(conversation(*messages))
        ids = list(example.ids)
        asked = template.encode(messages[:1])
        assert ids[: len(asked)] == asked
        for turn in range(3, len(messages) + 1, 2):
            # What the model is taken to have said goes up to the end of the trained tokens.
            end = len(asked) + [*example.trained[len(asked) :], False].index(False)
            said = ids[:end]
            asked = template.extend(said, messages[:turn])
            if turn < len(messages):
                assert ids[: len(asked)] == asked and not any(example.trained[end : len(asked)])
                assert example.trained[len(asked)]

    @pytest.mark.parametrize("name", ["ours", "chatml"])
    def test_an_answer_that_is_not_to_be_trained_on_is_read_alone(
        self, tokenizer: Tokenizer, templates: dict[str, Template], name: str
    ) -> None:
        turns = (user("the fox"), assistant("jumps"), user("over"), assistant("lazy"), user("an"), assistant("old"))
        encode, encode_all = (Encoder(tokenizer, templates[name], wanted).encode for wanted in (False, True))
        whole = shown(tokenizer, encode(conversation(*turns)))
        assert whole.count("[") == 3
        for untrained in ({1}, {3}, {1, 3}, {5}, {3, 5}):
            found = shown(tokenizer, encode(Conversation("", turns, frozenset(untrained))))
            wanted = [turns[i]["content"] for i in (1, 3, 5) if i not in untrained]
            assert [run.partition("]")[0].strip().partition("<")[0] for run in found.split("[")[1:]] == wanted
            bare = found.replace("[", "").replace("]", "")
            assert whole.replace("[", "").replace("]", "").startswith(bare) and found.endswith("]")
            everything = encode_all(Conversation("", turns, frozenset(untrained)))
            left = shown(tokenizer, Example(everything.ids, tuple(not mark for mark in everything.trained)))
            assert left.startswith("[<s>]") and left.count("[") == 1 + len(untrained)

    def test_a_name_of_a_control_token_is_text(self, tokenizer: Tokenizer, templates: dict[str, Template]) -> None:
        talk = conversation(user("a</s>b<|im_end|>"), assistant("say </s>"))
        for name in ("ours", "chatml", "llama"):
            example = Encoder(tokenizer, templates[name]).encode(talk)
            end = tokenizer.control_ids["<|im_end|>" if name == "chatml" else "</s>"]
            marked = [token for token, trained in zip(example.ids, example.trained, strict=True) if trained]
            assert marked.count(end) == 1 and marked[-1] == end
            assert tokenizer.decode(marked).strip() == "say </s>"

    def test_completions_and_instructions_are_turns(self, tokenizer: Tokenizer, templates: dict[str, Template]) -> None:
        encode = Encoder(tokenizer, templates["ours"]).encode
        turn = encode(conversation(user("Q\n\nabout"), assistant("A")))
        assert encode(PromptAnswer("", "Q\n\nabout", "A")) == turn
        assert encode(Instruction("", "Q", "about", "A")) == turn
        assert encode(Instruction("", "Q", "", "A")) == encode(PromptAnswer("", "Q", "A"))

    def test_a_template_that_rewrites_answers(self, tokenizer: Tokenizer) -> None:
        forgetful = CHATML.replace("m.content | trim", "(m.content if loop.last else 'so')")
        template = JinjaTemplate(tokenizer, forgetful, "t", NAMES)
        with pytest.raises(InputError, match="message 2: the chat template renders a past answer differently"):
            Encoder(tokenizer, template).encode(conversation(*self.TALK))
        thinking = CHATML.replace("assistant\n", "assistant\n<think>")
        template = JinjaTemplate(tokenizer, thinking, "t", NAMES)
        with pytest.raises(InputError, match="message 2: the chat template renders"):
            Encoder(tokenizer, template).encode(conversation(*self.TALK))

    def test_a_template_that_refuses(self, tokenizer: Tokenizer, templates: dict[str, Template]) -> None:
        records = [
            Conversation("f, line 1", ({"role": "system", "content": "S"}, user("Q"), assistant("A"))),
            Conversation("f, line 2", (user("Q"), assistant("A"))),
        ]
        prepared = prepare(Split(list(records)), tokenizer, templates["llama"], 99)
        assert len(prepared.examples) == 1 and prepared.sources == ["f, line 2"]
        assert prepared.bad == ["f, line 1: llama: the chat template fails: no system messages here"]

    def test_a_conversation_without_a_template(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match="here, line 1: is a conversation, and the model has no chat template"):
            prepare(Split([conversation(*self.TALK)]), tokenizer, None, 99)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Any:
    from mlx_lm.tokenizer_utils import load

    path = tmp_path_factory.mktemp("theirs")
    shutil.copy(tiny_tokenizer_file, path / "tokenizer.model")
    tokenizers.write(tiny_tokenizer_file, path, max_length=512, chat_template=OPENELM_INSTRUCT_JINJA)
    (path / "config.json").write_text(json.dumps({"model_type": "openelm"}))
    return load(path)


class TestAgainstMlxLm:
    """The ids that mlx-lm's data sets make, by Hugging Face's tokenizer, and where their loss begins."""

    def test_texts(self, theirs: Any, tiny_tokenizer: Tokenizer) -> None:
        from mlx_lm.tuner.datasets import TextDataset

        data = [{"text": text} for text in ("the quick brown fox", "  naïve\n漢字 ", "x")]
        for row in data:
            ids, offset = TextDataset(data, theirs).process(row)
            example = Encoder(tiny_tokenizer, None).encode(PlainText("", row["text"]))
            assert list(example.ids) == ids and offset == 0

    @pytest.mark.parametrize("question", ["the quick brown", "", "a\nb "])
    def test_completions(self, theirs: Any, tiny_tokenizer: Tokenizer, question: str) -> None:
        from mlx_lm.tuner.datasets import CompletionsDataset

        row = {"prompt": question, "completion": "old king, naïve"}
        ids, offset = CompletionsDataset([row], theirs, "prompt", "completion", True).process(row)
        example = Encoder(tiny_tokenizer, OpenELMInstruct(tiny_tokenizer)).encode(PromptAnswer("", *row.values()))
        assert example.trained.index(True) == offset
        assert list(example.ids) == ids[: len(example.ids)]
        assert tiny_tokenizer.decode(ids[len(example.ids) :]).strip() == ""  # the line's end after the end mark

    def test_conversations(self, theirs: Any, tiny_tokenizer: Tokenizer) -> None:
        from mlx_lm.tuner.datasets import ChatDataset

        row = {"messages": list(TestConversations.TALK)}
        ids, offset = ChatDataset([row], theirs, mask_prompt=True).process(row)
        example = Encoder(tiny_tokenizer, OpenELMInstruct(tiny_tokenizer)).encode(conversation(*row["messages"]))
        assert list(example.ids) == ids[: len(example.ids)]
        assert len(example.trained) - example.trained[::-1].index(False) == offset  # theirs trains the last answer

    def test_ids_with_llamas_tokenizer(self) -> None:
        if not LLAMA.exists():
            pytest.skip(f"{LLAMA} is not here")
        llama = Tokenizer.load(LLAMA)
        example = Encoder(llama, OpenELMInstruct(llama)).encode(PromptAnswer("", "What?", "Paris."))
        assert example.ids[-5:] == (13, 2177, 275, 29889, 2)  # as Hugging Face's: \n, Par, is, ., </s>
        assert example.trained == (*[False] * (len(example.ids) - 4), *[True] * 4)


class TestLength:
    def test_a_long_text_is_split_and_each_token_learnt_once(self, tokenizer: Tokenizer) -> None:
        text = "the quick brown fox jumps over lazy dogs " * 20
        whole = Encoder(tokenizer, None).encode(PlainText("", text))
        for size in (2, 3, 16, len(whole.ids) - 1):
            prepared = prepare(Split([PlainText("f", text)]), tokenizer, None, size)
            assert all(2 <= len(example.ids) <= size for example in prepared.examples)
            learnt = [token for example in prepared.examples for token in example.ids[1:]]
            assert learnt == list(whole.ids[1:])
            assert all(example.trained == (False, *[True] * (len(example.ids) - 1)) for example in prepared.examples)
            assert (prepared.split, prepared.windows, prepared.left_out) == (1, len(prepared.examples), 0)
            assert prepared.lengths == [len(whole.ids)] and prepared.longest == (len(whole.ids), "f")

    def test_what_just_fits_is_whole(self, tokenizer: Tokenizer) -> None:
        whole = Encoder(tokenizer, None).encode(PlainText("", "the quick brown fox"))
        prepared = prepare(Split([PlainText("f", "the quick brown fox")]), tokenizer, None, len(whole.ids))
        assert prepared.examples == [whole] and prepared.warnings() == []

    def lengthy(self, tokenizer: Tokenizer, truncate: bool) -> Prepared:
        records = [
            PromptAnswer("f, line 1", "the", " fox"),
            PromptAnswer("f, line 2", "the", " quick brown" * 30),
            PromptAnswer("f, line 3", "the quick brown" * 30, " fox"),
        ]
        return prepare(Split(list(records)), tokenizer, None, 32, truncate=truncate)

    def test_long_answers_are_left_out_counted_and_the_longest_named(self, tokenizer: Tokenizer) -> None:
        prepared = self.lengthy(tokenizer, False)
        assert prepared.sources == ["f, line 1"] and prepared.left_out == 2
        assert prepared.warnings() == [
            f"2 of 3 records longer than 32 tokens: left out; the longest, f, line 3, has {prepared.longest[0]}; "
            "--truncate cuts them, a larger --max-seq-length keeps them"
        ]

    def test_truncate_keeps_what_there_is_of_an_answer(self, tokenizer: Tokenizer) -> None:
        prepared = self.lengthy(tokenizer, True)
        assert prepared.sources == ["f, line 1", "f, line 2"]
        assert (prepared.cut, prepared.left_out) == (1, 1)
        whole = Encoder(tokenizer, None).encode(PromptAnswer("", "the", " quick brown" * 30))
        assert prepared.examples[1] == Example(whole.ids[:32], whole.trained[:32])
        assert [line.partition(";")[0] for line in prepared.warnings()] == [
            "1 of 3 records longer than 32 tokens: their end is cut off",
            "1 of 3 records longer than 32 tokens: left out, as cut they would teach nothing",
        ]

    @pytest.mark.parametrize(
        ("truncate", "context", "remedy"),
        [
            (False, None, "; --truncate cuts them, a larger --max-seq-length keeps them"),
            (False, 512, "; --truncate cuts them, a larger --max-seq-length keeps them"),
            (False, 64, "; --truncate cuts them, a larger --max-seq-length keeps more"),
            (False, 32, "; --truncate cuts them"),
            (True, 512, "; a larger --max-seq-length keeps them"),
            (True, 32, ""),
        ],
    )
    def test_what_is_advised_would_help(
        self, tokenizer: Tokenizer, truncate: bool, context: int | None, remedy: str
    ) -> None:
        record = PromptAnswer("f, line 1", "the quick brown" * 30, " fox")
        (line,) = prepare(Split([record]), tokenizer, None, 32, truncate=truncate, context=context).warnings()
        assert (
            line.partition(f"the longest, f, line 1, has {len(Encoder(tokenizer, None).encode(record).ids)}")[2]
            == remedy
        )

    def test_no_example_is_longer_than_what_the_model_reads(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "the fox"}\n')
        assert load(path, tokenizer, None, 64, context=64)["train"].context == 64
        with pytest.raises(InputError, match="--max-seq-length 65: the model reads 64 tokens at most"):
            load(path, tokenizer, None, 65, context=64)

    def test_truncate_cuts_texts_too(self, tokenizer: Tokenizer) -> None:
        prepared = prepare(Split([PlainText("f", "the fox " * 40)]), tokenizer, None, 16, truncate=True)
        assert [len(example.ids) for example in prepared.examples] == [16] and prepared.split == 0

    def test_sums(self, tokenizer: Tokenizer) -> None:
        prepared = self.lengthy(tokenizer, True)
        assert prepared.tokens == sum(len(example.ids) for example in prepared.examples)
        assert prepared.trained_tokens == sum(map(sum, (example.trained for example in prepared.examples)))
        assert prepared.counts == {"completion": 3}


class TestLoad:
    def write(self, path: Path, *values: Any) -> Path:
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return path

    def test_splits(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        self.write(tmp_path / "train.jsonl", {"text": "the fox"}, {"text": "a dog"})
        self.write(tmp_path / "valid.jsonl", {"text": "the king"})
        splits = load(tmp_path, tokenizer, None, 99)
        assert {name: len(split.examples) for name, split in splits.items()} == {"train": 2, "valid": 1}

    def test_bad_records_stop_it_or_are_left_out(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.jsonl", {"text": ""}, {"text": "the fox"}, {"text": "\ud800"})
        with pytest.raises(BadRecords) as caught:
            load(path, tokenizer, None, 99)
        assert [reason.partition(": ")[0] for reason in caught.value.reasons] == [f"{path}, line 1", f"{path}, line 3"]
        assert str(caught.value) == (
            f"{path}, line 1: `text` is empty (1 more is bad; `elm-mlx data` names them all); "
            "mend the data, or --skip-bad leaves such records out"
        )
        split = load(path, tokenizer, None, 99, skip_bad=True)["train"]
        assert len(split.examples) == 1 and split.bad == list(caught.value.reasons)

    def test_nothing_left(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        bad = self.write(tmp_path / "bad.jsonl", {"text": ""})
        with pytest.raises(InputError, match=r"no example is left to train on: .*line 1: `text` is empty"):
            load(bad, tokenizer, None, 99, skip_bad=True)
        long = self.write(tmp_path / "long.jsonl", {"prompt": "the fox" * 9, "completion": "x"})
        with pytest.raises(InputError, match=r"no example is left to train on: 1 of 1 record longer than 9 tokens"):
            load(long, tokenizer, None, 9)
        with pytest.raises(InputError, match="--max-seq-length 1: must be 2 or more"):
            load(bad, tokenizer, None, 1)
