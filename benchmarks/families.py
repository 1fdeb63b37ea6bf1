"""Other families' networks against transformers: its logits and its configs, kept as data for the tests.

    python benchmarks/families.py PYTHON [PYTHON ...]

Each PYTHON has torch and transformers, in an environment of its own: this project doesn't need them. Of every small
model of `tests/family_cases.py` transformers computes logits in float32, says what a greedy answer is, and writes the
`config.json` anew in its own way. All of it goes to `tests/fixtures/families.json`, in place of what that version left
there before, and how far our logits are from it is printed: `tests/model/test_family_references.py` asks the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "fixtures" / "families.json"


def reference(python: str, root: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Returns the answers of `python`'s transformers for the directories in `root`."""
    worker = Path(__file__).with_name("families_worker.py")
    done = subprocess.run([python, worker, root], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="+", help="a Python that has torch and transformers")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import family_cases

    from elm_mlx import load_model  # isort: skip  (its BLAS must come before MLX)
    import mlx.core as mx
    import numpy as np

    kept = json.loads(DATA.read_text()) if DATA.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        names = list(family_cases.CASES)
        for number, name in enumerate(names):
            family_cases.write(Path(temporary) / f"{number:02}", name)
        job = {
            "ids": family_cases.IDS, "lengths": family_cases.LENGTHS,
            "prompt": family_cases.ORIGINAL - 4, "new": family_cases.NEW_TOKENS,
        }  # fmt: skip
        for python in arguments.python:
            found = reference(python, Path(temporary), job)
            print(f"transformers {found['transformers']}, torch {found['torch']}")
            cases = dict(zip(names, found["cases"], strict=True))
            kept[found["transformers"].partition(".")[0]] = {**found, "cases": cases}
            for number, (name, case) in enumerate(cases.items()):
                if "error" in case:
                    print(f"{name:40} {case['error'][:100]}")
                    continue
                model = load_model(Path(temporary) / f"{number:02}")
                worst = 0.0
                for length, expected in zip(family_cases.LENGTHS, case["logits"], strict=True):
                    logits = np.array(model(mx.array([family_cases.IDS[:length]]))[0, -1])
                    worst = max(worst, float(np.abs(logits - expected).max() / np.std(expected)))
                print(f"{name:40} {worst:.1e} of the logits' spread")
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps(kept, indent=0, ensure_ascii=False).replace(",\n", ",").replace("[\n", "[") + "\n")
    print(f"{DATA.relative_to(ROOT)}: {DATA.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
