"""Partition tables as the stand-ins need them: number, start and size of what a GPT or an MBR has.

Knows these two kinds, and believes nothing: a GPT counts if its checksums are right, as for the kernel. Changes
nothing. Packed into the stand-ins; standard library of Python 3.8 and later.
"""

from __future__ import annotations

import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Tuple

    Partition = Tuple[int, int, int, int]
    """Number, start and size in units of 512 bytes, and the number of the extended partition that it is in, or 0."""


SEEK_END = 2  # <unistd.h>

PROTECTIVE = 0xEE
EXTENDED = (0x05, 0x0F, 0x85)
MOST = 256
"""Partitions that are read at most: a chain of logical ones may lead into itself."""


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def read_table(fd: int, sector: int, force_gpt: bool = False) -> tuple[str, list[Partition]]:
    """The kind of table, "gpt", "dos" or none, and its partitions in the order of the table; `sector` in bytes.

    A GPT counts only where an MBR says that there is one, or if it is forced.
    """
    first = posix.pread(fd, 512, 0)
    is_mbr = first[510:] == b"\x55\xaa"
    protective = is_mbr and PROTECTIVE in [entry[4] for entry in entries_of(first, 4)]
    if force_gpt or protective:
        found = read_gpt(fd, sector, 1)
        if found is None:
            found = read_gpt(fd, sector, posix.lseek(fd, 0, SEEK_END) // sector - 1)
        if found is not None:
            return "gpt", found
    return ("dos", read_dos(fd, sector, first)) if is_mbr and not protective else ("", [])


def table_of(path: str, sector: int, force_gpt: bool = False) -> tuple[str, list[Partition]]:
    """`read_table` of a device. OSError as open(2) and pread(2)."""
    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return read_table(fd, sector, force_gpt)
    finally:
        posix.close(fd)


def entries_of(block: bytes, count: int) -> list[bytes]:
    """The entries of a block of an MBR."""
    return [block[446 + 16 * index : 462 + 16 * index] for index in range(count)]


def read_dos(fd: int, sector: int, first: bytes) -> list[Partition]:
    unit = sector // 512
    found: list[Partition] = []
    logical: list[Partition] = []
    for index, entry in enumerate(entries_of(first, 4), 1):
        start, size = number(entry[8:12]) * unit, number(entry[12:16]) * unit
        if entry[4] in EXTENDED and size:
            # Of an extended partition there is room for a boot loader, and no more.
            found.append((index, start, max(2, unit), 0))
            logical += read_extended(fd, sector, start, index, 5 + len(logical))
        elif size:
            found.append((index, start, size, 0))
    return found + logical


def read_extended(fd: int, sector: int, start: int, container: int, following: int) -> list[Partition]:
    """The logical partitions of an extended one: each in a block that leads to the next."""
    unit = sector // 512
    found: list[Partition] = []
    here = start
    seen: set[int] = set()
    while here not in seen and len(seen) < MOST:
        seen.add(here)
        block = posix.pread(fd, 512, here * 512)
        if block[510:] != b"\x55\xaa":
            break
        following_block = None
        for entry in entries_of(block, 2):
            offset, size = number(entry[8:12]) * unit, number(entry[12:16]) * unit
            if entry[4] in EXTENDED:
                following_block = start + offset if offset and size else following_block
            elif size:
                found.append((following + len(found), here + offset, size, container))
        if following_block is None:
            break
        here = following_block
    return found


def read_gpt(fd: int, sector: int, lba: int) -> list[Partition] | None:
    """The partitions of the GPT whose header is there; None where none is, or a damaged one."""
    from binascii import crc32  # noqa: PLC0415

    header = posix.pread(fd, sector, lba * sector)
    size = number(header[12:16])
    if header[:8] != b"EFI PART" or not 92 <= size <= sector or number(header[24:32]) != lba:
        return None
    if crc32(header[:16] + bytes(4) + header[20:size]) != number(header[16:20]):
        return None
    start, count, length = number(header[72:80]), number(header[80:84]), number(header[84:88])
    if length < 128 or length % 8 or count * length > 1 << 20:
        return None
    array = posix.pread(fd, count * length, start * sector)
    if crc32(array) != number(header[88:92]):
        return None
    unit = sector // 512
    found = []
    for index in range(min(count, MOST)):
        entry = array[index * length : (index + 1) * length]
        begin, end = number(entry[32:40]), number(entry[40:48])
        if any(entry[:16]) and begin <= end:
            found.append((index + 1, begin * unit, (end - begin + 1) * unit, 0))
    return found
