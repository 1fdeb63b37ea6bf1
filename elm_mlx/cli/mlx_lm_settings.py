"""mlx-lm's settings for fine-tuning, as its YAML files have them, translated into this program's options.

Keys that mean the same are taken, those that ask for nothing are left out, and those that mean something else are
refused with what to write instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from elm_mlx.train.sections import scalar

SCALE = "lora_parameters.scale"  # what an adapter's product is multiplied by; alpha is that times the rank
_RENAMED = {"adapter_path": "out", "lora_layers": "num_layers", "use_dora": "dora"}
# A key that changes no weight: when memory is returned.
_OF_NO_MATTER = "clear_cache_threshold"
# Keys that may stand there with nothing in them, and what to do where there is something.
_ELSEWHERE = {
    "resume_adapter_file": "to begin with an adapter, write from_adapter: DIR, its directory",
    "wandb": "write report_to: wandb, and the project into the environment as WANDB_PROJECT",
    "project_name": "write the project into the environment, as WANDB_PROJECT",
    "trust_remote_code": "no code that comes with a model is run here",
    "config": "settings come from one file",
    "hf_dataset": "write data: hub:OWNER/NAME, or hub:OWNER/NAME:SPLIT, and columns for its features",
}
_COLUMNS = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "text_feature": "text",
    "chat_feature": "messages",
}
_ONLY_MLX_LM = {
    "train", "fine_tune_type", "lora_parameters", "mask_prompt", "optimizer_config", "test", *_COLUMNS, *_RENAMED,
    _OF_NO_MATTER, *_ELSEWHERE,
}  # fmt: skip


def translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that a file of settings stands for, which may be one of mlx-lm's.

    Args:
        values: by names with underscores; null where nothing is said.

    Raises:
        ValueError: a key means something else here. The text begins with it.
    """
    theirs = {key: value for key, value in values.items() if key in _ONLY_MLX_LM}
    found = {key: value for key, value in values.items() if key not in _ONLY_MLX_LM}
    _check(theirs, found)
    columns = {_COLUMNS[key]: theirs.pop(key) for key in _COLUMNS if theirs.get(key) is not None}
    if "prompt" in columns or "completion" in columns:
        columns = {"prompt": "prompt", "completion": "completion"} | columns
    if columns and found.get("columns") is not None:
        raise ValueError("columns and mlx-lm's names of features say the same, and both are there: keep one")
    found |= {"columns": columns} if columns else {}
    said = theirs.pop("test", None)
    if said is not None and not _truth("test", said):
        found["test_batches"] = 0  # whatever stands there: it is of a test
    for key, value in theirs.items():
        for name, made in _meaning(key, value, found.get("optimizer")):
            if name in found or (name == SCALE and found.get("alpha") is not None):
                raise ValueError(f"{key} and {name} say the same, and both are there: keep one")
            found[name] = made
    return found


def alpha(scale: float, rank: str, rslora: bool) -> float:
    """Returns the alpha that makes a scale, for an adapter's rank as the command line has it."""
    numbers = [item.rpartition("=")[2].strip() for item in rank.split(",")]
    largest = max((int(number) for number in numbers if number.isdecimal()), default=1)  # or else rank is an error soon
    return scale * (math.sqrt(largest) if rslora else largest)


def _check(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that both have and mlx-lm means otherwise."""
    schedule, optimizer, accumulated = map(ours.get, ("lr_schedule", "optimizer", "grad_accumulation_steps"))
    if isinstance(schedule, Mapping):
        raise ValueError(
            "lr_schedule is mlx-lm's: write cosine, linear or constant, with the highest rate as learning_rate and "
            "the updates of rising rate as warmup"
        )
    if optimizer == "adam":
        raise ValueError("optimizer is adam: write adamw, which without weight_decay is Adam (betas 0.9 and 0.95)")
    if theirs and ours.get("iters") is not None and accumulated not in (None, 1):
        raise ValueError(
            f"iters counts batches in mlx-lm and updates here, of {accumulated} batches each: write how many updates, "
            "without mlx-lm's own keys, or leave out grad_accumulation_steps"
        )


def _meaning(key: str, value: Any, optimizer: Any) -> list[tuple[str, Any]]:
    """Returns the options that one of mlx-lm's keys stands for. Raises ValueError."""
    if value is None or key == _OF_NO_MATTER:
        return []
    if key in _RENAMED:
        return [(_RENAMED[key], value)]
    if key in _ELSEWHERE:
        if value not in (False, "", [], {}):
            raise ValueError(f"{key}: {_ELSEWHERE[key]}")
        return []
    if key == "lora_parameters":
        return _of_lora(value)
    if key == "optimizer_config":
        return _of_optimizer(value, optimizer)
    if key == "fine_tune_type":
        kinds: dict[Any, list[tuple[str, Any]]] = {"lora": [], "dora": [("dora", True)], "full": [("full", True)]}
        if not isinstance(value, str) or value not in kinds:
            raise ValueError(f"fine_tune_type is {value!r}: one of lora, dora, full is needed")
        return kinds[value]
    said = _truth(key, value)
    if key == "mask_prompt":
        return [("train_on_prompt", not said)]
    if not said:
        raise ValueError("train is false, and this command trains: write true, or leave it out")
    return []


def _of_lora(values: Any) -> list[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        raise ValueError("lora_parameters is not a table of rank, scale, dropout and keys")
    names = {"rank": "rank", "scale": SCALE, "dropout": "dropout", "keys": "target"}
    for name in values:
        if name not in names:
            hint = ": write alpha beside lora_parameters, or scale in it" if name == "alpha" else ""
            raise ValueError(f"lora_parameters.{name} is not one of {', '.join(names)}{hint}")
    found = {names[name]: value for name, value in values.items() if value is not None}
    if SCALE in found:
        try:
            found[SCALE] = scalar(float, found[SCALE])
        except ValueError as error:
            raise ValueError(f"{SCALE} {error}") from None
    return list(found.items())


def _of_optimizer(values: Any, chosen: Any) -> list[tuple[str, Any]]:
    """Returns the settings of the chosen optimizer, as mlx-lm takes them."""
    own = values.get(str(chosen or "adamw"), {}) if isinstance(values, Mapping) else None
    if not isinstance(own, Mapping):
        raise ValueError("optimizer_config is not a table of optimizers, each with a table of its settings")
    for name in own:
        if name != "weight_decay":
            fixed = "; AdamW has the betas 0.9 and 0.95, and eps 1e-8" if name in ("betas", "eps") else ""
            raise ValueError(f"optimizer_config has {name}: of these, weight_decay alone can be chosen here{fixed}")
    return list(own.items())


def _truth(key: str, value: Any) -> bool:
    try:
        return bool(scalar(bool, value))
    except ValueError as error:
        raise ValueError(f"{key} {error}") from None
