"""A model repository on the Hugging Face hub, as a directory in its cache.

Knows how repositories are called and what is worth fetching from one. The cache, the token, the endpoint
and `HF_HUB_OFFLINE` are huggingface_hub's own business.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

from elm_mlx.directories import TEMPLATES
from elm_mlx.errors import ElmError, InputError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NEEDED = ["config.json", "*.safetensors", "*.safetensors.index.json"]
_OLDER = ["*.bin", "*.bin.index.json"]
_WELCOME = [
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json", *(f"{folder}/*.jinja" for folder in TEMPLATES),
]  # fmt: skip


def is_repository(source: str) -> bool:
    """Whether `source` could name a repository, `owner/name`, and cannot be meant as a checkpoint file."""
    return bool(_REPOSITORY.fullmatch(source)) and Path(source).suffix not in (".pt", ".pth", ".bin", ".safetensors")


def download(repository: str, revision: str | None) -> Path:
    """The directory of the repository's snapshot in the cache; its name is the commit.

    Fetches config, weights (safetensors, or else `.bin`) and a tokenizer where there is one.

    Raises:
        InputError: the hub has no such repository or revision, or wants a login.
        ElmError: the hub cannot be reached and the cache does not hold it.
    """
    directory = snapshot(repository, revision, _NEEDED)
    if not any(directory.glob("*.safetensors")):
        directory = snapshot(repository, revision, _OLDER)
    with suppress(ElmError):
        snapshot(repository, revision, _WELCOME)
    return directory


def snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """The directory of the repository's snapshot, with the files that match `patterns`. Raises as `download`."""
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    at = f" at {revision}" if revision else ""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        reason = "wants its terms accepted on the hub, and then a login (`hf auth login`)"
    except errors.RevisionNotFoundError:
        reason = "the hub has no such revision"
    except errors.RepositoryNotFoundError:
        reason = "no such path here, and no such repository on the hub (or it is private: `hf auth login`)"
    except errors.HFValidationError:
        reason = "no such path here, and no name that a repository could have"
    except Exception as error:  # whatever the network library of the day raises
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        raise ElmError(f"{repository}{at}: no such path here, and it cannot be had from the hub: {detail}") from None
    raise InputError(f"{repository}{at}: {reason}")
