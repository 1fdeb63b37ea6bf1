"""llama.cpp's answers about one GGUF file, for `gguf_logits.py`: the ids of texts, logits, and greedy text.

    PYTHON gguf_worker.py FILE [ADAPTER] < QUESTION > ANSWER

PYTHON has llama-cpp-python, in an environment of its own. The question is a JSON object of "texts" to encode and of
"prompts" of ids, whose logits after each token come back, and "new" tokens of greedy text. Keys and values are float32,
so that nothing is rounded that the file does not round.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np

F32 = 0  # GGML's number


class Network:
    """A loaded model, with an adapter or without."""

    def __init__(self, path: str, adapter: str | None) -> None:
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp cannot read {path}")
        self.vocabulary = api.llama_model_get_vocab(self.model)
        self.size = api.llama_vocab_n_tokens(self.vocabulary)
        self.adapter = api.llama_adapter_lora_init(self.model, adapter.encode()) if adapter else None
        if adapter and not self.adapter:
            sys.exit(f"llama.cpp cannot read {adapter}")

    def encode(self, text: str) -> list[int]:
        """Returns a text's ids, with BOS where the file has it; names of control tokens in it are letters."""
        data = text.encode()
        ids = (api.llama_token * (len(data) + 8))()
        count = api.llama_tokenize(self.vocabulary, data, len(data), ids, len(ids), True, False)
        return list(ids[:count])

    def answer(self, ids: list[int], new: int) -> tuple[list[list[float]], list[int]]:
        """Returns the logits after each token of a prompt, and the likeliest tokens that follow."""
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = len(ids) + new
        settings.type_k = settings.type_v = F32
        settings.flash_attn_type = 0
        settings.n_threads = settings.n_threads_batch = 2
        context = api.llama_init_from_model(self.model, settings)
        if self.adapter:
            scales = (api.ctypes.c_float * 1)(1.0)
            adapters = (api.llama_adapter_lora_p_ctypes * 1)(self.adapter)
            if api.llama_set_adapters_lora(context, adapters, 1, scales):
                sys.exit("llama.cpp does not take the adapter")
        logits, text = [], []
        try:
            asked = list(enumerate(ids))
            for _ in range(1 + new):
                rows = self._rows(context, asked)
                if not logits:
                    logits = rows.tolist()
                if len(text) == new:
                    break
                text.append(int(rows[-1].argmax()))
                asked = [(asked[-1][0] + 1, text[-1])]
        finally:
            api.llama_free(context)
        return logits, text

    def _rows(self, context: Any, tokens: list[tuple[int, int]]) -> Any:
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, (at, token) in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, at, True
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if api.llama_decode(context, batch):
            sys.exit("llama.cpp cannot compute the prompt")
        found = [
            np.ctypeslib.as_array(api.llama_get_logits_ith(context, at), (self.size,)).copy()
            for at in range(len(tokens))
        ]
        api.llama_batch_free(batch)
        return np.stack(found)


def main() -> None:
    question = json.load(sys.stdin)
    network = Network(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
    answers = [network.answer(ids, question.get("new", 0)) for ids in question.get("prompts", [])]
    json.dump(
        {
            "ids": [network.encode(text) for text in question.get("texts", [])],
            "logits": [logits for logits, _ in answers],
            "greedy": [text for _, text in answers],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
