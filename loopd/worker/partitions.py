"""The partition table as loopd sees it: whether it changed. The kernel alone says what the table means.

Looks at the image file and not at the device. If loopd opened the device at the moment of a client's close, that close
would not be the last, and the last close writes the device's cache back.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib

from loopd.loop import Loop
from loopd.protocol.wire import Code, Refusal
from loopd.worker.devices import Binding

ENDS = 65536
"""Bytes at both ends of a device in which every partition table lies, but for the logical partitions of an MBR."""
MBR_TABLE = slice(446, 512)
"""The four entries and the signature; the boot code is in front of them."""
_ENTRY = struct.Struct("<4xB3xII")  # type, first sector, sectors
EXTENDED = (0x05, 0x0F, 0x85)
PROTECTIVE = 0xEE
MOST_LOGICAL = 256
"""Links of the chain of logical partitions that are followed: the kernel makes no more partitions."""

_GPT_HEADER = struct.Struct("<8s64xQII")  # signature; at 72: first sector of the entries, their number, bytes of one
_GPT_SIGNATURE = b"EFI PART"
_MOST_ENTRIES = 32768
"""Bytes of entries that are looked at; 16 KiB is usual."""


class _Window:
    """The part of the file that is the device."""

    def __init__(self, fd: int, binding: Binding) -> None:
        self._fd = fd
        self._offset = binding.offset
        self.size = max(0, os.fstat(fd).st_size - binding.offset)
        if binding.sizelimit:
            self.size = min(self.size, binding.sizelimit)
        self.sector = binding.sector_size

    def read(self, start: int, length: int) -> bytes:
        """What is there; nothing outside of the device."""
        length = min(length, self.size - start)
        return b"" if start < 0 or length <= 0 else os.pread(self._fd, length, self._offset + start)


def look(fd: int, binding: Binding) -> int:
    """A checksum of the partition table in the image file `fd`, by which a change is seen. OSError as pread(2).

    It is of the entries of an MBR, with those of the logical partitions; of header and entries of a GPT, at both ends;
    of all bytes at both ends, where any other table lies.
    """
    device = _Window(fd, binding)
    first = device.read(0, 512)
    if first[510:512] != b"\x55\xaa":
        return zlib.crc32(device.read(max(0, device.size - ENDS), ENDS), zlib.crc32(device.read(0, ENDS)))
    types = [_ENTRY.unpack_from(first, MBR_TABLE.start + 16 * index)[0] for index in range(4)]
    found = zlib.crc32(first[MBR_TABLE])
    if PROTECTIVE in types:
        last = device.size // device.sector - 1
        for header in (1, last):
            found = _gpt(device, header, found)
        return found
    return _logical(device, first, found)


def _gpt(device: _Window, header: int, found: int) -> int:
    data = device.read(header * device.sector, 512)
    if len(data) < 512:
        return found
    found = zlib.crc32(data, found)
    signature, entries, count, size = _GPT_HEADER.unpack_from(data)
    if signature == _GPT_SIGNATURE:
        found = zlib.crc32(device.read(entries * device.sector, min(count * size, _MOST_ENTRIES)), found)
    return found


def _logical(device: _Window, table: bytes, found: int) -> int:
    """The tables of the logical partitions: each names the next, relative to the extended partition."""
    extended = at = 0
    for _ in range(MOST_LOGICAL):
        links = [
            start for kind, start, _ in (_ENTRY.unpack_from(table, MBR_TABLE.start + 16 * index) for index in range(4))
            if kind in EXTENDED
        ]  # fmt: skip
        if not links:
            break
        at = extended + links[0]
        extended = extended or at
        table = device.read(at * device.sector, 512)
        if len(table) < 512 or table[510:512] != b"\x55\xaa":
            break
        found = zlib.crc32(table[MBR_TABLE], found)
    return found


def reread(loop: Loop) -> None:
    """Have the kernel read the partition table again; needs CAP_SYS_ADMIN, which a container has not.

    A refusal says why the kernel does not read it; then no partition has changed.
    """
    try:
        loop.reread_partitions()
    except OSError as error:
        code, meaning = _REREAD.get(error.errno or 0, (Code.IO, "the kernel cannot read the table: {}"))
        raise Refusal(code, meaning.format(error)) from error


_REREAD = {
    errno.EBUSY: (Code.BUSY, "a partition is in use: {}"),
    errno.EINVAL: (Code.UNSUPPORTED, "the kernel looks for no partitions on this device: {}"),
    errno.EACCES: (Code.UNSUPPORTED, "this loopd runs without CAP_SYS_ADMIN: {}"),
    errno.EPERM: (Code.UNSUPPORTED, "this loopd runs without CAP_SYS_ADMIN: {}"),
}  # fmt: skip
