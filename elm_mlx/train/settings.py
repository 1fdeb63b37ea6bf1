"""How to train: every choice of a run that is not its model or its data.

Knows what is allowed, and which choices bear on the losses. Knows nothing of how any is carried out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.inference.sampling import check_seed
from elm_mlx.train.optimizer import OPTIMIZERS, Schedule

ON_NAN = ("stop", "skip")


@dataclass(frozen=True)
class Settings:
    """How to train. All but those of the last group bear on the losses.

    Args:
        schedule: the learning rate; its `steps` are the run's.
        optimizer: "adamw" or "adafactor".
        betas, eps: of AdamW.
        z_loss: weight of the squared log-partition in what is made small (PaLM, section 5); losses are shown without
        clip: the limit on the gradients' norm; None for none.
        accumulate: batches to an update.
        seed: of dropout.
        grad_checkpoint: compute blocks again on the way back rather than keep them.
        spike: a loss that is so many nats above its running mean, which begins with the first update, counts as one
            that is no number; None for none. Of N trained tokens, 1 + 5/√N times as many, for their mean's scatter.
        on_nan: "stop", or "skip" the update.
        eval_every: updates between validations; the last is followed by one too. The same for `save_every`.
        keep: checkpoints to keep, beside the best.
    """

    schedule: Schedule
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    z_loss: float = 0.0
    clip: float | None = 1.0
    accumulate: int = 1
    seed: int = 0
    grad_checkpoint: bool = False
    spike: float | None = 3.0
    on_nan: str = "stop"

    eval_every: int = 200
    save_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"no optimizer {self.optimizer!r}; there are {', '.join(OPTIMIZERS)}")
        if self.on_nan not in ON_NAN:
            raise InputError(f"no way {self.on_nan!r} to treat a loss that is no number; there are {', '.join(ON_NAN)}")
        for name in ("accumulate", "eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps > 0 or not self.z_loss >= 0:
            raise InputError("betas are from 0 to below 1, eps is above 0, and z_loss not below 0")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"the limit on the gradients' norm must be above 0, not {self.clip}")

    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed. When to save may."""
        free = ("eval_every", "save_every", "keep", "schedule")
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in free}
        return own | {f"learning rate's {name}": value for name, value in asdict(self.schedule).items()}
