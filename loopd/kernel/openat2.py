"""openat2(2), for a look into a directory that somebody else keeps locked. Not in Python's os module."""

from __future__ import annotations

import os
import struct

from loopd.kernel import libc

SYS_OPENAT2 = 437  # the same on every architecture; Linux 5.6
RESOLVE_CACHED = 0x20  # <linux/openat2.h>; Linux 5.12, EINVAL before

_OPEN_HOW = struct.Struct("<QQQ")  # flags, mode, resolve


def pin_cached(name: str, directory: int) -> int:
    """An O_PATH fd of what is by that name in the directory, the caller's to close, without waiting for the directory.

    OSError: EAGAIN where the kernel would have to look the name up, as it does for a name that is not there; EINVAL
    before Linux 5.12. A name on tmpfs that is there is always cached.
    """
    how = _OPEN_HOW.pack(os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, RESOLVE_CACHED)
    return libc.call("syscall", SYS_OPENAT2, directory, os.fsencode(name), how, len(how))
