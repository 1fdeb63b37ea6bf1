"""Suites, named sets of cases to measure; and what a benchmark and its workers tell each other of a case.

Imports no MLX: the command line names suites and sides in its help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS

SIDES = {
    "ours": "elm-mlx",
    "naive": "elm-mlx, naive RMSNorm",
    "prompt-lookup": "elm-mlx, prompt lookup",
    "kvp": "elm-mlx, KV prediction",
    "mlx-lm": "mlx-lm, same BLAS and type",
    "mlx-lm-stock": "mlx-lm as installed",
    "pytorch": "PyTorch",
    "llama.cpp": "llama.cpp",
}
PRECISIONS = ("stored", "float32", "bfloat16", "float16", "8bit", "6bit", "4bit", "3bit", "2bit")


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        model: a preset's name, or a model directory.
        precision: how the weights are stored; "stored" for a directory's own.
        prompt, new: tokens of the prompt, and tokens that follow, of each of `batch` texts.
        kv_bits: of quantized keys and values; None for those that are computed.
    """

    model: str
    precision: str
    prompt: int
    new: int
    batch: int = 1
    kv_bits: int | None = None

    def __str__(self) -> str:
        return f"{self.model}, {self.precision}, {self.prompt} + {self.new} tokens{self.manner}"

    @property
    def manner(self) -> str:
        """How many texts at once, and what their keys are kept in; empty for the usual."""
        batch = f", {self.batch} at once" if self.batch > 1 else ""
        return batch + (f", keys in {self.kv_bits} bits" if self.kv_bits is not None else "")


@dataclass(frozen=True)
class Figures:
    """One measurement.

    Attributes:
        first: seconds until the first token, or of a batch until all have theirs.
        prompt: tokens read a second, until then.
        decode: tokens that followed a second, of all texts together; 0 where `new` is 1.
        memory: bytes at most in use; None where the side doesn't say.
        per_pass: tokens that a pass over the model gave; None where each gives one.
    """

    first: float
    prompt: float
    decode: float
    memory: int | None = None
    per_pass: float | None = None


# Figures, and the ids that were written, of all texts, step by step; none where the side doesn't say.
Measured: TypeAlias = tuple[Figures, list[int]]


@dataclass(frozen=True)
class About:
    """A side's description of itself and of the loaded model; 0 stands for what it does not say.

    Attributes:
        name: the program and its version.
        dtype: the type that it computes in.
        weight_bytes: that each decode step needs, as they are stored in the model's directory.
        cache_bytes: of one position's keys and values.
        flops, flops_seen, flops_head: of a token's forward pass: in the layers' weights, for each position that it
            sees, and where its logits are wanted.
        flops_unread: of `flops`, those that a prompt's tokens but the last one do without.
        rounds: prompts are computed in bfloat16, faster than products of `dtype`.
    """

    name: str
    dtype: str
    parameters: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    flops: int = 0
    flops_seen: int = 0
    flops_head: int = 0
    flops_unread: int = 0
    rounds: bool = False
    notes: tuple[str, ...] = ()


def prompt_ids(length: int, vocab_size: int, row: int = 0) -> list[int]:
    """The same ids each time and for every side: BOS, and then some from the whole vocabulary."""
    return [1] + [3 + (i * 7919 + row * 104_729 + 37) % max(1, vocab_size - 3) for i in range(length - 1)]


@dataclass(frozen=True)
class Suite:
    """A benchmark to run.

    Attributes:
        against: the sides that are measured beside ours, each in turn with it.
        repeats: measurements of each side in each case.
        norms: whether RMSNorm is measured by itself too, fused and naive.
        compute_dtype: the type to compute in; None for the one that the machine is best at.
    """

    name: str
    cases: tuple[Case, ...]
    against: tuple[str, ...]
    repeats: int = 3
    norms: bool = True
    compute_dtype: str | None = None


def cases(
    models: Sequence[str],
    precisions: Sequence[str],
    lengths: Sequence[tuple[int, int]],
    batches: Sequence[int] = (1,),
    kv_bits: Sequence[int | None] = (None,),
) -> tuple[Case, ...]:
    """Every combination, model by model. A directory is measured as it is stored, once."""
    made = [
        Case(model, precision if model in PRESETS else "stored", *length, batch, bits)
        for model, precision, batch, length, bits in product(models, precisions, batches, lengths, kv_bits)
    ]
    return tuple(dict.fromkeys(made))


SUITES = {
    # About a minute on a laptop.
    "quick": Suite(
        "quick", cases(["OpenELM-270M"], ["bfloat16"], [(128, 32)], [1, 4]), against=("naive", "mlx-lm"), repeats=3
    ),
    # The paper's setting (section 5): an M2 Max, MLX, bfloat16, one text, 1,024 tokens after a short prompt, five runs
    # after one that doesn't count. Its question was the cost of RMSNorm, which it asked of PyTorch on CUDA.
    "m2max": Suite(
        "m2max", cases([*PRESETS], ["bfloat16"], [(36, 1024)]), against=("naive", "mlx-lm", "pytorch"), repeats=5,
        compute_dtype="bfloat16",
    ),
    # The cost of a size and a precision. Takes an hour or more.
    "full": Suite(
        "full", cases([*PRESETS], ["bfloat16", "8bit", "4bit"], [(128, 64), (1024, 64)], [1, 8]),
        against=("naive", "mlx-lm"), repeats=5,
    ),
}  # fmt: skip


def change(
    suite: Suite,
    *,
    models: Sequence[str] = (),
    precisions: Sequence[str] = (),
    prompts: Sequence[int] = (),
    new: Sequence[int] = (),
    batches: Sequence[int] = (),
    kv_bits: Sequence[int | None] = (None,),
) -> Suite:
    """Returns the suite with other models, lengths and so on; those that are empty stay.

    Raises:
        InputError: there are several `new`, and not one for each prompt; or precisions, and no preset to have them.
    """
    if precisions and models and not any(model in PRESETS for model in models):
        raise InputError(
            "--precision is for presets, whose weights are random; a directory is measured as it is stored, and "
            "`elm-mlx quantize` makes one of fewer bits"
        )
    old = suite.cases
    known = {name: list(dict.fromkeys(getattr(case, name) for case in old)) for name in ("model", "precision", "batch")}
    lengths = list(dict.fromkeys((case.prompt, case.new) for case in old))
    if prompts or new:
        prompts = prompts or [prompt for prompt, _ in lengths]
        news = list(new) or [max(count for _, count in lengths)]
        news = news * len(prompts) if len(news) == 1 else news
        if len(news) != len(prompts):
            raise InputError(f"--new-tokens: give one number, or as many as there are prompts ({len(prompts)})")
        lengths = list(zip(prompts, news, strict=True))
    made = cases(
        models or known["model"], precisions or known["precision"], lengths, batches or known["batch"], kv_bits
    )
    return replace(suite, cases=made)


def check(suite: Suite) -> Suite:
    """Returns the suite itself. Raises InputError for an unknown side or precision, and for numbers below 1."""
    for side in suite.against:
        if side not in SIDES or side == "ours":
            raise InputError(f"--against {side}: is not one of {', '.join([*SIDES][1:])}")
    for case in suite.cases:
        if case.precision not in PRECISIONS:
            raise InputError(f"--precision {case.precision}: is not one of {', '.join(PRECISIONS[1:])}")
        if case.kv_bits not in (None, 8, 4):
            raise InputError(f"--kv-bits {case.kv_bits}: 8 or 4 are possible, and none")
        for name, value in (("prompt-tokens", case.prompt), ("new-tokens", case.new), ("batch-size", case.batch)):
            if value < 1:
                raise InputError(f"--{name} {value}: must be 1 or more")
    if suite.repeats < 1:
        raise InputError(f"--repeats {suite.repeats}: must be 1 or more")
    if len(set(suite.against)) < len(suite.against):
        raise InputError("--against: a side is named twice")
    return suite
