"""transformers' side of `families.py`: `families_worker.py ROOT`, the job as JSON on stdin, the answer on stdout.

Needs torch and transformers alone, and none of this project: it is run by whatever Python has them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers


def case(path: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Logits after the last token of each prompt, a greedy answer's tokens, and the config as it is written anew."""
    logits = []
    for length in job["lengths"]:  # a model each, for dynamic RoPE remembers what it has seen
        with torch.no_grad():
            rows = loaded(path)(torch.tensor([job["ids"][:length]])).logits
        logits.append([float(f"{value:.6g}") for value in rows[0, -1].tolist()])
    said = torch.tensor([job["ids"][: job["prompt"]]])
    for _ in range(job["new"]):  # each token by a forward pass over all before it: what a cache is to give too
        with torch.no_grad():
            said = torch.cat([said, loaded(path)(said).logits[:, -1].argmax(-1)[None]], dim=1)
    with tempfile.TemporaryDirectory() as temporary:
        loaded(path).config.save_pretrained(temporary)
        written = json.loads((Path(temporary) / "config.json").read_text())
    return {"logits": logits, "answer": said[0, job["prompt"] :].tolist(), "config": written}


def loaded(path: Path) -> Any:
    """Returns transformers' model of a directory, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    return model.float().eval()


def main() -> None:
    job = json.load(sys.stdin)
    cases = []
    for path in sorted(Path(sys.argv[1]).iterdir()):
        try:
            cases.append(case(path, job))
        except Exception as error:  # a version that does not know the family, or refuses the config
            cases.append({"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__, "cases": cases}))


if __name__ == "__main__":
    main()
