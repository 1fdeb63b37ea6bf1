"""Sampling: logits to the next token, and the settings of it that a model directory keeps.

All of it is part of the graph: nothing waits for a token. A sampler's state is arrays that go in and come out, so that
the next step can be launched before this one's token is read, and a seed reproduces a run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from elm_mlx import hub, reading
from elm_mlx.errors import InputError
from elm_mlx.files import write_json
from elm_mlx.model import ops

Choose = Callable[[mx.array], mx.array]  # log-probabilities (batch, vocab) -> tokens (batch,), as mlx-lm's samplers
Process = Callable[[mx.array, mx.array], mx.array]  # tokens so far (n,), logits (1, vocab) -> logits

PENALTY_WINDOW = 64  # tokens that a repetition penalty looks back on

FILE_NAME = "generation_config.json"


class _Setting(NamedTuple):
    """A setting: its name in generation_config.json, its default, its range as numbers and in words."""

    saved_as: str
    default: float
    low: float
    high: float
    range: str

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high and value < math.inf


_BELOW_1 = 1 - 2**-23  # a float32 times this is less than itself, however it is rounded
_ABOVE_0 = math.nextafter(0, 1)
_SETTINGS = {
    "temp": _Setting("temperature", 0.0, 0, math.inf, "0 or more"),
    "top_p": _Setting("top_p", 1.0, _ABOVE_0, 1, "above 0, at most 1"),
    "top_k": _Setting("top_k", 0, 0, math.inf, "0 or more"),
    "min_p": _Setting("min_p", 0.0, 0, 1, "from 0 to 1"),
    "repetition_penalty": _Setting("repetition_penalty", 1.0, _ABOVE_0, math.inf, "above 0"),
    "max_tokens": _Setting("max_new_tokens", 256, 1, math.inf, "1 or more"),
}
DEFAULTS = {name: setting.default for name, setting in _SETTINGS.items()}


class State(NamedTuple):
    """A sampler's state; None for what it does not need.

    Attributes:
        key: of `mx.random`: `(2,)`, one for all rows, or `(batch, 2)`, one for each.
        recent: the tokens that a repetition penalty looks at, `(batch, 64)`.
        tokens: all tokens so far, `(n,)`, of a single row; for logits processors.
        counts: how often each token has been chosen, `(batch, vocab)`; None before the first.
    """

    key: mx.array | None = None
    recent: mx.array | None = None
    tokens: mx.array | None = None
    counts: mx.array | None = None

    def row(self, number: int) -> State:
        """Returns the state of one row of those that were `joined`."""
        key, recent, _, counts = (None if array is None else array[number : number + 1] for array in self)
        return State(key, recent, None, counts)


def joined(states: Sequence[State]) -> State:
    """Returns the state for logits of the rows of several states, which draw what each would alone.

    They are of equal samplers without processors, and in each the same is None.
    """
    keys, recent, _, counts = zip(*states, strict=True)
    return State(
        None if keys[0] is None else mx.concatenate([key.reshape(1, 2) for key in keys]),
        None if recent[0] is None else mx.concatenate(recent),
        None,
        None if counts[0] is None else mx.concatenate(counts),
    )


@dataclass(frozen=True)
class Sampler:
    """Chooses tokens. The order is: `processors`, `logit_bias`, penalties, `top_k`, `top_p`, `min_p`, temperature.

    As in mlx-lm the filters look at the probabilities before temperature.

    Args:
        temp: 0 takes the likeliest token.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        top_k: keep this many; 0 keeps all.
        min_p: drop tokens less likely than this share of the likeliest.
        repetition_penalty: divide the logit of a token seen in the last 64, or multiply a negative one
            (Keskar et al., 2019); 1 does nothing.
        presence_penalty, frequency_penalty: taken from the logit of each token that has been generated, once, and as
            often as it has been; 0 does nothing, and what is negative makes a token likelier.
        logit_bias: added to the logits of these tokens.
        choose: a function that chooses in place of temperature and filters, by the log-probabilities that processors
            and penalty leave; it draws by `mx.random`'s own state.
        processors: functions that change the logits, one after the other, by all tokens so far of a single row.

    Raises:
        InputError: names the setting that is out of range.
    """

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    choose: Choose | None = None
    processors: Sequence[Process] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} is {getattr(self, name)}: it must be a finite number")
        for token, bias in self.logit_bias.items():
            if token < 0 or not math.isfinite(bias):
                raise InputError(f"logit_bias adds {bias} to token {token}: an id and a finite number are needed")
        for name in ("temp", "top_p", "top_k", "min_p", "repetition_penalty"):
            if not _SETTINGS[name].holds(getattr(self, name)):
                raise InputError(f"{name} is {getattr(self, name)}: it must be {_SETTINGS[name].range}")
        if self.choose is not None and (self.temp, self.top_p, self.top_k, self.min_p) != (0, 1, 0, 0):
            raise InputError("give a sampler, or temp, top_p, top_k and min_p, not both")

    @property
    def has_callables(self) -> bool:
        """True with functions of the caller's, which may count how often they are called."""
        return self.choose is not None or bool(self.processors)

    @property
    def looks_at_logits_alone(self) -> bool:
        """True where neither chance nor what was chosen before matters to a choice."""
        remembers = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return self.temp == 0 and not remembers and not self.has_callables

    def start(self, prompts: Sequence[Sequence[int]], seed: int | None = None) -> State:
        """Returns the state before the first token after `prompts`, one for each row. `seed` None draws one.

        Raises:
            InputError: the seed does not fit 64 bits.
        """
        reading.check_seed(seed)
        key = recent = tokens = None
        if self.temp > 0:
            key = mx.random.key(int.from_bytes(os.urandom(4), "big") if seed is None else seed)
        if self.repetition_penalty != 1:
            # Short prompts are filled up with their own first token, which is BOS.
            rows = [[ids[0]] * (PENALTY_WINDOW - len(ids)) + list(ids[-PENALTY_WINDOW:]) for ids in prompts]
            recent = mx.array(rows)
        if self.processors:
            (ids,) = prompts
            tokens = mx.array(ids)
        return State(key, recent, tokens)

    def __call__(
        self, logits: mx.array, state: State, bias: mx.array | None = None
    ) -> tuple[mx.array, mx.array, State]:
        """Chooses from logits `(batch, vocab)`: tokens `(batch,)`, their log-probabilities `(batch,)`, the next state.

        The log-probability is the model's own, before `bias` `(vocab,)` or `(batch, vocab)`, penalties, filters and
        temperature. With a key for each row, a row's draw depends on no other.
        """
        logits = logits.astype(mx.float32)
        key, recent, so_far, counts = state
        adjusted = logits if bias is None else logits + bias
        for process in self.processors:
            adjusted = process(so_far, adjusted)
        if self.logit_bias:
            ids = mx.array([*self.logit_bias])
            adjusted = adjusted.at[:, ids].add(mx.array([*self.logit_bias.values()], mx.float32))
        if recent is not None:
            adjusted = self._penalize(adjusted, recent)
        if counts is not None:
            adjusted = adjusted - self.frequency_penalty * counts - self.presence_penalty * (counts > 0)
        if adjusted is logits and self.choose is None and key is None:
            tokens, logprobs = ops.likeliest(logits)
        else:
            if self.choose is not None:
                tokens = self.choose(adjusted - ops.logsumexp(adjusted)[..., None]).reshape(-1)
            elif key is None:
                tokens = mx.argmax(adjusted, axis=-1)
            else:
                key, chances = _chances(key, logits.shape[0])
                tokens = self._draw(adjusted, chances)
            chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
            logprobs = chosen - ops.logsumexp(logits)
        if recent is not None:
            recent = mx.concatenate([recent[:, 1:], tokens[:, None].astype(recent.dtype)], axis=-1)
        if so_far is not None:
            so_far = mx.concatenate([so_far, tokens.astype(so_far.dtype)])
        if self.presence_penalty or self.frequency_penalty:
            counts = mx.zeros_like(logits) if counts is None else counts
            counts = counts.at[mx.arange(tokens.size), tokens].add(1.0)
        return tokens, logprobs, State(key, recent, so_far, counts)

    def keep(self, state: State, rows: mx.array) -> State:
        """Returns the state of these rows alone."""
        recent, counts = (None if array is None else array[rows] for array in (state.recent, state.counts))
        return state._replace(recent=recent, counts=counts)

    def _penalize(self, logits: mx.array, recent: mx.array) -> mx.array:
        seen = mx.take_along_axis(logits, recent, axis=-1)
        seen = mx.where(seen > 0, seen / self.repetition_penalty, seen * self.repetition_penalty)
        return mx.put_along_axis(logits, recent, seen, axis=-1)

    def _draw(self, logits: mx.array, chances: mx.array) -> mx.array:
        candidates = None  # ids of the columns, where they are no longer the whole vocabulary in order
        if 0 < self.top_k < logits.shape[-1]:
            candidates = mx.argpartition(-logits, self.top_k - 1, axis=-1)[:, : self.top_k]
            logits = mx.take_along_axis(logits, candidates, axis=-1)
        if self.top_p < 1:
            total = ops.logsumexp(logits)[:, None]
            # Half of what may be dropped is more than all below this can be together: equals, which sort in no time.
            lowest = total + math.log((1 - self.top_p) / 2 / logits.shape[-1])
            order = ops.ascending(mx.where(logits >= lowest, -logits, mx.inf))
            logits = mx.take_along_axis(logits, order, axis=-1)
            candidates = order if candidates is None else mx.take_along_axis(candidates, order, axis=-1)
            probs = mx.softmax(logits, axis=-1)
            before = mx.cumsum(probs, axis=-1) - probs  # the likeliest has nothing before it, so it always stays
            logits = mx.where(before < self.top_p, logits, -mx.inf)
        if self.min_p > 0:
            logits = mx.where(logits >= logits.max(axis=-1, keepdims=True) + math.log(self.min_p), logits, -mx.inf)
        temp = min(max(self.temp, 1e-6), 1e6)  # as good as none, and as good as infinite: float32 takes no more
        reached = mx.cumsum(ops.weights(logits / temp), axis=-1)
        # The first that goes beyond the chance's share of all: it has a weight, since the share is less than all.
        drawn = (reached <= mx.minimum(chances, _BELOW_1) * reached[:, -1:]).sum(axis=-1).astype(mx.uint32)
        return drawn if candidates is None else mx.take_along_axis(candidates, drawn[:, None], axis=-1)[:, 0]


def _chances(key: mx.array, rows: int) -> tuple[mx.array, mx.array]:
    """Returns the next key, or keys, and a random number `(rows, 1)` from 0 to 1, as the keys were one or many."""
    if key.ndim == 1:
        key, draw = mx.random.split(key)
        return key, mx.random.uniform(shape=(rows, 1), key=draw)
    pairs = mx.vmap(mx.random.split)(key)
    return pairs[:, 0], mx.vmap(lambda draw: mx.random.uniform(shape=(1,), key=draw))(pairs[:, 1])


def sampler_from(settings: Mapping[str, float]) -> Sampler:
    """Makes a Sampler of `settings` by its fields' names; passes others over. Raises InputError."""
    values: dict[str, Any] = {name: settings[name] for name in Sampler.__dataclass_fields__ if name in settings}
    return Sampler(**values)


def saved_settings(directory: Path) -> dict[str, float]:
    """Reads the settings that a directory's generation_config.json has, by our names.

    As in Hugging Face's tools, `do_sample` true means a temperature of 1 unless the file has another, and false
    `temp` 0; without `do_sample` a temperature is not used. null counts as unsaid.

    Raises:
        InputError: the file is no JSON, or a setting is no number, or out of range.
    """
    path = reading.expanded(directory) / FILE_NAME
    values = reading.json_object_if_there(path)
    found = {
        name: _number(path, name, values) for name in _SETTINGS if values.get(_SETTINGS[name].saved_as) is not None
    }
    sampled = values.get("do_sample")
    if not isinstance(sampled, bool | None):
        raise InputError(f"{path}: do_sample is {str(sampled)[:60]!r}: true or false is needed")
    if sampled is None:
        found.pop("temp", None)
    else:
        found["temp"] = found.get("temp", 1.0) if sampled else 0.0
    return found


def merge_settings(
    directory: Path, flags: Mapping[str, float | None], defaults: Mapping[str, float] = DEFAULTS
) -> dict[str, float]:
    """Returns `flags` where they are not None, else what the directory has, else `defaults`; keys as in `flags`."""
    saved = {**defaults, **saved_settings(directory)}
    return {name: saved[name] if value is None else value for name, value in flags.items()}


def save_settings(directory: Path, settings: Mapping[str, float]) -> Path:
    """Writes `settings` to the directory's file, whose path is returned; what else is in it stays.

    Raises:
        InputError: the file that is there cannot be read, or the directory is of the hub's cache.
        ElmError: it cannot be written.
    """
    if hub.owner_of(reading.expanded(directory)) is not None:
        raise InputError(
            f"{directory}: lies in the hub's cache, where files stay as they came: give settings as options"
        )
    saved_settings(directory)  # what could not be read again is not written over
    path = reading.expanded(directory) / FILE_NAME
    values = reading.json_object_if_there(path)
    values |= {_SETTINGS[name].saved_as: value for name, value in settings.items()}
    values["do_sample"] = settings["temp"] > 0
    if not values["do_sample"]:  # Hugging Face's tools refuse a temperature of 0
        del values["temperature"]
    write_json(path, values)
    return path


def _number(path: Path, name: str, values: Mapping[str, Any]) -> float:
    """Returns the value of our `name`, a whole number where ours is one. Raises InputError."""
    setting = _SETTINGS[name]
    value, counts = values[setting.saved_as], isinstance(setting.default, int)
    if type(value) is float and counts and value.is_integer():  # some tools write 50.0
        value = int(value)
    if type(value) not in ((int,) if counts else (int, float)):
        kind = "a whole number" if counts else "a number"
        raise InputError(f"{path}: {setting.saved_as} is {str(value)[:60]!r}: {kind} is needed")
    if name == "top_k" and value == -1:  # some tools keep all by it
        return 0
    if not setting.holds(value):
        raise InputError(f"{path}: {setting.saved_as} is {str(value)[:60]}: it must be {setting.range}")
    number: float = value
    return number
