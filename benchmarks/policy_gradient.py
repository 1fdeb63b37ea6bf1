"""The policy gradient's loss and gradients in PyTorch, written out by its formulas, kept as data for the tests.

    PYTHON benchmarks/policy_gradient.py

PYTHON has torch, which this project does not need. The formulas are those of DAPO (arXiv 2503.14476, equations 8, 9 and
10) without what is left out here: a mean over all tokens of all answers of min(r A, clip(r, 0.8, 1.28) A), where r is
the ratio of a token's probability now and as it was drawn, and A the answer's reward less its group's mean, or that
divided by the group's standard deviation. The data go to `tests/fixtures/policy_gradient.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "policy_gradient.json"
GROUPS, SAMPLES, LENGTH, WIDTH, TOKENS = 3, 4, 6, 5, 11


def main() -> None:
    torch.manual_seed(7)
    answers = GROUPS * SAMPLES
    hidden = torch.randn(answers, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(TOKENS, (answers, LENGTH))
    trained = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (answers, 1))
    rewards = torch.randint(2, (GROUPS, SAMPLES)).double()
    before = torch.log_softmax((hidden + 0.3 * torch.randn_like(hidden)) @ weight.T, dim=-1).detach()
    before = before.gather(-1, targets[..., None])[..., 0]
    found: dict[str, Any] = {
        "torch": torch.__version__, "hidden": hidden.tolist(), "weight": weight.tolist(), "targets": targets.tolist(),
        "trained": trained.tolist(), "rewards": rewards.tolist(), "before": before.tolist(), "cases": [],
    }  # fmt: skip
    for by_deviation in (False, True):
        advantages = rewards - rewards.mean(dim=1, keepdim=True)
        if by_deviation:
            advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
        each = advantages.reshape(-1, 1)
        for repeated in (False, True):
            hidden.grad = weight.grad = None
            now = torch.log_softmax(hidden @ weight.T, dim=-1).gather(-1, targets[..., None])[..., 0]
            ratio = torch.exp(now - (before if repeated else now.detach()))
            gain = torch.minimum(ratio * each, ratio.clamp(0.8, 1.28) * each)
            loss = -(gain * trained).sum() / trained.sum()
            loss.backward()
            clipped = (((ratio > 1.28) & (each > 0)) | ((ratio < 0.8) & (each < 0))) & trained
            assert hidden.grad is not None and weight.grad is not None
            found["cases"].append({
                "by_deviation": by_deviation, "repeated": repeated, "advantages": advantages.tolist(),
                "loss": loss.item(), "clipped": clipped.sum().item() / trained.sum().item(),
                "hidden_gradient": hidden.grad.tolist(), "weight_gradient": weight.grad.tolist(),
            })  # fmt: skip
    DATA.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
