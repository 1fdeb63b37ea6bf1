"""An adapter from one tool's files to another's: of mlx-lm's layout, of PEFT's, a CoreNet checkpoint, or to GGUF.

`elm_mlx_convert` reads and writes the files of the others.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

import elm_mlx_convert
from elm_mlx import directories, files
from elm_mlx.errors import InputError
from elm_mlx.model.config import Config, read_config
from elm_mlx.model.families import FamilyConfig
from elm_mlx.store import adapters
from elm_mlx.store.adapters import Adapter
from elm_mlx.text import chat_template
from elm_mlx_convert import LoraWeights


def convert_adapter(
    model: Path,
    src: Path,
    dst: Path,
    *,
    to: str = "mlx",
    alpha: float | None = None,
    settings: Path | None = None,
    overwrite: bool = False,
) -> Adapter:
    """Reads the adapter `src` for the model in `model`, and writes it to `dst`, which appears whole or not at all.

    The chat template that it was trained by goes with it.

    Args:
        to: "mlx" or "peft".
        alpha: strength of a CoreNet adapter; or it is in its YAML, `settings` or beside `src`.

    Raises:
        InputError: `src` cannot be read or does not fit, `dst` is taken, or the layout cannot express the adapter.
        ElmError: it cannot be written.
    """
    config = read_config(model)
    directories.check_destination(dst, directories.ADAPTER, overwrite, (src, model))
    found, values = _read(model, src, config, alpha, settings)
    with files.new_directory(dst, replace=overwrite) as directory:
        if to == "peft":
            if adapters.EMBEDDING in found.ranks and found.adapted_head and config.share_input_output_layers:
                raise InputError(
                    f"{src}: PEFT's tied head reads the base embedding, but this adapter's the adapted one: fuse it"
                )
            plain = LoraWeights(found.kind == "dora", found.scale, found.dropout, values)
            elm_mlx_convert.write_peft(directory, plain)
        else:
            adapters.write(directory, found, {name: mx.array(value) for name, value in values.items()}, config)
        trained_by, _ = chat_template.own_source(src)
        if trained_by is not None:
            chat_template.record(directory, trained_by)
    return found


def export_adapter(model: Path, src: Path, dst: Path, *, overwrite: bool = False) -> Adapter:
    """Writes the LoRA adapter `src` as a GGUF file, for the file of the model in `model`; whole, or not at all.

    Raises:
        InputError: `src` cannot be read or does not fit, `dst` is taken, or llama.cpp has no such adapter.
        ElmError: it cannot be written.
    """
    config = read_config(model)
    found, values = _read(model, src, config, None, None)
    plain = LoraWeights(found.kind == "dora", found.scale, found.dropout, values)
    elm_mlx_convert.write_gguf_adapter(dst, plain, config, src.resolve().name, overwrite=overwrite)
    return found


def _read(
    model: Path, src: Path, config: Config, alpha: float | None, settings: Path | None
) -> tuple[Adapter, dict[str, np.ndarray]]:
    if (src / adapters.CONFIG).is_file():
        adapter = adapters.read(src, config, model)
        if adapter.kind == "full":
            raise InputError(f"{src}: weights of the whole model are not an adapter; `elm-mlx fuse` merges them")
        return adapter, {name: np.array(value) for name, value in adapters.read_values(adapter, config).items()}
    if not src.exists():
        raise InputError(f"{src}: no such file or directory")
    if isinstance(config, FamilyConfig):
        raise InputError(f"{src}: holds no {adapters.CONFIG}, which an adapter of a {config.family.name} has")
    found = elm_mlx_convert.read_corenet(src, config, alpha=alpha, settings=settings)
    odd = next((name for name, value in found.arrays.items() if not np.isfinite(value).all()), None)
    if odd is not None:
        raise InputError(f"{src}: {odd} holds NaN or infinite values")
    return adapters.of_weights(found), dict(found.arrays)
