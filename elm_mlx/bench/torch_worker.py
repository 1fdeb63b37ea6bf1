"""The PyTorch side: an OpenELM as one would write it down, with a cache, for whatever Python has PyTorch.

    PYTHON torch_worker.py MODEL DTYPE

Reads and prints the lines that `side_worker` does, and unquantized model directories. It needs PyTorch alone, and none
of this project: an environment of its own runs it.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Weights = dict[str, torch.Tensor]


class Network:
    """Weights by their canonical names, and one forward pass over a cache of fixed capacity."""

    def __init__(self, config: dict[str, Any], weights: Weights, capacity: int, batch: int):
        self.config, self.weights, self.offset = config, weights, 0
        size, some = config["head_dim"], weights["transformer.norm.weight"]
        shape = [(batch, heads, capacity, size) for heads in config["num_kv_heads"]]
        self.caches = [(some.new_zeros(each), some.new_zeros(each)) for each in shape]
        half = size // 2
        frequencies = config["rope_freq_constant"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(capacity, dtype=torch.float64), frequencies)
        self.cos, self.sin = (each.repeat(1, 2).to(some.dtype).to(some) for each in (angles.cos(), angles.sin()))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(batch, length)` to the last ones' logits `(batch, vocab)`."""
        weights = self.weights
        embedding = weights["transformer.token_embeddings.weight"]
        x = F.embedding(ids, embedding)
        start, self.offset = self.offset, self.offset + ids.shape[1]
        for layer in range(len(self.caches)):
            x = x + self._attention(layer, self._norm(x, f"transformer.layers.{layer}.attn_norm"), start)
            x = x + self._feed_forward(layer, self._norm(x, f"transformer.layers.{layer}.ffn_norm"))
        return F.linear(self._norm(x[:, -1], "transformer.norm"), weights.get("lm_head.weight", embedding))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def _attention(self, layer: int, x: torch.Tensor, start: int) -> torch.Tensor:
        config, name = self.config, f"transformer.layers.{layer}.attn"
        batch, length, _ = x.shape
        heads, shared, size = config["num_query_heads"][layer], config["num_kv_heads"][layer], config["head_dim"]
        qkv = F.linear(x, self.weights[f"{name}.qkv_proj.weight"]).view(batch, length, -1, size).transpose(1, 2)
        queries, keys, values = qkv.split([heads, shared, shared], dim=1)
        if config["normalize_qk_projections"]:
            queries, keys = self._norm(queries, f"{name}.q_norm"), self._norm(keys, f"{name}.k_norm")
        cos, sin = self.cos[start : self.offset], self.sin[start : self.offset]
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        kept = self.caches[layer]
        for cache, new in zip(kept, (keys, values), strict=True):
            cache[:, :, start : self.offset] = new
        keys, values = (cache[:, :, : self.offset] for cache in kept)
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=length > 1, enable_gqa=True)
        return F.linear(out.transpose(1, 2).reshape(batch, length, -1), self.weights[f"{name}.out_proj.weight"])

    def _feed_forward(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        name = f"transformer.layers.{layer}.ffn"
        x = F.linear(x, self.weights[f"{name}.proj_1.weight"])
        if self.config["ffn_with_glu"]:
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.silu(x)
        return F.linear(x, self.weights[f"{name}.proj_2.weight"])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def read(path: Path, dtype: torch.dtype, where: str) -> Weights:
    """Reads every tensor of the directory's safetensors files."""
    weights = {}
    for file in sorted(path.glob("model*.safetensors")):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(bytes(data[8:start])).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                raw = torch.frombuffer(data, dtype=torch.uint8, offset=start + begin, count=end - begin)
                weights[name] = raw.clone().view(DTYPES[entry["dtype"]]).view(entry["shape"]).to(dtype).to(where)
    return weights


def measure(config: dict[str, Any], weights: Weights, prompts: list[list[int]], new: int) -> dict[str, Any]:
    where = weights["transformer.norm.weight"].device
    ids = torch.tensor(prompts, device=where)
    network = Network(config, weights, ids.shape[1] + new, len(prompts))
    times, text = [time.perf_counter()], []
    for _ in range(new):
        ids = network(ids).argmax(dim=-1, keepdim=True)
        text += ids[:, 0].tolist()  # they are known now, on a GPU too
        times.append(time.perf_counter())
    first, rest = times[1] - times[0], times[-1] - times[1]
    decode = len(prompts) * (new - 1) / rest if new > 1 else 0.0
    figures = {"first": first, "prompt": sum(map(len, prompts)) / first, "decode": decode}
    return figures | {"memory": memory(), "text": text}


def memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if torch.backends.mps.is_available():
        return torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    path, name = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((path / "config.json").read_text())
    if config["model_type"] != "openelm" or "quantization" in config:
        sys.exit("the PyTorch side runs unquantized OpenELMs alone")
    where = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    weights = read(path, getattr(torch, name), where)
    about = {"name": f"PyTorch {torch.__version__}", "dtype": name, "notes": [f"on {where}"]}
    print(json.dumps(about), flush=True)
    size = config["vocab_size"]
    with torch.inference_mode():
        for line in sys.stdin:
            asked = json.loads(line)
            # As `suites.prompt_ids`, which this cannot import.
            prompts = [
                [1] + [3 + (i * 7919 + row * 104_729 + 37) % max(1, size - 3) for i in range(asked["prompt"] - 1)]
                for row in range(asked["batch"])
            ]
            print(json.dumps(measure(config, weights, prompts, asked["new"])), flush=True)


if __name__ == "__main__":
    main()
