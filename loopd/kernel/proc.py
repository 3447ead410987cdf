"""procfs: read a file of it as a whole, with no system call but the three that it takes."""

from __future__ import annotations

import os

_AT_ONCE = 1 << 16

MOST = 1 << 26
"""Bytes that are read at most. Who may mount in a namespace of his own can have a mount table of more than 1 GB."""


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
