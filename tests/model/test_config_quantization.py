"""A config's `quantization`: what MLX has is taken, whatever else is one line that names the key."""

from __future__ import annotations

from typing import Any

import pytest

from elm_mlx.errors import InputError
from elm_mlx.model.config import check_quantization

GOOD = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize(
    "quantization",
    [
        GOOD, {"group_size": 128, "bits": 1}, {**GOOD, "mode": "affine"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        {**GOOD, "model.embed_tokens": {"group_size": 32, "bits": 8}, "model.norm": False, "lm_head": True},
        {**GOOD, "quant_method": "mlx"},
    ],
)  # fmt: skip
def test_what_is_known(quantization: dict[str, Any]) -> None:
    check_quantization("config.json", quantization)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ([], "quantization is []: an object is needed"), ("4", "quantization is '4'"),
        ({"bits": 4}, "bits 4, group_size None: whole numbers"), ({**GOOD, "bits": 4.0}, "bits 4.0"),
        ({**GOOD, "bits": True}, "bits True"), ({**GOOD, "bits": 7}, "not support affine of 7 bits"),
        ({**GOOD, "group_size": 48}, "in groups of 48"), ({**GOOD, "bits": 10**300}, "not support affine of 1000"),
        ({**GOOD, "mode": "guess"}, "mode is 'guess': one of affine, mxfp4"), ({**GOOD, "mode": ["a"]}, "mode is ['a"),
        ({**GOOD, "mode": "mxfp4"}, "not support mxfp4 of 4 bits in groups of 64"),
        ({**GOOD, "lm_head": {"bits": 4}}, "quantization of 'lm_head': bits 4, group_size None"),
        ({**GOOD, "lm_head": 4}, "quantization of 'lm_head' is 4: an object is needed"),
        ({**GOOD, "x\n" * 99: {}}, "quantization of 'x\\nx"),
    ],
)  # fmt: skip
def test_what_is_not(quantization: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        check_quantization("config.json", quantization)
    text = str(error.value)
    assert text.startswith("config.json: quantization") and says in text and "\n" not in text and len(text) < 300
