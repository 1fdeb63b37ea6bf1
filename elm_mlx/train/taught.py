"""What a run was taught, read back: some of its examples, to compare models on.

Knows `run.json` and what `lora` and `dpo` say there of their data.
"""

from __future__ import annotations

from pathlib import Path

from elm_mlx.data import examples
from elm_mlx.data.examples import Example
from elm_mlx.errors import ElmError
from elm_mlx.model.config import read_config
from elm_mlx.reading import expanded, json_object
from elm_mlx.store.fusion import Sample
from elm_mlx.text import chat_template
from elm_mlx.text.tokenizer import read_vocabulary
from elm_mlx.train.metrics import ABOUT

_MOST = 256  # positions that count
_EXAMPLES = 32


def sample(adapter: Path, model: Path) -> Sample | None:
    """Examples of the run that left `adapter`, spread over its data, as it learned from them, up to 256 positions.

    None where no run has left it, or its data are not where they were.
    """
    try:
        found = _examples(expanded(adapter), expanded(model))
    except (ElmError, KeyError, TypeError, ValueError):
        return None
    rows: list[tuple[tuple[int, ...], tuple[bool, ...]]] = []
    positions = 0
    for example in found[:: -(-len(found) // _EXAMPLES)]:
        counted = (*example.trained[1:], False)
        if any(counted) and (not rows or positions + sum(counted) <= _MOST):
            rows.append((example.ids, counted))
            positions += sum(counted)
    return Sample("answers that it was trained on", rows) if rows else None


def _examples(adapter: Path, model: Path) -> list[Example]:
    """Raises ElmError, KeyError, TypeError or ValueError where there are none to be had."""
    run = adapter if (adapter / ABOUT).is_file() else adapter.parent.parent  # of a checkpoint
    about = json_object(run / ABOUT)
    settings = about["settings"]
    if not isinstance(settings, dict):
        raise TypeError("no settings")
    config = read_config(model)
    tokenizer = read_vocabulary(model, config).tokenizer
    if tokenizer is None:
        raise ValueError("no tokenizer")
    used = chat_template.choose(model, tokenizer, settings.get("template"))
    length = settings.get("max_seq_length") or examples.longest(config)
    path, truncate = expanded(settings["data"]), bool(settings.get("truncate"))
    return examples.load(
        path, tokenizer, used, length, format=settings.get("format"), paired=about.get("command") == "dpo",
        train_on_prompt=bool(settings.get("train_on_prompt")), truncate=truncate, skip_bad=True,
    )["train"].examples  # fmt: skip
