"""Data sets on the Hugging Face Hub: the files of one, from the cache, or fetched into it; never code.

`hub:OWNER/NAME` has the files that a directory with the same ones would give, `hub:OWNER/NAME:SPLIT` those of one
split. Further parts say which: `hub:OWNER/NAME@REVISION/FOLDER-OR-FILE:SPLIT`. Where a repository has no data files,
those are taken that the hub makes of it, in Parquet. Importing this does not import huggingface_hub.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from elm_mlx.data import split_files
from elm_mlx.data.data_files import RECORDS
from elm_mlx.data.split_files import SplitFiles
from elm_mlx.errors import ElmError, InputError

PREFIX = "hub:"
_NAME = re.compile(
    r"hub:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/:]+))?(?:/(?P<path>[^:]+))?(?::(?P<split>[^:/]+))?"
)
_MADE = "refs/convert/parquet"  # the hub's own revision, which has every data set as Parquet
_MOST_FILES = 100_000


@dataclass(frozen=True)
class HubData:
    """A data set's name, taken apart.

    Attributes:
        revision: a branch, tag or commit; None for the newest.
        path: a folder or file in it; empty for all of it.
        split: the only one to be taken, as `train`; None for each as it is called.
    """

    repository: str
    revision: str | None = None
    path: str = ""
    split: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubData:
        """Takes a name apart. Raises InputError."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise InputError(f"{name}: write hub:OWNER/NAME, and if need be @REVISION, /FOLDER and :SPLIT after it")
        return cls(found["repository"], found["revision"], (found["path"] or "").strip("/"), found["split"])

    def files(self) -> dict[str, SplitFiles]:
        """Returns the data set's files by split, as `split_files.find`; those that the cache has not are fetched.

        Raises:
            InputError: there is no such data set, or it has no data that can be read, or several that could be meant.
            ElmError: the hub cannot be reached, and the cache does not have it.
        """
        revisions = [self.revision] if self.revision is not None else [None, _MADE]
        for revision in revisions:
            names = [name for name in self._listed(revision) if name.lower().endswith(RECORDS)]
            if names or revision == revisions[-1]:
                return self._fetched(names, revision)
        raise AssertionError

    def _fetched(self, names: list[str], revision: str | None) -> dict[str, SplitFiles]:
        found = self._chosen(names)
        splits = {}
        with self._failures_named():
            from huggingface_hub import hf_hub_download

            for split, (chosen, missing) in found.items():
                paths = [
                    Path(hf_hub_download(self.repository, name, repo_type="dataset", revision=revision))
                    for name in chosen
                ]
                splits[split] = SplitFiles(paths, missing)
        return splits

    def _chosen(self, names: list[str]) -> dict[str, tuple[list[str], str | None]]:
        """Which of a repository's files are meant, by split, as if they lay in a directory."""
        if self.path in names:
            return {"train": ([self.path], None)}
        inside = [name for name in names if not self.path or name.startswith(f"{self.path}/")]
        if len(inside) == 1 and self.split is None:  # by whatever name
            return {"train": (inside, None)}
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            for name in inside:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).touch()
            place = root / self.path
            try:
                if not inside:
                    raise InputError(f"{place}: has no data that can be read ({', '.join(RECORDS[:3])}, CSV, Parquet)")
                found = split_files.find(place, split=self.split)
            except InputError as error:
                said = str(error).replace(str(place), f"{PREFIX}{self}").replace("pass", "name")
                folder = f"; {PREFIX}{self.repository}/FOLDER-OR-FILE names one" if inside else ""
                raise InputError(f"{said}{folder}") from None
            return {
                split: ([path.relative_to(root).as_posix() for path in files.paths], files.missing)
                for split, files in found.items()
            }

    def __str__(self) -> str:
        return f"{self.repository}{f'/{self.path}' if self.path else ''}"

    def _listed(self, revision: str | None) -> list[str]:
        """The names of a repository's files: of the hub, or where it is not to be asked, of the cache."""
        with self._failures_named():
            from huggingface_hub import HfApi, constants, snapshot_download
            from huggingface_hub.errors import RevisionNotFoundError

            if constants.HF_HUB_OFFLINE:
                try:
                    folder = snapshot_download(
                        self.repository, repo_type="dataset", revision=revision, local_files_only=True
                    )
                except FileNotFoundError:
                    if revision == _MADE:
                        return []
                    raise
                found = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
                names = [path.as_posix() for path in found]
            else:
                try:
                    about = HfApi().dataset_info(self.repository, revision=revision, timeout=30)
                    names = [each.rfilename for each in about.siblings or ()]
                except RevisionNotFoundError:
                    if revision == _MADE:
                        return []
                    raise
        if len(names) > _MOST_FILES:
            raise InputError(f"{PREFIX}{self}: has {len(names):,} files; name a folder of it")
        return sorted(name for name in names if ".." not in PurePosixPath(name).parts and not name.startswith("/"))

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """Raises what goes wrong with the hub as one line."""
        try:
            yield
        except (InputError, ElmError):
            raise
        except Exception as error:  # its own kinds, the network's, the server's
            raise self._explained(error) from None

    def _explained(self, error: Exception) -> ElmError:
        from huggingface_hub import errors

        name = f"{PREFIX}{self}"
        if isinstance(error, errors.GatedRepoError):
            return InputError(f"{name}: is gated: accept its terms on the hub, and log in by `hf auth login`")
        if isinstance(error, errors.RevisionNotFoundError):
            return InputError(f"{name}: the hub has no revision {self.revision} of it")
        if isinstance(error, errors.RepositoryNotFoundError):
            return InputError(f"{name}: the hub has no such data set (or it is private: `hf auth login`)")
        if isinstance(error, FileNotFoundError):
            return ElmError(f"{name}: is not in the hub's cache, and HF_HUB_OFFLINE keeps it from being fetched")
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return ElmError(f"{name}: cannot be had from the hub: {reason}")
