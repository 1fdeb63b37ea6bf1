"""Conversations as ids: the instruct template by hand, Jinja against it, hostile messages and hostile templates."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chat_templates import CHATML, LLAMA_CHAT, PLAIN
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_models import EXACT, SHARED, train

from elm_mlx.errors import ElmError, InputError
from elm_mlx.text import chat_template
from elm_mlx.text import jinja as jinja_engine
from elm_mlx.text.chat_template import OPENELM_INSTRUCT_JINJA, JinjaTemplate, OpenELMInstruct, choose
from elm_mlx.text.jinja import TemplateInput
from elm_mlx.text.tokenizer import Tokenizer, has_chat_template

LLAMA = SHARED / "tokenizer" / "llama2.model"
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("template") / "tokenizer.model"
    return Tokenizer.load(train(path, **EXACT, control_symbols="<|im_start|>,<|im_end|>"))


@pytest.fixture(scope="module")
def instruct(tokenizer: Tokenizer) -> OpenELMInstruct:
    return OpenELMInstruct(tokenizer)


def jinja(tokenizer: Tokenizer, source: str) -> JinjaTemplate:
    return JinjaTemplate(tokenizer, source, "there.jinja", NAMES)


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.pieces[token] for token in ids if token in tokenizer.control_ids.values()]


class TestOpenELMInstruct:
    def test_ids_with_llamas_tokenizer(self):
        if not LLAMA.exists():
            pytest.skip(f"{LLAMA} is not here")
        tokenizer = Tokenizer.load(LLAMA)
        ids = OpenELMInstruct(tokenizer).encode([user("What is the capital of France?")])
        # The ids that Hugging Face's tokenizer gives other models with this template and this tokenizer.
        header = [529, 29989, 5205, 29989, 29958, 13, 2, 29871, 13]
        question = [29966, 29989, 1792, 29989, 29958, 13, 5618, 338, 278, 7483, 310, 3444, 29973, 2, 29871, 13]
        assert ids == [1, *header, *question, 29966, 29989, 465, 22137, 29989, 29958, 13]

    def test_conversation_reads_as_the_template_says(self, instruct, tokenizer):
        ids = instruct.encode([system("S"), user("Q"), assistant("A"), user("R")])
        (parts,) = instruct.parts_of([TemplateInput([system("S"), user("Q"), assistant("A"), user("R")], True)])
        text = "".join(tokenizer.pieces[part] if isinstance(part, int) else part for part in parts)
        assert text == ("<s><|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n<|user|>\nR</s>\n<|assistant|>\n")
        assert controls(tokenizer, ids) == ["<s>", *["</s>"] * 4]

    def test_missing_system_message_is_an_empty_one(self, instruct):
        assert instruct.encode([user("Q")]) == instruct.encode([system(""), user("Q")])

    def test_without_generation_prompt_it_is_a_prefix(self, instruct, tokenizer):
        messages = [user("Q"), assistant("A")]
        ids = instruct.encode(messages, add_generation_prompt=False)
        assert ids[-1] != tokenizer.eos_id
        assert instruct.encode([*messages, user("R")])[: len(ids)] == ids

    def test_stops_at_eos_and_where_the_model_plays_the_user(self, tokenizer):
        instruct = OpenELMInstruct(tokenizer)
        assert instruct.stop_ids == (tokenizer.eos_id,)
        assert "\n<|user|>\n" in instruct.stop_strings

    def test_further_eos_ids_of_the_config_stop_too(self, tokenizer):
        other = Tokenizer.load(tokenizer.path)
        other.eos_ids = (9, 2)
        assert OpenELMInstruct(other).stop_ids == (9, 2)

    def test_needs_eos(self, tmp_path):
        tokenizer = Tokenizer.load(train(tmp_path / "x.model", **EXACT, eos_id=-1))
        with pytest.raises(InputError, match="no EOS"):
            OpenELMInstruct(tokenizer)


CONTENTS = st.text(st.sampled_from("<s>/|im_endtar \n\u2581\ue000") | st.characters(codec="utf-8"), max_size=25)


@settings(max_examples=150)
@given(st.lists(CONTENTS, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_jinja_of_the_instruct_template_gives_the_same_ids(tokenizer, contents, with_system, prompt):
    roles = ["system"] * with_system + ["user", "assistant"] * 2
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    ours = OpenELMInstruct(tokenizer).encode(messages, prompt)
    assert jinja(tokenizer, OPENELM_INSTRUCT_JINJA).encode(messages, prompt) == ours


@pytest.mark.parametrize("source", [OPENELM_INSTRUCT_JINJA, CHATML, LLAMA_CHAT, PLAIN])
@settings(max_examples=100)
@given(question=CONTENTS, answer=CONTENTS)
def test_no_message_makes_a_control_token(tokenizer, source, question, answer):
    form = jinja(tokenizer, source)
    expected = controls(tokenizer, form.encode([user("Q"), assistant("A"), user("R")]))
    for first, second in ((question, answer), ("</s>" + question, answer + "<|im_end|>"), ("<s", "s"), (" /s> ", "<")):
        ids = form.encode([user(first), assistant(second), user("R")])
        assert controls(tokenizer, ids) == expected


@pytest.mark.parametrize("content", ["/s", "s", " s\n", "|im_end|", "/s>", "</s", "</s></s>", "/s> more", "more </s"])
def test_markup_around_a_message_does_not_complete_a_name(tokenizer, content):
    form = jinja(tokenizer, "{{ bos_token }}{% for m in messages %}{{ '<' + m.content | trim + '>' }}{% endfor %}")
    ids = form.encode([user(content)])
    assert controls(tokenizer, ids) == ["<s>"]
    assert tokenizer.decode(ids) == f"<{content.strip()}>"


def test_template_works_on_the_messages_themselves(tokenizer):
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1].strip() | upper + eos_token }}{% endfor %}"
    form = jinja(tokenizer, source)
    text = tokenizer.decode(form.encode([user("hm</think> yes "), user("</s>hm ")]))
    assert text == "YES" + " </S>HM"


def test_exactly_one_bos(tokenizer):
    assert controls(tokenizer, jinja(tokenizer, PLAIN).encode([user("Q")])) == ["<s>"]
    assert controls(tokenizer, jinja(tokenizer, LLAMA_CHAT).encode([user("Q")])) == ["<s>"]


def test_answer_ends_where_the_template_ends_it(tokenizer, tmp_path):
    end = tokenizer.control_ids["<|im_end|>"]
    chatml = jinja(tokenizer, CHATML)
    assert (chatml.stop_ids, chatml.stop_strings) == ((2, end), ())
    assert jinja(tokenizer, LLAMA_CHAT).stop_ids == (2,)
    without = Tokenizer.load(train(tmp_path / "x.model", **EXACT))  # to which ChatML's marks are text
    assert jinja(without, CHATML).stop_strings == ("<|im_end|>",)
    assert jinja(without, PLAIN).stop_strings == ("\nuser:",)
    assert jinja(without, "{{ raise_exception('never') }}").stop_strings == ()


class TestExtend:
    HISTORY = (user("Q"), assistant("the fox"))

    @pytest.fixture(params=["built in", "CHATML", "LLAMA_CHAT"])
    def form(self, request, tokenizer):
        return OpenELMInstruct(tokenizer) if request.param == "built in" else jinja(tokenizer, globals()[request.param])

    def test_keeps_the_ids_that_the_model_chose(self, form, tokenizer):
        chosen = [tokenizer.pieces.index(piece) for piece in "the fox".replace(" ", "\u2581")]
        assert chosen != tokenizer.encode("the fox", add_bos=False)
        said = form.encode([user("Q")]) + chosen
        ids = form.extend(said, [*self.HISTORY, user("R")])
        assert ids[: len(said)] == said
        usual = form.encode([*self.HISTORY, user("R")])
        new = ids[len(said) :]
        assert usual[-len(new) :] == new
        assert new[0] == form.stop_ids[-1]

    def test_does_not_repeat_the_end_mark(self, form):
        said = [*form.encode([user("Q")]), 300, 301]
        messages = [*self.HISTORY, user("R")]
        for end in form.stop_ids:
            assert form.extend([*said, end], messages) == form.extend(said, messages)

    def test_first_message_is_simply_encoded(self, form):
        assert form.extend([], [user("Q")]) == form.encode([user("Q")])

    def test_is_encode_where_the_ids_are_the_texts(self, form):
        first = form.encode([user("Q")])
        for answer in ("the fox", ""):
            messages = [user("Q"), assistant(answer), user("R")]
            closed = form.encode(messages[:2], add_generation_prompt=False)
            if closed[: len(first)] != first:  # a space between prompt and answer became one token with the answer
                continue
            end = max(i for i, token in enumerate(closed) if token in form.stop_ids)
            assert form.extend(closed[:end], messages) == form.encode(messages)

    def test_rewritten_history_is_encoded_anew(self, tokenizer):
        forgetful = jinja(tokenizer, "{% for m in messages[-2:] %}{{ m.content + eos_token }}{% endfor %}")
        messages = [*self.HISTORY, user("R")]
        assert forgetful.extend([1, 300, 301, 2], messages) == forgetful.encode(messages)

    def test_template_without_end_mark_encodes_anew(self, tokenizer):
        plain = jinja(tokenizer, PLAIN)
        messages = [*self.HISTORY, user("R")]
        assert plain.extend([1, 300, 301], messages) == plain.encode(messages)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "needs a message"),
        ([{"role": "robot", "content": "x"}], "role is 'robot'"),
        ([user("x"), {"role": "user"}], "message 2: content is not a string"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content is not a string"),
    ],
)
def test_malformed_messages_are_refused(instruct, messages, reason):
    with pytest.raises(InputError, match=reason):
        instruct.encode(messages)


class TestHostileTemplates:
    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
            ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
            ("{{ messages.append(1) }}", "unsafe"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
            ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
            ("{{ nothing.at.all }}", "undefined"),
            ("{{ 1 / 0 }}", "division by zero"),
            ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
            ("{% include 'other' %}", "no loader"),
        ],
    )
    def test_fails_with_its_file_named(self, tokenizer, source, reason):
        with pytest.raises(InputError, match=rf"^there\.jinja: .*{reason}"):
            jinja(tokenizer, source).encode([user("Q")])

    def test_no_jinja_is_refused_with_its_line(self, tokenizer):
        with pytest.raises(InputError, match=r"there\.jinja: the chat template fails, line 2"):
            jinja(tokenizer, "\n{% for %}")


def test_what_templates_in_the_wild_use(tokenizer):
    source = """\
    {% for m in messages %}
        {% if loop.index > 1 %}{% break %}{% endif %}
        {% generation %}{{ m | tojson }}{% endgeneration %}
    {% endfor %}
{{ strftime_now('%Y') | length }} {{ tools is none }}"""
    text = tokenizer.decode(jinja(tokenizer, source).encode([user("é"), user("no")]))
    assert text == '{"role": "user", "content": "é"}4 True'


def named(name: str, source: str) -> dict[str, str]:
    return {"name": name, "template": source}


def write_templates(directory: Path, files: dict[str, object]) -> None:
    """Files of a model directory by what they hold of templates: Jinja, or the `chat_template` of a JSON object."""
    for name, value in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(value) if path.suffix == ".jinja" else json.dumps({"chat_template": value}))


class TestChoose:
    def test_base_model_has_none(self, tmp_path, tokenizer):
        assert choose(tmp_path, tokenizer) is None
        (tmp_path / "tokenizer_config.json").write_text("{}")
        assert choose(tmp_path, tokenizer) is None

    def test_what_the_converter_writes_is_the_built_in_one(self, tmp_path, tokenizer):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": OPENELM_INSTRUCT_JINJA}))
        assert isinstance(choose(tmp_path, tokenizer), OpenELMInstruct)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("chat_template.jinja", CHATML),
            ("chat_template.json", json.dumps({"chat_template": CHATML})),
            ("tokenizer_config.json", json.dumps({"chat_template": CHATML})),
            ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": CHATML}]})),
        ],
    )
    def test_directorys_own(self, tmp_path, tokenizer, name, content):
        (tmp_path / name).write_text(content)
        chosen = choose(tmp_path, tokenizer)
        assert chosen is not None
        assert chosen.encode([user("Q")]) == jinja(tokenizer, CHATML).encode([user("Q")])

    def test_own_file_goes_before_the_config(self, tmp_path, tokenizer):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": OPENELM_INSTRUCT_JINJA}))
        (tmp_path / "chat_template.jinja").write_text(PLAIN)
        assert isinstance(choose(tmp_path, tokenizer), JinjaTemplate)

    @pytest.mark.parametrize(
        ("files", "found"),
        [
            ({"chat_template.jinja": "J", "tokenizer_config.json": "C"}, "J"),
            ({"tokenizer_config.json": "C", "chat_template.json": "P"}, "C"),
            ({"tokenizer_config.json": None, "chat_template.json": "P"}, "P"),
            ({"tokenizer_config.json": {"rag": "R", "default": "D"}}, "D"),
            ({"tokenizer_config.json": [named("tool_use", "T"), named("default", "D")]}, "D"),
            ({"additional_chat_templates/tool_use.jinja": "T", "chat_template.jinja": "J"}, "J"),
            ({"additional_chat_templates/default.jinja": "D", "chat_template.jinja": "J"}, "D"),
        ],
    )
    def test_it_is_looked_for_as_transformers_does(self, tmp_path, files, found):
        """What transformers 5.24's `get_chat_template` answers; chat_template.json is read by its processors alone."""
        write_templates(tmp_path, files)
        source, where = chat_template.own_source(tmp_path)
        assert source == found
        assert found in Path(where).read_text()

    @pytest.mark.parametrize(
        ("files", "reason"),
        [
            ({"tokenizer_config.json": 7}, "tokenizer_config.json: chat_template is neither a"),
            ({"tokenizer_config.json": {}}, "tokenizer_config.json: chat_template is neither a"),
            ({"tokenizer_config.json": []}, "tokenizer_config.json: chat_template is neither a"),
            ({"tokenizer_config.json": False}, "tokenizer_config.json: chat_template is neither a"),
            ({"tokenizer_config.json": [{"template": "T"}]}, "tokenizer_config.json: chat_template is neither a"),
            ({"tokenizer_config.json": [{"name": []}]}, "tokenizer_config.json: chat_template is neither a"),
            ({"tokenizer_config.json": ["T"]}, "tokenizer_config.json: chat_template is neither a"),
            ({"tokenizer_config.json": [{"name": "default"}]}, "tokenizer_config.json: chat_template is neither a"),
            ({"tokenizer_config.json": {"default": 7}}, "tokenizer_config.json: chat_template is neither a"),
            ({"tokenizer_config.json": [named("rag", "R"), named("a", "A")]}, "holds a, rag, and no default"),
            ({"chat_template.json": 7}, "chat_template.json: chat_template is neither a"),
            ({"chat_template.json": None}, "chat_template.json: chat_template is neither a"),
            ({"additional_chat_templates/rag.jinja": "R", "tokenizer_config.json": "C"}, "holds rag, and no default"),
            ({"tokenizer_config.json": "{% if"}, "tokenizer_config.json: the chat template fails, line 1: "),
            ({"chat_template.jinja": "\n{% for %}", "tokenizer_config.json": "C"}, "the chat template fails, line 2: "),
            ({"chat_template.jinja": " \n", "tokenizer_config.json": "C"}, "jinja: the chat template is blank"),
            ({"tokenizer_config.json": ""}, "tokenizer_config.json: the chat template is blank"),
            ({"tokenizer_config.json": "x" * 2_000_000}, "chat_template has more than 1 MB"),
            ({"tokenizer_config.json": "{{ 'x' * 10 ** 9 }}"}, "the chat template needs more than 200 MB"),
        ],
    )  # fmt: skip
    def test_one_that_cannot_be_used_is_an_error_and_no_base_model(self, tmp_path, tokenizer, files, reason):
        write_templates(tmp_path, files)
        with pytest.raises(ElmError, match=re.escape(reason)) as error:
            choose(tmp_path, tokenizer)
        assert str(error.value).endswith("(--template FILE takes another, --template none goes without one)")
        assert choose(tmp_path, tokenizer, "none") is None
        (tmp_path / "mine.jinja").write_text(CHATML)
        assert isinstance(choose(tmp_path, tokenizer, str(tmp_path / "mine.jinja")), JinjaTemplate)

    @pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
    def test_file_that_cannot_be_read_is_an_error(self, tmp_path, tokenizer, name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to("nowhere")
        with pytest.raises(InputError, match=re.escape(f"{name}: cannot be read")):
            choose(tmp_path, tokenizer)
        path.unlink()
        path.write_bytes(b"x" * (1 << 20) + b"y")
        with pytest.raises(InputError, match="larger than 1 MB"):
            choose(tmp_path, tokenizer)

    @pytest.mark.parametrize("trained_by", ["A", ""])
    def test_an_adapters_own_takes_the_place_of_whatever_the_model_had(self, tmp_path, tokenizer, trained_by):
        files = {f"additional_chat_templates/{name}.jinja": "X" for name in ("default", "rag")}
        model, adapter = tmp_path / "model", tmp_path / "adapter"
        for directory in (model, adapter):
            directory.mkdir()
        write_templates(
            model, files | {"tokenizer_config.json": "C", "chat_template.json": "P", "chat_template.jinja": "J"}
        )
        chat_template.record(adapter, trained_by)
        assert chat_template.adopt(model, adapter) == str(adapter / "chat_template.jinja")
        assert chat_template.source_of(model)[0] == (trained_by or None)

    def test_converter_names_its_own_option(self, tmp_path):
        write_templates(tmp_path, {"tokenizer_config.json": 7})
        with pytest.raises(
            InputError, match=r"\(--chat-template FILE takes another, --chat-template none goes without"
        ):
            chat_template.own_source(tmp_path, "--chat-template")

    def test_prepared_one_starts_the_process_only_for_jinja(self, tmp_path):
        jinja_engine.stop()
        before = jinja_engine._process
        assert chat_template.prepare(tmp_path) is False
        write_templates(tmp_path, {"tokenizer_config.json": OPENELM_INSTRUCT_JINJA})
        assert chat_template.prepare(tmp_path) is True
        assert jinja_engine._process is before
        write_templates(tmp_path, {"tokenizer_config.json": CHATML})
        assert chat_template.prepare(tmp_path) is True
        assert jinja_engine._process is not before

    def test_names_of_special_tokens_come_from_the_config(self, tmp_path, tokenizer):
        config = {
            "chat_template": "{{ eos_token + pad_token }}",
            "eos_token": {"content": "<|im_end|>"},
            "pad_token": "x",
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        chosen = choose(tmp_path, tokenizer)
        assert chosen is not None
        assert chosen.encode([user("Q")]) == [1, tokenizer.control_ids["<|im_end|>"], *tokenizer.encode("x", False)]

    def test_override(self, tmp_path, tokenizer):
        (tmp_path / "chat_template.jinja").write_text(PLAIN)
        assert choose(tmp_path, tokenizer, "none") is None
        assert isinstance(choose(tmp_path, tokenizer, "openelm-instruct"), OpenELMInstruct)
        assert isinstance(choose(tmp_path, tokenizer, str(tmp_path / "chat_template.jinja")), JinjaTemplate)
        with pytest.raises(InputError, match="zephyr: not a chat template: give openelm-instruct, none, or a file"):
            choose(tmp_path, tokenizer, "zephyr")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [(b"{", "not JSON"), (b"[]", "holds no JSON object"), (b"\xff", "not UTF-8"), (b"[" * 100_000, "not JSON")],
    )
    def test_broken_config_is_named(self, tmp_path, tokenizer, content, reason):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(InputError, match=rf"tokenizer_config\.json.*: {reason}"):
            choose(tmp_path, tokenizer)


def test_source_for_a_checkpoints_name():
    assert chat_template.source_for("apple/OpenELM-1_1B-Instruct") == OPENELM_INSTRUCT_JINJA
    assert chat_template.source_for("apple/OpenELM-1_1B") is None
    assert chat_template.read_source("openelm-instruct") == OPENELM_INSTRUCT_JINJA
    assert chat_template.read_source("none") is None


@pytest.mark.parametrize(
    ("name", "content", "there"),
    [
        ("chat_template.jinja", "", True), ("chat_template.json", "{}", True), ("chat_templates/rag.jinja", "", True),
        ("tokenizer_config.json", '{"chat_template": "x"}', True), ("tokenizer_config.json", "{}", False),
    ],
)  # fmt: skip
def test_wherever_a_template_may_stand_it_is_looked_for(tmp_path: Path, name: str, content: str, there: bool) -> None:
    assert not has_chat_template(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    assert has_chat_template(tmp_path) is there
