"""Who has a device open: processes, mounts, and devices on top of it, as the host's administrator sees them.

Changes when the kernel tells it in another way. Looks at /proc and /sys alone and asks no daemon. Opens nothing that it
finds, and asks no file system that might not answer. Leaves out what this user may not see: root of the host sees all.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from time import process_time

from loopd.client.layers import unescaped

AT_FDCWD = -100
AT_STATX_DONT_SYNC = 0x4000
STATX_TYPE = 0x1
_STATX = struct.Struct("=28xH98xII120x")  # mode and device number of struct statx (statx(2))

_libc = ctypes.CDLL(None, use_errno=True)


LONGEST = 1 << 16
"""Bytes of a line of a mount table that is looked at: each of its paths has at most 16 KiB."""

PATIENCE = 0.25
"""Seconds of CPU time for one mount table: whoever may mount in a namespace of his own can have one of more than 1 GB,
or one that takes the kernel 15 s to make up.
"""


def _device(path: str) -> tuple[int, int] | None:
    """Major and minor of the block device that `path` leads to; stat(2) would wait for a FUSE file that hangs."""
    buffer = ctypes.create_string_buffer(_STATX.size)
    if _libc.statx(AT_FDCWD, os.fsencode(path), AT_STATX_DONT_SYNC, STATX_TYPE, buffer) < 0:
        return None
    mode, major, minor = _STATX.unpack(buffer.raw)
    return (major, minor) if stat.S_ISBLK(mode) else None


def _read(path: str) -> str:
    with suppress(OSError), open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read()
    return ""


def _mount_lines(pid: str) -> Iterator[str]:
    """The mount table of a process, a line at a time; what is longer or takes longer than it should is left out."""
    until = process_time() + PATIENCE
    with suppress(OSError), open(f"/proc/{pid}/mountinfo", "rb") as file:
        begins = True
        for line in iter(lambda: file.readline(LONGEST), b""):
            if process_time() > until:
                return
            ends = line.endswith(b"\n")
            if begins and ends:
                yield line[:-1].decode(errors="surrogateescape")
            begins = ends


def _numbers(devnames: Collection[str]) -> dict[tuple[int, int], str]:
    """The devices and their partitions, by major and minor."""
    found = {}
    for devname in devnames:
        folder = f"/sys/block/{devname}"
        with suppress(OSError):
            for name in ("", *(name for name in os.listdir(folder) if name.startswith(f"{devname}p"))):
                with suppress(ValueError):
                    major, minor = _read(os.path.join(folder, name, "dev")).split(":")
                    found[int(major), int(minor)] = devname
    return found


def _of_process(pid: str, numbers: Mapping[tuple[int, int], str]) -> set[str]:
    """The devices that a process has open."""
    found = set()
    with suppress(OSError):  # the process has ended, or is another user's
        for fd in os.listdir(f"/proc/{pid}/fd"):
            device = _device(f"/proc/{pid}/fd/{fd}")
            if device is not None and device in numbers:
                found.add(numbers[device])
    return found


def _of_mounts(pid: str, numbers: Mapping[tuple[int, int], str]) -> Iterator[tuple[str, str]]:
    """The devices with a file system that a process sees mounted, and where."""
    for line in _mount_lines(pid):
        fields = line.split(" ", 5)
        with suppress(ValueError, IndexError):
            major, minor = fields[2].split(":")
            device = (int(major), int(minor))
            if device in numbers:
                yield numbers[device], unescaped(fields[4])


def _of_devices(devname: str) -> Iterator[str]:
    """The devices made of a device, as by device mapper."""
    for folder in (f"/sys/block/{devname}", *_partition_folders(devname)):
        with suppress(OSError):
            yield from sorted(os.listdir(f"{folder}/holders"))


def _partition_folders(devname: str) -> Iterator[str]:
    with suppress(OSError):
        for name in os.listdir(f"/sys/block/{devname}"):
            if name.startswith(f"{devname}p"):
                yield f"/sys/block/{devname}/{name}"


def find(devnames: Collection[str], daemon: int) -> dict[str, tuple[str, ...]]:
    """Who has each device open, as text: ``mke2fs[123]``, ``/mnt in bash[45]``, ``dm-0``.

    `daemon` is loopd's process, which is left out with its helpers; 0 where it is of another PID namespace. A file
    system is named once for each mount namespace.
    """
    numbers = _numbers(devnames)
    found: dict[str, list[str]] = {devname: list(_of_devices(devname)) for devname in devnames}
    namespaces = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        status = dict(line.split(":\t", 1) for line in _read(f"/proc/{pid}/status").split("\n") if ":\t" in line)
        process = f"{status.get('Name', '?')}[{pid}]"
        if daemon == 0 or str(daemon) not in (pid, status.get("PPid")):
            for devname in _of_process(pid, numbers):
                found[devname].append(process)
        with suppress(OSError):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in namespaces:
                namespaces.add(namespace)
                for devname, point in _of_mounts(pid, numbers):
                    found[devname].append(f"{point} in {process}")
    return {devname: tuple(openers) for devname, openers in found.items()}
