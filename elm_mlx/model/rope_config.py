"""RoPE as a `config.json` says it: every kind that transformers writes, in one normal form, and its frequencies.

Knows the files of transformers 4 (`rope_theta` beside `rope_scaling`, `type` or `rope_type`) and 5
(`rope_parameters`, by kind of layer or not). Plain numbers: knows no arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from elm_mlx.errors import InputError
from elm_mlx.reading import Keys

LAYER_TYPES = ("full_attention", "sliding_attention")
KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_MOST = 1e6  # of a factor: far above what any model has


@dataclass(frozen=True)
class RopeConfig:
    """The rotation of a head's queries and keys.

    Attributes:
        kind: one of `KINDS`.
        dims: how many of a head's values are rotated, in pairs half of them apart: the first ones, all but where the
            rotation is partial.
        theta: the base that frequencies are powers of.
        original: the length that the model was trained to before its RoPE was scaled. Of the kinds "longrope" and
            "dynamic" a longer text has other frequencies than a shorter one.
        scale: what the rotated is multiplied by, beside its rotation.
        factor: of "linear", "dynamic", "yarn" and "llama3".
        bounds: of "llama3" the low and the high frequency's factor, of "yarn" the first and last pair of the ramp
            from frequencies that stay to those that are divided by `factor`.
        short, long: of "longrope": what each frequency is divided by, `dims / 2` numbers.
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
        """The length after which a text has other frequencies; None where all texts have the same."""
        differs = (self.kind == "dynamic" and self.factor != 1) or self.short != self.long
        return self.original if differs else None

    def frequencies(self, length: int = 0) -> list[float]:
        """Radians a position of each pair, `dims / 2`, for a text of `length` tokens.

        Formulas: Su et al. 2021 (RoPE); Chen et al. 2023 (linear); Peng et al. 2023 (dynamic NTK and YaRN);
        Ding et al. 2024 (LongRoPE); Llama 3.1's model card (llama3). All as transformers computes them.
        """
        theta = self.theta
        if self.kind == "dynamic" and length > self.original:
            stretch = self.factor * length / self.original - (self.factor - 1)
            theta *= stretch ** (self.dims / (self.dims - 2))
        plain = [theta ** (-pair / self.dims) for pair in range(0, self.dims, 2)]
        if self.kind == "linear":
            return [frequency / self.factor for frequency in plain]
        if self.kind == "llama3":
            return [self._llama3(frequency) for frequency in plain]
        if self.kind == "yarn":
            return [self._yarn(pair, frequency) for pair, frequency in enumerate(plain)]
        if self.kind == "longrope":
            divisors = self.long if length > self.original else self.short
            return [frequency / divisor for frequency, divisor in zip(plain, divisors, strict=True)]
        return plain

    def _llama3(self, frequency: float) -> float:
        low, high = self.bounds
        turns = self.original * frequency / (2 * math.pi)  # over the original context
        if turns > high:
            return frequency
        if turns < low:
            return frequency / self.factor
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * frequency / self.factor + smooth * frequency

    def _yarn(self, pair: int, frequency: float) -> float:
        first, last = self.bounds
        ramp = min(1.0, max(0.0, (pair - first) / (last - first)))
        return ramp * frequency / self.factor + (1 - ramp) * frequency


@dataclass(frozen=True)
class RopeRules:
    """What a family's config means where it doesn't say it, as in transformers.

    Attributes:
        theta: `rope_theta`.
        original: `original_max_position_embeddings`; None for `max_position_embeddings`.
        phi3: whether a part of each head may be rotated, and "yarn" is an old name of "longrope".
        windows_scaled: whether a scaling that is said once holds for layers that see a window too.
    """

    theta: float = 10_000.0
    original: int | None = None
    phi3: bool = False
    windows_scaled: bool = True


def read(keys: Keys, head_dim: int, rules: RopeRules) -> dict[str, RopeConfig]:
    """The RoPE of each of `LAYER_TYPES`, as the whole config's `keys` say it.

    Raises:
        InputError: a key is missing, of the wrong type or out of range; a kind is not known.
    """
    name = "rope_scaling" if keys.object("rope_scaling") else "rope_parameters"  # the order of transformers
    said, nothing = keys.within(name), Keys(keys.where, {})
    if any(said.has(kind) for kind in LAYER_TYPES):
        each = [said.within(kind) if said.says(kind) else nothing for kind in LAYER_TYPES]
    else:
        each = [said, said if rules.windows_scaled else nothing]
    return {kind: _normal(keys, own, head_dim, rules) for kind, own in zip(LAYER_TYPES, each, strict=True)}


def _normal(keys: Keys, said: Keys, head_dim: int, rules: RopeRules) -> RopeConfig:
    """One object's normal form; what `said` doesn't say may stand beside it, in `keys`."""
    longest = keys.size("max_position_embeddings")
    trained = said.size("original_max_position_embeddings", rules.original or longest)
    trained = keys.size("original_max_position_embeddings", trained)  # outside, it goes before the one within
    share = said.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0, high=_MOST), high=_MOST)
    if share > 1 or (share < 1 and not rules.phi3):
        raise InputError(f"{said.where}: partial_rotary_factor is {share:g}, and this family rotates whole heads")
    rope = RopeConfig(
        kind=_kind(said, rules.phi3),
        dims=int(head_dim * share),
        theta=said.number("rope_theta", keys.number("rope_theta", rules.theta, low=1.0), low=1.0),
        original=longest,
    )
    if rope.dims < 2 or rope.dims % 2:
        raise InputError(f"{said.where}: RoPE rotates pairs, and {rope.dims} values of each head are to be rotated")
    if rope.kind == "default":
        return rope
    if rope.kind == "longrope":
        return _longrope(said, rope, longest, trained)
    factor = said.number("factor", longest / trained if rope.kind == "yarn" else None, high=_MOST)
    if rope.kind == "yarn":
        return _yarn(said, replace(rope, factor=factor, original=trained))
    if rope.kind == "llama3":
        low = said.number("low_freq_factor", high=_MOST)
        high = said.number("high_freq_factor", low=low, high=_MOST)
        return replace(rope, factor=factor, original=trained, bounds=(low, high))
    if rope.kind == "dynamic" and (rope.dims < 4 or factor < 1):
        raise InputError(f"{said.where}: dynamic RoPE needs a factor of at least 1, and four values to rotate")
    return replace(rope, factor=factor)


def _kind(said: Keys, phi3: bool) -> str:
    """The kind, under the names that it has or had."""
    names = {**{kind: kind for kind in KINDS}, "su": "longrope", **({"yarn": "longrope"} if phi3 else {})}
    kinds = {names[said.word(key, tuple(names))] for key in ("rope_type", "type") if said.says(key)}
    if len(kinds) > 1:
        raise InputError(f"{said.where}: rope_type and type say {' and '.join(sorted(kinds))}: one of them is wrong")
    return next(iter(kinds), "default")


def _longrope(said: Keys, rope: RopeConfig, longest: int, trained: int) -> RopeConfig:
    factor = said.number("factor", longest / trained, high=_MOST)
    if trained < 2:
        raise InputError(f"{said.where}: original_max_position_embeddings is {trained}: more than 1 is needed")
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return replace(
        rope,
        original=trained,
        scale=said.number("attention_factor", scale, high=_MOST),
        short=said.numbers("short_factor", rope.dims // 2, high=_MOST),
        long=said.numbers("long_factor", rope.dims // 2, high=_MOST),
    )


def _yarn(said: Keys, rope: RopeConfig) -> RopeConfig:
    """YaRN's ramp (Peng et al. 2023, section 3.2) and the factor of attention (3.4), with DeepSeek's two keys."""

    def pair(turns: float) -> float:
        """The pair, not rounded, that turns so often over the original context."""
        return rope.dims * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    def sharpened(by: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * by * math.log(rope.factor) + 1.0

    fast, slow = said.number("beta_fast", 32.0, high=_MOST), said.number("beta_slow", 1.0, high=_MOST)
    first, last = pair(fast), pair(slow)
    if said.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    scale = sharpened(1.0)
    of_queries, of_all = (said.number(name, 0.0, low=-1.0, high=_MOST) for name in ("mscale", "mscale_all_dim"))
    if of_queries and of_all:
        scale = sharpened(of_queries) / sharpened(of_all)
    scale = said.number("attention_factor", scale, high=_MOST)
    return replace(rope, scale=scale, bounds=(first, last + 0.001 if first == last else last))
