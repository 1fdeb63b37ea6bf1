"""`elm-mlx generate`: continue a prompt, or answer it, or several."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elm_mlx import reading
from elm_mlx.cli import options
from elm_mlx.cli.screen import ProgressBar, Speech, counted, line, note, show_sources, visible
from elm_mlx.errors import InputError

if TYPE_CHECKING:
    from elm_mlx.documents.index_file import Passage
    from elm_mlx.documents.retrieval import DocumentIndex
    from elm_mlx.inference.batch import Completion
    from elm_mlx.inference.generation import Response
    from elm_mlx.inference.saved_cache import CacheFiles
    from elm_mlx.store.loading import Loaded
    from elm_mlx.text.chat_template import Template

PANELS = {
    "Conversation": ("docs", "system", "template", "no_template"),
    "Sampling": ("max_tokens", "temp", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop"),
    "Output": ("as_json", "logprobs"),
    "Speculation": ("prompt_lookup", "draft_model", "num_draft_tokens"),
    "KV cache": ("kv_bits", "max_kv_size", "save_cache", "load_cache"),
    "Computation": ("kvp", "prefill_step", "compute_dtype"),
}


def generate(
    model: options.ModelPath,
    text: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="A text, or a message; - reads stdin.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="PROMPT, by name. (default: the second argument)")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file with a prompt a line, or .jsonl of objects with `prompt`. (default: PROMPT)"),
    ] = None,
    docs: options.Docs = None,
    system: options.System = None,
    template: options.ChatTemplate = None,
    no_template: Annotated[
        bool, typer.Option("--no-template", help="Continue the text, even if the model has a chat template.")
    ] = False,
    max_tokens: options.MaxTokens = None,
    temp: options.Temp = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each prompt.")] = False,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Print each token with its log-probability.")] = False,
    kv_bits: options.KvBits = None,
    max_kv_size: options.MaxKvSize = None,
    save_cache: options.SaveCache = None,
    load_cache: options.LoadCache = None,
    prompt_lookup: options.PromptLookup = False,
    draft_model: options.DraftModel = None,
    num_draft_tokens: options.NumDraftTokens = None,
    kvp: options.KvpPath = None,
    prefill_step: options.PrefillStep = None,
    compute_dtype: options.ComputeDtype = None,
    adapter: options.AdapterPath = None,
) -> None:
    """Continue a text; a model with a chat template answers it. The text goes to stdout as it is generated, speed
    and memory to stderr."""
    alone = [each for each in (text, *(prompt or ())) if each is not None]
    if len(alone) > 1:
        raise InputError("the prompt is given twice; --prompts FILE takes several")
    if bool(alone) == (prompts is not None):
        raise InputError("give one of --prompt TEXT and --prompts FILE")
    if prompts:
        _check_several(logprobs and not as_json, save_cache, prompt_lookup or draft_model is not None, max_kv_size)
    if no_template:
        if template is not None:
            raise InputError("give --template or --no-template, not both")
        template = "none"
    if docs is not None:
        options.check_documents(max_kv_size)
    if kvp is not None:
        options.check_kvp(adapter, max_kv_size, saved=bool(save_cache or load_cache))
    from elm_mlx.inference.speculation import DraftOptions
    from elm_mlx.model.cache import check_caches, make_prompt_cache
    from elm_mlx.model.config import read_config
    from elm_mlx.store.loading import open_model

    flags = {
        "max_tokens": max_tokens, "temp": temp, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    model = options.directory_of(model)
    config = read_config(model, with_tokenizer=True)
    check_caches(config, kv_bits, max_kv_size, saved=bool(save_cache or load_cache))
    chosen = _settings(model, flags, seed, prefill_step)
    drafts = DraftOptions(prompt_lookup, draft_model and options.directory_of(draft_model), num_draft_tokens)
    templated = _is_templated(model, template, adapter)
    if not templated and docs is None and system is not None:
        raise InputError("--system needs a chat template, which the model lacks: pass --template")
    documents = None if docs is None else options.open_documents(docs)
    texts = _read_prompts(prompts) if prompts else [_read_prompt(alone[0])]
    kept = options.cache_files(model, adapter, load_cache, save_cache)
    loaded = open_model(model, compute_dtype, adapter, config)
    for remark in loaded.notes:
        note(remark)
    chosen["prompt_cache"] = make_prompt_cache(loaded.model, kv_bits, max_kv_size)
    if kept is not None:
        chosen["cached"] = kept.load(loaded.model, chosen["prompt_cache"])
    if kvp is not None:
        chosen["kvp"] = options.open_kvp(kvp, model, loaded.model)
    own = _template(model, loaded, template, adapter) if templated else None
    asked = _asked(loaded, own, documents, system, texts, chosen["max_tokens"])
    chosen |= {"stop": (*asked.stop_strings, *(stop or ())), "stop_ids": asked.stop_ids}
    if prompts:
        from elm_mlx.inference.batch import generate_batch

        assert loaded.tokenizer is not None
        completions = generate_batch(loaded.model, loaded.tokenizer, asked.inputs, **chosen)
        _print_batch(texts, asked, completions, as_json, logprobs)
        return
    responses = _responses(loaded, asked.inputs[0], chosen | drafts.load(loaded), kept, max_kv_size)
    if as_json:
        _as_json(texts[0], asked, responses, logprobs)
        return
    if logprobs:
        _as_tokens(responses)
    else:
        _as_text(texts[0] + "\n" * asked.answers, responses)  # an answer begins its own line
    if asked.documents is not None:
        show_sources(asked.documents, asked.sources[0])


def _settings(
    model: Path, flags: Mapping[str, float | None], seed: int | None, prefill_step: int | None
) -> dict[str, Any]:
    """Returns how tokens are drawn and a prompt is read, checked: flags, the model's own settings, or the defaults."""
    from elm_mlx.inference.generation import check_steps
    from elm_mlx.inference.rows import PREFILL_STEP
    from elm_mlx.inference.sampling import merge_settings, sampler_from

    chosen: dict[str, Any] = merge_settings(model, flags)
    sampler_from(chosen)
    chosen |= {"seed": seed, "prefill_step": PREFILL_STEP if prefill_step is None else prefill_step}
    check_steps(chosen["max_tokens"], chosen["prefill_step"])
    reading.check_seed(seed)
    return chosen


def _responses(
    loaded: Loaded,
    prompt: str | list[int],
    chosen: dict[str, Any],
    kept: CacheFiles | None,
    max_kv_size: int | None,
) -> Iterator[Response]:
    """Returns the tokens of one text as they come; the cache of its prompt is kept when the first is there."""
    from elm_mlx.inference.generation import encode_prompt, stream_generate

    ids = encode_prompt(loaded.model, loaded.tokenizer, prompt, endless=max_kv_size is not None)
    if max_kv_size is not None and len(ids) > max_kv_size:
        note(f"the prompt has {len(ids)} tokens: of them 4 and the last are in view, {max_kv_size} at most")
    responses = stream_generate(loaded.model, loaded.tokenizer, ids, **chosen)
    return responses if kept is None else _kept_after_first(responses, partial(kept.save, ids, chosen["prompt_cache"]))


@dataclass(frozen=True)
class _Asked:
    """What a model is asked: texts or ids, and what ends an answer.

    Attributes:
        sources: the passages that each was given, without documents none.
        answers: the prompts are messages, and no texts to go on with.
        documents: whose passages they are.
    """

    inputs: Sequence[str | list[int]]
    sources: Sequence[Sequence[Passage] | None]
    stop_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    answers: bool = False
    documents: DocumentIndex | None = None


def _asked(
    loaded: Loaded,
    template: Template | None,
    documents: DocumentIndex | None,
    system: str | None,
    texts: Sequence[str],
    max_tokens: int,
) -> _Asked:
    """Returns what the model is asked: texts as they are, or messages by the template, with passages of documents."""
    assert loaded.tokenizer is not None
    if documents is not None:
        from elm_mlx.documents.grounding import QuestionsAndAnswers
        from elm_mlx.inference.conversation import grounded_prompt
        from elm_mlx.inference.window import Templated

        template = template or QuestionsAndAnswers(loaded.tokenizer)
        window = Templated(template, loaded.model.config.max_context_length, system)
        grounded = [grounded_prompt(window, loaded.tokenizer, documents, [], text, max_tokens) for text in texts]
        inputs: Sequence[str | list[int]] = [prompt.ids for prompt, _ in grounded]
        return _Asked(inputs, [each for _, each in grounded], template.stop_strings, template.stop_ids, True, documents)
    if template is None:
        return _Asked(texts, [None] * len(texts))
    before = [] if system is None else [{"role": "system", "content": system}]
    inputs = [template.encode([*before, {"role": "user", "content": text}]) for text in texts]
    note("answered by the chat template; --no-template continues the text")
    return _Asked(inputs, [None] * len(texts), template.stop_strings, template.stop_ids, True)


def _template(model: Path, loaded: Loaded, template: str | None, adapter: Path | None) -> Template | None:
    from elm_mlx.text.chat_template import choose

    assert loaded.tokenizer is not None
    return choose(model, loaded.tokenizer, template, adapter)


def _is_templated(model: Path, template: str | None, adapter: Path | None) -> bool:
    """Returns whether the prompt is a message, by a template that is given, or the adapter's, or the model's own."""
    from elm_mlx.text.tokenizer import has_chat_template

    if template is None and adapter is None and not has_chat_template(model):
        return False  # and nothing of templates is imported
    from elm_mlx.text.chat_template import prepare

    return prepare(model, template, adapter)


def _check_several(as_tokens: bool, save_cache: Path | None, drafted: bool, max_kv_size: int | None) -> None:
    """Raises InputError for options that --prompts does not go with."""
    if as_tokens:
        raise InputError("--logprobs with --prompts needs --json")
    if save_cache:
        raise InputError("--save-cache keeps one prompt, and --prompts has several: read what they share by itself")
    if drafted:
        raise InputError("--prompts decodes its prompts together, without drafts: leave out --prompts, or the drafts")
    if max_kv_size is not None:
        raise InputError("--max-kv-size is for one text without end, and --prompts has several")


def _kept_after_first(responses: Iterator[Response], save: Callable[[], None]) -> Iterator[Response]:
    """Calls `save` when the first token is there: then the caches hold the prompt, and nothing else."""
    for response in responses:
        if response.generation_tokens == 1:
            save()
        yield response


def _print_batch(
    texts: list[str], asked: _Asked, completions: Iterator[Completion], as_json: bool, logprobs: bool
) -> None:
    from elm_mlx import device

    start, read, written = time.perf_counter(), 0, 0
    speech = Speech()
    with ProgressBar("items") as progress:
        for number, (text, done) in enumerate(zip(texts, completions, strict=True), start=1):
            read, written = read + done.prompt_tokens, written + len(done.tokens)
            if as_json:
                _print_json(text, asked.sources[number - 1], asdict(done), logprobs)
            else:
                speech.write(f"--- {number}: {text}\n{done.text}")
                speech.finish()
                print(flush=True)
                if asked.documents is not None:
                    show_sources(asked.documents, asked.sources[number - 1])
            if not sys.stdout.isatty():  # or the texts themselves show it
                progress("generate", number, len(texts))
    seconds = time.perf_counter() - start
    line(
        f"{counted(len(texts), 'prompt')}: {counted(read, 'token')} read and {written} generated in {seconds:.1f} s, "
        f"{written / seconds:.1f} tokens/s | peak memory: {device.peak_memory() / 1e9:.2f} GB",
        err=True,
    )


def _as_text(prompt: str, responses: Iterator[Response]) -> None:
    speech = Speech()
    if sys.stdout.isatty():
        speech.write(prompt, dim=True)
    last = None
    try:
        for last in responses:
            speech.write(last.text)
    finally:  # Ctrl-C too
        speech.finish()
        print(flush=True)
        _print_statistics(last)


def _as_tokens(responses: Iterator[Response]) -> None:
    last = None
    try:
        for last in responses:
            print(f"{last.token:>6}  {last.logprob:9.4f}  {_json(last.text)}", flush=True)
    finally:
        _print_statistics(last)


def _as_json(prompt: str, asked: _Asked, responses: Iterator[Response], logprobs: bool) -> None:
    every = list(responses)
    result = asdict(every[-1])
    result |= {
        "text": "".join(response.text for response in every),
        "tokens": [response.token for response in every],
        "logprobs": [response.logprob for response in every],
    }
    kept = {name: value for name, value in result.items() if name not in ("token", "logprob")}
    _print_json(prompt, asked.sources[0], kept, logprobs)


def _print_json(prompt: str, sources: Sequence[Passage] | None, result: dict[str, Any], logprobs: bool) -> None:
    if not logprobs:
        del result["logprobs"]
    if sources is not None:
        result["sources"] = [each.values(number) for number, each in enumerate(sources, 1)]
    print(_json({"prompt": prompt, **result}), flush=True)


def _json(value: object) -> str:
    """Returns JSON as stdout can show it: in ASCII where it speaks nothing else, or is a terminal that would obey."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    speaks = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    if speaks and not (sys.stdout.isatty() and visible(text) != text):
        return text
    return json.dumps(value, allow_nan=False)


def _print_statistics(last: Response | None) -> None:
    if last is None:
        return
    from elm_mlx.device import peak_memory

    kept = f", {last.cached_tokens} of them from the cache" if last.cached_tokens else ""
    kept += f", {last.predicted_tokens} of them predicted, not read" if last.predicted_tokens else ""
    line(
        f"prompt: {counted(last.prompt_tokens, 'token')}{kept}, {last.prompt_tps:.1f} tokens/s | "
        f"generation: {counted(last.generation_tokens, 'token')}, {last.generation_tps:.1f} tokens/s | "
        + (f"drafts: {last.drafts} | " if last.drafts else "")
        + f"first token: {last.time_to_first_token:.3f} s | peak memory: {peak_memory() / 1e9:.2f} GB"
        + (f" | ended by: {last.finish_reason}" if last.finish_reason else ""),
        err=True,
    )


def _read_prompt(prompt: str) -> str:
    """Returns the text itself, or stdin without the line's end that `echo` adds."""
    return reading.stdin_text().removesuffix("\n") if prompt == "-" else prompt


def _read_prompts(path: Path) -> list[str]:
    text = reading.text(path)
    # Not splitlines(), which also splits where a prompt may hold U+2028 or a form feed.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{path}: holds no prompts")
    if path.suffix == ".jsonl":
        return [_prompt_of(line, f"{path}, line {number}") for number, line in lines]
    return [line for _, line in lines]


def _prompt_of(line: str, where: str) -> str:
    record = reading.parse_json(line, where)
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise InputError(f"{where}: is not an object with a string `prompt`")
    return record["prompt"]
