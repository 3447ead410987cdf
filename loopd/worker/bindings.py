"""The table of bindings in the state directory: what loopd has bound, for a start at which the slots are lost.

One row for each slot. The worker that binds or releases writes it: before the bind, which file is to be bound to which
number, and after it the diskseq. Bindings end with the boot, and the table with them: nothing of it has to be on disk.
"""

from __future__ import annotations

import contextlib
import glob
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from loopd.worker.devices import Binding

ROWS = 12288
"""As many as there are slots at most."""
_HEADER = struct.Struct("<8s24x32s16x")  # magic, boot id
_ROW = struct.Struct("<QQQQ")  # number + 1, device and inode of the file, diskseq + 1; 0 where there is none
_MAGIC = b"loopd\x00b1"
BOOT_ID = "LOOPD_BOOT_ID"
"""Name of the environment variable with the boot id."""


def _boot_id() -> str:
    """The 32 hexadecimal digits that systemd calls %b. The service gives them: its /proc has no sys (ProcSubset=)."""
    if BOOT_ID not in os.environ:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip().replace("-", "")
    return os.environ[BOOT_ID]


class Row(NamedTuple):
    """One binding. `diskseq` is None where the device had not been bound yet, and before Linux 5.15."""

    row: int
    number: int
    file_dev: int
    file_inode: int
    diskseq: int | None


class Bindings:
    """The table of one instance."""

    def __init__(self, path: str) -> None:
        """Open the table, and empty it when it is of another boot; OSError where that cannot be done."""
        self._path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        header = _HEADER.pack(_MAGIC, _boot_id().encode())
        if os.pread(self.fd, _HEADER.size, 0) != header:
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, header, 0)
            # All rows on disk now: a full disk later stops no attach.
            os.posix_fallocate(self.fd, 0, _HEADER.size + ROWS * _ROW.size)

    def _write(self, row: int, number: int, dev: int, inode: int, diskseq: int) -> None:
        # A row may fail to be written (EIO; ENOSPC where the file system copies on write). It is missed only where the
        # fd store is lost as well.
        with contextlib.suppress(OSError):
            os.pwrite(self.fd, _ROW.pack(number, dev, inode, diskseq), _HEADER.size + row * _ROW.size)

    def note(self, row: int, binding: Binding) -> None:
        """The file is bound to the number; where the diskseq is not known, it is about to be."""
        diskseq = 0 if binding.diskseq is None else binding.diskseq + 1
        self._write(row, binding.number + 1, *binding.backing, diskseq)

    def forget(self, row: int) -> None:
        """Empty the row: loopd has let go of the device."""
        self._write(row, 0, 0, 0, 0)

    def rows(self) -> Iterator[Row]:
        """Every row that says something."""
        yield from _rows(os.pread(self.fd, ROWS * _ROW.size, _HEADER.size))

    def elsewhere(self, number: int, diskseq: int | None) -> bool:
        """Whether the table of another instance has this binding. Instances have a directory grant's numbers in common.
        """
        for path in glob.glob(os.path.join(glob.escape(os.path.dirname(self._path)), "bindings.*")):
            if path != self._path:
                with contextlib.suppress(OSError), open(path, "rb") as table:
                    table.seek(_HEADER.size)
                    if any((row.number, row.diskseq) == (number, diskseq) for row in _rows(table.read())):
                        return True
        return False


def _rows(data: bytes) -> Iterator[Row]:
    if data.strip(b"\0"):
        whole = data[: len(data) // _ROW.size * _ROW.size]
        for row, (number, dev, inode, diskseq) in enumerate(_ROW.iter_unpack(whole)):
            if number:
                yield Row(row, number - 1, dev, inode, diskseq - 1 if diskseq else None)
