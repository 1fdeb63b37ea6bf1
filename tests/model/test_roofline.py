"""Work counted by hand, and from weights as they lie in a model; a machine's speed against a product timed here."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from elm_mlx.model import roofline
from elm_mlx.model.config import PRESETS, ModelConfig
from elm_mlx.model.network import Model
from elm_mlx.model.roofline import Cost, causal

TWO_LAYERS = ModelConfig(
    vocab_size=100, model_dim=32, head_dim=8, num_query_heads=(2, 4), num_kv_heads=(1, 2), ffn_multipliers=(0.5, 2.0),
    ffn_dim_divisor=16,
)  # fmt: skip


def test_two_layers_by_hand() -> None:
    # qkv: (2 + 2) and (4 + 4) heads of 8; out: 16 and 32 back to 32; FFN of 16 and 64, gate and up, then down.
    first = 2 * (32 * 32 + 16 * 32 + 32 * 32 + 16 * 32)
    second = 2 * (32 * 64 + 32 * 32 + 32 * 128 + 64 * 32)
    cost = Cost.of(TWO_LAYERS)
    assert cost == Cost((first, second), (4 * 2 * 8, 4 * 4 * 8), 2 * 100 * 32, second - 2 * 32 * 64)
    # Three tokens see 1, 2 and 3 positions: two heads' scores and values in the first layer, four in the second.
    attention = (1 + 2 + 3) * (2 * 2 * 8 * 2 + 2 * 2 * 8 * 4)
    assert cost.forward(3, causal(3), 1) == 3 * (first + second) + attention + 2 * 100 * 32


@pytest.mark.parametrize(
    "config",
    [*(ModelConfig.preset(name) for name in PRESETS if name != "OpenELM-3B"), TWO_LAYERS,
     ModelConfig.scaled(vocab_size=96, num_layers=3, model_dim=64, head_dim=16, num_gqa_groups=2, ffn_dim_divisor=16,
                        ffn_with_glu=False, share_input_output_layers=False)],
)  # fmt: skip
def test_every_matrix_of_a_model_is_counted_once_a_token(config: ModelConfig) -> None:
    weights = dict(tree_flatten(Model(config).parameters()))  # not computed
    matrices = {name: weight.size for name, weight in weights.items() if weight.ndim == 2}
    embedding = matrices.pop("transformer.token_embeddings.weight")
    head = matrices.pop("lm_head.weight", embedding)
    cost = Cost.of(config)
    assert cost.forward(1, 0, 0) == 2 * sum(matrices.values()) and cost.head == 2 * head
    wide = sum(layer.attn.num_heads * layer.attn.head_dim for layer in Model(config).layers)
    assert cost.forward(0, 1, 0) == 4 * wide


def test_positions_that_are_seen() -> None:
    assert [causal(3), causal(1), causal(1, past=9), causal(2, past=5)] == [6, 1, 10, 6 + 7]
    assert causal(100) == causal(40) + causal(60, past=40)


def test_a_machine_is_as_fast_as_a_product_is_and_its_random_state_is_left_alone() -> None:
    mx.random.seed(3)
    before = mx.random.state[0].tolist()
    started = time.perf_counter()
    speed = roofline.matmul_speed(mx.float32, seconds=0.1)
    assert speed > 1e6 and time.perf_counter() - started < 30
    assert mx.random.state[0].tolist() == before


def test_a_faster_machine_is_given_larger_products(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []

    def timed(left: mx.array, right: mx.array) -> float:
        sides.append(left.shape[0])
        return 2 * left.shape[0] ** 3 / {256: 1e9, 512: 1.5e9}.get(left.shape[0], 1.6e9)

    ticks = (0.01 * tick for tick in itertools.count())
    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(roofline, "_timed", timed)
    assert roofline.matmul_speed(mx.float32, seconds=0.2) == pytest.approx(1.6e9)
    assert sides[:3] == [256, 512, 1024] and set(sides[3:]) == {1024}


def test_bandwidth_is_that_of_all_bytes_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_MATRIX_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "_timed", lambda left, right: 1e-3 * right.nbytes / (1 << 20))
    assert roofline.read_bandwidth(0.0) == pytest.approx((1 << 20) / 1e-3)
