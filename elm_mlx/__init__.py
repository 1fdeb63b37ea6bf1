"""OpenELM on MLX: `load` a model directory, `generate` from it.

Importing this loads a fast BLAS on Linux, which must come before MLX does, and nothing else:
the public names are imported when first used.
"""

import sys

if sys.argv[:1] == ["-m"] or (sys.argv and sys.argv[0].endswith("/elm-mlx")):  # the former: `python -m elm_mlx`
    # The command begins: Ctrl-C ends it without a traceback of imports. (`signal` itself is slow to import.)
    _signal = __import__("_signal")
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from typing import TYPE_CHECKING, Any

from elm_mlx import blas
from elm_mlx.version import __version__

blas.prefer_fast()

if TYPE_CHECKING:
    from elm_mlx.generation import generate, stream_generate
    from elm_mlx.store import load

__all__ = ["__version__", "generate", "load", "stream_generate"]


def __getattr__(name: str) -> Any:
    if name not in ("generate", "load", "stream_generate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from elm_mlx import generation, store

    return getattr(store if name == "load" else generation, name)
