"""A model as one GGUF file, for llama.cpp, Ollama and LM Studio; an adapter as another; and Ollama's Modelfile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.directories import check_file
from elm_mlx.errors import ElmError, InputError
from elm_mlx.files import check_room, new_file, write_text
from elm_mlx.model.config import MODEL_TYPE, Config, ModelConfig, read_config
from elm_mlx.reading import expanded, json_object_if_there
from elm_mlx.safetensors_file import weight_files
from elm_mlx.text import chat_template
from elm_mlx.text.tokenizer import Vocabulary, read_vocabulary
from elm_mlx_convert import gguf_names, gguf_weights
from elm_mlx_convert.destination import failures_named, progress_of
from elm_mlx_convert.gguf_file import GgufTensor, Metadatum, Strings, read_header, write
from elm_mlx_convert.gguf_tokenizer import tokenizer_metadata
from elm_mlx_convert.gguf_weights import Rounding, TensorPlan, Weight
from elm_mlx_convert.lora_files import LoraWeights
from elm_mlx_convert.model_card import card_metadata
from elm_mlx_convert.plan import make_plan
from elm_mlx_convert.tensors import LazyTensor, read_safetensors

AS_STORED = "as-stored"
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_1", "q4_0", AS_STORED)

# llama.cpp's `general.file_type`, by the type of most of a file's matrices.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32, "MXFP4": 38}


@dataclass(frozen=True)
class GgufExport:
    """The result of `export_gguf`.

    Args:
        types: the bytes of matrices in each GGML type, the most first.
        nbytes: of the file.
        roundings: of what the file holds otherwise than the model does.
        verified: the differences of the file from the model, if they were looked for.
        notes: what is done, or what llama.cpp does, that is not self-evident.
        modelfile: the file for Ollama, if one was written.
    """

    path: Path
    parameters: int
    types: Mapping[str, int]
    nbytes: int
    roundings: tuple[Rounding, ...]
    verified: Rounding | None
    notes: tuple[str, ...]
    modelfile: Path | None = None


@dataclass(frozen=True)
class _Source:
    """A model that is to be written."""

    label: str
    directory: Path
    files: tuple[Path, ...]
    config: Config
    weights: Mapping[str, Weight]
    vocabulary: Vocabulary
    templates: Mapping[str, str]
    notes: tuple[str, ...]


def export_gguf(
    model: str | Path,
    destination: str | Path,
    *,
    kind: str = AS_STORED,
    name: str | None = None,
    modelfile: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = no_progress,
) -> GgufExport:
    """Writes a model as a GGUF file, with its tokenizer and chat template, and what its card says of its origin.

    Args:
        model: a model directory of any family that llama.cpp has, quantized or not; or another checkpoint of an
            OpenELM that `convert` reads.
        destination: the file to make. It appears whole or not at all.
        kind: one of TYPES, for all matrices. As they are stored, none is rounded that has a GGML type of its values.
        name: what the model is called; by default as its directory or file is.
        modelfile: write `Modelfile` beside it, for `ollama create`.
        verify: read both sides back and compare every value, before the file takes its name.
        overwrite: replace a file that is there.
        on_progress: called with "write" or "verify" and bytes.

    Raises:
        InputError: the model cannot be read, llama.cpp has no such network or tokenizer, `destination` is taken, or a
            value is too large for the type.
        ElmError: it cannot be written, or not verified. `destination` is as it was, here and there.
    """
    path = expanded(destination)
    beside = path.with_name("Modelfile")
    if kind not in TYPES:
        raise InputError(f"--type {kind}: is not one of {', '.join(TYPES)}")
    with failures_named(path):
        check_file(path, overwrite)
        if modelfile:
            check_file(beside, overwrite)
        source = _open(model)
        check_sources(path, source.files)
        asked = None if kind == AS_STORED else kind.upper()
        made, extra = _plan(source, asked)
        described, notes = tokenizer_metadata(source.vocabulary, source.config.vocab_size, source.templates)
        card, unread = card_metadata(source.directory)
        metadata = _metadata(source, made, name or source.label) | card | described
        check_room(path, made.nbytes)
        verified = _write(path, metadata, made, extra, verify, on_progress)
        if modelfile:
            write_text(beside, modelfile_text(path.name, source.config, source.vocabulary, bool(source.templates)))
    if made.unfit:
        notes.append(f"{made.unfit} matrices have rows that no blocks of 32 fill: written in f16")
    return GgufExport(
        path=path,
        parameters=source.config.parameters,
        types=made.types(),
        nbytes=path.stat().st_size,
        roundings=tuple(each for each in made.roundings.values() if each.largest),
        verified=verified,
        notes=(*source.notes, *unread, *notes, *_context_notes(source.config)),
        modelfile=beside if modelfile else None,
    )


def check_sources(path: Path, files: tuple[Path, ...]) -> None:
    """Raises InputError where a file that is to be read would be replaced."""
    if path.exists() and any(path.samefile(file) for file in files):
        raise InputError(f"{path}: is the source, which is to be read: choose another")


def _open(model: str | Path) -> _Source:
    path = expanded(model)
    model_type = json_object_if_there(path / "config.json").get("model_type", MODEL_TYPE)
    if model_type == MODEL_TYPE and not ((path / "config.json").is_file() and any(path.glob("model*.safetensors"))):
        return _of_checkpoint(model)
    config = read_config(path)
    gguf_names.check_expressible(config, str(path))
    files = tuple(weight_files(path))
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        tensors |= read_safetensors(file)
    weights = gguf_weights.weights(tensors, config, str(path))
    vocabulary = read_vocabulary(path, config)
    return _Source(path.resolve().name, path, files, config, weights, vocabulary, _templates(path), vocabulary.notes)


def _of_checkpoint(model: str | Path) -> _Source:
    plan = make_plan(model)
    gguf_names.check_expressible(plan.config, plan.source.label)
    weights = {tensor.name: gguf_weights.FloatWeight(tensor) for tensor in plan.tensors}
    vocabulary = Vocabulary(None, ()) if plan.tokenizer is None else read_vocabulary(plan.tokenizer.parent, plan.config)
    templates = {"": plan.chat_template} if plan.chat_template else {}
    label = plan.source.label.removesuffix(".pt")
    notes = (*plan.notes, *plan.warnings)
    source = plan.source
    return _Source(label, source.directory, source.files, plan.config, weights, vocabulary, templates, notes)


def _templates(directory: Path) -> dict[str, str]:
    default, _ = chat_template.own_source(directory)
    if default is None:
        return {}
    with_tools = chat_template.tool_use_source(directory)
    return {"": default} | ({} if with_tools is None else {"tool_use": with_tools})


def _plan(source: _Source, asked: str | None) -> tuple[TensorPlan, list[GgufTensor]]:
    """Returns the tensors of weights, and those that divide RoPE's frequencies."""
    made = gguf_weights.plan(source.weights, source.config, asked)
    config = source.config
    if config.share_input_output_layers and not gguf_names.ARCHITECTURES[config.model_type].tied:
        gguf_weights.add_copy(made, source.weights[f"{config.embedding}.weight"], "output.weight", asked)
    divisors = gguf_names.rope_divisors(config)
    extra = [GgufTensor(name, "F32", each.shape, partial(_whole, each)) for name, each in divisors.items()]
    return made, extra


def _whole(values: np.ndarray) -> list[np.ndarray]:
    return [values]


def _metadata(source: _Source, made: TensorPlan, name: str) -> dict[str, Metadatum]:
    network = gguf_names.metadata(source.config)
    main = next(iter(made.types()), "F32")
    general: dict[str, Metadatum] = {
        "general.type": "model",
        # llama.cpp has white space behind Phi-3's control tokens swallowed by this name alone.
        "general.name": name if "phi3" not in source.config.model_type else f"phi-3 {name}",
        "general.file_type": _FILE_TYPES[main],
        "general.quantization_version": 2,
    }
    return {"general.architecture": network["general.architecture"]} | general | network


def _context_notes(config: Config) -> list[str]:
    if isinstance(config, ModelConfig) or config.rope_switch is None:
        return []
    return [
        f"its RoPE changes past {config.rope_switch:,} tokens: here by a text's length, in llama.cpp by the context "
        "that is set (--ctx-size, num_ctx)"
    ]


def _write(
    path: Path,
    metadata: Mapping[str, Metadatum],
    made: TensorPlan,
    extra: list[GgufTensor],
    verify: bool,
    on_progress: OnProgress,
) -> Rounding | None:
    with new_file(path) as file:
        write(file, metadata, [*extra, *made.tensors], progress_of(on_progress, "write", made.nbytes))
        if not verify:
            return None
        file.flush()
        header = read_header(Path(file.name))
        for key, value in metadata.items():
            if not _same(header.metadata.get(key), value):
                raise ElmError(f"verification failed: {key} was not written as it is; nothing was kept")
        for tensor in extra:
            del header.tensors[tensor.name]
        return gguf_weights.compare(made, header, progress_of(on_progress, "verify", made.nbytes))


def _same(found: object, meant: Metadatum) -> bool:
    if isinstance(found, np.ndarray) and isinstance(meant, np.ndarray):
        return np.array_equal(found, meant)
    if isinstance(found, Strings):
        return list(found) == meant
    if isinstance(meant, float):
        return isinstance(found, float) and np.float32(found) == np.float32(meant)
    return found == meant


def modelfile_text(name: str, config: Config, vocabulary: Vocabulary, chats: bool) -> str:
    """Returns the file that `ollama create` makes a model of, from a GGUF file called `name` beside it.

    It has no TEMPLATE: without one Ollama has llama.cpp render the Jinja template in the file, and a model that has
    none gets the plain prompt.
    """
    lines = [f"FROM ./{name}", f"PARAMETER num_ctx {config.max_context_length}"]
    tokenizer = vocabulary.tokenizer
    if tokenizer is not None:
        lines += [f"PARAMETER stop {_quoted(tokenizer.piece_of(token))}" for token in vocabulary.end_ids]
    if not chats:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    """Returns a Modelfile's value in quotes, within which Ollama knows no escapes."""
    return f'"""{value}"""' if '"' in value else f'"{value}"'


def write_gguf_adapter(
    destination: str | Path, adapter: LoraWeights, config: Config, name: str, *, overwrite: bool = False
) -> Path:
    """Writes a LoRA adapter as llama.cpp's `--lora` and Ollama's ADAPTER read it, for the GGUF file of its model.

    The matrices are float32. Where the model's weight is two tensors there, both have the first matrix.

    Args:
        adapter: its arrays by the model's own names.
        config: of the model.
        name: what it is called.

    Raises:
        InputError: llama.cpp has no such adapter or no such model, or `destination` is taken.
        ElmError: it cannot be written. `destination` is as it was, here and there.
    """
    path = expanded(destination)
    with failures_named(path):
        check_file(path, overwrite)
        gguf_names.check_expressible(config, name)
        if adapter.dora:
            raise InputError(f"{name}: is a DoRA adapter, which llama.cpp does not have: fuse it, and export the model")
        if config.embedding in adapter.ranks:
            raise InputError(
                f"{name}: adapts the embedding, which is the head too, and llama.cpp cannot tell the two: fuse it, and "
                "export the model"
            )
        tensors = _adapter_tensors(adapter, config)
        architecture = gguf_names.metadata(config)["general.architecture"]
        metadata: dict[str, Metadatum] = {
            "general.architecture": architecture,
            "general.type": "adapter",
            "general.name": name,
            "general.file_type": 0,
            "adapter.type": "lora",
            "adapter.lora.alpha": _alpha(adapter) or 1.0,
        }
        with new_file(path) as file:
            write(file, metadata, tensors)
    return path


def _alpha(adapter: LoraWeights) -> float | None:
    """Returns what llama.cpp divides by each matrix's rank, which is the scale; None where no number does that for all.

    0 means 1 there.
    """
    ranks = set(adapter.ranks.values())
    return adapter.scale * ranks.pop() or None if len(ranks) == 1 else None


def _adapter_tensors(adapter: LoraWeights, config: Config) -> list[GgufTensor]:
    differ = _alpha(adapter) is None
    tensors = []
    for module, rank in adapter.ranks.items():
        first, second = (np.asarray(adapter.arrays[f"{module}.lora_{x}"], np.float32).T for x in "ab")
        if differ:
            second = second * np.float32(adapter.scale * rank)
        for part in gguf_names.parts(f"{module}.weight", len(second), config):
            rows = second[part.start : part.stop]
            rows = gguf_names.interleaved(rows, part.heads) if part.heads else rows
            for end, values in (("a", first), ("b", rows)):
                tensors.append(GgufTensor(f"{part.name}.lora_{end}", "F32", values.shape, partial(_whole, values)))
    return tensors
