"""Inputs of all kinds damaged at random: how many are answered, refused in one line, or neither.

    python benchmarks/fuzz.py                           every kind, 1,000 cases of each
    python benchmarks/fuzz.py config template --cases 20000 --seed 7
    python benchmarks/fuzz.py config --seed 7 --case 1234     one case again: its file and its traceback

Exit code 1 where any case is neither. The kinds are those of tests/fuzz_kinds.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import fuzzing
from fuzz_kinds import KINDS, mx

_SHOWN = 20  # cases of a kind that are neither


def main() -> int:
    """Runs what the command line asks for. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--cases", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="do this one alone, with its traceback")
    given = parser.parse_args()
    mx.disable_compile()  # on a CPU each other shape would take a compiler of C++ a third of a second
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    unknown = [name for name in given.kinds if name not in KINDS]
    if unknown:
        parser.error(f"no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    kinds = [KINDS[name] for name in given.kinds or KINDS]
    if given.case is not None:
        return _again(kinds[0], given.seed, given.case)
    print(f"{'kind':22} {'cases':>7} {'ok':>7} {'refused':>7} {'neither':>7} {'seconds':>8} {'peak MB':>8}")
    neither = 0
    for kind in kinds:
        counts = fuzzing.run(kind, given.cases, given.seed)
        neither += len(counts.wrong)
        print(
            f"{kind.name:22} {given.cases:7} {counts.ok:7} {counts.refused:7} {len(counts.wrong):7} "
            f"{counts.seconds:8.1f} {counts.peak / 1e6:8.0f}"
        )
        for number, what in list(counts.wrong.items())[:_SHOWN]:
            print(f"    case {number}: {what}")
    print(f"{neither} of {given.cases * len(kinds)} cases are neither answered nor refused in one line")
    return 1 if neither else 0


def _again(kind: fuzzing.Kind, seed: int, number: int) -> int:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    kind.write(folder)
    name, data = fuzzing.damaged(kind, folder, seed, number)
    (folder / name).write_bytes(data)
    print(f"{folder / name}", flush=True)
    kind.use(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
