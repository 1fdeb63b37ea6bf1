"""The tokenizer of a model directory, and the tokens that end a text: one set of them for whatever is done with it.

Knows where a directory says how texts end, and what its tokenizer and its embedding may differ in. Knows no templates,
which have an end mark of their own beside these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elm_mlx import files, reading
from elm_mlx.errors import InputError
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.families import Config, tokenizer_file
from elm_mlx.reading import short
from elm_mlx.text.tokenizer import Tokenizer, read_settings

_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Vocabulary:
    """A model directory's tokenizer and end tokens.

    Attributes:
        tokenizer: whose `rows` and `eos_ids` are the model's; None where the directory has none.
        end_ids: the tokens that end a text. Training writes the first.
        notes: what the directory names as the end of a text that the model cannot say.
    """

    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


def read(directory: Path, config: Config) -> Vocabulary:
    """The vocabulary of the model in `directory`, whose `config` is read already.

    The end tokens are all that the tokenizer, `config.json` and `generation_config.json` name, in that order: so the
    one that training writes is the tokenizer's own where it has one, as with Hugging Face's trainers.

    Raises:
        InputError: the tokenizer cannot be read, or is another model's; an end token is no number.
    """
    directory = files.expanded(directory)
    tokenizer = None if tokenizer_file(directory) is None else open_tokenizer(directory, config.vocab_size)
    named = [] if tokenizer is None else list(_of_tokenizer(tokenizer, directory))
    named += [(token, directory / name) for name in _FILES for token in _of_file(directory / name)]
    if not named and isinstance(config, ModelConfig):  # OpenELM's default
        named = [(token, directory / _FILES[0]) for token in config.eos_token_ids]
    ids = tuple(dict.fromkeys(token for token, _ in named if 0 <= token < config.vocab_size))
    notes = tuple(
        f"{path}: the end token {token} is none of the model's {config.vocab_size:,}, and ends nothing"
        for token, path in named
        if token not in ids
    )
    if tokenizer is not None:
        tokenizer.eos_ids = ids
        tokenizer.eos_id = tokenizer.eos_id if tokenizer.eos_id in ids else None
    return Vocabulary(tokenizer, ids, notes)


def open_tokenizer(directory: Path, rows: int) -> Tokenizer:
    """The tokenizer of a model of `rows` tokens, which refuses to use a piece past them.

    There may be some that were added and never trained, such as `[PAD]`.

    Raises:
        InputError: there is none, or it is another model's.
    """
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > rows and tokenizer.base_size > rows:
        raise InputError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} pieces, and the model {rows}: "
            "it is another model's tokenizer"
        )
    tokenizer.rows = rows
    return tokenizer


def _of_tokenizer(tokenizer: Tokenizer, directory: Path) -> Iterator[tuple[int, Path]]:
    """What `tokenizer_config.json` calls the end, and what the tokenizer's own file does."""
    name = read_settings(directory).get("eos_token")
    for token in (None if name is None else tokenizer.id_of(name), tokenizer.eos_id):
        if token is not None:
            yield token, tokenizer.path


def _of_file(path: Path) -> Iterator[int]:
    """The `eos_token_id` of a file: one, several or none."""
    value = reading.json_object_if_there(path).get("eos_token_id")
    for token in value if isinstance(value, list) else [value]:
        if isinstance(token, float) and token.is_integer():
            token = int(token)
        if type(token) is int:
            yield token
        elif token is not None:
            raise InputError(f"{path}: eos_token_id is {short(value)}: a token's number is needed, or several")
