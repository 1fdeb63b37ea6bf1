"""A model as a GGUF file and as a directory again: the same weights, the same ids, the same template."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import other_models
import pytest
import sentencepiece_models
from checkpoints import save_hub, tiny, weights
from sentencepiece_models import EXACT

from elm_mlx.model.config import read_config
from elm_mlx.store.loading import load_model
from elm_mlx.text import chat_template
from elm_mlx.text.tokenizer import read_vocabulary
from elm_mlx_convert import convert, export_gguf

TEXTS = [*other_models.TEXTS[:3], "", " two  spaces\n\n\ttabs 12345", "</s><|im_end|> e\u0301 \x00"]


@pytest.mark.parametrize("name", ["OpenELM", *(name for name in other_models.CONFIGS if name not in ("phi3", "mamba"))])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    if name == "OpenELM":
        config = tiny(vocab_size=400)
        save_hub(first, config, weights(config))
        sentencepiece_models.train(first / "tokenizer.model", **EXACT)
        (first / "chat_template.jinja").write_text(other_models.CHATML)
    else:
        other_models.write_model(
            first, name, {"attention_bias": False, "rope_scaling": None, "query_pre_attn_scalar": 16}
        )
    export_gguf(first, tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "second", dtype="float32")
    one, other = (read_vocabulary(path, read_config(path)) for path in (first, tmp_path / "second"))
    assert one.tokenizer is not None
    assert other.tokenizer is not None
    assert one.end_ids == other.end_ids
    for text in TEXTS:
        assert other.tokenizer.encode(text) == one.tokenizer.encode(text), text
    ids = mx.array([one.tokenizer.encode(TEXTS[0])])
    logits = [np.array(load_model(path)(ids)) for path in (first, tmp_path / "second")]
    size = logits[1].shape[-1]  # without the rows past the last token
    np.testing.assert_allclose(logits[0][..., :size], logits[1], atol=1e-4)
    assert chat_template.own_source(first)[0] == chat_template.own_source(tmp_path / "second")[0]
