"""`elm-mlx chat`: a conversation at a terminal, or through a pipe."""

from __future__ import annotations

from typing import Annotated

import typer

from elm_mlx.cli import options
from elm_mlx.cli.screen import note

PANELS = {
    "Conversation": ("docs", "system", "template"),
    "Sampling": ("max_tokens", "temp", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop"),
    "Speculation": ("prompt_lookup", "draft_model", "num_draft_tokens"),
    "KV cache": ("kv_bits", "max_kv_size", "save_cache", "load_cache"),
    "Computation": ("kvp", "compute_dtype"),
}


def chat(
    model: options.ModelPath,
    message: Annotated[str | None, typer.Argument(metavar="[MESSAGE]", help="The first message.")] = None,
    docs: options.Docs = None,
    system: options.System = None,
    template: options.ChatTemplate = None,
    max_tokens: options.MaxTokens = None,
    temp: options.Temp = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    kv_bits: options.KvBits = None,
    max_kv_size: options.MaxKvSize = None,
    save_cache: options.SaveCache = None,
    load_cache: options.LoadCache = None,
    prompt_lookup: options.PromptLookup = False,
    draft_model: options.DraftModel = None,
    num_draft_tokens: options.NumDraftTokens = None,
    kvp: options.KvpPath = None,
    compute_dtype: options.ComputeDtype = None,
    adapter: options.AdapterPath = None,
) -> None:
    """Talk to a model, or with a base model let it continue what you write; from a pipe, a message a line."""
    from elm_mlx import reading
    from elm_mlx.cli.session import Session
    from elm_mlx.inference import sampling
    from elm_mlx.inference.conversation import CONTINUING, DEFAULTS, Chat
    from elm_mlx.inference.speculation import DraftOptions
    from elm_mlx.model.cache import check_caches
    from elm_mlx.model.config import read_config
    from elm_mlx.store.loading import open_model
    from elm_mlx.text.chat_template import choose, prepare

    reading.check_seed(seed)
    if docs is not None:
        options.check_documents(max_kv_size)
    if kvp is not None:
        options.check_kvp(adapter, max_kv_size, saved=bool(save_cache or load_cache))
    documents = None if docs is None else options.open_documents(docs)
    model = options.directory_of(model)
    config = read_config(model, with_tokenizer=True)
    drafts = DraftOptions(prompt_lookup, draft_model and options.directory_of(draft_model), num_draft_tokens)
    check_caches(config, kv_bits, max_kv_size, saved=bool(save_cache or load_cache))
    prepare(model, template, adapter)
    kept = options.cache_files(model, adapter, load_cache, save_cache)
    loaded = open_model(model, compute_dtype, adapter, config)
    assert loaded.tokenizer is not None
    for remark in loaded.notes:
        note(remark)
    predicting = None if kvp is None else options.open_kvp(kvp, model, loaded.model)
    chosen = choose(model, loaded.tokenizer, template, adapter)
    flags = {
        "max_tokens": max_tokens, "temp": temp, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    settings = sampling.merge_settings(model, flags, DEFAULTS if chosen or documents else CONTINUING)
    conversation = Chat(
        loaded.model, loaded.tokenizer, chosen, system=system, options=settings, stop=stop or (), seed=seed,
        **drafts.load(loaded),
        kv_bits=kv_bits, max_kv_size=max_kv_size, kvp=predicting, documents=documents,
    )  # fmt: skip
    cache = conversation.cache
    if kept is not None:
        cache.ids = kept.load(loaded.model, cache.caches)
    exit_code = Session(conversation, model, message).run()
    if kept is not None and cache.ids:
        kept.save(cache.ids, cache.caches)
    raise typer.Exit(exit_code)
