"""procfs: read a file of it as a whole, with no system call but the three that it takes, or line by line."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

_AT_ONCE = 1 << 16
_PAGE = 1 << 12

MOST = 1 << 20
"""Bytes that `read` reads at most. No file but a mount table is that long: a cgroup's path has at most 4 KiB."""

LONGEST = 1 << 16
"""Bytes of a line that `lines` yields. Of a mount's line each path has at most 16 KiB, if every byte is escaped."""

PATIENCE = 0.25
"""Seconds of CPU time that `lines` spends, the kernel's included."""


class TooLong(Exception):
    """The kernel takes too long to make up the file."""


def read(path: str, most: int = MOST) -> bytes:
    """What the file says, or its first `most` bytes: the kernel makes up no more than is asked for. OSError as open(2)
    and read(2).
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while most and (part := os.read(fd, min(most, _AT_ONCE))):
            parts.append(part)
            most -= len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def in_hosts_user_namespace(pid: int) -> bool:
    """Whether the uids of process `pid` are the host's. OSError as `read`: it is gone."""
    return read(f"/proc/{pid}/uid_map").split() == [b"0", b"0", b"4294967295"]


def knows(pid: int, uid: int) -> bool:
    """Whether a uid of the host's has one in the user namespace of process `pid`. OSError as `read`: it is gone."""
    ranges = [line.split() for line in read(f"/proc/{pid}/uid_map").splitlines()]
    return any(int(first) <= uid < int(first) + int(count) for _, first, count in ranges)


def lines(path: str) -> Iterator[bytes]:
    """The lines of a mount table, without the newline. OSError as open(2) and read(2); `TooLong`.

    A process that may mount in a namespace of its own can have 100,000 mounts there (fs.mount-max), with lines of
    50 KB. Mounted one on top of the other they take the kernel 15 s, although the table has only 4 MB: for each path
    the kernel climbs all mounts below. So the bound is one of time, and of CPU time, because a busy machine is no
    reason to refuse a client. A line that is too long is left out: no file is opened by a path of more than 4096 bytes.
    """
    until = time.thread_time() + PATIENCE
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        rest = b""
        # By pages, so that the clock is looked at often. The kernel makes up at least a page at once, and more once a
        # line was longer.
        while part := os.read(fd, max(_PAGE, len(rest))):
            *whole, rest = (rest + part).split(b"\n")
            yield from (line for line in whole if len(line) <= LONGEST)
            rest = rest[: LONGEST + 1]  # one byte too many: it stays too long, whatever follows
            if time.thread_time() > until:
                raise TooLong(path)
    finally:
        os.close(fd)
