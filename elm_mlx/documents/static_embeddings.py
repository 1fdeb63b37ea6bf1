"""Static embeddings: a text's vector is the mean of its tokens' vectors, so that a CPU makes thousands a second.

They are model2vec's, which is an extra: a directory of `model.safetensors` and `tokenizer.json`, as its models on the
hub are. They find what is said in other words, where BM25 finds the words themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elm_mlx import hub, reading
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.errors import ElmError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from elm_mlx.documents.index_file import Embedder

_WEIGHTS = "model.safetensors"
_FILES = ("config.json", "tokenizer.json", _WEIGHTS)
_MOST_WEIGHTS = 2 << 30


class StaticEmbeddings:
    """Embeddings from a directory.

    Attributes:
        width: numbers of a vector.
        sha256: of the weights.

    Raises:
        InputError: the directory holds none.
        ElmError: model2vec is not installed.
    """

    def __init__(self, directory: Path) -> None:
        missing = [name for name in _FILES if not (directory / name).is_file()]
        if missing:
            raise InputError(
                f"{directory}: no static embeddings, {' and '.join(missing)} missing: a directory is needed such as of "
                "minishlab/potion-base-8M"
            )
        try:
            from model2vec import StaticModel
        except ImportError:
            raise ElmError("vectors need model2vec: pip install 'elm-mlx[vectors]'") from None
        self.directory = directory
        self.sha256 = weights_hash(directory)
        try:
            self._model: Any = StaticModel.from_pretrained(directory, force_download=False)
        except Exception as error:  # the library's own, of many kinds
            raise InputError(f"{directory}: no static embeddings: {type(error).__name__}: {error}"[:300]) from None
        self.width = int(self._model.dim)

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float16]:
        """Returns the vectors of texts, of length 1, or 0 for a text of no known token: `(texts, width)`, float16."""
        import numpy as np

        made = self._model.encode([*texts], use_multiprocessing=False).astype(np.float32)
        length = np.linalg.norm(made, axis=1, keepdims=True)
        return (made / np.where(length > 0, length, 1)).astype(np.float16)


def weights_hash(directory: Path) -> str:
    """Returns the SHA-256 of the weights in hexadecimal digits. Raises InputError where they cannot be read."""
    with reading.opened(directory / _WEIGHTS) as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def embeddings_directory(name: Path, on_progress: OnProgress = no_progress) -> Path:
    """Returns the directory that `name` means: a path, or `OWNER/NAME` on the hub, downloaded where need be.

    Raises:
        InputError, ElmError: as of `hub.contents` and `hub.download`.
    """
    path = reading.expanded(name)
    repository = hub.repository(str(name))
    if path.exists() or repository is None:
        return path
    found = hub.snapshot(repository)
    if found is not None and all((found / each).exists() for each in _FILES):
        return found
    if hub.offline():
        raise ElmError(f"{name}: no such directory, it is not in the hub's cache, and HF_HUB_OFFLINE forbids to ask")
    contents = hub.contents(repository)
    return hub.download(
        repository, contents, [each for each in _FILES if each in contents.sizes], on_progress=on_progress
    )


def embeddings_of(embedder: Embedder, index: Path) -> StaticEmbeddings:
    """Returns the embeddings that an index has vectors of.

    Raises:
        InputError: they are gone, or others.
        ElmError: model2vec is not installed.
    """
    again = f"index anew: remove {index}, and run elm-mlx index"
    directory = Path(embedder.directory)
    if not directory.is_absolute() or not (directory / _WEIGHTS).is_file():
        raise InputError(
            f"{index}: its vectors are of {embedder.directory}, which is not there: put it back, or {again}"
        )
    if weights_hash(directory) != embedder.sha256:
        raise InputError(f"{index}: its vectors are of other weights than {embedder.directory} has now: {again}")
    found = StaticEmbeddings(directory)
    if found.width != embedder.width:
        raise InputError(
            f"{index}: its vectors have {embedder.width} numbers, and {directory} makes {found.width}: {again}"
        )
    return found
