"""GGUF files that `elm-mlx export` writes, against llama.cpp itself: logits, greedy text, token ids, an adapter.

    python benchmarks/gguf_logits.py PYTHON [MODEL ...]

PYTHON has llama-cpp-python, in an environment of its own: this project doesn't need it. Small seeded models of every
family go to llama.cpp in float32, with an adapter too; how far its logits are from ours is printed, and they are kept
in `tests/fixtures/gguf.json` with the hash of the file that it read: `tests/convert/test_gguf_references.py` asks
whether the same file is written still. Of each MODEL directory the file as it is stored and one in float32 are compared
in the same way, and the ids of many texts where it has a tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "fixtures" / "gguf.json"
NEW = 24
PROMPT = "Once upon a time there was a king who asked"
TEXTS = [
    "", " ", "Hello, world!", "  two  spaces and\ttab\n\nnew lines \n", "12345 6789.10 3.14159 1,000,000 ½",
    "Zürich, naïve café, 東京で寿司を食べる。 Привет, мир! مرحبا 🙂 👩\u200d👧 e\u0301 \uff26\uff35 \ufb01\u00a0\u200b",
    "\x00\x07\x1b",
    "I'll, we've, it's, THEY'RE 'quoted'", "</s> <s> <|im_start|> [INST] <0x41>", "a" * 60 + " " + "ab" * 30,
    (ROOT / "README.md").read_text("utf-8")[:6000], Path(__file__).read_text("utf-8")[:6000],
]  # fmt: skip
SCRIPTS = ((32, 127), (160, 0x2FFF), (0x3000, 0xD7FF), (0x1F300, 0x1F6FF))


def texts() -> list[str]:
    """Returns texts to encode: ours, and a hundred of random characters of many scripts."""
    draw = random.Random(1)
    return [*TEXTS, *("".join(chr(draw.randrange(*draw.choice(SCRIPTS))) for _ in range(60)) for _ in range(100))]


def asked(python: str, file: Path, question: dict[str, Any], adapter: Path | None = None) -> dict[str, Any]:
    """Returns llama.cpp's answers about a file. Raises RuntimeError with its last words where it has none."""
    worker = Path(__file__).with_name("gguf_worker.py")
    command = [python, str(worker), str(file), *([] if adapter is None else [str(adapter)])]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split()[-60:]))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def small_models(python: str, scratch: Path) -> dict[str, Any]:
    """Compares the small models, and returns what is kept of them."""
    import gguf_cases
    from family_cases import IDS

    kept = {}
    for number, name in enumerate(gguf_cases.NAMES):
        case = gguf_cases.write(scratch / f"{number:02}", name)
        found = asked(python, case.file, {"prompts": [IDS]}, case.adapter)
        last = found["logits"][0][-1]
        print(f"{name:40} {gguf_cases.distance(case, last):.1e} of the logits' spread")
        kept[name] = {
            "sha256": [sha256(file) for file in (case.file, case.adapter) if file is not None],
            "logits": [float(f"{value:.7g}") for value in last],
        }
    return kept


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def whole_model(python: str, directory: Path, scratch: Path) -> None:
    """Compares a model as it is stored, and in float32."""
    from elm_mlx import load_model  # isort: skip  (its BLAS must come before MLX)
    import mlx.core as mx
    import numpy as np

    from elm_mlx.model.config import read_config
    from elm_mlx.text.tokenizer import read_vocabulary
    from elm_mlx_convert import export_gguf

    config = read_config(directory)
    tokenizer = read_vocabulary(directory, config).tokenizer
    ids = tokenizer.encode(PROMPT) if tokenizer else [1, *range(100, 140)]
    model = load_model(directory)
    greedy = list(ids)
    for _ in range(NEW):
        greedy.append(int(model(mx.array([greedy]))[0, -1].argmax().item()))
    ours = np.array(model(mx.array([ids]))[0].astype(mx.float32))
    for kind in ("as-stored", "f32"):
        file = scratch / "model.gguf"
        done = export_gguf(directory, file, kind=kind, verify=True, overwrite=True)
        question = {"prompts": [ids], "new": NEW, "texts": texts() if tokenizer else []}
        found = asked(python, file, question)
        theirs = np.array(found["logits"][0])
        spread = float(np.abs(ours - theirs).max() / ours.std())
        same = next(
            (
                i
                for i, pair in enumerate(zip(greedy[len(ids) :], found["greedy"][0], strict=True))
                if pair[0] != pair[1]
            ),
            NEW,
        )
        words = "" if tokenizer is None else f"; {agreement(tokenizer, found['ids'])}"
        print(
            f"{directory.name}, {kind} ({' and '.join(done.types)}): {spread:.1e} of the logits' spread, the likeliest "
            f"token the same at {int((ours.argmax(-1) == theirs.argmax(-1)).sum())} of {len(ids)} places, "
            f"{same} of {NEW} tokens of greedy text{words}"
        )
        file.unlink()


def agreement(tokenizer: Any, found: list[list[int]]) -> str:
    """Says for how many texts a tokenizer gives the ids that llama.cpp found."""
    pairs = [(tokenizer.encode(text), ids) for text, ids in zip(texts(), found, strict=True)]
    return f"the same ids for {sum(ours == theirs for ours, theirs in pairs)} of {len(pairs)} texts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="a Python that has llama-cpp-python")
    parser.add_argument("models", nargs="*", type=Path, help="model directories")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    with tempfile.TemporaryDirectory() as temporary:
        kept = small_models(arguments.python, Path(temporary))
        for directory in arguments.models:
            whole_model(arguments.python, directory, Path(temporary))
    DATA.write_text(json.dumps(kept, indent=0, ensure_ascii=False).replace(",\n", ",").replace("[\n", "[") + "\n")
    print(f"{DATA.relative_to(ROOT)}: {DATA.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
