"""The shape of an OpenELM: the layer-wise scaling rule, the four presets, and `config.json`, of any known family.

Importing this imports no MLX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from elm_mlx.errors import InputError
from elm_mlx.reading import Keys, expanded, json_object, short

if TYPE_CHECKING:
    from elm_mlx.model.families import FamilyConfig

Config: TypeAlias = "ModelConfig | FamilyConfig"

MODEL_TYPE = "openelm"
# Of quantized weights: MLX reads 1 bit too. Each mode of floats, microscaling (OCP MX 1.0) and NVIDIA's, has one number
# of bits and one group size.
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
AFFINE = "affine"
FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
LINEARS = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")  # of a layer

# The keys of an OpenELM's config.json that have one value.
_FIXED = {"model_type": MODEL_TYPE, "activation_fn_name": "swish", "normalization_layer_name": "rms_norm"}
# A config.json may come from anywhere. Far above every model that is known, and what is built of such figures alone,
# before any weight is looked at, is small.
_MAX_LAYERS = 10_000
_MOST = {"vocab_size": 1 << 24, "model_dim": 1 << 20, "head_dim": 1 << 12, "ffn_dim_divisor": 1 << 20}
_MAX_WIDTH = 1 << 24  # of any weight of a layer
_WIDE = 3072  # the 3B's: float16 cannot hold its activations; nothing smaller is known to need more


def make_divisible(value: float, divisor: int) -> int:
    """Returns the multiple of `divisor` nearest to `value`, at least `divisor`, never more than 10 % below."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def spread(multiplier: float | Sequence[float], num_layers: int) -> list[float]:
    """Returns a multiplier for each layer: a pair is interpolated (paper, section 2.1), a number repeated."""
    if isinstance(multiplier, (int, float)):
        return [float(multiplier)] * num_layers
    low, high = multiplier
    step = (high - low) / (num_layers - 1) if num_layers > 1 else 0.0
    values = [low + step * layer for layer in range(num_layers)]
    if num_layers > 1:
        values[-1] = high
    # numpy's rounding, which CoreNet uses: scaled, then half to even. Python's round(v, 2) differs at the halves.
    return [round(v * 100) / 100 for v in values]


@dataclass(frozen=True)
class ModelConfig:
    """An OpenELM's shape. Field names are those of the `config.json` on the hub.

    Args:
        num_query_heads: query heads of each layer, first to last.
        num_kv_heads: key/value heads of each layer; each divides its query heads.
        ffn_multipliers: FFN width of each layer as a share of `model_dim`, before
            rounding to a multiple of `ffn_dim_divisor`.

    Raises:
        InputError: when the fields contradict each other.
    """

    vocab_size: int
    model_dim: int
    head_dim: int
    num_query_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    ffn_multipliers: tuple[float, ...]
    ffn_dim_divisor: int = 256
    ffn_with_glu: bool = True
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    rms_norm_eps: float = 1e-6
    rope_freq_constant: float = 10_000.0
    max_context_length: int = 2048
    rope_max_length: int = 4096
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2
    # {"group_size", "bits", …}, as mlx-lm writes it.
    quantization: Mapping[str, Any] | None = field(default=None, hash=False)

    # As of a FamilyConfig, and the same in every OpenELM. Without annotations: no fields.
    model_type = MODEL_TYPE
    positions = True
    rope_switch = None
    embedding = "transformer.token_embeddings"
    layers_prefix = "transformer.layers"
    linears = LINEARS

    def __post_init__(self) -> None:
        self._check()

    @property
    def num_layers(self) -> int:
        return len(self.num_query_heads)

    @property
    def ffn_dims(self) -> tuple[int, ...]:
        """The FFN width of each layer: the inputs of `proj_2`, half of the outputs of `proj_1` under GLU."""
        return tuple(make_divisible(m * self.model_dim, self.ffn_dim_divisor) for m in self.ffn_multipliers)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns every weight's canonical name and shape, from input to output."""
        dim, head = self.model_dim, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"transformer.token_embeddings.weight": (self.vocab_size, dim)}
        for i, (q, kv, ffn) in enumerate(zip(self.num_query_heads, self.num_kv_heads, self.ffn_dims, strict=True)):
            layer = f"transformer.layers.{i}"
            shapes[f"{layer}.attn_norm.weight"] = (dim,)
            shapes[f"{layer}.attn.qkv_proj.weight"] = ((q + 2 * kv) * head, dim)
            if self.normalize_qk_projections:
                shapes[f"{layer}.attn.q_norm.weight"] = (head,)
                shapes[f"{layer}.attn.k_norm.weight"] = (head,)
            shapes[f"{layer}.attn.out_proj.weight"] = (dim, q * head)
            shapes[f"{layer}.ffn_norm.weight"] = (dim,)
            shapes[f"{layer}.ffn.proj_1.weight"] = (2 * ffn if self.ffn_with_glu else ffn, dim)
            shapes[f"{layer}.ffn.proj_2.weight"] = (dim, ffn)
        shapes["transformer.norm.weight"] = (dim,)
        if not self.share_input_output_layers:
            shapes["lm_head.weight"] = (self.vocab_size, dim)
        return shapes

    def modules(self) -> list[str]:
        """Returns the modules that can have an adapter, in the model's order: the embedding, linears, the head."""
        return [name.removesuffix(".weight") for name, shape in self.shapes().items() if len(shape) == 2]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Returns the size of the KV cache for one token over all layers."""
        return 2 * sum(self.num_kv_heads) * self.head_dim * bytes_per_value

    @classmethod
    def scaled(
        cls,
        *,
        vocab_size: int,
        num_layers: int,
        model_dim: int,
        head_dim: int,
        num_gqa_groups: int = 4,
        qkv_multipliers: float | Sequence[float] = (0.5, 1.0),
        ffn_multipliers: float | Sequence[float] = (0.5, 4.0),
        **fields: Any,
    ) -> ModelConfig:
        """Applies the layer-wise scaling rule (paper, section 2.1): multipliers grow linearly with depth.

        `num_gqa_groups` is query heads per key/value head. A number in place of a pair of multipliers gives a uniform
        model.

        Raises:
            InputError: when the fields contradict each other, or there are too many layers.
        """
        if num_layers > _MAX_LAYERS:
            raise InputError(f"num_layers is {num_layers}: at most {_MAX_LAYERS:,} are possible")
        query_heads = [
            make_divisible(model_dim * m, head_dim * num_gqa_groups) // head_dim
            for m in spread(qkv_multipliers, num_layers)
        ]
        return cls(
            vocab_size=vocab_size,
            model_dim=model_dim,
            head_dim=head_dim,
            num_query_heads=tuple(query_heads),
            num_kv_heads=tuple(heads // num_gqa_groups for heads in query_heads),
            ffn_multipliers=tuple(spread(ffn_multipliers, num_layers)),
            **fields,
        )

    @classmethod
    def preset(cls, name: str, vocab_size: int = 32_000) -> ModelConfig:
        """Returns one of the paper's four models: `OpenELM-270M`, `-450M`, `-1_1B`, `-3B`."""
        if name not in PRESETS:
            raise InputError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
        num_layers, model_dim, head_dim = PRESETS[name]
        return cls.scaled(vocab_size=vocab_size, num_layers=num_layers, model_dim=model_dim, head_dim=head_dim)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads the keys of a `config.json`; those that say nothing about shape are ignored.

        The lists may be absent where `qkv_multipliers`, a pair of `ffn_multipliers` and `num_gqa_groups` say the same,
        as in CoreNet.

        Raises:
            InputError: a key is missing or makes no sense: names it, and `where` it was read.
        """
        keys = Keys(where, values)
        for name, value in _FIXED.items():
            keys.word(name, (value,), value)
        num_layers = keys.size("num_transformer_layers", most=_MAX_LAYERS)
        known = {name: values[name] for name in cls.__dataclass_fields__ if values.get(name) is not None}
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
        try:
            if "num_query_heads" not in known:
                rule = {k: values[k] for k in ("num_gqa_groups", "qkv_multipliers", "ffn_multipliers") if k in values}
                return cls.scaled(num_layers=num_layers, **{**known, **rule})
            if len(known["ffn_multipliers"]) != num_layers:
                known["ffn_multipliers"] = tuple(spread(known["ffn_multipliers"], num_layers))
            for name in ("num_query_heads", "num_kv_heads"):
                if len(known[name]) != num_layers:
                    raise InputError(f"{name} has {len(known[name])} entries for num_transformer_layers {num_layers}")
            return cls(**known)
        except KeyError as error:
            raise InputError(f"{where}: {error.args[0]} is missing") from None
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise InputError(f"{where}: a value has the wrong type or size: {error}") from None

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Reads a `config.json`. Raises InputError when it cannot be read."""
        return cls.from_dict(json_object(path), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Returns the keys of a `config.json` that this package, mlx-lm and the hub's code read alike."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "quantization"}
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        values |= {  # in this order: a pretraining run is known by a hash of it
            "model_type": MODEL_TYPE,
            "architectures": ["OpenELMForCausalLM"],
            "num_transformer_layers": self.num_layers,
            **_FIXED,
        }  # fmt: skip
        if self.quantization is not None:
            values["quantization"] = dict(self.quantization)
        return values

    def with_vocab_size(self, vocab_size: int) -> ModelConfig:
        return replace(self, vocab_size=vocab_size)

    def _check(self) -> None:
        def require(name: str, needed: str, holds: bool) -> None:
            if not holds:
                raise InputError(f"{name} is {short(getattr(self, name))}: {needed} is needed")

        for name in ("vocab_size", "model_dim", "head_dim", "ffn_dim_divisor", "max_context_length", "rope_max_length"):
            most = _MOST.get(name, 2**31 - 1)
            require(name, f"a whole number from 1 to {most:,}", _is_size(getattr(self, name), most))
        for name in ("ffn_with_glu", "normalize_qk_projections", "share_input_output_layers"):
            require(name, "true or false", isinstance(getattr(self, name), bool))
        require("rms_norm_eps", "a small number", _is_number(self.rms_norm_eps, 0, 1))
        require("rope_freq_constant", "a number", _is_number(self.rope_freq_constant, 1, 1e12))
        for name in ("bos_token_id", "eos_token_id"):
            ids = getattr(self, name)
            ids = ids if isinstance(ids, tuple) and name == "eos_token_id" else (ids,)
            require(name, "a token id, or for the end several,", all(type(i) is int and 0 <= i < 2**31 for i in ids))
        require("quantization", "an object", isinstance(self.quantization, (Mapping, type(None))))
        lengths = {len(self.num_query_heads), len(self.num_kv_heads), len(self.ffn_multipliers)}
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(
                "num_query_heads, num_kv_heads and ffn_multipliers need one entry a layer, but have "
                f"{len(self.num_query_heads)}, {len(self.num_kv_heads)} and {len(self.ffn_multipliers)}"
            )
        for layer, (query, kv) in enumerate(zip(self.num_query_heads, self.num_kv_heads, strict=True)):
            most = _MAX_WIDTH // self.head_dim
            if not _is_size(query, most) or not _is_size(kv, most) or query % kv:
                raise InputError(f"layer {layer}: {short(query)} query heads cannot share {short(kv)} key/value heads")
        for multiplier in self.ffn_multipliers:
            most = _MAX_WIDTH // self.model_dim
            if not _is_number(multiplier, 0, most) or multiplier == 0:
                needed = f"a number above 0 and at most {most:,}"
                raise InputError(f"an ffn multiplier is {short(multiplier)}: {needed} is needed")
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}: RoPE rotates pairs, so it must be even")


def read_config(directory: str | Path, with_tokenizer: bool = False) -> Config:
    """Reads the `config.json` of a model directory, of an OpenELM or of another family, in its normal form.

    Its `eos_token_ids` are those that the file names.

    Args:
        with_tokenizer: refuse a directory without one.

    Raises:
        InputError: it is no model directory: says what it is, and what to do; or the config cannot be read, is of a
            family that is not known here, or a value in it makes no sense.
    """
    directory = expanded(directory)
    path = directory / "config.json"
    if not path.exists():
        from elm_mlx import directories

        raise directories.not_a_model(directory)
    values = json_object(path)
    keys, model_type = Keys(str(path), values), values.get("model_type", MODEL_TYPE)
    _check_quantization(keys)
    config: Config
    if model_type == MODEL_TYPE:
        config = ModelConfig.from_dict(values, where=str(path))
        config = config if keys.says("eos_token_id") else replace(config, eos_token_id=())
    else:
        from elm_mlx.model import families

        config = families.read(keys, directory)
    if with_tokenizer and tokenizer_file(directory, config.model_type) is None:
        from elm_mlx import directories

        raise directories.no_tokenizer(directory, model_type == MODEL_TYPE)
    return config


def written_dtype(config: Config, stored: str, asked: str | None = None) -> str:
    """Returns the type to write weights in that are `stored` in another: `asked`, or the one of 16 bits that suits.

    Raises:
        InputError: float16 is asked for, which the activations of a model as wide as OpenELM-3B overflow.
    """
    overflows = config.model_type == MODEL_TYPE and config.model_dim >= _WIDE
    if asked == "float16" and overflows:
        raise InputError(
            "--dtype float16: the activations of a model as wide as the 3B overflow float16; use bfloat16 or float32"
        )
    return asked or ("float16" if stored == "float16" and not overflows else "bfloat16")


def tokenizer_file(directory: Path, model_type: str) -> Path | None:
    """Returns the file that the text of a model directory is encoded by; None where it has none.

    Of other families than OpenELM it is `tokenizer.json`: a `tokenizer.model` beside it lacks their control tokens.
    """
    names = ("tokenizer.model",) if model_type == MODEL_TYPE else ("tokenizer.json", "tokenizer.model")
    return next((directory / name for name in names if (directory / name).exists()), None)


def _is_size(value: object, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _is_number(value: object, low: float, high: float) -> bool:
    """A NaN is not: it is on neither side of a limit."""
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]


def _check_quantization(keys: Keys) -> None:
    """Raises InputError for quantized weights that MLX cannot read as a config describes them."""
    if keys.says("quantization"):
        check_quantization(keys.where, keys.get("quantization"))
    elif keys.within("quantization_config").says("quant_method"):
        method = str(keys.within("quantization_config").get("quant_method"))[:40]
        raise InputError(
            f"{keys.where}: quantized by {method}; `mlx_lm.convert --hf-path` makes a directory that can be read"
        )


def check_quantization(where: str, quantization: object) -> None:
    """Refuses a `quantization` that does not say how all weights are packed, and those that it names.

    Raises:
        InputError: a key is missing, or MLX has nothing for its value: names `where` and the key.
    """
    where = f"{where}: quantization"
    _check_packing(where, quantization)
    assert isinstance(quantization, Mapping)
    for name, own in quantization.items():
        if name not in ("bits", "group_size", "mode") and not isinstance(own, (bool, str)):
            _check_packing(f"{where} of {short(name)}", own)


def _check_packing(where: str, how: object) -> None:
    if not isinstance(how, Mapping):
        raise InputError(f"{where} is {short(how)}: an object is needed")
    bits, group_size = how.get("bits"), how.get("group_size")
    mode = Keys(where, how).word("mode", (AFFINE, *FLOATS), AFFINE)
    if type(bits) is not int or type(group_size) is not int:
        raise InputError(f"{where}: bits {short(bits)}, group_size {short(group_size)}: whole numbers are needed")
    known = (bits in (1, *BITS) and group_size in GROUPS) if mode == AFFINE else (bits, group_size) == FLOATS[mode]
    if not known:
        raise InputError(f"{where}: MLX does not support {mode} of {short(bits)} bits in groups of {short(group_size)}")


# layers, model_dim, head_dim (paper, table 9 of the appendix; CoreNet's general_gpt.py)
PRESETS: dict[str, tuple[int, int, int]] = {
    "OpenELM-270M": (16, 1280, 64),
    "OpenELM-450M": (20, 1536, 64),
    "OpenELM-1_1B": (28, 2048, 64),
    "OpenELM-3B": (36, 3072, 128),
}
