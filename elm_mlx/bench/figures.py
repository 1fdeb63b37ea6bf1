"""What is measured, and what a side answers: the words that a benchmark and its workers share.

Knows names and numbers. Imports nothing heavy: the command line reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass

BATCHED = ("ours", "naive", "mlx-lm", "mlx-lm-stock", "pytorch")  # sides that take several prompts at once
SIDES = {
    "ours": "elm-mlx",
    "naive": "elm-mlx, naive RMSNorm",
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
        prompt, new: tokens that are read, and tokens that follow, of each of `batch` texts.
    """

    model: str
    precision: str
    prompt: int
    new: int
    batch: int = 1

    def __str__(self) -> str:
        batch = f", {self.batch} at once" if self.batch > 1 else ""
        return f"{self.model}, {self.precision}, {self.prompt} + {self.new} tokens{batch}"


@dataclass(frozen=True)
class Figures:
    """One measurement.

    Attributes:
        first: seconds until the first token, or of a batch until all have theirs.
        prompt: tokens read a second, until then.
        decode: tokens that followed a second, of all texts together; 0 where `new` is 1.
        memory: bytes at most in use; None where the side doesn't say.
    """

    first: float
    prompt: float
    decode: float
    memory: int | None = None


@dataclass(frozen=True)
class About:
    """What a side says of the model when it has it.

    Attributes:
        name: the program and its version.
        dtype: what it computes in.
        parameters: of the model.
        weight_bytes: that each decode step reads; 0 where the side doesn't say, as those below.
        cache_bytes: of one position's keys and values.
        flops, flops_seen, flops_head: of a token's forward pass: in the layers' weights, for each position that it
            sees, and where its logits are wanted.
        notes: what else there is to say.
    """

    name: str
    dtype: str
    parameters: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    flops: int = 0
    flops_seen: int = 0
    flops_head: int = 0
    notes: tuple[str, ...] = ()


def prompt_ids(length: int, vocab_size: int, row: int = 0) -> list[int]:
    """The same ids each time and for every side: BOS, and then some from the whole vocabulary."""
    return [1] + [3 + (i * 7919 + row * 104_729 + 37) % max(1, vocab_size - 3) for i in range(length - 1)]
