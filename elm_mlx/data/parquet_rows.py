"""The rows of a Parquet file, some at a time, as objects. Importing this does not import pyarrow.

A value that is stored once may stand in any number of rows, so a few kilobytes can hold terabytes of text. What all
rows together unpack to is limited by the size of the file, and counted before a text is made of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from elm_mlx.data import packed_files
from elm_mlx.data.bad_record import BadRecord, key_of
from elm_mlx.errors import ElmError, InputError

_ROWS = 64  # unpacked at once
_ROW_BYTES = 64  # of a row as an object, whatever is in it: rows of nulls are stored in no space
# A file's bytes up to which its texts stay in their dictionaries until they are counted, which reads a seventh as fast:
# what a larger one may unpack to is more than so few rows can be.
_COUNTED_FIRST = 16 << 20


def read_rows(path: Path, columns: Collection[str], start: int) -> Iterator[tuple[int, str, Any]]:
    """Reads the rows of a Parquet file from number `start` on, as `data_files.read`, and raises as it."""
    with _opened(path) as file:
        names = file.schema_arrow.names
        twice = next((name for name in columns if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{path}: has the column {key_of(twice)} twice")
        present, unread = [name for name in names if name in columns], dict.fromkeys(names)
        row = size = 0
        most = packed_files.most_unpacked(path)
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            if row + about.num_rows <= start:
                row += about.num_rows
                continue
            _check_size(path, group, about, present)
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=present):
                size += sum(map(_size, batch.columns)) + _ROW_BYTES * len(batch)
                if size > most:
                    raise InputError(
                        f"{path}, row {row + 1}: rows unpack to more than {most >> 20:,} MB, over {packed_files.RATIO} "
                        "times the file: as JSON lines they may"
                    )
                for value in _row_values(batch):
                    if row >= start:
                        where = f"{path}, row {row + 1} (row group {group})"
                        yield row, where, value if isinstance(value, BadRecord) else unread | value
                    row += 1


def names_of(path: Path) -> list[str]:
    """Returns the names of a Parquet file's columns. Raises as `read_rows`."""
    with _opened(path) as file:
        return list(file.schema_arrow.names)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a Parquet file. Raises InputError, also while the block reads; ElmError where pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ElmError(f"{path}: Parquet needs pyarrow: pip install 'elm-mlx[parquet]'") from None
    try:
        about, texts = parquet.read_metadata(path), None
        if path.stat().st_size <= _COUNTED_FIRST:
            columns = [about.schema.column(number) for number in range(len(about.schema))]
            texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        with parquet.ParquetFile(path, metadata=about, read_dictionary=texts) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a column's name
        raise InputError(f"{path}: not Parquet that can be read: {' '.join(str(error).split())[:200]}") from None


def _check_size(path: Path, group: int, about: Any, columns: Sequence[str]) -> None:
    """Raises InputError where the columns of a row group would fill the memory that a small file asks for."""
    chunks = [about.column(number) for number in range(about.num_columns)]
    chunks = [chunk for chunk in chunks if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns)]
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    packed = sum(chunk.total_compressed_size for chunk in chunks)
    if unpacked > packed_files.LINE_BYTES + packed_files.RATIO * packed:
        raise InputError(
            f"{path}: row group {group} unpacks to {unpacked >> 20:,} MB, over {packed_files.RATIO} times its size"
        )


def _size(column: Any) -> int:
    """Returns the bytes of a column's values, each counted as often as it stands there."""
    import pyarrow.compute

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        lengths = pyarrow.compute.binary_length(column.dictionary).take(column.indices)
        return int(column.indices.nbytes + (pyarrow.compute.sum(lengths).as_py() or 0))
    if pyarrow.types.is_map(kind):  # whose parts do not know of which rows it is
        first, last = (column.offsets[place].as_py() for place in (0, -1))
        return sum(_size(part.slice(first, last - first)) for part in (column.keys, column.items))
    if pyarrow.types.is_struct(kind):
        return sum(map(_size, column.flatten()))
    if kind.num_fields:  # lists of all kinds
        return _size(column.flatten())
    return int(column.nbytes)


def _row_values(batch: Any) -> list[Any]:
    """The rows of a part of a table as objects; BadRecord for one with what Python has no value for."""
    try:
        return cast(list[Any], batch.to_pylist())
    except (ValueError, OverflowError) as error:  # no UTF-8, a time in nanoseconds
        if len(batch) == 1:
            return [BadRecord(f"holds what cannot be read: {' '.join(str(error).split())[:100]}")]
    return [row for number in range(len(batch)) for row in _row_values(batch.slice(number, 1))]
