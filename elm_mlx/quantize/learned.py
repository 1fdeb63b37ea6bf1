"""mlx-lm's learned methods: AWQ, DWQ and GPTQ, called on a model directory.

The methods are mlx-lm's, and so is the network that they run on. AWQ (Lin et al., 2023) scales and clips weights so
that those of large activations are rounded well; GPTQ (Frantar et al., 2022) lets the weights that are yet to be
rounded make up for those that were; DWQ trains the groups' scales and biases until the output is the original's.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from elm_mlx import device
from elm_mlx.errors import InputError
from elm_mlx.model.config import MODEL_TYPE, Config
from elm_mlx.model.families import FamilyConfig
from elm_mlx.quantize.recipe import Format, QuantizationRecipe

WINDOW = 256
_SEED = 0
_DWQ_BATCH = 4


def check_network(method: str, config: Config) -> None:
    """Raises InputError where `method` cannot do networks of this kind."""
    from mlx_lm.quant import awq

    if isinstance(config, FamilyConfig) and config.family.bare_norms:
        raise InputError(f"--method {method}: mlx-lm's own network of {config.family.name} does not run; leave it out")
    if isinstance(config, FamilyConfig) and config.own_head:
        raise InputError(
            f"--method {method}: the weights have a head of their own, and config.json says that they have none; "
            "mlx-lm, whose method this is, would drop it; leave --method out"
        )
    if method == "awq" and isinstance(config, FamilyConfig) and config.model_type not in awq.AWQ_MODEL_CONFIGS:
        raise InputError(f"--method awq: mlx-lm's AWQ does not support the model_type {config.model_type}")


def quantize(
    path: Path, recipe: QuantizationRecipe, formats: Mapping[str, Format], ids: Sequence[int], dtype: mx.Dtype
) -> tuple[dict[str, mx.array], dict[str, Format]]:
    """Returns a model directory's tensors, those of quantized weights packed, and the format of each.

    Args:
        formats: of each weight; DWQ starts from it, for the others it must be the recipe's throughout.
        ids: of the text to learn from, without BOS.
        dtype: of scales, biases, and what stays as it is.

    Raises:
        InputError: the method cannot do this model, or the text is too short.
    """
    how, method = recipe.how, recipe.method
    count = len(ids) // WINDOW  # whole windows only
    if count < 2 * _DWQ_BATCH:
        raise InputError(f"the calibration text has {len(ids):,} tokens, and {2 * _DWQ_BATCH * WINDOW:,} are needed")
    data = mx.array(list(ids[: count * WINDOW])).reshape(count, WINDOW)
    odd = next((name for name, own in formats.items() if own != how), None)
    if odd is not None and method != "dwq":
        raise InputError(
            f"--method {method} wants the same groups everywhere, but {odd} needs {formats[odd]}: choose --group-size "
            f"{formats[odd].group_size}"
        )
    with _quiet():
        model, model_type = _load(path)
        if method == "gptq":
            from mlx_lm.quant import gptq

            # Embeddings have no inputs to learn from: mlx-lm rounds those.
            gptq.gptq_quantize(model, data, how.bits, how.group_size, how.bits, how.group_size, batch_size=1)
        elif method == "awq":
            _awq(model, model_type, data, how)
        else:
            _dwq(model, path, formats, data, recipe.rate)
    tensors = {
        name: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value
        for name, value in tree_flatten(model.parameters())
    }
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    made = {name: Format(each.bits, each.group_size, each.mode) for name, each in leaves if hasattr(each, "bits")}
    return tensors, made


def _load(path: Path) -> tuple[nn.Module, str]:
    """mlx-lm's network, in what this machine computes fast; float16 is too narrow for what the methods sum."""
    from mlx_lm import utils

    try:
        model, config = utils.load_model(path)
    except ValueError as error:
        raise InputError(f"{path}: mlx-lm, whose methods these are, cannot open it: {error}") from None
    model.set_dtype(mx.bfloat16 if device.on_gpu() else mx.float32)
    return model, str(config["model_type"])


def _awq(model: nn.Module, model_type: str, data: mx.array, how: Format) -> None:
    from mlx_lm.quant import awq

    options = {
        "group_size": how.group_size, "bits": how.bits, "embed_group_size": how.group_size, "embed_bits": how.bits,
    }  # fmt: skip
    if model_type != MODEL_TYPE:
        awq.awq_quantize(model, data, awq.AWQ_MODEL_CONFIGS[model_type], **options)
        return
    # Scales of what a norm feeds. Not of `out_proj`, whose heads share keys and values, nor of `proj_2`, as gate and
    # up are halves of one matrix in front of it; these are clipped all the same.
    scales = [
        awq.ScaleConfig(block="attn", prev="attn_norm", layers=["qkv_proj"], kwargs=["mask"]),
        awq.ScaleConfig(block="ffn", prev="ffn_norm", layers=["proj_1"]),
    ]
    config = awq.AWQConfig(
        embed="token_embeddings", lm_head="lm_head", no_clip=["qkv_proj"], scale_configs=scales
    )  # fmt: skip
    view = nn.Module()  # mlx-lm looks for the embedding in `.model`, and OpenELM has it in `.transformer`
    view.model, view.layers = model.transformer, model.layers
    if "lm_head" in model:
        view.lm_head = model.lm_head
    awq.awq_quantize(view, data, config, **options)
    if "lm_head" in model:
        model.lm_head = view.lm_head


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Sends mlx-lm's lines and bars to stderr where that is a terminal, and nowhere else."""
    stream = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield
