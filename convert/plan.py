"""The plan of a conversion, made before anything is written: tensors, names, config, vocabulary, type."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from elm_mlx.directories import own_file
from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS, ModelConfig, written_dtype
from elm_mlx.reading import json_object, listed
from elm_mlx.text import chat_template, sentencepiece_file
from elm_mlx_convert import lora_files, tokenizers
from elm_mlx_convert.names import EMBEDDING, HEAD, canonical_names, unwrapped
from elm_mlx_convert.source_config import ConfigFile, Scaling, decide, find_config_file, read_config_file
from elm_mlx_convert.sources import CheckpointSource, open_source
from elm_mlx_convert.tensors import FLOATS, ITEM_SIZES, LazyTensor


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that will be written, and how that was found out.

    Args:
        config: of the model that is written.
        config_origin: where it comes from, in words.
        source_dtype: the type that most values have in the source.
        tensors: canonical names, from input to output, not cast yet.
        generation: the source's `generation_config.json`, how it likes to be sampled.
        dropped_rows: of the embedding, past the tokenizer's last piece.
        notes: what is done that is not self-evident; warnings: what may not be wanted.
    """

    source: CheckpointSource
    config: ModelConfig
    config_origin: str
    source_dtype: str
    dtype: str
    tensors: tuple[LazyTensor, ...]
    tokenizer: Path | None
    chat_template: str | None
    generation: dict[str, Any] | None
    scaling: Scaling | None
    dropped_rows: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """The bytes of the weights, as they will be written."""
        return self.parameters * ITEM_SIZES[self.dtype]


def make_plan(
    source: str | Path | CheckpointSource,
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
) -> ConversionPlan:
    """Opens the source, unless it is open already, and decides everything. The arguments are those of `convert`.

    Raises:
        InputError: the source cannot be converted, or not as asked: says why.
        ElmError: the hub cannot be reached.
    """
    _check_flags(preset, dtype)
    notes: list[str] = []
    warnings: list[str] = []
    opened = source if isinstance(source, CheckpointSource) else open_source(source, revision=revision, ema=ema)
    settings = _settings(opened, config, preset)
    raw = unwrapped(opened.tensors, opened.label)
    sizes: Counter[str] = Counter()
    for tensor in raw.values():
        sizes[tensor.dtype] += tensor.nbytes
    source_dtype = sizes.most_common(1)[0][0]
    scaling = _scaling(raw, lora_alpha, settings, opened.label)
    merged = lora_files.merge(raw, scaling, opened.label) if scaling else raw
    untied = scaling is not None and HEAD in merged and HEAD not in raw
    tensors = _weights(merged, opened.label)
    if not untied:
        _drop_tied_head(tensors, settings, notes)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    model, origin = decide(settings, preset, shapes, opened.label, head_dim=head_dim, untied=untied)
    if scaling is not None:
        notes.append(
            f"merged its adapter, alpha {scaling.alpha:g}{' over the root of the rank' if scaling.by_root else ''}"
            + ("; its head is untied, since it reads the embedding without the adapter" if untied else "")
        )
    beside = opened.directory / "tokenizer.model"
    file = tokenizers.find(tokenizer) if tokenizer is not None else beside if beside.is_file() else None
    if file is None:
        warnings.append("no tokenizer: the model cannot read or write text; pass --tokenizer FILE|DIR|REPO")
    else:
        model = _fit_tokenizer(model, file, settings, notes, warnings)
    if not model.ffn_with_glu:
        warnings.append("its FFN has no gate (GLU), which mlx-lm cannot express: only elm-mlx opens the result")
    written = written_dtype(model, source_dtype, dtype)
    if dtype is None and (source_dtype, written) == ("float16", "bfloat16"):
        notes.append("written as bfloat16: the activations of a model this wide overflow float16")
    generation = opened.directory / "generation_config.json"
    return ConversionPlan(
        source=opened,
        config=model,
        config_origin=origin,
        source_dtype=source_dtype,
        dtype=written,
        tensors=tuple(tensors[name].first_rows(shape[0]) for name, shape in model.shapes().items()),
        tokenizer=file,
        chat_template=_chat_template(chat_template, opened, notes) if file else None,
        generation=json_object(own_file(generation)) if generation.is_file() else None,
        scaling=scaling,
        dropped_rows=shapes[EMBEDDING][0] - model.vocab_size,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _check_flags(preset: str | None, dtype: str | None) -> None:
    if preset is not None and preset not in PRESETS:
        raise InputError(f"--preset {preset}: is not one of {', '.join(PRESETS)}")
    if dtype is not None and dtype not in FLOATS:
        raise InputError(f"--dtype {dtype}: is not one of {', '.join(FLOATS)}")


def _settings(source: CheckpointSource, config: Path | None, preset: str | None) -> ConfigFile | None:
    if config is not None:
        return read_config_file(config)
    try:
        return find_config_file(source.directory)
    except InputError:
        if preset is None:
            raise
        return None  # --preset says what a file that was only found there cannot


def _scaling(
    tensors: Mapping[str, LazyTensor], alpha: float | None, settings: ConfigFile | None, where: str
) -> Scaling | None:
    """Returns how to merge the adapter, or None when there is none."""
    if not lora_files.has_adapter(tensors):
        if alpha is not None:
            raise InputError(f"--lora-alpha is for a LoRA or DoRA checkpoint, and {where} holds no adapter")
        return None
    if alpha is not None:
        if not math.isfinite(alpha):
            raise InputError(f"--lora-alpha is {alpha}: a number is needed")
        return Scaling(alpha)
    if settings is not None and settings.scaling is not None:
        return settings.scaling
    raise InputError(
        f"{where}: holds a LoRA adapter, whose strength is not in the file: pass --lora-alpha, or with --config the "
        "YAML that it was trained with"
    )


def _weights(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """Returns the tensors by canonical name. Raises InputError for what is no weight of an OpenELM, or no float."""
    packed = [name for name, tensor in tensors.items() if tensor.dtype == "uint32" or name.endswith(".scales")]
    if packed:
        raise InputError(f"{where}: is already quantized ({listed(packed)}); convert the original, then quantize it")
    weights = {name: tensors[own].renamed(name) for name, own in canonical_names(tensors, where).items()}
    for name, tensor in weights.items():
        if tensor.dtype not in (*FLOATS, "float64"):
            raise InputError(f"{where}: {name} is {tensor.dtype}; weights must be floats")
    return weights


def _drop_tied_head(tensors: dict[str, LazyTensor], settings: ConfigFile | None, notes: list[str]) -> None:
    """Drops a head that is the embedding, value for value: a tied one that was saved twice."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    says_untied = settings is not None and settings.config and not settings.config.share_input_output_layers
    if head is None or embedding is None or says_untied:
        return
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return
    if all(np.array_equal(a, b) for a, b in zip(head.blocks(), embedding.blocks(), strict=True)):
        del tensors[HEAD]
        notes.append("its head is the embedding, saved twice: written once, tied")


def _fit_tokenizer(
    config: ModelConfig, file: Path, settings: ConfigFile | None, notes: list[str], warnings: list[str]
) -> ModelConfig:
    """Returns the config with as many tokens as the tokenizer has pieces, and with its special tokens."""
    from elm_mlx.text.tokenizer import Tokenizer

    pieces, rows = sentencepiece_file.read(file).vocab_size, config.vocab_size
    tokenizer = Tokenizer.load(file)
    if pieces > rows and tokenizer.base_size > rows:
        raise InputError(f"{file}: has {pieces} pieces, but the model's embedding has {rows} rows: not its tokenizer")
    if pieces < rows:
        notes.append(f"dropped {rows - pieces} rows of the embedding, past the tokenizer's {pieces} pieces")
        if added := tokenizers.added_beside(file, pieces, rows):
            warnings.append(
                f"{listed(added)} of the rows that were dropped are tokens that were added beside {file.name}, and are "
                "not in it: the model cannot read or write them"
            )
        if rows - pieces > pieces // 8:
            warnings.append(f"{rows - pieces} rows are more than padding: is {file.name} the model's tokenizer?")
    if pieces > rows:
        notes.append(f"the tokenizer's last {pieces - rows} pieces, which were added, have no row in the embedding")
    special: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if settings is None or settings.config is None:
        config = replace(config, **{name: token for name, token in special.items() if token is not None})
    elif tokenizer.eos_id is not None and tokenizer.eos_id not in config.eos_token_ids:
        warnings.append(
            f"the tokenizer ends texts with token {tokenizer.eos_id}, the config with {config.eos_token_id}: both do"
        )
    return config.with_vocab_size(min(pieces, rows))


def _chat_template(asked: str | None, source: CheckpointSource, notes: list[str]) -> str | None:
    """Returns what was asked for, or the source's own, or the one that its name implies."""
    if asked is not None:
        return chat_template.read_source(asked)
    own, where = chat_template.own_source(source.directory, "--chat-template")
    if own is not None:
        own_file(Path(where))
        return own
    implied = chat_template.source_for(source.label)
    if implied is not None:
        notes.append("writes OpenELM-instruct's chat template, as the name says; --chat-template none for none")
    return implied
