"""KV Prediction trained: a base and a smaller model in, a run's directory with that model and the maps in it out.

The auxiliary is another model of the base's vocabulary, or the base with layers left out, which begins with the base's
weights. The maps begin as the least-squares fit of the base's projected keys and values to the auxiliary's, on the
first batches of the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from elm_mlx import device
from elm_mlx.callbacks import SILENT, TrainingCallback
from elm_mlx.data.batches import Batch
from elm_mlx.errors import InputError
from elm_mlx.model import lora_layers
from elm_mlx.model.attention import Segments
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.kv_prediction import KVPrediction, kept_layers, layer_map, projected, pruned_map
from elm_mlx.model.network import Model
from elm_mlx.model.roofline import Cost
from elm_mlx.store import kvp_directory
from elm_mlx.store.loading import open_model, part_of, read_weights
from elm_mlx.text.tokenizer import Tokenizer
from elm_mlx.train import memory
from elm_mlx.train.kv_loss import KVLoss
from elm_mlx.train.kvp_recipe import KVPRecipe
from elm_mlx.train.run import Result
from elm_mlx.train.text_training import TextTraining, ends
from elm_mlx.train.throughput import Meter, update_cost

_FITTED = 16  # batches that the maps are fitted to
_RIDGE = 1e-4  # of the mean square of what is mapped, so that no map is built on noise


class KVPTraining(TextTraining[KVPRecipe]):
    """A `TextTraining` of an auxiliary model, and of the maps from its keys and values to a base's.

    Args:
        base: a model directory, which stays as it is.
        auxiliary: a smaller one; or
        keep: the share of the base's layers that are left, one of `KEEPS`.

    Attributes:
        base: of which keys and values are predicted.
        places: the auxiliary's layer for each of the base's.

    Raises:
        InputError: as `TextTraining`; or the models do not go together.
    """

    command = "kvp"

    def __init__(
        self, base: Path, auxiliary: Path | None, keep: float | None, recipe: KVPRecipe, out: Path, *,
        resume: bool = False, on_wrong: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        if (auxiliary is None) == (keep is None):
            raise InputError("give --aux, a smaller model, or --keep, the share of the base's layers that are left")
        if (out / "config.json").exists():
            raise InputError(f"{out}: is a model directory; --out names another one, for the prediction")
        self.base_path, self.auxiliary_path, self._keep = base, auxiliary, keep
        super().__init__(recipe, out, resume=resume, on_wrong=on_wrong)

    @property
    def trainable(self) -> int:
        return self.config.parameters + sum((inputs + 1) * 2 * outputs for inputs, outputs in self._map_shapes())

    def load(self) -> memory.Load:
        return replace(super().load(), beside=self.base)

    def train(self, callback: TrainingCallback = SILENT) -> Result:
        """Trains, and leaves in `out` the last auxiliary and maps, as `kvp_directory` has them.

        Raises:
            InputError, ElmError, KeyboardInterrupt: as `Run.train`, and as the batches do.
        """
        callback.progress("reading the models")
        model = KVPrediction(self._open_base(), self._open_auxiliary(), self.places)
        if self.resumed is None:
            callback.progress("fitting the maps")
            at = self.batches.state()
            fit(model, (next(self.batches) for _ in range(_FITTED)))
            self.batches.resume(at)
        asked, layers = self._recipe, self.base.num_layers
        objective = KVLoss(asked.loss, layers, asked.optimizer.z_loss, self.settings.grad_checkpoint)
        given = None if self.auxiliary_path is None else str(self.auxiliary_path)
        about = {"model": str(self.base_path), "auxiliary": given, "keep": self._keep}
        result = self._run(model, callback, objective=objective, meter=Meter(self._cost()), about=about)
        if self.leads:
            trained = {
                "updates": result.progress.step, "tokens": result.progress.tokens, **about, "loss": asdict(asked.loss),
            }  # fmt: skip
            kvp_directory.save(self.out, model, self.base_path, trained)
        return result

    def _prepare(self) -> tuple[Tokenizer, int]:
        self.base = kvp_directory.openelm_config(self.base_path)
        tokenizer, layers = Tokenizer.load(self.base_path), self.base.num_layers
        ends(tokenizer)
        if self._keep is not None:
            self._kept = kept_layers(layers, self._keep)
            if len(self._kept) == layers:
                raise InputError(f"--keep {self._keep:g}: keeps all of the {layers} layers of {self.base_path}")
            self.config, self.places = pruned(self.base, self._kept), pruned_map(layers, self._kept)
        else:
            assert self.auxiliary_path is not None
            self.config = kvp_directory.openelm_config(self.auxiliary_path)
            if self.config.quantization is not None:
                raise InputError(
                    f"{self.auxiliary_path}: is quantized, and cannot be trained: give what it was quantized from"
                )
            kvp_directory.check_auxiliary(self.auxiliary_path, self.config, self.base)
            _check_pieces(self.auxiliary_path, tokenizer)
            try:
                self.places = layer_map(layers, self.config.num_layers)
            except InputError as error:
                raise InputError(f"{self.auxiliary_path}: {error}; give a smaller one") from None
        return tokenizer, self.base.max_context_length

    def _open_base(self) -> Model:
        dtype = mx.float32 if self._dtype is None else self._dtype
        name = next(name for name, each in device.DTYPES.items() if each == dtype)
        return open_model(self.base_path, name, config=self.base, widen=True).model

    def _open_auxiliary(self) -> Model:
        """Returns the auxiliary as it begins, in float32."""
        if self.auxiliary_path is not None:
            model = open_model(self.auxiliary_path, "float32", config=self.config, widen=True).model
            model.unfreeze()
            return model
        model, (weights, packing) = Model(self.config), read_weights(self.base_path, self.base)
        begun = []
        for name in self.config.shapes():
            there = _renamed(name, self._kept)
            if there in packing:
                scales, biases = (weights.get(part_of(there, kind)) for kind in ("scales", "biases"))
                assert scales is not None
                begun.append((name, lora_layers.dequantize(weights[there], scales, biases, **packing[there])))
            else:
                begun.append((name, weights[there].astype(mx.float32)))
        model.load_weights(begun)
        mx.eval(model.parameters())
        return model

    def _map_shapes(self) -> list[tuple[int, int]]:
        """Returns the inputs and outputs of each layer's map of keys, which are those of its map of values."""
        own = [heads * self.config.head_dim for heads in self.config.num_kv_heads]
        served = (heads * self.base.head_dim for heads in self.base.num_kv_heads)
        return [(own[place], outputs) for place, outputs in zip(self.places, served, strict=True)]

    def _cost(self) -> Cost:
        """Returns a token's cost in an update.

        The base is read as it is, and then by predicted keys and values, through which the backward pass goes: its
        weights want no gradients.
        """
        again = self.settings.grad_checkpoint
        own, base = update_cost(self.config, None, again), Cost.of(self.base)
        maps = 3 * sum(4 * inputs * outputs for inputs, outputs in self._map_shapes())
        return Cost(
            (*own.linear, *((3 + again) * flops for flops in base.linear), maps),
            (*own.attention, *((4 + again) * flops for flops in base.attention)),
            own.head + 2 * base.head,
        )

    def _model_identity(self) -> tuple[str, dict[str, Any]]:
        paths = [self.base_path, *([] if self.auxiliary_path is None else [self.auxiliary_path])]
        hashes = [kvp_directory.base_of(path).model for path in paths]
        weights = {f"loss.{name}": value for name, value in asdict(self._recipe.loss).items()}
        return hashlib.sha256(json.dumps([*hashes, self.places]).encode()).hexdigest(), weights


def pruned(config: ModelConfig, kept: Sequence[int]) -> ModelConfig:
    """Returns the shape of a model of which some layers are left, not quantized."""
    lists = ("num_query_heads", "num_kv_heads", "ffn_multipliers")
    left = {name: tuple(getattr(config, name)[layer] for layer in kept) for name in lists}
    return replace(config, quantization=None, **left)  # type: ignore[arg-type]


def fit(prediction: KVPrediction, batches: Iterator[Batch]) -> None:
    """Sets the maps to the least-squares fit of what the base projects to what the auxiliary projects.

    Of several processes each gives batches of its own, and all get the same maps.
    """
    sums = dict[tuple[int, int], list[mx.array]]()
    totals = dict[tuple[int, int], list[npt.NDArray[np.float64]]]()
    for batch in batches:
        segments = None if batch.segments is None else Segments(mx.array(batch.segments), batch.reach())
        own, base = (_all_projected(model, batch, segments) for model in (prediction.auxiliary, prediction.base))
        for layer, place in enumerate(prediction.places):
            for kind in (0, 1):
                rows, wanted = _rows(own[place][kind]), _rows(base[layer][kind])
                rows = mx.concatenate([rows, mx.ones((len(rows), 1))], axis=1)
                sums[layer, kind] = [rows.T @ rows, rows.T @ wanted]
        mx.eval(sums)
        for key, found in sums.items():
            new = [np.array(mx.distributed.all_sum(each), np.float64) for each in found]
            totals[key] = [one + other for one, other in zip(totals[key], new, strict=True)] if key in totals else new
    for (layer, kind), (squares, products) in totals.items():
        maps = prediction.maps[layer]
        linear = maps.to_values if kind else maps.to_keys
        damped = squares + _RIDGE * np.trace(squares) / len(squares) * np.eye(len(squares))
        solved = np.linalg.solve(damped, products)
        linear.weight, linear.bias = mx.array(solved[:-1].T, mx.float32), mx.array(solved[-1], mx.float32)


def _all_projected(model: Model, batch: Batch, segments: Segments | None) -> list[tuple[mx.array, mx.array]]:
    inputs: list[mx.array] = []
    model.transformer(mx.array(batch.inputs), None, segments, on_layer=inputs.append)
    return [projected(layer, x) for layer, x in zip(model.layers, inputs, strict=True)]


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1]).astype(mx.float32)


def _renamed(name: str, kept: Sequence[int]) -> str:
    """Returns the base's name for a weight of the layers that are left."""
    head, found, rest = name.partition(".layers.")
    if not found:
        return name
    layer, _, part = rest.partition(".")
    return f"{head}.layers.{kept[int(layer)]}.{part}"


def _check_pieces(path: Path, tokenizer: Tokenizer) -> None:
    for number, (piece, expected) in enumerate(zip_longest(Tokenizer.load(path).pieces, tokenizer.pieces)):
        if piece != expected:
            raise InputError(
                f"{path}: token {number} is {piece!r} and the base's {expected!r}: an auxiliary model needs the base's "
                "vocabulary"
            )
