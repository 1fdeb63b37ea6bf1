"""Reads the zip container that torch.save writes.

Stricter than the `zipfile` module: what torch.save never writes (compression, encryption, several disks, entries that
overlap, two of one name, headers that contradict each other) is refused before an entry's bytes are used. Checksums
are not looked at: torch.save may leave them out, and torch.load ignores them too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from elm_mlx.reading import printable
from elm_mlx_convert.tensors import File

# A 3B's training checkpoint with averaged weights has 1,446 entries.
MAX_ENTRIES = 50_000
MAX_DIRECTORY_BYTES = 8 << 20

_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")

_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_PATCHED = 0x0020
_SIZES_FOLLOW = 0x0008  # the local header has zeros where the sizes belong
_SEE_ZIP64 = 0xFFFFFFFF


@dataclass(frozen=True)
class ZipEntry:
    """One file in the archive: `size` bytes of data from byte `start` of the archive."""

    name: str
    start: int
    size: int
    compressed: bool


@dataclass(frozen=True)
class _Listing:
    """An entry as the central directory describes it."""

    name: bytes
    flags: int
    method: int
    checksum: int
    packed: int
    size: int
    header: int  # where its local header is


def read_archive(file: File) -> dict[str, ZipEntry]:
    """Returns every entry by name; folders are left out.

    Raises:
        InputError: says what about the archive is wrong.
    """
    start, size, count = _find_directory(file)
    entries: dict[str, ZipEntry] = {}
    end_of_last = 0
    for listing in sorted(_read_directory(file, start, size, count), key=lambda listing: listing.header):
        entry = _read_local(file, listing, end=start)
        if listing.header < end_of_last:
            raise file.fail(f"is not a sound archive: {printable(entry.name)} overlaps another entry")
        if entry.name in entries:
            raise file.fail(f"is not a sound archive: it has two entries called {printable(entry.name)}")
        end_of_last = entry.start + listing.packed
        entries[entry.name] = entry
    return {name: entry for name, entry in entries.items() if not name.endswith("/")}


def read_entry(file: File, entry: ZipEntry, limit: int) -> bytes:
    """Reads the whole entry, refused above `limit` bytes."""
    require_stored(file, entry)
    if entry.size > limit:
        raise file.fail(f"its {printable(entry.name)} has {entry.size:,} bytes; the limit is {limit:,}")
    return file.read(entry.start, entry.size)


def require_stored(file: File, entry: ZipEntry) -> None:
    """Refuses a compressed entry, whose size in memory is whatever the archive says."""
    if entry.compressed:
        raise file.fail(
            f"its {printable(entry.name)} is compressed, which torch.save never does; save it with torch.save"
        )


def _find_directory(file: File) -> tuple[int, int, int]:
    """Returns the start of the central directory, its size in bytes, and how many entries it lists."""
    tail_start = max(0, file.size - 0xFFFF - _END.size)
    tail = file.read(tail_start, file.size - tail_start)
    at = tail.rfind(b"PK\5\6")
    while at >= 0 and not (len(tail) - at >= _END.size and _END.unpack_from(tail, at)[7] == len(tail) - at - _END.size):
        at = tail.rfind(b"PK\5\6", 0, at)
    if at < 0:
        raise file.fail("is a truncated archive: the directory at its end is missing; copy or download it again")
    _, disk, first_disk, count_here, count, size, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    if end >= _LOCATOR.size and (locator := file.read(end - _LOCATOR.size, _LOCATOR.size)).startswith(b"PK\6\7"):
        narrow = (count, size, start)
        _, end_disk, end64, disks = _LOCATOR.unpack(locator)
        if end64 + _END64.size != end - _LOCATOR.size:
            raise file.fail("is not a sound archive: its zip64 records do not follow each other")
        end = end64
        mark, length, _, _, disk, first_disk, count_here, count, size, start = _END64.unpack(
            file.read(end64, _END64.size)
        )
        if mark != b"PK\6\6" or length != _END64.size - 12:
            raise file.fail("is not a sound archive: its zip64 end record is malformed")
        wide = zip(narrow, (count, size, start), (0xFFFF, _SEE_ZIP64, _SEE_ZIP64), strict=True)
        if any(value not in (full, escape) for value, full, escape in wide):
            raise file.fail("is not a sound archive: its two end records disagree")
        if end_disk or disks > 1:
            raise file.fail("is one part of an archive over several disks")
    if disk or first_disk or count_here != count:
        raise file.fail("is one part of an archive over several disks")
    if start + size != end:
        raise file.fail("is not a sound archive: its directory is not where its end record says")
    if count > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES:
        raise file.fail(f"lists {count:,} entries in {size:,} bytes; the limit is {MAX_ENTRIES:,} entries")
    return start, size, count


def _read_directory(file: File, start: int, size: int, count: int) -> list[_Listing]:
    directory = file.read(start, size)
    listings = []
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > size or not directory.startswith(b"PK\1\2", at):
            raise file.fail("is not a sound archive: its directory ends before all its entries are listed")
        fields = _ENTRY.unpack_from(directory, at)
        (flags, method), (checksum, packed, full) = fields[3:5], fields[7:10]
        (name_size, extra_size, comment_size, disk), header = fields[10:14], fields[16]
        at += _ENTRY.size
        name, extra = directory[at : at + name_size], directory[at + name_size : at + name_size + extra_size]
        at += name_size + extra_size + comment_size
        if at > size:
            raise file.fail("is not a sound archive: its directory ends inside an entry")
        full, packed, header = _widen(file, extra, [full, packed, header])
        if disk:
            raise file.fail("is one part of an archive over several disks")
        listings.append(_Listing(name, flags, method, checksum, packed, full, header))
    if at != size:
        raise file.fail("is not a sound archive: its directory holds more than its entries")
    return listings


def _widen(file: File, extra: bytes, values: list[int]) -> list[int]:
    """Returns `values`, those that are too large for 32 bits taken from the zip64 field of `extra`."""
    if _SEE_ZIP64 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        wanted = values.count(_SEE_ZIP64)
        if kind == 1 and len(body) == length >= 8 * wanted:
            wide = iter(struct.unpack_from(f"<{wanted}Q", body))
            return [next(wide) if value == _SEE_ZIP64 else value for value in values]
        at += 4 + length
    raise file.fail("is not a sound archive: a zip64 size is announced but missing")


def _read_local(file: File, listing: _Listing, end: int) -> ZipEntry:
    """Returns the entry, once its local header says the same as the directory and its data lies before `end`."""
    name = _checked_name(file, listing.name)
    if listing.flags & _ENCRYPTED:
        raise file.fail(f"its {printable(name)} is encrypted")
    if listing.flags & _PATCHED:
        raise file.fail(f"its {printable(name)} is a patch to another archive")
    if listing.header + _LOCAL.size > end:
        raise file.fail(f"is not a sound archive: {printable(name)} starts past the end of the data")
    header = file.read(listing.header, _LOCAL.size)
    mark, _, flags, method, _, _, checksum, packed, size, name_size, extra_size = _LOCAL.unpack(header)
    disagree = file.fail(f"is not a sound archive: the two headers of {printable(name)} disagree")
    if (mark, flags, method, name_size) != (b"PK\3\4", listing.flags, listing.method, len(listing.name)):
        raise disagree
    start = listing.header + _LOCAL.size + name_size + extra_size
    if start + listing.packed > end:
        raise file.fail(f"is not a sound archive: {printable(name)} is longer than the data that is there")
    if _SEE_ZIP64 in (packed, size):
        size, packed = _widen(file, file.read(start - extra_size, extra_size), [size, packed])
    sizes = (checksum, packed, size)
    left_out = bool(flags & _SIZES_FOLLOW) and sizes == (0, 0, 0)
    if not left_out and sizes != (listing.checksum, listing.packed, listing.size):
        raise disagree
    if file.read(listing.header + _LOCAL.size, name_size) != listing.name:
        raise disagree
    if not listing.method and listing.packed != listing.size:
        raise file.fail(f"is not a sound archive: {printable(name)} has two sizes, {listing.packed} and {listing.size}")
    return ZipEntry(name, start, listing.size, compressed=bool(listing.method))


def _checked_name(file: File, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise file.fail("is not a sound archive: an entry's name is not UTF-8") from None
    parts = name.removesuffix("/").split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name:
        raise file.fail(f"is not a sound archive: {printable(name) or 'an entry'} is not a name that stays inside it")
    return name
