"""The plain PyTorch side of `pytorch.py`: an OpenELM as one would write it down, and the loop that trains it.

    torch_loop.py SHAPE JOB STEPS DTYPE

SHAPE is the model's config as JSON, JOB an `.npz` of its initial weights by their canonical names and of token ids,
DTYPE `float32`, or `bfloat16`, which is autocast. Prints each update's loss and seconds as JSON. Needs PyTorch and
NumPy alone, and none of this project: it is run by whatever Python has them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Block(nn.Module):
    """Pre-norm attention with shared keys and rotated, normalised queries; then SwiGLU."""

    def __init__(self, config: dict[str, Any], layer: int):
        super().__init__()
        width, self.size, eps = config["model_dim"], config["head_dim"], config["rms_norm_eps"]
        self.heads, self.shared = config["num_query_heads"][layer], config["num_kv_heads"][layer]
        inner = config["ffn_dims"][layer]
        self.attn_norm, self.ffn_norm = Norm(width, eps), Norm(width, eps)
        self.q_norm, self.k_norm = Norm(self.size, eps), Norm(self.size, eps)
        self.qkv_proj = nn.Linear(width, (self.heads + 2 * self.shared) * self.size, bias=False)
        self.out_proj = nn.Linear(self.heads * self.size, width, bias=False)
        self.proj_1, self.proj_2 = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv_proj(self.attn_norm(x)).view(batch, length, -1, self.size).transpose(1, 2)
        queries, keys, values = qkv.split([self.heads, self.shared, self.shared], dim=1)
        queries, keys = turned(self.q_norm(queries), cos, sin), turned(self.k_norm(keys), cos, sin)
        if self.shared != self.heads:
            keys, values = (each.repeat_interleave(self.heads // self.shared, dim=1) for each in (keys, values))
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out_proj(attended.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.proj_1(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.proj_2(F.silu(gate) * up)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns queries or keys (…, length, head) turned by their positions: RoPE, in halves."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Network(nn.Module):
    """OpenELM with tied embeddings: ids (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, config: dict[str, Any], length: int):
        super().__init__()
        self.token_embeddings = nn.Embedding(config["vocab_size"], config["model_dim"])
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config["num_transformer_layers"]))
        self.norm = Norm(config["model_dim"], config["rms_norm_eps"])
        half = config["head_dim"] // 2
        angles = torch.outer(torch.arange(length), config["rope_freq_constant"] ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token_embeddings(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return F.linear(self.norm(x), self.token_embeddings.weight)


def fill(network: Network, weights: dict[str, np.ndarray]) -> None:
    """Our names are PyTorch's but for two levels."""
    short = {}
    for name, array in weights.items():
        for level in ("transformer.", "attn.", "ffn."):
            name = name.replace(level, "")
        short[name] = torch.from_numpy(array)
    network.load_state_dict(short, strict=False)  # not the angles
    missing = {name for name, _ in network.named_parameters()} ^ short.keys()
    assert not missing, missing


def main() -> None:
    config, job = json.loads(Path(sys.argv[1]).read_text()), dict(np.load(sys.argv[2]))
    steps, dtype = int(sys.argv[3]), sys.argv[4]
    ids = torch.from_numpy(job.pop("ids")).long()  # (batches, rows, length + 1)
    network = Network(config, ids.shape[2] - 1)
    fill(network, job)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses, seconds = [], []
    for step in range(steps):
        batch = ids[step % len(ids)]
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = network(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"losses": losses, "seconds": seconds}))


if __name__ == "__main__":
    main()
