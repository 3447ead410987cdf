"""procfs: read a file of it as a whole, with no system call but the three that it takes."""

from __future__ import annotations

import os

_AT_ONCE = 1 << 16


def read(path: str, most: int | None = None) -> bytes:
    """What the file says, or its first `most` bytes: the kernel makes up no more than is asked for. OSError as open(2)
    and read(2).
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = part = os.read(fd, most or _AT_ONCE)
        while part and most is None:
            part = os.read(fd, _AT_ONCE)
            found += part
        return found
    finally:
        os.close(fd)
