"""Arguments that several commands share, and what they name: the directory of a MODEL, documents, files of caches."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elm_mlx.errors import InputError
from elm_mlx.reading import expanded

if TYPE_CHECKING:
    from elm_mlx.documents.retrieval import DocumentIndex
    from elm_mlx.inference.saved_cache import CacheFiles
    from elm_mlx.model.kv_prediction import KVPrediction
    from elm_mlx.model.network import Model

DType = Literal["float32", "float16", "bfloat16"]
Preset = Literal["OpenELM-270M", "OpenELM-450M", "OpenELM-1_1B", "OpenELM-3B"]
RecordFormat = Literal["completion", "messages", "sharegpt", "chatgpt", "alpaca", "text", "pairs"]

_MODEL = "A model directory, or OWNER/NAME[@REVISION] on the Hugging Face hub."
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help=_MODEL)]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Tokens to generate, at most. (default: the model's, or 256; in `chat` with a template 512)"),
]
Temp = Annotated[
    float | None,
    typer.Option(help="Temperature; 0 takes the likeliest token. (default: the model's, or 0; in `chat` 0.7)"),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Keep the likeliest tokens that reach this probability. (default: the model's, or 1; in `chat` 0.9)"
    ),
]
TopK = Annotated[
    int | None, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all. (default: the model's, or 0)")
]
MinP = Annotated[
    float | None,
    typer.Option(help="Drop tokens below this share of the likeliest one's probability. (default: the model's, or 0)"),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Penalty on tokens among the last 64; 1.1 is mild. (default: the model's, or 1)")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text. (default: random)")]
PrefillStep = Annotated[
    int | None, typer.Option(help="Prompt tokens read in one forward pass. (default: 512, or 128 on a CPU)")
]
KvBits = Annotated[
    int | None,
    typer.Option(
        metavar="8|4", help="Keep keys and values in 8 or 4 bits: long texts in less memory, not the same text. "
        "(default: as computed)"
    ),
]  # fmt: skip
MaxKvSize = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Go on past the context with a text's first 4 and its last tokens in view, N at most; what "
        "lies between is forgotten. (default: the context ends the text)"
    ),
]  # fmt: skip
SaveCache = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Keep the KV cache of what is read. (default: it is forgotten)")
]
LoadCache = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A saved KV cache: what it holds of the prompt is not read again."),
]
ComputeDtype = Annotated[
    DType | None, typer.Option(help="Type to compute in. (default: as stored on a GPU, float32 on a CPU)")
]
OptionalModelPath = Annotated[Path | None, typer.Argument(metavar="[MODEL]", help=_MODEL)]
Docs = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Answer from the passages of an index, by `index`. (default: no documents)"),
]
AdapterPath = Annotated[
    Path | None, typer.Option("--adapter", metavar="DIR", help="An adapter for the model, from `lora` or mlx-lm.")
]
System = Annotated[str | None, typer.Option(help="The system prompt. (default: none)")]
ChatTemplate = Annotated[
    str | None, typer.Option(help="openelm-instruct, none, or a file of Jinja text. (default: the model's own)")
]
Stop = Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")]
PromptLookup = Annotated[
    bool,
    typer.Option(
        "--prompt-lookup", help="Guess that the text copies what came before: the same text, faster where it does."
    ),
]
DraftModel = Annotated[
    Path | None,
    typer.Option(
        metavar="MODEL",
        help="A smaller model of the same vocabulary that guesses: the same text, faster. (default: none)",
    ),
]
NumDraftTokens = Annotated[
    int | None, typer.Option(help="The most tokens to guess for a pass over the model. (default: 7)")
]
KvpPath = Annotated[
    Path | None,
    typer.Option(
        "--kvp", metavar="DIR", help="Have a smaller model, by `kvp`, predict the prompt's keys and values: the first "
        "token sooner, and not the same text. (default: the model reads its prompt)"
    ),
]  # fmt: skip
Destination = Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a directory of that kind at DST.")]
WeightDType = Annotated[DType | None, typer.Option("--dtype", help="Type of the weights. (default: the model's)")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field, as optimizer.lr=0.001.")
]


def check_documents(max_kv_size: int | None) -> None:
    """Raises InputError where --docs does not go with the other options."""
    if max_kv_size is not None:
        raise InputError("--max-kv-size forgets what documents say amid an answer: leave it out, or --docs")


def check_kvp(adapter: Path | None, max_kv_size: int | None = None, saved: bool = False) -> None:
    """Raises InputError where --kvp does not go with the other options; `saved` tells of a cache that is one."""
    if adapter is not None:
        raise InputError("--kvp predicts the keys of the model alone, and --adapter makes it another: choose one")
    if max_kv_size is not None:
        raise InputError("--max-kv-size drops positions, and --kvp predicts all of a prompt's: choose one")
    if saved:
        raise InputError("a saved cache holds what the model has read, and --kvp predicts that: choose one")


def open_documents(index: Path) -> DocumentIndex:
    """Opens the index that --docs names, and says what is to be known of it. Raises InputError and ElmError."""
    from elm_mlx.cli.screen import note
    from elm_mlx.documents.retrieval import DocumentIndex

    documents = DocumentIndex(index)
    for remark in documents.notes:
        note(remark)
    return documents


def open_kvp(kvp: Path, directory: Path, base: Model) -> KVPrediction:
    """Opens what --kvp means, of the model `base` in `directory`, and notes what it does. Raises InputError."""
    from elm_mlx.cli.screen import note
    from elm_mlx.store import kvp_directory

    prediction = kvp_directory.load(kvp, directory, base)
    note(prediction.describe())
    return prediction


def cache_files(model: Path, adapter: Path | None, load: Path | None, save: Path | None) -> CacheFiles | None:
    """Returns the files of --load-cache and --save-cache, checked; None without both. Raises InputError."""
    if load is None and save is None:
        return None
    from elm_mlx.inference.saved_cache import CacheFiles

    return CacheFiles(model, adapter, load, save)


def refuse_given(ctx: typer.Context, names: Collection[str], why: str) -> None:
    """Raises InputError for the first of a command's parameters that the command line gives, of these names."""
    for name, written in _given(ctx).items():
        if name in names:
            raise InputError(f"{written}: {why}")


def refuse_others(ctx: typer.Context, names: Collection[str], why: str) -> None:
    """Raises InputError for the first of a command's parameters that the command line gives, but for these names."""
    refuse_given(ctx, _given(ctx).keys() - {*names}, why)


def _given(ctx: typer.Context) -> dict[str, str]:
    """Returns the parameters that the command line gives, in the command's order: by name, how they are written."""
    given = {}
    for each in ctx.command.params:
        source = ctx.get_parameter_source(each.name or "")
        if source is not None and source.name == "COMMANDLINE":
            option = max(each.opts, key=len)
            given[str(each.name)] = option if option.startswith("-") else str(each.metavar).strip("[.]")
    return given


def directory_of(model: Path) -> Path:
    """Returns the directory that MODEL means; a repository is downloaded and converted where need be, with a bar.

    Raises:
        InputError, ElmError: as `model_names.directory_of`.
    """
    if expanded(model).exists():  # and nothing of the hub is imported
        return expanded(model)
    from elm_mlx.cli.screen import ProgressBar, note
    from elm_mlx.store import model_names

    try:
        with ProgressBar("bytes") as progress:
            return model_names.directory_of(model, progress, note)
    except KeyboardInterrupt:
        note(f"{model}: stopped; what has come is kept, and the same command goes on from there")
        raise
