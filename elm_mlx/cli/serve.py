"""`elm-mlx serve`: models over HTTP, as OpenAI's clients speak it, and a page to talk to them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from elm_mlx.cli import options
from elm_mlx.cli.screen import note
from elm_mlx.errors import InputError

PANELS = {
    "Who may ask": ("host", "port", "api_key", "allow_origin", "log_prompts"),
    "Memory": ("max_memory", "kv_cache_bytes", "kv_bits", "max_queue"),
    "Computation": ("prompt_lookup", "draft_model", "num_draft_tokens", "compute_dtype"),
}
# Of freed memory: what draws for 16 rows of logits take each step; caches and weights are larger, and are given back.
_KEPT_ARRAY, _KEPT_BYTES = 1 << 24, 1 << 28
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL…",
            help="Directories, or OWNER/NAME on the hub; requests use the names, or NAME of NAME=MODEL.",
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="An adapter, served as a model; NAME=DIR@MODEL where there are several."),
    ] = None,
    kvp: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="A KV prediction, from `kvp`, for a MODEL: served as a model of its own, which answers sooner, and "
            "otherwise; NAME=DIR@MODEL where there are several.",
        ),
    ] = None,
    docs: options.Docs = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ELM_MLX_API_KEY", show_envvar=True, help="Key that clients must send. (default: none)"),
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Site whose pages may use the server, as https://example.org; * is all.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what people ask into the log.")] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory for weights and caches, as 8GB. (default: 80 % of what is free)"),
    ] = None,
    kv_cache_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of it, for beginnings of texts that may come again. (default: a quarter)"),
    ] = None,
    kv_bits: options.KvBits = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; others are refused.")] = 64,
    prompt_lookup: options.PromptLookup = False,
    draft_model: options.DraftModel = None,
    num_draft_tokens: options.NumDraftTokens = None,
    compute_dtype: options.ComputeDtype = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the web chat in a browser.")] = False,
) -> None:
    """Serve models over HTTP, with OpenAI's API and a web chat. Ctrl-C ends it."""
    from elm_mlx.serve.guard import Guard
    from elm_mlx.serve.server import listen, make_server, run, url_of

    _check_access(host, api_key, allow_origin or ())
    limit = None if max_memory is None else _bytes("--max-memory", max_memory)
    prefixes = None if kv_cache_bytes is None else _bytes("--kv-cache-bytes", kv_cache_bytes)
    from elm_mlx.inference.speculation import DraftOptions

    drafts = DraftOptions(prompt_lookup, draft_model, num_draft_tokens)
    documents = None if docs is None else options.open_documents(docs)
    bound = listen(host, port)
    from elm_mlx import device
    from elm_mlx.inference.drafts import load_draft_model
    from elm_mlx.inference.engine import Engine
    from elm_mlx.serve.app import Service
    from elm_mlx.serve.served_models import load_models

    device.keep_freed_memory(_KEPT_ARRAY, _KEPT_BYTES)
    free = device.available_memory()
    limit = int(0.8 * free) if limit is None and free is not None else limit or 8 << 30
    served = load_models([_named(each) for each in models], adapter or (), compute_dtype, note, kvp or ())
    if documents is not None and all(model.template is None for model in served.values()):
        raise InputError("--docs answers conversations, and none of the models has a chat template: leave it out")
    targets = [model.loaded for model in served.values()]
    engine = Engine(
        {name: model.loaded for name, model in served.items()},
        max_memory=limit,
        max_queue=max_queue,
        prefix_bytes=limit // 4 if prefixes is None else prefixes,
        kv_bits=kv_bits,
        drafted=drafts.drafted,
        draft_model=None if drafts.directory is None else load_draft_model(drafts.directory, *targets),
        predictions={name: model.kvp for name, model in served.items() if model.kvp is not None},
    )
    app = Guard(Service(engine, served, log_prompts, documents).app(), host, api_key, allow_origin or (), note)
    url = url_of(bound, host)

    def started() -> None:
        note(f"serving {', '.join(served)} at {url} (Ctrl-C ends it)")
        if open_page:
            import webbrowser

            webbrowser.open(url)

    try:
        run(make_server(app, started), bound)
    finally:
        engine.close(0)


def _named(model: str) -> str:
    """Returns `NAME=DIR` for a repository on the hub, `NAME=` in front of it or not; anything else as it is."""
    from elm_mlx.hub import repository
    from elm_mlx.reading import expanded

    name, equals, place = model.partition("=") if "=" in model and not expanded(model).exists() else ("", "", model)
    found = repository(place)
    if found is None or expanded(place).exists():
        return model
    return f"{name if equals else replace(found, revision=None)}={options.directory_of(Path(place))}"


def _check_access(host: str, api_key: str | None, origins: Sequence[str]) -> None:
    """Raises InputError for options by which others would get in unasked, or nobody would."""
    from elm_mlx.serve.guard import is_loopback

    if api_key is None and not is_loopback(host):
        raise InputError(f"--host {host} lets other machines in: set a key, --api-key or ELM_MLX_API_KEY")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise InputError("--api-key: letters, digits and signs without spaces around them are needed")
    for origin in origins:
        if origin == "*" and api_key is None:
            raise InputError("--allow-origin '*' lets every web page use the models: set a key, --api-key")
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise InputError(f"--allow-origin {origin}: a site without a path is needed, as https://example.org, or *")


def _bytes(option: str, text: str) -> int:
    """Returns a size as `8GB`, `500MB` or `4GiB` in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise InputError(f"{option} {text}: a size as 8GB or 500MB is needed")
    return int(float(found[1]) * _UNITS[found[2]])
