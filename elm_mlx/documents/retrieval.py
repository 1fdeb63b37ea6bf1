"""Finds the passages that a question is answered from: by their words (BM25), by vectors where there are any, or both.

Both rankings become one by reciprocal rank fusion (Cormack, Clarke and Büttcher, 2009): each adds weight / (60 + rank).
By words alone, what scores far below the best is left out.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from elm_mlx import reading
from elm_mlx.documents import index_file
from elm_mlx.documents.index_file import Passage, is_unspaced_letter, named_errors, separated
from elm_mlx.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from elm_mlx.documents.static_embeddings import StaticEmbeddings

HEADING_WEIGHT = 4.0  # of a word in a heading, against one in the text: measured in docs/index.md
VECTOR_WEIGHT = 0.25  # of the ranking by vectors, against the one by words: measured in docs/index.md
# Of the best passage's score by words: what has less is not what was asked, and a prompt without it is several times
# shorter. Measured in docs/index.md.
NEAR = 0.7
_FUSED = 60  # Cormack's constant
_RANKED = 50  # passages of each ranking that count
_SCORED = 1000  # passages for each question of a conversation
EARLIER = 0.25  # what a question counts after which another came, and so on: measured in docs/index.md
_EARLIER_QUESTIONS = 3
_MOST_WORDS = 64  # of a question
_WITHIN = "'’.+#-_"  # signs that may stand within a word
_APART = re.compile(f"[{re.escape(_WITHIN)}]+")
# English words that are in nearly every passage: each would have all of them ranked.
_STOP_WORDS = frozenset(
    (
        "a", "about", "am", "an", "and", "any", "are", "as", "at", "be", "been", "but", "by", "can", "could", "did",
        "do", "does", "for", "from", "had", "has", "have", "how", "i", "if", "in", "into", "is", "it", "its", "me",
        "my", "of", "on", "or", "our", "please", "shall", "should", "so", "some", "tell", "than", "that", "the",
        "their", "them", "then", "there", "these", "they", "this", "those", "to", "was", "we", "were", "what", "when",
        "where", "which", "who", "whom", "whose", "why", "will", "with", "would", "you", "your",
    )
)  # fmt: skip


class DocumentIndex:
    """An index of documents, open for questions; of several threads one is answered at a time.

    Args:
        path: the file, from `elm-mlx index`.

    Attributes:
        root: the directory that was indexed.
        notes: on what should be known of it: an update of it was not finished.

    Raises:
        InputError: there is no such index, or it is damaged, or its embeddings are gone.
        ElmError: this Python's SQLite has no FTS5; vectors need model2vec.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = reading.expanded(path)
        self._connection = index_file.connect(self.path)
        self._lock = threading.Lock()
        self._vectors: tuple[int, NDArray[np.int64], NDArray[np.float32]] | None = None
        try:
            with named_errors(self.path):
                root, unfinished = (index_file.read_setting(self._connection, each) for each in ("root", "unfinished"))
                embedder = index_file.read_embedder(self._connection, self.path)
            self.root = Path(str(root))
            again = f"elm-mlx index {reading.quoted(root)} --out {reading.quoted(self.path)}"
            self.notes = (f"{self.path}: not all documents are in it yet: {again}",) if unfinished else ()
            self._embeddings: StaticEmbeddings | None = None
            if embedder is not None:
                from elm_mlx.documents.static_embeddings import embeddings_of

                self._embeddings = embeddings_of(embedder, self.path)
        except ValueError:
            self.close()
            raise InputError(f"{self.path}: is damaged: remove it, and index again") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file. Nothing can be found afterwards."""
        self._connection.close()

    def __len__(self) -> int:
        with self._lock, named_errors(self.path):
            return int(self._connection.execute("SELECT count(*) FROM passages").fetchone()[0])

    def shown(self, passage: Passage) -> str:
        """Returns a passage's place and heading, its file from the working directory where it lies below that."""
        place = self.root / passage.path
        with suppress(ValueError, OSError):  # ValueError: elsewhere
            place = place.relative_to(Path.cwd())
        return replace(passage, path=str(place)).title

    def search(self, question: str, earlier: Sequence[str] = (), count: int = 20) -> list[Passage]:
        """Returns the passages for a question, the best first; none where none shares a word with it.

        A follow-up ("and when was that?") is found by what was asked before: the score of a passage is that for the
        question, and a quarter of that for the one before it, and so on for three of them. By words alone, passages
        whose score is below `NEAR` of the best one's are left out; not with vectors, which find what has no such score.

        Args:
            earlier: the questions of the conversation before this one, oldest first.
            count: passages at most.

        Raises:
            InputError: the index is damaged.
        """
        asked = [question, *earlier[: -_EARLIER_QUESTIONS - 1 : -1]]
        with self._lock, named_errors(self.path), self._snapshot():
            scores = self._by_words(asked)
            if self._embeddings is None:
                least = NEAR * max(scores.values(), default=0.0)
                ranked = [number for number, score in scores.items() if score >= least]
            else:
                ranked = fused({1.0: [*scores], VECTOR_WEIGHT: self._by_vectors(asked)})
            return index_file.read_passages(self._connection, self.path, ranked[:count])

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Sees the index as it is now until the block ends, whatever is written to it meanwhile."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")  # nothing was written

    def _by_words(self, asked: Sequence[str]) -> dict[int, float]:
        """Returns the scores of passages that share words with questions, by their ids, the best first.

        The last question is the first of `asked`.
        """
        scores: dict[int, float] = {}
        expressions = [match_expression(question) for question in asked]
        if not any(expressions):
            expressions = [match_expression(asked[0], stop_words=True)]
        for distance, expression in enumerate(expressions):
            if expression:
                ranked = self._connection.execute(
                    f"SELECT rowid, rank FROM words WHERE words MATCH ? AND rank MATCH 'bm25({HEADING_WEIGHT}, 1.0)' "
                    "ORDER BY rank LIMIT ?",
                    (expression, _SCORED),
                )
                for number, rank in ranked:  # the lower the better
                    scores[number] = scores.get(number, 0.0) - EARLIER**distance * rank
        return dict(sorted(scores.items(), key=lambda scored: -scored[1])[:_RANKED])

    def _by_vectors(self, asked: Sequence[str]) -> list[int]:
        import numpy as np

        assert self._embeddings is not None
        ids, vectors = self._loaded_vectors()
        weights = EARLIER ** np.arange(len(asked), dtype=np.float32)
        wanted = weights @ self._embeddings.vectors(asked).astype(np.float32)
        if not len(ids) or not wanted.any():
            return []
        scores = np.nan_to_num(vectors @ wanted, nan=-1.0)
        most = min(_RANKED, len(scores))
        best = np.flatnonzero(scores >= np.partition(scores, -most)[-most])  # to sort all takes twice the product
        best = best[np.argsort(-scores[best], kind="stable")][:_RANKED]
        return [int(number) for number in ids[best[scores[best] > 0]]]

    def _loaded_vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Returns the ids of all passages that have vectors, and these; read anew when the index has changed."""
        import numpy as np

        version = int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        if self._vectors is None or self._vectors[0] != version:
            assert self._embeddings is not None
            width = self._embeddings.width
            of_file: dict[int, list[int]] = {}
            for number, file in self._connection.execute("SELECT id, file FROM passages ORDER BY id"):
                of_file.setdefault(file, []).append(number)
            ids: list[int] = []
            rows = []
            for file, data in self._connection.execute("SELECT file, rows FROM vectors ORDER BY file"):
                own = of_file.get(file, [])
                if not isinstance(data, bytes) or len(data) != 2 * width * len(own):
                    raise InputError(f"{self.path}: its vectors are damaged: remove it, and index again")
                ids += own
                rows.append(np.frombuffer(data, np.float16).reshape(-1, width))
            together = np.concatenate(rows) if rows else np.zeros((0, width), np.float16)
            self._vectors = version, np.array(ids, np.int64), together.astype(np.float32)  # which is multiplied fast
        return self._vectors[1:]


def match_expression(question: str, stop_words: bool = False) -> str:
    """Returns an FTS5 query for passages that share a word with `question`; empty where there is no word in it.

    Every word is a quoted string, in which FTS5 knows no syntax. One with signs in it, as `--kv-bits` or `read_file`,
    is looked for as a whole and in its parts; a letter that is written without spaces and stands alone, as what a word
    begins with. `stop_words` count only if they are asked for.
    """
    words = "".join(each if _is_of_word(each) else " " for each in separated(question, asked=True)).split()
    parts = [part for word in words for part in (word.strip("'’.-+#"), *_APART.split(word))]
    unique = list(dict.fromkeys(part.lower() for part in parts if part and part.isprintable()))
    wanted = [word for word in unique if stop_words or word not in _STOP_WORDS]
    return " OR ".join(f'"{word}"' + "*" * is_unspaced_letter(word) for word in wanted[:_MOST_WORDS])


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character in _WITHIN or unicodedata.category(character)[0] == "M"


def fused(rankings: Mapping[float, Sequence[int]]) -> list[int]:
    """Returns what rankings hold, the best first, by reciprocal rank fusion, each ranking under its weight."""
    scores: dict[int, float] = {}
    for weight, ranking in rankings.items():
        for rank, number in enumerate(ranking, 1):
            scores[number] = scores.get(number, 0.0) + weight / (_FUSED + rank)
    return sorted(scores, key=lambda number: -scores[number])
