"""inotify(7) through the C library: which watch something happened to. Knows nothing of what is watched."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from loopd.kernel import libc

IN_MODIFY = 0x2
IN_CLOSE_WRITE = 0x8
IN_IGNORED = 0x8000
IN_DONT_FOLLOW = 0x02000000
IN_NONBLOCK, IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC

OVERFLOW = -1
"""The watch of an event that says that others were lost: fs.inotify.max_queued_events."""

_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name: struct inotify_event


class Inotify:
    """One inotify instance; every event is of a single watched file, never of a directory's entries."""

    def __init__(self) -> None:
        self.fd = libc.call("inotify_init1", IN_NONBLOCK | IN_CLOEXEC)

    def add(self, path: str, mask: int) -> int:
        """Watch a file; the number of the watch, the same again for a file that has one. OSError as
        inotify_add_watch(2).
        """
        return add_watch(self.fd, path, mask)

    def remove(self, watch: int) -> None:
        """Watch it no longer; one that the kernel has removed already is no error."""
        libc.library.inotify_rm_watch(self.fd, watch)

    def events(self) -> Iterator[tuple[int, int]]:
        """What happened since the last call: (watch, mask)."""
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size + length
            yield watch, mask

    def close(self) -> None:
        os.close(self.fd)


def add_watch(fd: int, path: str, mask: int) -> int:
    """As `Inotify.add`, on the fd of an instance that is another process's."""
    return libc.call("inotify_add_watch", fd, os.fsencode(path), mask)
