"""OpenELM on MLX: `load` a model directory, `generate` from it. docs/python.md shows how.

Importing this loads a fast BLAS on Linux, which must come before MLX does, and nothing else:
the public names are imported when first used.
"""

import sys

# The former: `python -m elm_mlx`, and not another's package that imports this one.
if (sys.argv[:1] == ["-m"] and "elm_mlx" in sys.orig_argv) or (sys.argv and sys.argv[0].endswith("/elm-mlx")):
    # The command begins: Ctrl-C ends it without a traceback of imports. (`signal` itself is slow to import.)
    _signal = __import__("_signal")
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from importlib import import_module
from typing import TYPE_CHECKING, Any

from elm_mlx import blas
from elm_mlx.version import __version__

blas.prefer_fast()

if TYPE_CHECKING:
    from elm_mlx.errors import ElmError, InputError
    from elm_mlx.inference.batch import generate_batch
    from elm_mlx.inference.generation import generate, stream_generate
    from elm_mlx.store.loading import load, load_model

__all__ = [
    "ElmError", "InputError", "__version__", "generate", "generate_batch", "load", "load_model", "stream_generate",
]  # fmt: skip

_HOMES = {
    "ElmError": "errors", "InputError": "errors", "generate": "inference.generation",
    "generate_batch": "inference.batch", "load": "store.loading", "load_model": "store.loading",
    "stream_generate": "inference.generation",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"elm_mlx.{_HOMES[name]}"), name)
