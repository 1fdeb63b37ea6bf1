"""A checkpoint into an MLX model directory, and a model back into CoreNet's PyTorch checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.directories import EXPORT, MODEL, carry_templates, check_destination
from elm_mlx.errors import InputError
from elm_mlx.files import write_json, write_text
from elm_mlx.model.config import ModelConfig
from elm_mlx.reading import expanded, listed
from elm_mlx.text import chat_template
from elm_mlx.text.tokenizer import Tokenizer, read_vocabulary
from elm_mlx.version import __version__
from elm_mlx_convert import gguf_model, tokenizers
from elm_mlx_convert.destination import (
    Difference,
    compare,
    failures_named,
    file_record,
    new_hashed_directory,
    sha256,
    write_weights,
)
from elm_mlx_convert.gguf_model import GgufPlan
from elm_mlx_convert.plan import ConversionPlan, make_plan
from elm_mlx_convert.source_config import preset_name
from elm_mlx_convert.sources import CheckpointSource
from elm_mlx_convert.tensors import FLOATS
from elm_mlx_convert.torch_files import write_state_dict

CHECKPOINT, SETTINGS, TOKENIZER = "checkpoint.pt", "config.yaml", "tokenizer.model"


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`.

    Args:
        destination: None after a dry run.
        differences: of each group of weights from the source, if they were verified.
        warnings: the plan's, and what only the values could tell.
        seconds: from the start to the finished directory.
    """

    plan: ConversionPlan | GgufPlan
    destination: Path | None
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    seconds: float


def convert(
    source: str | Path | CheckpointSource,
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
    on_plan: Callable[[ConversionPlan | GgufPlan], None] = lambda plan: None,
    on_progress: OnProgress = no_progress,
) -> Conversion:
    """Turns a checkpoint of an OpenELM, or a GGUF file, into a directory that this package and mlx-lm open.

    Args:
        source: a PyTorch or safetensors file, a directory of the hub's or of MLX, or a hub repository's name; or a GGUF
            file, which says itself what its model and tokenizer are; or what `open_source` has opened.
        destination: the directory to make. It appears complete or not at all.
        tokenizer: a SentencePiece model, a directory or repository that has one; by default the source's own. For a
            GGUF file a directory or repository with a `tokenizer.json`.
        config: a `config.json` or CoreNet YAML; by default the one that lies beside the source.
        preset: one of the paper's models, as in `elm_mlx.model.config.PRESETS`.
        head_dim: the size of a head, where no QK norm and no config tells it.
        lora_alpha: of an adapter in the source, which is merged.
        dtype: float32, float16 or bfloat16; by default the source's if that has 16 bits, else bfloat16. Of a
            quantized GGUF file float16, which its scales have.
        revision: of a repository.
        ema: take the moving average of a training checkpoint.
        chat_template: `openelm-instruct`, `none`, or a file of Jinja text; by default the source's own, or what
            its name implies.
        verify: read both sides back and compare every value, before the directory takes its name.
        dry_run: decide everything, write nothing.
        overwrite: replace a model directory that is there.
        on_plan: called when everything is decided.
        on_progress: called with "write" or "verify" and bytes.

    Raises:
        InputError: the source, or what was asked of it, is at fault.
        ElmError: something else failed: the hub, the disk, the verification.
        In both cases `destination` is as it was.
    """
    start = time.perf_counter()
    path = expanded(destination)
    with failures_named(path):
        check_destination(path, MODEL, overwrite)
        plan: ConversionPlan | GgufPlan
        file = None if isinstance(source, CheckpointSource) else gguf_model.find(source, revision)
        if file is not None:
            unfit = {
                "--config": config, "--preset": preset, "--head-dim": head_dim, "--lora-alpha": lora_alpha,
                "--ema": ema or None,
            }  # fmt: skip
            if asked := [option for option, value in unfit.items() if value is not None]:
                raise InputError(f"{file}: {asked[0]} is not for a GGUF file, which says itself what its model is")
            plan = gguf_model.make_plan(file, dtype=dtype, tokenizer=tokenizer, template=chat_template)
        else:
            plan = make_plan(
                source, tokenizer=tokenizer, config=config, preset=preset, head_dim=head_dim, lora_alpha=lora_alpha,
                dtype=dtype, revision=revision, ema=ema, chat_template=chat_template,
            )  # fmt: skip
        check_destination(path, MODEL, overwrite, plan.source.files)
        on_plan(plan)
        if dry_run:
            return Conversion(plan, None, (), plan.warnings, time.perf_counter() - start)
        sources = plan.source.files
        with new_hashed_directory(path, sources, plan.nbytes, overwrite=overwrite) as (directory, hashes):
            warnings, differences = _fill(directory, plan, verify, on_progress)
            write_json(directory / "conversion.json", _record(plan, hashes()))
    seconds = time.perf_counter() - start
    return Conversion(plan, path, tuple(differences), (*plan.warnings, *warnings), seconds)


def _fill(
    directory: Path, plan: ConversionPlan | GgufPlan, verify: bool, on_progress: OnProgress
) -> tuple[list[str], list[Difference]]:
    """Writes what was planned, and compares it where that is asked for. Returns warnings and differences."""
    if isinstance(plan, GgufPlan):
        warnings = gguf_model.write_model(directory, plan, on_progress)
        return warnings, gguf_model.compare(plan, directory, on_progress) if verify else []
    warnings = write_model(directory, plan, on_progress)
    return warnings, compare(plan.tensors, directory, plan.dtype, on_progress) if verify else []


def write_model(directory: Path, plan: ConversionPlan, on_progress: OnProgress) -> list[str]:
    """Fills a model directory, but for the record of what it was made of. Returns warnings."""
    broken = write_weights(directory, plan.tensors, plan.dtype, on_progress=on_progress)
    write_json(directory / "config.json", plan.config.to_dict())
    if plan.generation is not None:
        write_json(directory / "generation_config.json", plan.generation)
    return [*([warning] if (warning := _write_tokenizer(directory, plan)) else []), *_not_finite(broken)]


def _not_finite(names: list[str]) -> list[str]:
    return [f"NaN or infinite values in {listed(names)}"] if names else []


def _write_tokenizer(directory: Path, plan: ConversionPlan) -> str | None:
    """Writes the tokenizer and the chat templates. Returns a warning."""
    if plan.tokenizer is None:
        return None
    own = plan.chat_template
    if own is not None and carry_templates(plan.source.directory, directory, default=False):
        write_text(directory / chat_template.FILE_NAME, own)  # where transformers looks for it if there are others, too
        own = None
    return tokenizers.write(plan.tokenizer, directory, max_length=plan.config.max_context_length, chat_template=own)


def _record(plan: ConversionPlan | GgufPlan, hashes: dict[Path, str]) -> dict[str, Any]:
    """Returns the content of `conversion.json`, without when and by whom: equal input gives equal bytes."""
    record = {
        "tool": f"elm-mlx {__version__}",
        "source": {
            "name": plan.source.label,
            "kind": plan.source.kind,
            "revision": plan.source.revision,
            "files": file_record(plan.source.files, hashes),
        },
        "config": "its metadata" if isinstance(plan, GgufPlan) else plan.config_origin,
        "dtype": {"source": plan.source_dtype, "written": plan.dtype},
    }
    if isinstance(plan, GgufPlan):
        return record
    return record | {
        "dropped_vocabulary_rows": plan.dropped_rows,
        "merged_adapter": {"alpha": plan.scaling.alpha, "rank_stabilised": plan.scaling.by_root}
        if plan.scaling
        else None,
        "tokenizer_sha256": sha256(plan.tokenizer) if plan.tokenizer else None,
    }


def export(
    model: str | Path, destination: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> ConversionPlan:
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
    with failures_named(path):
        check_destination(path, EXPORT, overwrite)
        plan = make_plan(model, dtype=dtype)
        if dtype is None and plan.source_dtype in FLOATS:
            plan = replace(plan, dtype=plan.source_dtype)
        plan = replace(plan, warnings=(*plan.warnings, *_unsaid(plan.config)))
        check_destination(path, EXPORT, overwrite, plan.source.files)
        with new_hashed_directory(path, (), plan.nbytes, overwrite=overwrite) as (directory, _):
            broken = write_state_dict(directory / CHECKPOINT, plan.tensors, plan.dtype)
            (directory / SETTINGS).write_text(corenet_yaml(plan.config), encoding="utf-8")
            if plan.tokenizer is not None:
                (directory / TOKENIZER).write_bytes(plan.tokenizer.read_bytes())
            if plan.chat_template is not None:
                write_text(directory / chat_template.FILE_NAME, plan.chat_template)
            if (generation := _generation(plan)) is not None:
                write_json(directory / "generation_config.json", generation)
    return replace(plan, warnings=(*plan.warnings, *_not_finite(broken)))


def _generation(plan: ConversionPlan) -> dict[str, Any] | None:
    """Returns the source's `generation_config.json`, with the end tokens that its other files name.

    An export has neither `config.json` nor `tokenizer_config.json`; what the tokenizer itself says needs no word.
    """
    if plan.tokenizer is None:
        return plan.generation
    ids = read_vocabulary(plan.tokenizer.parent, plan.config).end_ids
    if ids == Tokenizer.load(plan.tokenizer).eos_ids:
        return plan.generation
    return {**(plan.generation or {}), "eos_token_id": list(ids)}


def _unsaid(config: ModelConfig) -> Iterator[str]:
    """Says what the format has no place for."""
    for name in ("rope_freq_constant", "rms_norm_eps"):
        own, usual = getattr(config, name), getattr(ModelConfig, name)
        if own != usual:
            yield (
                f"{name} is {own:g}, and the format has no place for it: who reads the result takes {usual:g}; a copy "
                "of config.json beside it, and `convert --config`, keep it"
            )


def corenet_yaml(config: ModelConfig) -> str:
    """Returns CoreNet's options of the model; where it is no preset, `convert` reads the rest off the shapes."""
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
