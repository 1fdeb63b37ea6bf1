"""Data sets on the Hugging Face Hub: the files of one, from the cache, or fetched into it; never code.

`hub:OWNER/NAME` has the files that a directory with the same ones would give, `hub:OWNER/NAME:SPLIT` those of one
split. Further parts say which: `hub:OWNER/NAME@REVISION/FOLDER-OR-FILE:SPLIT`. Where a repository has no data files,
those are taken that the hub makes of it, in Parquet. Importing this does not import huggingface_hub.
"""

from __future__ import annotations

import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from elm_mlx import hub
from elm_mlx.data import split_files
from elm_mlx.data.data_files import RECORDS
from elm_mlx.data.split_files import SplitFiles
from elm_mlx.errors import InputError
from elm_mlx.hub import Contents, Repository

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
        own = Repository(self.repository, self.revision, "dataset")
        found = _listed(own)
        made = replace(own, revision=_MADE)
        if not found.sizes and self.revision is None and (hub.snapshot(made) is not None or not hub.offline()):
            with suppress(InputError):  # the hub has made none
                own, found = made, _listed(made)
        chosen = self._chosen(sorted(found.sizes))
        names = [name for names, _ in chosen.values() for name in names]
        directory = hub.download(own, found, names)
        return {
            split: SplitFiles([directory / name for name in names], missing)
            for split, (names, missing) in chosen.items()
        }

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


def _listed(of: Repository) -> Contents:
    """Returns a repository's files of records. Raises as `hub.contents`, and InputError where it has too many files."""
    found = hub.contents(of)
    if len(found.sizes) > _MOST_FILES:
        raise InputError(f"{of}: has {len(found.sizes):,} files; name a folder of it")
    return replace(found, sizes={name: size for name, size in found.sizes.items() if name.lower().endswith(RECORDS)})
