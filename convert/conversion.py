"""A checkpoint in, an MLX model directory out: the one function that the rest of this package serves.

Knows the order of the steps and what the directory holds. Decisions are made in `plan`, bytes in `writer`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from elm_mlx.directories import EXPORT, MODEL, carry_templates, check_destination
from elm_mlx.errors import ElmError
from elm_mlx.files import expanded, new_directory, write_text
from elm_mlx.model.config import ModelConfig
from elm_mlx.text import chat_template
from elm_mlx.text.tokenizer import Tokenizer, read_vocabulary
from elm_mlx.version import __version__
from elm_mlx_convert import tokenizers
from elm_mlx_convert.destination import Difference, check_room, compare, hashing, sha256, write_weights
from elm_mlx_convert.names import listed
from elm_mlx_convert.plan import Plan, make_plan
from elm_mlx_convert.source_config import preset_name
from elm_mlx_convert.tensors import FLOATS
from elm_mlx_convert.torch_files import write_state_dict


@dataclass(frozen=True)
class Conversion:
    """What `convert` has done.

    Args:
        destination: None after a dry run.
        differences: of each group of weights from the source, if they were verified.
        warnings: the plan's, and what only the values could tell.
        seconds: from the start to the finished directory.
    """

    plan: Plan
    destination: Path | None
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    seconds: float


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    tokenizer: str | Path | None = None,
    config: Path | None = None,
    preset: str | None = None,
    head_dim: int | None = None,
    lora_alpha: float | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    ema: bool = False,
    chat_template: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_progress: Callable[[str, int], None] = lambda step, count: None,
) -> Conversion:
    """Turns a checkpoint of an OpenELM into a directory that this package and mlx-lm open.

    Args:
        source: a PyTorch or safetensors file, a directory of the hub's or of MLX, or a hub repository's name.
        destination: the directory to make. It appears complete or not at all.
        tokenizer: a SentencePiece model, a directory or repository that has one; by default the source's own.
        config: a `config.json` or CoreNet YAML; by default the one that lies beside the source.
        preset: one of the paper's models, as in `elm_mlx.model.config.PRESETS`.
        head_dim: the size of a head, where no QK norm and no config tells it.
        lora_alpha: of an adapter in the source, which is merged.
        dtype: float32, float16 or bfloat16; by default the source's if that has 16 bits, else bfloat16.
        revision: of a repository.
        ema: take the moving average of a training checkpoint.
        chat_template: `openelm-instruct`, `none`, or a file of Jinja text; by default the source's own, or what
            its name implies.
        verify: read both sides back and compare every value, before the directory takes its name.
        dry_run: decide everything, write nothing.
        overwrite: replace a model directory that is there.
        on_plan: called when everything is decided.
        on_progress: called with "write" or "verify" and the number of bytes written or read since the last call.

    Raises:
        InputError: the source, or what was asked of it, is at fault.
        ElmError: something else failed: the hub, the disk, the verification.
        In both cases `destination` is as it was.
    """
    start = time.perf_counter()
    path = expanded(destination)
    try:
        check_destination(path, MODEL, overwrite)
        plan = make_plan(
            source,
            tokenizer=tokenizer,
            config=config,
            preset=preset,
            head_dim=head_dim,
            lora_alpha=lora_alpha,
            dtype=dtype,
            revision=revision,
            ema=ema,
            chat_template=chat_template,
        )
        check_destination(path, MODEL, overwrite, plan.source.files)
        on_plan(plan)
        if dry_run:
            return Conversion(plan, None, (), plan.warnings, time.perf_counter() - start)
        check_room(path, plan.nbytes)
        differences, said = _write(plan, path, verify=verify, overwrite=overwrite, on_progress=on_progress)
    except BrokenPipeError:  # of whoever reads the plan
        raise
    except OSError as error:
        raise ElmError(f"{path}: was not made: {error.filename or 'input or output'}: {error.strerror}") from None
    return Conversion(plan, path, differences, plan.warnings + said, time.perf_counter() - start)


def _write(
    plan: Plan, path: Path, *, verify: bool, overwrite: bool, on_progress: Callable[[str, int], None]
) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
    """What `verify` found, and what there is to warn of."""
    differences: list[Difference] = []
    warnings: list[str | None] = []
    with hashing(plan.source.files) as hashes, new_directory(path, replace=overwrite) as directory:
        broken = write_weights(directory, plan.tensors, plan.dtype, progress=partial(on_progress, "write"))
        warnings.append(write_settings(plan, directory))
        if verify:
            differences = compare(plan.tensors, directory, plan.dtype, partial(on_progress, "verify"))
        _write_json(directory / "conversion.json", _record(plan, hashes()))
    if broken:
        warnings.append(f"values that are no numbers, or infinite, in {listed(broken)}")
    return tuple(differences), tuple(filter(None, warnings))


def write_settings(plan: Plan, directory: Path) -> str | None:
    """All of a model directory but the weights and where they come from. Returns what there is to warn of."""
    _write_json(directory / "config.json", plan.config.to_dict())
    if plan.generation is not None:
        _write_json(directory / "generation_config.json", plan.generation)
    if plan.tokenizer is None:
        return None
    own = plan.chat_template
    if own is not None and carry_templates(plan.source.directory, directory, default=False):
        write_text(directory / chat_template.FILE_NAME, own)  # where transformers looks for it if there are others, too
        own = None
    return tokenizers.write(plan.tokenizer, directory, max_length=plan.config.max_context_length, chat_template=own)


def _record(plan: Plan, hashes: dict[Path, str]) -> dict[str, Any]:
    """Where the model comes from. Says nothing of when or by whom: equal input gives equal bytes."""
    return {
        "tool": f"elm-mlx {__version__}",
        "source": {
            "name": plan.source.label,
            "kind": plan.source.kind,
            "revision": plan.source.revision,
            "files": [
                {"name": file.name, "bytes": file.stat().st_size, "sha256": hashes[file]} for file in plan.source.files
            ],
        },
        "config": plan.config_origin,
        "dtype": {"source": plan.source_dtype, "written": plan.dtype},
        "dropped_vocabulary_rows": plan.dropped_rows,
        "merged_adapter": {"alpha": plan.scaling.alpha, "rank_stabilised": plan.scaling.by_root}
        if plan.scaling
        else None,
        "tokenizer_sha256": sha256(plan.tokenizer) if plan.tokenizer else None,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


CHECKPOINT, SETTINGS, TOKENIZER = "checkpoint.pt", "config.yaml", "tokenizer.model"


def export(model: str | Path, destination: str | Path, *, dtype: str | None = None, overwrite: bool = False) -> Plan:
    """Writes a state dict in CoreNet's names, with CoreNet's YAML and the tokenizer, as a directory.

    Chat template and generation settings lie beside them, where `convert` finds them again; CoreNet knows neither.

    Args:
        model: a model directory, or anything else that `convert` reads.
        destination: the directory to make. It appears complete or not at all.
        dtype: float32, float16 or bfloat16; by default the model's own.
        overwrite: replace such a directory that is there.

    Raises:
        InputError: the model cannot be read, or `destination` is taken; a value overflows `dtype`.
        ElmError: it cannot be written. `destination` is as it was, here and there.
    """
    path = expanded(destination)
    try:
        check_destination(path, EXPORT, overwrite)
        plan = make_plan(model, dtype=dtype)
        if dtype is None and plan.source_dtype in FLOATS:
            plan = replace(plan, dtype=plan.source_dtype)
        check_destination(path, EXPORT, overwrite, plan.source.files)
        check_room(path, plan.nbytes)
        with new_directory(path, replace=overwrite) as directory:
            broken = write_state_dict(directory / CHECKPOINT, plan.tensors, plan.dtype)
            (directory / SETTINGS).write_text(corenet_yaml(plan.config), encoding="utf-8")
            if plan.tokenizer is not None:
                (directory / TOKENIZER).write_bytes(plan.tokenizer.read_bytes())
            if plan.chat_template is not None:
                write_text(directory / chat_template.FILE_NAME, plan.chat_template)
            if (generation := _generation(plan)) is not None:
                write_text(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    except OSError as error:
        raise ElmError(f"{path}: was not made: {error.filename or 'input or output'}: {error.strerror}") from None
    said = f"values that are no numbers, or infinite, in {listed(broken)}" if broken else None
    return replace(plan, warnings=(*plan.warnings, *([said] if said else [])))


def _generation(plan: Plan) -> dict[str, Any] | None:
    """The source's `generation_config.json`, with the end tokens that its other files name.

    An export has neither `config.json` nor `tokenizer_config.json`; what the tokenizer itself says needs no word.
    """
    if plan.tokenizer is None:
        return plan.generation
    ids = read_vocabulary(plan.tokenizer.parent, plan.config).end_ids
    if ids == Tokenizer.load(plan.tokenizer).eos_ids:
        return plan.generation
    return {**(plan.generation or {}), "eos_token_id": list(ids)}


def corenet_yaml(config: ModelConfig) -> str:
    """The options by which CoreNet, or `convert`, knows the model; of one that is no preset, shapes tell the rest."""
    import yaml

    words = {
        "model_name": preset_name(config) or "custom",
        "vocab_size": config.vocab_size,
        "max_context_length": config.max_context_length,
        "padding_index": None,
    }
    model = {
        "language_modeling": {"name": "general_gpt", "general_gpt": words},
        "normalization": {"name": "rms_norm"},
        "activation": {"name": "swish"},
    }
    return yaml.safe_dump({"model": model}, sort_keys=False)
