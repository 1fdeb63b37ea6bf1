"""mlx-lm's learned methods: AWQ, DWQ and GPTQ, called on a model directory.

Knows how each is called, what it needs and for which networks it works. The methods are mlx-lm's, and so is the network
that they run on. AWQ (Lin et al., 2023) scales and clips weights so that those of large activations are rounded well;
GPTQ (Frantar et al., 2022) lets the weights that are yet to be rounded make up for those that were; DWQ trains the
groups' scales and biases until the model says what the original does. Imports mlx-lm where it is called.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from elm_mlx import device
from elm_mlx.errors import InputError
from elm_mlx.model.config import MODEL_TYPE
from elm_mlx.model.families import Config, FamilyConfig
from elm_mlx.quantize.bit_plan import Tensors
from elm_mlx.quantize.recipe import Format

WINDOW = 256
_SEED = 0
_DWQ_BATCH = 4


def check_network(method: str, config: Config) -> None:
    """Raises InputError where `method` cannot be had for networks of this kind."""
    from mlx_lm.quant import awq

    if isinstance(config, FamilyConfig) and config.family.bare_norms:
        raise InputError(f"--method {method}: mlx-lm's own network of {config.family.name} does not run; leave it out")
    if method == "awq" and isinstance(config, FamilyConfig) and config.model_type not in awq.AWQ_MODEL_CONFIGS:
        raise InputError(
            f"--method awq: mlx-lm does not know where a {config.model_type} model's layers take their scales"
        )


def quantize(
    path: Path,
    method: str,
    formats: Mapping[str, Format],
    how: Format,
    ids: Sequence[int],
    dtype: mx.Dtype,
    rate: float,
) -> tuple[Tensors, dict[str, Format]]:
    """A model directory's tensors, those of quantized weights packed, and what format each has.

    Args:
        formats: of each weight; DWQ starts from it, for the others it must be `how` throughout.
        ids: of the text to learn from, without BOS.
        dtype: of scales, biases, and what stays as it is.
        rate: DWQ's learning rate.

    Raises:
        InputError: the method cannot do this model, or the text is too short.
    """
    data = _windows(ids)
    odd = next((name for name, own in formats.items() if own != how), None)
    if odd is not None and method != "dwq":
        raise InputError(
            f"--method {method} wants the same groups everywhere, and {odd} needs {formats[odd]}: choose --group-size "
            f"{formats[odd].group_size}"
        )
    with _quiet():
        model, model_type = _load(path)
        if method == "gptq":
            _gptq(model, data, how)
        elif method == "awq":
            _awq(model, model_type, data, how)
        else:
            _dwq(model, path, formats, data, rate)
    return _tensors(model, dtype), _formats(model)


def _windows(ids: Sequence[int]) -> mx.array:
    """`(windows, WINDOW)`, whole ones only."""
    count = len(ids) // WINDOW
    if count < 2 * _DWQ_BATCH:
        raise InputError(f"the calibration text has {len(ids):,} tokens, and {2 * _DWQ_BATCH * WINDOW:,} are needed")
    return mx.array(list(ids[: count * WINDOW])).reshape(count, WINDOW)


def _load(path: Path) -> tuple[nn.Module, str]:
    """mlx-lm's network, in what this machine computes fast; float16 is too narrow for what the methods sum."""
    from mlx_lm import utils

    try:
        model, config = utils.load_model(path)
    except ValueError as error:
        raise InputError(f"{path}: mlx-lm, whose methods these are, cannot open it: {error}") from None
    model.set_dtype(mx.bfloat16 if device.on_gpu() else mx.float32)
    return model, str(config["model_type"])


def _gptq(model: nn.Module, data: mx.array, how: Format) -> None:
    """Embeddings have no inputs to learn from: mlx-lm rounds those."""
    from mlx_lm.quant import gptq

    gptq.gptq_quantize(model, data, how.bits, how.group_size, how.bits, how.group_size, batch_size=1)


def _awq(model: nn.Module, model_type: str, data: mx.array, how: Format) -> None:
    from mlx_lm.quant import awq

    options = {
        "group_size": how.group_size, "bits": how.bits, "embed_group_size": how.group_size, "embed_bits": how.bits,
    }  # fmt: skip
    if model_type != MODEL_TYPE:
        awq.awq_quantize(model, data, awq.AWQ_MODEL_CONFIGS[model_type], **options)
        return
    view = nn.Module()  # mlx-lm looks for the embedding in `.model`, and OpenELM has it in `.transformer`
    view.model, view.layers = model.transformer, model.layers
    if "lm_head" in model:
        view.lm_head = model.lm_head
    awq.awq_quantize(view, data, _openelm(awq), **options)
    if "lm_head" in model:
        model.lm_head = view.lm_head


def _openelm(awq: Any) -> Any:
    """Where OpenELM's scales go: of what a norm feeds. Not of `out_proj`, whose heads share keys and values, nor of
    `proj_2`, as gate and up are halves of one matrix in front of it; these are clipped all the same."""
    return awq.AWQConfig(
        embed="token_embeddings",
        lm_head="lm_head",
        no_clip=["qkv_proj"],
        scale_configs=[
            awq.ScaleConfig(block="attn", prev="attn_norm", layers=["qkv_proj"], kwargs=["mask"]),
            awq.ScaleConfig(block="ffn", prev="ffn_norm", layers=["proj_1"]),
        ],
    )


def _dwq(model: nn.Module, path: Path, formats: Mapping[str, Format], data: mx.array, rate: float) -> None:
    import mlx.optimizers as optimizers
    import numpy as np
    from mlx_lm.quant import dwq

    teacher, _ = _load(path)
    nn.quantize(model, class_predicate=lambda name, _: formats[name].packing() if name in formats else False)
    rows: list[tuple[list[int], int]] = [(row, 0) for row in np.array(data).tolist()]
    np.random.seed(_SEED)  # mlx-lm shuffles by the global state
    dwq.dwq_quantize(
        model, lambda batch, index, split: teacher(batch), optimizers.Adam(rate, bias_correction=True),
        rows[_DWQ_BATCH:], rows[:_DWQ_BATCH], batch_size=_DWQ_BATCH, max_seq_length=WINDOW, seed=_SEED,
        dtype=mx.bfloat16 if device.on_gpu() else mx.float32,
    )  # fmt: skip


def _tensors(model: nn.Module, dtype: mx.Dtype) -> Tensors:
    found = dict(tree_flatten(model.parameters()))
    return {
        name: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value for name, value in found.items()
    }


def _formats(model: nn.Module) -> dict[str, Format]:
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {
        name: Format(module.bits, module.group_size, module.mode) for name, module in leaves if hasattr(module, "bits")
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """mlx-lm's lines and bars to stderr where someone is looking, and nowhere else."""
    stream = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield
