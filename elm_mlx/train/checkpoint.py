"""Checkpoints: everything that a run needs to go on as if it had never stopped. The directory of a run:

    OUT/checkpoints/step-00000100/parameters.safetensors   what is trained
                                  optimizer.safetensors    the optimizer state
                                  state.json               step, position in the data, random state, what the run is
    OUT/metrics.jsonl                                       a line a step, cut back to the checkpoint on resuming
    OUT/.lock                                               while the run goes on, by which no second one writes here

Each checkpoint appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from elm_mlx import files, reading
from elm_mlx.directories import PARAMETERS, checkpoints_of
from elm_mlx.errors import ElmError, InputError
from elm_mlx.safetensors_file import write_arrays
from elm_mlx.store.loading import load_arrays

FORMAT = 1
# Of `Identity.config`, what checkpoints of earlier versions don't have, and so cannot be compared by.
_LATER = ("batches of validation", "rows of validation", "problems of a validation", "text (its hash)")
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Identity:
    """The identity of a run: what must not change when it is resumed.

    Attributes:
        model: a hash of the model that training started from.
        data: a hash of the examples, training and validation.
        config: every setting that bears on the losses.
    """

    model: str
    data: str
    config: Mapping[str, Any]


@dataclass
class RunProgress:
    """The progress of a run. JSON can hold all of it, and gives it back to the bit.

    Attributes:
        step: updates made.
        data: the position in the data, as the batches give it.
        random: MLX's random key, of each process.
        parts: that a batch is cut into, at most: what dropout drops depends on it. None where an earlier version wrote.
        tokens, trained_tokens: read and counted in the loss so far.
        seconds: spent training so far.
        skipped: updates that were not made, because of their loss.
        loss_mean: of the last updates; a spike is a loss far above it.
        first_loss: the first update's, which is of the model as it was; None before it.
        valid_loss: the last validation's; None before the first one that follows an update.
        best_step, best_loss: the least validation loss, and the checkpoint that it was found at. Step 0 has none: it is
            the model before training.
        worse: validations since the best.
        extend: as the schedule's.
        validation_due: whether the validation after the last update was broken off, and is to be made.
    """

    step: int = 0
    data: Any = None
    random: list[list[int]] = field(default_factory=list)
    parts: int | None = None
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    loss_mean: float = 0.0
    first_loss: float | None = None
    valid_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    worse: int = 0
    extend: list[int] = field(default_factory=list)
    validation_due: bool = False

    @property
    def made(self) -> int:
        """Updates that were not skipped."""
        return self.step - self.skipped


class Changed(InputError):
    """A setting that bears on the losses is not what it was: `name`, as in `Identity.config`, `before` and `after`."""

    def __init__(self, path: Path, name: str, before: Any, after: Any) -> None:
        super().__init__(
            f"{path}: was trained with {name} = {before}, not {after}; resume with the same, or start anew"
        )
        self.path, self.name, self.before, self.after = path, name, before, after


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Keeps other runs out of `out` until the block ends. Of several processes of one run, the first holds it for all.

    Raises:
        ElmError: another run is under way there, or nobody can write there; in every process.
    """
    group, held, failure = mx.distributed.init(), ExitStack(), None
    with held:
        if group.rank() == 0:
            try:
                held.enter_context(files.hold(out))
            except ElmError as error:
                failure = error
        failed = failure is not None
        if group.size() > 1:
            failed = bool(mx.distributed.all_sum(mx.array(int(failed)), group=group).item())
        if failed:
            raise failure or ElmError(f"{out}: the first process could not begin there, and says why")
        yield


def directory(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def save(
    out: Path,
    parameters: dict[str, Any],
    optimizer: dict[str, Any],
    progress: RunProgress,
    identity: Identity,
    export: Callable[[Path], None] | None = None,
) -> Path:
    """Writes the checkpoint of `progress.step`, in place of one that is there. Returns where.

    Args:
        export: writes into the checkpoint's directory what other programs read.

    Raises:
        ElmError: it cannot be written; what was there before is as it was.
    """
    path = directory(out, progress.step)
    state = {"format": FORMAT, "identity": asdict(identity), "progress": asdict(progress)}
    with files.new_directory(path, replace=True) as made:
        for name, tree in ((PARAMETERS, parameters), (OPTIMIZER, optimizer)):
            with (made / name).open("wb") as file:
                write_arrays(file, dict(tree_flatten(tree)))
        files.write_json(made / STATE, state)
        if export is not None:
            export(made)
    return path


def trained_from(path: Path, name: str | None = None) -> str | None:
    """Returns the hash of the model that a checkpoint was trained from, or of `Identity.config`'s `name`.

    Raises:
        InputError: the checkpoint is damaged.
    """
    identity = reading.json_object(path / STATE, reading.TEXT_BYTES).get("identity")
    found = identity if name is None or not isinstance(identity, dict) else identity.get("config")
    return found.get(name or "model") if isinstance(found, dict) else None


def extended_by(out: Path) -> tuple[int, ...]:
    """Returns the updates that a run's last checkpoint was extended by. Raises InputError where that is damaged."""
    found = checkpoints_of(out)
    progress = reading.json_object(found[-1] / STATE, reading.TEXT_BYTES).get("progress") if found else {}
    extend = progress.get("extend", []) if isinstance(progress, dict) else None
    if not isinstance(extend, list) or not all(type(count) is int for count in extend):
        raise InputError(f"{found[-1] / STATE}: extend is damaged; an earlier checkpoint may be whole")
    return tuple(extend)


def to_resume(out: Path, resume: bool) -> Path | None:
    """Returns the checkpoint that the run in `out` goes on from, its last one; None where it is to begin.

    Raises:
        InputError: there is none to `resume` from; or there is one, and it was not asked for.
    """
    found = checkpoints_of(out)
    if resume and not found:
        raise InputError(f"{out}: holds no checkpoint to resume from; without --resume the run begins anew")
    if found and not resume:
        raise InputError(f"{out}: holds a run already; --resume goes on with it, or choose another directory")
    return found[-1] if found else None


def restore(path: Path, identity: Identity, parameters: Any, optimizer: Any) -> tuple[Any, Any, RunProgress]:
    """Reads a checkpoint: trees like `parameters` and `optimizer` with its arrays, and the run's progress.

    Raises:
        InputError: a file is missing or damaged, or the run is another one than `identity`; says in what.
    """
    state = reading.json_object(path / STATE, reading.TEXT_BYTES)
    if "format" in state and state["format"] != FORMAT:
        raise InputError(f"{path}: has format {state['format']}, and this version reads {FORMAT}")
    try:
        saved, progress = Identity(**state["identity"]), RunProgress(**state["progress"])
    except (KeyError, TypeError):
        raise InputError(f"{path / STATE}: is not the state of a checkpoint") from None
    wrong = _what_is_wrong(saved, progress)
    if wrong is not None:
        raise InputError(f"{path / STATE}: {wrong} is damaged; an earlier checkpoint may be whole")
    _check_same(path, saved, identity)
    return restore_parameters(path, parameters), _filled(optimizer, path / OPTIMIZER), progress


def restore_parameters(path: Path, parameters: Any) -> Any:
    """Returns a tree like `parameters` with the arrays of the checkpoint in `path`. Raises InputError as `restore`."""
    return _filled(parameters, path / PARAMETERS)


def prune(out: Path, keep: int, best_step: int | None, passing: int | None = None) -> None:
    """Removes the checkpoint of step `passing`, and of the others all but the last `keep` and that of `best_step`."""
    best = None if best_step is None else directory(out, best_step)
    passed = None if passing is None else directory(out, passing)
    found = checkpoints_of(out)
    others = [path for path in found if path != passed]
    for path in {*found} - {*others[-keep:]}:
        if path != best:  # it loses the name of a checkpoint before it ceases to be whole
            path.rename(path.with_name(f".{path.name}.old"))
    for doomed in out.glob("checkpoints/.step-????????.old"):
        shutil.rmtree(doomed, ignore_errors=True)
    for left in out.glob("checkpoints/.step-????????.tmp-*"):  # by a process that was killed as it wrote
        files.remove_abandoned(left.with_name(left.name[1:].partition(".")[0]))


def _filled(tree: Any, path: Path) -> Any:
    """Returns `tree` with every array replaced by that of its name in a file.

    Raises:
        InputError: the file is missing or damaged, or its arrays have other names or shapes.
    """
    values = load_arrays(path)
    expected = {name: value.shape for name, value in tree_flatten(tree)}
    different = expected.items() ^ {name: value.shape for name, value in values.items()}.items()
    if different:
        raise InputError(f"{path}: does not fit what is trained: {min(name for name, _ in different)} differs")
    return tree_map_with_path(lambda name, _: values[name], tree)


def _what_is_wrong(saved: Identity, progress: RunProgress) -> str | None:
    """Returns the first field that holds no value that `save` could have written."""
    counts = (
        "step",
        "tokens",
        "trained_tokens",
        "skipped",
        "worse",
        *(["best_step"] if progress.best_step is not None else []),
    )
    numbers = ("seconds", "loss_mean", *(["best_loss"] if progress.best_loss is not None else []))
    values = vars(progress)
    right = {
        **{name: type(values[name]) is int and 0 <= values[name] < 1 << 53 for name in counts},
        **{name: type(values[name]) in (int, float) and math.isfinite(values[name]) for name in numbers},
        # Of a model that has come apart these two may be infinite, or no number.
        **{name: values[name] is None or type(values[name]) in (int, float) for name in ("first_loss", "valid_loss")},
        "parts": progress.parts is None or (type(progress.parts) is int and 0 < progress.parts < 1 << 10),
        "data": isinstance(progress.data, dict),
        "validation_due": type(progress.validation_due) is bool,
        "extend": isinstance(progress.extend, list) and all(type(n) is int and n > 0 for n in progress.extend),
        "random": isinstance(progress.random, list) and all(map(_is_key, progress.random)),
        "config": isinstance(saved.config, dict),
    }
    wrong = next((name for name, is_right in right.items() if not is_right), None)
    return "skipped" if wrong is None and progress.made < 0 else wrong


def _is_key(value: Any) -> bool:
    """Says whether it is MLX's random state: two numbers of 32 bits."""
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 <= n < 1 << 32 for n in value)


def _check_same(path: Path, saved: Identity, now: Identity) -> None:
    if saved.model != now.model:
        raise InputError(f"{path}: was trained from another model; give that one, or start anew")
    if saved.data != now.data:
        raise InputError(f"{path}: was trained on other data; give the same, or start anew")
    config = json.loads(json.dumps(now.config))  # as it would be read back: lists for tuples
    for name in {**config, **saved.config}:
        before, after = saved.config.get(name), config.get(name)
        if before != after and not (name in _LATER and before is None):
            raise Changed(path, name, before, after)
