"""The figures of the code's structure: `python benchmarks/house.py`, of this checkout or of `--root DIR`.

Two commands run as processes of their own under a profiler, on the model of examples/classics and a data set made
here: `generate` of one token, and `lora` of two updates. Counted in each, of the files of elm_mlx and convert:

- entered: files of which a function ran. Code that runs as a module or a class body is imported does not count, nor do
  lambdas, comprehensions, and what dataclasses write.
- pairs: two files that call each other, A a function of B and B one of A. The caller is the Python frame right below,
  whether it called directly, through a function of C, or through a function or an iterator that it had been passed: a
  callback is a call, as is a step of a generator. Calls that other packages make in between (MLX's gradient, typer)
  are theirs. The functions called each way are listed.
- config.json: how often the process opens a file of that name.

The rest is read from the source: file stems (`__init__` aside) and names of top-level classes that occur twice, modules
that lie directly in elm_mlx, lines, and circles of imports, those within functions included, those for type checkers
alone not. `--python PY` runs the commands, by default that of DIR/.venv; `--json` prints all of it; `--static` runs
nothing. `violations` is for a test.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDERS = {"elm_mlx": "elm_mlx", "elm_mlx_convert": "convert"}  # by package
AIMS = {
    "generate: files entered": 14, "generate: pairs that call both ways": 0, "generate: config.json opened": 1,
    "lora: files entered": 26, "lora: pairs that call both ways": 0, "stems that occur twice": 0,
    "classes that occur twice": 0, "flat modules in elm_mlx": 12, "circles of imports": 0, "lines": 22_000,
}  # fmt: skip


def sources(root: Path) -> list[Path]:
    """The product's Python files, relative to `root`."""
    return sorted(path.relative_to(root) for folder in FOLDERS.values() for path in (root / folder).rglob("*.py"))


def static_figures(root: Path) -> dict[str, Any]:
    """Counts what needs no run."""
    files = sources(root)
    trees = {path: ast.parse((root / path).read_bytes()) for path in files}
    classes = [(node.name, path) for path in files for node in trees[path].body if isinstance(node, ast.ClassDef)]
    lines: dict[str, int] = defaultdict(int)
    for path in files:
        room = "elm_mlx, flat" if path.parent.name == "elm_mlx" else "/".join(path.parts[:2][: len(path.parts) - 1])
        lines[room] += len((root / path).read_bytes().splitlines())
    return {
        "stems that occur twice": _twins((path.stem, path) for path in files if path.stem != "__init__"),
        "classes that occur twice": _twins(classes),
        "flat modules in elm_mlx": [str(path) for path in files if path.parent == Path("elm_mlx")],
        "circles of imports": circles({path: _imported(path, trees[path], {*files}) for path in files}),
        "files": len(files), "lines": sum(lines.values()), "lines by room": dict(sorted(lines.items())),
    }  # fmt: skip


def violations(root: Path = ROOT) -> list[str]:
    """Returns breaches of the rules that need no run: names that occur twice, too many flat modules, circles."""
    figures = static_figures(root)
    names = ("stems that occur twice", "classes that occur twice", "flat modules in elm_mlx", "circles of imports")
    return [f"{name}: {figures[name]}" for name in names if len(figures[name]) > AIMS[name]]


def circles(imports: dict[Path, set[Path]]) -> list[list[str]]:
    """The groups of files that import each other, directly or by way of others."""
    reached = {path: _reachable(path, imports) for path in imports}
    mutual = ({path, *(other for other in reached[path] if path in reached[other])} for path in imports)
    return [[*map(str, group)] for group in sorted({tuple(sorted(group)) for group in mutual if len(group) > 1})]


def _twins(named: Iterable[tuple[str, Path]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, path in named:
        found[name].append(str(path))
    return {name: paths for name, paths in sorted(found.items()) if len(paths) > 1}


def _reachable(start: Path, imports: dict[Path, set[Path]]) -> set[Path]:
    seen: set[Path] = set()
    waiting = [start]
    while waiting:
        new = imports[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def _imported(path: Path, tree: ast.AST, files: set[Path]) -> set[Path]:
    """The files whose modules, or names in them, a file imports."""
    found = set()
    for node in _runtime_imports(tree):
        if isinstance(node, ast.Import):
            found |= {_file(alias.name, files) for alias in node.names}
            continue
        package = [next(name for name, folder in FOLDERS.items() if folder == path.parts[0]), *path.parts[1:-1]]
        base = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        found |= {_file(f"{module}.{alias.name}", files) or _file(module, files) for alias in node.names}
    return {each for each in found if each is not None and each != path}


def _runtime_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for each in child.orelse:
                yield from _runtime_imports(each)
        else:
            yield from _runtime_imports(child)


def _file(module: str, files: set[Path]) -> Path | None:
    first, *rest = module.split(".")
    path = Path(FOLDERS.get(first, first), *rest)
    return next((each for each in (path.with_suffix(".py"), path / "__init__.py") if each in files), None)


def measured_figures(root: Path, python: Path) -> dict[str, Any]:
    """Counts what shows only when the two commands run."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary).resolve()
        packages = work / "packages"  # before whatever checkout `python` has installed
        packages.mkdir()
        for name, folder in FOLDERS.items():
            (packages / name).symlink_to(root / folder)
        env = {**os.environ, "PYTHONPATH": str(packages)}
        classics, model, data = root / "examples" / "classics", work / "model", work / "data"
        checkpoint, tokenizer = classics / "checkpoint_average.pt", classics / "tokenizer.model"
        start = [str(python), "-m", "elm_mlx", "convert", str(checkpoint), str(model), "--tokenizer", str(tokenizer)]
        subprocess.run(start, check=True, env=env, cwd=work, stdout=subprocess.DEVNULL)
        data.mkdir()
        for name, count in (("train", 24), ("valid", 4)):
            rows = ({"prompt": "Where is the King?", "completion": f"In room {number}."} for number in range(count))
            (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        commands = {
            "generate": ["generate", model, "--prompt", "Where is the King?", "--max-tokens", "1"],
            "lora": ["lora", model, "--data", data, "--iters", "2", "--out", work / "adapter"],
        }
        figures: dict[str, Any] = {}
        for name, arguments in commands.items():
            traced = work / f"{name}.json"
            line = [str(python), __file__, "--trace", str(packages), str(traced), *map(str, arguments)]
            done = subprocess.run(line, env=env, cwd=work, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            figures |= {f"{name}: {figure}": value for figure, value in json.loads(traced.read_text()).items()}
    return figures


def trace(packages: Path, to: Path, arguments: list[str]) -> None:
    """Runs a command in this process, and writes down which files it entered."""
    import threading

    prefix = f"{packages}{os.sep}"
    entered: set[str] = set()
    calls: dict[tuple[str, str], set[str]] = defaultdict(set)
    opened = 0

    def function_in(frame: FrameType | None) -> str | None:
        """The product's file that a frame's function is from."""
        if frame is None or not frame.f_code.co_flags & 1 or not frame.f_code.co_filename.startswith(prefix):
            return None
        return frame.f_code.co_filename[len(prefix) :].replace("elm_mlx_convert", "convert", 1)

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (callee := function_in(frame)) is None:
            return
        if not frame.f_code.co_name.startswith("<"):
            entered.add(callee)
        caller = function_in(frame.f_back)
        if caller is not None and caller != callee:
            calls[caller, callee].add(frame.f_code.co_name)

    def audit(event: str, details: tuple[Any, ...]) -> None:
        nonlocal opened
        opened += event == "open" and isinstance(details[0], str) and Path(details[0]).name == "config.json"

    sys.argv = ["elm-mlx", *arguments]
    sys.addaudithook(audit)
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        from elm_mlx.cli import main

        main()
    finally:
        sys.setprofile(None)
        both = [(a, b) for a, b in sorted(calls) if a < b and (b, a) in calls]
        names = {pair: ", ".join(sorted(functions)) for pair, functions in calls.items()}
        pairs = [f"{a} calls of {b}: {names[a, b]}; which calls: {names[b, a]}" for a, b in both]
        figures = {"files entered": sorted(entered), "pairs that call both ways": pairs, "config.json opened": opened}
        to.write_text(json.dumps(figures))


def show(figures: dict[str, Any]) -> None:
    """A table of the figures and their aims, and below it what they count."""
    counts = {name: value if isinstance(value, int) else len(value) for name, value in figures.items()}
    del counts["lines by room"]
    print(f"{'':38}{'now':>8}{'aim':>8}")
    for name, count in counts.items():
        print(f"{name:38}{count:8,}{AIMS.get(name, ''):>8}")
    for name, value in figures.items():
        if not isinstance(value, int) and value:
            print(f"\n{name}")
            for each in value.items() if isinstance(value, dict) else value:
                print("   ", each if isinstance(each, str) else " ".join(map(str, each)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout")
    parser.add_argument("--python", type=Path, help="what runs its commands (ROOT/.venv's)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--static", action="store_true", help="run no commands")
    options = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may leave before the last line
    root = options.root.resolve()
    python = options.python or root / ".venv" / "bin" / "python"
    figures = ({} if options.static else measured_figures(root, python.absolute())) | static_figures(root)
    print(json.dumps(figures, indent=1)) if options.json else show(figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trace"]:
        trace(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        main()
