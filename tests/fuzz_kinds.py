"""The kinds of input that come from outside, each with a good one, its damages, and what the program does with it."""

from __future__ import annotations

import elm_mlx  # noqa: F401  before whatever imports MLX, for the sake of its BLAS

# isort: split
import gzip
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import checkpoints
import family_cases
import gguf_models
import guesses
import kv_predictions
import mlx.core as mx
import other_models
import runs
import tiny
import torch_files
from fuzzing import Damage, Kind, either, json_lines, json_values, raw_bytes, safetensors_header
from hostile_templates import TEMPLATES
from pdf_files import pdf

from elm_mlx.cli import main as command_line
from elm_mlx.data import data_files, records, text_sources
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.documents.indexing import index_documents
from elm_mlx.documents.retrieval import DocumentIndex
from elm_mlx.errors import ElmError
from elm_mlx.evaluate import scores, tokens
from elm_mlx.evaluate import task_sources as tasks
from elm_mlx.evaluate.tasks import Chosen, named
from elm_mlx.inference import conversation, sampling
from elm_mlx.inference.generation import stream_generate
from elm_mlx.inference.rows import prefill
from elm_mlx.inference.saved_cache import Origin, load_cache, save_cache
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.config import ModelConfig, read_config
from elm_mlx.model.network import Model
from elm_mlx.problems.built_in import TASKS
from elm_mlx.quantize import recipe as quantization
from elm_mlx.quantize.quantization import quantize
from elm_mlx.quantize.recipe import Format
from elm_mlx.store import adapters, kvp_directory
from elm_mlx.store.adapters import read as read_adapter
from elm_mlx.store.describe import describe, describe_adapter
from elm_mlx.store.fusion import _record as merge_record
from elm_mlx.store.loading import open_model
from elm_mlx.text.chat_template import choose
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx.train import sections, vocabulary
from elm_mlx.train.pretraining_recipe import Recipe
from elm_mlx_convert.conversion import convert

CONVERSATION = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "the quick fox"},
    {"role": "assistant", "content": "jumps"}, {"role": "user", "content": "over?"},
]  # fmt: skip


def answer(path: Path, adapter: Path | None = None) -> None:
    """What `info` and `generate` do."""
    describe(path)
    loaded = open_model(path, adapter_path=adapter)
    assert loaded.tokenizer is not None
    ids: Any = "the quick fox"
    template = choose(path, loaded.tokenizer)
    if template is not None:
        ids = template.encode(CONVERSATION)
    chosen: dict[str, Any] = sampling.merge_settings(path, dict.fromkeys(sampling.DEFAULTS))
    list(stream_generate(loaded.model, loaded.tokenizer, ids, **chosen | {"max_tokens": 2, "seed": 0}))


def write_openelm(path: Path) -> Path:
    tokenizer = tiny.train_tokenizer()
    model = tiny.random_model(tiny.scaled_config(320))
    tiny.write_directory(path, model, tokenizer)
    (path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "eos_token_id": [2, 3]})
    )
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": other_models.CHATML})
    )
    (path / "conversion.json").write_text(json.dumps({"tool": "x", "source": {"name": "OpenELM", "files": [{"a": 1}]}}))
    return path


def write_family(path: Path, name: str) -> None:
    other_models.write_model(path / "made", name)
    for file in (path / "made").iterdir():
        file.rename(path / file.name)
    (path / "made").rmdir()


def write_quantized(path: Path) -> None:
    write_openelm(path / "whole")
    quantize(path / "whole", path / "q", quantization.QuantizationRecipe(Format(4, 32)))
    shutil.rmtree(path / "whole")
    for file in (path / "q").iterdir():
        file.rename(path / file.name)
    (path / "q").rmdir()


def write_sharded(path: Path) -> None:
    write_openelm(path)
    weights: dict[str, mx.array] = dict(mx.load(str(path / "model.safetensors")))
    (path / "model.safetensors").unlink()
    half = len(weights) // 2
    weight_map: dict[str, str] = {}
    for number, names in enumerate((list(weights)[:half], list(weights)[half:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        mx.save_safetensors(str(path / file), {name: weights[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_adapted(path: Path) -> None:
    write_openelm(path)
    loaded = open_model(path)
    adapter = adapters.plan(loaded.model.config, rank=2)
    adapters.attach(loaded.model, adapter)
    adapters.save(path / "adapter", loaded.model, adapter)
    for file in (path / "adapter").iterdir():
        file.rename(path / file.name)


def use_adapter(path: Path) -> None:
    describe_adapter(path, path)
    answer(path, path)


def write_kvp(path: Path) -> None:
    base = open_model(write_openelm(path)).model
    kv_predictions.write_prediction(path / "kvp", path, base)


def use_kvp(path: Path) -> None:
    base = open_model(path).model
    prediction = kvp_directory.load(path / "kvp", path, base)
    caches = make_prompt_cache(base)
    prediction.read(mx.array([[5, 9, 33]]), make_prompt_cache(prediction.auxiliary), caches)
    mx.eval([cache.state for cache in caches])


def use_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    for text in ("the quick fox", "", " \n日本 🦜<s>", "a" * 300):
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)
        stream = tokenizer.detokenizer(ids)
        for token in (*ids, *range(min(400, tokenizer.vocab_size))):
            stream.add(token)
        stream.finish()
    assert len(tokenizer.pieces) == tokenizer.vocab_size
    assert isinstance(tokenizer.control_ids, dict)
    template = choose(path, tokenizer)
    if template is not None:
        template.encode(CONVERSATION)


def use_template(path: Path) -> None:
    template = choose(path, Tokenizer.load(path))
    assert template is not None
    template.encode(CONVERSATION)


def write_cache(path: Path) -> None:
    model, ids = _cached_model(), [*range(3, 24)]
    caches = make_prompt_cache(model)
    prefill(model, ids, caches)
    save_cache(path / "text.cache", Origin("a" * 64), ids, caches)


def use_cache(path: Path) -> None:
    model = _cached_model()
    caches = make_prompt_cache(model)
    cached = load_cache(path / "text.cache", Origin("a" * 64), model, caches)
    list(stream_generate(model, None, [*cached, 5], max_tokens=2, prompt_cache=caches, cached=cached, prefill_step=4))


def _cached_model() -> Model:
    return tiny.random_model(tiny.scaled_config(96, num_layers=1))


def write_torch(path: Path) -> None:
    config = checkpoints.tiny()
    torch_files.save(path / "model.pt", checkpoints.tensors(checkpoints.corenet(checkpoints.weights(config))))
    checkpoints.save_hub(path / "hub", config, checkpoints.weights(config))
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    (path / "hub" / "tokenizer.model").write_bytes(tiny.train_tokenizer())


def use_torch(path: Path) -> None:
    convert(path / "model.pt", path / "out", config=path / "config.json", tokenizer=path / "hub")


def use_hub(path: Path) -> None:
    convert(path / "hub", path / "out")


def write_gguf(path: Path, name: str) -> None:
    """A file of a family's model, or of an OpenELM, some of its matrices in blocks."""
    made = path / "made"
    if name == "openelm":
        tiny.write_directory(made, tiny.random_model(tiny.scaled_config(320)), tiny.train_tokenizer())
    else:
        rope = other_models.LLAMA3_ROPE | {"original_max_position_embeddings": 8192}
        wide = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "rope_scaling": rope}
        if name == "gemma2":  # whose layers take turns
            wide |= {"rope_scaling": None, "num_hidden_layers": 2, "head_dim": 16}
        other_models.write_model(made, name, {"num_hidden_layers": 1, **wide, "max_position_embeddings": 16384})
    gguf_models.write(made, path / "model.gguf", "F32" if name == "openelm" else ["Q8_0", "F16"])
    shutil.rmtree(made)


def use_gguf(path: Path) -> None:
    convert(path / "model.gguf", path / "out", verify=True)


def gguf_header(data: bytes, draw: random.Random) -> bytes:
    """Damages what stands before the tensors, and most of it is a vocabulary: the beginning and the end more often."""
    tensors = data.index(b"token_embd.weight")
    start, stop = draw.choice(((0, 2000), (0, tensors), (max(0, tensors - 3000), tensors + 3000)))
    return data[:start] + raw_bytes(data[start:stop], draw) + data[stop:]


def write_run(path: Path) -> None:
    runs.run(path, runs.settings(4))
    shutil.rmtree(path / "checkpoints" / "step-00000004")
    (path / "run.json").write_text(
        json.dumps({"command": "lora", "settings": {
            "model": str(path / "none"), "data": str(path / "none"), "rank": "8", "alpha": 2.0, "target": ["qkv_proj"],
            "epochs": 3.0, "batch_size": 4, "learning_rate": 1e-4, "dora": False, "warmup": 0.1, "seed": 3,
        }})
    )  # fmt: skip


def use_state(path: Path) -> None:
    runs.run(path, runs.settings(4), resume=True)


def command(*arguments: object) -> None:
    """`elm-mlx`, in this process. Raises the one line of its error as ElmError."""
    said = io.StringIO()
    sys.argv = ["elm-mlx", *map(str, arguments)]
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            command_line()
        except SystemExit as ended:
            if ended.code in (None, 0):
                return
            lines = said.getvalue().rstrip("\n").split("\n")
            assert len(lines) == 1 and lines[0].startswith("elm-mlx: "), said.getvalue()[-300:]
            assert "a bug in elm-mlx" not in lines[0], lines[0]
            raise ElmError(lines[0]) from None


def use_run(path: Path) -> None:
    command("lora", "--out", path, "--resume")
    command("report", path, "--out", path / "report.html")


def use_report(path: Path) -> None:
    command("report", path, "--out", path / "report.html")


def write_synthesized(path: Path) -> None:
    tokenizer = path / "tokenizer.model"
    tokenizer.write_bytes(tiny.train_tokenizer())
    guesses.write(path, tokenizer)
    (path / "lora.yaml").write_text("iters: 1\nbatch-size: 1\nmax-seq-length: 64\n")
    _synthesize(path, "--out", path / "data.jsonl")
    _synthesize(path, "--out", path / "loop", "--loop", 1, "--measure", 2, "--config", path / "lora.yaml")


def _synthesize(path: Path, *more: object) -> None:
    command("synthesize", path / "model", "--task", path / "guess.py", "--samples", 16, "--answers", 4,
            "--max-tokens", 4, "--difficulty", 1, *more)  # fmt: skip


def use_synthesized(path: Path) -> None:
    _synthesize(path, "--out", path / "data.jsonl")


def use_loop(path: Path) -> None:
    _synthesize(path, "--out", path / "loop", "--loop", 1, "--measure", 2, "--config", path / "lora.yaml")


def write_yaml(path: Path) -> None:
    (path / "lora.yaml").write_text(
        "model: none\ndata: none\nrank: 8\nalpha: 16.0\ntarget: [qkv_proj, ffn.*]\nlearning-rate: 1e-4\n"
        "dora: false\nepochs: 2\nseed: 7\nschedule: cosine\n".replace("schedule:", "lr-schedule:")
    )


def use_yaml(path: Path) -> None:
    command("lora", path / "none", "--data", path / "none", "--out", path / "out", "--config", path / "lora.yaml")


def write_toml(path: Path) -> None:
    (path / "recipe.toml").write_text(
        'tokenizer = "t"\n[model]\nnum_layers = 2\nmodel_dim = 32\nhead_dim = 16\nqkv_multipliers = [0.5, 1.0]\n'
        'context = 64\n[data]\nsequence_length = 32\nvalidation = "v"\n[[data.sources]]\npath = "a"\nweight = 2.0\n'
        "[filters]\nmin_tokens = 10\n[optimizer]\nsteps = 20\nlr = 1e-3\n[run]\nbatch_size = 2\n"
    )


def use_toml(path: Path) -> None:
    made = sections.read(path / "recipe.toml", Recipe)
    made.model.config(320, 1, 2).parameters  # noqa: B018


def _said(role: str) -> dict[str, Any]:
    return {"author": {"role": role}, "content": {"content_type": "text", "parts": ["the fox"]}, "weight": 1.0}


def write_records(path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "the quick fox"}, {"prompt": "the", "completion": "fox"}, {"messages": CONVERSATION[:3]},
        {"instruction": "jump", "input": "", "output": "over"}, {"text": "Grüße 日本", "weight": 2},
        {"prompt": "a", "chosen": "b", "rejected": "c", "system": "s"},
        {"conversations": [
            {"from": "human", "value": "the"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "fox"}, {"from": "gpt", "value": [{"type": "text", "text": "dog"}]},
        ], "tools": '[{"name": "f"}]'},
        {"mapping": {"a": {"parent": None, "children": ["b"], "message": _said("user")},
                     "b": {"parent": "a", "children": [], "message": _said("assistant")}}, "current_node": "b"},
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (path / "a.jsonl").write_bytes(lines)
    (path / "a.json").write_text(json.dumps(rows))
    (path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (path / "a.csv").write_text('text,"id"\n"the ""quick""\nfox",1\nGrüße,\n')
    (path / "a.txt").write_text("the quick\n---\nbrown fox\r\n---\n")
    with suppress(ImportError):
        import zstandard

        (path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    with suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": ["the quick fox", "Grüße"] * 9}), path / "a.parquet")


def use_records(path: Path) -> None:
    refused = []
    for file in sorted(path.iterdir()):
        for use in (_records, _pairs, _texts, _lines):
            try:
                use(file)
            except ElmError as error:
                refused.append(error)
    if refused:
        raise refused[0]


def _records(file: Path) -> None:
    if file.suffix != ".txt":
        list(records.read(file)["train"].records)


def _pairs(file: Path) -> None:
    if file.suffix != ".txt":
        for where, value in data_files.read_all([file], ("prompt", "chosen", "rejected")):
            with suppress(BadRecord):
                records.record_of(where, value, "pairs")


def _texts(file: Path) -> None:
    list(text_sources.documents(file, "text", "---" if file.suffix == ".txt" else None))


def _lines(file: Path) -> None:
    vocabulary.sample([file], skip_bad=True)


def _unpacked(damage: Damage) -> Damage:
    return lambda data, draw: gzip.compress(damage(gzip.decompress(data), draw))


DOCUMENTS = {
    "a.md": "# One\n\nA paragraph.\n\n- an item\n\n```python\nx = 1\n```\n\nTwo\n---\n\nmore\n",
    "a.html": "<html><title>One</title><body><h2>Two</h2><p>A &amp; b<ul><li>c</ul><pre>d</pre></body></html>",
    "a.py": "import os\n\n\nclass C:\n    def f(self):\n        return 'x'\n\n\ndef g(a, *b):\n    return a\n",
    "a.c": "/* f */\nint f(void) {\n    return 1;\n}\n",
    ".gitignore": "*.tmp\n!a.md\n/build/\n",
}


def write_documents(path: Path) -> None:
    for name, text in DOCUMENTS.items():
        (path / name).write_text(text)
    index_documents(path, path / "notes.db")


def use_documents(path: Path) -> None:
    (path / "notes.db").unlink()  # it is of the directory where it was written
    index_documents(path, path / "notes.db")
    use_index(path)


def use_index(path: Path) -> None:
    index = DocumentIndex(path / "notes.db")
    try:
        index.search("a paragraph of one")
    finally:
        index.close()


def write_pdf(path: Path) -> None:
    (path / "a.pdf").write_bytes(pdf("First page", "Second page", title="A report"))


def use_pdf(path: Path) -> None:
    """Raises ElmError with what `index` says of one that it leaves out."""
    for left_out in index_documents(path, path / "notes.db").left_out:
        raise ElmError(f"{left_out.path}: {left_out.why}")


def write_transcript(path: Path) -> None:
    conversation.write_messages(path / "talk.json", CONVERSATION[:3])


def write_answers(path: Path) -> None:
    for name, task in TASKS.items():
        (path / f"{name}.txt").write_text(task.problem(task.difficulties, 0).solution, "utf-8")


def use_answers(path: Path) -> None:
    for name, task in TASKS.items():
        answer = (path / f"{name}.txt").read_text("utf-8", "surrogateescape")
        if (made := task.problem(task.difficulties, 0)).solution != answer:
            task.judge(made, answer)


def write_questions(path: Path) -> None:
    row = {"query": "the quick", "choices": ["fox", "dog"], "gold": 0}
    (path / "mine.jsonl").write_text((json.dumps(row) + "\n") * 3)
    (path / "text.jsonl").write_text('{"text": "the quick brown fox"}\n{"text": "jumps over"}\n')
    (path / "text.txt").write_text("the quick brown fox\r\njumps")
    (path / "hellaswag_val_full.txt").write_text("the quick\n1\nfox\ndog\nold\nking\n" * 3)
    (path / "tokenizer.model").write_bytes(tiny.train_tokenizer())


def use_questions(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    refused = []
    for name in ("text.jsonl", "text.txt"):
        try:
            tokens.read_text(path / name, tokenizer, 8, 4)
        except ElmError as error:
            refused.append(error)
    for use in (_own_task, _hellaswag):
        try:
            use(path)
        except ElmError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def _own_task(path: Path) -> None:
    task = tasks.task_of_file(path / "mine.jsonl")
    found = tasks.load(Chosen(task, 1), None)
    for question in found.questions:
        question.requests()
    tasks.metrics_of(found.questions)


def _hellaswag(path: Path) -> None:
    (chosen,) = named("hellaswag", 0)
    for question in tasks.load(chosen, path).questions:
        question.requests()


def write_conversion(path: Path) -> None:
    write_adapted(path)
    config = ModelConfig.preset("OpenELM-270M")
    (path / "preset.json").write_text(json.dumps(config.to_dict()))


def use_conversion(path: Path) -> None:
    scores.published_model(ModelConfig.load(path / "preset.json"), path)
    json.dumps(merge_record(path, read_adapter(path, read_config(path))))


def write_tokenizer(path: Path, style: str) -> None:
    other_models.write_tokenizer(path, style)
    (path / "config.json").write_text('{"model_type": "llama"}')


def _with_template(path: Path) -> None:
    write_tokenizer(path, "llama3")
    (path / "chat_template.jinja").write_text(other_models.LLAMA3)


def _family(name: str) -> Kind:
    return Kind(f"config {name}", lambda path: write_family(path, name), {"config.json": json_values}, answer)


def _network(name: str) -> Kind:
    """One of the small models that are shown to transformers: all kinds of RoPE are among them."""

    def write(path: Path) -> None:
        for file in family_cases.write(path / "made", name).iterdir():
            file.rename(path / file.name)

    return Kind(f"config {name}", write, {"config.json": json_values}, use_network)


def use_network(path: Path) -> None:
    """`info`, and more tokens than LongRoPE's short factors are for."""
    describe(path)
    model = open_model(path).model
    list(stream_generate(model, None, family_cases.IDS[:14], max_tokens=4, stop_at_eos=False))
    mx.eval(model(mx.array([family_cases.IDS])))


_ROPES = (
    "llama, dynamic", "llama, yarn by DeepSeek", "llama, linear", "llama, `rope_parameters`", "llama, tied and a head",
    "phi3, longrope, partial, tied", "olmo2, yarn", "olmo3, layers apart", "mamba, biases, own head",
)  # fmt: skip


# Of the parts of a tokenizer.json, what the library reads and then may trip over.
_PARTS: dict[str, tuple[Any, ...]] = {
    "pre_tokenizer": (
        None, {"type": "FixedLength", "length": 0},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
        {"type": "Split", "pattern": {"Regex": "$"}, "behavior": "Isolated", "invert": True},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": False},
        {"type": "CharDelimiterSplit", "delimiter": "a"}, {"type": "Sequence", "pretokenizers": []},
    ),
    "post_processor": (
        None, {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}], "pair": [],
         "special_tokens": {}},
        {"type": "BertProcessing", "sep": ["a", 10**6], "cls": ["b", 2]},
    ),
    "normalizer": (
        None, {"type": "Replace", "pattern": {"String": ""}, "content": "x"}, {"type": "Sequence", "normalizers": []},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Prepend", "prepend": ""},
    ),
    "decoder": (
        None, {"type": "ByteFallback"}, {"type": "Sequence", "decoders": []},
        {"type": "Strip", "content": " ", "start": 9, "stop": 9}, {"type": "Metaspace", "replacement": "▁"},
    ),
}  # fmt: skip
_MODEL_PARTS: dict[str, tuple[Any, ...]] = {
    "unk_token": ("", "<gone>", "a"), "byte_fallback": (True, False), "fuse_unk": (True,), "ignore_merges": (True,),
    "continuing_subword_prefix": ("", "##", "é" * 9, "a" * 50), "end_of_word_suffix": ("", "</w>", "é"),
    "dropout": (0.0, 1.0, -1.0, 2.0),
}  # fmt: skip


def tokenizer_parts(data: bytes, draw: random.Random) -> bytes:
    """A tokenizer.json with parts put in the place of others that the library knows, but not together."""
    values = json.loads(data)
    model, added = values["model"], draw.choice(values["added_tokens"])
    vocab, merges = model["vocab"], model["merges"]
    for _ in range(draw.randrange(1, 4)):
        kind = draw.randrange(6)
        if kind == 0:
            vocab[draw.choice(list(vocab))] = draw.choice((0, 1, len(vocab) + 5, 10**6, 2**32 - 1))
        elif kind == 1:
            del vocab[draw.choice(list(vocab))]
        elif kind == 2:
            merges.insert(draw.randrange(len(merges) + 1), draw.choice((["a", "b"], ["", "a"], ["zz", "q"], "a b")))
        elif kind == 3:
            key = draw.choice(list(added))
            odd = {"id": (0, 7, 10**6, 2**32 - 1), "content": ("", " ", "a", "<0xZZ>", "\n", "é" * 300)}
            added[key] = draw.choice(odd.get(key, (True, False)))
        elif kind == 4:
            key = draw.choice(list(_MODEL_PARTS))
            model[key] = draw.choice(_MODEL_PARTS[key])
        else:
            key = draw.choice(list(_PARTS))
            values[key] = draw.choice(_PARTS[key])
    return json.dumps(values).encode()


def _text(data: bytes, draw: random.Random) -> bytes:
    """A template's or a settings file's pieces moved about: what is still nearly one."""
    pieces = [piece + b"}" for piece in data.split(b"}")] if b"{%" in data else data.splitlines(keepends=True)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(pieces))
        if draw.random() < 0.5:
            pieces[at] = draw.choice(pieces)
        else:
            pieces.insert(at, raw_bytes(draw.choice(pieces), draw))
    return b"".join(pieces)


def _hostile(data: bytes, draw: random.Random) -> bytes:
    """A template that means harm, with its pieces moved about, around or behind the good one."""
    worst = _text(draw.choice(list(TEMPLATES.values())).encode(), draw)
    at = draw.choice([0, data.find(b"{%", draw.randrange(len(data))) % len(data), len(data)])
    return data[:at] + worst + data[at:]


_MODEL: Callable[[Path], Path] = write_openelm
_TENSORS = either(safetensors_header, raw_bytes)

KINDS = {
    kind.name: kind
    for kind in (
        Kind("config", _MODEL, {"config.json": json_values}, answer),
        *map(_family, other_models.CONFIGS),
        *map(_network, _ROPES),
        Kind("config quantized", write_quantized, {"config.json": json_values}, answer),
        Kind("generation_config", _MODEL, {"generation_config.json": json_values}, answer),
        Kind("tokenizer.json", lambda path: write_tokenizer(path, "chatml"),
             {"tokenizer.json": either(json_values, json_values, raw_bytes)}, use_tokenizer),
        Kind("tokenizer.json phi3", lambda path: write_tokenizer(path, "phi3"),
             {"tokenizer.json": either(json_values, json_values, raw_bytes)}, use_tokenizer),
        Kind("tokenizer.json's parts", lambda path: write_tokenizer(path, "llama3"),
             {"tokenizer.json": tokenizer_parts}, use_tokenizer),
        Kind("tokenizer_config", lambda path: write_family(path, "llama"),
             {"tokenizer_config.json": json_values}, answer),
        Kind("tokenizer.model", _MODEL, {"tokenizer.model": raw_bytes}, use_tokenizer),
        Kind("template", _with_template, {"chat_template.jinja": either(raw_bytes, _text)}, use_template),
        Kind("template hostile", _with_template, {"chat_template.jinja": _hostile}, use_template),
        Kind("safetensors", _MODEL, {"model.safetensors": _TENSORS}, answer),
        Kind("safetensors llama", lambda path: write_family(path, "llama"), {"model.safetensors": _TENSORS}, answer),
        Kind("safetensors quantized", write_quantized, {"model.safetensors": _TENSORS}, answer),
        Kind("index", write_sharded, {"model.safetensors.index.json": json_values}, answer),
        Kind("adapter", write_adapted, {"adapter_config.json": json_values, "adapters.safetensors": _TENSORS},
             use_adapter),
        Kind("KV prediction", write_kvp, {"kvp/kvp.json": json_values, "kvp/maps.safetensors": _TENSORS,
             "kvp/auxiliary/config.json": json_values}, use_kvp),
        Kind("saved cache", write_cache, {"text.cache": _TENSORS}, use_cache),
        Kind("torch", write_torch, {"model.pt": raw_bytes, "config.json": json_values}, use_torch),
        Kind("hub", write_torch, {"hub/config.json": json_values, "hub/model.safetensors": _TENSORS}, use_hub),
        Kind("gguf", lambda path: write_gguf(path, "llama"), {"model.gguf": either(gguf_header, raw_bytes)}, use_gguf),
        Kind("gguf gemma", lambda path: write_gguf(path, "gemma2"), {"model.gguf": gguf_header}, use_gguf),
        Kind("gguf openelm", lambda path: write_gguf(path, "openelm"), {"model.gguf": gguf_header}, use_gguf),
        Kind("conversion.json", write_conversion, {"conversion.json": json_values}, use_conversion),
        Kind("state.json", write_run, {"checkpoints/step-00000003/state.json": json_values}, use_state),
        Kind("run.json", write_run, {"run.json": json_values}, use_run),
        Kind("metrics", write_run, {"metrics.jsonl": json_lines, "run.json": json_values}, use_report),
        Kind("records", write_records, {"a.jsonl": json_lines, "a.json": json_values, "a.txt": raw_bytes,
             "a.jsonl.gz": either(raw_bytes, _unpacked(json_lines)), "a.parquet": raw_bytes,
             "a.csv": raw_bytes}, use_records),
        Kind("documents", write_documents, {name: either(raw_bytes, _text) for name in DOCUMENTS}, use_documents),
        Kind("pdf", write_pdf, {"a.pdf": raw_bytes}, use_pdf),
        Kind("documents' index", write_documents, {"notes.db": raw_bytes}, use_index),
        Kind("transcript", write_transcript, {"talk.json": json_values},
             lambda path: conversation.read_messages(path / "talk.json")),
        Kind("answers", write_answers, {f"{name}.txt": either(raw_bytes, _text) for name in TASKS}, use_answers),
        Kind("recorded answers", write_synthesized, {"data.jsonl.answers": either(json_lines, raw_bytes)},
             use_synthesized),
        Kind("loop", write_synthesized, {"loop/loop.json": json_values, "loop/start.answers": json_lines}, use_loop),
        Kind("yaml", write_yaml, {"lora.yaml": either(raw_bytes, _text)}, use_yaml),
        Kind("toml", write_toml, {"recipe.toml": either(raw_bytes, _text)}, use_toml),
        Kind("eval", write_questions, {"mine.jsonl": json_lines, "text.jsonl": json_lines, "text.txt": raw_bytes,
             "hellaswag_val_full.txt": raw_bytes}, use_questions),
    )
}  # fmt: skip
