"""What the kernel says of a device in sysfs: its number, its size, its partitions, which binding it carries.

Opens no device, so the main process may call it. What sysfs has of a device may go at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from loopd import loop as lo
from loopd.loop import backing_file
from loopd.worker.files import CLIENT


class Number(NamedTuple):
    """The number of a device; `made` when LOOP_CTL_ADD has been done for it."""

    number: int
    made: bool


class Binding(NamedTuple):
    """One backing file on one device, as the kernel reports it. Sizes in bytes. `diskseq` is its identity; None before
    Linux 5.15.

    `windows`: the partitions of the disk are given as windows, and not as the kernel's partition devices. `window` is
    the name of the partition that this device is a window on: the same file, from the partition's start to its end.
    """

    number: int
    devname: str
    major: int
    minor: int
    diskseq: int | None
    size: int
    offset: int
    sizelimit: int
    sector_size: int
    read_only: bool
    direct_io: bool
    partscan: bool
    backing_file: str
    backing_dev: str
    backing_inode: int
    ref: str
    backing_view: str = CLIENT
    windows: bool = False
    window: str = ""

    @property
    def node(self) -> str:
        """The name of the device's node."""
        return self.window or self.devname

    @property
    def disk(self) -> str:
        """The name of the disk that a window is on; empty for other devices."""
        return self.window.rpartition("p")[0]

    @property
    def whole(self) -> bool:
        """Whether the nodes of the kernel's partitions belong to it, too."""
        return not (self.windows or self.window)

    @property
    def backing(self) -> tuple[int, int]:
        """Device and inode number of the backing file, as stat(2) and LOOP_GET_STATUS64 have them."""
        major, _, minor = self.backing_dev.partition(":")
        return os.makedev(int(major), int(minor)), self.backing_inode


def device_number(name: str, disk: str | None = None) -> tuple[int, int]:
    """Major and minor of a disk, or of partition `name` of `disk`. Never derived from the name: loop.max_part shifts
    it.
    """
    path = f"{lo.sysfs}/block/{name}/dev" if disk is None else f"{lo.sysfs}/block/{disk}/{name}/dev"
    with open(path, encoding="ascii") as attribute:
        major, minor = attribute.read().split(":")
    return int(major), int(minor)


def idle(numbers: set[int]) -> list[int]:
    """Those of the numbers whose device is there and has no file."""
    there = {int(name[4:]) for name in os.listdir(f"{lo.sysfs}/block") if name.startswith("loop")}
    return [number for number in sorted(numbers & there) if backing_file(number) is None]


def size(devname: str) -> int | None:
    """Bytes of a device, as the kernel has it now; None without a device."""
    try:
        return _sectors(f"{lo.sysfs}/block/{devname}/size") * 512
    except OSError:
        return None


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    """What sysfs has of a device may go meanwhile: ENOENT, or ENODEV between open and read."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise


MOST_PARTITIONS = 256
"""The kernel makes no more on one disk (DISK_MAX_PARTS)."""


def partition_names(devname: str, most: int = MOST_PARTITIONS) -> list[str]:
    """Names of the partitions that the kernel has for `devname` now, the first so many."""
    found: list[str] = []
    with _gone():
        found += (name for name in os.listdir(f"{lo.sysfs}/block/{devname}") if name.startswith(f"{devname}p"))
    return sorted(found, key=lambda name: int(name.rpartition("p")[2]))[:most]


def partitions(devname: str, most: int = MOST_PARTITIONS) -> dict[str, tuple[int, int]]:
    """The same with their device numbers."""
    found = {}
    for name in partition_names(devname, most):
        with _gone():
            found[name] = device_number(name, devname)
    return found


class Extent(NamedTuple):
    """Where a partition lies: its name, and start and size on the disk, in bytes."""

    name: str
    start: int
    size: int


def extents(devname: str, most: int) -> tuple[Extent, ...]:
    """Where these partitions lie."""
    found = []
    for name in partition_names(devname, most):
        with _gone():
            start, size = (_sectors(f"{lo.sysfs}/block/{devname}/{name}/{which}") for which in ("start", "size"))
            found.append(Extent(name, start * 512, size * 512))
    return tuple(found)


def _sectors(path: str) -> int:
    """A number of sectors of 512 bytes, whatever the device's sector size is."""
    with open(path, encoding="ascii") as attribute:
        return int(attribute.read())


def sequence(devname: str) -> int | None:
    """The device's sequence number, which every bind and unbind raises; None before Linux 5.15, or without a device."""
    try:
        with open(f"{lo.sysfs}/block/{devname}/diskseq", encoding="ascii") as attribute:
            return int(attribute.read())
    except OSError:
        return None


def still_bound(binding: Binding) -> bool:
    """Whether the number still carries this binding, or is being torn down from it."""
    same = binding.diskseq is None or sequence(binding.devname) == binding.diskseq
    return same and backing_file(binding.number) is not None


def autoclear(devname: str) -> bool | None:
    """Whether the kernel unbinds the device at its last close; None if it is not bound."""
    try:
        with open(f"{lo.sysfs}/block/{devname}/loop/autoclear", encoding="ascii") as attribute:
            return attribute.read() == "1\n"
    except OSError:
        return None
