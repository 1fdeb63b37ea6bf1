"""RoPE in a `config.json`: its kinds as transformers 4 and 5 write them, in one normal form, every value checked.

`rope` rotates by it. Importing this imports no MLX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from elm_mlx.errors import InputError
from elm_mlx.reading import Keys

LAYER_TYPES = ("full_attention", "sliding_attention")
KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_MAX_FACTOR = 1e6  # of a factor: far above what any model has


@dataclass(frozen=True)
class RopeConfig:
    """RoPE of a head's queries and keys.

    Attributes:
        kind: one of `KINDS`.
        dims: the number of a head's values that are rotated, the first ones, in pairs half of them apart.
        theta: the base of the frequencies.
        original: the context length in training, before RoPE was scaled. With "longrope" and "dynamic" a longer text
            has other frequencies than a shorter one.
        scale: a factor of the rotated values.
        factor: of "linear", "dynamic", "yarn" and "llama3".
        bounds: of "llama3" the factors of the low and the high frequency, of "yarn" the first and the last pair of the
            ramp from frequencies that stay to those that are divided by `factor`.
        short, long: of "longrope", the `dims / 2` divisors of the frequencies.
    """

    kind: str
    dims: int
    theta: float
    original: int
    scale: float = 1.0
    factor: float = 1.0
    bounds: tuple[float, float] = (0.0, 0.0)
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    @property
    def switch(self) -> int | None:
        """The length past which a text has other frequencies; None where all texts have the same."""
        differs = (self.kind == "dynamic" and self.factor != 1) or self.short != self.long
        return self.original if differs else None

    def none(self) -> RopeConfig:
        """Returns the RoPE that rotates nothing, of a layer without positions (NoPE): its frequencies are 0."""
        return RopeConfig("linear", self.dims, self.theta, self.original, factor=math.inf)


@dataclass(frozen=True)
class RopeRules:
    """A family's defaults of RoPE, as in transformers.

    Attributes:
        theta: `rope_theta`.
        local: `rope_local_base_freq`, of layers with a sliding window, in families that have such a key.
        original: `original_max_position_embeddings`; None for `max_position_embeddings`.
        phi3: a part of each head may be rotated, and "yarn" is an old name of "longrope".
        windows_scaled: a scaling that is given once also holds for layers with a sliding window.
    """

    theta: float = 10_000.0
    local: float | None = None
    original: int | None = None
    phi3: bool = False
    windows_scaled: bool = True


def read_ropes(keys: Keys, head_dim: int, rules: RopeRules) -> dict[str, RopeConfig]:
    """Reads the RoPE of each of `LAYER_TYPES` from the whole config's `keys`.

    Raises:
        InputError: a key is missing, of the wrong type or out of range; a kind is not known.
    """
    name = "rope_scaling" if keys.object("rope_scaling") else "rope_parameters"  # the order of transformers
    said, nothing = keys.within(name), Keys(keys.where, {})
    if any(said.has(kind) for kind in LAYER_TYPES):
        each = [said.within(kind) if said.says(kind) else nothing for kind in LAYER_TYPES]
    else:
        each = [said, said if rules.windows_scaled else nothing]
    outside = [keys.number("rope_theta", rules.theta, low=1.0)] * 2
    if rules.local is not None:
        outside[1] = keys.number("rope_local_base_freq", rules.local, low=1.0)
    return {
        kind: _normal_rope(keys, own, theta, head_dim, rules)
        for kind, own, theta in zip(LAYER_TYPES, each, outside, strict=True)
    }


def _normal_rope(keys: Keys, said: Keys, theta: float, head_dim: int, rules: RopeRules) -> RopeConfig:
    """Reads one object; keys that `said` lacks may stand beside it, in `keys`, which has `theta`."""
    longest = keys.size("max_position_embeddings")
    trained = said.size("original_max_position_embeddings", rules.original or longest)
    trained = keys.size("original_max_position_embeddings", trained)  # outside, it goes before the one within
    share = said.number(
        "partial_rotary_factor", keys.number("partial_rotary_factor", 1.0, high=_MAX_FACTOR), high=_MAX_FACTOR
    )
    if share > 1 or (share < 1 and not rules.phi3):
        raise InputError(f"{said.where}: partial_rotary_factor is {share:g}, and this family rotates whole heads")
    rope = RopeConfig(
        kind=_kind(said, rules.phi3),
        dims=int(head_dim * share),
        theta=said.number("rope_theta", theta, low=1.0),
        original=longest,
    )
    if rope.dims < 2 or rope.dims % 2:
        raise InputError(f"{said.where}: RoPE rotates pairs, and {rope.dims} values of each head are to be rotated")
    if rope.kind == "default":
        return rope
    if rope.kind == "longrope":
        return _longrope(said, rope, longest, trained)
    factor = said.number("factor", longest / trained if rope.kind == "yarn" else None, high=_MAX_FACTOR)
    if rope.kind == "yarn":
        return _yarn(said, replace(rope, factor=factor, original=trained))
    if rope.kind == "llama3":
        low = said.number("low_freq_factor", high=_MAX_FACTOR)
        high = said.number("high_freq_factor", low=low, high=_MAX_FACTOR)
        return replace(rope, factor=factor, original=trained, bounds=(low, high))
    if rope.kind == "dynamic" and (rope.dims < 4 or factor < 1):
        raise InputError(f"{said.where}: dynamic RoPE needs a factor of at least 1, and four values to rotate")
    return replace(rope, factor=factor)


def _kind(said: Keys, phi3: bool) -> str:
    """Returns the kind, under whichever of its names."""
    names = {**{kind: kind for kind in KINDS}, "su": "longrope", **({"yarn": "longrope"} if phi3 else {})}
    kinds = {names[said.word(key, tuple(names))] for key in ("rope_type", "type") if said.says(key)}
    if len(kinds) > 1:
        raise InputError(f"{said.where}: rope_type and type say {' and '.join(sorted(kinds))}: one of them is wrong")
    return next(iter(kinds), "default")


def _longrope(said: Keys, rope: RopeConfig, longest: int, trained: int) -> RopeConfig:
    factor = said.number("factor", longest / trained, high=_MAX_FACTOR)
    if trained < 2:
        raise InputError(f"{said.where}: original_max_position_embeddings is {trained}: more than 1 is needed")
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return replace(
        rope,
        original=trained,
        scale=said.number("attention_factor", scale, high=_MAX_FACTOR),
        short=said.numbers("short_factor", rope.dims // 2, high=_MAX_FACTOR),
        long=said.numbers("long_factor", rope.dims // 2, high=_MAX_FACTOR),
    )


def _yarn(said: Keys, rope: RopeConfig) -> RopeConfig:
    """YaRN's ramp (Peng et al. 2023, section 3.2) and the factor of attention (3.4), with DeepSeek's two keys."""

    def pair(turns: float) -> float:
        """Returns the pair, not rounded, that makes so many turns in the original context."""
        return rope.dims * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    def sharpened(by: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * by * math.log(rope.factor) + 1.0

    fast, slow = said.number("beta_fast", 32.0, high=_MAX_FACTOR), said.number("beta_slow", 1.0, high=_MAX_FACTOR)
    first, last = pair(fast), pair(slow)
    if said.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    scale = sharpened(1.0)
    of_queries, of_all = (said.number(name, 0.0, low=-1.0, high=_MAX_FACTOR) for name in ("mscale", "mscale_all_dim"))
    if of_queries and of_all:
        scale = sharpened(of_queries) / sharpened(of_all)
    scale = said.number("attention_factor", scale, high=_MAX_FACTOR)
    return replace(rope, scale=scale, bounds=(first, last + 0.001 if first == last else last))
