"""The device that ``loopctl doctor`` attaches: a little memory with a table of one partition, and what becomes of both.

Changes when a device or a partition can fail in another way. Finds out; the words for it are `doctor`'s.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple, Sequence

from loopd.cli.output import described
from loopd.client import api as client
from loopd.client import layers

SIZE = 1 << 20
"""Bytes of the image that is attached."""
SECTOR = 512
START, SECTORS = 64, 1024
"""Of its partition, in sectors."""
LINUX = 0x83


class Partition(NamedTuple):
    """The node of a partition, its device if it is there, and what refuses to open that. `said`: by loopd, where it
    is not there.
    """

    path: str
    device: tuple[int, int] | None = None
    kernels: bool = False
    obstacle: layers.Obstacle | None = None
    said: str = ""


class Trial(NamedTuple):
    """What became of the device. `unscanned`: why it was attached without a look for partitions."""

    path: str = ""
    error: client.Error | None = None
    partition: Partition | None = None
    unscanned: client.Error | None = None


def table() -> bytes:
    """An MBR: 446 bytes of a boot loader's, four entries of 16 bytes, and the signature."""
    # Status, first sector by cylinder, head and sector (none), type, last sector likewise; then both as LBA.
    entry = struct.pack("<B3sB3sII", 0, b"", LINUX, b"", START, SECTORS)
    return bytes(446) + entry.ljust(4 * 16, b"\0") + b"\x55\xaa"


def attempted(asked: client.Client) -> Trial:
    """Attach a device with a partition, and detach it again."""
    try:
        fd = os.memfd_create("loopctl-doctor", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, SIZE)
            os.pwrite(fd, table(), 0)
            return _attached(asked, fd)
        finally:
            os.close(fd)
    except client.Error as error:
        return Trial(error=error)
    except OSError as error:
        return Trial(error=client.Error(described(error)))


def _attached(asked: client.Client, fd: int) -> Trial:
    try:
        with asked.attach(fd, partscan=True) as device:
            return Trial(device.path, partition=look(f"{device.path}p1", device.warnings))
    except client.NotPermitted as error:
        if " partscan " not in error.message:
            raise
        with asked.attach(fd) as device:
            return Trial(device.path, unscanned=error)


def look(path: str, warnings: Sequence[str] = ()) -> Partition:
    """What there is of a partition of a device that is attached."""
    folder, name = os.path.split(path)
    dir_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        number = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_rdev
        device = os.major(number), os.minor(number)
        # With loop.max_part the kernel's own have the major of loop devices, too.
        numbered = f"{device[0]}:{device[1]}"
        kernels = device[0] != layers.LOOP_MAJOR or os.path.exists(f"/sys/dev/block/{numbered}/partition")
        return Partition(path, device, kernels, _obstacle(dir_fd, name, device))
    except FileNotFoundError:
        return Partition(path, said=next((text for text in warnings if text.startswith(f"{name} ")), ""))
    finally:
        os.close(dir_fd)


def _obstacle(dir_fd: int, name: str, device: tuple[int, int]) -> layers.Obstacle | None:
    try:
        os.close(os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd))
    except OSError as error:
        return layers.unopened(dir_fd, name, device, False, error.errno or 0)
    return None
